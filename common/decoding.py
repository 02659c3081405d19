"""Decoding: how the pixels of an image file become 8-bit RGB; docs/images.md is the table of what is read.

Pillow decodes the files. What this module adds: values of more than 8 bits are scaled as the file states, or as the
data set's value range says, where Pillow would clip or truncate them; and a few kinds of files that Pillow decodes
wrongly.
"""

import contextlib
import os
import re
import struct
import threading
import warnings
from functools import cache

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, features

from common.extras import require
from common.options import UserError

# Part of the key of train.py's cache and of makedata.py's manifest; a change of the pixels of any file raises it.
READER = 2

MAX_PIXELS = 300_000_000  # phone photographs of 200 megapixels, and A3 at 1,200 dpi; Pillow takes 4 bytes for each
MAX_TEXT = 1 << 28  # bytes of text in a PNG, such as the settings of a program that made it
# What is recognised by content. Pillow knows more formats, some of which run other programs.
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "WEBP", "TIFF", "GIF", "AVIF", "PPM", "JPEG2000", "TGA", "ICO", "MPO")
HEIF_BRANDS = re.compile(rb"hei[cxms]|hev[cxms]|mif1|msf1")

# --- TIFF tags (TIFF 6.0; DNG 1.7)
NEW_SUBFILE_TYPE, BITS_PER_SAMPLE, PHOTOMETRIC, DESCRIPTION, PLANAR = 254, 258, 262, 270, 284
MAX_SAMPLE, COLOUR_MAP, SUB_IFDS, SAMPLE_FORMAT = 281, 320, 330, 339
S_MIN_SAMPLE, S_MAX_SAMPLE, DNG_VERSION = 340, 341, 50706
UNSIGNED, SIGNED = 1, 2  # of SAMPLE_FORMAT
NATIVE = {"I;16BS": "I;16NS", "I;32B": "I;32N", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}
NATIVE |= {"I;16S": "I;16NS", "I;32": "I;32N", "I;32S": "I;32NS", "F;32F": "F;32NF"}


class ImageError(UserError):
    """A file that cannot be read as an image or a recording; the message names it and the reason."""


def decode(path, value_range=None):
    """Read an image as RGB, 8 bits per channel, upright; for the arguments see `common.images.load_image`.

    Returns:
        `PIL.Image.Image` of mode RGB. For values of more than 8 bits `info` holds "values", the lowest and the highest
        one as they are stored, and "range", those that became black and white.

    Raises:
        ImageError: for what is refused, with its remedy.
        Exception: of any other kind, from Pillow's decoders, for broken files.
    """
    with pillow_limits(), open(path, "rb") as file:
        head = file.read(64)
        if is_heif(head):
            image = to_rgb(decode_heif(path))
            image.info = {}
            return image
        image = open_image(file, path, head)
        check_size(path, image.size)
        check_complete(path, image, head)
        stored = Stored(path, image, file)
        if stored.is_deep(value_range):
            return stored.to_rgb(value_range)
        about = stored.high_bytes()
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        stored.fix_palette()
        stored.fix_transparency()
        return about(to_rgb(image))


# --- opening


class PillowLimits:
    """While any thread is inside, Pillow's limits are ours, and odd metadata raises no warning.

    Pillow's limits are globals of its modules: they are put back when the last thread leaves.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.inside = 0
        self.stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self):
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", UserWarning)
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                # Pillow only warns between one and two times its limit.
                self.set(Image, "MAX_IMAGE_PIXELS", MAX_PIXELS // 2)
                self.set(PngImagePlugin, "MAX_TEXT_CHUNK", MAX_TEXT)
                self.set(PngImagePlugin, "MAX_TEXT_MEMORY", MAX_TEXT)
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if self.inside == 0:
                    self.stack.close()

    def set(self, module, name, value):
        self.stack.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)


pillow_limits = PillowLimits()


def open_image(file, path, head):
    """Open an image of one of `FORMATS` without decoding it.

    Args:
        file: opened; not its path, from which Pillow would map some TIFFs into memory. There its versions from 11 on
            confuse width and height of those that must be turned.
        path: for messages.
        head: the file's first bytes.

    Raises:
        ImageError: if it has too many pixels, or needs a newer Pillow.
    """
    try:
        return Image.open(file, formats=known_formats())
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} has more than {MAX_PIXELS:,} pixels; scale it down or remove it") from error
    except Image.UnidentifiedImageError as error:
        if head[4:8] == b"ftyp" and "AVIF" not in known_formats():
            raise ImageError(f"{path} needs Pillow 11.3 or later; pip install --upgrade pillow") from error
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            raise ValueError("a TIFF damaged, or of a kind that Pillow does not read: save it as PNG") from error
        raise


@cache
def known_formats():
    """Those of `FORMATS` that the installed Pillow opens."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN and (name != "AVIF" or features.check("avif"))]


def is_heif(head):
    """Whether the first bytes of a file are those of HEIC or HEIF."""
    return head[4:8] == b"ftyp" and b"avi" not in head[8:] and bool(HEIF_BRANDS.match(head[8:]))


def decode_heif(path):
    """Decode HEIC and HEIF with the package pillow-heif, upright."""
    try:
        [pillow_heif] = require("pillow_heif")
    except UserError as error:
        raise ImageError(f"{path} needs the package pillow-heif; pip install pillow-heif") from error
    # Opened here and not by a plugin, which would have to be registered with Pillow in each process.
    file = pillow_heif.open_heif(path)
    check_size(path, file.size)
    return file.to_pillow()


def check_size(path, size):
    """ImageError if an image of `size` (width, height) has more than `MAX_PIXELS`."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{path} has {width * height:,} pixels, and {MAX_PIXELS:,} are the limit; scale it down or remove it"
        )


def check_complete(path, image, head):
    """ImageError if the image is only the preview in a camera's raw file, which is a kind of TIFF."""
    tags = getattr(image, "tag_v2", {})
    reduced = tags.get(NEW_SUBFILE_TYPE, 0) & 1 and (SUB_IFDS in tags or getattr(image, "n_frames", 1) > 1)
    if DNG_VERSION in tags or reduced or tags and head[8:10] == b"CR":
        raise ImageError(f"{path} is a camera's raw file, of which only the preview could be read; export it as JPEG")


# --- values of more than 8 bits


class Stored:
    """What a file says about its stored values.

    Args:
        path: the file.
        image: Pillow's image of it, opened, not yet decoded.
        file: opened, too.
    """

    def __init__(self, path, image, file):
        self.path = path
        self.image = image
        self.mode = image.mode
        self.tags = dict(getattr(image, "tag_v2", {}))
        self.png = read_png_chunks(file) if image.format == "PNG" else {}
        self.key = image.info.get("transparency")  # the transparent value, before any scaling
        self.maximum, self.factor = maximum_of_format(image, file)
        args = image.tile[0][3] if image.tile else ""
        self.raw_mode = str(first(args) if args else "")  # such as "RGB;16B"
        self.planar = self.tags.get(PLANAR) == 2 and len(self.mode) > 1
        if self.planar and self.bits == 16 and len(self.raw_mode) == 1:
            # Pillow names the planes "R", "G", ..., as if they had 8 bits, which gives noise.
            order = "L" if image.tag_v2.prefix == b"II" else "B"
            image.tile = [replace_raw_mode(tile, f"{tile[3][0]};16{order}") for tile in image.tile if tile[3][0] != "X"]
            self.raw_mode = f"{self.mode};16{order}"
        if self.is_compressed and self.raw_mode in NATIVE:  # libtiff has already put the bytes into the machine's order
            image.tile = [replace_raw_mode(tile, NATIVE[self.raw_mode]) for tile in image.tile]

    @property
    def bits(self):
        """Bits per value of a TIFF, of the first channel; 0 for other formats."""
        return int(first(self.tags.get(BITS_PER_SAMPLE, 1))) if self.tags else 0

    @property
    def signed(self):
        return first(self.tags.get(SAMPLE_FORMAT, UNSIGNED)) == SIGNED

    @property
    def has_16_bit_colours(self):
        return ";16" in self.raw_mode and self.mode in ("RGB", "RGBA", "RGBX")

    def is_deep(self, value_range):
        """Whether the values must be read as stored, since Pillow's conversion to 8 bits would not do."""
        if self.mode.startswith(("I", "F")) or self.mode == "L" and self.signed:
            return True
        if not self.has_16_bit_colours:
            return False
        if value_range is not None and (self.raw_mode.startswith("RGBa") or self.planar and self.is_compressed):
            raise ImageError(f"{self.path} stores 16-bit colours so that VALUE_RANGE cannot be applied; save it as PNG")
        return value_range is not None or b"sBIT" in self.png or self.key is not None

    @property
    def is_compressed(self):
        return self.image.info.get("compression", "raw") != "raw"

    def to_rgb(self, value_range):
        """Decode, and scale the stored values to 8 bits."""
        samples, alpha = self.read_colours() if self.has_16_bit_colours else (self.read_grey(), None)
        low, high = self.stated_range(samples) if value_range is None else value_range
        levels = to_levels(samples, low, high)
        if self.tags.get(PHOTOMETRIC) == 0:  # MinIsWhite
            levels = 255 - levels
        if self.key is not None:
            alpha = np.where(np.atleast_3d(samples == np.array(self.key)).all(2), 0, 255).astype(np.uint8)
        image = Image.fromarray(levels).convert("RGB")
        if alpha is not None:
            image.putalpha(Image.fromarray(alpha))
            image = to_rgb(image)
        image.info = dict(values=(samples.min().item(), samples.max().item()), range=(low, high))
        return image

    def read_grey(self):
        """The stored values of a grey image, upright: array (H, W)."""
        self.image.load()
        ImageOps.exif_transpose(self.image, in_place=True)
        samples = np.asarray(self.image)
        if self.mode == "F":
            if not np.isfinite(samples).all():
                raise ImageError(f"{self.path} contains values that are NaN or infinite; replace them, or remove it")
        elif self.mode == "L":
            samples = samples.view(np.int8)
        elif self.mode == "I" and self.bits == 32 and not self.signed:
            samples = samples.view(np.uint32)
        elif self.mode == "I" and self.bits == 16:
            samples = samples.astype(np.int16)
        elif self.maximum:
            samples = np.round(samples / self.factor).astype(np.uint16)
        return samples.astype(samples.dtype.newbyteorder("="), copy=False)

    def read_colours(self):
        """The stored values of 16-bit colours, upright: (uint16 array (H, W, 3), alpha (H, W) or None).

        Pillow has no mode for them, and keeps the first byte of each; read in the other byte order, it is the second.
        """
        if self.raw_mode == "LA;16B":
            grey, low, alpha, _ = np.moveaxis(self.read_bytes("RGBA"), 2, 0)
            return np.repeat((grey * np.uint16(256) + low)[..., None], 3, axis=2), alpha
        kind = self.raw_mode.partition(";")[0]
        other = "B" if self.raw_mode[-1] == "L" or self.raw_mode[-1] == "N" and np.little_endian else "L"
        high = self.read_bytes(None)
        low = self.read_bytes(f"{kind};16{other}")
        samples = high[..., :3] * np.uint16(256) + low[..., :3]
        return samples, high[..., 3] if kind == "RGBA" else None

    def read_bytes(self, raw_mode):
        """Decode the file with another of Pillow's raw modes: uint8 array (H, W, channels), upright."""
        with open(self.path, "rb") as file:
            image = open_image(file, self.path, b"")
            Stored(self.path, image, file)  # corrects the raw modes of planes
            if raw_mode is not None and self.planar:
                image.tile = [replace_raw_mode(tile, f"{tile[3][0][:-1]}{raw_mode[-1]}") for tile in image.tile]
            elif raw_mode is not None:
                image.tile = [replace_raw_mode(tile, raw_mode) for tile in image.tile]
            image.info.pop("transparency", None)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return np.asarray(image)

    def stated_range(self, samples):
        """The values of black and white, as the file states them, else those of its kind of numbers.

        Raises:
            ImageError: if nothing says which these are.
        """
        low, high = samples.min(), samples.max()
        if self.bits == 12:
            return 0, 4095
        if self.maximum:
            return 0, self.maximum
        stated = self.stated_maximum(samples)
        if stated is not None and 0 <= low and high <= stated:
            return 0, stated
        if samples.dtype.kind == "f":
            raise ImageError(
                f"{self.path} contains floating-point values from {low:g} to {high:g} without a scale: set VALUE_RANGE "
                "in makedata.py to those of black and white, or save it with 8 or 16 bits"
            )
        limit = {1: 127, 2: 32767 if samples.dtype.kind == "i" else 65535, 4: 65535}[samples.dtype.itemsize]
        if low < 0 or high > limit:
            raise ImageError(
                f"{self.path} contains values from {low} to {high}, and nothing says which are black and white; set "
                "VALUE_RANGE in makedata.py to these two, or save it with 8 or 16 bits"
            )
        return 0, limit

    def stated_maximum(self, samples):
        """The value of white that a TIFF, an OME-TIFF or a PNG states; None if it states none."""
        if self.png:
            bits = max(self.png.get(b"sBIT", b"\0"))
            # By its specification, a PNG's values are scaled to all 16 bits. Some programs store the plain values.
            unused = (samples & ((1 << 16 - bits) - 1)) <= 1 if 0 < bits < 16 else np.True_
            return (1 << bits) - 1 if not unused.all() else None
        match = re.search(r'<OME.*SignificantBits="(\d+)"', str(self.tags.get(DESCRIPTION, "")), re.DOTALL)
        if match and 8 < int(match[1]) <= 32:
            return (1 << int(match[1])) - 1
        for tag in (S_MAX_SAMPLE, MAX_SAMPLE):
            maximum = first(self.tags.get(tag, 0))
            # Others are statistics of the one image, by which images of a set must not be scaled.
            if maximum in (1,) if samples.dtype.kind == "f" else maximum in [(1 << bits) - 1 for bits in range(9, 32)]:
                return int(maximum)
        return None

    # --- 8 bits

    def high_bytes(self):
        """A function that notes in `info` that an RGB image has the first byte of each 16-bit value."""

        def note(image):
            image.info = {}
            if self.has_16_bit_colours:
                extrema = image.getextrema()
                low, high = min(low for low, _ in extrema), max(high for _, high in extrema)
                image.info = dict(values=(256 * low, 256 * high + 255 * (high > 0)), range=(0, 65535))
            return image

        return note

    def fix_palette(self):
        """Some programs write a TIFF's colour map, which has 16-bit values, with 8-bit ones."""
        colours = self.tags.get(COLOUR_MAP)
        if colours and self.image.mode in ("P", "PA") and max(colours) < 256:
            self.image.putpalette(bytes(colours), "RGB;L")

    def fix_transparency(self):
        """A PNG's transparent value is one of 2 or 4 bits, where Pillow has scaled the values to 8."""
        bits = self.png.get(b"IHDR", bytes(9))[8]
        if self.mode == "L" and self.key is not None and bits in (2, 4):
            self.image.info["transparency"] = (self.key & (1 << bits) - 1) * 255 // ((1 << bits) - 1)


def first(value):
    """The first of a TIFF tag's values, which Pillow gives as a tuple or a number."""
    return value[0] if isinstance(value, tuple) else value


def replace_raw_mode(tile, raw_mode):
    """A tile of a Pillow image with another raw mode."""
    args = (raw_mode, *tile[3][1:]) if isinstance(tile[3], tuple) else raw_mode
    return tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)  # before Pillow 11: a tuple


def read_png_chunks(file):
    """The chunks of an opened PNG before its pixels: {kind: content}, of short ones only."""
    chunks, place = {}, file.tell()
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"IDAT", b"IEND"):
            break
        if length <= 1024:
            chunks[kind] = file.read(length)
        file.seek(4 if length <= 1024 else length + 4, os.SEEK_CUR)
    file.seek(place)
    return chunks


def maximum_of_format(image, file):
    """(value of white, factor by which Pillow multiplies values) of formats whose header has it; (0, 1) of others."""
    if image.format == "PPM" and image.mode == "I":
        decoder, _, _, args = image.tile[0]
        maximum = args[1] if decoder != "raw" else 65535
        return maximum, 65535 / maximum
    if image.format == "JPEG2000" and image.mode.startswith("I"):
        place = file.tell()
        file.seek(0)
        marker = file.read(1 << 16).partition(b"\xff\x4f\xff\x51")[2]  # SIZ, the size of the codestream's image
        file.seek(place)
        bits = (marker[38] & 127) + 1 if len(marker) > 38 else 16
        return (1 << bits) - 1, 1 << 16 - bits
    return 0, 1


def to_levels(samples, low, high):
    """Scale values from `low` (black) to `high` (white) to 8 bits: uint8 array of the same shape."""

    def level(values):
        return np.clip((values.astype(np.float64) - low) * 255 / (high - low), 0, 255).astype(np.uint8)

    if samples.dtype == np.uint16:
        return level(np.arange(65536))[samples]
    return np.stack([level(row) for row in samples])  # row by row, since float64 takes 8 times the memory


# --- 8 bits


def to_rgb(image):
    """Convert a `PIL.Image.Image` of up to 8 bits per channel to RGB, transparency composited onto white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "LAB":
        return ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    if "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBA", "RGBa"):
        image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        if image.getchannel("A").getextrema() == (0, 0):  # an unused channel: nothing would be left of the image
            return image.convert("RGB")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
