"""Images and masks as files: which belong together, which class each pixel has, and what is wrong with them.

    images/train/0001.jpg   masks/train/0001.png    the value of a pixel, or its colour, says its class
    images/val/...          masks/val/...           classes.txt lists the classes

A mask has the name of its image, in the same folder below masks/, or that name with one of `SUFFIXES`. In classes.txt
each line is a class, and its number, from 0, is its value in the masks. A line may give another value, or a colour:

    road                    value 0 (the first line)
    plant,255               value 255
    sky,128,128,128         this colour, red, green and blue; also as 128 128 128 sky
"""

import csv
import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.functional import pil_to_tensor

from common.decoding import FORMATS, ImageError, pillow_limits
from common.file_checks import brief
from common.files import list_files, write_csv
from common.images import is_hidden, is_image, load_image
from common.options import UserError
from common.progress import Progress
from common.tables import unguard
from common.text import read_text

IGNORED = 255  # instead of a class: the pixel counts neither in the loss nor in the metric
UNKNOWN = 254  # instead of a class: a value or colour that the classes do not have
MAX_CLASSES = 254
SUFFIXES = ("_mask", "-mask", "_masks", "_label", "_labels", "_L", "_gt", "_seg")  # of a mask, behind its image's name
MASK_EXTENSIONS = (".png", ".bmp", ".gif", ".tif", ".tiff")  # without loss; JPEG would change the values
LISTED = 20  # flaws that are printed; skipped.csv has all
BEHIND = re.compile(r"(.+?)\s*[,;\t]\s*(\d+(?:\s*[,;\s]\s*\d+){0,3})")  # plant,255 or sky,128,128,128
BEFORE = re.compile(r"(\d+\s+\d+\s+\d+)\s+(\S.*)")  # 128 128 128 sky


class Flaw(NamedTuple):
    """A file that is left out, and why, in words that can stand behind its path."""

    path: str
    reason: str


class Pair(NamedTuple):
    """An image with its mask, as paths."""

    name: str  # of the image, below its folder, with slashes
    image: str
    mask: str


@dataclass(frozen=True)
class ClassTable:
    """Which class a pixel of a mask has.

    Attributes:
        names: of the classes that are learned.
        by_value: uint8 array (256,): class of each value; `IGNORED`; `UNKNOWN`.
        by_colour: {(red, green, blue): class or `IGNORED`}; {}: masks hold values.
    """

    names: list
    by_value: np.ndarray
    by_colour: dict


def read_classes(path, ignore):
    """Read classes.txt, see above: a `ClassTable`.

    Args:
        path: the file.
        ignore: values, or names in any case, that become `IGNORED`; a value that a line gives itself is its class.

    Raises:
        UserError: if it cannot be read, or names a class, value or colour twice; it names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no {path}; write the names of the classes there, one a line, in the order of values")
    try:
        lines = read_text(path, errors="strict").splitlines()
    except UnicodeError as error:
        raise UserError(f"{path} is not UTF-8; save it as UTF-8") from error
    names, by_value, by_colour, seen = [], np.full(256, UNKNOWN, np.uint8), {}, set()
    ignored = {word.strip().lower() for word in ignore}
    rows = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    for value, (number, line) in enumerate(rows):
        name, numbers = parse_class(line)
        if name.lower() in seen or len(numbers) not in (0, 1, 3) or any(not 0 <= item <= 255 for item in numbers):
            what = "is there twice" if name.lower() in seen else "needs a value, a colour or no number, from 0 to 255"
            raise UserError(f"{path}, line {number}: {line[:80]!r} {what}; correct it")
        seen.add(name.lower())
        value = numbers[0] if len(numbers) == 1 else value
        own = IGNORED if {name.lower(), str(value)} & ignored and len(numbers) != 1 else len(names)
        if len(numbers) == 1 and name.lower() in ignored:
            own = IGNORED
        if value > 255 or by_value[value] != UNKNOWN or tuple(numbers) in by_colour:
            raise UserError(f"{path}, line {number}: {line[:80]!r} has the value or colour of another line; correct it")
        by_value[value] = own
        if len(numbers) == 3:
            by_colour[tuple(numbers)] = own
        names += [name] if own != IGNORED else []
    if by_colour and len(by_colour) < len(rows):
        raise UserError(f"{path}: either each line has a colour or none; {len(by_colour)} of {len(rows)} have one")
    if not 2 <= len(names) <= MAX_CLASSES:
        raise UserError(f"{path} has {len(names)} classes that are not ignored; 2 to {MAX_CLASSES} are needed")
    for word in ignored:
        if word.isdigit() and int(word) < 256 and by_value[int(word)] == UNKNOWN:
            by_value[int(word)] = IGNORED
    return ClassTable(names, by_value, by_colour)


def parse_class(line):
    """(name, [number, ...]) of a line of classes.txt."""
    name, numbers = line, ""
    if match := BEHIND.fullmatch(line):
        name, numbers = match.groups()
    elif match := BEFORE.fullmatch(line):
        numbers, name = match.groups()
    return name.strip(), [int(word) for word in re.findall(r"\d+", numbers)]


def read_mask(path, table):
    """Read a mask as classes: uint8 array (H, W), with `IGNORED`.

    Raises:
        ImageError: if it cannot be read, or has a value or colour that no class has.
    """
    try:
        with pillow_limits(), Image.open(path, formats=FORMATS[:6] + ("GIF", "PPM")) as image:
            image.load()
            if image.mode == "P" and table.by_colour:
                image = image.convert("RGB")
            mode, pixels = image.mode, np.asarray(image)
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if Path(path).is_file():
            reason = "it is empty" if not Path(path).stat().st_size else reason.replace(str(path), "it")
        raise ImageError(f"{path} cannot be read as a mask ({reason}); replace or remove it") from error
    if mode in ("RGB", "RGBA") and table.by_colour:
        return from_colours(path, pixels[..., :3], table.by_colour)
    if mode in ("RGB", "RGBA"):
        if not (pixels[..., :1] == pixels[..., 1:3]).all():
            raise ImageError(f"{path} has colours, but classes.txt has none; write them behind the classes' names")
        pixels = pixels[..., 0]
    elif mode == "LA":
        pixels = pixels[..., 0]
    elif mode not in ("L", "P", "1") and not mode.startswith("I"):
        raise ImageError(f"{path} has the mode {mode}; save it as a PNG with 8 bits")
    if pixels.min() < 0 or pixels.max() > 255:
        raise ImageError(f"{path} has the value {pixels.max()}, which no class has; values go from 0 to 255")
    classes = table.by_value[pixels.astype(np.uint8)]
    if (classes == UNKNOWN).any():
        values, counts = np.unique(pixels[classes == UNKNOWN], return_counts=True)
        raise ImageError(f"{path} has {describe_unknown(values, counts)}, which no class has; {REMEDY}")
    return classes


REMEDY = "add it to classes.txt, or to IGNORE"


def describe_unknown(values, counts):
    """The most frequent of some values in words, such as "the value 7 in 120 pixels and 2 other values"."""
    place = int(np.argmax(counts))
    others = f" and {len(values) - 1} other value{'s' * (len(values) > 2)}" if len(values) > 1 else ""
    return f"the value {int(values[place])} in {int(counts[place])} pixels{others}"


def from_colours(path, pixels, by_colour):
    """The classes (H, W) of a colour mask, uint8 (H, W, 3)."""
    codes = pixels.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    colours, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    known = {(red * 256 + green) * 256 + blue: own for (red, green, blue), own in by_colour.items()}
    own = np.array([known.get(int(code), UNKNOWN) for code in colours], np.uint8)
    unknown = np.flatnonzero(own == UNKNOWN)
    if len(unknown):
        place = unknown[np.argmax(counts[unknown])]
        code = int(colours[place])
        others = f" and {len(unknown) - 1} other colours" if len(unknown) > 1 else ""
        raise ImageError(
            f"{path} has the colour {code >> 16},{code >> 8 & 255},{code & 255} in {counts[place]} pixels{others}, "
            "which no class has; add it to classes.txt (a JPEG changes colours: masks must be PNG)"
        )
    return own[inverse].reshape(codes.shape)


def find_pairs(images, masks):
    """The images below one folder with their masks below another one.

    Args:
        images, masks: the folders.

    Returns:
        ([`Pair`, ...] sorted by name, [`Flaw`, ...] of images without a mask, and of masks without an image).

    Raises:
        UserError: if a folder is missing.
    """
    for folder in (images, masks):
        if not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder}; {LAYOUT}")
    found = {}
    for path in list_files(masks, skip=is_hidden):
        if path.suffix.lower() in (*MASK_EXTENSIONS, ".jpg", ".jpeg") and not is_hidden(path):
            found.setdefault(path.relative_to(masks).with_suffix("").as_posix(), path)
    pairs, flaws, used = {}, [], set()
    for path in list_files(images, skip=is_hidden):
        if not is_image(path):
            continue
        name = path.relative_to(images)
        stem = name.with_suffix("").as_posix()
        mask = next((stem + suffix for suffix in ("", *SUFFIXES) if stem + suffix in found), None)
        if mask is None:
            flaws.append(Flaw(str(path), f"has no mask {Path(masks, stem)}.png"))
        elif stem in pairs:
            flaws.append(Flaw(str(path), f"has the name, and so the mask, of {pairs[stem].image}"))
        else:
            used.add(mask)
            pairs[stem] = Pair(name.as_posix(), str(path), str(found[mask]))
    flaws += [Flaw(str(path), "has no image") for stem, path in found.items() if stem not in used]
    return sorted(pairs.values()), flaws


LAYOUT = (
    "put images into images/train and images/val, their masks under the same names into masks/train and masks/val, and "
    "the names of the classes into classes.txt, one a line (docs/dense.md), or try --demo"
)


def read_list(path):
    """Read a table of images and masks: {part: [`Pair`, ...]}, [`Flaw`, ...].

        image,mask,split
        photos/a.jpg,labels/a.png,train

    Args:
        path: CSV file; its paths are relative to its folder, split is train, val or test.

    Raises:
        UserError: if it cannot be read or lacks a column; if a line has another split.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; a table with the columns image, mask and split is needed")
    rows = list(csv.DictReader(io.StringIO(read_text(path))))
    lacking = [name for name in ("image", "mask", "split") if not rows or name not in rows[0]]
    if lacking:
        raise UserError(f"{path} lacks the column{'s' * (len(lacking) > 1)} {', '.join(lacking)}; add it to its header")
    parts, flaws = dict(train=[], val=[]), []
    for number, row in enumerate(rows, start=2):
        cells = {name: unguard(row.get(name) or "").strip() for name in ("image", "mask", "split")}
        if cells["split"] not in ("train", "val", "test"):
            raise UserError(f"{path}, line {number}: split must be train, val or test, got {brief(cells['split'])}")
        pair = Pair(cells["image"], *(str(path.parent / cells[name]) for name in ("image", "mask")))
        missing = [name for name in ("image", "mask") if not os.path.isfile(getattr(pair, name))]
        if missing:
            flaws.append(Flaw(getattr(pair, missing[0]), f"is missing, though line {number} of {path} names it"))
        else:
            parts.setdefault(cells["split"], []).append(pair)
    return {part: sorted(pairs) for part, pairs in parts.items()}, flaws


class Checked(NamedTuple):
    """What `check_pairs` found out."""

    pairs: list  # those that can be used
    pixels: np.ndarray  # int64 array (classes,): pixels of each class in their masks
    short_sides: list  # shorter side of each image, in pixels
    flaws: list


def check_pairs(pairs, table, description):
    """Read every image and every mask once, and leave out what cannot be used: a `Checked`."""

    def check(pair):
        try:
            image, classes = load_image(pair.image), read_mask(pair.mask, table)
        except ImageError as error:
            path = pair.mask if str(error).startswith(pair.mask) else pair.image
            return Flaw(path, str(error).removeprefix(path).strip()), 0
        height, width = classes.shape
        if image.size != (width, height):
            size = f"{width} x {height} pixels, its image {image.size[0]} x {image.size[1]}"
            return Flaw(pair.mask, f"has {size}; save it at the image's size, without interpolation"), 0
        counts = np.bincount(classes.ravel(), minlength=256)[: len(table.names)]
        if not counts.any():
            return Flaw(pair.mask, "has no pixel of a class, only ignored ones"), 0
        return counts, min(image.size)

    good, flaws, sides, pixels = [], [], [], np.zeros(len(table.names), np.int64)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results = Progress(pool.map(check, pairs), desc=description, total=len(pairs), unit="image", leave=False)
        for pair, (result, side) in zip(pairs, results):
            if isinstance(result, Flaw):
                flaws.append(result)
                continue
            good.append(pair)
            sides.append(side)
            pixels += result
    return Checked(good, pixels, sides, flaws)


def print_flaws(flaws, used):
    """Print the files that are left out, and how many there are.

    Args:
        flaws: list of `Flaw`; the first `LISTED` are named.
        used: number of pairs that remain.
    """
    for flaw in flaws[:LISTED]:
        print(f"left out    {flaw.path} {flaw.reason}")
    if flaws:
        more = f", of which {LISTED} are named here and all in skipped.csv" if len(flaws) > LISTED else ""
        print(f"            {len(flaws)} files left out{more}; {used} images with their masks are used")


def write_flaws(flaws, path):
    """Write all files that are left out into a CSV file, or remove an earlier one where there are none."""
    if flaws:
        write_csv(path, [flaw._asdict() for flaw in flaws])
    else:
        Path(path).unlink(missing_ok=True)


class MaskedImages(Dataset):
    """Images with their masks: (uint8 tensor (3, H, W), uint8 tensor (H, W) of classes with `IGNORED`).

    Args:
        pairs: list of `Pair`.
        table: a `ClassTable`.
        transform: function of both, as torchvision's `tv_tensors.Image` and `tv_tensors.Mask`, such as those of
            torchvision.transforms.v2; None: none.
    """

    def __init__(self, pairs, table, transform=None):
        self.pairs = pairs
        self.table = table
        self.transform = transform

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        pair = self.pairs[index]
        image = tv_tensors.Image(pil_to_tensor(load_image(pair.image)))
        mask = tv_tensors.Mask(torch.from_numpy(read_mask(pair.mask, self.table)))
        if self.transform is not None:
            image, mask = self.transform(image, mask)
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)
