"""makedata.py --check: what is wrong with a folder of images or recordings, and how to fix it. Nothing is changed.

Near duplicates are found by a perceptual hash of 64 bits (imagehash's phash: the signs of the lowest frequencies of the
grey image), which hardly changes when an image is compressed, scaled or brightened, but does when it is rotated,
mirrored or cropped.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common.audio import duration
from common.contents import hash_file
from common.extras import require
from common.files import write_text
from common.images import ImageError, scan_class_folders
from common.manifest import MANIFEST, read_table
from common.plots import plot_sheet
from common.progress import Progress
from common.text import label, pad, width
from common.workers import map_in_threads
from prepare.pixels import Pixels, describe_pixels, look_at

SMALL_CLASS = 5  # a class that is smaller than the largest by more than this factor is reported
LONG_IMAGE = 2.0  # aspect ratio from which resizing to a square distorts much
MAX_PAIRS = 24  # pairs in pairs.png
MAX_LISTED = 20  # files or pairs of a kind that are printed; report.txt lists all


@dataclass
class Sample:
    """One file: its class, its side of the split, and its content; `reason` says why it cannot be used."""

    path: Path
    name: str  # of its class
    side: str = ""  # "train", "val", "test", or "" if it was not split
    reason: str = ""
    content: str = ""  # SHA-256
    size: tuple[int, int] = (0, 0)  # width, height
    bits: np.ndarray | None = None  # bool (64,)
    pixels: Pixels | None = None

    def __str__(self):
        return f"{self.path}{f' ({self.side})' if self.side else ''}"


def check(source, target, near, folder, kind, value_range):
    """Print what is wrong with `source`/<class>/ and write report.txt and pairs.png.

    Args:
        source: folder that contains <class>/<image>.
        target: folder that makedata.py made, for the sides of the split.
        near: bits of 64 in which the hashes of near duplicates may differ.
        folder: output folder of report.txt and pairs.png.
        kind: a `common.audio.Kind`; of recordings only identical ones are found.
        value_range: the constant VALUE_RANGE.

    Returns:
        Exit status: 0 nothing to do, 3 something is wrong.
    """
    recordings = kind.name == "recording"
    if not recordings:
        require("imagehash")
    classes = scan_class_folders(source)
    sides = read_sides(target)
    samples = [Sample(path, name, sides.get(path, "")) for name in classes for path in map(Path, classes[name])]
    work = map_in_threads(partial(examine, kind=kind), samples, f"{kind.name}s")  # decoding releases the GIL
    samples = list(Progress(work, total=len(samples), desc="checking", unit="img", leave=False))
    usable = [sample for sample in samples if not sample.reason]
    broken = [sample.reason for sample in samples if sample.reason]
    broken += [f"{path} is not in a class folder" for path in classes.beside if kind.fits(path)]

    sections = [(f"{len(usable)} usable {kind.name}s in {len(classes)} classes", list(class_table(classes, usable)))]
    pairs = []
    if usable:
        sections.append(("lengths", list(length_table(usable))) if recordings else ("sizes", list(size_table(usable))))
        for first, second, bits in find_near(np.stack([sample.bits for sample in usable]), 0 if recordings else near):
            first, second = usable[first], usable[second]
            what = "identical" if first.content == second.content else f"{bits} of 64 bits differ"
            pairs.append((*judge(first, second), first, second, what))
    contents = {name: {sample.content for sample in usable if sample.name == name} for name in classes}
    small = [name for name, different in contents.items() if len(different) < 2]
    if small:
        lines = [f"  {name}: {len(contents[name])}" for name in small]
        sections.append((f"{len(small)} classes with fewer than two different {kind.name}s: add some", lines))
    if broken:
        sections.append((f"{len(broken)} unusable files: replace or remove them", [f"  {r}" for r in broken]))
    odd = list(describe_pixels({sample.path: sample.pixels for sample in usable if sample.pixels}, value_range))
    if odd:
        sections.append(("files that are probably not read as they should be", [f"  {line}" for line in odd]))
    pairs.sort(key=lambda pair: pair[0])
    for where, remedy in dict.fromkeys((where, remedy) for _, where, remedy, *_ in pairs):
        lines = [f"  {first} = {second}: {what}" for _, w, _, first, second, what in pairs if w == where]
        sections.append((f"{len(lines)} pairs of near or exact duplicates {where}: {remedy}", lines))
    if not pairs and not broken and not small and not odd:
        sections.append(("no duplicates, no unusable files", []))

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.txt", "".join(f"{line}\n" for title, lines in sections for line in (title, *lines)))
    (folder / "pairs.png").unlink(missing_ok=True)
    if pairs:
        draw_pairs(pairs[:MAX_PAIRS], kind, folder / "pairs.png")
    for title, lines in sections:
        more = len(lines) - max(MAX_LISTED, len(classes) + 1)
        shown = lines if more <= 0 else [*lines[:MAX_LISTED], f"  ... and {more} more in {folder / 'report.txt'}"]
        print(title, *shown, sep="\n")
    if pairs:
        print(f"\nthe first {min(len(pairs), MAX_PAIRS)} pairs are drawn in {folder / 'pairs.png'}")
    return 3 if broken or small or odd or any(rank < 2 for rank, *_ in pairs) else 0


def read_sides(target):
    """{path of the source: "train", "val" or "test"} as makedata.py split it; {} if it has not."""
    if not Path(target, MANIFEST).is_file():
        return {}
    table = read_table(target)
    return {Path(source): path.split("/")[0] for source, path in zip(table.source, table.path)}


def examine(sample, kind):
    """Read one file, of a `common.audio.Kind`, and complete `sample`."""
    if not kind.fits(sample.path):
        sample.reason = kind.why_not(sample.path)
        return sample
    try:
        image = kind.load(sample.path)
    except ImageError as error:
        sample.reason = str(error)
        return sample
    sample.content = hash_file(sample.path)
    sample.size, sample.pixels = image.size, look_at(image)
    if kind.name == "image":
        [imagehash] = require("imagehash")
        sample.bits = imagehash.phash(image).hash.ravel()
    else:  # spectrograms of one word are all similar, so only identical recordings are reported
        sample.bits = np.unpackbits(np.frombuffer(bytes.fromhex(sample.content[:16]), np.uint8)).astype(bool)
    return sample


def class_table(classes, samples):
    """Lines: usable files of each class, as numbers and as bars."""
    counts = Counter(sample.name for sample in samples)
    columns, most = max(width(label(name, 60)) for name in classes), max(counts.values(), default=1)
    for name in classes:
        yield f"  {pad(label(name, 60), columns)}  {counts[name]:6}  {'#' * round(40 * counts[name] / most)}"
    small = [name for name in classes if counts[name] * SMALL_CLASS < most]
    if small:
        yield (
            f"  {', '.join(small)}: less than a {SMALL_CLASS}th of the largest class; add more, and look at each "
            "class's recall in report.txt, not at the accuracy alone"
        )


def length_table(samples):
    """Line: how long recordings last."""
    low, middle, high = np.percentile([duration(sample.path) for sample in samples], [0, 50, 100])
    yield f"  {low:.2f} to {high:.2f} s, median {middle:.2f}; the network hears the first SECONDS of each"


def size_table(samples):
    """Lines: widths, heights and aspect ratios."""
    sizes = np.array([sample.size for sample in samples])
    for name, values in zip(("width", "height"), sizes.T):
        low, middle, high = np.percentile(values, [0, 50, 100]).astype(int)
        yield f"  {name:6}  {low} to {high} pixels, median {middle}"
    long = [sample for sample in samples if max(sample.size) > LONG_IMAGE * min(sample.size)]
    yield f"  {np.mean(sizes.min(1) < 224):.0%} have a side below 224 pixels; an IMG_SIZE beyond it adds no detail"
    if long:
        yield (
            f"  {len(long)} have an aspect ratio above {LONG_IMAGE:g}, such as {long[0].path}; they are resized to a "
            "square: crop them to what matters"
        )


def find_near(bits, limit, block=2048):
    """Pairs of hashes that differ in at most `limit` bits.

    Args:
        bits: bool array (images, 64).
        limit: number of bits.
        block: rows that are compared at once.

    Returns:
        int array (pairs, 3): first, second (first < second), number of bits; the nearest pairs first.
    """
    signs = np.where(bits, 1.0, -1.0).astype(np.float32)
    pairs = []
    for start in range(0, len(signs), block):
        # The product of two hashes of +1 and -1 is 64 - 2 * the number of bits that differ.
        distance = (bits.shape[1] - signs[start : start + block] @ signs[start:].T) / 2
        first, second = np.nonzero(np.triu(distance <= limit, k=1))
        pairs.append(np.stack([first + start, second + start, distance[first, second]], axis=1).astype(int))
    pairs = np.concatenate(pairs)
    return pairs[np.argsort(pairs[:, 2], kind="stable")]


def judge(first, second):
    """What is wrong with a pair, and how bad it is: (rank, 0 is the worst; where; remedy)."""
    if first.name != second.name:
        return 0, "in two classes", "look at them; delete the one in the wrong class"
    if first.side != second.side:
        return 1, "on both sides of the split", "they make the accuracy too high; keep one of them"
    return 2, "in one class, on one side", "harmless; keep one of them if each is to count once"


def draw_pairs(pairs, kind, path):
    """Draw pairs of files of a `common.audio.Kind` side by side, three to a row."""
    cells, captions = [], []
    for _, where, _, first, second, what in pairs:
        for sample, note in ((first, what), (second, where)):
            cells.append(kind.load(sample.path).resize((192, 192)))
            side = f", {sample.side}" if sample.side else ""
            captions.append(f"{label(sample.name)}{side}\n{label(sample.path.name)}\n{note}")
    plot_sheet(cells, captions, path)
