"""What lies in data besides pictures: makedata.py's record, mean_std.py's result and train.py's cache."""

import hashlib
import json
import re
from pathlib import Path

from common.options import UserError

MANIFEST = "manifest.json"
STATISTICS = "mean_std.json"
CACHE = "cache"  # folder of common/cache.py
CACHE_FILES = re.compile(rf"{CACHE}/(\d+-[0-9a-f]{{16}}\.npy(\.part)?|contents\.json(\.\d+)?|lock)")


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
