"""Time what reads pictures: the cache, mean_std.py and makedata.py beside the plain way, in one run.

    python -m benchmarks.data                       about 2 minutes on two cores
    python -m benchmarks.data --source photos       pictures in photos/<class>/; those of data1 if there are, else drawn

The pictures are resized to several sizes and saved as PNG and JPEG into a temporary folder. Compared, in turns:

- an epoch: torchvision's ImageFolder, which decodes every picture, and ours, from the cache of the epoch before. Both
  resize to IMG_SIZE and normalise.
- statistics: the loop with batch size 1 over ToTensor that tutorials show, and mean_std.py's `get_mean_and_std`; beside
  them, decoding alone on all cores; then the same pictures when makedata.py has read them.
- makedata.py: decoding alone on all cores, and its check of every picture, with hash and sums.

Prints Markdown tables.
"""

import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from common.cache import open_cache
from common.dataset import eval_transform, open_image_folder
from common.demo import draw_data_set
from common.images import is_image, load_image, scan_class_folders
from common.options import UserError, run
from makedata import check_pictures
from mean_std import get_mean_and_std, measure

SOURCE: str = "data1"  # folder that holds <class>/<picture>; drawn pictures where there is none
PICTURES: int = 200  # pictures of each size and format
SIZES: list[int] = [150, 512, 1024]  # edge of the pictures in pixels
IMG_SIZE: int = 224  # edge to which they are resized for the network
REPEATS: int = 3  # timings of which the median is taken

FORMATS = {"png": {}, "jpg": dict(quality=90)}
MEAN, STD = [0.5] * 3, [0.2] * 3


def save_pictures(source, folder):
    """Save PICTURES pictures of `source` in each size and format as folder/<size>-<format>/<class>/<n>."""
    classes, _ = scan_class_folders(source)
    paths = [path for files in classes.values() for path in files if is_image(path)]
    paths = paths[:: max(1, len(paths) // PICTURES)][:PICTURES]
    for number, path in enumerate(tqdm(paths, desc="saving", unit="img", leave=False)):
        image = load_image(path)
        for size in SIZES:
            resized = image.resize((size, size), Image.Resampling.BICUBIC)
            for suffix, options in FORMATS.items():
                target = folder / f"{size}-{suffix}" / "ab"[number % 2] / f"{number}.{suffix}"
                target.parent.mkdir(parents=True, exist_ok=True)
                resized.save(target, **options)


def seconds(*functions):
    """Median seconds of each function, timed in turns."""
    times = [[] for _ in functions]
    for _ in range(REPEATS):
        for function, results in zip(functions, times):
            started = time.perf_counter()
            function()
            results.append(time.perf_counter() - started)
    return [statistics.median(results) for results in times]


def epoch(pictures):
    for _ in DataLoader(pictures, batch_size=32):
        pass


def plain_statistics(root):
    """The usual loop: mean over pictures of each channel's mean and standard deviation."""
    mean, std = torch.zeros(3), torch.zeros(3)
    loader = DataLoader(ImageFolder(root, transforms.ToTensor()), batch_size=1)
    for image, _ in loader:
        for channel in range(3):
            mean[channel] += image[:, channel].mean()
            std[channel] += image[:, channel].std()
    return mean / len(loader), std / len(loader)


def decode(path):
    """Decode a picture, as `load_image` does, and forget it."""
    load_image(path)


def decode_all(paths, workers):
    """Decode on all cores, in processes that are started for it, as mean_std.py and makedata.py do it."""
    if workers < 2:
        return [decode(path) for path in paths]
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(decode, paths, chunksize=8))


def compare_epochs(root, cache_folder):
    """Seconds of an epoch: (decoding each picture, from the cache)."""
    plain = ImageFolder(root, eval_transform(IMG_SIZE, MEAN, STD))
    ours = open_image_folder(root, eval_transform(IMG_SIZE, MEAN, STD))
    ours.cache, result = open_cache([path for path, _ in ours.samples], IMG_SIZE, cache_folder, 1e12)
    if ours.cache is None:
        raise UserError(f"no cache: {result}")
    return seconds(lambda: epoch(plain), lambda: epoch(ours))


def compare_reading(root):
    """Seconds of (the plain loop, mean_std.py, mean_std.py after makedata.py, makedata.py's check, decoding alone)."""
    pictures = open_image_folder(root)
    paths = [Path(path) for path, _ in pictures.samples]
    checked = [content for content, _ in check_pictures(paths, 0)]
    known = {content["sha256"]: content["sums"] for content in checked}
    workers = os.cpu_count() or 1
    return seconds(
        lambda: plain_statistics(root),
        lambda: get_mean_and_std(pictures),
        lambda: measure(pictures, -1, known),
        lambda: check_pictures(paths, workers),
        lambda: decode_all(paths, workers),
    )


def main():
    if min(PICTURES, REPEATS, IMG_SIZE, *SIZES) < 1 or PICTURES < 2:
        raise UserError("PICTURES must be at least 2; REPEATS, IMG_SIZE and SIZES at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        folder, source = Path(temporary), Path(SOURCE)
        if not source.is_dir() or not any(path.is_dir() for path in source.iterdir()):
            source = folder / "drawn"
            drawing = draw_data_set(source, max(2, PICTURES // 12 + 1), seed=0)
            list(tqdm(drawing, desc="drawing", unit="img", leave=False))
        save_pictures(source, folder / "pictures")
        epochs, reading = [], []
        for root in tqdm(sorted((folder / "pictures").iterdir()), unit="set", leave=False):
            size, suffix = root.name.split("-")
            epochs.append((int(size), suffix, *compare_epochs(root, folder / "cache")))
            reading.append((int(size), suffix, *compare_reading(root)))
    drawn = "drawn" if source.name == "drawn" else "from " + SOURCE
    print(f"{PICTURES} pictures {drawn}, median of {REPEATS}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"\n| an epoch, resized to {IMG_SIZE} | decoding, ms a picture | from the cache | ratio |\n|---|---|---|---|")
    for size, suffix, plain, ours in sorted(epochs):
        print(f"| {size} {suffix} | {row(plain, ours)} |")
    print("\n| statistics | plain loop, ms a picture | mean_std.py | ratio | mean_std.py / decoding alone | after makedata.py |")
    print("|---|---|---|---|---|---|")
    for size, suffix, plain, ours, known, _, decoding in sorted(reading):
        print(f"| {size} {suffix} | {row(plain, ours)} | {ours / decoding:.2f} | {1e3 * known / PICTURES:.2f} |")
    print("\n| makedata.py | its check, ms a picture | check / decoding alone, on all cores |\n|---|---|---|")
    for size, suffix, _, _, _, check, decoding in sorted(reading):
        print(f"| {size} {suffix} | {1e3 * check / PICTURES:.2f} | {check / decoding:.2f} |")


def row(plain, ours):
    return f"{1e3 * plain / PICTURES:.2f} | {1e3 * ours / PICTURES:.2f} | {plain / ours:.1f}"


if __name__ == "__main__":
    run(main)
