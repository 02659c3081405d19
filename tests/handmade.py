"""Image files of kinds that Pillow does not write, made by hand after the specifications, as bytes."""

import struct
import zlib

import numpy as np

SHORT, LONG, FLOAT, ASCII, UNDEFINED = 3, 4, 11, 2, 7
SIZES = {ASCII: 1, UNDEFINED: 1, SHORT: 2, LONG: 4, FLOAT: 4}
CODES = {SHORT: "H", LONG: "I", FLOAT: "f"}
BIT_ORDER = np.array([int(f"{value:08b}"[::-1], 2) for value in range(256)], np.uint8)


def pack_bits(values, bits):
    """Rows (H, N) of values of 1 to 16 bits as bytes, the most significant bit first, each row padded to a byte."""
    planes = values.astype(np.int64)[..., None] >> np.arange(bits)[::-1] & 1  # (H, N, bits)
    return np.packbits(planes.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def tiff(
    pixels, *, photometric=None, bits=None, order="<", planar=False, tile=None, deflate=False, fill_order=1, tags=()
):
    """A TIFF.

    Args:
        pixels: array (H, W) or (H, W, channels); its dtype gives bits and SampleFormat.
        photometric: 0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK, 8 Lab; None: 1 or 2.
        bits: of each value, if fewer than those of the dtype.
        order: "<" or ">".
        planar: each channel by itself.
        tile: side of tiles in pixels; None: one strip, of each channel if planar.
        deflate: compressed.
        fill_order: 2: the lowest bit of each byte first.
        tags: more of them, or others: [(number, type, values), ...].
    """
    pixels = np.atleast_3d(pixels)
    height, width, channels = pixels.shape
    bits = bits or 8 * pixels.dtype.itemsize
    kind = {"u": 1, "i": 2, "f": 3, "b": 1}[pixels.dtype.kind]

    def encode(block):  # (h, w, c)
        rows = block.reshape(len(block), -1)
        content = pack_bits(rows, bits) if bits % 8 else rows.astype(rows.dtype.newbyteorder(order)).tobytes()
        content = zlib.compress(content) if deflate else content
        return BIT_ORDER[np.frombuffer(content, np.uint8)].tobytes() if fill_order == 2 else content

    blocks = []
    for layer in np.split(pixels, channels, axis=2) if planar else [pixels]:
        if tile is None:
            blocks.append(encode(layer))
            continue
        padded = np.pad(layer, ((0, -height % tile), (0, -width % tile), (0, 0)))
        for top in range(0, height, tile):
            blocks += [encode(padded[top : top + tile, left : left + tile]) for left in range(0, width, tile)]
    offsets = (8 + np.cumsum([0, *map(len, blocks)])).tolist()
    if photometric is None:
        photometric = 2 if channels >= 3 else 1
    directory = {
        256: (LONG, [width]), 257: (LONG, [height]), 258: (SHORT, [bits] * channels),
        259: (SHORT, [8 if deflate else 1]),
        262: (SHORT, [photometric]), 266: (SHORT, [fill_order]), 277: (SHORT, [channels]),
        284: (SHORT, [2 if planar else 1]), 339: (SHORT, [kind] * channels),
    }  # fmt: skip
    if tile is None:
        directory |= {278: (LONG, [height]), 273: (LONG, offsets[:-1]), 279: (LONG, list(map(len, blocks)))}
    else:
        directory |= {322: (LONG, [tile]), 323: (LONG, [tile])}
        directory |= {324: (LONG, offsets[:-1]), 325: (LONG, list(map(len, blocks)))}
    if channels == 4 and photometric == 2:
        directory[338] = (SHORT, [2])  # alpha
    directory |= {number: (type, values) for number, type, values in tags}

    start = offsets[-1] + offsets[-1] % 2
    place = start + 2 + 12 * len(directory) + 4
    entries, far = b"", b""
    for number, (type, values) in sorted(directory.items()):
        content = values if isinstance(values, bytes) else struct.pack(f"{order}{len(values)}{CODES[type]}", *values)
        count = len(content) // SIZES[type]
        if len(content) <= 4:
            content = content.ljust(4, b"\0")
        else:
            far, content = far + content + bytes(len(content) % 2), struct.pack(f"{order}I", place + len(far))
        entries += struct.pack(f"{order}HHI", number, type, count) + content
    body = b"".join(blocks).ljust(start - 8, b"\0")
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, start)
    return head + body + struct.pack(f"{order}H", len(directory)) + entries + bytes(4) + far


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(pixels, *, bits=None, colour=None, chunks=()):
    """A PNG.

    Args:
        pixels: array (H, W) or (H, W, channels) of uint8 or uint16.
        bits: of each value, if fewer than those of the dtype.
        colour: its colour type; None: 0, 4, 2 or 6 by the number of channels.
        chunks: [(kind, content), ...] before the pixels.
    """
    pixels = np.atleast_3d(pixels)
    height, width, channels = pixels.shape
    bits = bits or 8 * pixels.dtype.itemsize
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels] if colour is None else colour
    rows = pixels.reshape(height, -1)
    content = pack_bits(rows, bits) if bits < 8 else rows.astype(rows.dtype.newbyteorder(">")).tobytes()
    length = len(content) // height
    lines = b"".join(b"\0" + content[row * length : (row + 1) * length] for row in range(height))
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    every = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(kind, content) for kind, content in every)


RAMP = np.arange(256).reshape(16, 16)  # every grey value once
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3))
CLEAR = 77  # the grey value that is transparent in some


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=2)


def on_white(colours, clear):
    """RGB pixels of which those where `clear` is true are white."""
    return np.where(clear[..., None], 255, colours)


def images():
    """Every kind of file that needs care.

    Yields:
        (name, content, VALUE_RANGE, expected): expected are the RGB pixels (H, W, 3), or words of the refusal.
    """
    wide_grey, wide = (RAMP * 257).astype(np.uint16), (COLOURS * 257).astype(np.uint16)  # white is 65535
    twelve, colours_12 = (RAMP * 16 + 5).astype(np.uint16), (COLOURS * 16 + 3).astype(np.uint16)  # white is 4095
    grey_12, rgb_12 = grey((RAMP * 16 + 5) * 255 // 4095), (COLOURS * 16 + 3) * 255 // 4095
    dark_12 = grey((RAMP * 16 + 5) // 257)
    opaque = np.full((16, 16), 65535, np.uint16)
    low = [0, 4095]

    # --- TIFF: how values are arranged
    for order, ending in (("<", "little"), (">", "big")):
        for deflate in (False, True):
            for tile in (None, 16):
                how = dict(order=order, deflate=deflate, tile=tile)
                name = f"{ending}{' deflate' * deflate}{' tiles' * bool(tile)}.tif"
                yield f"16 bit colour {name}", tiff(wide, **how), None, COLOURS
                yield f"planar 16 bit {name}", tiff(wide, planar=True, **how), None, COLOURS
                yield f"planar 8 bit {name}", tiff(COLOURS.astype(np.uint8), planar=True, **how), None, COLOURS
                yield f"16 bit grey {name}", tiff(wide_grey, **how), None, grey(RAMP)
                yield f"12 of 16 bit colour {name}", tiff(colours_12, **how), low, rgb_12
                refused = "VALUE_RANGE cannot be applied" if deflate else rgb_12
                yield f"planar 12 of 16 bit {name}", tiff(colours_12, planar=True, **how), low, refused
                yield f"12 of 16 bit grey {name}", tiff(twelve, **how), low, grey_12
                signed = RAMP.astype(np.int16) - 100
                yield f"int16 {name}", tiff(signed, **how), [-100, 155], grey(RAMP)
                yield f"int32 {name}", tiff(signed.astype(np.int32) * 999, **how), [-99900, 154845], grey(RAMP)
                yield f"float {name}", tiff(RAMP.astype(np.float32) / 8, **how), [0, 255 / 8], grey(RAMP)
                unknown = "of a kind that Pillow does not read" if order == ">" else grey(255 - RAMP)
                yield f"white is zero {name}", tiff(wide_grey, photometric=0, **how), None, unknown
                unknown = unknown if order == ">" else grey(RAMP * 16 * 255 // 4095)
                yield f"12 bits, packed {name}", tiff((RAMP * 16).astype(np.uint16), bits=12, **how), None, unknown
                unknown = unknown if order == ">" else grey(RAMP)
                content = tiff(RAMP.astype(np.uint32) * 16_843_009, **how)
                yield f"uint32 {name}", content, [0, 2**32 - 1], unknown
                table = np.concatenate([np.arange(256), 255 - np.arange(256), np.full(256, 7)]).tolist()
                seen = np.dstack([RAMP, 255 - RAMP, np.full((16, 16), 7)])
                for factor, bits in ((1, 8), (257, 16)):
                    tags = [(320, SHORT, [factor * value for value in table])]
                    content = tiff(RAMP.astype(np.uint8), photometric=3, tags=tags, **how)
                    yield f"palette of {bits} bit colours {name}", content, None, seen
    seen = (255 * (RAMP % 3 == 0)).astype(int)
    for photometric in (0, 1):
        for fill_order in (1, 2):
            how = dict(photometric=photometric, fill_order=fill_order)
            name = f"{'black' if photometric else 'white'} is zero, fill order {fill_order}.tif"
            yield f"1 bit {name}", tiff(RAMP % 3 == 0, bits=1, **how), None, grey(seen if photometric else 255 - seen)
            values = 17 * (RAMP % 16 if photometric else 15 - RAMP % 16)
            yield f"4 bit {name}", tiff((RAMP % 16).astype(np.uint8), bits=4, **how), None, grey(values)
    for deflate in (False, True):
        content = tiff(RAMP % 3 == 0, bits=1, fill_order=2, deflate=deflate)
        yield f"1 bit, compressed {deflate}.tif", content, None, grey(seen)
    cmyk = np.dstack([65535 - wide, 0 * wide_grey])
    yield "cmyk 16 bit.tif", tiff(cmyk, photometric=5), None, COLOURS
    yield "cmyk 8 bit.tif", tiff((cmyk // 257).astype(np.uint8), photometric=5), None, COLOURS
    lab = np.broadcast_to(np.uint8([137, 0, 0]), (16, 16, 3))  # L* 53.7
    yield "lab.tif", tiff(lab, photometric=8), None, np.full((16, 16, 3), 128)
    yield "10 bits, packed.tif", tiff(RAMP.astype(np.uint16), bits=10), None, "of a kind that Pillow does not read"
    yield "five channels.tif", tiff(np.dstack([wide] * 2)[..., :5]), None, "of a kind that Pillow does not read"

    # --- TIFF: what values mean
    for name, tag in (("smax", (341, SHORT, [4095])), ("max", (281, SHORT, [4095]))):
        yield f"{name} 4095.tif", tiff(twelve, tags=[tag]), None, grey_12
    ten = (RAMP * 4).astype(np.uint16)
    yield "max 10 bits.tif", tiff(ten, tags=[(281, SHORT, [1023])]), None, grey(RAMP * 1020 // 1023)
    yield "max below the values.tif", tiff(wide_grey, tags=[(281, SHORT, [4095])]), None, grey(RAMP)
    yield "max is a statistic.tif", tiff(twelve, tags=[(281, SHORT, [4085])]), None, dark_12
    ome = b'<?xml?><OME><Pixels SignificantBits="12" Type="uint16"/></OME>\0'
    yield "ome.tif", tiff(twelve, tags=[(270, ASCII, ome)]), None, grey_12
    floats = RAMP.astype(np.float32) / 255
    yield "float with a scale.tif", tiff(floats, tags=[(341, FLOAT, [1.0])]), None, grey(RAMP)
    yield "float without a scale.tif", tiff(floats), None, "floating-point values from 0 to 1 without a scale: set"
    floats = np.where(RAMP == 9, np.nan, floats).astype(np.float32)
    yield "float with NaN.tif", tiff(floats), [0, 1], "NaN or infinite"
    yield "negative.tif", tiff(signed), None, "values from -100 to 155, and nothing says which are black and white"
    yield "int16.tif", tiff((RAMP * 128).astype(np.int16)), None, grey(RAMP * 128 * 255 // 32767)
    yield "int8.tif", tiff((RAMP - 128).astype(np.int8)), [-128, 127], grey(RAMP)
    yield "int8 negative.tif", tiff((RAMP - 128).astype(np.int8)), None, "values from -128 to 127"
    yield "int32.tif", tiff(wide_grey.astype(np.int32)), None, grey(RAMP)
    yield "int32 beyond 16 bits.tif", tiff(RAMP.astype(np.int32) * 999), None, "values from 0 to 254745"
    yield "uint32 beyond 31 bits.tif", tiff(RAMP.astype(np.uint32) << 24), None, "values from 0 to 4278190080"
    raw = tiff(COLOURS.astype(np.uint8), tags=[(50706, UNDEFINED, b"\1\4\0\0")])
    yield "digital negative.tif", raw, None, "raw file"
    preview = tiff(COLOURS.astype(np.uint8), tags=[(254, LONG, [1]), (330, LONG, [8])])
    yield "preview only.tif", preview, None, "raw file"

    # --- PNG
    for bits in (1, 2, 4, 8):
        values, key = (RAMP % (1 << bits)).astype(np.uint8), (1 << bits) // 2
        content = png(values, bits=bits, chunks=[(b"tRNS", struct.pack(">H", key))])
        seen = on_white(grey(values * (255 // (2**bits - 1))), values == key)
        yield f"transparent {bits} bit.png", content, None, seen
    near = wide_grey.copy()
    near[0, 0] = CLEAR * 257 + 1  # not transparent
    content = png(near, chunks=[(b"tRNS", struct.pack(">H", CLEAR * 257))])
    yield "transparent 16 bit.png", content, None, on_white(grey(near // 257), RAMP == CLEAR)
    near = wide.copy()
    near[0, 0] = near[3, 4] ^ [0, 0, 1]
    content = png(near, chunks=[(b"tRNS", struct.pack(">HHH", *near[3, 4].tolist()))])
    yield "transparent 16 bit colour.png", content, None, on_white(near // 257, (near == near[3, 4]).all(2))
    yield "12 of 16 bit.png", png(twelve), low, grey_12
    yield "12 of 16 bit colour.png", png(colours_12), low, rgb_12
    yield "12 of 16 bit, white unknown.png", png(twelve), None, dark_12
    yield "12 of 16 bit and alpha.png", png(np.dstack([twelve, opaque])), low, grey_12
    yield "12 of 16 bit colour and alpha.png", png(np.dstack([colours_12, opaque])), low, rgb_12
    yield "16 bit and alpha.png", png(np.dstack([wide_grey, opaque])), None, grey(RAMP)
    yield "16 bit colour.png", png(wide), None, COLOURS
    half = np.where(RAMP > 99, opaque, 0).astype(np.uint16)
    yield "16 bit, half transparent.png", png(np.dstack([wide_grey, half])), None, on_white(grey(RAMP), RAMP <= 99)
    yield "16 bit colour, half transparent.png", png(np.dstack([wide, half])), None, on_white(COLOURS, RAMP <= 99)
    depth = [(b"sBIT", bytes([12]))]
    yield "sBIT plain.png", png(twelve, chunks=depth), None, grey_12
    yield "sBIT plain colour.png", png(colours_12, chunks=[(b"sBIT", bytes([12] * 3))]), None, rgb_12
    scaled = (twelve * 65535.0 / 4095).astype(np.uint16)
    yield "sBIT scaled.png", png(scaled, chunks=depth), None, grey(scaled // 257)
    yield "sBIT shifted.png", png(twelve << 4, chunks=depth), None, grey((twelve << 4) // 257)
    dark = (RAMP << 4).astype(np.uint16)
    yield "sBIT shifted, dark.png", png(dark, chunks=depth), None, grey(dark // 257)
    yield "8 bit with sBIT.png", png(RAMP.astype(np.uint8), chunks=[(b"sBIT", b"\5")]), None, grey(RAMP)
    yield "8 bit.png", png(RAMP.astype(np.uint8)), low, grey(RAMP)
    nothing = np.zeros((16, 16), np.uint8)
    yield "alpha 0 everywhere.png", png(np.dstack([COLOURS, nothing]).astype(np.uint8)), None, COLOURS
    yield "grey, alpha 0 everywhere.png", png(np.dstack([RAMP, nothing]).astype(np.uint8)), None, grey(RAMP)
    yield "16 bit, alpha 0 everywhere.png", png(np.dstack([wide, nothing]).astype(np.uint16)), None, COLOURS
    much = dict(zTXt=b"k\0\0" + zlib.compress(bytes(3 << 20)), iTXt=b"k\0\1\0\0\0" + zlib.compress(b"a" * (3 << 20)))
    much |= dict(tEXt=b"k\0" + b"a" * (3 << 20), iCCP=b"p\0\0" + zlib.compress(bytes(3 << 20)))
    for kind, text in much.items():
        yield f"long {kind}.png", png(COLOURS.astype(np.uint8), chunks=[(kind.encode(), text)]), None, COLOURS

    # --- portable anymaps
    yield "grey 4095.pgm", b"P5 16 16 4095\n" + (RAMP * 16).astype(">u2").tobytes(), None, grey(RAMP * 16 * 255 // 4095)
    yield "grey 4095 in part.pgm", b"P5 16 16 4095\n" + (RAMP * 4).astype(">u2").tobytes(), [0, 1020], grey(RAMP)
    yield "grey 65535.pgm", b"P5 16 16 65535\n" + wide_grey.astype(">u2").tobytes(), None, grey(RAMP)
    yield "12 of 16 bit.pgm", b"P5 16 16 65535\n" + twelve.astype(">u2").tobytes(), low, grey_12
    yield "grey 255.pgm", b"P5 16 16 255\n" + RAMP.astype(np.uint8).tobytes(), None, grey(RAMP)
    yield "text.pgm", f"P2\n# by hand\n16 16 255 {' '.join(map(str, RAMP.ravel()))}".encode(), None, grey(RAMP)
    yield "colour.ppm", b"P6 16 16 255\n" + COLOURS.astype(np.uint8).tobytes(), None, COLOURS
    yield "16 bit colour.ppm", b"P6 16 16 65535\n" + wide.astype(">u2").tobytes(), None, COLOURS
    yield "text.ppm", f"P3 16 16 255 {' '.join(map(str, COLOURS.ravel()))}".encode(), None, COLOURS
    yield "bits.pbm", b"P4 16 16\n" + np.packbits(RAMP % 3 != 0, axis=1).tobytes(), None, grey(255 * (RAMP % 3 == 0))
    yield "any.pnm", b"P6 16 16 255\n" + COLOURS.astype(np.uint8).tobytes(), None, COLOURS
