"""Images of every kind become the same 8-bit RGB pixels that a viewer shows, or an error that names the file."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.dataset import open_image_folder
from common.images import ImageError, is_hidden, is_image, load_image, scan_class_folders
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
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert load_image("small.png").size == (10, 10)
    with pytest.raises(ImageError, match="^large.png has more pixels"):
        load_image("large.png")


@pytest.mark.parametrize("name", "a.png b.JPG c.Jpeg d.BMP e.webP f.tif g.TIFF h.GIF two.dots.jpg".split())
def test_names_of_images(name):
    assert is_image(name) and is_image(Path("folder") / name)


@pytest.mark.parametrize("name", ["a.txt", "jpg", "xjpg", "a.jpg.txt", "a.jpg~", "a.heic", "a.jpg.part", ""])
def test_names_of_other_files(name):
    assert not is_image(name)


def test_hidden_names():
    assert all(is_hidden(Path("a", name)) for name in (".gitkeep", ".DS_Store", "._1.jpg", "Thumbs.db", "DESKTOP.INI"))
    assert not any(is_hidden(Path(".a", name)) for name in ("1.jpg", "thumbs.jpg", "a.db"))


def test_class_folders_are_listed_in_order_without_hidden_files(make_data1):
    paths = make_data1("data1", {"b": 2, "a c": 1, "玉米": 1})
    Path("data1/empty").mkdir()
    Path("data1/.hidden").mkdir()
    for name in ("b/.DS_Store", "b/Thumbs.db", ".gitkeep", "b/notes.txt", "beside.txt"):
        Path("data1", name).touch()
    classes, beside = scan_class_folders("data1")
    assert list(classes) == ["a c", "b", "empty", "玉米"]
    notes = Path("data1/b/notes.txt")
    assert classes == {"a c": paths[:1], "b": [*paths[1:3], notes], "empty": [], "玉米": paths[3:]}
    assert beside == [Path("data1/beside.txt")]


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
