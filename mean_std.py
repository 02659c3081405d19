"""Compute the normalisation statistics of the pictures, or recordings, in data1/<class>/.

    python mean_std.py

Prints the mean and the standard deviation of each colour channel for pixels from 0 to 1, and writes them to
data/mean_std.json, where train.py finds them when its own MEAN and STD are None.

Two definitions of the standard deviation are in use. "per image" is the mean over the pictures of each picture's own
standard deviation; it leaves out how pictures differ from each other, and is what this recipe normalises with. "pixel"
is the standard deviation of all pixels of the set. Both are computed exactly, from each picture's histogram.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from common.dataset import open_image_folder
from common.images import ImageError, level_sums
from common.manifest import MANIFEST, fingerprint, hash_file, read_json, read_sound
from common.options import UserError, run
from common.sounds import file_kind

SOURCE: str = "data1"  # folder that holds <class>/<picture>
OUTPUT: str = "data/mean_std.json"  # file for the result; "" writes none
WORKERS: int = -1  # processes that read pictures; -1: one for each core, where it pays; 0: read in the main process

SECONDS_TO_START = 1.0  # what starting processes costs about: for less reading than this it does not pay


def moments(picture):
    """Mean and unbiased standard deviation of one picture's channels, and what the whole set's need.

    Args:
        picture: PIL RGB picture, or float tensor (3, H, W).

    Returns:
        float64 array (5, 3): mean, standard deviation (0 for a single pixel), pixels, sum, sum of squares.
    """
    if isinstance(picture, Image.Image):
        return moments_of_sums(level_sums(picture))
    values = picture.double().flatten(1).numpy()
    return moments_of_values(np.full(3, values.shape[1]), values.sum(1), np.einsum("ij,ij->i", values, values))


def moments_of_sums(sums):
    """`moments` of a picture whose `level_sums` are known; sums of integers lose nothing to rounding."""
    return moments_of_values(*(sums / np.array([[1], [255], [255**2]])))


def moments_of_values(n, total, squares):
    """`moments` from the pixels, sums and sums of squares of each channel."""
    mean = total / n
    std = np.sqrt(np.maximum(squares - total * mean, 0) / np.maximum(n - 1, 1))
    return np.stack([mean, std, n, total, squares])


def hash_if_file(path):
    """SHA-256 of a file as hex; "" for what is none (reading a device would never end) or cannot be read."""
    try:
        return hash_file(path) if path.is_file() else ""
    except OSError:
        return ""


class Moments(Dataset):
    """For each picture of `dataset` its `moments` and its file's SHA-256, or the reason why it cannot be read.

    Args:
        dataset: see `get_mean_and_std`.
        known: {SHA-256: `level_sums`} of pictures that were read before and need not be decoded again.
    """

    def __init__(self, dataset, known):
        self.dataset = dataset
        self.known = known

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        samples = getattr(self.dataset, "samples", None)
        content = hash_if_file(Path(samples[index][0])) if samples else ""
        if content in self.known:
            return moments_of_sums(self.known[content]), content
        try:
            return moments(self.dataset[index][0]), content
        except ImageError as error:
            return None, str(error)


def known_sums(path):
    """{SHA-256: `level_sums`} of the pictures that makedata.py has read; empty if it was not run yet.

    Args:
        path: makedata.py's manifest.
    """
    files = read_json(path)["files"] if path.is_file() else []
    return {file["sha256"]: np.array(file["sums"]) for file in files if "sums" in file}


def measure(dataset, workers, known):
    """`moments` and content hash of every picture of `dataset`, read in parallel: [(moments or None, text), ...]."""
    pictures = Moments(dataset, known)
    started = time.perf_counter()
    results = [pictures[index] for index in range(min(len(pictures), 8))]
    seconds_left = (time.perf_counter() - started) / max(len(results), 1) * (len(pictures) - len(results))
    if workers < 0:
        workers = 0 if seconds_left < SECONDS_TO_START else os.cpu_count() or 1
    others = Subset(pictures, range(len(results), len(pictures)))
    loader = DataLoader(others, batch_size=8, num_workers=workers, collate_fn=list)
    with tqdm(total=len(pictures), initial=len(results), desc="mean_std", unit="img", leave=False) as bar:
        for batch in loader:
            results += batch
            bar.update(len(batch))
    return results


def summarise(results):
    """Mean, per-image standard deviation and pixel standard deviation of the set: float64 array (3, 3) of rows."""
    results = np.stack(results)  # (pictures, 5, 3)
    mean, std = results[:, :2].mean(0)
    n, total, squares = results[:, 2:].sum(0)
    return np.stack([mean, std, np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0))])


def get_mean_and_std(dataset, workers=-1):
    """Mean over pictures of each picture's channel mean, and of each picture's (unbiased) channel std.

    Args:
        dataset: yields (picture, ...), the picture a PIL RGB image or a float tensor (3, H, W), such as an
            `ImageFolder` with or without `ToTensor`.
        workers: processes that read pictures; -1 is one for each core.

    Returns:
        ([3 floats], [3 floats]) for pixels from 0 to 1.

    Raises:
        UserError: if a picture cannot be read, or there is none.
    """
    results = measure(dataset, workers, known={})
    broken = [reason for result, reason in results if result is None]
    if broken or not results:
        raise UserError(broken[0] if broken else "the data set holds no picture; put some there")
    mean, std, _ = summarise([result for result, _ in results]).tolist()
    return mean, std


def main():
    folders = (Path(OUTPUT).parent, Path("data"))  # makedata.py's record lies beside OUTPUT, or where it is by default
    folder = next((folder for folder in folders if (folder / MANIFEST).is_file()), folders[1])
    sound = read_sound(folder)
    dataset = open_image_folder(SOURCE, sound=sound)
    results = measure(dataset, WORKERS, known_sums(folder / MANIFEST))
    for result, reason in results:
        if result is None:
            print(f"left out: {reason}")
    used = [(result, content) for result, content in results if result is not None]
    if not used:
        raise UserError(f"no {file_kind(sound).name} in {SOURCE} can be read; replace the files listed above")
    mean, std, pixel_std = summarise([result for result, _ in used]).tolist()

    print(f"{file_kind(sound).name + 's':14} {len(used)} of {len(results)} in {SOURCE}")
    for name, values in (("mean", mean), ("std per image", std), ("std pixel", pixel_std)):
        print(f"{name:14} [{', '.join(f'{value:.6f}' for value in values)}]")
    if OUTPUT:
        output = Path(OUTPUT)
        output.parent.mkdir(parents=True, exist_ok=True)
        report = dict(
            mean=mean,
            std=std,
            pixel_std=pixel_std,
            pictures=len(used),
            fingerprint=fingerprint(content for _, content in used),
            **({} if sound is None else dict(sound=sound)),
        )
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"written to     {output}")
    return 0 if len(used) == len(results) else 3


if __name__ == "__main__":
    run(main)
