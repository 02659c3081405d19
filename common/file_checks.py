"""What a file says about itself, checked before it is used: manifest, statistics, checkpoints, exported networks.

Such files are copied, edited, sent and downloaded, so what they contain is input like the command line: each value that
is used has a kind, in the terms of common/options.py, and anything else is one sentence that names the file.
common/checkpoint_check.py checks what is particular to checkpoints.
"""

import contextlib
import os
import reprlib
from dataclasses import fields
from typing import Annotated, Literal

import numpy as np

from common.audio import PAD_MODES, SAMPLE_RATES, Spectrogram
from common.fit import FITS
from common.options import Ascending, Channels, ImageSize, Length, Limits, Name, NotEmpty, PositiveChannels, UserError
from common.options import accepts, describe

MAX_PIXELS = 2**24  # of an image that a network takes; 4096 x 4096
PARTS = ("train", "val", "test")  # folders that makedata.py makes; the last one on demand
MAX_NAME = 255  # characters of a class, whose name is that of a folder

Count = Annotated[int, Limits(0, 10**12)]
Side = Annotated[int, Limits(32, 2**18)]
FileImageSize = ImageSize | Annotated[list[Side], Length(2)]  # as in a checkpoint: of a square, or [height, width]
NORMALISATION = dict(mean=Channels, std=PositiveChannels)
SOUND = dict(
    sample_rate=Annotated[int, Limits(*SAMPLE_RATES)],
    seconds=Annotated[float, Limits(high=3600, above=0)],
    padding=Literal[tuple(PAD_MODES)],
    window=Annotated[float, Limits(high=1000, above=0)],
    hop=Annotated[float, Limits(high=1000, above=0)],
    mels=Annotated[int, Limits(32, 1024)],
    decibels=Annotated[float, Limits(high=1000, above=0)],
)


@contextlib.contextmanager
def naming(path, remedy):
    """Within this context a ValueError, which says what is wrong, becomes a UserError that names the file.

    Args:
        path: the file.
        remedy: what to do, such as "export it again".
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}; {remedy}") from error


class Brief(reprlib.Repr):
    """`repr` of a value of a file, in a few characters whatever it is."""

    maxstring = maxother = 60
    maxlevel = 2
    maxdict = maxlist = maxtuple = maxset = 4

    def repr_int(self, value, level):
        return repr(value) if abs(value) < 10**20 else f"an integer of {value.bit_length()} bits"

    def repr_Tensor(self, value, level):  # noqa: N802  reprlib looks for the name of the type
        return f"a tensor {tuple(value.shape)}" if value.numel() > 1 or value.dim() else "a tensor"

    repr_Parameter = repr_Tensor  # noqa: N815


def brief(value):
    """`value` in a few characters and one line."""
    text = Brief()
    # Attributes of the class are no settings in Python 3.10 and 3.11, whose constructor sets them.
    text.maxstring = text.maxother = 60
    text.maxlevel, text.maxdict, text.maxlist, text.maxtuple = 2, 4, 4, 4
    return " ".join(text.repr(value).split())


def check_fields(values, kinds, owner="its"):
    """ValueError unless `values` is a dict that has each of `kinds`, of this kind.

    Args:
        values: as read from a file.
        kinds: {key: kind, as the annotation of a constant}.
        owner: whose values these are, such as "its" or "its sound's".
    """
    for key, kind in kinds.items():
        if key not in values:
            raise ValueError(f"{owner} {key} is missing")
        check_kind(values[key], kind, f"{owner} {key}")


def check_kind(value, kind, name):
    """ValueError unless `value`, which is called `name`, is of a kind."""
    if not accepts(kind, value):
        raise ValueError(f"{name} must be {describe(kind)}, got {brief(value)}")


def check_keys(values, known, name):
    """ValueError unless `values`, which are called `name`, are a dict without keys beside those known."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a dictionary, got {brief(values)}")
    unknown = next((key for key in values if key not in known), None)
    if unknown is not None:
        raise ValueError(f"{name} must not have the key {brief(unknown)}")


def check_names(names, what):
    """ValueError unless `names`, which are called `what`, are a list of different texts that are not empty."""
    check_kind(names, Annotated[list[Name], NotEmpty()], what)
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"{what} must be different, got {brief(twice)} twice")


def check_classes(classes):
    """ValueError unless `classes` can be the names of classes, which are names of folders."""
    check_names(classes, "its classes")
    for name in classes:
        if not is_file_name(name):
            raise ValueError(f"its class {brief(name)} must be the name of a folder, without the path to it")


def is_file_name(name):
    """Whether a text may name one file or folder here, and leads to no other place."""
    places = "/" in name or "\0" in name or os.name == "nt" and ("\\" in name or ":" in name)
    return bool(name) and not places and name not in (".", "..") and len(name) <= MAX_NAME


def check_input(about):
    """ValueError unless "classes", "mean", "std", "img_size" and, if present, "sound" and "fit" can be used."""
    check_fields(about, dict(classes=list, **NORMALISATION, img_size=FileImageSize))
    check_classes(about["classes"])
    size = about["img_size"]
    if not isinstance(size, int) and size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"its img_size must be of at most {MAX_PIXELS} pixels, got {brief(size)}")
    check_value_range(about.get("value_range"))
    check_kind(about.get("fit", "squeeze"), Literal[FITS], "its fit")
    check_sound(about.get("sound"))
    if about.get("sound") is not None and list(Spectrogram(**about["sound"]).size) != side_lengths(size):
        raise ValueError(f"its img_size must be that of its spectrograms, got {brief(size)}")


def side_lengths(img_size):
    """[height, width] of a checkpoint's img_size."""
    return [img_size, img_size] if isinstance(img_size, int) else list(img_size)


def check_value_range(value_range):
    """ValueError unless `value_range` is None or can be that of `common.images.load_image`."""
    if value_range is None:
        return
    check_kind(value_range, Annotated[list[float], Length(2), Ascending()], "its value_range")
    if value_range[0] == value_range[1]:
        raise ValueError(f"its value_range must be two different numbers, got {brief(value_range)}")


def check_sound(sound):
    """ValueError unless `sound` is None or the settings of a `Spectrogram` that is no larger than an image may be."""
    if sound is None:
        return
    check_keys(sound, SOUND, "its sound")
    assert list(SOUND) == [field.name for field in fields(Spectrogram)]
    check_fields(sound, SOUND, "its sound's")
    height, width = Spectrogram(**sound).size
    if height * width > MAX_PIXELS:
        raise ValueError(f"its sound's spectrograms must have at most {MAX_PIXELS} pixels, got {height} x {width}")


def check_statistics(statistics):
    """ValueError unless these can be the content of mean_std.json."""
    check_fields(statistics, dict(NORMALISATION, pictures=Count, fingerprint=str))
    check_value_range(statistics.get("value_range"))
    check_sound(statistics.get("sound"))


def check_manifest(manifest):
    """ValueError unless this can be the content of manifest.json."""
    check_kind(manifest.get("fingerprint", ""), str, "its fingerprint")
    check_kind(manifest.get("images", 0), Count, "its images")
    check_kind(manifest.get("labels", ""), str, "its labels")
    check_kind(manifest.get("source", ""), str, "its source")
    check_value_range(manifest.get("value_range"))
    check_sound(manifest.get("sound"))
    files = manifest.get("files", [])
    if not isinstance(files, list):
        raise ValueError(f"its files must be a list, got {brief(files)}")
    for number, record in enumerate(files):
        reason = flaw_of_record(record)
        if reason:
            raise ValueError(f"its file {number} {reason}")


def flaw_of_record(record):
    """What is wrong with the record of one file in manifest.json; "" if nothing is.

    Args:
        record: path (in data/), source (in data1/, or anywhere), sha256, bytes, and what else is known of the file.
    """
    if not isinstance(record, dict):
        return f"must be a dictionary, got {brief(record)}"
    path = record.get("path")
    if not isinstance(path, str) or not is_place_in_data(path):
        return f"must have a path such as train/<class>/<name>, got {brief(path)}"
    source = record.get("source")
    if not isinstance(source, str) or not source or "\0" in source:
        return f"must have the path of a file as its source, got {brief(source)}"
    for key in ("sha256", "image_sha256"):
        value = record.get(key, "0" * 64 if key == "image_sha256" else None)
        if not isinstance(value, str) or len(value) != 64 or value.strip("0123456789abcdef"):
            return f"must have a {key} of 64 hexadecimal digits, got {brief(value)}"
    for key in ("bytes", "image_bytes"):
        value = record.get(key, 0 if key == "image_bytes" else None)
        if type(value) is not int or value < 0:
            return f"must have a number of {key}, got {brief(value)}"
    if "sums" in record and not is_sums_of_record(record["sums"]):
        return f"has impossible sums, {brief(record['sums'])}"
    return ""


def are_sums(sums):
    """Whether these can be the sums of `common.manifest.Table`, an int array (images, 7): of each image the pixels, and
    of each channel the sum of the levels and that of their squares."""
    pixels, totals, squares = sums[:, :1], sums[:, 1:4], sums[:, 4:]
    fits = (pixels > 0).all() and (totals >= 0).all() and (squares >= 0).all()
    return bool(fits and (totals <= 255 * pixels).all() and (squares <= 255 * totals).all())


def is_sums_of_record(rows):
    """Whether `level_sums` of one image in a manifest of an earlier version are three lists of three whole numbers."""
    if not isinstance(rows, list) or len(rows) != 3 or not all(isinstance(r, list) and len(r) == 3 for r in rows):
        return False
    if not all(type(value) is int and 0 <= value < 2**62 for row in rows for value in row) or len(set(rows[0])) > 1:
        return False
    return are_sums(np.array([[rows[0][0], *rows[1], *rows[2]]], np.int64))


def is_place_in_data(path):
    """Whether a text is the path of a file below data/, as makedata.py makes it: <one of PARTS>/<class>/<name>."""
    side, slash, rest = path.partition("/")
    name, slash, file = rest.partition("/")
    return side in PARTS and bool(slash) and is_file_name(name) and is_file_name(file)


def same_path(first, second):
    """Whether two paths are the same text once they are absolute; links are not followed."""
    return os.path.normcase(os.path.abspath(first)) == os.path.normcase(os.path.abspath(second))
