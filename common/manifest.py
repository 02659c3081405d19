"""What lies in data besides pictures: makedata.py's record, mean_std.py's result and train.py's cache."""

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
    """SHA-256 of a file, as hex; read in pieces, since a recording may be larger than the memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(contents):
    """One hash for a set of pictures, whatever their names and order.

    Args:
        contents: SHA-256 of each file, as hex, or another text for each.
    """
    return hashlib.sha256("\n".join(sorted(contents)).encode(errors="surrogateescape")).hexdigest()


def read_json(path):
    """Read a JSON file that one of the scripts wrote.

    Raises:
        UserError: if it is damaged.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except ValueError as error:
        remedy = f"move {path.parent} away" if path.name == MANIFEST else "delete it"
        raise UserError(f"{path} is damaged ({error}); {remedy} and run the script that made it again") from error


def read_sound(folder):
    """How makedata.py read the recordings of `folder` (see common/sounds.py); None for pictures or without manifest."""
    path = Path(folder, MANIFEST)
    return read_json(path).get("sound") if path.is_file() else None
