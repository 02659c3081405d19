"""Bad inputs: a table of named ones, and valid images with random damage, through all four scripts.

    python tests/hostile.py --files 2000

Works in a temporary folder. Fails if a script shows a traceback, ends with an unknown exit status or hangs, if a named
input meets another fate than the table says, or if anything in data1 has changed.
"""

import argparse
import hashlib
import importlib.util
import io
import os
import random
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from handmade import images
from PIL import Image, features

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("png", "jpg", "bmp", "webp", "tif", "gif")
USED = "used"  # the fate of an input that is a usable image; else words of the reason why it is skipped
IGNORED = "ignored"  # not even mentioned
NO_IMAGE = "has no image extension"
ANOTHER_KIND = "; export it as "  # the end of the sentence on files of another kind that hold images
BROKEN = "cannot be read as an image"


def noise(seed, size=(24, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encode(image, suffix, **options):
    """Bytes of an image file."""
    kinds = dict(jpg="jpeg", tif="tiff")
    file = io.BytesIO()
    image.save(file, kinds.get(suffix, suffix), **options)
    return file.getvalue()


def encode_heic(image):
    file = io.BytesIO()
    importlib.import_module("pillow_heif").from_pillow(image).save(file)
    return file.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb():
    """A PNG of 200 bytes that claims 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def bad_crc(content):
    content = bytearray(content)
    content[29] ^= 255  # the first byte of the header's checksum
    return bytes(content)


def named_inputs():
    """Yield (name, content or a function of the path that makes it, fate)."""
    number = iter(range(1000, 2000))

    def new(size=(24, 24)):
        return noise(next(number), size)

    def exif(orientation):
        tags = Image.Exif()
        tags[0x0112] = orientation
        return tags

    for suffix in FORMATS:
        whole = encode(new(), suffix)
        yield f"cut off.{suffix}", whole[: len(whole) // 2], BROKEN
        yield f"first 20 bytes.{suffix}", encode(new(), suffix)[:20], BROKEN
        yield f"zeros.{suffix}", bytes(500), BROKEN
    yield "empty.png", b"", "it is empty"
    yield "text.jpg", b"these are words", BROKEN
    yield "page.jpg", b"<!DOCTYPE html><html><body>404</body></html>", BROKEN
    yield "archive.png", b"PK\x03\x04" + bytes(100), BROKEN
    yield "random.webp", random.Random(1).randbytes(2000), BROKEN
    yield "bomb.png", bomb(), "pixels; scale it down or remove it"
    yield "wrong checksum.png", bad_crc(encode(new(), "png")), BROKEN
    yield "floating point.tif", encode(Image.fromarray(np.ones((4, 4), np.float32)), "tif"), "floating-point"
    yield "rubbish behind.png", encode(new(), "png") + b"rubbish" * 99, USED
    yield "really a jpeg.png", encode(new(), "jpg"), USED
    yield "really a png.gif", encode(new(), "png"), USED
    yield "16 bit.png", encode(Image.fromarray(np.arange(576, dtype=np.uint16).reshape(24, 24) * 100), "png"), USED
    yield "16 bit.tif", encode(Image.fromarray(np.arange(576, dtype=np.uint16).reshape(24, 24) * 99), "tif"), USED
    yield "one bit.png", encode(new().convert("1"), "png"), USED
    yield "one bit.bmp", encode(new().convert("1"), "bmp"), USED
    yield "grey.jpg", encode(new().convert("L"), "jpg"), USED
    yield "grey and alpha.png", encode(new().convert("LA"), "png"), USED
    yield "alpha.webp", encode(new().convert("RGBA"), "webp", lossless=True), USED
    yield "cmyk.jpg", encode(new().convert("CMYK"), "jpg"), USED
    yield "cmyk.tif", encode(new().convert("CMYK"), "tif"), USED
    yield "palette.png", encode(new().quantize(16), "png", transparency=3), USED
    yield "palette.gif", encode(new().quantize(16), "gif", transparency=3), USED
    yield "lzw.tif", encode(new(), "tif", compression="tiff_lzw"), USED
    yield "progressive.jpg", encode(new(), "jpg", progressive=True), USED
    for suffix in ("gif", "webp", "png", "tif"):
        yield f"animated.{suffix}", encode(new(), suffix, save_all=True, append_images=[new(), new()]), USED
    yield "turned.jpg", encode(new((32, 16)), "jpg", exif=exif(6)), USED
    yield "nonsense exif.jpg", encode(new(), "jpg", exif=b"Exif\0\0nonsense"), USED
    yield "1 x 1.png", encode(new((1, 1)), "png"), USED
    yield "1 x 10000.png", encode(new((1, 10_000)), "png"), USED
    yield "10000 x 1.jpg", encode(new((10_000, 1)), "jpg"), USED
    yield "with  spaces .png", encode(new(), "png"), USED
    yield "小麦 苗.png", encode(new(), "png"), USED
    yield "🌱🌾.png", encode(new(), "png"), USED
    yield "-rf.png", encode(new(), "png"), USED
    yield "--help.png", encode(new(), "png"), USED
    yield "a,b;'c'.png", encode(new(), "png"), USED
    yield "%s {0} $HOME.png", encode(new(), "png"), USED
    yield "[a-z].png", encode(new(), "png"), USED
    yield f"{'long' * 58}.png", encode(new(), "png"), USED
    yield "LOUD.PNG", encode(new(), "png"), USED
    yield "no extension", encode(new(), "png"), NO_IMAGE
    heic = USED if importlib.util.find_spec("pillow_heif") else "needs the package pillow-heif"
    heic_content = encode_heic(new()) if heic == USED else b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)
    yield "telephone.heic", heic_content, heic
    yield "drawing.svg", b"<svg/>", ANOTHER_KIND
    yield "camera.NEF", encode(new(), "tif"), ANOTHER_KIND
    yield "camera.dng", encode(new(), "tif"), ANOTHER_KIND
    yield "layers.psd", b"8BPS" + bytes(99), ANOTHER_KIND
    yield "paper.pdf", b"%PDF-1.7", "export its pages"
    yield "array.npy", b"\x93NUMPY" + bytes(99), "save each image in it"
    yield "x-ray.dcm", bytes(128) + b"DICM", ANOTHER_KIND
    yield "film.mp4", b"\0\0\0\x18ftypisom", "save frames of it"
    yield "images.zip", b"PK\3\4", "unpack it"
    for suffix, kind in (("jfif", "jpeg"), ("JPE", "jpeg"), ("dib", "dib"), ("tga", "tga"), ("apng", "png")):
        yield f"rarer.{suffix}", encode(new(), kind), USED
    if features.check("avif"):
        yield "rarer.avif", encode(new(), "avif"), USED
    if features.check("jpg_2000"):
        yield "rarer.jp2", encode(new(), "jpeg2000"), USED
    for name, content, value_range, expected in images():
        if value_range is None:
            yield name, content, expected if isinstance(expected, str) else USED
    yield "download.jpg.part", encode(new(), "jpg"), NO_IMAGE
    yield ".hidden.png", encode(new(), "png"), IGNORED
    yield "._resource fork.jpg", b"Mac OS X", IGNORED
    yield "Thumbs.db", b"system", IGNORED
    yield "desktop.ini", b"system", IGNORED
    if os.name == "posix":
        yield "two\nlines.png", encode(new(), "png"), USED
        yield "back\\slash.png", encode(new(), "png"), USED
        yield 'quoted "*?<>|:.png', encode(new(), "png"), USED
        yield os.fsdecode("小麦.png".encode("gbk")), encode(new(), "png"), USED
        yield "link to itself.png", lambda path: path.symlink_to(path.name), BROKEN
        yield "link to nothing.png", lambda path: path.symlink_to("nothing"), BROKEN
        yield "link to a device.png", lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"
        yield "pipe.png", os.mkfifo, "it is not a regular file"
        unreadable = USED if os.geteuid() == 0 else BROKEN  # root reads everything
        yield "unreadable.png", lambda path: (path.write_bytes(encode(new(), "png")), path.chmod(0)), unreadable


def mutate(content, other, moments):
    """Damage a file as disks, downloads and editors do: bytes changed, cut, doubled, or joined with another file."""
    content = bytearray(content)
    for _ in range(moments.choice((1, 1, 1, 2, 3, 10))):
        place = moments.randrange(len(content) or 1)
        kind = moments.choice((0, 0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6))
        if kind == 0 and content:
            content[place] ^= 1 << moments.randrange(8)
        elif kind == 1 and content:
            content[place] = moments.choice((0, 1, 127, 128, 255, moments.randrange(256)))
        elif kind == 2:
            del content[place:]
        elif kind == 3:
            del content[place : place + moments.randrange(1, 40)]
        elif kind == 4:
            content[place:place] = content[place : place + moments.randrange(1, 40)]
        elif kind == 5:
            content[place : place + 8] = moments.randbytes(8)
        else:
            content[place:] = other[moments.randrange(len(other)) :]
    return bytes(content)


def sources():
    """Valid files to damage: [(suffix, content), ...]."""
    files = [(suffix, encode(noise(seed), suffix)) for seed, suffix in enumerate(FORMATS)]
    files += [
        ("png", encode(noise(7).quantize(16), "png", transparency=3)),
        ("gif", encode(noise(8).convert("1"), "gif")),
    ]
    files += [("jpg", encode(noise(9).convert("CMYK"), "jpg")), ("webp", encode(noise(10), "webp", lossless=True))]
    files += [
        ("tif", encode(noise(11), "tif", compression="tiff_lzw")),
        ("png", encode(noise(12).convert("RGBA"), "png")),
    ]
    files += [
        ("tif", encode(noise(13), "tif", compression="jpeg")),
        ("jpg", encode(noise(14), "jpg", progressive=True)),
    ]
    return files


def fill(root, files, seed):
    """Fill `root/<class>/` with the named inputs, `files` damaged images and some good ones; returns {name: fate}."""
    fates = {}
    names = ("Maize", "小麦 苗")
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(6):
            noise(5000 + 100 * number + index).save(root / name / f"good {index}.png")
    for name, content, fate in named_inputs():
        path = root / names[0] / name
        if callable(content):
            content(path)
        else:
            path.write_bytes(content)
        fates[name] = fate
    moments, valid = random.Random(seed), sources()
    seen = {content for _, content in valid}
    for index in range(files):
        content = valid[0][1]
        while content in seen:  # equal images under two classes would rightly be refused
            suffix, whole = moments.choice(valid)
            content = mutate(whole, moments.choice(valid)[1], moments)
        seen.add(content)
        (root / names[index % 2] / f"damaged {index:05}.{suffix}").write_bytes(content)
    return fates


def fingerprints(root):
    """{path: what is there} of everything below `root`, symbolic links not followed."""
    result = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        result[os.fsencode(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino, content)
    return result


def run(folder, *words):
    """Run a script of the repository in `folder`; RuntimeError for a traceback or an exit status that is not known."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:surrogateescape"}
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=1200)
    out, errors = (text.decode(errors="surrogateescape") for text in (done.stdout, done.stderr))
    if done.returncode not in (0, 1, 3) or "Traceback" in errors or "Traceback" in out:
        raise RuntimeError(f"{words} ended with {done.returncode}:\n{errors[-3000:]}")
    return done.returncode, out, errors


def check(folder, files, seed=0, say=print, run=run, model="unireplknet_a"):
    """The whole check in `folder`, which is empty.

    Args:
        files: number of damaged images.
        run: function (folder, script, *words) -> (exit status, what it printed, errors).
        model: network to train.

    Returns:
        (number of named inputs, how many files were used).
    """
    data1 = Path(folder, "data1")
    fates = fill(data1, files, seed)
    before = fingerprints(data1)
    size = ["--img-size", "32"]
    train = ["train.py", "--model", model, *size, "--epochs", "1", "--device", "cpu", "--warmup-epochs", "0"]
    used = 0
    for words in (["makedata.py"], ["mean_std.py"], train, ["test.py", "--device", "cpu", str(data1)]):
        status, out, errors = run(folder, *words)
        if status == 1:
            raise RuntimeError(f"{words} failed: {errors}")
        say(f"{words[0]:12} exit status {status}")
        reasons = [line for line in out.split("skipped: ")[1:]]
        if words[0] in ("makedata.py", "test.py"):
            placed = {path.name for path in Path(folder, "data").glob("*/*/*")}
            for name, fate in fates.items():
                mentioned = [reason for reason in reasons if f"/{name} " in reason.replace("\\", "/")]
                if words[0] == "test.py" and name.startswith("."):
                    continue
                right = not mentioned if fate in (USED, IGNORED) else mentioned and fate in mentioned[0]
                if words[0] == "makedata.py":
                    right = right and (name in placed) == (fate == USED)
                if not right:
                    raise RuntimeError(f"{words[0]}: {name!r} should be {fate!r}, but: {mentioned or 'used'}")
            used = len(placed)
        if fingerprints(data1) != before:
            changed = [path for path, what in fingerprints(data1).items() if before.get(path) != what]
            raise RuntimeError(f"{words[0]} changed data1: {changed[:5]}")
    return len(fates), used


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="damaged images")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        named, used = check(folder, options.files, options.seed)
    print(
        f"{named} named inputs and {options.files} damaged images, {used} files used: no traceback, data1 unchanged"
    )


if __name__ == "__main__":
    main()
