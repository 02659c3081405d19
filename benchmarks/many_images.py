"""Start train.py on a million images: seconds until the first batch, and memory of all its processes.

    python benchmarks/many_images.py                     about 10 minutes; 1.3 million files are made beside
    python benchmarks/many_images.py --images 50000      a smaller set

The images are hard links to a few small files, made in a temporary folder in FOLDER, where the file system must have
room for as many names; manifest.json and manifest.csv describe them as those of makedata.py do. The cache is off. The
same is measured with few images, so that the difference is what the images cost, and the folders are listed alone.
Memory is the proportional set size (PSS), in which what processes share counts once; only Linux tells it.

Prints a Markdown table.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # common/
from common.columns import Hashes, Texts
from common.manifest import MANIFEST, TABLE, Table
from common.options import Limits, Name, PositiveInt, run
from common.progress import Progress

IMAGES: Annotated[int, Limits(100)] = 1_300_000  # training images; for validation there are a 26th as many more
CLASSES: Annotated[int, Limits(2, 10_000)] = 1000  # their classes
WORKERS: Annotated[int, Limits(0, 64)] = 8  # processes that load images, for training and for validation each
START: list[Literal["fork", "spawn"]] = ["fork", "spawn"]  # how they are started: on Linux, and on Windows or macOS
FOLDER: Name = "."  # where the temporary folder is made
LINKS: PositiveInt = 20_000  # names of one file; file systems allow up to 65,000

# What is started: train.py until its first batch. It prints "<seconds until then> <peak of the memory in bytes>".
TRAIN = """
import os, sys, time
import torch
if __name__ == "__main__":
    started = time.perf_counter()
    sys.path.insert(0, sys.argv[1])
    import train
    from benchmarks.many_images import MemoryWatch
    torch.multiprocessing.set_start_method(sys.argv[2])
    settings = dict(MODEL="unireplknet_a", DATA=sys.argv[3], OUTPUT=sys.argv[4], WORKERS=int(sys.argv[5]))
    settings |= dict(CACHE_GB=0.0, IMG_SIZE=32, BATCH_SIZE=32, DEVICE="cpu", OPTIMIZER="adamw", EMA_DECAY=0.0)
    def first_batch(state, network, loader, *args, **kwargs):
        next(iter(loader))
        seconds = time.perf_counter() - started
        time.sleep(3)  # the workers fetch more batches meanwhile
        print(f"first batch {seconds} {watch.peak}", flush=True)
        os._exit(0)
    for name, value in (settings | dict(train_one_epoch=first_batch)).items():
        setattr(train, name, value)
    with MemoryWatch() as watch:
        train.main()
"""


def main():
    rows = []
    Path(FOLDER).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        temporary = Path(temporary)
        few = min(IMAGES // 10, 2 * CLASSES)
        make_images(temporary / "few", few, min(CLASSES, few // 2), LINKS)
        make_images(temporary / "many", IMAGES, CLASSES, LINKS)
        listing = time_listing(temporary / "many" / "data")
        for start in START:
            small, large = (measure_start(temporary / name, start, WORKERS) for name in ("few", "many"))
            rows.append((start, small, large))
    print(f"{IMAGES} images in {CLASSES} classes, {WORKERS} workers, {os.cpu_count()} cores")
    print(f"listing the folders alone: {listing:.1f} s\n")
    print("| workers by | few images, s | first batch, s | few images, MB | all processes, MB | more, MB |")
    print("|---|---|---|---|---|---|")
    for start, (quick, light), (slow, heavy) in rows:
        print(f"| {start} | {quick:.1f} | {slow:.1f} | {light:.0f} | {heavy:.0f} | {heavy - light:.0f} |")


def make_images(folder, images, classes, links):
    """Make folder/data/train and /val, hard links to small images in folder/files, and their manifest."""
    (folder / "files").mkdir(parents=True)
    paths = {"train": images, "val": max(classes, images // 26)}
    for side, count in paths.items():
        for name in range(classes):
            (folder / "data" / side / f"n{name:08d}").mkdir(parents=True)
        for number in Progress(range(count), desc=f"linking {side}", unit="img", leave=False):
            file = folder / "files" / f"{side}{number // links}.png"
            if number % links == 0:
                levels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(levels).save(file)
            name = f"n{number % classes:08d}"
            os.link(file, folder / "data" / side / name / f"{name}_{number // classes:08d}.png")
    write_manifest(folder / "data", paths, classes)


def write_manifest(data, counts, classes):
    """Write a manifest of that many images on each side, such as makedata.py would; their hashes are random."""
    names = [
        f"{side}/n{number % classes:08d}/n{number % classes:08d}_{number // classes:08d}.png"
        for side, count in counts.items()
        for number in range(count)
    ]
    generator, count = np.random.default_rng(0), len(names)
    hashes = Hashes(generator.integers(1, 256, (count, 32), dtype=np.uint8))
    sums = generator.integers(0, 10**9, (count, 7))
    sources = Texts(f"data1/{name.split('/', 1)[1]}" for name in names)
    Table(Texts(names), sources, hashes, np.full(count, 3000), sums).write(data / TABLE)
    (data / MANIFEST).write_text(f'{{"source": "data1", "fingerprint": "", "images": {count}}}\n', encoding="utf-8")


def time_listing(data):
    """Seconds in which the folders are listed, by a process of its own."""
    code = "import os, sys; [list(os.scandir(folder)) for side in sys.argv[1:] for folder in os.scandir(side)]"
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, data / "train", data / "val"], check=True)
    return time.perf_counter() - started


def measure_start(folder, start, workers):
    """(Seconds until train.py has its first batch, peak PSS of all its processes in MB)."""
    script = folder / "start.py"
    script.write_text(TRAIN, encoding="utf-8")
    command = [sys.executable, script, ROOT, start, folder / "data", folder / "checkpoints", workers]
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, encoding="utf-8", env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("first batch ")]
    if not lines:
        raise SystemExit(f"train.py ended without a batch:\n{done.stdout}")
    seconds, peak = map(float, lines[0].split()[2:])
    return seconds, peak / 1e6


class MemoryWatch:
    """Inside `with`: notes twice a second how much memory this process and all that it started have; see `peak`."""

    def __init__(self):
        self.peak = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def watch(self):
        while not self.ended.wait(0.5):
            processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            self.peak = max(self.peak, sum(map(read_pss, processes)))

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()


def read_pss(process):
    """Proportional set size of a process in bytes; 0 if it has ended, or the system does not tell."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    return 1024 * int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1])


if __name__ == "__main__":
    run(main)
