"""Time what reads images: the loader, the cache, mean_std.py and makedata.py beside the plain way, in one run.

    python benchmarks/data.py                       about 2 minutes on two cores
    python benchmarks/data.py --source photos       images in photos/<class>/; else those of data1, else drawn
    python benchmarks/data.py --what loader         the first table only, in half a minute

The images are resized to several sizes and saved as PNG and JPEG in a temporary folder. Compared, in turns:

- the loader: training images from the cache with the augmentation of train.py, in processor time of one thread: image
  by image with Pillow, torchvision and torch.manual_seed, and ours, before and after the normalisation of whole
  batches, which a GPU does where there is one; then with rotation and random quality as well, which the plain way has
  not. The best of several turns, since other programs only take time.
- an epoch: torchvision's ImageFolder, which decodes every image, and ours, from the cache of the epoch before. Both
  resize to IMG_SIZE and normalise.
- statistics: the loop with batch size 1 over ToTensor that tutorials show, and mean_std.py's `get_mean_and_std`; beside
  them, decoding alone on all cores; then the same images after makedata.py has read them.
- makedata.py: decoding alone on all cores, and its check of every image, with hash and sums.

Prints Markdown tables.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, prepare/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from common.augment import CUTOUT_RATIO, CUTOUT_SCALE, train_transform
from common.cache import cache_images
from common.dataset import SeededImages, eval_transform, open_image_folder
from common.device import Normalise, keep_freed_memory
from common.images import is_image, load_image, scan_class_folders
from common.options import ImageSize, Limits, Name, NotEmpty, PositiveInt, UserError, run
from common.progress import Progress
from common.workers import map_in_processes
from models.depthwise_choice import processor_name
from prepare.drawn_data import draw_data_set

WHAT: Annotated[list[Literal["loader", "epoch", "reading"]], NotEmpty()] = ["loader", "epoch", "reading"]  # tables
SOURCE: Name = "data1"  # folder that holds <class>/<image>; images are drawn if it holds no class
IMAGES: Annotated[int, Limits(2)] = 200  # images of each size and format
SIZES: Annotated[list[PositiveInt], NotEmpty()] = [150, 512, 1024]  # image sizes in pixels
IMG_SIZE: PositiveInt = 224  # image size for the network in pixels, in the table of epochs
LOADER_SIZES: Annotated[list[ImageSize], NotEmpty()] = [64, 224]  # likewise in that of the loader
REPEATS: PositiveInt = 3  # timings of which the median is taken; four times as many for the loader

ROOT = Path(__file__).resolve().parent.parent
FORMATS = {"png": {}, "jpg": dict(quality=90)}
MEAN, STD = [0.5] * 3, [0.2] * 3
RECIPE = dict(cutout=0.25, hflip=0.5, vflip=0.5, rotation="quarter", color_jitter=0.2)  # both ways have this
DEFAULTS = RECIPE | dict(rotation=180.0, quality=0.5)  # the defaults of train.py

# What a process runs that calls functions of makedata.py and mean_std.py: "<name> <folder>" a line, one line back.
SCRIPTS = """
import sys
from functools import cache
from io import BytesIO
from common.audio import input_kind
from common.dataset import open_image_folder
from common.images import load_image
from makedata import check_files
from mean_std import Known, get_mean_and_std, measure

@cache
def prepare(root):
    dataset = open_image_folder(root)
    checked, _ = check_files(dataset.files, input_kind(None), 0, BytesIO())
    known = Known(checked.sha256, checked.sums, None)
    return {
        "statistics": lambda: get_mean_and_std(dataset),
        "known": lambda: measure(dataset.files, load_image, None, known),
        "check": lambda: check_files(dataset.files, input_kind(None), None, BytesIO()),
        "prepare": lambda: None,
    }

for line in sys.stdin:
    name, root = line.rstrip().split(" ", 1)
    prepare(root)[name]()
    print("done", flush=True)
"""


def main():
    with tempfile.TemporaryDirectory() as temporary:
        folder, source = Path(temporary), Path(SOURCE)
        drawn = not source.is_dir() or not any(path.is_dir() for path in source.iterdir())
        if drawn:
            source = folder / "drawn"
            drawing = draw_data_set(source, max(2, IMAGES // 12 + 1), seed=0)
            list(Progress(drawing, desc="drawing", unit="img", leave=False))
        sizes = SIZES if {"epoch", "reading"} & set(WHAT) else [min(SIZES)]
        count = save_images(source, folder / "images", IMAGES, sizes)
        loading, epochs, reading = [], [], []
        roots = sorted((folder / "images").iterdir())
        if "loader" in WHAT:
            for size in Progress(LOADER_SIZES, desc="loader", unit="size", leave=False):
                root = folder / "images" / f"{min(SIZES)}-png"
                loading.append((size, *compare_loaders(root, folder / "cache", size, 4 * REPEATS)))
        if {"epoch", "reading"} & set(WHAT):
            with Scripts() as scripts:
                for root in Progress(roots, unit="set", leave=False):
                    size, suffix = root.name.split("-")
                    if "epoch" in WHAT:
                        epochs.append((int(size), suffix, *compare_epochs(root, folder / "cache", IMG_SIZE, REPEATS)))
                    if "reading" in WHAT:
                        reading.append((int(size), suffix, *compare_reading(root, scripts, REPEATS)))
    origin = "drawn" if drawn else f"from {SOURCE}"
    print(f"{count} images {origin}, median of {REPEATS}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}")
    print_loading(loading, count, 4 * REPEATS)
    print_tables(epochs, reading, IMG_SIZE, count)


def save_images(source, folder, count, sizes):
    """Save up to `count` images of `source` in each size and format as folder/<size>-<format>/<class>/<n>.

    Returns:
        Their number.
    """
    paths = list(scan_class_folders(source).choose(is_image))
    if len(paths) < 2:
        raise UserError(f"{source} holds {len(paths)} images, and the benchmark needs 2 or more; set SOURCE")
    paths = paths[:: max(1, len(paths) // count)][:count]
    for number, path in enumerate(Progress(paths, desc="saving", unit="img", leave=False)):
        image = load_image(path)
        for size in sizes:
            resized = image.resize((size, size), Image.Resampling.BICUBIC)
            for suffix, options in FORMATS.items():
                target = folder / f"{size}-{suffix}" / "ab"[number % 2] / f"{number}.{suffix}"
                target.parent.mkdir(parents=True, exist_ok=True)
                resized.save(target, **options)
    return len(paths)


class Scripts:
    """A process that calls functions of makedata.py and mean_std.py."""

    def __enter__(self):
        command = [sys.executable, "-c", SCRIPTS]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
        return self

    def __call__(self, name, root):
        """Call a function on the images in `root`; returns when it has ended."""
        print(name, root, file=self.process.stdin, flush=True)
        if self.process.stdout.readline().strip() != "done":
            raise UserError(f"{name} failed; see the message above")

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def compare_loaders(root, cache_folder, img_size, turns):
    """Images in a second of processor time: (image by image, ours, ours and normalised, ours by `DEFAULTS`)."""
    size = (img_size, img_size)
    ours = open_image_folder(root, train_transform(size, MEAN, **RECIPE))
    whole = open_image_folder(root, train_transform(size, MEAN, **DEFAULTS))
    plain = open_image_folder(root, plain_transform(size, **RECIPE))
    result = cache_images(cache_folder, 1000, (ours, size))
    if ours.cache is None:
        raise UserError(f"no cache: {result}")
    plain.cache = whole.cache = ours.cache
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_freed_memory()
    normalise = Normalise(MEAN, STD, torch.device("cpu"))
    rates = []
    for _ in range(turns):
        own = rate(SeededImages(ours, 0), normalise)
        rates.append((rate(PlainSeeds(plain, 0))[1], *own, rate(SeededImages(whole, 0))[0]))
    torch.set_num_threads(threads)
    return tuple(map(max, zip(*rates)))


def rate(images, normalise=torch.nn.Identity()):
    """Images in a second of processor time: (read and stacked, and then normalised)."""
    keys = [[(1, index) for index in range(first, min(first + 32, len(images)))] for first in range(0, len(images), 32)]
    started, normalising = time.process_time(), 0.0
    for batch, _ in DataLoader(images, batch_sampler=keys):
        before = time.process_time()
        normalise(batch)
        normalising += time.process_time() - before
    seconds = time.process_time() - started
    return len(images) / (seconds - normalising), len(images) / seconds


class PlainSeeds(SeededImages):
    """Images whose augmentation depends on (epoch, index), by torch.manual_seed."""

    def __getitem__(self, key):
        torch.manual_seed(1000 * key[0] + key[1])
        return self.dataset[key[1]]


def plain_transform(size, cutout, hflip, vflip, rotation, color_jitter):
    """The augmentation of train.py by Pillow and torchvision: PIL RGB -> float tensor (3, height, width)."""
    turn = transforms.RandomChoice([transforms.RandomRotation((angle, angle)) for angle in (0, 90, 180, 270)])
    return transforms.Compose(
        [
            transforms.Resize(size),
            transforms.RandomHorizontalFlip(hflip),
            transforms.RandomVerticalFlip(vflip),
            turn if rotation == "quarter" else transforms.RandomRotation(rotation),
            transforms.ColorJitter(color_jitter, color_jitter, color_jitter),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
            transforms.RandomErasing(cutout, CUTOUT_SCALE, CUTOUT_RATIO),
        ]
    )


def compare_epochs(root, cache_folder, img_size, repeats):
    """Seconds of an epoch: (decoding each image, from the cache)."""
    plain = ImageFolder(root, eval_transform(img_size, MEAN, STD))
    ours = open_image_folder(root, eval_transform(img_size, MEAN, STD))
    result = cache_images(cache_folder, 1000, (ours, (img_size, img_size)))
    if ours.cache is None:
        raise UserError(f"no cache: {result}")
    return seconds(repeats, lambda: read_epoch(plain), lambda: read_epoch(ours))


def seconds(repeats, *functions):
    """Median seconds of each function, timed in turns."""
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, results in zip(functions, times):
            started = time.perf_counter()
            function()
            results.append(time.perf_counter() - started)
    return [statistics.median(results) for results in times]


def read_epoch(dataset):
    for _ in DataLoader(dataset, batch_size=32):
        pass


def compare_reading(root, scripts, repeats):
    """Seconds of (the plain loop, mean_std.py, mean_std.py after makedata.py, makedata.py's check, decoding alone)."""
    paths = list(open_image_folder(root).files)
    workers = os.cpu_count() or 1
    scripts("prepare", root)
    return seconds(
        repeats,
        lambda: plain_statistics(root),
        lambda: scripts("statistics", root),
        lambda: scripts("known", root),
        lambda: scripts("check", root),
        lambda: decode_all(paths, workers),
    )


def plain_statistics(root):
    """The usual loop: mean over images of each channel's mean and standard deviation."""
    mean, std = torch.zeros(3), torch.zeros(3)
    loader = DataLoader(ImageFolder(root, transforms.ToTensor()), batch_size=1)
    for image, _ in loader:
        for channel in range(3):
            mean[channel] += image[:, channel].mean()
            std[channel] += image[:, channel].std()
    return mean / len(loader), std / len(loader)


def decode_all(paths, workers):
    """Decode on all cores, in processes that are started for it, as mean_std.py and makedata.py do it."""
    if workers < 2:
        return [decode(path) for path in paths]
    return list(map_in_processes(decode, paths, workers, "images"))


def decode(path):
    """Decode an image with `load_image`, and discard it."""
    load_image(path)


def print_loading(loading, count, turns):
    """Print the table of the loader from rows of (size, *images/s)."""
    if loading:
        columns = ("image by image", "ours", "ratio", "ours, normalised on this CPU", "ratio", "ours by the defaults")
        print(f"\n| loader, images a CPU second, best of {turns} | {' | '.join(columns)} |\n|{7 * '---|'}")
    for size, plain, ours, normalised, whole in loading:
        print(
            f"| {size} pixels, {count} images | {plain:.0f} | {ours:.0f} | {ours / plain:.1f} | {normalised:.0f} "
            f"| {normalised / plain:.1f} | {whole:.0f} |"
        )


def print_tables(epochs, reading, img_size, count):
    """Print the other tables from rows of (size, format, *seconds for `count` images)."""

    def cells(plain, ours):
        return f"{1e3 * plain / count:.2f} | {1e3 * ours / count:.2f} | {plain / ours:.1f}"

    if epochs:
        print(f"\n| an epoch, resized to {img_size} | decoding, ms/image | from the cache | ratio |\n|---|---|---|---|")
    for size, suffix, plain, ours in sorted(epochs):
        print(f"| {size} {suffix} | {cells(plain, ours)} |")
    if not reading:
        return
    columns = ("plain loop, ms/image", "mean_std.py", "ratio", "mean_std.py / decoding alone", "after makedata.py")
    print(f"\n| statistics | {' | '.join(columns)} |\n|---|---|---|---|---|---|")
    for size, suffix, plain, ours, known, _, decoding in sorted(reading):
        print(f"| {size} {suffix} | {cells(plain, ours)} | {ours / decoding:.2f} | {1e3 * known / count:.2f} |")
    print("\n| makedata.py | its check, ms/image | check / decoding alone, on all cores |\n|---|---|---|")
    for size, suffix, _, _, _, check, decoding in sorted(reading):
        print(f"| {size} {suffix} | {1e3 * check / count:.2f} | {check / decoding:.2f} |")


if __name__ == "__main__":
    run(main, closed_output="end")
