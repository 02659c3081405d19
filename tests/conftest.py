"""What the test files share: the scripts from the repository root, and small images to run them on."""

import colorsys
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

# One thread each: the tests' networks are tiny, and threads that wait for each other on a busy machine take minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The default convolutions, so that the tests see the same numbers whatever is fastest at the moment.
os.environ.setdefault("UNIREPLKNET_DEPTHWISE", "default")

if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup, as which tests would be another case

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import makedata  # noqa: E402
import train  # noqa: E402
from forked import find_no_groups, touch_curves, touch_diagram  # noqa: E402
from common import calibration, run_folder  # noqa: E402
from common.manifest import read_table  # noqa: E402
from common.options import READER, current_values  # noqa: E402
from models import depthwise_choice  # noqa: E402

hypothesis.settings.register_profile("unhurried", deadline=None)  # on a busy machine an example may take seconds
hypothesis.settings.load_profile("unhurried")

DEFAULTS = current_values(vars(train))
# float32 everywhere, so that the tests see the same numbers on CPUs with and without bfloat16.
SMALL = dict(MODEL="unireplknet_test", IMG_SIZE=32, BATCH_SIZE=4, EPOCHS=2, WORKERS=0, WARMUP_EPOCHS=0.5)
# AdamW, since muon's matrix products take longer than everything else with so few and small images.
SMALL |= dict(DEVICE="cpu", AMP="off", OPTIMIZER="adamw")
CLASSES = {"Common wheat": 10, "Maize": 10, "玉米 苗": 10}


@pytest.fixture(autouse=True)
def no_reader_left():
    """Threads that read files for a loader in a kept traceback end: a script that ends beside one ends the process."""
    if any(thread.name.startswith(READER) for thread in threading.enumerate()):
        gc.collect()


@pytest.fixture(scope="session")
def golden():
    """Folder of the reference results."""
    return ROOT / "tests" / "golden"


@pytest.fixture
def run_script(tmp_path):
    """Run a script of the repository in `tmp_path`, as a user does: run_script("makedata.py", "--seed", "1")."""

    def run(script, *args):
        return subprocess.run(
            [sys.executable, ROOT / script, *map(str, args)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            encoding="utf-8",
            timeout=300,
        )

    return run


def draw_noise(key, size=(48, 48), colour=None):
    """An image of noise, about `colour` if one is given; the same key gives the same pixels.

    Args:
        key: any text.
        size: width and height.
        colour: three values from 0 to 255.
    """
    width, height = (size, size) if isinstance(size, int) else size
    noise = np.random.default_rng(zlib.crc32(key.encode())).integers(0, 256, (height, width, 3))
    if colour is not None:
        noise = np.clip((noise - 128) / 4 + colour, 0, 255)
    return Image.fromarray(noise.astype(np.uint8))


def fill_classes(root, counts, size=48):
    """Fill `root/<class>/` with PNG images, each class about a colour of its own; returns the sorted paths.

    An image depends on its class, its number and the place of its class in `counts` only.

    Args:
        root: folder, made if need be.
        counts: {class name: number of images}.
        size: width and height in pixels.
    """
    paths = []
    for place, (name, count) in enumerate(counts.items()):
        # The golden ratio spreads any number of hues over the colour wheel.
        colour = 255 * np.array(colorsys.hsv_to_rgb(place * 0.618 % 1, 0.7, 0.8))
        folder = Path(root) / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            paths.append(folder / f"{index:03d}.png")
            draw_noise(f"{name}/{index}", size, colour).save(paths[-1])
    return sorted(paths)


def read_manifest(folder="data"):
    """What makedata.py recorded: its manifest.json, with the lines of manifest.csv as a list of dicts, "files"."""
    manifest = json.loads(Path(folder, "manifest.json").read_text(encoding="utf-8"))
    table = read_table(folder)
    manifest["files"] = []
    for index, path in enumerate(table.path):
        n, *sums = map(int, table.sums[index])
        file = dict(path=path, source=table.source[index], sha256=table.sha256[index], bytes=int(table.bytes[index]))
        if table.image_sha256 is not None:
            file |= dict(image_sha256=table.image_sha256[index], image_bytes=int(table.image_bytes[index]))
            file["seconds"] = float(table.seconds[index])
        manifest["files"].append(file | dict(sums=[[n] * 3, sums[:3], sums[3:]]))
    return manifest


def write_former_manifest(manifest, folder="data"):
    """Write what `read_manifest` returned as earlier versions did: everything in manifest.json."""
    Path(folder, "manifest.csv").unlink()
    manifest = {name: value for name, value in manifest.items() if name != "images"}
    Path(folder, "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, in which the scripts run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(monkeypatch):
    """Call makedata's main() with some constants changed; returns the exit status."""

    def run(**constants):
        with monkeypatch.context() as patch:
            for name, value in constants.items():
                patch.setattr(makedata, name, value)
            return makedata.main()

    return run


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with data1 and data, in which the scripts run."""
    monkeypatch.chdir(tmp_path)
    fill_classes(tmp_path / "data1", CLASSES)
    makedata.main()
    return tmp_path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with data1, data and a checkpoint of a short run, which the tests copy."""
    folder = tmp_path_factory.mktemp("trained")
    fill_classes(folder / "data1", CLASSES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        makedata.main()
        patch.setattr(run_folder, "plot_curves", touch_curves)
        patch.setattr(calibration, "plot_calibration", touch_diagram)
        patch.setattr(depthwise_choice, "find_groups", find_no_groups)
        for name, value in (DEFAULTS | SMALL | dict(BATCH_SIZE=8, EPOCHS=3, WARMUP_EPOCHS=5)).items():
            patch.setattr(train, name, value)
        train.main()
    return folder


@pytest.fixture
def trained_copy(trained, tmp_path, monkeypatch):
    """A copy of `trained`, in which the scripts run."""
    shutil.copytree(trained, tmp_path / "place", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def learning_curves():
    """A test that asks for this gets runs that draw their learning curves."""


@pytest.fixture
def calibrated():
    """A test that asks for this gets runs that end with the calibration."""


@pytest.fixture
def run_train(place, monkeypatch, request):
    """Call train.main() with some constants changed; returns the run's folder."""

    if "learning_curves" not in request.fixturenames:  # they take longer than the epochs they show
        monkeypatch.setattr(run_folder, "plot_curves", touch_curves)
        monkeypatch.setattr(calibration, "plot_calibration", touch_diagram)
    if "calibrated" not in request.fixturenames:  # which takes as long as these runs
        monkeypatch.setattr(train, "calibrate", lambda *_: True)
    if "measured" not in request.fixturenames:
        monkeypatch.setattr(depthwise_choice, "find_groups", find_no_groups)

    def run(status=0, **constants):
        unknown = set(constants) - set(DEFAULTS)
        assert not unknown, unknown
        constants = DEFAULTS | SMALL | constants
        for name, value in constants.items():
            monkeypatch.setattr(train, name, value)
        assert train.main() == status
        return place / constants["OUTPUT"] / constants["MODEL"]

    return run


@pytest.fixture(scope="session")
def draw_image():
    """The function `draw_noise`."""
    return draw_noise


@pytest.fixture(scope="session")
def make_data1():
    """The function `fill_classes`."""
    return fill_classes
