"""The files in data/ besides images: makedata.py's manifest, mean_std.py's statistics and train.py's cache."""

import hashlib
import json
import re
from pathlib import Path

from common.options import UserError

MANIFEST = "manifest.json"
STATISTICS = "mean_std.json"
CACHE = "cache"  # folder of common/cache.py
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
