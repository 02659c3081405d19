"""Compute the normalisation statistics of the images, or of the spectrograms of recordings, in data1/<class>/.

    python mean_std.py

Prints the mean and the standard deviation of each colour channel for pixels from 0 to 1, and writes them to
data/mean_std.json, where train.py finds them if its own MEAN and STD are None.

There are two definitions of the standard deviation. "per image" is the mean over the images of each image's own
standard deviation; it ignores how images differ from each other, and is what train.py normalises with. "pixel" is the
standard deviation of all pixels of the data set. Both are computed exactly, from each image's histogram.

Exit status: 0; 1 an error; 2 a wrong option or constant; 3 done, but some files were skipped.
"""

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, Subset

from common.audio import input_kind, is_sound
from common.columns import Hashes, find
from common.contents import hash_contents, hash_file
from common.decoding import READER
from common.files import write_json
from common.images import ImageError, level_sums, scan_class_folders
from common.loading import Loader
from common.manifest import CACHE, MANIFEST, fingerprint, read_manifest, read_sound, read_table, read_value_range
from common.options import Name, UserError, Workers, raise_all, run
from common.progress import Progress

SOURCE: Name = "data1"  # folder that contains <class>/<image or recording>
OUTPUT: str = "data/mean_std.json"  # file for the result; "" writes none
WORKERS: Workers | None = None  # processes that read images; 0: none; None: one per core if it takes long enough

COLOURS = ("red", "green", "blue")
SMALLEST_STD = 1e-4  # pixels from 0 to 1; below it, one odd pixel would become an input of thousands
SECONDS_TO_START = 1.0  # s, roughly what starting processes costs; for less reading it does not pay off


def main():
    folders = (Path(OUTPUT).parent, Path("data"))  # makedata.py's manifest is beside OUTPUT, or where it is by default
    folder = next((folder for folder in folders if (folder / MANIFEST).is_file()), folders[1])
    sound = read_sound(folder)
    value_range = read_value_range(folder)
    kind = input_kind(sound, value_range)
    paths = list_files(SOURCE, kind, folder)
    moments_of_files, contents, reasons = measure(paths, kind.load, WORKERS, read_known_sums(folder))
    for reason in reasons.values():
        print(f"skipped: {reason}")
    test = is_test(contents, folder)
    used = np.array([index for index in range(len(paths)) if index not in reasons and not test[index]], int)
    if test.any():
        print(f"not counted: {np.count_nonzero(test)} {kind.name}s of {folder / 'test'}; nothing is learned from them")
    if not len(used):
        raise UserError(f"no {kind.name} in {SOURCE} can be read; replace the files listed above")
    statistics = summarise(moments_of_files[used])
    mean, std, pixel_std = statistics.tolist()
    replaced = find_flat_channels(statistics, SOURCE)

    print(f"{kind.name + 's':14} {len(used)} of {len(paths)} in {SOURCE}")
    for name, values in (("mean", mean), ("std per image", std), ("std pixel", pixel_std)):
        print(f"{name:14} [{', '.join(f'{value:.6f}' for value in values)}]")
    for channel, value in replaced.items():
        std[channel] = value
        print(f"note: the {COLOURS[channel]} channel has a single value in each image; its std is written as {value:g}")
    if OUTPUT:
        report = dict(mean=mean, std=std, pixel_std=pixel_std, pictures=len(used))
        report["fingerprint"] = fingerprint(contents[used])
        if sound is not None:
            report["sound"] = sound
        if value_range is not None:
            report["value_range"] = value_range
        if value_range is not None:
            report["value_range"] = value_range
        output = Path(OUTPUT)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, report)
        print(f"written to     {output}")
    return 3 if reasons else 0


def list_files(source, kind, data):
    """The files of a `common.audio.Kind` in `source`/<class>/; says what is passed over; UserError if a class has none.

    Where makedata.py made the folder `data` from a table of labels, the files that it listed.

    Returns:
        `common.columns.Files` or `Texts`, a sequence of paths.
    """
    manifest = read_manifest(data)
    if manifest.get("labels"):
        known = Path(manifest.get("source", source)) == Path(source)
        note = "" if known else f"; SOURCE {source} has no effect, since {data} was made from {manifest['source']}"
        print(f"{kind.name}s of {manifest['labels']}{note}")
        return read_table(data).source
    folders = scan_class_folders(source)
    paths = folders.choose(kind.fits)
    problems = []
    for label, name in enumerate(folders):
        if not np.any(paths.labels == label):
            folder = Path(source, name)
            if any(map(is_sound, folders[name])):  # makedata.py records how they become spectrograms
                raise UserError(f"{folder} contains recordings, but no manifest says so; run makedata.py first")
            problems.append(f"{folder} contains no {kind.name}; put some there, or remove the folder")
    raise_all(problems)
    passed = folders.describe_passed(kind.fits)
    if passed:
        print(passed)
    return paths


def is_test(contents, data):
    """Which files have the content of one that makedata.py put into `data`/test: bool array (files,)."""
    if not Path(data, "test").is_dir() or not read_manifest(data):
        return np.zeros(len(contents), bool)
    table = read_table(data)
    chosen = np.array([place.startswith("test/") for place in table.path], bool)
    return (find(contents.keys(), table.sha256[chosen].keys()) >= 0) & contents.digests.any(1)


@dataclass
class Known:
    """What makedata.py knows of the images that it has read."""

    sha256: Hashes
    sums: np.ndarray  # int64 (images, 7), see `common.manifest.Table`
    folder: str  # that of the memory of contents, data/cache

    def moments(self, contents):
        """`moments` of those of the images with these contents that are known: (their indices, float64 (n, 5, 3))."""
        rows = find(contents.keys(), self.sha256.keys())
        indices = np.flatnonzero((rows >= 0) & contents.digests.any(1))
        sums = self.sums[rows[indices]]
        return indices, moments_of_sums(sums[:, [[0, 0, 0], [1, 2, 3], [4, 5, 6]]])


def read_known_sums(folder):
    """The sums of the images that makedata.py has read as they are read now: `Known`; None if it has not.

    Args:
        folder: such as data.
    """
    if read_manifest(folder).get("reader") != READER:
        return None
    table = read_table(folder)
    return None if table.sums is None else Known(table.sha256, table.sums, str(folder / CACHE))


def measure(items, load, workers, known=None):
    """`moments` and content of every item, in parallel.

    Args:
        items, load: see `Moments`.
        workers: processes; None: one per core if reading takes longer than starting them.
        known: `Known` images, which are not decoded; None if there are none.

    Returns:
        (float64 array (items, 5, 3); `Hashes`; {index of an item that cannot be read: the reason}).
    """
    results = np.zeros((len(items), 5, 3))
    contents = Hashes(np.zeros((len(items), 32), np.uint8))
    unknown, reasons = np.arange(len(items)), {}
    if known is not None:
        contents = hash_contents(items, known.folder, missing_ok=True)
        indices, results_of_known = known.moments(contents)
        results[indices] = results_of_known
        unknown = np.setdiff1d(unknown, indices)
    dataset = Moments(items, load)

    def keep(batch):
        for index, result, content in batch:
            if isinstance(result, str):
                reasons[index] = result
            else:
                results[index], contents.digests[index] = result, np.frombuffer(content, np.uint8)

    started = time.perf_counter()
    first = unknown[:8].tolist()
    keep(dataset[index] for index in first)
    seconds_left = (time.perf_counter() - started) / max(len(first), 1) * (len(unknown) - len(first))
    if workers is None:
        workers = 0 if seconds_left < SECONDS_TO_START else os.cpu_count() or 1
    others = Subset(dataset, unknown[8:])
    loader = Loader(others, batch_size=8, num_workers=workers, collate_fn=list)
    with Progress(total=len(unknown), initial=len(first), desc="mean_std", unit="img", leave=False) as bar:
        for batch in loader:
            keep(batch)
            bar.update(len(batch))
    return results, contents, dict(sorted(reasons.items()))


class Moments(Dataset):
    """For each item: (its index, its image's `moments`, SHA-256 of the file as bytes).

    A text instead of the moments says why an image cannot be read.

    Args:
        items: paths as str, or anything else that `load` takes, whose SHA-256 is then that of nothing.
        load: function of an item -> image, see `moments`; `ImageError` if it cannot be read.
    """

    def __init__(self, items, load):
        self.items = items
        self.load = load

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        index = int(index)
        item = self.items[index]
        try:
            return index, moments(self.load(item)), hash_if_file(item) if isinstance(item, str) else bytes(32)
        except ImageError as error:
            return index, str(error), bytes(32)


def hash_if_file(path):
    """SHA-256 of a file; zeros for what cannot be read."""
    try:
        return bytes.fromhex(hash_file(path))
    except OSError:
        return bytes(32)


def moments(image):
    """Mean and unbiased standard deviation of one image's channels, and what those of all images need.

    Args:
        image: PIL RGB image, or float tensor (3, H, W).

    Returns:
        float64 array (5, 3): mean, standard deviation (0 for a single pixel), pixels, sum, sum of squares.
    """
    if isinstance(image, Image.Image):
        return moments_of_sums(level_sums(image))
    values = image.double().flatten(1).numpy()
    return moments_of_values(np.full(3, values.shape[1]), values.sum(1), np.einsum("ij,ij->i", values, values))


def moments_of_sums(sums):
    """`moments` from the `level_sums` of an image (3, 3), or of many (n, 3, 3); sums of integers are exact."""
    return moments_of_values(*np.moveaxis(sums / np.array([[1], [255], [255**2]]), -2, 0))


def moments_of_values(n, total, squares):
    """`moments` from the pixels, sums and sums of squares of each channel."""
    mean = total / n
    std = np.sqrt(np.maximum(squares - total * mean, 0) / np.maximum(n - 1, 1))
    return np.stack([mean, std, n, total, squares], -2)


def summarise(results):
    """Mean, per-image standard deviation and pixel standard deviation of the set: float64 array (3, 3) of rows.

    Args:
        results: `moments` of the images, float64 array (images, 5, 3).
    """
    mean, std = results[:, :2].mean(0)
    n, total, squares = results[:, 2:].sum(0)
    return np.stack([mean, std, np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0))])


def find_flat_channels(statistics, source):
    """Standard deviations to divide by where the images' own are 0, as in fluorescence images of one colour.

    Args:
        statistics: see `summarise`.
        source: folder of the images, for the message.

    Returns:
        {channel: that of all pixels, or 1 where it is 0, too}.

    Raises:
        UserError: if all images show one and the same colour.
    """
    _, std, pixel_std = statistics
    if not (pixel_std >= SMALLEST_STD).any():
        raise UserError(
            f"all images in {source} show one and the same colour, from which nothing can be learned; look at some of "
            "them: they may be damaged, or use a small part of their range of values"
        )
    flat = np.flatnonzero(std < SMALLEST_STD)
    return {int(i): float(pixel_std[i]) if pixel_std[i] >= SMALLEST_STD else 1.0 for i in flat}


def get_mean_and_std(dataset, workers=None):
    """Mean over images of each image's channel mean, and of each image's (unbiased) channel std; for use elsewhere.

    Args:
        dataset: yields (image, ...), the image a PIL RGB image or a float tensor (3, H, W), such as an `ImageFolder`
            with or without `ToTensor`.
        workers: processes that read images; None: one per core if it takes long enough.

    Returns:
        ([3 floats], [3 floats]) for pixels from 0 to 1.

    Raises:
        UserError: if an image cannot be read, or there is none.
    """
    results, _, reasons = measure(range(len(dataset)), partial(get_image, dataset), workers)
    if reasons or not len(results):
        raise UserError(next(iter(reasons.values()), "the data set contains no image; put some there"))
    mean, std, _ = summarise(results).tolist()
    return mean, std


def get_image(dataset, index):
    """Image `index` of a data set that yields (image, ...)."""
    return dataset[index][0]


if __name__ == "__main__":
    run(main)
