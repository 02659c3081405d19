"""Images of every kind become the same 8-bit RGB pixels that a viewer shows, or an error that names the file."""

import importlib.util
import json
import os
import shutil
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from handmade import SHORT, images, png, tiff
from PIL import Image, PngImagePlugin, features

import makedata
import mean_std
from common import decoding
from common.dataset import open_image_folder
from common.images import NOT_READ, ImageError, is_hidden, is_image, load_image, scan_class_folders, why_not
from common.options import UserError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every grey value once
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def grey(values):
    return np.repeat(values[..., None], 3, axis=2)


def on_white(colours, opacity):
    """What a viewer with a white background shows; opacity from 0 to 255."""
    alpha = opacity[..., None] / 255
    return colours * alpha + 255 * (1 - alpha)


def with_opacity(mode, colours, opacity):
    return Image.fromarray(np.dstack([colours, opacity]).astype(np.uint8), mode)


def palette_image():
    """(P image of 16 colours, its RGB pixels)."""
    table = COLOURS[0]
    index = (RAMP % 16).astype(np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette(table.tobytes())
    return image, table[index]


def images_of_every_mode():
    """Yield (mode, suffix, image, options of save, RGB pixels expected, tolerance)."""
    rgb, fade = Image.fromarray(COLOURS), RAMP[::-1]
    yield "RGB", "png", rgb, {}, COLOURS, 0
    yield "RGB", "bmp", rgb, {}, COLOURS, 0
    yield "RGB", "webp", rgb, {"lossless": True}, COLOURS, 0
    key = tuple(map(int, COLOURS[3, 5]))
    seen = np.where((COLOURS == key).all(2)[..., None], 255, COLOURS)
    yield "RGB with tRNS", "png", rgb, {"transparency": key}, seen, 0
    yield "L", "png", Image.fromarray(RAMP), {}, grey(RAMP), 0
    yield "L", "jpg", Image.fromarray(RAMP), {"quality": 100}, grey(RAMP), 2
    yield "L with tRNS", "png", Image.fromarray(RAMP), {"transparency": 9}, grey(np.where(RAMP == 9, 255, RAMP)), 0
    bits = RAMP % 3 == 0
    yield "1", "png", Image.fromarray(bits), {}, grey(np.where(bits, 255, 0)), 0
    yield "1", "tif", Image.fromarray(bits), {"compression": "group4"}, grey(np.where(bits, 255, 0)), 0
    image, pixels = palette_image()
    yield "P", "png", image, {}, pixels, 0
    yield "P", "gif", image, {}, pixels, 0
    seen = np.where((RAMP % 16 == 4)[..., None], 255, pixels)
    yield "P with one transparent colour", "png", image, {"transparency": 4}, seen, 0
    yield "P with one transparent colour", "gif", image, {"transparency": 4}, seen, 0
    steps = bytes(range(0, 256, 17))
    faded = on_white(pixels, np.frombuffer(steps, np.uint8)[RAMP % 16])
    yield "P with opacities", "png", image, {"transparency": steps}, faded, 1
    half = np.where(np.arange(16) < 8, 0, np.full((16, 16), 255))
    yield "RGBA, left half transparent", "png", with_opacity("RGBA", COLOURS, half), {}, on_white(COLOURS, half), 0
    yield "RGBA", "png", with_opacity("RGBA", COLOURS, fade), {}, on_white(COLOURS, fade), 1
    yield "RGBA", "tif", with_opacity("RGBA", COLOURS, fade), {}, on_white(COLOURS, fade), 1
    yield "LA", "png", with_opacity("LA", RAMP, fade), {}, on_white(grey(RAMP), fade), 1
    cmyk = np.dstack([255 - COLOURS, np.zeros_like(RAMP)])
    yield "CMYK", "tif", Image.fromarray(cmyk, "CMYK"), {}, COLOURS, 0
    flat = np.broadcast_to(np.uint8([200, 90, 30]), (16, 16, 3))
    flat_cmyk = np.dstack([255 - flat, np.zeros_like(RAMP)])
    yield "CMYK", "jpg", Image.fromarray(flat_cmyk, "CMYK"), {"quality": 100}, flat, 3
    yield "YCbCr", "jpg", Image.fromarray(flat).convert("YCbCr"), {"quality": 100}, flat, 3
    yield "YCbCr", "tif", Image.fromarray(flat).convert("YCbCr"), {"compression": "jpeg", "quality": 100}, flat, 3
    wide = RAMP.astype(np.uint16) * 257  # white is 65535
    yield "I;16", "png", Image.fromarray(wide), {}, grey(RAMP), 1
    yield "I;16", "tif", Image.fromarray(wide), {}, grey(RAMP), 1
    yield "I;16B", "tif", Image.frombytes("I;16B", (16, 16), wide.astype(">u2").tobytes()), {}, grey(RAMP), 1
    yield "I", "tif", Image.fromarray(wide.astype(np.int32)), {}, grey(RAMP), 1


@pytest.mark.parametrize(
    "suffix, image, options, expected, tolerance",
    [pytest.param(*case, id=f"{mode}, {case[0]}") for mode, *case in images_of_every_mode()],
)
def test_every_mode_becomes_the_colours_that_a_viewer_shows(suffix, image, options, expected, tolerance):
    image.save(f"image.{suffix}", **options)
    loaded = load_image(f"image.{suffix}")
    assert loaded.mode == "RGB"
    np.testing.assert_allclose(np.asarray(loaded), expected, atol=tolerance, rtol=0)


# What a viewer shows of the stored pixels, by the definition of each value of the EXIF tag Orientation.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_photographs_are_turned_upright(orientation, suffix):
    stored = COLOURS[:2, :3].repeat(16, axis=0).repeat(16, axis=1)  # flat blocks, which JPEG keeps
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0}
    Image.fromarray(stored).save(f"photo.{suffix}", exif=exif, **options)
    loaded = np.asarray(load_image(f"photo.{suffix}")).astype(int)
    np.testing.assert_allclose(loaded, UPRIGHT[orientation](stored), atol=3)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_frame_of_an_animation_is_read(suffix):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(f"animation.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    loaded = load_image(f"animation.{suffix}")
    assert loaded.resize((5, 5)).getcolors() == [(25, (255, 0, 0))] and loaded.size == (9, 7)


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0"])
def test_damaged_metadata_does_not_matter(exif):
    """Pillow raises many kinds of errors for it, while every viewer shows the image."""
    Image.new("RGB", (8, 8), "red").save("photo.jpg", exif=exif)
    assert load_image("photo.jpg").size == (8, 8)


def broken_files():
    """Yield (name, function that writes such a file)."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))

    def cut(name):
        noise.save(name)
        whole = Path(name).read_bytes()
        Path(name).write_bytes(whole[: len(whole) // 2])

    for suffix in ("jpg", "png", "bmp", "webp", "tif", "gif"):
        yield f"cut off.{suffix}", cut
    yield "empty.png", lambda name: Path(name).touch()
    yield "text.jpg", lambda name: Path(name).write_text("not an image")
    yield "floating point.tif", lambda name: Image.fromarray(np.ones((4, 4), np.float32)).save(name)
    yield "folder.png", lambda name: Path(name).mkdir()
    yield "absent.png", lambda name: None


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name, write", [pytest.param(*case, id=case[0]) for case in broken_files()])
def test_a_file_that_cannot_be_read_is_named_in_one_sentence(name, write, kind):
    write(name)
    with pytest.raises(ImageError) as error:
        load_image(kind(name))
    message = str(error.value)
    assert message.startswith(name) and "\n" not in message and "<" not in message
    assert ("empty" in message) == (name == "empty.png")
    assert ("floating-point" in message) == (name == "floating point.tif")


@pytest.mark.parametrize("side", [11, 15])
def test_too_many_pixels_are_refused(side, monkeypatch):
    """Pillow itself only warns up to twice its limit."""
    Image.new("RGB", (10, 10)).save("small.png")
    Image.new("RGB", (side, side)).save("large.png")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 100)
    assert load_image("small.png").size == (10, 10)
    with pytest.raises(ImageError, match=r"^large.png has (more than 100|\d+) pixels.*scale it down or remove it"):
        load_image("large.png")


@pytest.mark.parametrize("name", "k.heic b.JPG d.BMP e.webP f.tif g.TIFF h.GIF two.dots.jpg j.AVIF l.Ppm".split())
def test_names_of_images(name):
    assert is_image(name) and is_image(Path("folder") / name)


@pytest.mark.parametrize("name", ["a.txt", "jpg", "xjpg", "a.jpg.txt", "a.jpg~", "a.dng", "a.jpg.part", ""])
def test_names_of_other_files(name):
    assert not is_image(name)


def test_hidden_names():
    assert all(is_hidden(Path("a", name)) for name in (".gitkeep", ".DS_Store", "._1.jpg", "Thumbs.db", "DESKTOP.INI"))
    assert not any(is_hidden(Path(".a", name)) for name in ("1.jpg", "thumbs.jpg", "a.db"))

# --- files made by hand: values of more than 8 bits, arrangements, transparency


@pytest.mark.parametrize("name, content, value_range, expected", [pytest.param(*case, id=case[0]) for case in images()])
def test_stored_values_become_the_levels_that_the_file_states(name, content, value_range, expected):
    Path(name).write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(ImageError) as error:
            load_image(name, value_range)
        assert str(error.value).startswith(name) and expected in str(error.value) and "\n" not in str(error.value)
        return
    loaded = load_image(name, value_range)
    assert loaded.mode == "RGB" and loaded.size == (16, 16)
    np.testing.assert_allclose(np.asarray(loaded), expected, atol=1 if name == "lab.tif" else 0, rtol=0)


def test_sixteen_bits_become_the_same_levels_as_ever():
    """Checkpoints were trained on them."""
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(every).save("grey.png")
    Path("colour.png").write_bytes(png(np.dstack([every] * 3)))
    former = Image.fromarray(every.astype(np.int32)).point(lambda value: value / 257).convert("L")
    assert (np.asarray(load_image("grey.png")) == np.asarray(former)[..., None]).all()
    assert (np.asarray(load_image("colour.png")) == (every >> 8)[..., None]).all()


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_kind_of_tiff_is_turned_upright(orientation):
    """Pillow from 11 on mixes up width and height of those that it maps into memory."""
    tags, stored = [(274, SHORT, [orientation])], COLOURS[:6].astype(int)
    alpha = np.full((6, 16, 1), 255)
    kinds = {
        "RGB": (tiff(COLOURS[:6], tags=tags), None, stored),
        "RGBA": (tiff(np.dstack([stored, alpha]).astype(np.uint8), tags=tags), None, stored),
        "CMYK": (tiff(np.dstack([255 - stored, 0 * alpha]).astype(np.uint8), photometric=5, tags=tags), None, stored),
        "L": (tiff(RAMP[:6], tags=tags), None, grey(RAMP[:6])),
        "1": (tiff(RAMP[:6] % 3 == 0, bits=1, tags=tags), None, grey(255 * (RAMP[:6] % 3 == 0))),
        "16 bit": (tiff(RAMP[:6].astype(np.uint16) * 257, tags=tags), None, grey(RAMP[:6])),
        "float": (tiff(RAMP[:6].astype(np.float32), tags=tags), [0, 255], grey(RAMP[:6])),
        "16 bit colour": (tiff((stored * 16).astype(np.uint16), tags=tags), [0, 4080], stored),
        "planar": (tiff((stored * 16).astype(np.uint16), planar=True, tags=tags), [0, 4080], stored),
        "deflate": (tiff((stored * 16).astype(np.uint16), deflate=True, tags=tags), [0, 4080], stored),
    }
    for name, (content, value_range, expected) in kinds.items():
        Path("scan.tif").write_bytes(content)
        loaded = np.asarray(load_image("scan.tif", value_range))
        np.testing.assert_array_equal(loaded, UPRIGHT[orientation](expected), err_msg=name)


def test_values_that_were_read_are_noted_with_their_range():
    Path("dark.png").write_bytes(png(RAMP.astype(np.uint16) * 16))
    assert load_image("dark.png").info == dict(values=(0, 4080), range=(0, 65535))
    assert load_image("dark.png", [0, 4095]).info == dict(values=(0, 4080), range=(0, 4095))
    Path("dark.tif").write_bytes(tiff(COLOURS.astype(np.uint16) * 16))
    low, high = load_image("dark.tif").info["values"]
    assert low < 256 and 4080 <= high <= 4095  # of the first of two bytes
    Image.fromarray(COLOURS).save("plain.png")
    assert load_image("plain.png").info == {}


def test_jpeg_2000_of_more_than_8_bits():
    if not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    Image.fromarray(RAMP.astype(np.uint16) * 257).save("a.jp2", irreversible=False)
    np.testing.assert_array_equal(np.asarray(load_image("a.jp2")), grey(RAMP))
    Image.fromarray(RAMP.astype(np.uint16) * 16).save("b.jp2", irreversible=False)
    np.testing.assert_array_equal(np.asarray(load_image("b.jp2", [0, 4080])), grey(RAMP))


# --- other formats


@pytest.mark.parametrize(
    "suffix, kind",
    [
        ("jfif", "jpeg"), ("JPE", "jpeg"), ("dib", "dib"), ("tga", "tga"), ("apng", "png"), ("ppm", "ppm"),
        ("avif", "avif"), ("jp2", "jpeg2000"), ("png", "webp"), ("jpg", "gif"), ("tif", "jpeg"),
        ("double.png.jpg", "png"),
    ],
)  # fmt: skip
def test_files_are_read_by_their_content(suffix, kind):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    Image.new("RGB", (20, 10), (200, 90, 30)).save(f"image.{suffix}", kind)
    assert is_image(f"image.{suffix}")
    loaded = np.asarray(load_image(f"image.{suffix}"))
    assert loaded.shape == (10, 20, 3)
    np.testing.assert_allclose(loaded.reshape(-1, 3), np.broadcast_to([200, 90, 30], (200, 3)), atol=4)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
STAND_IN = """
from types import SimpleNamespace
from PIL import Image


def open_heif(path):
    return SimpleNamespace(size=(4, 3), to_pillow=lambda: Image.new("RGB", (4, 3), "red"))
"""


@pytest.mark.parametrize("name", ["photo.heic", "photo.HEIF", "photo.jpg"])
def test_heic_is_read_through_an_optional_package(name, monkeypatch, tmp_path):
    Path(name).write_bytes(HEIC)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError) as error:
        load_image(name)
    assert str(error.value) == f"{name} needs the package pillow-heif; pip install pillow-heif"
    monkeypatch.delitem(sys.modules, "pillow_heif")
    Path("pillow_heif.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # where nothing was registered
        loaded = pool.submit(load_image, name).result()
    assert loaded.getcolors() == [(12, (255, 0, 0))]
    sys.modules.pop("pillow_heif", None)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_real_heic_photographs_are_turned_upright(orientation):
    pillow_heif = pytest.importorskip("pillow_heif")
    stored = COLOURS[:2, :3].repeat(32, axis=0).repeat(32, axis=1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = pillow_heif.from_pillow(Image.fromarray(stored))
    photo[0].info["exif"] = exif.tobytes()
    photo.save("photo.heic", quality=100, chroma=444)
    np.testing.assert_allclose(np.asarray(load_image("photo.heic")).astype(int), UPRIGHT[orientation](stored), atol=6)


def test_a_large_photograph_is_read_and_pillows_limits_are_put_back(monkeypatch):
    def limits():
        text = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
        return Image.MAX_IMAGE_PIXELS, text, list(warnings.filters)

    before = limits()
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        for suffix in ("png", "jpg", "gif", "webp", "tif", "bmp"):
            Image.new("RGB", (30, 20), "red").save(f"large.{suffix}")
            assert load_image(f"large.{suffix}").size == (30, 20)
        assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(ImageError):
        load_image("absent.png")
    Image.new("RGB", (64, 64), "red").save("photo.jpg")
    with ThreadPoolExecutor(8) as pool:
        assert all(image.size == (64, 64) for image in pool.map(load_image, ["photo.jpg"] * 200))
    assert limits() == before


@pytest.mark.parametrize("ending", [ending for endings in NOT_READ.values() for ending in endings.split()])
def test_files_that_hold_images_all_the_same_are_named_with_a_remedy(ending):
    name = f"photo{ending.upper()}"
    Path(name).write_bytes(b"something")
    assert not is_image(name) and why_not(name).startswith(f"{name} is a")
    assert any(word in why_not(name) for word in ("export", "save", "convert", "unpack"))
    with pytest.raises(ImageError) as error:
        load_image(name)
    assert str(error.value) == why_not(name)


def test_other_files_are_said_to_have_no_image_extension():
    assert why_not("notes.txt") == "notes.txt has no image extension (.png, .jpg, .jpeg, ...: see docs/images.md)"
    assert why_not("notes.txt", "recording", (".wav", ".mp3")) == "notes.txt has no recording extension (.wav, .mp3)"


# --- folders


def test_class_folders_are_listed_in_order_without_hidden_files(make_data1):
    paths = make_data1("data1", {"b": 2, "a c": 1, "玉米": 1})
    Path("data1/empty").mkdir()
    Path("data1/.hidden").mkdir()
    for name in ("b/.DS_Store", "b/Thumbs.db", ".gitkeep", "b/notes.txt", "beside.txt"):
        Path("data1", name).touch()
    folders = scan_class_folders("data1")
    assert list(folders) == ["a c", "b", "empty", "玉米"]
    notes = Path("data1/b/notes.txt")
    expected = {"a c": paths[:1], "b": [*paths[1:3], notes], "empty": [], "玉米": paths[3:]}
    assert {name: list(map(Path, files)) for name, files in folders.items()} == expected
    assert list(map(Path, folders.files)) == sum(expected.values(), [])
    assert folders.beside == [str(Path("data1/beside.txt"))]


def test_what_is_no_folder_of_classes_is_refused(make_data1):
    with pytest.raises(UserError, match="no folder data1"):
        scan_class_folders("data1")
    Path("data1").mkdir()
    with pytest.raises(UserError, match="data1 contains no class folder"):
        scan_class_folders("data1")
    make_data1("data1/outer", {"inner": 1})
    with pytest.raises(UserError, match="data1.outer.inner is a folder inside a class folder"):
        scan_class_folders("data1")


def test_an_image_folder_sees_what_makedata_sees(make_data1):
    make_data1("data1", {"b": 2, "a": 1})
    Path("data1/.hidden").mkdir()
    for name in ("b/notes.txt", "b/Thumbs.db", "b/._000.png", ".hidden/1.png"):
        Path("data1", name).write_bytes(b"system")
    shutil.copy("data1/b/001.png", "data1/b/UPPER.PNG")
    folder = open_image_folder("data1")
    assert folder.classes == ["a", "b"]
    samples = [(Path(path).as_posix(), label) for path, label in folder.samples]
    names = ("b/000.png", "b/001.png", "b/UPPER.PNG")
    assert samples == [("data1/a/000.png", 0), *((f"data1/{name}", 1) for name in names)]
    assert folder[0][0].mode == "RGB" and folder[0][1] == 0
    Path("data1/c").mkdir()
    with pytest.raises(UserError, match="data1.c contains no image"):
        open_image_folder("data1")


# Folders and files that systems, editors and network drives leave anywhere.
SYSTEM = (
    ".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", ".AppleDouble", ".Trash-1000", "#recycle", "$RECYCLE.BIN",
    "System Volume Information", "lost+found", ".Spotlight-V100", ".fseventsd", ".TemporaryItems", ".thumbnails",
    "#snapshot", "@Recycle", "@tmp", ".@__thumb", "found.000", "Network Trash Folder", ".idea", ".vscode", ".svn",
    "__pycache__", "~snapshot", ".DS_Store", "@Recently-Snapshot", "LOST.DIR",
)  # fmt: skip


@pytest.fixture
def with_system_folders(make_data1, tmp_path, monkeypatch):
    """data1 with a copy of an image in every system folder: beside the classes, in them, and deeper."""
    monkeypatch.chdir(tmp_path)
    make_data1("data1", {"a": 4, "b": 4})
    for name in SYSTEM:
        for place in (Path("data1", name), Path("data1/a", name), Path("data1/b", name, "deeper", name)):
            place.mkdir(parents=True)
            shutil.copy("data1/b/000.png", place / "copy.png")


def test_system_folders_are_passed_over_by_every_script_and_counted(with_system_folders, monkeypatch, capsys):
    def line():
        out = capsys.readouterr().out
        lines = [line for line in out.splitlines() if line.startswith("passed over ")]
        assert len(lines) == 1 and "skipped" not in out
        return lines[0]

    monkeypatch.setattr(mean_std, "WORKERS", 0)
    assert makedata.main() == 0
    number = 3 * len(SYSTEM)
    assert line().startswith(f"passed over {number} folders hidden or of the system (data1{os.sep}")
    placed = sorted(path.name for path in Path("data").glob("*/*/*"))
    assert placed == sorted(2 * [f"{number:03d}.png" for number in range(4)])
    assert mean_std.main() == 0
    assert line().startswith(f"passed over {number} folders hidden or of the system (data1{os.sep}")
    assert json.loads(Path("data/mean_std.json").read_text())["pictures"] == 8
    dataset = open_image_folder("data1")
    assert line().startswith(f"passed over {number} folders") and len(dataset) == 8 and dataset.classes == ["a", "b"]
    monkeypatch.setattr(makedata, "CHECK", True)
    if importlib.util.find_spec("imagehash"):
        assert makedata.main() == 0
        assert line().startswith(f"passed over {number} folders")


def test_a_system_folder_beside_real_ones_hides_none(with_system_folders, make_data1):
    """What a person made is refused where it is nested, and a class where it is not."""
    make_data1("data1", {"recycled": 2, "@home": 2, "#1": 2, "$5": 2, "~x": 2, "_new": 2, "lost": 2})
    assert len(open_image_folder("data1").classes) == 9
    make_data1("data1/a", {"more": 2})
    with pytest.raises(UserError, match=r"data1.a.more is a folder inside a class folder"):
        scan_class_folders("data1")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ""),
        ([".DS_Store", "a/._000.png", "a/Thumbs.db", "b/desktop.ini", ".gitkeep", "b/.directory", "a/ehthumbs.db"], ""),
        (["a/notes.txt"], "passed over 1 file of another kind (data1/a/notes.txt)"),
        (["x.png", "y.txt"], "passed over 2 files in no class folder (data1/x.png, data1/y.txt)"),
        (["a/.hidden.png"], "passed over 1 file hidden (data1/a/.hidden.png)"),
        (
            ["a/1.mp4", "a/2.mp4", "b/3.pdf", "b/4.pdf", "5.png", "b/@eaDir/6.png"],
            "passed over 4 files of another kind (data1/a/1.mp4, data1/a/2.mp4, data1/b/3.pdf, ...); 1 file in no "
            "class folder (data1/5.png); 1 folder hidden or of the system (data1/b/@eaDir)",
        ),
    ],
)
def test_what_is_passed_over_is_counted_and_named(names, expected, make_data1, monkeypatch, capsys):
    make_data1("data1", {"a": 2, "b": 2})
    for name in names:
        Path("data1", name).parent.mkdir(exist_ok=True)
        Path("data1", name).write_bytes(b"x")
    monkeypatch.setattr(mean_std, "WORKERS", 0)
    expected = expected.replace("data1/", f"data1{os.sep}").replace("/", os.sep)
    assert len(open_image_folder("data1")) == 4
    assert capsys.readouterr().out.strip() == expected
    monkeypatch.setattr(mean_std, "OUTPUT", "")
    assert mean_std.main() == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "passed" in line] == [expected] * bool(expected)


def test_links_that_lead_in_a_circle_are_no_folders(make_data1):
    make_data1("data1", {"a": 2})
    os.symlink("circle", "data1/circle")
    os.symlink("../a/circle", "data1/a/circle")
    assert list(scan_class_folders("data1")) == ["a"] and len(open_image_folder("data1")) == 2
