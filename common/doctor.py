"""makedata.py --check: what is wrong with a folder of pictures or sounds, and what to do about it. Nothing is changed.

Near duplicates are found by a perceptual hash of 64 bits (imagehash's phash: the signs of the lowest frequencies of the
grey picture), which hardly changes when a picture is compressed, scaled or made brighter, but does when it is turned,
mirrored or cropped.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.extras import require
from common.images import ImageError, scan_class_folders
from common.manifest import MANIFEST, hash_file, read_json
from common.plots import plot_sheet
from common.sounds import duration, file_kind

SMALL_CLASS = 5  # a class smaller than the largest by more than this factor is worth a word
LONG_PICTURE = 2.0  # long side / short side from which squeezing to a square distorts much
MAX_PAIRS = 24  # pairs on the sheet
MAX_LISTED = 20  # files or pairs of a kind that are printed; report.txt holds all


@dataclass
class Picture:
    """One file: its class, its side of the split, and what it holds; `reason` says why it cannot be used."""

    path: Path
    name: str  # of its class
    side: str = ""  # "train", "val", or "" where it was not split
    reason: str = ""
    content: str = ""  # SHA-256
    size: tuple[int, int] = (0, 0)
    bits: np.ndarray | None = None  # bool (64,)

    def __str__(self):
        return f"{self.path}{f' ({self.side})' if self.side else ''}"


def examine(picture, kind):
    """Read one file, of a `Kind` of common/sounds.py, and fill in `picture`."""
    if not kind.fits(picture.path):
        picture.reason = f"{picture.path} is not named like a {kind.name} ({', '.join(kind.extensions)})"
        return picture
    try:
        image = kind.load(picture.path)
    except ImageError as error:
        picture.reason = str(error)
        return picture
    picture.content = hash_file(picture.path)
    picture.size = image.size
    if kind.name == "picture":
        picture.bits = require("imagehash").phash(image).hash.ravel()
    else:  # spectrograms of one word are all alike, so only identical recordings are worth a word
        picture.bits = np.unpackbits(np.frombuffer(bytes.fromhex(picture.content[:16]), np.uint8)).astype(bool)
    return picture


def find_near(bits, limit, block=2048):
    """Pairs of hashes that differ in at most `limit` bits.

    Args:
        bits: bool array (pictures, 64).
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


def read_sides(target):
    """{path of the source: "train" or "val"} as makedata.py split it, {} where it has not."""
    path = Path(target, MANIFEST)
    if not path.is_file():
        return {}
    return {Path(file["source"]): file["path"].split("/")[0] for file in read_json(path).get("files", [])}


def class_table(classes, pictures):
    """Lines: usable pictures of each class, as numbers and as bars."""
    counts = Counter(picture.name for picture in pictures)
    width, most = max(map(len, classes)), max(counts.values(), default=1)
    for name in classes:
        yield f"  {name:{width}}  {counts[name]:6}  {'#' * round(40 * counts[name] / most)}"
    small = [name for name in classes if counts[name] * SMALL_CLASS < most]
    if small:
        yield (
            f"  {', '.join(small)}: less than one {SMALL_CLASS}th of the largest class; bring more pictures, and look "
            "at each class's recall in report.txt, not at the accuracy alone"
        )


def size_table(pictures):
    """Lines: widths, heights and proportions."""
    sizes = np.array([picture.size for picture in pictures])
    for name, values in zip(("width", "height"), sizes.T):
        low, middle, high = np.percentile(values, [0, 50, 100]).astype(int)
        yield f"  {name:6}  {low} to {high} pixels, median {middle}"
    long = [p for p in pictures if max(p.size) > LONG_PICTURE * min(p.size)]
    yield f"  {np.mean(sizes.min(1) < 224):.0%} have a side below 224 pixels; an IMG_SIZE beyond them adds no detail"
    if long:
        yield (
            f"  {len(long)} are more than {LONG_PICTURE:g} times as long as wide, such as {long[0].path}; they are "
            "squeezed to a square: crop them to what matters"
        )


def length_table(pictures):
    """Line: how long recordings last."""
    low, middle, high = np.percentile([duration(picture.path) for picture in pictures], [0, 50, 100])
    yield f"  {low:.2f} to {high:.2f} s, median {middle:.2f}; SECONDS says how much of it the network hears"


def judge(first, second):
    """What is wrong with a pair, and how bad it is: (0 worst, kind, remedy)."""
    if first.name != second.name:
        return 0, "in two classes", "look at them; delete the one that stands in the wrong class"
    if first.side != second.side:
        return 1, "on both sides of the split", "the accuracy comes out too good; keep one of them"
    return 2, "in one class, on one side", "harmless; keep one of them if you want each picture to count once"


def check(source, target, near, folder, sound=None):
    """Print what is wrong with `source`/<class>/ and write report.txt and pairs.png.

    Args:
        source: folder that holds <class>/<picture>.
        target: folder that makedata.py made, for the sides of the split.
        near: bits in which the hashes of near duplicates may differ, of 64.
        folder: where report.txt and pairs.png go.
        sound: None for pictures; for recordings, of which only identical ones are found, see common/sounds.py.

    Returns:
        Exit status: 0 nothing to do, 3 something is wrong.
    """
    if sound is None:
        require("imagehash")
    kind = file_kind(sound)
    classes, beside = scan_class_folders(source)
    sides = read_sides(target)
    pictures = [Picture(path, name, sides.get(path, "")) for name, paths in classes.items() for path in paths]
    with ThreadPoolExecutor() as pool:  # decoding lets other threads run
        work = pool.map(examine, pictures, [kind] * len(pictures))
        pictures = list(tqdm(work, total=len(pictures), desc="checking", unit="img", leave=False))
    usable = [picture for picture in pictures if not picture.reason]
    broken = [picture.reason for picture in pictures if picture.reason]
    broken += [f"{path} does not lie in a class folder" for path in beside if kind.fits(path)]

    sections = [(f"{len(usable)} usable {kind.name}s in {len(classes)} classes", list(class_table(classes, usable)))]
    found = []
    if usable:
        sections.append(("sizes", list(size_table(usable))) if sound is None else ("lengths", [*length_table(usable)]))
        limit = near if sound is None else 0
        for first, second, bits in find_near(np.stack([picture.bits for picture in usable]), limit):
            first, second = usable[first], usable[second]
            rank, kind, remedy = judge(first, second)
            what = "identical" if first.content == second.content else f"{bits} of 64 bits differ"
            found.append((rank, kind, remedy, first, second, what))
    if broken:
        sections.append((f"{len(broken)} that cannot be used: replace or remove them", [f"  {r}" for r in broken]))
    found.sort(key=lambda pair: pair[0])
    for kind, remedy in dict.fromkeys((kind, remedy) for _, kind, remedy, *_ in found):
        lines = [f"  {first} = {second}: {what}" for _, k, _, first, second, what in found if k == kind]
        sections.append((f"{len(lines)} pairs of near or exact duplicates {kind}: {remedy}", lines))
    if not found and not broken:
        sections.append(("no duplicates, nothing broken", []))

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "report.txt", "w", encoding="utf-8", errors="surrogateescape") as file:
        for title, lines in sections:
            print(title, *lines, sep="\n", file=file)
            more = len(lines) - max(MAX_LISTED, len(classes) + 1)
            shown = lines if more <= 0 else [*lines[:MAX_LISTED], f"  ... and {more} more in {folder / 'report.txt'}"]
            print(title, *shown, sep="\n")
    (folder / "pairs.png").unlink(missing_ok=True)
    if found:
        draw_pairs(found[:MAX_PAIRS], file_kind(sound), folder / "pairs.png")
        print(f"\nthe first {min(len(found), MAX_PAIRS)} pairs are drawn in {folder / 'pairs.png'}")
    return 3 if broken or any(rank < 2 for rank, *_ in found) else 0


def draw_pairs(found, kind, path):
    """Draw pairs, of a `Kind` of files, side by side, three to a row."""
    cells, captions = [], []
    for _, where, _, first, second, what in found:
        for picture, note in ((first, what), (second, where)):
            cells.append(kind.load(picture.path).resize((192, 192)))
            captions.append(f"{picture.name}{f', {picture.side}' if picture.side else ''}\n{picture.path.name}\n{note}")
    plot_sheet(cells, captions, path)
