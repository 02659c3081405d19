"""examples/detection.py: data with flaws, the network, training and resuming, average precision, predictions."""

import json
import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import timm
import tiny  # noqa: F401  registers unireplknet_test
import torch
from PIL import Image

from forked import find_no_groups
from common import dense
from common.options import ConstantError, UserError, current_values
from examples import boxes, detection
from examples.scene import write_scenes
from models import depthwise_choice

DEFAULTS = current_values(vars(detection))
SMALL = dict(DATA="drawn", MODEL="unireplknet_test", IMG_SIZE=64, CROP_SIZE=64, BATCH_SIZE=4, CHANNELS=16, DEVICE="cpu")
SMALL |= dict(OPTIMIZER="adamw", AMP="off", WORKERS=0, EPOCHS=2, VALIDATE_EVERY=2, WARMUP_EPOCHS=0.0)
SMALL |= dict(LEARNING_RATE=1e-2)


@pytest.fixture
def drawn_boxes():
    """A test that asks for this gets runs that draw images with boxes, which takes longer than a short run."""


@pytest.fixture
def detect(tmp_path, monkeypatch, request):
    """Call detection.main() in `tmp_path` with some constants changed; returns the run's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detection, "DRAWN", dict(train=8, val=2))
    monkeypatch.setattr(depthwise_choice, "find_groups", find_no_groups)
    monkeypatch.setattr(detection, "write_scenes", lambda folder, counts, *size: write_scenes(folder, counts, 96, 64))
    if "drawn_boxes" not in request.fixturenames:
        monkeypatch.setattr(detection, "plot_boxes", lambda cells, classes, score, path: path.touch())
    # The curves would take longer than the epochs they show.
    monkeypatch.setattr(dense, "plot_curve", lambda history, name, quantity, path: path.touch())

    def run(status=0, **constants):
        for name, value in (DEFAULTS | SMALL | constants).items():
            monkeypatch.setattr(detection, name, value)
        assert detection.main() == status
        return tmp_path / detection.OUTPUT / detection.MODEL

    return run


def write_voc(folder, parts):
    """Write Pascal VOC's files.

    Args:
        parts: {part: {name of an image: [(class, x1, y1, x2, y2), ...]}}; the images are 40 x 30 pixels.
    """
    for place in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for part, images in parts.items():
        (folder / "ImageSets" / "Main" / f"{part}.txt").write_text("".join(f"{name}\n" for name in images), "utf-8")
        for name, things in images.items():
            Image.new("RGB", (40, 30), "grey").save(folder / "JPEGImages" / f"{name}.jpg")
            root = ElementTree.Element("annotation")
            size = ElementTree.SubElement(root, "size")
            for side, value in (("width", 40), ("height", 30)):
                ElementTree.SubElement(size, side).text = str(value)
            for thing in things:
                element = ElementTree.SubElement(root, "object")
                ElementTree.SubElement(element, "name").text = thing[0]
                corners = ElementTree.SubElement(element, "bndbox")
                for corner, value in zip(("xmin", "ymin", "xmax", "ymax"), thing[1:]):
                    ElementTree.SubElement(corners, corner).text = str(value)
            (folder / "Annotations" / f"{name}.xml").write_bytes(ElementTree.tostring(root, encoding="utf-8"))


# --- training


def test_a_run_learns_is_evaluated_and_predicts(detect, tmp_path, capsys, monkeypatch, drawn_boxes):
    monkeypatch.setattr(detection, "LOWEST_SCORE", 0.0)  # after so few steps the network is sure of nothing
    folder = detect(DEMO=True, EPOCHS=4, VALIDATE_EVERY=2)
    log = (folder / "log.csv").read_text("utf-8").splitlines()
    rows = [dict(zip(log[0].split(","), line.split(","))) for line in log[1:]]
    losses = [float(row["train_loss"]) for row in rows]
    assert len(rows) == 4 and losses[-1] < 0.8 * losses[0]
    assert [bool(row["val_ap"]) for row in rows] == [False, True] * 2
    assert {"last.pth", "best.pth", "result.json", "loss.png", "ap.png", "boxes.png", "flaws.txt"} <= {
        path.name for path in folder.iterdir()
    }
    best = json.loads((folder / "result.json").read_text("utf-8"))
    capsys.readouterr()

    detect(EVALUATE="val")  # the checkpoint, in its inference structure, gives what the run measured
    metrics = json.loads(Path("results/detection/metrics.json").read_text("utf-8"))
    assert metrics["ap50"] == pytest.approx(best["val_ap50"], abs=0.5) and metrics["images"] == 2
    assert set(metrics["classes"]) == {"crop", "weed"}
    rows = json.loads(Path("results/detection/predictions.json").read_text("utf-8"))
    truth = json.loads(Path("drawn/boxes/val.json").read_text("utf-8"))
    assert {row["image_id"] for row in rows} <= {image["id"] for image in truth["images"]}
    assert {row["category_id"] for row in rows} <= {category["id"] for category in truth["categories"]}

    assert Path("results/detection/flaws.txt").read_text("utf-8") == ""

    photos = tmp_path / "photos" / "deeper"
    photos.mkdir(parents=True)
    Image.open("drawn/images/val/000.jpg").resize((70, 90)).save(photos / "a.png")
    (photos / "b.png").write_bytes(b"no image")
    write_files(tmp_path / "photos", {"c.DNG": "", "d.pdf": "", "d.txt": "", ".thumbs/a.jpg": None,
                                      "__MACOSX/a.jpg": None, "._a.jpg": ""})  # fmt: skip
    capsys.readouterr()
    detect(3, PREDICT="photos")
    out = capsys.readouterr().out
    assert "b.png cannot be read as an image" in out and "in 1 images, drawn" in out and "; 3 images skipped" in out
    assert "c.DNG is a camera's raw file; export it" in out and "d.pdf is a document" in out and "d.txt" not in out
    assert "passed over 2 hidden or system folders (photos/.thumbs, photos/__MACOSX)" in out
    for results in ("photos", "photos/new", ".", "photos/../photos"):
        if results != ".":
            with pytest.raises(ConstantError, match="RESULTS must be a folder apart from PREDICT, photos, got"):
                detect(PREDICT="photos", RESULTS=results)
    with pytest.raises(ConstantError, match="RESULTS must be a folder apart"):
        detect(PREDICT="results/detection/boxes")
    rows = json.loads(Path("results/detection/predictions.json").read_text("utf-8"))
    assert rows and {row["file_name"] for row in rows} == {"deeper/a.png"} and {row["image_id"] for row in rows} == {1}
    for row in rows:
        x, y, width, height = row["bbox"]
        assert 0 <= x and 0 <= y and x + width <= 70.01 and y + height <= 90.01 and 0 < row["score"] <= 1
    assert Image.open(tmp_path / "results" / "detection" / "boxes" / "deeper" / "a.png.png").width > 300


def test_a_resumed_run_ends_with_the_same_bits(detect, monkeypatch):
    changes = dict(DEMO=True, EPOCHS=2, DROP_PATH=0.2)
    straight = torch.load(detect(OUTPUT="straight", **changes) / "last.pth", weights_only=True)
    compute, calls = detection.compute_loss, []

    def fail(model, batch):
        calls.append(None)
        if len(calls) == 4:  # of 2 steps in each epoch
            raise UserError("the power fails")
        return compute(model, batch)

    monkeypatch.setattr(detection, "compute_loss", fail)
    with pytest.raises(UserError, match="the power fails"):
        detect(OUTPUT="again", **changes)
    monkeypatch.setattr(detection, "compute_loss", compute)
    stopped = torch.load(Path("again/unireplknet_test/last.pth"), weights_only=True)
    assert stopped["epoch"] == 1 and stopped["pictures"] == 4
    resumed = torch.load(detect(OUTPUT="again", RESUME="auto", **changes) / "last.pth", weights_only=True)
    for part in ("state_dict", "state_dict_ema", "optimizer", "epoch", "ema_updates"):
        assert equal(straight[part], resumed[part]), part
    losses = [[row["train_loss"] for row in run["history"]] for run in (straight, resumed)]
    assert losses[0] == losses[1]


def equal(one, other):
    """Whether two nested values have the same bits."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


def test_tiny_and_oblong_images_are_trained_and_predicted(detect, tmp_path, drawn_boxes):
    sizes = {"a": (5, 5), "b": (2000, 20), "c": (20, 2000), "d": (3000, 1), "e": (1, 1)}
    for part in ("train", "val"):
        write_files(tmp_path / "odd", {f"{part}/{name}.png": size for name, size in sizes.items()} | {
            f"{part}/{name}.xml": xml([("cell", 0, 0, *size)], size=size) for name, size in sizes.items()
        })  # fmt: skip
    with pytest.raises(UserError, match="5 images are in train and in train"):
        detect(DATA="odd", VAL="train")
    detect(DATA="odd", EPOCHS=1, VALIDATE_EVERY=1)
    detect(PREDICT="odd/val", SCORE=0.0)
    assert len(list(Path("results/detection/boxes").iterdir())) == len(sizes)


def test_pretrained_weights_are_loaded_and_the_names_of_classes_kept(detect, tmp_path, capsys):
    torch.manual_seed(3)
    network = timm.create_model("unireplknet_test", num_classes=5)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    voc = {f"bild {number}": [("Zelle", 5, 5, 25, 20), ("细胞", 10, 2, 30, 28)] for number in range(2)}
    write_voc(tmp_path / "voc", dict(train=voc, val={"andere": [("细胞", 1, 1, 20, 20)]}))
    folder = detect(DATA="voc", PRETRAINED="weights.pth", EPOCHS=1, BATCH_SIZE=2, LEARNING_RATE=1e-8, EMA_DECAY=0.0)
    checkpoint = torch.load(folder / "last.pth", weights_only=True)
    name = "stages.2.0.dwconv.lk_origin.weight"
    [key] = [key for key in checkpoint["state_dict"] if key.endswith(name)]
    torch.testing.assert_close(checkpoint["state_dict"][key], network.state_dict()[name], rtol=0, atol=1e-6)
    assert checkpoint["category_ids"] == {"Zelle": 1, "细胞": 2} and "pretrained  " in capsys.readouterr().out
    with pytest.raises(UserError, match="the classes there is"):
        detect(DATA="voc", CLASSES=["细胞"], RESUME="auto", BATCH_SIZE=2, EMA_DECAY=0.0)


# --- annotations with flaws


GOOD = ("cell", 5, 5, 25, 20)
XML = "Annotations/a.xml"
VOC_FLAWS = {
    "no area": (dict(things=[("cell", 9, 9, 9, 20)]), XML, "object 2 (cell) has no area (9, 9, 9, 20); left out"),
    "turned": (dict(things=[("cell", 20, 9, 10, 20)]), XML, "object 2 (cell) has no area (20, 9, 10, 20); left out"),
    "outside": (dict(things=[("cell", 45, 9, 60, 20)]), "a.jpg", "lies outside the image (45, 9, 60, 20); left out"),
    "beyond": (dict(things=[("cell", 30, 9, 60, 20)]), "a.jpg", "(cell) reaches 20 pixels out of the image; clipped"),
    "unlisted": (dict(things=[("dust", 1, 1, 9, 9)]), "a.jpg", "class 'dust' is not one of cell; left out"),
    "no class": (dict(things=[("", 1, 1, 9, 9)]), XML, "object 2 has no known class; left out"),
    "no number": (dict(things=[("cell", "x", 1, 9, 9)]), XML, "object 2 (cell) has no four numbers as its box"),
    "not finite": (dict(things=[("cell", "nan", 1, 9, "inf")]), XML, "object 2 (cell) has no four numbers as its box"),
    "twice": (dict(things=[GOOD]), XML, "object 2 (cell) is there twice; used once"),
    "no XML": (dict(missing=XML), "train.txt", "a has no XML file; left out"),
    "no image": (dict(missing="JPEGImages/a.jpg"), XML, "its image does not exist; left out"),
    "broken XML": (dict(content={XML: b"<annotation><object>"}), XML, "cannot be read: no element found"),
    "empty XML": (dict(content={XML: b""}), XML, "cannot be read: no element found"),
    "broken image": (dict(content={"JPEGImages/a.jpg": b"GIF"}), "a.jpg", "cannot be read as an image"),
    "size": (dict(size=(30, 40)), "a.jpg", "has 30 x 40 pixels, its annotation says 40 x 30; left out"),
    "listed twice": (dict(content={"ImageSets/Main/train.txt": b"a\nb\n\na\n"}), "train.txt", "a is listed twice"),
}


@pytest.mark.parametrize("name", VOC_FLAWS)
def test_flaws_of_voc_files_are_named_and_left_out(name, tmp_path, capsys):
    change, file, message = VOC_FLAWS[name]
    write_voc(tmp_path, dict(train=dict(a=[GOOD, *change.get("things", [])], b=[GOOD])))
    if "missing" in change:
        (tmp_path / change["missing"]).unlink()
    for path, content in change.get("content", {}).items():
        (tmp_path / path).write_bytes(content)
    if "size" in change:
        Image.new("RGB", change["size"]).save(tmp_path / "JPEGImages/a.jpg")
    flaws = boxes.Flaws()
    images, classes = boxes.read_boxes(tmp_path, "train", flaws, ["cell"])
    [line] = flaws.lines
    assert file in line.split(": ")[0] and message in line and "\n" not in line
    left = 2 if "things" in change or name == "listed twice" else 1
    assert len(images) == left and flaws.images == 2 - left and list(classes) == ["cell"]
    assert images[-1].boxes[0] == list(GOOD[1:]) and len(images[-1].boxes) == 1
    for image in images:
        for x1, y1, x2, y2 in image.boxes:
            assert 0 <= x1 < x2 <= 40 and 0 <= y1 < y2 <= 30
    flaws.report()
    assert line in (out := capsys.readouterr().out) and "flaws       1 " in out


def coco(**changes):
    """A COCO file's content: two images of 40 x 30, a box each."""
    image = dict(width=40, height=30)
    box = dict(category_id=7, bbox=[5, 5, 20, 15], iscrowd=0)
    content = dict(
        images=[dict(id=1, file_name="a.jpg", **image), dict(id=2, file_name="b.jpg", **image)],
        annotations=[dict(id=1, image_id=1, **box), dict(id=2, image_id=2, **box)],
        categories=[dict(id=7, name="cell")],
    )
    return {key: content[key] + changes.get(key, []) for key in content}


BOX = dict(id=3, image_id=1, category_id=7, bbox=[1, 1, 9, 9])
COCO_FLAWS = {
    "no area": (dict(annotations=[BOX | dict(bbox=[1, 1, 0, 9])]), "annotation 3 (cell) has no area"),
    "negative": (dict(annotations=[BOX | dict(bbox=[9, 9, -3, 9])]), "annotation 3 (cell) has no area"),
    "outside": (dict(annotations=[BOX | dict(bbox=[50, 1, 9, 9])]), "lies outside the image"),
    "three": (dict(annotations=[BOX | dict(bbox=[50, 1, 9])]), "annotation 3 (cell) has no four numbers as its box"),
    "text": (dict(annotations=[BOX | dict(bbox=["x", 1, 9, 9])]), "annotation 3 (cell) has no four numbers"),
    "huge": (dict(annotations=[BOX | dict(bbox=[1, 1, 10**400, 9])]), "annotation 3 (cell) has no four numbers"),
    "no box": (dict(annotations=[dict(id=3, image_id=1, category_id=7)]), "annotation 3 (cell) has no four numbers"),
    "category": (dict(annotations=[BOX | dict(category_id=8)]), "annotation 3 has no known class; left out"),
    "image": (dict(annotations=[BOX | dict(image_id=5)]), "annotation 3 is of image 5, which is not listed; left out"),
    "id": (dict(annotations=[BOX | dict(id=2)]), "annotation 2: its id occurs twice; used"),
    "missing": (dict(images=[dict(id=4, file_name="c.jpg")]), "image c.jpg does not exist"),
    "no name": (dict(images=[dict(id=4)]), "image {'id': 4} has no file_name"),
}


@pytest.fixture
def coco_folder(tmp_path):
    """A folder with two images, and a function that writes annotations/train.json."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / f"{name}.jpg")
    return lambda content: (tmp_path / "annotations" / "train.json").write_text(content, "utf-8")


@pytest.mark.parametrize("name", COCO_FLAWS)
def test_flaws_of_coco_files_are_named_and_left_out(name, coco_folder, tmp_path):
    changes, message = COCO_FLAWS[name]
    coco_folder(json.dumps(coco(**changes)))
    flaws = boxes.Flaws()
    images, classes = boxes.read_boxes(tmp_path, "train", flaws)
    [line] = flaws.lines
    assert message in line and ("train.json: " in line or "a.jpg: " in line)
    assert [image.path.name for image in images] == ["a.jpg", "b.jpg"] and classes == {"cell": 7}
    assert [len(image.boxes) for image in images] == ([2, 1] if name == "id" else [1, 1])


def test_crowds_are_neither_trained_nor_counted(coco_folder, tmp_path, capsys):
    coco_folder(json.dumps(coco(annotations=[BOX | dict(iscrowd=1)])))
    images, ids = boxes.read_boxes(tmp_path, "train", boxes.Flaws())
    assert images[0].ignored == [False, True]
    augment = detection.Augmentation(40, 64, 1.0, 0.0, 0.0, False, 0.0)
    pixels, target = detection.TrainingImages(images, ["cell"], augment)[0]
    assert pixels.shape == (3, 64, 64) and len(target["boxes"]) == 1
    first = boxes.to_coco(images, ids)["annotations"][1]
    assert first["iscrowd"] == 1 and first["category_id"] == 7
    capsys.readouterr()
    detection.print_summary(dict(arch="x", classes=["cell"]), images, images[1:], 1, 1)
    out = capsys.readouterr().out
    assert "training    2 images with 2 boxes: 2 cell, and 1 that are ignored, as crowds or difficult\n" in out
    assert "validation  1 images with 1 boxes: 1 cell\n" in out


REFUSED = {
    "no JSON": ("{", "train.json is no COCO file of boxes ("),
    "a list": ("[]", "train.json is no COCO file of boxes ("),
    "no images": (json.dumps(dict(categories=[], annotations=[])), "it lacks 'images'"),
    "wrong rows": (json.dumps(dict(categories=[], annotations=[3], images=[])), "must be lists of dictionaries"),
    "nested": ("[" * 10**5, "train.json is no COCO file of boxes ("),
    "image ids": (json.dumps(coco(images=[dict(id=2, file_name="c.jpg")])), "two images have the id 2"),
    "categories": (json.dumps(coco(categories=[dict(id=7, name="x")])), "category 7 'x' occurs twice"),
    "names": (
        json.dumps(coco(categories=[dict(id=8, name="cell")], annotations=[BOX | dict(category_id=8)])),
        "category 8 'cell' occurs twice",
    ),
    "no id": (json.dumps(coco(categories=[dict(name="x")])), "a category has no name or whole number as its id"),
    "nothing": (json.dumps(dict(categories=[], annotations=[], images=[])), "leaves no image that can be used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_coco_files_that_mean_nothing_are_refused(name, coco_folder, tmp_path):
    content, message = REFUSED[name]
    coco_folder(content)
    with pytest.raises(UserError) as error:
        boxes.read_boxes(tmp_path, "train", boxes.Flaws())
    assert message in str(error.value) and "train.json" in str(error.value) and "\n" not in str(error.value)


def test_data_that_are_not_there_are_described(detect, tmp_path):
    with pytest.raises(UserError, match=r"there is no folder drawn; expected Pascal VOC \(Annotations/\*.xml"):
        detect()
    write_voc(tmp_path / "voc", dict(train=dict(a=[GOOD]), val=dict(b=[])))
    with pytest.raises(UserError, match=r"voc has no part 'test' \(train, val is there\); expected Pascal VOC"):
        boxes.read_boxes(tmp_path / "voc", "test", boxes.Flaws())
    with pytest.raises(UserError, match="val.txt leaves no box that can be used; annotate it"):
        detect(DATA="voc")
    with pytest.raises(UserError, match="1 images are in train and in train, such as .*a.jpg, so validation"):
        detect(DATA="voc", VAL="train")
    with pytest.raises(UserError, match="there is no checkpoints/detection/.*best.pth; train first"):
        detect(DATA="voc", PREDICT="x")
    for constants in (dict(MODEL="vit_tiny_patch16_224"), dict(EVALUATE="val", PREDICT="x"), dict(RESUME="x.pth")):
        with pytest.raises(ConstantError):
            detect(DATA="voc", **constants)
    assert not list(Path("checkpoints").glob("detection/*/*"))


# --- what annotation programs save


def write_files(folder, files):
    """Write {path: None, an image of 40 x 30; (width, height), an image; a list of boxes, their XML; a dict, JSON; text
    or bytes}, below `folder`."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None or isinstance(content, tuple):
            Image.new("RGB", content or (40, 30), "grey").save(path)
        elif isinstance(content, list):
            path.write_text(xml(content), "utf-8")
        elif isinstance(content, dict):
            path.write_text(json.dumps(content), "utf-8")
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def xml(things, head="", size=(40, 30)):
    """The text of a VOC annotation, with more elements as its `head`."""
    text = f"<annotation>{head}<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for name, *box in things:
        corners = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
        text += f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
    return f"{text}</annotation>"


def named(*names, **changes):
    """A COCO file of images with these names, a box each."""
    content = coco()
    content["images"] = [dict(id=key, file_name=name) for key, name in enumerate(names, start=1)]
    content["annotations"] = [BOX | dict(id=key, image_id=key) | changes for key in range(1, len(names) + 1)]
    return content


LIST, NFD, NFC = "ImageSets/Main/train.txt", "Zu\u0308ge", "Z\u00fcge"
VOC_LIST = {"Annotations/a.xml": [GOOD], "JPEGImages/a.jpg": None}
LAYOUTS = {  # files, part, images that it has
    "Roboflow VOC": ({"valid/a.jpg": None, "valid/a.xml": [GOOD], "train/a.jpg": None}, "val", ["valid/a.jpg"]),
    "Roboflow COCO": ({"valid/_annotations.coco.json": named("a.jpg"), "valid/a.jpg": None}, "val", ["valid/a.jpg"]),
    "validation": ({"validation/x/a.jpg": None, "validation/y/a.xml": [GOOD]}, "valid", ["validation/x/a.jpg"]),
    "folders of folders": (
        {f"{part}/{place}": content for part in ("train", "val")
         for place, content in (("images/a.png", None), ("Annotations/a.XML", [GOOD]))}, "train", ["train/images/a.png"]
    ),
    "annotations of a part": (
        {f"{place}/{part}/a.{ending}": content for part in ("train", "val")
         for place, ending, content in (("annotations", "xml", [GOOD]), ("images", "jpg", None))},
        "val", ["images/val/a.jpg"],
    ),
    "images": ({LIST: "a\n", "Annotations/a.xml": [GOOD], "images/a.jpg": None}, "train", ["images/a.jpg"]),
    "beside": ({LIST: "a\n", "images/a.xml": [GOOD], "images/a.jpg": None}, "train", ["images/a.jpg"]),
    "masks of one name": (VOC_LIST | {LIST: "a", "SegmentationClass/a.png": None}, "train", ["JPEGImages/a.jpg"]),
    "with extension": (VOC_LIST | {LIST: "a.jpg\r\n"}, "train", ["JPEGImages/a.jpg"]),
    "as a path": (VOC_LIST | {LIST: "C:\\photos\\JPEGImages\\a.JPG\n"}, "train", ["JPEGImages/a.jpg"]),
    "tab": (VOC_LIST | {LIST: "a\t-1\n"}, "train", ["JPEGImages/a.jpg"]),
    "two paths": (VOC_LIST | {LIST: "./JPEGImages/a.jpg ./Annotations/a.xml\n"}, "train", ["JPEGImages/a.jpg"]),
    "spaces": ({LIST: "a b 1", "Annotations/a b 1.xml": [GOOD], "JPEGImages/a b 1.jpg": None}, "train",
               ["JPEGImages/a b 1.jpg"]),
    "dots": ({LIST: "v1.2", "Annotations/v1.2.xml": [GOOD], "JPEGImages/v1.2.jpg": None, "JPEGImages/v1.jpg": None},
             "train", ["JPEGImages/v1.2.jpg"]),
    "subfolders": (
        VOC_LIST | {LIST: "s/a\na\n", "Annotations/s/a.xml": [GOOD], "JPEGImages/s/a.jpg": None}, "train",
        ["JPEGImages/s/a.jpg", "JPEGImages/a.jpg"],
    ),
    "NFD": ({LIST: NFC, f"Annotations/{NFD}.xml": [GOOD], f"JPEGImages/{NFC}.jpg": None}, "train",
            [f"JPEGImages/{NFC}.jpg"]),
    "of two by name": (
        {LIST: "a", "Annotations/a.xml": xml([GOOD], "<filename>a.jpg</filename>"), "JPEGImages/a.jpg": None,
         "JPEGImages/a.png": None}, "train", ["JPEGImages/a.jpg"]),
    "of two by size": (VOC_LIST | {LIST: "a", "JPEGImages/a.png": (20, 15)}, "train", ["JPEGImages/a.jpg"]),
    "folders of the part first": (
        {"annotations/train.json": named("a.jpg"), "images/a.jpg": None, "images/train/a.jpg": None,
         "images/val/a.jpg": None}, "train", ["images/train/a.jpg"]),
    "folder of the name first": (
        {"annotations/train.json": named("x/a.jpg"), "images/x/a.jpg": None, "images/train/a.jpg": None}, "train",
        ["images/x/a.jpg"]),
    "masks beside": ({"train.json": named("a.png"), "masks/train/a.png": None, "images/train/a.png": None}, "train",
                     ["images/train/a.png"]),
    "COCO by path": (
        {"annotations/instances_train2017.json": named("a.jpg"), "images/train2017/a.jpg": None,
         "images/train2014/a.jpg": None, "images/val2017/a.jpg": None}, "annotations/instances_train2017.json",
        ["images/train2017/a.jpg"]),
    "COCO, one year": (
        {"annotations/instances_train2017.json": named("a.jpg"), "train2017/a.jpg": None, "val2017/a.jpg": None},
        "train", ["train2017/a.jpg"]),
    "names of elsewhere": (
        {"train.json": named("images\\a.jpg", "/home/x/b.jpg", "D:\\c.jpg", "https://x.org/f%20g.jpg?size=1",
                             "../../media/E.JPG", f"{NFD}.jpg"),
         **{f"images/{name}.jpg": None for name in ("a", "b", "c", "f g", "e", NFC)}, "images/b.jpg.png": None},
        "train", [f"images/{name}.jpg" for name in ("a", "b", "c", "f g", "e", NFC)]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_annotation_programs_are_read(name, tmp_path):
    files, part, expected = LAYOUTS[name]
    write_files(tmp_path, files)
    flaws = boxes.Flaws()
    images, _ = boxes.read_boxes(tmp_path, part, flaws)
    assert [image.path.relative_to(tmp_path).as_posix() for image in images] == expected and not flaws.lines
    assert [image.counted() for image in images] == [["cell"]] * len(expected)


@pytest.mark.parametrize(("files", "part", "message"), [
    ({f"annotations/instances_train{year}.json": named("a.jpg") for year in (2014, 2017)}, "train",
     "instances_train2014.json and .*instances_train2017.json for the part 'train'; name one .* as --train, --val"),
    ({LIST: "a\n", "train.json": named("a.jpg")}, "train", "train.txt and .*train.json for the part"),
    ({"valid/a.xml": [GOOD], "validation/a.xml": [GOOD]}, "val", "valid and .*validation for the part 'val'"),
    ({"train.json": named("a.jpg"), "a.jpg": None, "images/a.jpg": None}, "train",
     "train.json: image a.jpg may be .*a.jpg or .*images/a.jpg; remove one"),
    ({"train.json": named("q/a.jpg"), "x/a.jpg": None, "y/a.jpg": None}, "train", "image q/a.jpg may be"),
    ({"Annotations/a.xml": [GOOD], "images/a.jpg": None}, "train",
     r"has no part 'train' \(nothing is there\); list the names of its images in ImageSets/Main/train.txt, one a line"),
    ({"train.json": named("a.jpg", iscrowd=1), "a.jpg": None}, "train", "train.json has only boxes that are ignored"),
    ({"data.yaml": "names: [a]", "train/images/a.jpg": None}, "train", "YOLO's labels/.* are not read: export"),
    ({"images/train/a.jpg": None, "labels/train/a.txt": "0 .5 .5 1 1"}, "train", "YOLO's labels/.* are not read"),
    ({"train/a.xml": [GOOD], "train/a.jpg": None}, "test", r"no part 'test' \(train is there\); expected Pascal VOC"),
    ({"result.json": named("a.jpg")}, "x" * 5000, r"no part 'xx.*…x+' \(result.json is there\)"),
    ({"train.json": "\u7ec6\u80de".encode("gbk")}, "train", "train.json is not UTF-8; save it as UTF-8"),
    ({"train.json": coco(categories=[dict(id=8, name="\ud800")])}, "train", "a category has no name or"),
    ({"train.json": named("a.jpg", "b.jpg", bbox=[20, 10, 38, 28]), "a.jpg": None, "b.jpg": None}, "train",
     "2 of 2 boxes reach out of their images, but none if its numbers are x1, y1, x2, y2; save each bbox"),
])  # fmt: skip
def test_what_is_ambiguous_or_of_another_kind_is_refused(files, part, message, tmp_path):
    write_files(tmp_path, files)
    with pytest.raises(UserError, match=message):
        boxes.read_boxes(tmp_path, part, boxes.Flaws())


CELL = "\u7ec6\u80de"
ODD = {  # the XML of an image, its flaw
    "namespace": ("<annotation xmlns='http://x.org'>" + xml([GOOD])[12:], None),
    "GBK": ("<?xml version='1.0' encoding='GB2312'?>".encode() + xml([(CELL, *GOOD[1:])]).encode("gbk"), None),
    "Shift-JIS": ("<?xml version='1.0' encoding='shift_jis'?>".encode() + xml([GOOD]).encode("shift_jis"), None),
    "UTF-16": ("<?xml version='1.0' encoding='utf-16'?>" + xml([GOOD]), None),
    "an empty line first": (f"\n<?xml version='1.0'?>{xml([GOOD])}", None),
    "GBK, not declared": (xml([(CELL, *GOOD[1:])]).encode("gbk"), "cannot be read: it is not utf-8; save it as UTF-8"),
    "unknown encoding": ("<?xml version='1.0' encoding='klingon'?><a/>", "it is not klingon; save it as UTF-8"),
    "CVAT": ("<annotations><image name='a.jpg'><box xtl='1'/></image></annotations>", "its <annotations> is no <anno"),
    "web page": ("<html><body>404</body></html>", "its <html> is no <annotation> of Pascal VOC; export it in that"),
    "other content": ("<annotation><image><box/></image></annotation>", "is no <annotation> of Pascal VOC"),
    "cut off": (xml([GOOD])[:-9], "cannot be read: unclosed token: line 1, column"),
    "normalised": (xml([GOOD, ("cell", 0.1, 0.1, 0.6, 0.9)]), "normalised: multiply by width and height"),
    "narrow": (xml([GOOD, ("cell", 5, 5, 5.5, 20)]), "object 2 (cell) is narrower than a pixel (5, 5, 5.5, 20)"),
}


@pytest.mark.parametrize("name", ODD)
def test_xml_files_of_other_kinds(name, tmp_path):
    content, flaw = ODD[name]
    write_files(tmp_path, {LIST: "b\na\n", "JPEGImages/a.jpg": None, "JPEGImages/b.jpg": None,
                           "Annotations/b.xml": [GOOD], "Annotations/a.xml": content})  # fmt: skip
    flaws = boxes.Flaws()
    images, _ = boxes.read_boxes(tmp_path, "train", flaws)
    assert [list(GOOD[1:])] * len(images) == [box for image in images for box in image.boxes]
    assert len(images) == (1 if flaws.images else 2) and len(flaws.lines) == (flaw is not None)
    assert flaw is None or flaw in flaws.lines[0] and "a.xml: " in flaws.lines[0]
    if name == "GBK":
        assert images[1].names == [CELL]


def test_an_xml_file_of_two_images_is_left_out(tmp_path):
    write_files(tmp_path, VOC_LIST | {LIST: "a\nb\n", "JPEGImages/a.png": None, "images/b.jpg": None,
                                      "Annotations/b.xml": [GOOD]})  # fmt: skip
    flaws = boxes.Flaws()
    images, _ = boxes.read_boxes(tmp_path, "train", flaws)
    assert [image.path.name for image in images] == ["b.jpg"] and flaws.images == 1
    assert "a.jpg or of " in flaws.lines[0] and "name the right one in <filename>" in flaws.lines[0]


def test_files_of_another_part_are_not_taken(tmp_path):
    write_files(tmp_path, {"test.json": named("a.jpg", "train/a.jpg", "b.jpg"), "images/train/a.jpg": None,
                           "images/b.jpg": None})  # fmt: skip
    flaws = boxes.Flaws()
    images, _ = boxes.read_boxes(tmp_path, "test", flaws)
    assert [image.image_id for image in images] == [2, 3] and "image a.jpg does not exist below" in flaws.lines[0]
    assert len(flaws.lines) == 1


def test_an_image_without_xml_file_in_a_folder_is_named(tmp_path):
    write_files(tmp_path, {"train/a.jpg": None, "train/a.xml": [GOOD], "train/b.jpg": None, "train/.b.xml": [GOOD]})
    flaws = boxes.Flaws()
    images, _ = boxes.read_boxes(tmp_path, "train", flaws)
    assert len(images) == 1 and "b.jpg: has no XML file; left out" in flaws.lines[0]


NUMBERS = {
    "ids": (dict(images=[dict(id="4", file_name="c.jpg")], annotations=[BOX | dict(image_id=4.0, category_id="7")]), 1),
    "text": (dict(annotations=[BOX | dict(image_id="1.0", bbox=["1", " 2.5", 9, "1e1"])]), 0),
    "crowd": (dict(annotations=[BOX | dict(iscrowd="1"), BOX | dict(id=4, iscrowd=True, bbox=[9, 9, 9, 9])]), 0),
    "polygon": (dict(annotations=[dict(id=3, image_id=1, category_id=7, segmentation=[[1, 2, 9, 2, 5, "8"]])]), 0),
    "flat polygon": (dict(annotations=[BOX | dict(bbox=[], segmentation=[1, 2, 9, 8])]), 0),
    "two ids of one image": (dict(images=[dict(id=4, file_name="a.jpg")], annotations=[BOX | dict(image_id=4)]), 0),
    "an unused category": (dict(categories=[dict(id=0, name="cell")], annotations=[BOX]), 0),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_in_any_notation(name, coco_folder, tmp_path):
    changes, place = NUMBERS[name]
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "c.jpg")
    coco_folder(json.dumps(coco(**changes)))
    flaws = boxes.Flaws()
    images, ids = boxes.read_boxes(tmp_path, "train", flaws)
    assert ids == {"cell": 7} and flaws.images == 0
    if name == "two ids of one image":
        assert "image a.jpg is listed twice; used once, with the boxes of both" in flaws.lines[0]
    else:
        assert not flaws.lines
    image = images[0] if name != "ids" else images[2]
    expected = {"text": [1, 2.5, 10, 12.5], "polygon": [1, 2, 9, 8], "flat polygon": [1, 2, 9, 8]}
    assert expected.get(name, [1, 1, 10, 10]) in image.boxes
    assert sum(image.ignored) == (2 if name == "crowd" else 0)


@pytest.mark.parametrize("value", ["seven", 1.5, None, True, "", [1], {}, float("nan"), "9" * 5000])
def test_what_is_no_id(value):
    assert boxes.as_id(value) is None


def test_large_ids_stay_exact():
    assert boxes.as_id(str(2**60 + 1)) == 2**60 + 1 == boxes.as_id(2**60 + 1)


@pytest.mark.parametrize("mark", ["1", " True ", "true", "1.0", "yes"])
def test_difficult_objects_are_recognised(mark, tmp_path):
    text = xml([GOOD, ("cell", 1, 1, 9, 9)]).replace("</bndbox></object></ann", f"</bndbox><difficult>{mark}"
                                                     "</difficult></object></ann")  # fmt: skip
    write_files(tmp_path, {"train/a.jpg": None, "train/a.xml": text})
    assert boxes.read_boxes(tmp_path, "train", boxes.Flaws())[0][0].ignored == [False, True]


@pytest.mark.parametrize("orientation", range(5, 9))
def test_boxes_of_images_turned_by_exif_follow_them(orientation, tmp_path):
    """A bright rectangle on black: where it is in the upright image is where its box is."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[4:12, 20:36] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_files(tmp_path, {"train/a.xml": [("cell", 20, 4, 36, 12)], "train/b.jpg": (30, 40), "train/b.xml": [GOOD]})
    Image.fromarray(pixels).save(tmp_path / "train" / "a.png", exif=exif)
    flaws = boxes.Flaws()
    [image], _ = boxes.read_boxes(tmp_path, "train", flaws)
    rows, columns = np.nonzero(np.asarray(boxes.load_image(image.path))[..., 0])
    assert image.size == (30, 40)
    assert image.boxes == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
    assert "a.png: is turned by its EXIF data" in flaws.lines[0] and "b.jpg: has 30 x 40" in flaws.lines[1]


def test_wrong_files_as_lists_are_flaws(tmp_path, capsys):
    write_files(tmp_path, VOC_LIST | {"mine.txt": b"x" * 5000 + b"\n\0\n../../a\na\nhttp://[\n" + b"\xff\xfe\x80 1\n"})
    flaws = boxes.Flaws()
    images, _ = boxes.read_boxes(tmp_path, str(tmp_path / "mine.txt"), flaws)
    assert len(images) == 1 and len(flaws.lines) == 5 and max(map(len, flaws.lines)) < 300
    for name in ("a\0.jpg", "x" * 5000 + ".jpg", "\ud800.jpg"):
        write_files(tmp_path, {"train.json": named("a.jpg", name)})
        flaws = boxes.Flaws()
        assert len(boxes.read_boxes(tmp_path, "train", flaws)[0]) == 1
        assert "does not exist" in flaws.lines[0] and flaws.lines[0].isprintable()


def test_flaws_are_shown_before_what_they_lead_to(detect, tmp_path, capsys):
    things = [("cell", 0.1, 0.1, 0.5, number / 100) for number in range(20, 50)]
    write_voc(tmp_path / "voc", dict(train=dict(a=things), val=dict(b=[GOOD])))
    with pytest.raises(UserError, match="train.txt leaves no box that can be used; see the lines above"):
        detect(DATA="voc")
    out = capsys.readouterr().out
    assert "object 1 (cell) lies in the first pixel (0.1, 0.1, 0.5, 0.2); left out; its numbers seem" in out
    assert out.endswith("  and 10 more\nflaws       30 normalised boxes\n")
    with pytest.raises(UserError), boxes.Flaws(tmp_path / "flaws.txt") as flaws:
        boxes.read_boxes(tmp_path / "voc", "train", flaws)
    assert f"  and 10 more, see {tmp_path / 'flaws.txt'}\n" in capsys.readouterr().out
    assert len((tmp_path / "flaws.txt").read_text("utf-8").splitlines()) == 30


def test_classes_without_boxes_are_refused(detect, tmp_path):
    write_voc(tmp_path / "voc", dict(train=dict(a=[GOOD]), val=dict(b=[GOOD])))
    with pytest.raises(ConstantError, match="CLASSES must name each class once, got cell,cell"):
        detect(DATA="voc", CLASSES=["cell", "cell"])
    with pytest.raises(UserError, match="train.txt has no box of Cell; see the lines above"):
        detect(DATA="voc", CLASSES=["Cell"])
    with pytest.raises(UserError, match="train has no box of cel; take names from cell as CLASSES"):
        detect(DATA="voc", CLASSES=["cell", "cel"])


def test_a_list_may_lie_anywhere(tmp_path):
    write_voc(tmp_path / "voc", dict(train=dict(a=[GOOD], b=[GOOD])))
    (tmp_path / "mine.txt").write_text("b\n", "utf-8")
    images, _ = boxes.read_boxes(tmp_path / "voc", str(tmp_path / "mine.txt"), boxes.Flaws())
    assert [image.path.name for image in images] == ["b.jpg"]


# --- augmentation, network, metric, checkpoints


@pytest.mark.parametrize("size", [(90, 60), (30, 50), (400, 300)])
def test_boxes_follow_what_augmentation_does_to_an_image(size):
    """A bright rectangle on black: where it is in the square is where its box is."""
    x1, y1, x2, y2 = (round(factor * side) for factor, side in zip((0.3, 0.4, 0.6, 0.8), 2 * size))
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[y1:y2, x1:x2] = 255
    augment, seen = detection.Augmentation(64, 64, 1.5, 0.5, 0.5, True, 0.0), 0
    augment.FILL = (0, 0, 0)
    for seed in range(40):
        random.seed(seed)
        square, box, visible = augment(Image.fromarray(pixels), torch.tensor([[x1, y1, x2, y2]], dtype=torch.float32))
        rows, columns = np.nonzero(square[0].numpy() > 127)
        assert square.shape == (3, 64, 64) and 0 <= box.min() and box.max() <= 64
        if visible.all():
            seen += 1
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(box[0].numpy() - found).max() < 2.1
    assert seen > 20


@pytest.mark.parametrize("size", [(96, 160), (97, 61)])
def test_maps_of_any_image_size(size):
    pyramid = detection.Pyramid(detection.create_backbone("unireplknet_test", {}), 16).eval()
    with torch.no_grad():
        maps = list(pyramid(torch.zeros(1, 3, *size)).values())
    assert [tuple(features.shape[2:]) for features in maps[:4]] == [
        tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32)
    ]
    assert len(maps) == len(detection.STRIDES) and {features.shape[1] for features in maps} == {16}


@pytest.mark.parametrize("part", ["rpn", "roi_heads"])
def test_corners_are_not_rounded_by_mixed_precision(part):
    """bfloat16 has 8 bits, which are whole pixels from 128 on, and every second one from 256 on."""
    torch.manual_seed(0)
    settings = dict(img_size=320, anchor=4.0, channels=16, nms=0.5)
    model = detection.create_detector(
        detection.create_backbone("unireplknet_test", {}), 2, [0.5] * 3, [0.2] * 3, **settings
    ).eval()
    corners = []
    getattr(model, part).register_forward_hook(
        lambda module, _, output: corners.extend([output[0][0]["boxes"] if part == "roi_heads" else output[0][0]])
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model([torch.rand(3, 320, 320)])
    inside = corners[0][(corners[0] > 128) & (corners[0] < 319)]
    assert inside.dtype == torch.float32 and len(inside) > 10
    assert (inside != inside.round()).float().mean() > 0.9


def found(rows):
    """What `find_boxes` returns for one image."""
    values = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return dict(boxes=values[:, :4], labels=values[:, 4].long(), scores=values[:, 5])


def test_average_precision():
    image = boxes.BoxedImage(Path("a.jpg"), 3, (100, 100), [[0, 0, 40, 40], [50, 50, 90, 90]], ["x", "y"], [False] * 2)
    ids = dict(x=5, y=9, z=11)
    perfect = [[0, 0, 40, 40, 1, 0.9], [50, 50, 90, 90, 2, 0.8]]
    metrics, table = detection.average_precision([image], [found(perfect)], ids)
    assert metrics == pytest.approx(dict(ap=100, ap50=100, ap75=100)) and table["x"][0] == 1
    assert table["z"][0] == 0 and np.isnan(table["z"][1])
    assert detection.average_precision([image], [found([])], ids)[0]["ap50"] == 0
    half = [perfect[0], [50, 50, 90, 70.8, 2, 0.8]]  # IoU 0.52: counts at 0.5 only
    metrics, table = detection.average_precision([image], [found(half)], ids)
    assert metrics == pytest.approx(dict(ap=55, ap50=100, ap75=50)) and table["y"][1] == pytest.approx(10)
    swapped = [row[:4] + [3 - row[4], row[5]] for row in perfect]
    assert detection.average_precision([image], [found(swapped)], ids)[0]["ap50"] == 0
    image.ignored = [False, True]  # a box that is ignored: finding it is no error, nor is missing it
    for rows in (perfect, perfect[:1]):
        assert detection.average_precision([image], [found(rows)], ids)[0]["ap"] == pytest.approx(100)


CHECKPOINT_FLAWS = {
    "another task": (dict(task="segmentation"), "its task must be 'detection', got 'segmentation'"),
    "no settings": (dict(detector=None), "its detector must be a dictionary, got None"),
    "too wide": (dict(detector=dict(img_size=64, anchor=4.0, channels=10**9, nms=0.5)), "its detector's channels must"),
    "no ids": (dict(category_ids={}), "its category_ids must be a different whole number for each of its classes"),
    "other ids": (dict(category_ids=dict(crop=1, weed="2")), "its category_ids' weed must be a whole number"),
}


def test_checkpoints_are_checked(detect, tmp_path):
    folder = detect(DEMO=True, EPOCHS=1, VALIDATE_EVERY=1)
    whole = torch.load(folder / "best.pth", weights_only=True)
    for changes, message in CHECKPOINT_FLAWS.values():
        torch.save(whole | changes, tmp_path / "bad.pth")
        with pytest.raises(UserError, match="bad.pth cannot be used: ") as error:
            detect(EVALUATE="val", CHECKPOINT="bad.pth")
        assert message in str(error.value)


def test_drawn_scenes_are_read_back(tmp_path):
    write_scenes(tmp_path, dict(train=2), 96, 64)
    flaws = boxes.Flaws()
    images, ids = boxes.read_boxes(tmp_path, "train", flaws)
    assert len(images) == 2 and not flaws.lines and ids == dict(crop=1, weed=2)
    assert all(image.size == (96, 64) for image in images)
