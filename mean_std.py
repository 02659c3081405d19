"""Compute the normalisation statistics of the images, or of the spectrograms of recordings, in data1/<class>/.

    python mean_std.py

Prints the mean and the standard deviation of each colour channel for pixels from 0 to 1, and writes them to
data/mean_std.json, where train.py finds them if its own MEAN and STD are None.

There are two definitions of the standard deviation. "per image" is the mean over the images of each image's own
standard deviation; it ignores how images differ from each other, and is what train.py normalises with. "pixel" is the
standard deviation of all pixels of the data set. Both are computed exactly, from each image's histogram.

Exit status: 0; 1 an error; 2 a wrong option or constant; 3 done, but some files were skipped.
"""

import json
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from common.audio import input_kind, is_sound
from common.images import ImageError, level_sums, scan_class_folders
from common.manifest import MANIFEST, fingerprint, hash_file, read_json, read_sound
from common.options import Name, UserError, Workers, run

SOURCE: Name = "data1"  # folder that contains <class>/<image or recording>
OUTPUT: str = "data/mean_std.json"  # file for the result; "" writes none
WORKERS: Workers | None = None  # processes that read images; 0: none; None: one per core if it takes long enough

SECONDS_TO_START = 1.0  # s, roughly what starting processes costs; for less reading it does not pay off


def main():
    folders = (Path(OUTPUT).parent, Path("data"))  # makedata.py's manifest is beside OUTPUT, or where it is by default
    folder = next((folder for folder in folders if (folder / MANIFEST).is_file()), folders[1])
    sound = read_sound(folder)
    kind = input_kind(sound)
    paths = list_files(SOURCE, kind)
    results = measure(paths, kind.load, WORKERS, read_known_sums(folder / MANIFEST))
    for result, reason in results:
        if result is None:
            print(f"skipped: {reason}")
    used = [(result, content) for result, content in results if result is not None]
    if not used:
        raise UserError(f"no {kind.name} in {SOURCE} can be read; replace the files listed above")
    mean, std, pixel_std = summarise([result for result, _ in used]).tolist()

    print(f"{kind.name + 's':14} {len(used)} of {len(results)} in {SOURCE}")
    for name, values in (("mean", mean), ("std per image", std), ("std pixel", pixel_std)):
        print(f"{name:14} [{', '.join(f'{value:.6f}' for value in values)}]")
    if OUTPUT:
        report = dict(mean=mean, std=std, pixel_std=pixel_std, pictures=len(used))
        report["fingerprint"] = fingerprint(content for _, content in used)
        if sound is not None:
            report["sound"] = sound
        output = Path(OUTPUT)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written to     {output}")
    return 0 if len(used) == len(results) else 3


def list_files(source, kind):
    """The files of a `common.audio.Kind` in `source`/<class>/; UserError if a class has none."""
    classes, _ = scan_class_folders(source)
    for name, files in classes.items():
        if not any(map(kind.fits, files)):
            folder = Path(source, name)
            if any(map(is_sound, files)):  # makedata.py records how they become spectrograms
                raise UserError(f"{folder} contains recordings, but no manifest says so; run makedata.py first")
            raise UserError(f"{folder} contains no {kind.name}; put some there, or remove the folder")
    return [path for files in classes.values() for path in files if kind.fits(path)]


def read_known_sums(path):
    """{SHA-256: `level_sums`} of the images that makedata.py has read; empty if it was not run yet.

    Args:
        path: makedata.py's manifest.
    """
    files = read_json(path).get("files", []) if path.is_file() else []
    return {file["sha256"]: np.array(file["sums"]) for file in files if "sums" in file}


def measure(items, load, workers, known):
    """`moments` and content hash of every item, in parallel: [(moments, SHA-256) or (None, reason), ...].

    Args:
        items, load, known: see `Moments`.
        workers: processes; None: one per core if reading takes longer than starting them.
    """
    dataset = Moments(items, load, known)
    started = time.perf_counter()
    results = [dataset[index] for index in range(min(len(dataset), 8))]
    seconds_left = (time.perf_counter() - started) / max(len(results), 1) * (len(dataset) - len(results))
    if workers is None:
        workers = 0 if seconds_left < SECONDS_TO_START else os.cpu_count() or 1
    others = Subset(dataset, range(len(results), len(dataset)))
    loader = DataLoader(others, batch_size=8, num_workers=workers, collate_fn=list)
    with tqdm(total=len(dataset), initial=len(results), desc="mean_std", unit="img", leave=False) as bar:
        for batch in loader:
            results += batch
            bar.update(len(batch))
    return results


class Moments(Dataset):
    """For each item (its image's `moments`, SHA-256 of the file), or (None, why it cannot be read).

    Args:
        items: list of `Path`, or of anything else that `load` takes, whose SHA-256 is then "".
        load: function of an item -> image, see `moments`; `ImageError` if it cannot be read.
        known: {SHA-256: `level_sums`} of files that need not be decoded.
    """

    def __init__(self, items, load, known):
        self.items = items
        self.load = load
        self.known = known

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        item = self.items[index]
        content = hash_if_file(item) if isinstance(item, Path) else ""
        if content in self.known:
            return moments_of_sums(self.known[content]), content
        try:
            return moments(self.load(item)), content
        except ImageError as error:
            return None, str(error)


def hash_if_file(path):
    """SHA-256 of a file as hex; "" for what is not a file (reading a device would never end) or cannot be read."""
    try:
        return hash_file(path) if path.is_file() else ""
    except OSError:
        return ""


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
    """`moments` of an image whose `level_sums` are known; sums of integers have no rounding error."""
    return moments_of_values(*(sums / np.array([[1], [255], [255**2]])))


def moments_of_values(n, total, squares):
    """`moments` from the pixels, sums and sums of squares of each channel."""
    mean = total / n
    std = np.sqrt(np.maximum(squares - total * mean, 0) / np.maximum(n - 1, 1))
    return np.stack([mean, std, n, total, squares])


def summarise(results):
    """Mean, per-image standard deviation and pixel standard deviation of the set: float64 array (3, 3) of rows."""
    results = np.stack(results)  # (images, 5, 3)
    mean, std = results[:, :2].mean(0)
    n, total, squares = results[:, 2:].sum(0)
    return np.stack([mean, std, np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0))])


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
    results = measure(range(len(dataset)), partial(get_image, dataset), workers, known={})
    broken = [reason for result, reason in results if result is None]
    if broken or not results:
        raise UserError(broken[0] if broken else "the data set contains no image; put some there")
    mean, std, _ = summarise([result for result, _ in results]).tolist()
    return mean, std


def get_image(dataset, index):
    """Image `index` of a data set that yields (image, ...)."""
    return dataset[index][0]


if __name__ == "__main__":
    run(main)
