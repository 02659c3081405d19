"""Images and masks as files: which belong together, which class each pixel has, and what is wrong with them.

    images/train/0001.jpg   masks/train/0001.png    the value of a pixel, or its colour, says its class
    images/val/...          masks/val/...           classes.txt lists the classes

A mask has the name of its image, in the same folder below masks/, or that name with an ending such as _mask, see
`SUFFIX`. In classes.txt each line is a class, and its number, from 0, is its value in the masks. A line may give
another value, or a colour, before or behind the name and separated from it by one of , ; : | = or a tab:

    road                    value 0 (the first line)
    plant,255               value 255; also as 255: plant
    sky,128,128,128         this colour, red, green and blue; also as 128 128 128 sky, or as sky,#808080

Behind a blank a single number is a value only if every line has one: "type 2" is a name. Lines that begin with # are
comments.
"""

import csv
import os
import re
import unicodedata
from collections import Counter
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

from common.contents import hash_file
from common.decoding import ImageError, Stored, known_formats, pillow_limits
from common.file_checks import PARTS, brief
from common.files import list_files, write_csv
from common.images import is_another_kind, is_hidden, is_image, load_image, why_not
from common.options import UserError
from common.progress import Progress
from common.tables import unguard
from common.text import read_text

IGNORED = 255  # instead of a class: the pixel counts neither in the loss nor in the metric
UNKNOWN = 254  # instead of a class: a value or colour that the classes do not have
MAX_CLASSES = 254
# Of a mask, behind its image's name; of an image before it: Cityscapes.
SUFFIX = re.compile(r"[_-](masks?|labels?|l|gt|seg|segmentation|gtFine_labelIds)$", re.IGNORECASE)
IMAGE_SUFFIX = "_leftImg8bit"
LOSSLESS = ("PNG", "BMP", "DIB", "GIF", "TIFF")  # by content; JPEG would change the values
MASK_EXTENSIONS = (".png", ".bmp", ".gif", ".tif", ".tiff")
LISTED = 20  # flaws that are printed; skipped.csv has all
ORIENTATION = 274  # EXIF tag
TURNS = {5: "mirrored and turned", 6: "turned clockwise", 7: "mirrored and turned", 8: "turned counterclockwise"}

GAP = r"\s*[,;:|=\t，；：、]\s*"  # between a name and its value
COLOUR = rf"(?P<numbers>#[0-9a-fA-F]{{6}}|\d{{1,3}}(?:(?:{GAP}|\s+)\d{{1,3}}){{2}})"
LINES = [  # of classes.txt; the first that fits
    rf"(?P<name>.+)(?:{GAP}|\s+){COLOUR}[\s,;:]*",  # sky,128,128,128
    rf"{COLOUR}(?:{GAP}|\s+)(?P<name>.+)",  # 128 128 128 sky
    rf"(?P<name>.+){GAP}(?P<numbers>\d{{1,3}})[\s,;:]*",  # plant,255
    rf"(?P<numbers>\d{{1,3}}){GAP}(?P<name>.+)",  # 255: plant
    r"(?P<name>.+)\s(?P<blank>\d{1,3})",  # plant 255, or a name
    r"(?P<before>\d{1,3})\s+(?P<name>.+)",  # 255 plant
    r"(?P<name>.+)",
]
# What is no class, besides blank lines: comments, and the first line of labelme's lists, whose value is -1.
COMMENT = re.compile(rf"#(?![0-9a-fA-F]{{6}}({GAP}|\s))|__ignore__$")
CVAT = re.compile(r"#\s*label\s*:\s*color_rgb", re.IGNORECASE)  # header of its labelmap.txt: name:colour:parts:actions
# Of what begins with another sign, is only a number, or has one in a field behind it: "- road", "1. road", "road,1.0".
NO_NAME = re.compile(rf"[^\w(\[<]|[-+.\d\s]+({GAP}|$)|\d+[.)]\s|.*{GAP}([-+#.]?\d|#|$)")


class Flaw(NamedTuple):
    """A file that is left out, and why, in words that can stand behind its path."""

    path: str
    reason: str

    @classmethod
    def of(cls, path, message):
        """That of a message which begins with the path."""
        return cls(str(path), message.removeprefix(str(path)).strip())


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
        UserError: if it cannot be read, a line is not clear, or it names a class, value or colour twice; it names the
            line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no {path}; write the names of the classes there, one a line, in the order of values")
    try:
        lines = read_text(path, errors="strict").splitlines()
    except UnicodeError as error:
        raise UserError(f"{path} is not UTF-8; save it as UTF-8") from error
    names, by_value, by_colour, seen = [], np.full(256, UNKNOWN, np.uint8), {}, {}
    ignored = {word.strip().lower() for word in ignore}
    rows = parse_classes(path, lines)
    if len(rows) > 256:
        raise UserError(f"{path} has {len(rows)} classes; at most {MAX_CLASSES} that are not ignored can be learned")
    coloured = [row for row in rows if len(row[2]) == 3]
    for value, (where, name, numbers) in enumerate(rows):
        if name.lower() in seen:
            raise UserError(f"{where} is there twice; correct it")
        if coloured and len(numbers) != 3:
            count = f"{len(coloured)} of {len(rows)}"
            raise UserError(f"{where} has no colour, but {count} lines have one; either each line has a colour or none")
        own_value = numbers[0] if len(numbers) == 1 else value
        is_ignored = name.lower() in ignored or str(own_value) in ignored and len(numbers) != 1
        own = IGNORED if is_ignored else len(names)
        code = tuple(numbers) if coloured else own_value
        if code in seen:
            text = ",".join(map(str, numbers)) or f"value {value}"
            raise UserError(f"{where} has the value or colour of another line, {seen[code]!r}: {text}; correct it")
        seen |= {name.lower(): name, code: name}
        by_colour |= {code: own} if coloured else {}
        by_value[own_value] = own
        names += [name] if own != IGNORED else []
    if not 2 <= len(names) <= MAX_CLASSES:
        raise UserError(f"{path} has {len(names)} classes that are not ignored; 2 to {MAX_CLASSES} are needed")
    for word in ignored:
        if word.isdigit() and int(word) < 256 and by_value[int(word)] == UNKNOWN:
            by_value[int(word)] = IGNORED
    return ClassTable(names, by_value, by_colour)


def parse_classes(path, lines):
    """The classes of classes.txt: [("path, line 3: 'plant,255'", name, [value], [red, green, blue] or []), ...].

    Raises:
        UserError: for a line that is none of `LINES`.
    """
    is_cvat = any(CVAT.match(line.strip()) for line in lines)
    rows = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or COMMENT.match(line):
            continue
        text = ":".join(line.split(":")[:2]) if is_cvat else line
        found = next(match for match in (re.fullmatch(form, text) for form in LINES) if match).groupdict()
        rows.append((f"{path}, line {number}: {line[:80]!r}", text, found))
    # Numbers behind or before a blank are values if every line has a number, and names are still different without.
    names = [found["name"].strip().lower() for _, _, found in rows]
    all_have = all(len(found) > 1 for _, _, found in rows) and len(set(names)) == len(names)
    some_have = any("numbers" in found for _, _, found in rows)
    parsed = []
    for where, text, found in rows:
        numbers = found.get("numbers") or all_have and (found.get("blank") or found.get("before")) or ""
        name = found["name"].strip().strip("\"'") if numbers else text
        lacks_number = not numbers and some_have and re.search(GAP, name)  # such as the header name,value
        values = list(bytes.fromhex(numbers[1:])) if numbers[:1] == "#" else list(map(int, re.findall(r"\d+", numbers)))
        if NO_NAME.match(name) or lacks_number or "before" in found and not numbers or max(values, default=0) > 255:
            raise UserError(
                f"{where} is not clear; write name, name,value or name,red,green,blue with numbers from 0 to 255, or "
                "remove the line if it is no class"
            )
        parsed.append((where, name, values))
    return parsed


def read_mask(path, table):
    """Read a mask as classes: uint8 array (H, W), with `IGNORED`.

    Raises:
        ImageError: if it cannot be read, may have changed values, or has a value or colour that no class has.
    """
    if is_another_kind(path):
        raise ImageError(why_not(path))
    try:
        with pillow_limits(), open(path, "rb") as file, Image.open(file, formats=known_formats()) as image:
            refuse_kind(path, image, Stored(path, image, file).raw_mode, table)
            image.load()
            mode, has_alpha = image.mode, image.mode in ("LA", "RGBA")
            extrema = image.getextrema() if has_alpha else []
            # Programs store colour masks that happen to be grey without colours.
            pixels = np.asarray(image.convert("RGB") if table.by_colour else image)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if Path(path).is_file():
            reason = "no image that Pillow reads" if isinstance(error, Image.UnidentifiedImageError) else reason
            reason = "it is empty" if not Path(path).stat().st_size else reason
        raise ImageError(f"{path} cannot be read as a mask ({reason}); replace or remove it") from error
    if has_alpha and extrema[-1] != (255, 255) and all(low == high for low, high in extrema[:-1]):
        raise ImageError(f"{path} has its classes in the alpha channel; save them as grey values, without alpha")
    if table.by_colour:
        return from_colours(path, pixels, table.by_colour)
    if mode in ("RGB", "RGBA"):
        if not (pixels[..., :1] == pixels[..., 1:3]).all():
            raise ImageError(f"{path} has colours, but classes.txt has none; write them behind the classes' names")
        pixels = pixels[..., 0]
    elif mode == "LA":
        pixels = pixels[..., 0]
    elif mode == "1":  # 0 and 255, or 0 and 1, as the table has it
        pixels = pixels * np.uint8(255 if table.by_value[1] == UNKNOWN else 1)
    extreme = pixels.min() if pixels.min() < 0 else pixels.max()
    if not 0 <= extreme <= 255:
        raise ImageError(f"{path} has the value {extreme}, which no class has; values go from 0 to 255")
    classes = table.by_value[pixels.astype(np.uint8)]
    if (classes == UNKNOWN).any():
        values, counts = np.unique(pixels[classes == UNKNOWN], return_counts=True)
        text = str(int(values[np.argmax(counts)]))
        raise ImageError(f"{path} has the value {describe_unknown(text, counts)}{other_value(values.tolist(), table)}")
    return classes


def refuse_kind(path, image, raw_mode, table):
    """ImageError if a mask is of a kind whose values may have been changed, or would be on reading.

    Args:
        path: the file.
        image: Pillow's image of it, opened, not yet decoded.
        raw_mode: how its values are stored, such as "RGB;16B".
        table: a `ClassTable`.
    """
    kind = image.format if image.info.get("compression") not in ("jpeg", "tiff_jpeg", "webp") else "JPEG in a TIFF"
    if kind not in LOSSLESS:
        raise ImageError(f"{path} is stored as {kind}; JPEG and its like change values: save masks as PNG")
    plain = image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") and ";16" not in raw_mode
    if not plain and (table.by_colour or not image.mode.startswith("I")):
        kind = "values of 16 bits" if ";16" in raw_mode else f"the mode {image.mode}"
        raise ImageError(f"{path} has {kind}; save it as a PNG with 8 bits")


def describe_unknown(most, counts):
    """What a mask has that no class has, and what to do, such as "7 in 9 pixels and 2 others, which no class has; ...".

    Args:
        most: the most frequent value or colour.
        counts: pixels of each.
    """
    others = f" and {len(counts) - 1} other{'s' * (len(counts) > 2)}" if len(counts) > 1 else ""
    blurred = "; if edges were blurred, or it was a JPEG, save it as PNG and resize masks without interpolation"
    remedy = f"add it to classes.txt, or to IGNORE{blurred * (len(counts) > 4)}"
    return f"{most} in {counts.max()} pixels{others}, which no class has; {remedy}"


def other_value(values, table):
    """What to write into classes.txt where a mask has 1 in place of 255, or 255 in place of 1; else ""."""
    other = {(1,): 255, (255,): 1}.get(tuple(values), 0)
    own = table.by_value[other]
    return f": {table.names[own]},{values[0]} in place of {other}" if other and own < len(table.names) else ""


def from_colours(path, pixels, by_colour):
    """The classes (H, W) of a colour mask, uint8 (H, W, 3)."""
    codes = pixels.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    colours, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    known = {(red * 256 + green) * 256 + blue: own for (red, green, blue), own in by_colour.items()}
    own = np.array([known.get(int(code), UNKNOWN) for code in colours], np.uint8)
    unknown = np.flatnonzero(own == UNKNOWN)
    if len(unknown):
        code = int(colours[unknown[np.argmax(counts[unknown])]])
        text = f"{code >> 16},{code >> 8 & 255},{code & 255}"
        raise ImageError(f"{path} has the colour {describe_unknown(text, counts[unknown])}")
    return own[inverse].reshape(codes.shape)


def describe_other_classes(table, other):
    """Where two tables give a class another number, value or colour, such as "crop (2), not weed (2)"; "": nowhere."""

    def describe(table):
        codes = table.by_colour or dict(enumerate(table.by_value.tolist()))
        found = [[str(code) for code, own in codes.items() if own == number] for number in range(len(table.names))]
        return [f"{name} ({', '.join(sorted(texts))})" for name, texts in zip(table.names, found)] + ["no class"]

    pairs = zip(describe(table), describe(other))
    return next((f"{here}, not {there}" for here, there in pairs if here != there), "")


def find_pairs(images, masks):
    """The images below one folder with their masks below another one.

    Args:
        images, masks: the folders.

    Returns:
        ([`Pair`, ...] sorted by name, [`Flaw`, ...] of images without a mask, masks without an image or beside another
        one, and files of kinds that are not read).

    Raises:
        UserError: if a folder is missing.
    """
    for folder in (images, masks):
        if not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder}; {LAYOUT}")
    offered = {}  # {name of an image: [(whether JPEG or its like, how far its name is from that, path of a mask), ...]}
    for path in list_files(masks, skip=is_hidden):
        if is_image(path) or is_another_kind(path) and not is_hidden(path):
            stem, is_lossy = stem_of(path, masks), path.suffix.lower() not in MASK_EXTENSIONS
            for distance, name in enumerate(dict.fromkeys([stem, SUFFIX.sub("", stem)])):
                offered.setdefault(name, []).append((is_lossy, distance, path))
    files = list_files(images, skip=is_hidden)
    flaws = [Flaw.of(path, why_not(path)) for path in files if is_another_kind(path) and not is_hidden(path)]
    wanted, pairs, owners = [], [], {}
    for path in filter(is_image, files):
        stem = stem_of(path, images)
        names = (f"{stem}{path.suffix}", stem, stem.removesuffix(IMAGE_SUFFIX))
        offers = sorted({offer for name in names for offer in offered.get(name, ())})
        wanted.append((offers[0][:2] if offers else (), path, [mask for *_, mask in offers]))
    for _, path, offers in sorted(wanted):  # the nearest names first: a.jpg must not take the a_L.png of a_L.jpg
        mask = next((mask for mask in offers if mask not in owners), None)
        if mask is not None:
            pairs.append(Pair(path.relative_to(images).as_posix(), str(path), str(mask)))
            owners[mask] = path
        elif offers:
            flaws.append(Flaw(str(path), f"has no mask of its own: {offers[0]} is that of {owners[offers[0]]}"))
        else:
            flaws.append(Flaw(str(path), f"has no mask {Path(masks, path.relative_to(images)).with_suffix('.png')}"))
    images_of = {mask: path for _, path, offers in wanted for mask in offers}
    for mask in dict.fromkeys(path for offers in offered.values() for *_, path in offers if path not in owners):
        flaws.append(Flaw(str(mask), f"is a second mask of {images_of[mask]}" if mask in images_of else "has no image"))
    return sorted(pairs), flaws


def stem_of(path, folder):
    """The name of a file below a folder, without its extension, in the form in which all systems write accents."""
    return unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())


LAYOUT = (
    "put images into images/train and images/val, their masks under the same names into masks/train and masks/val, and "
    "the names of the classes into classes.txt, one a line (docs/dense.md), or try --demo"
)


def read_list(path):
    """Read a table of images and masks: {part: ([`Pair`, ...] sorted by name, [`Flaw`, ...])}.

        image,mask,split
        photos/a.jpg,labels/a.png,train

    Args:
        path: CSV file, separated by commas, semicolons or tabs; its paths are relative to its folder, split is train,
            val or test.

    Raises:
        UserError: if it cannot be read or lacks a column; if a line has too few or many fields or another split.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; a table with the columns image, mask and split is needed")
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]
    separator, rows = max(",;\t", key=lines[0][1].count) if lines else ",", []
    for number, line in lines:  # one by one: a quotation mark too many would swallow the lines below it
        try:
            [cells] = csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True)
        except csv.Error as error:
            raise UserError(f"{path}, line {number}: {error}; correct its quotation marks") from error
        rows.append((f"{path}, line {number}", list(map(str.strip, map(unguard, cells)))))
    header = [cell.lower() for cell in rows[0][1]] if rows else []
    lacking = [name for name in ("image", "mask", "split") if name not in header]
    if lacking:
        raise UserError(f"{path} lacks the column{'s' * (len(lacking) > 1)} {', '.join(lacking)}; add it to its header")
    parts = {}
    for where, cells in rows[1:]:
        if len(cells) != len(header):
            raise UserError(f"{where}: expected {len(header)} fields, got {len(cells)}; correct this line")
        row = dict(zip(header, cells))
        part, files = row["split"].lower(), {name: str(path.parent / row[name]) for name in ("image", "mask")}
        if part not in PARTS:
            raise UserError(f"{where}: split must be train, val or test, got {brief(row['split'])}")
        pairs, flaws = parts.setdefault(part, ([], []))
        empty = [name for name in files if not row[name]]
        missing = [file for file in files.values() if not os.path.isfile(file)]
        if empty:
            flaws.append(Flaw(where, f"names no {empty[0]}"))
        elif missing:
            flaws.append(Flaw(missing[0], f"is missing, though {where}, names it"))
        else:
            pairs.append(Pair(row["image"], **files))
    return {part: (sorted(pairs), flaws) for part, (pairs, flaws) in parts.items()}


def find_part(data, list_file, part):
    """The images of a part, "train", "val" or "test", with their masks: what `find_pairs` returns.

    Args:
        data: folder with images/<part>/ and masks/<part>/.
        list_file: a table instead of these folders, see `read_list`; "": none.

    Raises:
        UserError: if there is no such part.
    """
    if not list_file:
        return find_pairs(Path(data, "images", part), Path(data, "masks", part))
    parts = read_list(list_file)
    if part not in parts:
        raise UserError(f"{list_file} has no line whose split is {part}, only {', '.join(parts) or 'its header'}")
    return parts[part]


def find_labelled(data, list_file, where):
    """The images to evaluate on, with their masks: ([`Pair`, ...], [`Flaw`, ...], folder of their classes.txt).

    Args:
        data, list_file: see `find_part`.
        where: a part of these, or a folder with images/ and masks/.

    Raises:
        UserError: if it is neither, or both, or a folder with several parts.
    """
    folder, is_part = Path(where), where == Path(where).name and Path(data, "images", where).is_dir()
    is_folder = Path(folder, "images").is_dir()
    if list_file or is_part and not is_folder:
        return *find_part(data, list_file, where), Path(data)
    if is_part:
        raise UserError(f"{where} is a part of {data} and a folder; write {os.curdir}{os.sep}{where} for the folder")
    parts = [part for part in PARTS if Path(folder, "images", part).is_dir()]
    if len(parts) > 1:
        raise UserError(f"{where} has the parts {', '.join(parts)}; name one: --data {where} --evaluate {parts[1]}")
    if not is_folder:
        raise UserError(f"{where} is no part of {data} and no folder with images and masks; {LAYOUT}")
    return *find_pairs(Path(folder, "images"), Path(folder, "masks")), folder


class Checked(NamedTuple):
    """What `check_pairs` found out."""

    pairs: list  # those that can be used
    pixels: np.ndarray  # int64 array (classes,): pixels of each class in their masks
    short_sides: list  # shorter side of each image, in pixels
    contents: dict  # {hash of an image's file: its path}
    flaws: list  # also those that were found before


def check_pairs(pairs, flaws, table, description):
    """Read every image and every mask once, and leave out what cannot be used: a `Checked`.

    Args:
        pairs, flaws: see `find_pairs`.
        table: a `ClassTable`.
        description: for the progress bar.
    """

    def check(pair):
        try:
            image, classes = load_image(pair.image), read_mask(pair.mask, table)
        except ImageError as error:
            return Flaw.of(pair.mask if str(error).startswith(pair.mask) else pair.image, str(error)), 0, ""
        if image.size != classes.shape[::-1]:
            return Flaw(pair.mask, describe_sizes(pair, image.size, classes.shape[::-1])), 0, ""
        counts = np.bincount(classes.ravel(), minlength=256)[: len(table.names)]
        if not counts.any():
            return Flaw(pair.mask, "has no pixel of a class, only ignored ones"), 0, ""
        return counts, min(image.size), hash_file(pair.image)

    good, flaws, sides, contents, pixels = [], [*flaws], [], {}, np.zeros(len(table.names), np.int64)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results = Progress(pool.map(check, pairs), desc=description, total=len(pairs), unit="image", leave=False)
        for pair, (result, side, content) in zip(pairs, results):
            if isinstance(result, Flaw):
                flaws.append(result)
            elif content in contents:
                flaws.append(Flaw(pair.image, f"is a repetition of {contents[content]}, which is used once"))
            else:
                good.append(pair)
                sides.append(side)
                contents[content] = pair.image
                pixels += result
    return Checked(good, pixels, sides, contents, flaws)


def describe_sizes(pair, image_size, mask_size):
    """How the sizes (width, height) of an image and its mask differ, and what to do."""
    sizes = f"has {mask_size[0]} x {mask_size[1]} pixels, its image {image_size[0]} x {image_size[1]}"
    turn = TURNS.get(read_orientation(pair.image))
    if turn and mask_size == image_size[::-1]:
        return f"{sizes} since it is {turn}, as its EXIF orientation says; turn the mask likewise"
    return f"{sizes}; save it at the image's size, without interpolation"


def read_orientation(path):
    """The EXIF orientation of an image, 1 to 8; 0 where there is none."""
    try:
        with pillow_limits(), Image.open(path, formats=known_formats()) as image:
            return image.getexif().get(ORIENTATION, 0)
    except OSError:  # HEIC, which is turned by its own rules
        return 0


def check_parts(train_part, val_part):
    """UserError if an image is in two parts, both `Checked`; shared masks are pointed out."""
    common = sorted(train_part.contents.keys() & val_part.contents.keys(), key=train_part.contents.get)
    if common:
        names = " and ".join(part.contents[common[0]] for part in (train_part, val_part))
        raise UserError(
            f"{len(common)} images are in train and in val, such as {names}, so validation would mean nothing; take "
            "them out of one part"
        )
    masks = Counter(pair.mask for part in (train_part, val_part) for pair in part.pairs)
    shared = [mask for mask, count in masks.items() if count > 1]
    if shared:
        print(f"note: {len(shared)} masks belong to several images, such as {shared[0]}; is that right?")


def refuse_empty(part, name):
    """UserError if nothing in a `Checked` can be used."""
    if not part.pairs:
        why = f"the first: {' '.join(part.flaws[0])}" if part.flaws else LAYOUT
        raise UserError(f"none of the images for {name} can be used; {why}")


def print_flaws(flaws, used):
    """Print the files that are left out, and how many there are.

    Args:
        flaws: list of `Flaw`; the first `LISTED` are named.
        used: number of pairs that remain.
    """
    for flaw in flaws[:LISTED]:
        print(f"left out    {flaw.path} {flaw.reason}")
    if flaws:
        more = f", of which the first {LISTED} are named here" if len(flaws) > LISTED else ""
        print(f"            {len(flaws)} files left out{more}; {used} images with their masks are used")


def write_flaws(flaws, path):
    """Write all files that are left out into a CSV file, or remove an earlier one where there are none."""
    if flaws:
        write_csv(path, [flaw._asdict() for flaw in flaws])
        print(f"            all files left out are in {path}")
    else:
        Path(path).unlink(missing_ok=True)


def refuse_overwriting(inputs, outputs):
    """UserError if a file to write is one that is read, by whatever path, or stands in a folder with images that are.

    Args:
        inputs, outputs: paths; an empty one is none.
    """
    read = {identity_of(path) for path in inputs} - {None}
    folders = {identity_of(folder) for folder in {Path(path).parent for path in inputs if is_image(path)}} - {None}
    for path in outputs:
        if identity_of(path) in read or identity_of(Path(path).parent) in folders:
            raise UserError(f"{path} would be written over or among the files that are read; give another place for it")


def identity_of(path):
    """What all paths of one file or folder have in common, links included; None if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


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
