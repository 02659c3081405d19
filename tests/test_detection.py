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

    photos = tmp_path / "photos" / "deeper"
    photos.mkdir(parents=True)
    Image.open("drawn/images/val/000.jpg").resize((70, 90)).save(photos / "a.png")
    (photos / "b.png").write_bytes(b"no image")
    capsys.readouterr()
    detect(3, PREDICT="photos")
    out = capsys.readouterr().out
    assert "b.png cannot be read as an image" in out and "1 images skipped" in out
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
    "no XML": (dict(missing=XML), XML, "does not exist; its image is left out"),
    "no image": (dict(missing="JPEGImages/a.jpg"), "JPEGImages/a", "does not exist as an image; left out"),
    "broken XML": (dict(content={XML: b"<annotation><object>"}), XML, "cannot be read (no element found"),
    "empty XML": (dict(content={XML: b""}), XML, "cannot be read (no element found"),
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
    "text": (dict(annotations=[BOX | dict(bbox=["1", 1, 9, 9])]), "annotation 3 (cell) has no four numbers"),
    "huge": (dict(annotations=[BOX | dict(bbox=[1, 1, 10**400, 9])]), "annotation 3 (cell) has no four numbers"),
    "no box": (dict(annotations=[dict(id=3, image_id=1, category_id=7)]), "annotation 3 (cell) has no four numbers"),
    "category": (dict(annotations=[BOX | dict(category_id=8)]), "annotation 3 has no known class; left out"),
    "image": (dict(annotations=[BOX | dict(image_id=5)]), "annotation 3 is of image 5, which is not listed; left out"),
    "id": (dict(annotations=[BOX | dict(id=2)]), "annotation 2: its id occurs twice; used"),
    "missing": (dict(images=[dict(id=4, file_name="c.jpg")]), "image c.jpg does not exist"),
    "no name": (dict(images=[dict(id=4)]), "image {'id': 4} has none; left out"),
    "twice": (dict(images=[dict(id=4, file_name="a.jpg")]), "image a.jpg is listed twice; used once"),
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


def test_crowds_are_neither_trained_nor_counted(coco_folder, tmp_path):
    coco_folder(json.dumps(coco(annotations=[BOX | dict(iscrowd=1)])))
    images, ids = boxes.read_boxes(tmp_path, "train", boxes.Flaws())
    assert images[0].ignored == [False, True]
    augment = detection.Augmentation(40, 64, 1.0, 0.0, 0.0, False, 0.0)
    pixels, target = detection.TrainingImages(images, ["cell"], augment)[0]
    assert pixels.shape == (3, 64, 64) and len(target["boxes"]) == 1
    first = boxes.to_coco(images, ids)["annotations"][1]
    assert first["iscrowd"] == 1 and first["category_id"] == 7


REFUSED = {
    "no JSON": ("{", "train.json is no COCO file of boxes ("),
    "a list": ("[]", "train.json is no COCO file of boxes ("),
    "no images": (json.dumps(dict(categories=[], annotations=[])), "it lacks 'images'"),
    "wrong rows": (json.dumps(dict(categories=[], annotations=[3], images=[])), "must be lists of dictionaries"),
    "nested": ("[" * 10**5, "train.json is no COCO file of boxes ("),
    "image ids": (json.dumps(coco(images=[dict(id=2, file_name="c.jpg")])), "two images have the id 2"),
    "categories": (json.dumps(coco(categories=[dict(id=7, name="x")])), "category 7 'x' occurs twice"),
    "names": (json.dumps(coco(categories=[dict(id=8, name="cell")])), "category 8 'cell' occurs twice"),
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
    with pytest.raises(UserError, match="the images of val have no boxes that can be used"):
        detect(DATA="voc")
    with pytest.raises(UserError, match="1 images are in train and in train, such as .*a.jpg, so validation"):
        detect(DATA="voc", VAL="train")
    with pytest.raises(UserError, match="there is no checkpoints/detection/.*best.pth; train first"):
        detect(DATA="voc", PREDICT="x")
    for constants in (dict(MODEL="vit_tiny_patch16_224"), dict(EVALUATE="val", PREDICT="x"), dict(RESUME="x.pth")):
        with pytest.raises(ConstantError):
            detect(DATA="voc", **constants)
    assert not list(Path("checkpoints").glob("detection/*/*"))


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
