"""The files in data/ besides images: makedata.py's manifest, mean_std.py's statistics and train.py's cache.

manifest.json says how data/ was made, and manifest.csv has a line for each image. Earlier versions had these lines in
manifest.json, under "files"; such a file is read all the same.
"""

import csv
import hashlib
import json
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from common.columns import Hashes, Texts, iterate
from common.file_checks import are_sums, check_manifest, check_statistics, is_place_in_data, naming
from common.options import UserError
from common.tables import guard, unguard
from common.text import read_text

MANIFEST = "manifest.json"
TABLE = "manifest.csv"  # what the manifest says of each file
STATISTICS = "mean_std.json"
COLUMNS = ("path", "source", "sha256", "bytes", "image_sha256", "image_bytes", "seconds", "group")
SUMS = ("pixels", "sum_red", "sum_green", "sum_blue", "squares_red", "squares_green", "squares_blue")
CACHE = "cache"  # folder of common/cache.py
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as everywhere; without importing timm
CACHE_FILES = re.compile(rf"{CACHE}/(\d+(x\d+)?-[0-9a-f]{{16}}\.npy(\.part)?|contents\.(json|npz)(\.\d+)?|lock)")


def fingerprint(contents):
    """One hash of a set of images, independent of their names and order.

    Args:
        contents: SHA-256 of each file, as hex or as `Hashes`, or another text for each.
    """
    if isinstance(contents, Hashes):
        return fingerprint_sorted(Hashes(np.sort(contents.keys()).view(np.uint8).reshape(-1, 32)))
    return fingerprint_sorted(sorted(contents))


def fingerprint_sorted(texts):
    """`fingerprint` of texts that are sorted already."""
    digest, texts, separator = hashlib.sha256(), iter(texts), ""
    while block := list(islice(texts, 4096)):
        digest.update((separator + "\n".join(block)).encode(errors="surrogateescape"))
        separator = "\n"
    return digest.hexdigest()


@dataclass
class Table:
    """What the manifest says of each file, in columns."""

    path: Texts  # where makedata.py put it, below data/, with slashes on every system
    source: Texts  # the image or recording in data1/
    sha256: Hashes  # of its content
    bytes: np.ndarray  # int64 (files,), its size
    # int64 (files, 7): pixels, then the sums of the levels (0 to 255) of red, green, blue, then of their squares, as
    # `common.images.level_sums` gives them. None: a manifest of an earlier version.
    sums: np.ndarray | None = None
    # Of recordings only: SHA-256 and size of the spectrogram, duration in seconds.
    image_sha256: Hashes | None = None
    image_bytes: np.ndarray | None = None
    seconds: np.ndarray | None = None
    group: Texts | None = None  # of files that stay together, where they were split by group

    def __len__(self):
        return len(self.path)

    @classmethod
    def empty(cls):
        """That of a folder in which makedata.py put nothing."""
        return cls(Texts(), Texts(), Hashes.from_hex(()), np.zeros(0, np.int64))

    def check(self):
        """ValueError unless these can be the lines of manifest.csv."""
        for number, place in enumerate(self.path, start=2):
            if not is_place_in_data(place):
                raise ValueError(f"line {number} must have a path such as train/<class>/<name>")
        if self.sums is not None and not are_sums(self.sums) or (self.bytes < 0).any():
            raise ValueError("it has impossible numbers")

    def write(self, path):
        """Write manifest.csv."""
        columns = {name: getattr(self, name) for name in COLUMNS if getattr(self, name) is not None}
        # The byte order mark is for Excel. Names from another system's archive may not be UTF-8; their bytes are kept.
        with open(path, "w", newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow([*columns, *SUMS])
            columns |= {name: map(guard, columns[name]) for name in ("source", "group") if name in columns}
            columns = [iterate(column) if isinstance(column, np.ndarray) else column for column in columns.values()]
            for *row, sums in zip(*columns, iterate(self.sums)):
                writer.writerow([*row, *sums])

    @classmethod
    def from_rows(cls, header, rows):
        """From the names of the columns and an iterable of as many texts or numbers for each file.

        Raises:
            ValueError, KeyError: if a column is missing, or a value is of another kind.
        """
        blocks, rows = {name: [] for name in header}, iter(rows)
        while block := list(islice(rows, 4096)):  # not all at once
            if any(len(row) != len(header) for row in block):
                raise ValueError("a line is incomplete")
            for name, values in zip(header, zip(*block)):
                if name in ("path", "source", "group"):
                    blocks[name].append(Texts(values if name == "path" else map(unguard, values)))
                elif name in ("sha256", "image_sha256"):
                    blocks[name].append(Hashes.from_hex(values).digests)
                else:
                    blocks[name].append(np.array(values).astype(float if name == "seconds" else np.int64))
        columns = {name: Texts.join(blocks[name]) for name in ("path", "source")}
        columns |= {"group": Texts.join(blocks["group"])} if "group" in blocks else {}
        for name in COLUMNS[2:]:
            if name in blocks and name not in columns:
                columns[name] = np.concatenate(blocks[name] or [np.zeros(0, np.int64)])
        columns |= {name: Hashes(columns[name]) for name in ("sha256", "image_sha256") if name in columns}
        if all(name in blocks for name in SUMS):
            columns["sums"] = np.stack([np.concatenate(blocks[name]) for name in SUMS], 1)
        return cls(**columns)


def read_table(folder):
    """What makedata.py knows of each file that it put into `folder`: a `Table`.

    Args:
        folder: such as data, with a manifest.json.

    Raises:
        UserError: if it is damaged.
    """
    path = Path(folder, MANIFEST)
    manifest = read_manifest(folder)
    try:
        if "files" in manifest:  # of an earlier version
            return Table.from_rows(*former_rows(manifest["files"]))
        images, path = manifest["images"], Path(folder, TABLE)
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file)
            table = Table.from_rows(next(rows, []), rows)
        if len(table) != images:
            raise ValueError(f"it has {len(table)} of {images} lines")
        table.check()
        return table
    except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        raise UserError(
            f"{path} is damaged ({error}), so it is unknown what {folder} contains; move {folder} away and run "
            "makedata.py again"
        ) from error


def former_rows(files):
    """Header and rows, as of manifest.csv, of the list "files" in the manifest of an earlier version."""
    header = [name for name in COLUMNS if name in COLUMNS[:4] or files and all(name in file for file in files)]
    with_sums = bool(files) and all("sums" in file for file in files)

    def row(file):
        sums = [*file["sums"][0][:1], *file["sums"][1], *file["sums"][2]] if with_sums else []
        return [*(file[name] for name in header), *sums]

    return header + list(SUMS) * with_sums, map(row, files)


def read_json(path):
    """Read a JSON file that one of the scripts wrote: a dict.

    Raises:
        UserError: if it is damaged.
    """
    path = Path(path)
    try:
        content = json.loads(read_text(path), parse_constant=refuse_constant)
        if not isinstance(content, dict):
            raise ValueError(f"it contains a {type(content).__name__} and not an object")
    except (ValueError, RecursionError) as error:
        remedy = f"move {path.parent} away" if path.name == MANIFEST else "delete it"
        raise UserError(f"{path} is damaged ({error}); {remedy} and run the script that made it again") from error
    return content


def refuse_constant(name):
    """ValueError for the numbers that Python reads from JSON though JSON has none of them: NaN and infinities."""
    raise ValueError(f"{name} is no number")


def read_manifest(folder):
    """What makedata.py recorded in `folder`; {} if there is no manifest.

    Raises:
        UserError: if it is damaged, or a value of it cannot be used.
    """
    path = Path(folder, MANIFEST)
    if not path.is_file():
        return {}
    manifest = read_json(path)
    with naming(path, f"move {path.parent} away and run makedata.py again"):
        check_manifest(manifest)
    return manifest


def read_sound(folder):
    """The settings of the spectrograms in `folder`, which makedata.py made.

    Args:
        folder: such as data.

    Returns:
        dict (see `common.audio.Spectrogram`); None for images, and for a folder without a manifest.

    Raises:
        UserError: if an earlier version placed the recordings themselves there.
    """
    manifest = read_manifest(folder)
    if "sound" in manifest and not all("image_sha256" in file for file in manifest.get("files", [])):
        raise UserError(
            f"{folder} contains recordings, where an earlier version of makedata.py put them; run makedata.py again, "
            "which writes their spectrograms"
        )
    return manifest.get("sound")


def read_value_range(folder):
    """The stored values of black and white in the images of `folder`, which makedata.py's VALUE_RANGE chose.

    Args:
        folder: such as data.

    Returns:
        [low, high], see `common.images.load_image`; None: as each file states them.

    Raises:
        UserError: if the manifest is damaged.
    """
    return read_manifest(folder).get("value_range")


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
        return list(mean), list(std), "MEAN and STD"
    statistics = Path(data, STATISTICS)
    if not statistics.is_file():
        return list(IMAGENET_MEAN), list(IMAGENET_STD), "ImageNet, since mean_std.py was not run"
    measured = read_json(statistics)
    with naming(statistics, "delete it and run mean_std.py again"):
        check_statistics(measured)
    if measured.get("sound") != sound:
        print("warning: makedata.py makes other spectrograms since mean_std.py was run; run it again")
    manifest = read_manifest(data)
    if measured.get("value_range") != manifest.get("value_range"):
        print("warning: VALUE_RANGE has changed since mean_std.py was run; run it again")
    if manifest and manifest.get("fingerprint") != measured["fingerprint"]:
        print("warning: the images have changed since mean_std.py was run; run it again")
    return measured["mean"], measured["std"], f"{statistics}, {measured['pictures']} images"
