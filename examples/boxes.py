"""Boxes around objects as annotation programs save them, read and checked: Pascal VOC's XML files, COCO's JSON file.

Real annotations have flaws. Each one that is found is a line that names its file, and what was done about it: a box or
an image is left out, or the whole file is refused.
"""

import json
import math
import os
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from PIL import ExifTags, Image

from common.decoding import known_formats, pillow_limits
from common.file_checks import brief
from common.files import list_files, write_text
from common.images import EXTENSIONS, ImageError, is_hidden, is_image, load_image
from common.options import UserError
from common.progress import Progress
from common.text import label, printable, read_text

LAYOUT = (
    "expected Pascal VOC (Annotations/*.xml, JPEGImages/ and ImageSets/Main/train.txt and val.txt, or folders train/ "
    "and val/ of images and XML files) or COCO (annotations/train.json and val.json, or instances_train2017.json and "
    "so on, and the images in images/, train/ and val/)"
)
VALIDATION = ("val", "valid", "validation")  # names of one part
PARTS = {"train", "val", "test"}  # whose folders may hold different files of one name
USUAL = ("images", "jpegimages", "annotations")  # folders that say nothing about the part
ENCODINGS = {"gb2312": "gb18030", "gbk": "gb18030", "utf-16": "utf-8"}  # of XML files whose first line is ASCII
MOST_CORNER = 1e7  # pixels; a larger number is a slip


@dataclass
class BoxedImage:
    """An image and its boxes.

    Attributes:
        path: of the image.
        image_id: number of the image, COCO's own where there is one.
        size: (width, height) in pixels.
        boxes: list of (x1, y1, x2, y2) in pixels, inside the image and of some area.
        names: class of each box.
        ignored: whether each box is neither trained nor counted: COCO's crowds, VOC's difficult objects.
    """

    path: Path
    image_id: int
    size: tuple = (0, 0)
    boxes: list = field(default_factory=list)
    names: list = field(default_factory=list)
    ignored: list = field(default_factory=list)

    def counted(self):
        """The classes of the boxes that are not ignored, one for each."""
        return [name for name, ignored in zip(self.names, self.ignored) if not ignored]


class Flaws:
    """What was found wrong, a line each, and how often each kind was.

    In a `with`, its end prints them, also where an error ends it, which may be their consequence.

    Args:
        path: file to which all lines are written then; None: none.

    Attributes:
        lines: "<file>: <what is wrong>".
        counts: {kind: number of times}, such as "boxes without area".
    """

    def __init__(self, path=None):
        self.path = path
        self.lines = []
        self.counts = Counter()
        self.images = 0  # images that were left out

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.report()
        if self.path is not None:
            self.write(self.path)

    def add(self, path, kind, what, image=False):
        """Note a flaw of `kind` in the file at `path`; `image`: the whole image is left out."""
        self.lines.append(f"{path}: {printable(what)}")
        self.counts[kind] += 1
        self.images += image

    def report(self, most=20):
        """Print the first lines, and a count of all."""
        for line in self.lines[:most]:
            print(f"  {line}")
        if len(self.lines) > most:
            print(f"  and {len(self.lines) - most} more" + f", see {self.path}" * (self.path is not None))
        if self.counts:
            print(f"flaws       {', '.join(f'{count} {kind}' for kind, count in self.counts.items())}", flush=True)

    def write(self, path):
        """Write all lines to a file."""
        write_text(path, "".join(f"{line}\n" for line in self.lines))


def read_boxes(data, split, flaws, classes=None):
    """The images of one part of a data set, with their boxes.

    Args:
        data: folder, see `LAYOUT`.
        split: name of the part, such as "train"; or the path of its list (.txt) or of its COCO file (.json).
        flaws: `Flaws`, to which everything is added that is left out.
        classes: names of the classes; boxes of others are left out. None: all that have a box that is not ignored.

    Returns:
        (list of `BoxedImage`, {class name: COCO's category id, or None where the data have none}).

    Raises:
        UserError: if there is no such data set or part, or more than one; if a list or COCO file cannot be read; if no
            image or no box is left.
    """
    data = Path(data)
    if not data.is_dir():
        raise UserError(f"there is no folder {data}; {LAYOUT}")
    files = [path for path in list_files(data, skip=is_hidden) if not is_hidden(path)]
    path, before = find_split(data, split, files), len(flaws.lines)
    is_coco = path.suffix.lower() == ".json"
    images, ids = read_coco(data, path, files, flaws) if is_coco else (read_voc(data, path, files, flaws), {})
    images = check_images(images, flaws, f"checking {path.name}")
    if is_coco:
        check_corners(path, images)
    for image in images:
        clip_boxes(image, flaws)
    if not any(image.names for image in images):
        remedy = "see the lines above" if flaws.lines[before:] else "annotate it, or name another part"
        raise UserError(f"{path} leaves no {'box' if images else 'image'} that can be used; {remedy}")
    if not any(image.counted() for image in images):
        raise UserError(f"{path} has only boxes that are ignored, as crowds or difficult; annotate others")
    if classes is None:
        classes = sorted({name for image in images for name in image.counted()})
    for image in images:
        drop(image, [name in classes for name in image.names], "boxes of other classes", flaws,
             lambda name, box: f"class {name!r} is not one of {', '.join(classes)}; left out")  # fmt: skip
    if not any(image.counted() for image in images):
        raise UserError(f"{path} has no box of {', '.join(classes)}; see the lines above")
    return images, {name: ids.get(name) for name in classes}


# --- which files belong together


def find_split(data, split, files):
    """Path of the list (.txt), COCO file (.json) or folder of XML files of a part.

    Args:
        data, split: see `read_boxes`.
        files: all paths below `data`.

    Raises:
        UserError: if there is none, or more than one.
    """
    found = find_parts(data, split, files)
    if not found and split in VALIDATION:
        found = [path for name in VALIDATION for path in find_parts(data, name, files)]
        if len(found) == 1:
            print(f"part        {split} is not there; {found[0]} is taken")
    if len(found) > 1:
        raise UserError(
            f"{data} has {' and '.join(map(str, found))} for the part {split!r}; name one of them by its path as "
            "--train, --val or --evaluate, or move the other one away"
        )
    if found:
        return found[0]
    annotated = [path.relative_to(data).parts for path in files if path.suffix.lower() == ".xml"]
    there = [path.stem for path in sorted((data / "ImageSets" / "Main").glob("*.txt"))]
    there += sorted({parts[0] for parts in annotated if len(parts) > 1 and parts[0].lower() not in USUAL})
    remedy = LAYOUT
    if annotated and not there:
        remedy = (
            f"list the names of its images in ImageSets/Main/{label(split, 80)}.txt, one a line, or put images and XML "
            "files into the folders train and val"
        )
    elif any(path.name == "data.yaml" or "labels" in path.relative_to(data).parts[:-1] for path in files):
        remedy = "YOLO's labels/*.txt and data.yaml are not read: export the data as COCO or Pascal VOC"
    jsons = [path.relative_to(data) for path in files if path.suffix.lower() == ".json"]
    there = ", ".join([*there, *(str(path) for path in jsons if len(path.parts) < 3)][:12]) or "nothing"
    raise UserError(f"{data} has no part {label(split, 80)!r} ({there} is there); {remedy}")


def find_parts(data, name, files):
    """The lists, COCO files and folders of XML files that the name of a part, or a path, may mean."""
    if Path(name).suffix.lower() in (".txt", ".json"):
        found = [path for path in (Path(name), data / name) if os.path.isfile(path)]
        return found[:1] if len(found) == 2 and os.path.samefile(*found) else found
    coco = re.compile(rf"(instances_)?{re.escape(name)}|instances_{re.escape(name)}\d+")
    found, folders_of_xml = [], {}
    for path in files:
        ending = path.suffix.lower()
        if ending not in (".txt", ".json", ".xml"):
            continue
        *folders, last = path.relative_to(data).parts
        place = "/".join(folders).lower()
        if ending == ".txt" and place == "imagesets/main" and path.stem == name:
            found.append(path)
        elif ending == ".json" and place in ("", "annotations", "boxes") and coco.fullmatch(path.stem):
            found.append(path)
        elif ending == ".json" and last == "_annotations.coco.json" and folders == [name]:
            found.append(path)
        elif ending == ".xml" and name in (folders[1:2] if place.startswith("annotations/") else folders[:1]):
            folders_of_xml[data.joinpath(*folders[: folders.index(name) + 1])] = True
    # A list may name files in a folder of its own name.
    return found if any(path.suffix == ".txt" for path in found) else [*found, *folders_of_xml]


class FilesByName:
    """Files of a data set, found by the names that annotations give them, which are often paths on another computer.

    Args:
        files: their paths.
        data: folder that holds them.
        part: name of the part to which they should belong, such as "train".
    """

    def __init__(self, files, data, part):
        self.data, self.part = data, fold(part)
        self.paths = defaultdict(list)
        for path in files:
            for name in {fold(path.name), fold(path.stem)}:
                self.paths[name].append(path)

    def find(self, name):
        """The files of a name, with or without extension: those that agree most with its folders, or else lie in a
        folder of the part, or else in a usual one. Several if nothing decides between them."""
        if "://" in name:
            name = unquote(name.partition("://")[2].partition("?")[0])
        *folders, last = fold(name).replace("\\", "/").split("/")
        found = self.paths.get(fold(name)) or self.paths.get(last, [])
        found = [path for path in found if fold(path.name) == last] or found
        found = [path for path in found if not self.is_elsewhere(path, folders)]
        if len(found) < 2:
            return found
        ranks = [self.rank(path, folders[::-1]) for path in found]
        return [path for path, rank in zip(found, ranks) if rank == max(ranks)]

    def is_elsewhere(self, path, folders):
        """Whether a path leads through another part than this one and those that a name's folders are of."""
        own = {base(folder) for folder in self.folders(path)}
        return base(self.part) in PARTS and bool(own & PARTS - {base(self.part)} - set(map(base, folders)))

    def folders(self, path):
        """The folders of a path below `data`, the last one first."""
        return [fold(folder) for folder in path.relative_to(self.data).parts[-2::-1]]

    def rank(self, path, folders):
        """How well a path agrees with the folders of a name, the last one first."""
        own = self.folders(path)
        agreeing = len(os.path.commonprefix([own, folders]))
        in_part = [(folder == self.part) + (base(folder) == base(self.part)) for folder in own]
        usual = all(part or folder in USUAL for folder, part in zip(own, in_part))
        return agreeing, usual, max(in_part, default=0)


def fold(name):
    """What a file's name has in common in all systems: macOS decomposes letters, and Windows knows no case."""
    return unicodedata.normalize("NFC", name).casefold()


def base(part):
    """The name of a part without its year: "train" for train2017."""
    name = part.rstrip("0123456789") or part
    return VALIDATION[0] if name in VALIDATION else name


# --- Pascal VOC


def read_voc(data, path, files, flaws):
    """The images of a list of `ImageSets/Main`, or of a folder of XML files, with the boxes of their XML files."""
    xml_files = [file for file in files if file.suffix.lower() == ".xml"]
    finder = FilesByName(filter(is_image, files), data, path.stem)
    if path.is_dir():
        annotations = [file for file in xml_files if path in file.parents]
    else:
        annotations = read_list(path, FilesByName(xml_files, data, path.stem), flaws)
    images = {}
    for annotation in annotations:
        try:
            root = read_xml(annotation)
        except (OSError, ValueError) as error:
            flaws.add(annotation, "broken XML files", f"cannot be read: {error}; its image is left out", image=True)
            continue
        called = re.split(r"[/\\]", (root.findtext("filename") or "").strip())[-1]
        size = (number(root, "size/width"), number(root, "size/height"))
        found = finder.find(str(annotation.relative_to(data).with_suffix(""))) or finder.find(called)
        if len(found) > 1:
            found = [file for file in found if fold(file.name) == fold(called)] or found
        if len(found) > 1:
            found = [file for file in found if size_of(file) == size] or found
        if len(found) > 1:
            what = f"may be of {' or of '.join(map(str, found))}; left out: name the right one in <filename>"
            flaws.add(annotation, "XML files of several images", what, image=True)
        elif not found:
            flaws.add(annotation, "missing images", "its image does not exist; left out", image=True)
        else:
            if found[0] in images:
                flaws.add(annotation, "duplicates", f"{found[0]} has another XML file; the boxes of both are used")
            image = images.setdefault(found[0], BoxedImage(found[0], len(images) + 1, size))
            for place, thing in enumerate(root.iter("object"), start=1):
                name = (thing.findtext("name") or "").strip()
                box = [number(thing, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
                ignored = is_set(thing.findtext("difficult"))
                add_box(image, name, box, ignored, annotation, f"object {place}", flaws)
    if path.is_dir():
        known = {annotation.stem for annotation in annotations}
        for file in files:
            if is_image(file) and path in file.parents and file not in images and file.stem not in known:
                flaws.add(file, "images without XML file", "has no XML file; left out", image=True)
    return list(images.values())


def read_list(path, xml_files, flaws):
    """The XML files of the images that a list names, each once; `xml_files`: their `FilesByName`."""
    try:
        lines = read_text(path).split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); use another list") from error
    annotations = {}
    for line in filter(None, map(str.strip, lines)):
        name, *column = line.rsplit(None, 1)
        # The second column of a list of one class says whether it is there; that of other programs names the XML file.
        names = [line, name] if column and (column[0] in ("1", "0", "-1") or column[0].endswith(".xml")) else [line]
        found = next(filter(None, (xml_files.find(without_extension(name)) for name in names)), [])
        shown = label(line, 80)
        if len(found) == 1 and found[0] in annotations:
            flaws.add(path, "duplicates", f"{shown} is listed twice; used once")
        elif len(found) == 1:
            annotations[found[0]] = True
        elif found:
            what = f"{shown} has {' and '.join(map(str, found))}; left out: write its folder into the list"
            flaws.add(path, "names of several XML files", what, image=True)
        else:
            flaws.add(path, "missing XML files", f"{shown} has no XML file; left out", image=True)
    return list(annotations)


def without_extension(name):
    """A name of a list without the extension of an image or XML file."""
    start, dot, ending = name.rpartition(".")
    return start if f"{dot}{ending.lower()}" in (*EXTENSIONS, ".xml") else name


def read_xml(path):
    """The root of an annotation, its tags without namespaces.

    Raises:
        OSError, ValueError: if it cannot be read, or is not one of Pascal VOC; with a remedy.
    """
    declared = re.match(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.-]+)", path.read_bytes())
    encoding = declared[1].decode("ascii", "replace").lower() if declared else "utf-8"
    encoding = ENCODINGS.get(encoding, encoding)
    try:
        root = ElementTree.fromstring(read_text(path, encoding, "strict").lstrip())
    except (UnicodeError, LookupError) as error:
        raise ValueError(f"it is not {encoding}; save it as UTF-8") from error
    except ElementTree.ParseError as error:
        raise ValueError(f"{error}; export it again") from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    if root.tag != "annotation" or not any(root.find(tag) is not None for tag in ("filename", "size", "object")):
        raise ValueError(f"its <{root.tag}> is no <annotation> of Pascal VOC; export it in that format")
    return root


def number(element, path):
    """The number at `path` below an XML element; NaN where there is none."""
    return as_number(element.findtext(path))


# --- COCO


def read_coco(data, path, files, flaws):
    """The images of a COCO file with their boxes, and {class name: category id}."""
    try:
        content = json.loads(read_text(path, errors="strict"))
        categories, listed, annotations = (content[key] for key in ("categories", "images", "annotations"))
        if not all(isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
                   for rows in (categories, listed, annotations)):  # fmt: skip
            raise TypeError("its categories, images and annotations must be lists of dictionaries")
    except UnicodeError as error:
        raise UserError(f"{path} is not UTF-8; save it as UTF-8") from error
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is no COCO file of boxes ({reason}); save it again") from error
    names, used = {}, {as_id(row.get("category_id")) for row in annotations}
    for row in categories:
        name, key = row.get("name"), as_id(row.get("id"))
        if not isinstance(name, str) or not name.strip() or not is_text(name) or key is None:
            raise UserError(f"{path}: a category has no name or whole number as its id ({brief(row)}); correct it")
        if key not in used:  # such as the group of all classes that Roboflow lists, too, under the name of one
            continue
        if key in names or name.strip() in names.values():
            raise UserError(f"{path}: category {brief(key)} {brief(name)} occurs twice; rename one of them")
        names[key] = name.strip()
    part = path.parent.name if path.stem.startswith("_annotations") else path.stem.removeprefix("instances_")
    finder = FilesByName(filter(is_image, files), data, part)
    images, by_file = {}, {}
    for row in listed:
        key, name = as_id(row.get("id")), row.get("file_name")
        if key is None or not isinstance(name, str) or not name:
            what = f"image {brief(row)} has no file_name, or no whole number as its id; left out"
            flaws.add(path, "images without id or name", what, image=True)
            continue
        if key in images:
            raise UserError(f"{path}: two images have the id {key}, so whose boxes are whose is unknown; correct it")
        found = [Path(name)] if os.path.isabs(name) and os.path.isfile(name) else finder.find(name)
        if not found:  # outside `data`, or of a kind whose reason not to be read is named below
            found = [folder / name for folder in (path.parent, data) if os.path.isfile(folder / name)][:1]
        if len(found) > 1:
            raise UserError(
                f"{path}: image {label(name, 80)} may be {' or '.join(map(str, found))}; remove one, or write its "
                "folder into the file_name"
            )
        if not found:
            what = f"image {label(name, 80)} does not exist below {data}; left out"
            flaws.add(path, "missing images", what, image=True)
            images[key] = None
            continue
        if found[0] in by_file:
            flaws.add(path, "duplicates", f"image {name} is listed twice; used once, with the boxes of both")
        size = tuple(as_number(row.get(side)) for side in ("width", "height"))
        images[key] = by_file.setdefault(found[0], BoxedImage(found[0], key, size))
    seen = set()
    for place, row in enumerate(annotations, start=1):
        key, what = as_id(row.get("image_id")), f"annotation {brief(row.get('id', place))}"
        if key not in images:
            what += f" is of image {brief(row.get('image_id'))}, which is not listed; left out"
            flaws.add(path, "boxes of unknown images", what)
            continue
        own = as_id(row.get("id"))
        if own is not None and own in seen:
            flaws.add(path, "duplicate annotation ids", f"{what}: its id occurs twice; used")
        seen.add(own)
        if images[key] is not None:  # else named above
            name = names.get(as_id(row.get("category_id")), "")
            add_box(images[key], name, read_corners(row), is_set(row.get("iscrowd")), path, what, flaws)
    return list(by_file.values()), {name: key for key, name in names.items()}


def read_corners(row):
    """[x1, y1, x2, y2] of an annotation of COCO: its bbox, or what its polygons fill; NaN where it has neither."""
    box, polygons = row.get("bbox"), row.get("segmentation")
    if isinstance(box, list) and len(box) == 4:
        x, y, width, height = map(as_number, box)
        return [x, y, x + width, y + height]
    if box or not isinstance(polygons, list):
        return [math.nan] * 4
    polygons = polygons if all(isinstance(polygon, list) for polygon in polygons) else [polygons]
    numbers = [as_number(value) for polygon in polygons for value in polygon]
    if not numbers or any(map(math.isnan, numbers)) or any(len(polygon) % 2 for polygon in polygons):
        return [math.nan] * 4
    columns, rows = numbers[::2], numbers[1::2]
    return [min(columns), min(rows), max(columns), max(rows)]


def check_corners(path, images):
    """UserError if a COCO file seems to hold x1, y1, x2, y2, where x, y, width and height are expected."""
    boxes, beyond = 0, 0
    for image in images:
        width, height = image.size
        for x1, y1, x2, y2 in image.boxes:
            right, bottom = x2 - x1, y2 - y1  # of the box if the file holds corners
            if not (x1 < right <= width + 1 and y1 < bottom <= height + 1):
                return
            boxes += 1
            beyond += x2 > width + 1 or y2 > height + 1
    if beyond > 0.25 * boxes and beyond > 1:
        raise UserError(
            f"{path}: {beyond} of {boxes} boxes reach out of their images, but none if its numbers are x1, y1, x2, y2; "
            "save each bbox as x, y, width, height"
        )


def as_id(value):
    """A whole number of a JSON file, also as 1.0 or "1"; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 40:
        return int(value)  # exactly, which a float is not beyond 2**53
    number = as_number(value)
    return int(number) if number.is_integer() else None


def is_text(name):
    """Whether a name is free of half characters, which no file can hold."""
    return name == name.encode(errors="replace").decode()


# --- what both have in common


def as_number(value):
    """A number of a file, also as text; NaN for anything else."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def is_set(value):
    """Whether a mark such as iscrowd or difficult is 1 or true, in any notation."""
    return as_number(value) == 1 or str(value).strip().lower() in ("true", "yes")


def add_box(image, name, box, ignored, path, what, flaws):
    """Add a box to an image, unless it has no class, no numbers or no area, or is there already."""
    x1, y1, x2, y2 = box
    shown = f"({x1:g}, {y1:g}, {x2:g}, {y2:g}); left out"
    if not name:
        flaws.add(path, "boxes without a known class", f"{what} has no known class; left out")
    elif not all(abs(value) < MOST_CORNER for value in box):  # NaN, too
        flaws.add(path, "boxes without numbers", f"{what} ({name}) has no four numbers as its box; left out")
    elif x2 <= x1 or y2 <= y1:
        flaws.add(path, "boxes without area", f"{what} ({name}) has no area {shown}")
    elif max(box) <= 1:
        remedy = "its numbers seem normalised: multiply by width and height"
        flaws.add(path, "normalised boxes", f"{what} ({name}) lies in the first pixel {shown}; {remedy}")
    elif x2 - x1 < 1 or y2 - y1 < 1:
        flaws.add(path, "boxes below one pixel", f"{what} ({name}) is narrower than a pixel {shown}")
    elif (name, box) in zip(image.names, image.boxes):
        flaws.add(path, "duplicates", f"{what} ({name}) is there twice; used once")
    else:
        image.names.append(name)
        image.boxes.append(box)
        image.ignored.append(ignored)


def check_images(images, flaws, description):
    """Read every image once: those that cannot be read, or have another size than annotated, are left out."""
    kept = []
    with ThreadPoolExecutor(4) as pool:
        sizes = pool.map(size_of, [image.path for image in images])
        for image, size in zip(images, Progress(sizes, desc=description, unit="image", total=len(images), leave=False)):
            if isinstance(size, ImageError):
                flaws.add(image.path, "broken images", f"{str(size).removeprefix(str(image.path)).strip()}; left out",
                          image=True)  # fmt: skip
                continue
            stated = tuple(side for side in image.size if side > 0)  # 0 and NaN: unknown, as some programs save it
            turned = len(stated) == 2 and stated != size and stated[::-1] == size and read_orientation(image.path)
            if turned in TURNS:
                image.boxes[:] = [TURNS[turned](*stated, *box) for box in image.boxes]
                what = f"is turned by its EXIF data, its annotation of {stated[0]:g} x {stated[1]:g} not; boxes turned"
                flaws.add(image.path, "images turned by EXIF data", what)
            elif len(stated) == 2 and stated != size:
                what = f"{size[0]} x {size[1]} pixels, its annotation says {stated[0]:g} x {stated[1]:g}; left out"
                what += ": use the file that was annotated, or annotate this one"
                flaws.add(image.path, "images of another size", f"has {what}", image=True)
                continue
            image.size = size
            kept.append(image)
    return kept


# Boxes (x1, y1, x2, y2) in an image of w x h pixels as it is stored -> in the upright one, by its EXIF orientation. The
# orientations 1 to 4 keep the size, so that it does not tell how the boxes are meant.
TURNS = {
    5: lambda w, h, x1, y1, x2, y2: [y1, x1, y2, x2],
    6: lambda w, h, x1, y1, x2, y2: [h - y2, x1, h - y1, x2],
    7: lambda w, h, x1, y1, x2, y2: [h - y2, w - x2, h - y1, w - x1],
    8: lambda w, h, x1, y1, x2, y2: [y1, w - x2, y2, w - x1],
}


def size_of(path):
    """(width, height) of an image, upright, in pixels; or the `ImageError` where it cannot be read."""
    try:
        return load_image(path).size
    except ImageError as error:
        return error


def read_orientation(path):
    """EXIF orientation of an image that can be read, 1 to 8; 1 where it has none."""
    try:
        with pillow_limits(), Image.open(path, formats=known_formats()) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1)
    except OSError:  # HEIC, which is not opened by Pillow itself
        return 1


def clip_boxes(image, flaws):
    """Clip boxes to their image; those outside are left out."""
    width, height = image.size
    inside = []
    for place, (x1, y1, x2, y2) in enumerate(image.boxes):
        clipped = [max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))]
        inside.append(clipped[2] > clipped[0] and clipped[3] > clipped[1])
        beyond = max(abs(a - b) for a, b in zip(clipped, (x1, y1, x2, y2)))
        if inside[-1]:
            image.boxes[place] = clipped
            if beyond > 1:  # VOC counts pixels from 1, many programs from 0
                what = f"a box ({image.names[place]}) reaches {beyond:g} pixels out of the image; clipped"
                flaws.add(image.path, "boxes beyond the edge", what)

    def explain(name, box):
        return f"a box ({name}) lies outside the image ({', '.join(f'{value:g}' for value in box)}); left out"

    drop(image, inside, "boxes outside their image", flaws, explain)


def drop(image, keep, kind, flaws, explain):
    """Leave out the boxes for which `keep` is False, and note each."""
    for name, box, kept in zip(image.names, image.boxes, keep):
        if not kept:
            flaws.add(image.path, kind, explain(name, box))
    for values in (image.boxes, image.names, image.ignored):
        values[:] = [value for value, kept in zip(values, keep) if kept]


def to_coco(images, classes):
    """COCO's dictionary of images, boxes and categories.

    Args:
        images: list of `BoxedImage`.
        classes: {name: category id}.
    """
    annotations = []
    for image in images:
        for (x1, y1, x2, y2), name, ignored in zip(image.boxes, image.names, image.ignored):
            annotations.append(
                dict(
                    id=len(annotations) + 1, image_id=image.image_id, category_id=classes[name],
                    bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1), iscrowd=int(ignored),
                )
            )  # fmt: skip
    return dict(
        info={},
        images=[
            dict(id=image.image_id, file_name=image.path.name, width=image.size[0], height=image.size[1])
            for image in images
        ],
        annotations=annotations,
        categories=[dict(id=key, name=name) for name, key in classes.items()],
    )
