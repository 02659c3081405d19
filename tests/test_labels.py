"""makedata.py's LABELS: a table instead of class folders, and what is wrong with bad ones."""

import csv
import os
from pathlib import Path

import pytest
from conftest import draw_noise, fill_classes, read_manifest

import mean_std
from common.manifest import choose_mean_and_std
from common.options import ConstantError, UserError
from common.tables import TableWriter

CLASSES = {"Common wheat": 10, "Maize": 8, "玉米 苗": 6}

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def make(make):
    """Call makedata's main() on labels.csv and photos/, with some constants changed; returns the exit status."""
    return lambda **constants: make(**dict(LABELS="labels.csv", SOURCE="photos") | constants)


@pytest.fixture
def flat(here):
    """(image, class) of images that lie in the folder photos."""
    fill_classes("sorted", CLASSES)
    Path("photos").mkdir()
    rows = []
    for number, path in enumerate(sorted(Path("sorted").rglob("*.png"))):
        name = f"IMG {number:02d}.png"
        os.link(path, Path("photos", name))
        rows.append((name, path.parent.name))
    return rows


def write(rows, header=("image", "class"), path="labels.csv", delimiter=",", encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])


def placed():
    """{source: (part, class)} as the manifest says and the folders show."""
    files = read_manifest()["files"]
    assert all(Path("data", file["path"]).is_file() for file in files)
    assert len(files) == len([path for path in Path("data").glob("*/*/*") if path.parent.parent.name != "cache"])
    return {Path(file["source"]).name: tuple(file["path"].split("/")[:2]) for file in files}


def test_a_table_makes_the_same_data_as_class_folders(flat, make):
    write(flat)
    assert make() == 0
    by_table = {file["sha256"]: file["path"].split("/")[:2] for file in read_manifest()["files"]}
    assert make(LABELS="", SOURCE="sorted") == 0
    assert by_table == {file["sha256"]: file["path"].split("/")[:2] for file in read_manifest()["files"]}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_and_delimiters(delimiter, encoding, flat, make, capsys):
    write(flat, delimiter=delimiter, encoding=encoding)
    assert make() == 0
    assert {name: found[1] for name, found in placed().items()} == dict(flat)


@pytest.mark.parametrize(
    "header", [("filename", "label"), ("ID", "Species"), ("图片", "类别"), ("Image Path", " Class ")]
)
def test_usual_names_of_columns_are_known_and_reported(header, flat, make, capsys):
    write(flat, header)
    assert make() == 0 and len(placed()) == len(flat)
    assert f"labels.csv: image is its column {header[0]}; class is its column {header[1]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"photos/{name}",
        lambda name: f"./{name}",
        lambda name: name.replace(".png", ""),
        lambda name: str(Path("photos", name).resolve()),
        lambda name: f".\\{name}",
    ],
)
def test_ways_to_name_an_image(change, flat, make):
    write([(change(name), label) for name, label in flat])
    assert make() == 0
    assert {name: found[1] for name, found in placed().items()} == dict(flat)


def test_images_in_folders_below_and_names_that_look_like_formulas(flat, make):
    for folder in ("a", "b", "a/c"):
        Path("photos", folder).mkdir()
    rows = []
    for number, (name, label) in enumerate(flat):
        folder = ("a", "b", "a/c")[number % 3]
        Path("photos", name).rename(f"photos/{folder}/={number // 3}.png")
        rows.append((f"{folder}/={number // 3}.png", label))
    with open("labels.csv", "w", newline="", encoding="utf-8") as file:
        TableWriter(file).writerows([("image", "class"), *rows])
    assert make() == 0
    assert len(read_manifest()["files"]) == len(flat)
    assert Path("data/train/Maize").is_dir() and not list(Path("data").glob("*/*/*/*"))


def test_the_column_split_decides(flat, make, capsys):
    parts = ["Training", "val", "test", "TRAIN"]
    write([(*row, parts[number % 4]) for number, row in enumerate(flat)], ("image", "class", "split"))
    assert make() == 0
    expected = {name: ("train", "val", "test", "train")[number % 4] for number, (name, _) in enumerate(flat)}
    assert {name: part for name, (part, _) in placed().items()} == expected
    assert "so that VAL_RATIO 0.3 and SEED 42 have no effect" in capsys.readouterr().out
    assert make(TEST_RATIO=0.2) == 0  # which would have made a test part that the table does not have
    assert "so that VAL_RATIO 0.3, TEST_RATIO 0.2 and SEED 42 have no effect" in capsys.readouterr().out


def test_the_column_group_keeps_images_together(flat, make, capsys):
    groups = [f"plant {number % 6}" for number in range(len(flat))]
    write([(*row, group) for row, group in zip(flat, groups)], ("image", "class", "group"))
    assert make(TEST_RATIO=0.2) == 0
    found = placed()
    parts = {group: {found[name][0] for (name, _), other in zip(flat, groups) if other == group} for group in groups}
    assert all(len(some) == 1 for some in parts.values())
    assert {part for some in parts.values() for part in some} == {"train", "val", "test"}
    assert make(VAL_GROUPS=["plant 0"], TEST_GROUPS=["plant 1", "plant 2"]) == 0
    assert "by VAL_GROUPS and TEST_GROUPS, so that VAL_RATIO 0.3 and SEED 42 have no effect" in capsys.readouterr().out
    assert {found for name, found in placed().items() if found[0] == "val"} == {("val", name) for name in CLASSES}


def test_images_that_are_not_listed_are_counted_and_named(flat, make, capsys):
    write(flat[2:])
    assert make() == 0
    line = "not in labels.csv, so not used: 2 files in photos (IMG 00.png, IMG 01.png)"
    assert line in capsys.readouterr().out and len(placed()) == len(flat) - 2


def test_rows_that_repeat_others_count_once(flat, make, capsys):
    write(flat + flat[:3])
    assert make() == 0
    assert "labels.csv: 3 rows repeat others, and count once" in capsys.readouterr().out
    assert len(placed()) == len(flat)


def test_statistics_are_those_of_the_listed_images_without_the_test_part(flat, make, monkeypatch, capsys):
    write(flat[4:])
    make(TEST_RATIO=0.2)
    capsys.readouterr()
    assert mean_std.main() == 0
    out = capsys.readouterr().out
    assert "images of labels.csv; SOURCE data1 has no effect, since data was made from photos" in out
    test = len([part for part, _ in placed().values() if part == "test"])
    assert f"not counted: {test} images of" in out
    _, _, where = choose_mean_and_std("data", None, None, None)
    assert where.endswith(f"{len(flat) - 4 - test} images") and "warning" not in capsys.readouterr().out


# --- bad tables

BAD = {
    "a,b\nc,d\n": "has no column image and no column class, but a, b; name the columns",
    "image\nIMG 00.png\n": "has no column class, but image;",
    "IMG 00.png,Maize\nIMG 01.png,Maize\n": "has no column image and no column class",
    "image,class\n": "no row below its header",
    "\n \n": "is empty",
    "image,class\nIMG 00.png\n": "line 2: expected 2 fields, got 1",
    "image,class\nnot there.png,Maize\n": "line 2: there is no image not there.png in photos; correct",
    "image,class\nimg 00.PNG,Maize\n": "did you mean IMG 00.png?",
    "image,class\n,Maize\n": "line 2: the image is missing",
    "image,class\nIMG 00.png,\n": "line 2: the class is missing",
    "image,class\nIMG 00.png,a/b\n": "line 2: the class 'a/b' cannot be the name of a folder",
    "image,class\nIMG 00.png,.git\n": "cannot be the name of a folder",
    "image,class\nIMG 00.png,..\n": "cannot be the name of a folder",
    "image,class,split\nIMG 00.png,a,later\n": "the split must be train, val or test, got 'later'",
    "image,class\nIMG 00.png,a\nIMG 00.png,b\n": "line 3: IMG 00.png has the class 'b', but in line 2 'a'",
    "image,class\nIMG 00.png,a\nIMG 01.png,A\n": "differ by case only",
    "image,class,group\nIMG 00.png,a,x\nIMG 01.png,a,\n": "the group is missing for 1 of 2 images, such as IMG 01.png",
    "image,class,split\nIMG 00.png,a,val\nIMG 01.png,a,\n": "the split is missing for 1 of 2 images",
    "image,class,split\nIMG 00.png,a,train\nIMG 01.png,a,test\n": "puts no image of 'a' into val",
    'image,class\n"IMG 00.png,a\n': "line ",
    "image,class\nIMG 00.png,a\nIMG 01.png,b\n": "list at least two in labels.csv",
    "image,class,group\nIMG 00.png,a,x\nIMG 01.png,a,x\n": "all files are in one group, 'x'",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_a_bad_table_gets_a_sentence(text, flat, make):
    Path("labels.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        make()
    assert BAD[text] in str(error.value) and not Path("data").exists()
    assert "labels.csv" in str(error.value) or "column" in str(error.value)


def test_every_bad_row_is_named_at_once(flat, make):
    write([("x.png", "a"), *flat, ("y.png", "b")])
    with pytest.raises(UserError) as error:
        make()
    assert "line 2: there is no image x.png" in str(error.value)
    assert f"line {len(flat) + 3}: there is no image y.png" in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("图片,类别\na.png,玉米\n".encode("gb18030"), "is not UTF-8"),
        (b"image,class\n\xff\xfe\xfa", "is not UTF-8"),
        (b"PK\3\4" + bytes(50), "is a workbook of Excel; save it as CSV UTF-8"),
        (b"", "is empty"),
        (b"\xff\xfeo", "is not UTF-8"),
    ],
)
def test_files_that_are_no_table(content, message, flat, make):
    Path("labels.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        make()


def test_paths_that_are_none(flat, make):
    write(flat)
    with pytest.raises(UserError, match="LABELS: nowhere.csv does not exist"):
        make(LABELS="nowhere.csv")
    with pytest.raises(UserError, match="LABELS: photos is a folder"):
        make(LABELS="photos")
    with pytest.raises(UserError, match="there is no folder elsewhere; set SOURCE"):
        make(SOURCE="elsewhere")


def test_names_that_would_collide(flat, make):
    Path("photos/a").mkdir()
    draw_noise("x").save("photos/a/1.png")
    draw_noise("y").save("photos/a_1.png")
    write([*flat, ("a/1.png", "Maize"), ("a_1.png", "Maize")])
    with pytest.raises(UserError, match="a/1.png and a_1.png would get the same name in the class 'Maize'; rename one"):
        make()


def test_identical_images_in_two_parts_of_the_column_split(flat, make):
    Path("photos/copy.png").write_bytes(Path("photos/IMG 12.png").read_bytes())
    parts = [("train", "val")[number % 2] for number in range(len(flat))]
    rows = [(*row, part) for row, part in zip(flat, parts)]
    other = "val" if parts[12] == "train" else "train"
    write([*rows, ("copy.png", flat[12][1], other)], ("image", "class", "split"))
    with pytest.raises(UserError, match="are identical images, which makes the accuracy too high"):
        make()


def test_a_group_in_two_parts_of_the_column_split(flat, make):
    rows = [(*row, ("train", "val")[number % 2], f"g{number // 2}") for number, row in enumerate(flat)]
    write(rows, ("image", "class", "split", "group"))
    with pytest.raises(UserError, match="are of one group"):
        make()


@pytest.mark.parametrize(
    "constants, message",
    [
        (dict(CHECK=True), "LABELS must be \"\" with CHECK"),
        (dict(DEMO=True), "LABELS must be \"\" with DEMO"),
        (dict(GROUP="x"), "GROUP must be \"\" where labels.csv has a column group"),
        (dict(VAL_GROUPS=["nobody"]), "VAL_GROUPS names nobody"),
    ],
)
def test_constants_that_contradict_a_table(constants, message, flat, make):
    rows = [(*row, f"g{number % 4}") for number, row in enumerate(flat)]
    write(rows, ("image", "class", "group"))
    with pytest.raises(UserError, match=message):
        make(**constants)


def test_groups_named_without_any(flat, make):
    write(flat)
    with pytest.raises(ConstantError, match="VAL_GROUPS and TEST_GROUPS need groups"):
        make(TEST_GROUPS=["a"])
