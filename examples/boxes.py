"""Boxes around objects as annotation programs save them, read and checked: Pascal VOC's XML files, COCO's JSON file.

Real annotations have flaws. Each one that is found is a line that names its file, and what was done about it: a box or
an image is left out, or the whole file is refused.
"""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from common.file_checks import brief
from common.images import EXTENSIONS, ImageError, load_image
from common.options import UserError
from common.progress import Progress
from common.text import read_text

LAYOUT = (
    "expected Pascal VOC (Annotations/*.xml, JPEGImages/ and ImageSets/Main/train.txt and val.txt) or COCO "
    "(annotations/train.json and val.json, or instances_train2017.json and so on, and the images in images/, train/ "
    "and val/)"
)
IMAGE_FOLDERS = ("", "images", "images/{split}", "JPEGImages", "{split}", "{split}2017", "{split}2014")  # of COCO
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


class Flaws:
    """What was found wrong, a line each, and how often each kind was.

    Attributes:
        lines: "<file>: <what is wrong>".
        counts: {kind: number of times}, such as "boxes without area".
    """

    def __init__(self):
        self.lines = []
        self.counts = Counter()
        self.images = 0  # images that were left out

    def add(self, path, kind, what, image=False):
        """Note a flaw of `kind` in the file at `path`; `image`: the whole image is left out."""
        self.lines.append(f"{path}: {what}")
        self.counts[kind] += 1
        self.images += image

    def report(self, most=20):
        """Print the first lines, and a count of all."""
        for line in self.lines[:most]:
            print(f"  {line}")
        if len(self.lines) > most:
            print(f"  and {len(self.lines) - most} more")
        if self.counts:
            print(f"flaws       {', '.join(f'{count} {kind}' for kind, count in self.counts.items())}")


def read_boxes(data, split, flaws, classes=None):
    """The images of one part of a data set, with their boxes.

    Args:
        data: folder, see `LAYOUT`.
        split: name of the part, such as "train"; or the path of its list (.txt) or of its COCO file (.json).
        flaws: `Flaws`, to which everything is added that is left out.
        classes: names of the classes; boxes of others are left out. None: all that occur.

    Returns:
        (list of `BoxedImage`, {class name: COCO's category id, or None where the data have none}).

    Raises:
        UserError: if there is no such data set or part; if a list or COCO file cannot be read; if no image is left.
    """
    data = Path(data)
    if not data.is_dir():
        raise UserError(f"there is no folder {data}; {LAYOUT}")
    path, is_coco = find_split(data, split)
    images, ids = read_coco(data, path, split, flaws) if is_coco else (read_voc(data, path, flaws), {})
    images = check_images(images, flaws, f"checking {path.name}")
    if classes is not None:
        for image in images:
            drop(image, [name in classes for name in image.names], "boxes of other classes", flaws,
                 lambda name, box: f"class {name!r} is not one of {', '.join(classes)}; left out")  # fmt: skip
    if not images:
        raise UserError(f"{path} leaves no image that can be used; see the lines above")
    names = sorted({name for image in images for name in image.names})
    return images, {name: ids.get(name) for name in names}


def find_split(data, split):
    """(path of the list or COCO file of a part, whether it is COCO's); UserError if there is none."""
    if Path(split).suffix in (".txt", ".json") and Path(split).is_file():
        return Path(split), Path(split).suffix == ".json"
    listed = data / "ImageSets" / "Main" / f"{split}.txt"
    if listed.is_file():
        return listed, False
    coco = [data / "annotations" / f"{name}.json" for name in (split, f"instances_{split}")]
    coco += [data / "boxes" / f"{split}.json", data / f"{split}.json", data / split / "_annotations.coco.json"]
    coco += sorted((data / "annotations").glob(f"instances_{split}*.json"))
    found = [path for path in coco if path.is_file()]
    if found:
        return found[0], True
    there = [path.stem for path in sorted((data / "ImageSets" / "Main").glob("*.txt"))]
    there += [path.name for path in sorted((data / "annotations").glob("*.json"))]
    raise UserError(f"{data} has no part {split!r} ({', '.join(there[:12]) or 'nothing'} is there); {LAYOUT}")


# --- Pascal VOC


def read_voc(data, path, flaws):
    """The images that a list of `ImageSets/Main` names, with the boxes of their XML files."""
    images, seen = [], set()
    stems = stems_of(data / "JPEGImages")
    for line in read_list(path):
        name, _, column = line.rpartition(" ")
        if column in ("1", "0", "-1") and not Path(data, "Annotations", f"{line}.xml").is_file():
            line = name.strip()  # a list of one class, whose second column says whether it is there
        if line in seen:
            flaws.add(path, "duplicates", f"{line} is listed twice; used once")
            continue
        seen.add(line)
        annotation = data / "Annotations" / f"{line}.xml"
        if not annotation.is_file():
            flaws.add(annotation, "missing XML files", "does not exist; its image is left out", image=True)
            continue
        try:
            root = ElementTree.fromstring(annotation.read_bytes())
        except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:
            flaws.add(annotation, "broken XML files", f"cannot be read ({error}); its image is left out", image=True)
            continue
        file = stems.get(line)
        if file is None:
            flaws.add(data / "JPEGImages" / line, "missing images", "does not exist as an image; left out", image=True)
            continue
        image = BoxedImage(file, len(images) + 1, (number(root, "size/width"), number(root, "size/height")))
        for place, thing in enumerate(root.iter("object"), start=1):
            name = (thing.findtext("name") or "").strip()
            box = [number(thing, f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
            add_box(image, name, box, number(thing, "difficult") == 1, annotation, f"object {place}", flaws)
        images.append(image)
    return images


def read_list(path):
    """The lines of a list of ImageSets that are not empty."""
    try:
        lines = read_text(path).split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); use another list") from error
    return [line.strip() for line in lines if line.strip()]


def stems_of(folder):
    """{name without extension: path} of the images in a folder."""
    return {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in EXTENSIONS}


def number(element, path):
    """The number at `path` below an XML element; NaN where there is none."""
    try:
        return float(element.findtext(path, "nan"))
    except ValueError:
        return math.nan


# --- COCO


def read_coco(data, path, split, flaws):
    """The images of a COCO file with their boxes, and {class name: category id}."""
    try:
        content = json.loads(read_text(path))
        categories, listed, annotations = (content[key] for key in ("categories", "images", "annotations"))
        if not all(isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
                   for rows in (categories, listed, annotations)):  # fmt: skip
            raise TypeError("its categories, images and annotations must be lists of dictionaries")
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is no COCO file of boxes ({reason}); save it again") from error
    names = {}
    for row in categories:
        name, key = row.get("name"), row.get("id")
        if not isinstance(name, str) or not name.strip() or not isinstance(key, int):
            raise UserError(f"{path}: a category has no name or whole number as its id ({brief(row)}); correct it")
        if key in names or name.strip() in names.values():
            raise UserError(f"{path}: category {brief(key)} {brief(name)} occurs twice; rename one of them")
        names[key] = name.strip()
    folders = [data / folder.format(split=Path(split).stem) for folder in IMAGE_FOLDERS] + [path.parent]
    images, files = {}, set()
    for row in listed:
        key, name = row.get("id"), row.get("file_name")
        if not isinstance(key, int) or not isinstance(name, str) or not name:
            flaws.add(path, "images without id or name", f"image {brief(row)} has none; left out", image=True)
            continue
        if key in images:
            raise UserError(f"{path}: two images have the id {key}, so whose boxes are whose is unknown; correct it")
        images[key] = None
        file = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if file is None:
            where = "none of the folders of images has it"
            flaws.add(path, "missing images", f"image {name} does not exist ({where}); left out", image=True)
        elif file in files:
            flaws.add(path, "duplicates", f"image {name} is listed twice; used once", image=True)
        else:
            files.add(file)
            size = tuple(as_number(row.get(side)) for side in ("width", "height"))
            images[key] = BoxedImage(file, key, size)
    seen = set()
    for place, row in enumerate(annotations, start=1):
        key, what = row.get("image_id"), f"annotation {brief(row.get('id', place))}"
        if not isinstance(key, int) or key not in images:
            what += f" is of image {brief(key)}, which is not listed; left out"
            flaws.add(path, "boxes of unknown images", what)
            continue
        if isinstance(row.get("id"), int):
            if row["id"] in seen:
                flaws.add(path, "duplicate annotation ids", f"{what}: its id occurs twice; used")
            seen.add(row["id"])
        if images[key] is None:  # named above
            continue
        category = row.get("category_id")
        name = names.get(category, "") if isinstance(category, int) else ""
        box = row.get("bbox")
        x, y, width, height = map(as_number, box) if isinstance(box, list) and len(box) == 4 else [math.nan] * 4
        add_box(images[key], name, [x, y, x + width, y + height], row.get("iscrowd") in (1, True), path, what, flaws)
    return [image for image in images.values() if image is not None], {name: key for key, name in names.items()}


def as_number(value):
    """A number of a JSON file as a float; NaN for anything else."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if fits else math.nan


# --- what both have in common


def add_box(image, name, box, ignored, path, what, flaws):
    """Add a box to an image, unless it has no class, no numbers or no area, or is there already."""
    x1, y1, x2, y2 = box
    if not name:
        flaws.add(path, "boxes without a known class", f"{what} has no known class; left out")
    elif not all(abs(value) < MOST_CORNER for value in box):  # NaN, too
        flaws.add(path, "boxes without numbers", f"{what} ({name}) has no four numbers as its box; left out")
    elif x2 <= x1 or y2 <= y1:
        flaws.add(path, "boxes without area", f"{what} ({name}) has no area ({x1:g}, {y1:g}, {x2:g}, {y2:g}); left out")
    elif (name, box) in zip(image.names, image.boxes):
        flaws.add(path, "duplicates", f"{what} ({name}) is there twice; used once")
    else:
        image.names.append(name)
        image.boxes.append(box)
        image.ignored.append(ignored)


def check_images(images, flaws, description):
    """Read every image once: those that cannot be read, or have another size than annotated, are left out; boxes are
    clipped to the others."""

    def size_of(image):
        try:
            return load_image(image.path).size
        except ImageError as error:
            return error

    kept = []
    with ThreadPoolExecutor(4) as pool:
        sizes = pool.map(size_of, images)
        for image, size in zip(images, Progress(sizes, desc=description, unit="image", total=len(images), leave=False)):
            if isinstance(size, ImageError):
                flaws.add(image.path, "broken images", f"{str(size).removeprefix(str(image.path)).strip()}; left out",
                          image=True)  # fmt: skip
                continue
            stated = [side for side in image.size if side > 0]  # 0 and NaN: unknown, as some programs save it
            if len(stated) == 2 and tuple(stated) != size:
                what = f"{size[0]} x {size[1]} pixels, its annotation says {stated[0]:g} x {stated[1]:g}; left out"
                flaws.add(image.path, "images of another size", f"has {what}", image=True)
                continue
            image.size = size
            clip_boxes(image, flaws)
            kept.append(image)
    return kept


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
