"""Compare the training results of two commits, bit for bit: a refactoring must not change what is computed.

    python tests/same_bits.py OLD NEW          two commits of this repository, such as HEAD~1 HEAD
    python tests/same_bits.py OLD              OLD against the working tree

Three runs with fixed seeds on drawn data: images (growing, Mixup, drop path, EMA, Muon), sounds, and a time series of
tools/forecast.py. Each is trained by OLD and by NEW; a third run is interrupted under OLD and resumed by NEW. Weights,
EMA, optimizer state, history and log.csv (but for its columns of time) must be equal. Prints one line for each
comparison; exit status 1 if anything differs. Takes about five minutes on two cores.
"""

import argparse
import csv
import math
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import wave
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from kill import flat

ROOT = Path(__file__).resolve().parent.parent
COMMON = "--model unireplknet_a --batch-size 16 --epochs 3 --mix-prob 0.7 --cutout 0 --drop-path 0.3 --device cpu"
IMAGES = f"train.py {COMMON} --workers 0 --img-size 64 --start-size 32 --optimizer muon --save-minutes 1e-9"
SOUNDS = f"train.py {COMMON} --workers 0 --optimizer adamw --save-minutes 1e-9"
SERIES = (
    "tools/forecast.py --csv series.csv --split 0.7,0.1,0.2 --lookback 7 --dlinear-lookback 96 --horizons 24 "
    "--epochs 2 --epoch-steps 15 --batch-size 32 --device cpu"
)
TIMES = ("seconds", "img_per_s")  # columns of log.csv that hold times
PARTS = ("state_dict", "state_dict_ema", "ema_updates", "optimizer", "scaler", "epoch", "history")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="commit to compare with")
    parser.add_argument("new", nargs="?", help="commit to compare; default: the working tree")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        old = check_out(options.old, scratch / "old-code")
        new = check_out(options.new, scratch / "new-code") if options.new else ROOT
        for name, prepare, command in (
            ("images", draw_images, IMAGES),
            ("sounds", draw_sounds, SOUNDS),
            ("series", draw_series, SERIES),
        ):
            results = {}
            for run, codes in (("old", [old]), ("new", [new]), ("old, resumed by new", [old, new])):
                folder = scratch / name / run.replace(" ", "-").replace(",", "")
                folder.mkdir(parents=True)
                prepare(folder)
                results[run] = train(folder, command, codes)
            for run in ("new", "old, resumed by new"):
                different = compare(results["old"], results[run])
                failed |= bool(different)
                print(f"{name:7} old = {run:20} {', '.join(different[:8]) or 'the same bits'}", flush=True)
    return 1 if failed else 0


def check_out(commit, folder):
    """The files of a commit in `folder`, which is returned."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def train(folder, command, codes):
    """Train in `folder` by the first of `codes` or, with two, interrupt that run and resume it by the second.

    Returns:
        {name of a file: its content}, for checkpoints and log.csv.
    """
    script, *options = command.split()
    *interrupted, last = codes
    for code in interrupted:
        split(folder, code)
        process = start(folder, code, script, options)
        while not list(folder.glob("checkpoints/**/last.pth")) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
        assert process.returncode in (143, 0), errors
    split(folder, last)
    process = start(folder, last, script, [*options, *(["--resume", "auto"] if interrupted else [])])
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    content = {}
    for path in sorted(folder.glob("checkpoints/**/last.pth")):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        parts = {part: checkpoint[part] for part in PARTS if part in checkpoint}
        content |= flat(parts, path.relative_to(folder).as_posix())
    for path in sorted(folder.glob("checkpoints/**/log.csv")):
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]
        content |= flat(rows, path.relative_to(folder).as_posix())
    assert content, f"no checkpoint in {folder}"
    return content


def split(folder, code):
    """Run makedata.py and mean_std.py of `code` where there is a data1."""
    if (folder / "data1").is_dir():
        for script in ("makedata.py", "mean_std.py"):
            subprocess.run([sys.executable, code / script], cwd=folder, check=True, capture_output=True)


def start(folder, code, script, options):
    """A script of `code` as a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(
        [sys.executable, code / script, *options],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def compare(one, other):
    """Names of the leaves that differ."""
    names = set(one) ^ set(other)
    for name in set(one) & set(other):
        a, b = one[name], other[name]
        same = torch.equal(a, b) if torch.is_tensor(a) and torch.is_tensor(b) else type(a) is type(b) and a == b
        if not same and not (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)):
            names.add(name)
    return sorted(names)


def draw_images(folder):
    """Noise about a colour for each of three classes, as data1."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import fill_classes

    fill_classes(folder / "data1", {"a": 16, "b": 16, "c": 16})


def draw_sounds(folder):
    """Tones with noise, 16 recordings of three pitches, as data1."""
    generator = np.random.default_rng(0)
    seconds = np.arange(8000) / 8000
    for name, pitch in (("low", 300), ("middle", 900), ("high", 2500)):
        (folder / "data1" / name).mkdir(parents=True)
        for number in range(16):
            tone = np.sin(2 * np.pi * pitch * generator.uniform(0.9, 1.1) * seconds)
            samples = np.int16(12000 * tone + 500 * generator.standard_normal(8000))
            with wave.open(str(folder / "data1" / name / f"{number:02}.wav"), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes(struct.pack(f"<{len(samples)}h", *samples))


def draw_series(folder):
    """Two columns of 1,500 hours with a daily period, as series.csv."""
    generator = np.random.default_rng(0)
    with open(folder / "series.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["date", "load", "temperature"])
        for hour in range(1500):
            day = math.sin(2 * math.pi * hour / 24)
            noise = generator.standard_normal(2)
            date = datetime(2020, 1, 1) + timedelta(hours=hour)
            writer.writerow([date, round(10 + 3 * day + noise[0], 4), round(5 - 2 * day + 0.5 * noise[1], 4)])


if __name__ == "__main__":
    sys.exit(main())
