"""examples/segmentation.py on drawn fields: training, resuming, flawed annotations, evaluation, prediction, export."""

import csv
import io
import math
import re
import shutil
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from kill import flat
from PIL import Image

from common import dense
from common.faults import Interrupt
from common.options import ConstantError, UserError, current_values
from examples import masks, segmentation
from examples.scene import CLASSES, write_scenes

DEFAULTS = current_values(vars(segmentation))
SMALL = dict(MODEL="unireplknet_test", IMG_SIZE=[48, 64], BATCH_SIZE=4, EPOCHS=4, WORKERS=0, WARMUP_EPOCHS=0.0)
SMALL |= dict(DEVICE="cpu", AMP="off", OPTIMIZER="adamw", LEARNING_RATE=1e-2, HEAD_WIDTH=8, DATA="fields")
SMALL |= dict(EMA_DECAY=0.5)
RUN = Path("checkpoints/segmentation/unireplknet_test")


def run_in(folder, patch, status, constants):
    """Call main() in `folder` with some constants changed."""
    assert set(constants) <= set(DEFAULTS)
    patch.chdir(folder)
    for name, value in (DEFAULTS | SMALL | constants).items():
        patch.setattr(segmentation, name, value)
    assert (segmentation.main() or 0) == status


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with drawn fields, one of whose masks is broken, and a run on them, which the tests only read."""
    folder = tmp_path_factory.mktemp("segmentation")
    write_scenes(folder / "fields", dict(train=9, val=3), 64, 48)
    (folder / "fields/masks/train/008.png").write_bytes(b"")
    draw = dense.plot_curve
    with pytest.MonkeyPatch.context() as patch:
        # After the last epoch only: curves take longer than the epochs that they show.
        patch.setattr(dense, "plot_curve", lambda history, *rest: len(history) < 8 or draw(history, *rest))
        run_in(folder, patch, 0, dict(EPOCHS=8, VALIDATE_EVERY=3))
    return folder


@pytest.fixture
def fields(tmp_path, trained):
    """A copy of the drawn fields alone, without the broken mask."""
    shutil.copytree(trained / "fields", tmp_path / "fields")
    (tmp_path / "fields/masks/train/008.png").unlink()
    (tmp_path / "fields/images/train/008.jpg").unlink()
    return tmp_path / "fields"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call main() in `tmp_path` with some constants changed, without figures, which take longer than the epochs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dense, "plot_curve", lambda *arguments: None)
    monkeypatch.setattr(segmentation, "plot_sheet", lambda *arguments: None)
    return lambda status=0, **constants: run_in(tmp_path, monkeypatch, status, constants)


def read_csv(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def table():
    values = np.full(256, masks.UNKNOWN, np.uint8)
    values[:3], values[255] = range(3), masks.IGNORED
    return masks.ClassTable(list(CLASSES), values, {})


def network_of(folder, merge=True):
    checkpoint = dense.load_dense(
        folder / RUN / "best.pth", "segmentation", segmentation.build, segmentation.check_fields_of
    )
    return checkpoint, dense.build_dense(checkpoint, segmentation.build, torch.device("cpu"), merge)


# --- a run


def test_a_run_learns_and_leaves_its_files(trained):
    rows = read_csv(trained / RUN / "log.csv")
    assert len(rows) == 8 and float(rows[-1]["train_loss"]) < 0.75 * float(rows[0]["train_loss"])
    assert [row["epoch"] for row in rows if row["val_miou"]] == ["3", "6", "8"]
    rows = [row for row in rows if row["val_miou"]]
    assert {"epoch", "lr", "val_loss", "val_miou", "val_acc", "val_iou_soil", "seconds"} <= set(rows[0])
    for name in ("last.pth", "last.1.pth", "best.pth", "result.json", "loss.png", "miou.png"):
        assert (trained / RUN / name).stat().st_size > 100, name
    assert [row["class_name"] for row in read_csv(trained / RUN / "iou.csv")] == list(CLASSES)
    best = max(float(row["val_miou"]) for row in rows)
    checkpoint, _ = network_of(trained)
    assert checkpoint["best_metric"] == pytest.approx(best) and best > 25
    assert Image.open(trained / RUN / "sheet.png").width > 1000
    [flaw] = read_csv(trained / RUN / "skipped.csv")
    assert flaw["path"].endswith("008.png") and "empty" in flaw["reason"]


def test_a_resumed_run_has_the_bits_of_a_straight_one(fields, run, monkeypatch, capsys):
    """It is stopped in the first of two steps of the second epoch."""
    calls, compute, short = [], segmentation.SegmentationLoss.__call__, dict(EPOCHS=3, BATCH_SIZE=3, VALIDATE_EVERY=3)

    def stop(self, model, batch):
        calls.append(0)
        if len(calls) == 3:
            Interrupt.active.note(signal.SIGTERM)
        return compute(self, model, batch)

    monkeypatch.setattr(segmentation.SegmentationLoss, "__call__", stop)
    run(143, **short)
    stopped = torch.load(RUN / "last.pth", weights_only=True)
    assert (stopped["epoch"], stopped["pictures"]) == (1, 3) and len(calls) == 3
    run(**short, RESUME="auto")
    resumed = torch.load(RUN / "last.pth", weights_only=True)
    assert "1 epochs finished, 3 images of the next" in capsys.readouterr().out
    monkeypatch.setattr(segmentation.SegmentationLoss, "__call__", compute)
    run(**short)  # a new run, which renames the folder of the other one
    assert "the earlier run" in capsys.readouterr().out
    assert torch.load(Path(f"{RUN}.1", "last.pth"), weights_only=True)["history"] == resumed["history"]
    straight = torch.load(RUN / "last.pth", weights_only=True)
    parts = ("state_dict", "state_dict_ema", "ema_updates", "optimizer", "epoch", "history", "best_metric")
    one, other = (flat({part: checkpoint[part] for part in parts}) for checkpoint in (resumed, straight))
    assert one.keys() == other.keys() and len(one) > 300
    assert [key for key in one if not np.array_equal(one[key], other[key])] == []


# --- annotations


def test_masks_find_their_images(tmp_path):
    for name in ("images/a/1.jpg", "images/2.png", "images/3.jpg", "images/.hidden.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("masks/a/1.png", "masks/2_mask.png", "masks/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    pairs, flaws = masks.find_pairs(tmp_path / "images", tmp_path / "masks")
    assert [(pair.name, Path(pair.mask).name) for pair in pairs] == [("2.png", "2_mask.png"), ("a/1.jpg", "1.png")]
    assert [(Path(flaw.path).name, flaw.reason[:8]) for flaw in flaws] == [("3.jpg", "has no m"), ("4.png", "has no i")]


@pytest.mark.parametrize(
    "image, mask",
    [
        ("1.jpg", "1.jpg.png"),
        ("1.jpg", "1.jpg_mask.png"),
        ("ISIC_1.JPG", "ISIC_1_Segmentation.PNG"),
        ("1.jpg", "1_MASK.tif"),
        ("1.jpg", "1_l.png"),
        ("a_1_leftImg8bit.png", "a_1_gtFine_labelIds.png"),
        ("a_1_leftImg8bit.png", "a_1_leftImg8bit.png"),
        ("Gr\u00fcn.jpg", "Gru\u0308n.png"),  # composed, and decomposed as macOS writes it
        ("Gru\u0308n.jpg", "Gr\u00fcn_mask.png"),
    ],
)
def test_masks_by_other_names(image, mask, tmp_path):
    assert names_of(tmp_path, [image], [mask]) == ({image: mask}, {})


@pytest.mark.parametrize(
    "images, masks, pairs, flaws",
    [
        (["1.jpg"], ["1.jpg", "1_mask.png"], {"1.jpg": "1_mask.png"}, {"1.jpg": "is a second mask of"}),
        (["1.jpg"], ["1.png", "1.bmp"], {"1.jpg": "1.bmp"}, {"1.png": "is a second mask of"}),
        (["1.jpg"], ["1.jpeg"], {"1.jpg": "1.jpeg"}, {}),  # which is refused by its content
        (["a.jpg", "a_L.jpg"], ["a_L.png"], {"a_L.jpg": "a_L.png"}, {"a.jpg": "has no mask of its own: .*a_L.jpg"}),
        (["a.jpg", "a_L.jpg"], ["a.png", "a_L.png"], {"a.jpg": "a.png", "a_L.jpg": "a_L.png"}, {}),
        (["1.jpg", "1.png"], ["1.png"], {"1.jpg": "1.png"}, {"1.png": "has no mask of its own"}),
        (["1.jpg", "1.png"], ["1.jpg.png", "1.png.png"], {"1.jpg": "1.jpg.png", "1.png": "1.png.png"}, {}),
        (["1.dng", "2.pdf", "3.txt"], [], {}, {"1.dng": "is a camera's raw file", "2.pdf": "is a document"}),
        (["1.jpg"], ["1.npy", "2.webp", "note.txt"], {"1.jpg": "1.npy"}, {"2.webp": "has no image"}),
    ],
)
def test_which_mask_is_taken_and_what_is_left_is_named(images, masks, pairs, flaws, tmp_path):
    found, left = names_of(tmp_path, images, masks)
    assert found == pairs and left.keys() == flaws.keys()
    assert all(re.search(text, left[name]) for name, text in flaws.items()), left


def names_of(folder, images, masks_):
    """({image: mask}, {file: flaw}) of files with these names."""
    for kind, names in (("images", images), ("masks", masks_)):
        (folder / kind).mkdir()
        for name in names:
            (folder / kind / name).touch()
    pairs, flaws = masks.find_pairs(folder / "images", folder / "masks")
    return {pair.name: Path(pair.mask).name for pair in pairs}, {Path(flaw.path).name: flaw.reason for flaw in flaws}


def save_mask(path, values, mode="L"):
    Image.fromarray(np.asarray(values, np.uint8), mode if mode != "L" else None).save(path)


def resize(path):
    Image.open(path).resize((32, 24)).save(path)


def put(value, count=5):
    def change(path):
        pixels = np.array(Image.open(path))
        pixels[0, :count] = value
        save_mask(path, pixels)

    return change


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


FLAWS = {
    "another size": ("masks", resize, r"has 32 x 24 pixels, its image 64 x 48; save it at the image's size"),
    "a value of no class": ("masks", put(7), r"has the value 7 in 5 pixels, which no class has; add it to classes.txt"),
    "only ignored pixels": ("masks", lambda path: save_mask(path, np.full((48, 64), 255)), "has no pixel of a class"),
    "16 bits": (
        "masks",
        lambda path: Image.fromarray(np.full((48, 64), 3000, np.uint16)).save(path),
        r"has the value 3000, which no class has",
    ),
    "colours without a table": (
        "masks",
        lambda path: Image.new("RGB", (64, 48), (9, 8, 7)).save(path),
        "has colours, but classes.txt has none",
    ),
    "an empty mask": ("masks", lambda path: path.write_bytes(b""), r"cannot be read as a mask \(it is empty\)"),
    "a mask that is no image": ("masks", lambda path: path.write_text("hello"), "cannot be read as a mask"),
    "a damaged mask": ("masks", cut, "cannot be read as a mask"),
    "no mask": ("masks", Path.unlink, r"has no mask .*003\.png"),
    "a damaged image": ("images", lambda path: path.write_bytes(path.read_bytes()[:300]), "cannot be read as an image"),
    "an empty image": ("images", lambda path: path.write_bytes(b""), r"cannot be read as an image \(it is empty\)"),
    "no image": ("images", Path.unlink, "has no image"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flawed_annotation_is_named_and_left_out(flaw, fields, capsys):
    kind, change, text = FLAWS[flaw]
    path = fields / kind / "train" / ("003.png" if kind == "masks" else "003.jpg")
    change(path)
    train_part, val_part, flaws = segmentation.open_data(fields, "", table())
    assert len(flaws) == 1 and len(train_part.pairs) == 7 and len(val_part.pairs) == 3
    assert "003" in flaws[0].path and "003" not in "".join(pair.name for pair in train_part.pairs)
    out = capsys.readouterr().out
    assert re.search(f"left out    .*003.* {text}", out), out
    assert "1 files left out; 10 images with their masks are used" in out


@pytest.mark.parametrize(
    "content, text",
    [
        ("soil\n", "has 1 classes that are not ignored"),
        ("soil\ncrop\nSoil\n", "line 3: 'Soil' is there twice"),
        ("soil,7\ncrop,7\n", "has the value or colour of another line"),
        ("soil,1,2,3\ncrop,1,2,3\n", "has the value or colour of another line"),
        ("soil,1,2,3\ncrop\n", "line 2: 'crop' has no colour, but 1 of 2 lines have one; either each"),
        ("soil\ncrop,0\n", "line 2: 'crop,0' has the value or colour of another line, 'soil': 0"),
        ("\n".join(f"class {number}" for number in range(300)), "has 300 classes; at most 254 that are not ignored"),
        ("soil\n2 crop\n", "line 2: '2 crop' is not clear"),
        (b"so\xffil\ncrop\n", "is not UTF-8"),
    ],
)
def test_a_wrong_list_of_classes_is_refused(content, text, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=text):
        masks.read_classes(path, ["255"])


# What people write, as value or colour of soil and crop.
FORMS = {
    "soil\n\ncrop": [0, 1],
    "# value: name\nsoil\n#crop\n  # weed\ncrop": [0, 1],
    "__ignore__\nsoil\ncrop": [0, 1],
    "0 soil\n255 crop": [0, 255],
    "soil 0\ncrop\t255": [0, 255],
    "0: soil\n1: crop": [0, 1],
    "soil：7\ncrop，255": [7, 255],
    "soil=7\ncrop | 255": [7, 255],
    "'soil', 7\n\"crop\"; 255": [7, 255],
    "soil 128 64 128\ncrop 0 0 0": [(128, 64, 128), (0, 0, 0)],
    "128, 64, 128, soil\n0 0 0\tcrop": [(128, 64, 128), (0, 0, 0)],
    "soil,#804080\ncrop #00fF00": [(128, 64, 128), (0, 255, 0)],
    "#804080 soil\n#000000,crop": [(128, 64, 128), (0, 0, 0)],
    "# label:color_rgb:parts:actions\nsoil:128,64,128::\ncrop:0,0,0:leaf,stem:grow": [(128, 64, 128), (0, 0, 0)],
    "soil:128,64,128::\ncrop:0,0,0::": [(128, 64, 128), (0, 0, 0)],
}


@pytest.mark.parametrize("content", FORMS)
def test_classes_are_read_as_people_write_them(content, tmp_path):
    (tmp_path / "classes.txt").write_text(content, encoding="utf-8")
    found = masks.read_classes(tmp_path / "classes.txt", ["255"])
    assert found.names == ["soil", "crop"]
    codes = found.by_colour or {value: own for value, own in enumerate(found.by_value.tolist()) if own < 2}
    assert codes == dict(zip(FORMS[content], [0, 1]))


@pytest.mark.parametrize(
    "content, names",
    [
        ("type 1\ntype 2", ["type 1", "type 2"]),
        ("background\ntype 2\n3D model", ["background", "type 2", "3D model"]),
        ("wall\nbuilding, edifice\nroad (1)", ["wall", "building, edifice", "road (1)"]),
        ("2 wheeler,0\ntype 2,1", ["2 wheeler", "type 2"]),
        ("type 2 1 2 3\ntype 3,4,5,6", ["type 2", "type 3"]),
        ("土壤\n作物 2020", ["土壤", "作物 2020"]),
    ],
)
def test_a_name_may_hold_numbers(content, names, tmp_path):
    (tmp_path / "classes.txt").write_text(content, encoding="utf-8")
    assert masks.read_classes(tmp_path / "classes.txt", ["255"]).names == names


WRONG_LINES = ["crop,300", "crop,1,2", "crop,-1", "crop,1.0", "crop,#80408", "crop,1,2,3,4", "1,crop,1,2,3", "2", "{"]
WRONG_LINES += ["-1 crop", "- crop", "1. crop", "crop,", "names:", ",crop", "name,value", "// crop", "crop (1, 2, 3)"]
WRONG_LINES += ["crop,0x10", "crop,1e2", "1,2,3", "crop,12345678901234567890"]


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_line_that_is_not_clear_is_named(line, tmp_path):
    (tmp_path / "classes.txt").write_text(f"soil,7\n\n{line}\nweed,9\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"line 3: {re.escape(repr(line))} is not clear; write name, name,value or"):
        masks.read_classes(tmp_path / "classes.txt", ["255"])


def test_values_and_names_are_classes_or_ignored(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffroad\r\nVoid\r\nplant, 255\r\n", encoding="utf-8")
    found = masks.read_classes(path, ["255", "void", "9"])
    assert found.names == ["road", "plant"]  # 255 is a class, since a line says so
    assert [int(found.by_value[value]) for value in (0, 1, 255, 9, 8)] == [0, 255, 1, 255, 254]


def test_colour_masks_are_read_by_the_table(tmp_path):
    (tmp_path / "classes.txt").write_text("128 128 128 sky\n0 0 0 Unlabelled\nroad,128,64,128\n", encoding="utf-8")
    found = masks.read_classes(tmp_path / "classes.txt", ["unlabelled"])
    assert found.names == ["sky", "road"]
    pixels = np.array([[[128, 128, 128], [128, 64, 128]], [[0, 0, 0], [128, 64, 128]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert masks.read_mask(tmp_path / "mask.png", found).tolist() == [[0, 1], [255, 1]]
    Image.fromarray(pixels).quantize(8).save(tmp_path / "palette.png")
    assert masks.read_mask(tmp_path / "palette.png", found).tolist() == [[0, 1], [255, 1]]
    pixels[0, 0] = 1, 2, 3
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="has the colour 1,2,3 in 1 pixels, which no class has"):
        masks.read_mask(tmp_path / "mask.png", found)


def as_table(**values):
    """A `ClassTable` of classes with a value or a colour."""
    by_value, colours = np.full(256, masks.UNKNOWN, np.uint8), {}
    by_value[255] = masks.IGNORED
    for own, code in enumerate(values.values()):
        if isinstance(code, tuple):
            colours[code] = own
        by_value[own if isinstance(code, tuple) else code] = own
    return masks.ClassTable(list(values), by_value, colours)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGB", "RGBA"])
def test_grey_masks_are_colours_where_the_table_has_colours(mode, tmp_path):
    image = Image.fromarray(np.array([[255, 0], [0, 255]], np.uint8)).convert(mode)
    image.save(tmp_path / "mask.png")
    colours = as_table(white=(255, 255, 255), black=(0, 0, 0))
    assert masks.read_mask(tmp_path / "mask.png", colours).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("values", [dict(soil=0, crop=1), dict(soil=0, crop=255)])
@pytest.mark.parametrize("name", ["mask.png", "mask.tif", "mask.bmp"])
def test_masks_of_one_bit_have_the_values_of_the_table(values, name, tmp_path):
    Image.fromarray(np.array([[False, True]])).save(tmp_path / name)
    assert masks.read_mask(tmp_path / name, as_table(**values)).tolist() == [[0, 1]]


def deep(mode, size=(2, 2)):
    """A PNG with 16 bits for each value, which Pillow does not write."""
    colour_type, channels = dict(RGB=(2, 3), LA=(4, 2), RGBA=(6, 4))[mode]
    rows = b"".join(b"\0" + b"\0\1" * channels * size[0] for _ in range(size[1]))
    head = struct.pack(">IIBBBBB", *size, 16, colour_type, 0, 0, 0)
    chunks = b""
    for kind, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def saved(image, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


GREY = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
ALPHA = Image.merge("RGBA", [Image.new("L", (2, 2))] * 3 + [GREY])
WRONG_MASKS = {
    "a JPEG": (saved(GREY, format="JPEG"), "is stored as JPEG; JPEG and its like change values: save masks as PNG"),
    "a WebP": (saved(GREY, format="WEBP"), "is stored as WEBP; .* save masks as PNG"),
    "an AVIF": (saved(GREY.convert("RGB"), format="AVIF"), "is stored as AVIF; .* save masks as PNG"),
    "a JPEG in a TIFF": (saved(GREY, format="TIFF", compression="jpeg"), "is stored as JPEG in a TIFF"),
    "16-bit RGB": (deep("RGB"), "has values of 16 bits; save it as a PNG with 8 bits"),
    "16-bit grey and alpha": (deep("LA"), "has values of 16 bits"),
    "16-bit RGBA": (deep("RGBA"), "has values of 16 bits"),
    "classes in the alpha channel": (saved(ALPHA, format="PNG"), "has its classes in the alpha channel; save them as"),
    "LA with classes in alpha": (saved(ALPHA.convert("LA"), format="PNG"), "has its classes in the alpha channel"),
    "CMYK": (saved(GREY.convert("CMYK"), format="TIFF"), "has the mode CMYK"),
    "fractions": (saved(Image.fromarray(np.ones((2, 2), np.float32)), format="TIFF"), "has the mode F"),
    "negative values": (
        saved(Image.fromarray(np.array([[-1, 0], [1, 300]], np.int32)), format="TIFF"),
        "has the value -1, which no class has; values go from 0 to 255",
    ),
    "blurred edges": (
        saved(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)), format="PNG"),
        ".* and 251 others, .* if edges were blurred, .* resize masks without interpolation",
    ),
    "an array": (None, "is an array; save each image in it as PNG"),
}


@pytest.mark.parametrize("kind", WRONG_MASKS)
def test_masks_whose_values_are_not_certain_are_refused_by_content(kind, tmp_path):
    content, text = WRONG_MASKS[kind]
    path = tmp_path / ("mask.npy" if content is None else "mask.png")
    path.write_bytes(content or b"\x93NUMPY")
    with pytest.raises(UserError, match=rf"mask\.\w+ {text}") as error:
        masks.read_mask(path, as_table(soil=0, crop=1, weed=2))
    assert "\n" not in str(error.value)


def test_blurred_colours_get_the_remedy_too(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="has the colour .* others, .* resize masks without interpolation"):
        masks.read_mask(tmp_path / "mask.png", as_table(soil=(0, 0, 0), crop=(0, 255, 0)))


def test_masks_of_0_and_1_name_the_line_to_write(tmp_path):
    GREY.save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="has the value 1 in 2 pixels, .*: crop,1 in place of 255"):
        masks.read_mask(tmp_path / "mask.png", as_table(soil=0, crop=255))


def test_a_class_that_is_ignored_everywhere_is_refused(fields):
    with pytest.raises(UserError, match=r"no training mask has the class crop; .* need crop,255"):
        names = as_table(soil=0, crop=9)
        names.by_value[1:3] = masks.IGNORED
        segmentation.open_data(fields, "", names)


def test_a_list_names_images_and_masks(fields, capsys):
    lines = ["image,mask,split"]
    lines += [f"images/train/00{n}.jpg,masks/train/00{n}.png,{'val' if n > 4 else 'train'}" for n in range(7)]
    (fields / "list.csv").write_text("\n".join([*lines, "images/x.jpg,masks/x.png,train"]), encoding="utf-8")
    train_part, val_part, flaws = segmentation.open_data(fields, fields / "list.csv", table())
    assert (len(train_part.pairs), len(val_part.pairs)) == (5, 2)
    assert "list.csv, line 9, names it" in flaws[0].reason
    (fields / "list.csv").write_text("image,split\na,b\n", encoding="utf-8")
    with pytest.raises(UserError, match="lacks the column mask"):
        masks.read_list(fields / "list.csv")


@pytest.mark.parametrize("separator", [",", ";", "\t", ", "])
def test_a_list_is_read_as_programs_write_it(separator, tmp_path):
    (tmp_path / "a,b.png").touch()
    rows = [["Split", " Image ", "MASK"], ["Train", '"a,b.png"', '"a,b.png"'], [], ["TEST", '"a,b.png"', ""]]
    (tmp_path / "list.csv").write_bytes("\r\n".join(map(separator.join, rows)).encode("utf-8-sig"))
    parts = masks.read_list(tmp_path / "list.csv")
    assert [pair.name for pair in parts["train"][0]] == ["a,b.png"] and list(parts) == ["train", "test"]
    [flaw] = parts["test"][1]
    assert flaw.path.endswith("list.csv, line 4") and flaw.reason == "names no mask"


@pytest.mark.parametrize(
    "line, text",
    [
        ('"a.jpg,a.png,train\n' + "a.jpg,a.png,train\n" * 9000, "line 2: unexpected end of data; correct its quot"),
        ('"a"b.jpg,a.png,train', "line 2: .* expected after .*; correct its quotation marks"),
        ("a.jpg,a.png", "line 2: expected 3 fields, got 2"),
        ("a,b.jpg,a.png,train", "line 2: expected 3 fields, got 4"),
        ("a.jpg,a.png,", "line 2: split must be train, val or test, got ''"),
    ],
)
def test_a_wrong_line_of_a_list_is_named(line, text, tmp_path):
    (tmp_path / "list.csv").write_text(f"image,mask,split\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=text):
        masks.read_list(tmp_path / "list.csv")


def test_a_part_that_a_list_lacks_is_named(fields):
    (fields / "list.csv").write_text("image,mask,split\nimages/train/000.jpg,masks/train/000.png,train\n")
    with pytest.raises(UserError, match="list.csv has no line whose split is val, only train"):
        segmentation.open_data(fields, fields / "list.csv", table())


def test_an_image_in_both_parts_is_refused(fields):
    shutil.copy(fields / "images/train/002.jpg", fields / "images/val/copy.jpg")
    shutil.copy(fields / "masks/train/002.png", fields / "masks/val/copy.png")
    with pytest.raises(UserError, match=r"1 images are in train and in val, such as .*002.jpg and .*copy.jpg, so"):
        segmentation.open_data(fields, "", table())


def test_an_image_twice_in_a_part_is_used_once_and_shared_masks_are_noted(fields, capsys):
    rows = [("train/000.jpg", "train/000.png", "train")] * 2 + [("train/001.jpg", "train/000.png", "train")]
    rows += [("val/000.jpg", "val/000.png", "val")]
    lines = [f"images/{image},masks/{mask},{split}" for image, mask, split in rows]
    (fields / "list.csv").write_text("\n".join(["image,mask,split", *lines]), encoding="utf-8")
    train_part, _, [flaw] = segmentation.open_data(fields, fields / "list.csv", table())
    assert len(train_part.pairs) == 2 and "is a repetition of" in flaw.reason
    assert re.search("note: 1 masks belong to several images, such as .*000.png", capsys.readouterr().out)


def test_the_reason_of_an_empty_part_is_the_first_flaw(fields, capsys):
    for path in (fields / "masks/val").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the images for val can be used; the first: .*000.png cannot be read"):
        segmentation.open_data(fields, "", table())
    assert "skipped.csv" not in capsys.readouterr().out  # which is not written


@pytest.mark.parametrize("orientation, text", [(1, "save it at the image's size"), (6, "turned clockwise, as its")])
def test_a_mask_of_an_image_that_exif_turns(orientation, text, fields, capsys):
    exif = Image.Exif()
    exif[masks.ORIENTATION] = orientation
    image = Image.open(fields / "images/train/001.jpg")
    image = image if orientation == 6 else image.transpose(Image.Transpose.ROTATE_90)
    image.save(fields / "images/train/001.jpg", exif=exif)
    _, _, [flaw] = segmentation.open_data(fields, "", table())
    assert re.search(f"has 64 x 48 pixels, its image 48 x 64.* {text}", flaw.reason), flaw.reason


def test_without_data_one_sentence_names_the_layout(run, tmp_path):
    with pytest.raises(UserError, match="no folder fields; put images into images/train .* or try --demo") as error:
        run()
    assert "\n" not in str(error.value)
    (tmp_path / "fields").mkdir()
    with pytest.raises(UserError, match="there is no fields.classes.txt"):
        run()


def test_masks_without_a_class_are_pointed_out(fields, capsys):
    names = table()
    names.names.append("tractor")
    names.by_value[3] = 3
    segmentation.open_data(fields, "", names)
    assert "no training mask has the class tractor; is its value right" in capsys.readouterr().out


# --- evaluation and prediction


def test_a_prediction_has_the_values_of_the_masks(trained, run, tmp_path, capsys):
    shutil.copytree(trained / "fields/images/val", tmp_path / "new/a")
    (tmp_path / "new/broken.jpg").write_bytes(b"no image")
    run(3, PREDICT="new", CHECKPOINT=str(trained / RUN / "best.pth"))
    out = capsys.readouterr().out
    assert "3 masks and overlays in" in out and "1 files left out" in out and "new/broken.jpg" in Path(out).as_posix()
    checkpoint, network = network_of(trained)
    predictor = segmentation.Predictor(checkpoint, torch.device("cpu"), None, network)
    for number in range(3):
        path = Path("results/segmentation/a", f"00{number}.png")
        image = torch.from_numpy(np.array(Image.open(f"new/a/00{number}.jpg"))).permute(2, 0, 1)
        assert np.array_equal(np.array(Image.open(path)), predictor(image).argmax(0).numpy())
        assert Image.open(path).mode == "P" and Image.open(path).size == (64, 48)
        assert Image.open(path.with_name(f"00{number}_overlay.jpg")).size == (64, 48)


def test_an_evaluation_gives_what_training_measured(trained, run, tmp_path, capsys):
    for kind in ("images", "masks"):
        shutil.copytree(trained / "fields" / kind / "val", tmp_path / "other" / kind)
    run(EVALUATE="other", CHECKPOINT=str(trained / RUN / "best.pth"))
    checkpoint, _ = network_of(trained)
    assert f"mIoU {checkpoint['best_metric']:.2f} %" in capsys.readouterr().out
    (tmp_path / "other/masks/000.png").unlink()
    run(3, EVALUATE="other", CHECKPOINT=str(trained / RUN / "best.pth"))
    assert "on 2 images; 1 files left out" in capsys.readouterr().out
    (tmp_path / "other/classes.txt").write_text("soil\nweed\ncrop\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot evaluate on other: classes.txt differs .* weed \(1\), not crop \(1\)"):
        run(EVALUATE="other", CHECKPOINT=str(trained / RUN / "best.pth"))


def test_an_evaluation_takes_a_part_of_the_folder_or_of_the_list(trained, fields, run, capsys):
    settings = dict(CHECKPOINT=str(trained / RUN / "best.pth"))
    run(EVALUATE="train", **settings)
    assert "on 8 images" in capsys.readouterr().out
    lines = ["image,mask,split", "images/val/001.jpg,masks/val/001.png,test", "no.jpg,no.png,train"]
    (fields / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    run(EVALUATE="test", LIST="fields/list.csv", **settings)
    assert "on 1 images; 0 files left out" in capsys.readouterr().out
    (fields / "classes.txt").write_text("soil\ncrop\nweed,9\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"differs from the checkpoint's classes, weed \(9\), not weed \(2\)"):
        run(EVALUATE="val", **settings)


@pytest.mark.parametrize(
    "where, text",
    [
        ("fields", "fields has the parts train, val; name one: --data fields --evaluate val"),
        ("test", "test is no part of fields and no folder with images and masks"),
        ("val", "val is a part of fields and a folder; write ./val for the folder"),
    ],
)
def test_what_to_evaluate_on_must_be_clear(where, text, trained, fields, run, tmp_path):
    (tmp_path / "val/images").mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape(text).replace("/", r"[/\\]")):
        run(EVALUATE=where, CHECKPOINT=str(trained / RUN / "best.pth"))


def test_all_flaws_are_written_before_an_evaluation_is_refused(trained, fields, run):
    for path in (fields / "masks/val").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the images for val can be used"):
        run(EVALUATE="val", CHECKPOINT=str(trained / RUN / "best.pth"))
    assert len(read_csv("results/segmentation/skipped.csv")) == 3


@pytest.mark.parametrize("content", ["soil\ncrop,2\nweed,1", "1,1,1,soil\n2,2,2,crop\n3,3,3,weed"])
def test_other_values_of_the_classes_cannot_be_resumed(content, trained, fields, run):
    (fields / "classes.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="cannot resume .*last.pth: classes.txt differs from the checkpoint's classes"):
        run(RESUME=str(trained / RUN / "last.pth"))


PLACES = [("new", "new"), ("new", "new/../new/."), ("new/a.png", "new"), ("new", "link"), ("link", "new")]


@pytest.mark.parametrize("source, results", PLACES)
def test_no_image_is_overwritten_by_its_mask(source, results, trained, run, tmp_path):
    (tmp_path / "new").mkdir()
    shutil.copy(trained / "fields/masks/val/000.png", tmp_path / "new/a.png")
    (tmp_path / "link").symlink_to("new", target_is_directory=True)
    before = (tmp_path / "new/a.png").read_bytes()
    with pytest.raises(UserError, match="would be written over or among the files that are read"):
        run(PREDICT=source, RESULTS=results, CHECKPOINT=str(trained / RUN / "best.pth"))
    assert (tmp_path / "new/a.png").read_bytes() == before and len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_no_image_is_overwritten_through_a_link(link, trained, run, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "out").mkdir()
    shutil.copy(trained / "fields/masks/val/000.png", tmp_path / "new/a.png")
    link(tmp_path / "out/a.png", tmp_path / "new/a.png")
    with pytest.raises(UserError, match="would be written over"):
        run(PREDICT="new", RESULTS="out", CHECKPOINT=str(trained / RUN / "best.pth"))


def test_an_evaluation_and_an_export_overwrite_nothing_that_they_read(trained, fields, run, tmp_path):
    shutil.copy(trained / RUN / "best.pth", tmp_path / "best.pth")
    with pytest.raises(UserError, match="would be written over"):
        run(EVALUATE="val", RESULTS="fields/images/val", CHECKPOINT="best.pth")
    with pytest.raises(UserError, match="would be written over"):
        run(EXPORT="./best.pth", CHECKPOINT="best.pth")


def test_files_that_are_not_predicted_are_named(trained, run, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    shutil.copy(trained / "fields/images/val/000.jpg", tmp_path / "new")
    for name in ("b.dng", "c.pdf", "note.txt"):
        (tmp_path / "new" / name).touch()
    run(3, PREDICT="new", CHECKPOINT=str(trained / RUN / "best.pth"))
    out = capsys.readouterr().out
    assert "b.dng is a camera's raw file" in out and "c.pdf is a document" in out and "2 files left out" in out
    assert "note.txt" not in out


def test_a_narrow_image_stays_small():
    """Its longer side is at most `MAX_ASPECT` times the shorter side of the others."""
    sizes, about = [], dict(short_side=64, window=None, classes=["a", "b"], mean=[0.5] * 3, std=[0.5] * 3)
    about |= dict(values=[0] * 256, colours=[])

    def network(image):
        sizes.append(tuple(image.shape[2:]))
        return image[:, :2]

    predictor = segmentation.Predictor(about, torch.device("cpu"), None, network)
    for height, width in ((20, 2000), (2000, 2), (48, 96), (20, 160)):
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        assert predictor(image).shape == (2, height, width)
    assert sizes == [(32, 512), (512, 32), (64, 128), (64, 512)]
    transform = segmentation.train_transform([32, 32], 64, [1.0, 1.0], 0, 0, [0.5] * 3)
    assert [step(torch.zeros(3, 20, 2000)).shape[2] for step in transform.transforms[:1]] == [512]


def test_the_merged_network_gives_the_same_masks(trained):
    _, merged = network_of(trained)
    _, plain = network_of(trained, merge=False)
    images = torch.randn(2, 3, 50, 70, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        one, other = merged(images), plain(images)
    best = other.topk(2, 1).values
    clear = best[:, 0] - best[:, 1] > 1e-3
    assert clear.float().mean() > 0.9 and torch.equal(one.argmax(1)[clear], other.argmax(1)[clear])
    assert len(merged.state_dict()) < len(plain.state_dict())


class Perfect:
    """A predictor that knows the masks, but for one class that it takes for another."""

    def __init__(self, truths, wrong=None):
        self.truths, self.wrong = iter(truths), wrong
        self.about, self.device = dict(classes=["a", "b", "never"]), torch.device("cpu")

    def __call__(self, image):
        classes = next(self.truths).long().clamp(max=2)
        if self.wrong:
            classes = torch.where(classes == self.wrong[0], self.wrong[1], classes)
        return 9.0 * torch.nn.functional.one_hot(classes, 3).permute(2, 0, 1)


def test_iou_is_the_mean_over_the_classes_that_occur():
    truth = torch.tensor([[0, 0, 1, 1], [255, 0, 1, 255]], dtype=torch.uint8)
    dataset = [(torch.zeros(3, 2, 4), truth)] * 2
    results, ious = segmentation.evaluate(Perfect([truth] * 2), dataset, 0, "")
    assert results["miou"] == 100 and results["acc"] == 100 and math.isnan(ious[2])
    assert results["iou_never"] is None and results["loss"] < 1e-3
    results, ious = segmentation.evaluate(Perfect([truth, torch.zeros_like(truth)]), dataset, 0, "")
    assert ious[:2] == pytest.approx([100 * 6 / 9, 50.0]) and results["acc"] == pytest.approx(75)


def test_windows_cover_the_image_and_average():
    network = torch.nn.Conv2d(3, 4, 1)
    image = torch.randn(1, 3, 75, 110)
    torch.testing.assert_close(segmentation.slide(network, image, 32, 4), network(image))
    assert segmentation.places(110, 32) == [0, 16, 31, 47, 62, 78] and segmentation.places(20, 32) == [0]


def test_ignored_pixels_count_nothing_in_the_loss():
    normalise = segmentation.Normalise([0.5] * 3, [0.5] * 3, torch.device("cpu"))
    loss = segmentation.SegmentationLoss(normalise, torch.tensor([1.0, 3.0]), torch.device("cpu"))
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    images, mask = torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.full((1, 4, 4), 255, dtype=torch.uint8)
    assert loss(lambda _: logits, (images, mask)) == 0
    mask[0, 0, :2] = torch.tensor([0, 1])
    expected = torch.nn.functional.cross_entropy(logits[:, :, 0, :2], mask[:, 0, :2].long(), torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(loss(lambda _: logits, (images, mask)), expected)


def test_class_weights():
    weights = segmentation.balance_classes(np.array([900, 100, 0]), 0.5)
    assert weights[1] / weights[0] == pytest.approx(3) and weights[2] == weights[1]
    assert (weights[0] * 900 + weights[1] * 100) / 1000 == pytest.approx(1)
    assert segmentation.balance_classes(np.array([900, 100]), 0).tolist() == [1, 1]


# --- refusals and export


def test_three_kinds_of_use_exclude_each_other(run):
    with pytest.raises(ConstantError, match="EVALUATE, PREDICT and EXPORT"):
        run(EVALUATE="a", PREDICT="b")


def test_images_of_one_name_get_masks_of_two_names(trained, run, tmp_path):
    (tmp_path / "new").mkdir()
    image = Image.open(trained / "fields/images/val/000.jpg")
    image.save(tmp_path / "new/a.jpg")
    image.rotate(180).save(tmp_path / "new/a.png")
    run(PREDICT="new", CHECKPOINT=str(trained / RUN / "best.pth"), WINDOW=32)
    assert sorted(path.name for path in Path("results/segmentation").glob("*.png")) == ["a.jpg.png", "a.png.png"]


def test_without_a_checkpoint_one_sentence_says_so(run):
    with pytest.raises(UserError, match=r"there is no .*best\.pth; train first"):
        run(PREDICT="photos")


@pytest.mark.parametrize("key", ["task", "head_width", "values", "colours", "classes", "mean", "model_args"])
def test_a_checkpoint_that_says_what_cannot_be_is_refused(key, trained, tmp_path):
    checkpoint = torch.load(trained / RUN / "best.pth", weights_only=True)
    wrong = dict(task="detection", head_width=16, values=[9] * 256, colours=[[1, 2]], classes=["a"], mean=[1.0])
    checkpoint[key] = wrong.get(key, dict(no_such=1))
    torch.save(checkpoint, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=rf"wrong.pth cannot be used: its (?s:.*)({key}|network|state_dict)"):
        dense.load_dense(tmp_path / "wrong.pth", "segmentation", segmentation.build, segmentation.check_fields_of)


def test_an_exported_network_is_compared_with_pytorch(trained, run, tmp_path, capsys):
    run(EXPORT="out/model.onnx", EXPORT_SIZE=[40, 56], CHECKPOINT=str(trained / RUN / "best.pth"))
    out = capsys.readouterr().out
    assert "40 x 56 pixels, largest difference" in out and Path("out/model.onnx").stat().st_size > 10**4
    import onnxruntime

    session = onnxruntime.InferenceSession("out/model.onnx", providers=["CPUExecutionProvider"])
    assert '"soil", "crop", "weed"' in session.get_modelmeta().custom_metadata_map["classes"]
    images = torch.randn(3, 3, 40, 56, generator=torch.Generator().manual_seed(2))
    _, plain = network_of(trained, merge=False)
    with torch.inference_mode():
        logits = plain(images)
    [written] = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(written), logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))
