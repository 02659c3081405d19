"""Labels in a table: makedata.py's LABELS, a CSV file with a row for each image instead of a folder for each class.

    image,class,split,group
    0001.jpg,Maize,train,plant 7
    b/0002.jpg,Common wheat,val,plant 8

`split` (train, val or test) and `group` (what stays together, such as a plant or a person) may be missing. The images
lie in SOURCE or in folders below it. Columns may have the usual other names (`COLUMNS`), be in any order and be
separated by commas, semicolons or tabs.
"""

import csv
import io
import os
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

from common.columns import Files, Texts
from common.file_checks import PARTS, is_file_name
from common.files import list_files
from common.images import find_folder_problems, is_hidden
from common.options import UserError, raise_all
from common.tables import unguard
from common.text import read_text

# What a column may be called, in lower case; of several that fit, the first one in this order is used.
COLUMNS = {
    "image": "image file filename file_name path image_path filepath img image_name image_id id 图片 图像 文件 文件名",
    "class": "class label labels class_name category species target 类别 标签 类 物种",
    "split": "split subset set part partition fold_type 划分 集合",
    "group": "group groups group_id 组 分组",
}
REQUIRED = ("image", "class")
PART_NAMES = {"train": "train training 训练 训练集", "val": "val valid validation dev 验证 验证集"}
PART_NAMES |= {"test": "test testing 测试 测试集"}
DELIMITERS = ",;\t"
LISTED = 3  # names in a line about what is passed over


class LabelledFiles(Files):
    """Files anywhere below a folder, with the classes of a table; otherwise like `Files`.

    Args:
        root: the folder, as str.
        classes: names of the classes.
        names: `Texts`, the name that each file gets in data/.
        labels: int array (files,): the class of each.
        paths: `Texts`, the path of each, below `root`.
        parts: int8 array (files,): the index in `PARTS` of each; None: the table does not say.
        groups: `Texts`, the group of each; None: the table does not say.
    """

    def __init__(self, root, classes, names, labels, paths, parts=None, groups=None):
        super().__init__(root, classes, names, labels)
        self.paths = paths
        self.parts = parts
        self.groups = groups

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.choose(np.arange(len(self))[index])
        return os.path.join(self.root, self.paths[index])

    def __iter__(self):
        for path in self.paths:
            yield os.path.join(self.root, path)

    def choose(self, indices):
        def take(texts):
            return Texts(texts[index] for index in indices.tolist())

        parts = None if self.parts is None else self.parts[indices]
        groups = None if self.groups is None else take(self.groups)
        labels = self.labels[indices]
        return LabelledFiles(self.root, self.classes, take(self.names), labels, take(self.paths), parts, groups)


class LabelledFolder:
    """The images that a table lists, as makedata.py takes them; see `common.images.ClassFolders`.

    Args:
        files: `LabelledFiles`, sorted by class and name.
        table: path of the table.
        unlisted: paths of the files in the folder that it does not list.
    """

    beside = ()

    def __init__(self, files, table, unlisted):
        self.files = files
        self.table = table
        self.unlisted = unlisted

    def choose(self, fits):
        return self.files.choose(np.flatnonzero([fits(path) for path in self.files.paths]))

    def describe_passed(self, fits, with_files=True):
        """One line about the images that the table does not list; "" if it lists all."""
        paths = [path for path in self.unlisted if fits(path)]
        if not paths:
            return ""
        return (
            f"not in {self.table}, so not used: {len(paths)} files in {self.files.root} "
            f"({', '.join(paths[:LISTED])}{', ...' if len(paths) > LISTED else ''})"
        )


def read_labels(table, source):
    """Read a table of labels: a `LabelledFolder`; says which columns it took, and how many rows say nothing new.

    Args:
        table: path of the CSV file.
        source: folder of the images.

    Raises:
        UserError: for what is wrong with the table, each with line and remedy.
    """
    if not Path(source).is_dir():
        raise UserError(f"there is no folder {source}; set SOURCE to the folder of the images that {table} lists")
    columns, rows = read_rows(table)
    found = {str(path.relative_to(source)).replace(os.sep, "/") for path in list_files(source, is_hidden)}
    found = {path for path in found if not is_hidden(path)}
    find_image = ImageFinder(source, found)
    problems, chosen, repeated = [], {}, 0
    for line, cells in rows:
        row = {name: cells[place].strip() for name, place in columns.items()}
        path, problem = find_image(row["image"])
        problem = problem or find_problem(row)
        if problem:
            problems.append(f"{table}, line {line}: {problem}")
            continue
        row["split"] = part_of(row.get("split", ""))
        row["image"] = path
        before, first = chosen.setdefault(path, (row, line))
        if before is row:
            continue
        different = next((name for name in columns if before[name] != row[name]), None)
        if different:
            problems.append(
                f"{table}, line {line}: {path} has the {different} {row[different]!r}, but in line {first} "
                f"{before[different]!r}; remove the wrong line"
            )
        repeated += 1
    rows = [row for row, _ in chosen.values()]
    problems = problems or find_table_problems(table, columns, rows)
    raise_all(problems)
    if repeated:
        print(f"{table}: {repeated} rows repeat others, and count once")
    return LabelledFolder(to_files(source, columns, rows), table, sorted(found - chosen.keys()))


def read_rows(path):
    """({column of `COLUMNS`: its place}, [(number of the line, cells)]) of a CSV file; UserError if it is none."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"LABELS: {path} {what}; give the path of a CSV file with the columns image and class")
    with open(path, "rb") as file:
        if file.read(4) in (b"PK\3\4", b"\xd0\xcf\x11\xe0"):
            raise UserError(f"{path} is a workbook of Excel; save it as CSV UTF-8 and give the path of that file")
    try:
        text = read_text(path, errors="strict")
    except UnicodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({error}); save it in Excel as CSV UTF-8, or convert it: "
            f"iconv -f gb18030 -t utf-8 {path.name}"
        ) from error
    lines = text.splitlines()
    if not any(map(str.strip, lines)):
        raise UserError(f"{path} is empty; it needs a first line image,class and a line for each image")
    headers = {delimiter: next(csv.reader([lines[0]], delimiter=delimiter)) for delimiter in DELIMITERS}
    delimiter = max(DELIMITERS, key=lambda one: (len(find_columns(headers[one])), len(headers[one])))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows, problems = [], []
    try:
        header = next(reader)
        columns = find_columns(header)
        missing = [name for name in REQUIRED if name not in columns]
        if missing:
            raise UserError(
                f"{path} has no column {' and no column '.join(missing)}, but {', '.join(header)}; name the columns in "
                "the first line: image,class, and where you want split,group"
            )
        for cells in reader:
            if not any(map(str.strip, cells)):
                continue
            if len(cells) != len(header):
                problems.append(
                    f"{path}, line {reader.line_num}: expected {len(header)} fields, got {len(cells)}; fix this line"
                )
            rows.append((reader.line_num, list(map(unguard, cells))))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; fix this line") from error
    raise_all(problems)
    if not rows:
        raise UserError(f"{path} has no row below its header; it needs a line for each image")
    renamed = [f"{name} is its column {header[place]}" for name, place in columns.items() if header[place] != name]
    unused = [name for place, name in enumerate(header) if place not in columns.values()]
    if renamed or unused:
        ignored = [f"not used: {', '.join(unused)}"] if unused else []
        print(f"{path}: {'; '.join(renamed + ignored)}")
    return columns, rows


def find_columns(header):
    """{column of `COLUMNS`: its place in the header}."""
    names = [name.strip().strip("\ufeff").lower().replace(" ", "_") for name in header]
    columns = {}
    for column, others in COLUMNS.items():
        place = next((names.index(name) for name in others.split() if name in names), None)
        if place is not None:
            columns[column] = place
    return columns


class ImageFinder:
    """Function of a cell -> (path below the folder, what is wrong with the cell or "").

    Args:
        source: the folder.
        found: set of the paths below it, with slashes.
    """

    def __init__(self, source, found):
        self.source = Path(source)
        self.found = found
        self.normal = {unicodedata.normalize("NFC", path): path for path in found}
        stems = Counter(path.rpartition(".")[0] for path in found)
        self.stems = {path.rpartition(".")[0]: path for path in found if stems[path.rpartition(".")[0]] == 1}
        self.lower = {path.lower(): path for path in found}

    def __call__(self, cell):
        name = cell.replace("\\", "/")
        if os.path.isabs(name):
            name = os.path.relpath(name, self.source.resolve()).replace(os.sep, "/")
        name = os.path.normpath(name).replace(os.sep, "/") if name else name
        below = name.removeprefix(f"{self.source.as_posix()}/")
        for candidate in (name, below, unicodedata.normalize("NFC", below)):
            for index in (self.normal, self.stems):
                if candidate in self.found or candidate in index:
                    return candidate if candidate in self.found else index[candidate], ""
        if not cell:
            return None, "the image is missing; write its file name, or remove the line"
        near = self.lower.get(below.lower())
        hint = f"; did you mean {near}?" if near else "; correct the name, or remove the line"
        return None, f"there is no image {cell} in {self.source}{hint}"


def find_problem(row):
    """What is wrong with the values of a row, besides its image; "" if nothing is."""
    name = row["class"]
    if not name:
        return "the class is missing; fill it in, or remove the line"
    if not is_file_name(name) or is_hidden(name) or name.endswith("."):
        return f"the class {name!r} cannot be the name of a folder; choose another name"
    if row.get("split") and part_of(row["split"]) is None:
        return f"the split must be train, val or test, got {row['split']!r}"
    return ""


def part_of(text):
    """The one of `PARTS` that a cell means; None for another text, "" for an empty one."""
    return next((part for part, names in PART_NAMES.items() if text.lower() in names.split()), None) if text else ""


def find_table_problems(table, columns, rows):
    """What is wrong with a table whose rows are right, a sentence each."""
    classes = sorted({row["class"] for row in rows})
    problems = [f"{table}: {text}" for text in find_folder_problems(Path("class"), dict.fromkeys(classes, ()))]
    for name in ("split", "group"):
        empty = [row["image"] for row in rows if name in columns and not row[name]]
        if empty and (name == "group" or len(empty) < len(rows)):
            problems.append(
                f"{table}: the {name} is missing for {len(empty)} of {len(rows)} images, such as {empty[0]}; fill it "
                f"in for all, or remove the column {name}"
            )
    if not problems and any(row["split"] for row in rows):
        for part in PARTS[:2]:
            lacking = sorted(set(classes) - {row["class"] for row in rows if row["split"] == part})
            if lacking:
                more = f" and {len(lacking) - 1} more classes" if len(lacking) > 1 else ""
                problems.append(
                    f"{table}: the split puts no image of {lacking[0]!r}{more} into {part}; add some, or remove the "
                    "column split, so that makedata.py splits"
                )
    names = {}
    for row in rows:
        twin = names.setdefault((row["class"], name_in_data(row["image"]).lower()), row["image"])
        if twin != row["image"]:
            problems.append(
                f"{twin} and {row['image']} would get the same name in the class {row['class']!r}; rename one"
            )
    return problems


def name_in_data(path):
    """The name that a file below the folder gets in data/<part>/<class>/."""
    return path.replace("/", "_")


def to_files(source, columns, rows):
    """The `LabelledFiles` of the rows of a table."""
    classes = sorted({row["class"] for row in rows})
    number = {name: place for place, name in enumerate(classes)}
    rows = sorted(rows, key=lambda row: (number[row["class"]], name_in_data(row["image"])))
    split = any(row["split"] for row in rows)
    return LabelledFiles(
        str(Path(source)),
        classes,
        Texts(name_in_data(row["image"]) for row in rows),
        np.array([number[row["class"]] for row in rows], np.int32),
        Texts(row["image"] for row in rows),
        np.array([PARTS.index(row["split"]) for row in rows], np.int8) if split else None,
        Texts(row["group"] for row in rows) if "group" in columns else None,
    )
