"""The files in data/ besides images: makedata.py's manifest, mean_std.py's statistics and train.py's cache."""

import hashlib
import json
import re
from pathlib import Path

from common.options import UserError

MANIFEST = "manifest.json"
STATISTICS = "mean_std.json"
CACHE = "cache"  # folder of common/cache.py
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as everywhere; without importing timm
CACHE_FILES = re.compile(rf"{CACHE}/(\d+(x\d+)?-[0-9a-f]{{16}}\.npy(\.part)?|contents\.json(\.\d+)?|lock)")


def hash_file(path):
    """SHA-256 of a file, as hex; read in blocks, since a recording may be larger than the memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(contents):
    """One hash of a set of images, independent of their names and order.

    Args:
        contents: SHA-256 of each file, as hex, or another text for each.
    """
    return hashlib.sha256("\n".join(sorted(contents)).encode(errors="surrogateescape")).hexdigest()


def read_json(path):
    """Read a JSON file that one of the scripts wrote: a dict.

    Raises:
        UserError: if it is damaged.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        if not isinstance(content, dict):
            raise ValueError(f"it contains a {type(content).__name__} and not an object")
    except ValueError as error:
        remedy = f"move {path.parent} away" if path.name == MANIFEST else "delete it"
        raise UserError(f"{path} is damaged ({error}); {remedy} and run the script that made it again") from error
    return content


def read_sound(folder):
    """The settings of the spectrograms in `folder`, which makedata.py made.

    Args:
        folder: such as data.

    Returns:
        dict (see `common.audio.Spectrogram`); None for images, and for a folder without a manifest.

    Raises:
        UserError: if an earlier version placed the recordings themselves there.
    """
    path = Path(folder, MANIFEST)
    manifest = read_json(path) if path.is_file() else {}
    if "sound" in manifest and not all("image_sha256" in file for file in manifest.get("files", [])):
        raise UserError(
            f"{folder} contains recordings, where an earlier version of makedata.py put them; run makedata.py again, "
            "which writes their spectrograms"
        )
    return manifest.get("sound")


def choose_mean_and_std(data, mean, std, sound):
    """The normalisation: the constants, else mean_std.py's statistics, else those of ImageNet.

    Prints a warning if the statistics are those of other images.

    Args:
        data: such as data.
        mean, std: the constants MEAN and STD: three floats each, or None.
        sound: see `read_sound`.

    Returns:
        (mean, std, where they come from in words): two lists of three floats, for pixels from 0 to 1.

    Raises:
        UserError: if a file is damaged.
    """
    if mean is not None:
        return list(mean), list(std), "the constants"
    statistics, manifest = Path(data, STATISTICS), Path(data, MANIFEST)
    if not statistics.is_file():
        return list(IMAGENET_MEAN), list(IMAGENET_STD), "ImageNet, since mean_std.py was not run"
    measured = read_json(statistics)
    if not measured.keys() >= {"mean", "std", "pictures", "fingerprint"}:
        raise UserError(f"{statistics} is damaged; delete it and run mean_std.py again")
    if measured.get("sound") != sound:
        print("warning: makedata.py makes other spectrograms since mean_std.py was run; run it again")
    if manifest.is_file() and read_json(manifest).get("fingerprint") != measured["fingerprint"]:
        print("warning: the images have changed since mean_std.py was run; run it again")
    return measured["mean"], measured["std"], f"{statistics}, {measured['pictures']} images"
