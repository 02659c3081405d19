"""Bad inputs of users, and properties that must hold for any input."""

import contextlib
import importlib.util
import io
import os
import random
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, fill_classes
from hostile import check
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import makedata
import mean_std
import train
from common.checkpoint import load_file
from common.dataset import EpochBatches
from common.images import ImageError, load_image
from common.options import UserError, read_constants, set_constants
from common.schedule import warmup_cosine


@pytest.fixture
def run_here(monkeypatch):
    """Run a script of the repository in this process, which saves the time to start one: see `hostile.run`."""

    def run(folder, script, *words):
        name = Path(script).stem
        if name not in modules:
            modules[name] = import_script(script)
        module = modules[name]
        constants = dict(vars(module))
        set_constants(constants, list(words), "IMAGES" if name == "test" else None)
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.chdir(folder)
            for constant in read_constants(module.__file__):
                patch.setattr(module, constant, constants[constant])
            try:
                return module.main(), out.getvalue(), ""
            except UserError as error:
                return 1, out.getvalue(), str(error)

    modules = dict(makedata=makedata, mean_std=mean_std, train=train)
    return run


def import_script(script):
    """test.py as a module; "test" is also the name of one of Python's own."""
    spec = importlib.util.spec_from_file_location("test_script", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_named_and_damaged_files_go_through_all_four_scripts(tmp_path, run_here):
    named, used = check(tmp_path, files=60, run=run_here, model=SMALL["MODEL"])
    assert named >= 60 and used > 40


def link(target):
    return lambda path: path.symlink_to(target, target_is_directory=True)


# name -> (what is made beside the good classes a and b, what makedata.py says, or None where it goes on without it)
FOLDERS = {
    "empty": (lambda root: (root / "c").mkdir(), "class 'c' is too small"),
    "one image": (lambda root: fill_classes(root, {"c": 1}), "class 'c' is too small"),
    "two equal images": (
        lambda root: [fill_classes(root, {"c": 1}), (root / "c/2.png").write_bytes((root / "c/000.png").read_bytes())],
        "class 'c' is too small",
    ),
    "text files only": (
        lambda root: [(root / "c").mkdir(), (root / "c/1.txt").write_text("x"), (root / "c/2.png").write_text("x")],
        "class 'c' is too small",
    ),
    "hidden": (lambda root: fill_classes(root, {".ipynb_checkpoints": 3}), None),
    "differs by case": (lambda root: fill_classes(root, {"A": 3}), "differ by case only"),
    "folder in a class": (lambda root: fill_classes(root / "c", {"inner": 3}), "is a folder inside a class folder"),
    "link to the root": (lambda root: link(root.resolve())(root / "c"), "is a folder inside a class folder"),
    "link in a circle": (lambda root: link("c")(root / "c"), None),
    "link to nothing": (lambda root: link("nowhere")(root / "c"), None),
    "link to a class": (lambda root: link("a")(root / "c"), "same image in two classes"),
    "link inside a class": (lambda root: link("..")(root / "a/up"), "is a folder inside a class folder"),
    "image beside the classes": (lambda root: Image.new("RGB", (48, 48)).save(root / "beside.png"), None),
    "spaces": (lambda root: fill_classes(root, {" c  d ": 3}), None),
    "Chinese": (lambda root: fill_classes(root, {"小麦": 3}), None),
    "emoji": (lambda root: fill_classes(root, {"🌱": 3}), None),
    "newline": (lambda root: fill_classes(root, {"c\nd": 3}), None),
    "dash": (lambda root: fill_classes(root, {"--help": 3}), None),
    "train": (lambda root: fill_classes(root, {"train": 3, "val": 3}), None),
    "looks like a file": (lambda root: fill_classes(root, {"c.png": 3}), None),
}


@pytest.mark.skipif(os.name != "posix", reason="Windows forbids such names and links")
@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data1"
    fill_classes(root, {"a": 4, "b": 4})
    make, sentence = FOLDERS[name]
    make(root)
    before = sorted(os.walk(root))
    if sentence is None:
        assert makedata.main() in (0, 3)
        assert {path.name for path in Path("data/train").iterdir()} >= {"a", "b"}
    else:
        with pytest.raises(UserError, match=sentence):
            makedata.main()
        assert not Path("data").exists()
    assert sorted(os.walk(root)) == before


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300), suffix=st.sampled_from(("png", "jpg", "gif", "tif", "webp", "bmp")))
def test_any_bytes_are_a_image_or_an_image_error(content, suffix, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    magic = {"png": b"\x89PNG\r\n\x1a\n", "jpg": b"\xff\xd8", "gif": b"GIF89a", "tif": b"II*\0", "bmp": b"BM"}
    path.write_bytes(random.Random(len(content)).choice((b"", magic.get(suffix, b"RIFF"))) + content)
    try:
        assert load_image(path).mode == "RGB"
    except ImageError as error:
        assert path.name in str(error)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300), zipped=st.booleans())
def test_any_bytes_are_a_checkpoint_or_a_user_error(content, zipped, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.pth"
    path.write_bytes((b"PK\x03\x04" if zipped else b"") + content)
    try:
        load_file(path)
    except UserError as error:
        assert path.name in str(error)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 8), st.integers(0, 5), st.integers(0, 40))
def test_no_image_comes_twice_and_none_is_lost_by_stopping(length, size, world_size, epoch, stop):
    seen, all_at_once = [], []
    for rank in range(world_size):
        batches = EpochBatches(length, size, 1, rank, world_size)
        batches.epoch = epoch
        whole = list(batches)
        batches.start = min(stop, len(batches))
        assert whole[: batches.start] + list(batches) == whole
        assert len(whole) == length // (size * world_size) and all(len(batch) == size for batch in whole)
        seen += [index for batch in whole for _, index in batch]
        all_at_once.append(whole)
    assert len(seen) == len(set(seen)) and set(seen) <= set(range(length))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 500))
def test_the_learning_rate_stays_between_its_bounds(steps, warmup):
    rates = [warmup_cosine(step, steps, warmup, 2e-3, 1e-6) for step in {0, warmup, steps // 2, steps - 1}]
    assert all(0 < rate <= 2e-3 for rate in rates)


@settings(max_examples=100, deadline=None)
@given(st.sets(st.text("0123456789abcdef", min_size=4, max_size=8), min_size=2), st.floats(0.01, 0.99), st.integers())
def test_both_sides_of_a_split_get_images(contents, ratio, seed):
    val = makedata.choose_val(contents, ratio, seed)
    assert val < contents and val
