"""A drawn stand-in for a data set of plant seedlings, so that everything runs without a download.

Each image shows one seedling from above on gravelly soil, as a camera over a seed tray sees it.
The twelve classes are crops and weeds of northern European fields.  They differ in form: how many
leaves there are and how these are arranged, shaped, lobed and stalked.  Age, pose, light, soil and
leaf colour vary at random within each class, so that neither colour nor place gives a class away.

The images are polygons and strokes; they need nothing but Pillow and numpy.  They are meant for
demonstrations and tests: how well a model does on them says nothing about real plants.
"""

from __future__ import annotations

import cmath
import colorsys
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from common.files import written_whole

SUPERSAMPLING = 3  # images are drawn this many times larger and then averaged down
MIN_SIZE = 16  # pixels; in smaller images a leaf is hardly a pixel wide

SHADOW = (12, 10, 6)
PALE = (232, 248, 190)  # veins, hairs and the middle of a leaf
Colour = tuple[int, ...]


@dataclass(frozen=True)
class Leaf:
    """Form of a leaf.  Lengths are relative to the blade, which is the leaf without its stalk."""

    ratio: float  # length / width; for a feather, length / thickness of its midrib
    widest: float = 0.5  # where the blade is widest: 0 at its base, 1 at its tip
    pointed: float = 1.0  # 1: elliptic, 2: lens-shaped with a sharp tip, below 1: blunt
    stalk: float = 0.0  # length of the stalk
    lobes: int = 0  # teeth or lobes on each side; on a palmate leaf, in all
    depth: float = 0.0  # how deep the lobes are cut; 1 is down to the midrib
    notch: float = 0.0  # how deep the tip is indented
    palmate: bool = False  # lobes spread from the end of the stalk, like fingers from a hand
    leaflets: int = 0  # pairs of leaflets, themselves divided, that make the leaf a feather


@dataclass(frozen=True)
class Plant:
    """What tells the seedlings of one species from the others."""

    nodes: tuple[int, int]  # points of the stem that bear leaves, when young and when grown
    hue: float  # degrees on the colour wheel: 60 is yellow, 120 is green
    leaf: Leaf
    seed_leaf: Leaf | None = None  # the form of the pair that opens first; grasses have none
    per_node: int = 1  # leaves at each node
    turn: float = 137.5  # degrees from one node to the next; 137.5 makes a rosette
    bend: float = 0.35  # radians by which a leaf curves at most
    saturation: float = 0.56
    red: float = 0.0  # tint of stalks and leaf bases, 0 to 1
    bloom: float = 0.0  # pale mealy coat of the leaves, 0 to 1
    gloss: float = 0.0  # reflection of the sky on the leaves, 0 to 1
    hairs: int = 0  # hairs along each margin of a leaf


_PLANTS = {
    "Black-grass": Plant(
        (2, 4), 134, Leaf(15, widest=0.25, pointed=0.8), turn=170, bend=0.9, red=0.9),
    "Charlock": Plant(
        (2, 4), 80, Leaf(1.5, widest=0.58, stalk=0.35, lobes=5, depth=0.3),
        Leaf(0.8, pointed=0.7, stalk=0.6, notch=0.3), turn=100, hairs=12),
    "Cleavers": Plant(
        (1, 2), 112, Leaf(3.8, widest=0.6, pointed=1.4, stalk=0.05),
        Leaf(1.5, stalk=0.5, notch=0.1), per_node=6, turn=30, bend=0.2, hairs=10),
    "Common Chickweed": Plant(
        (1, 4), 98, Leaf(1.5, widest=0.38, pointed=1.6, stalk=0.5),
        Leaf(2.8, pointed=1.5, stalk=0.5), per_node=2, turn=90, saturation=0.64),
    "Common wheat": Plant(
        (2, 4), 114, Leaf(8.5, widest=0.3, pointed=0.7), turn=170, bend=0.9),
    "Fat Hen": Plant(
        (1, 4), 136, Leaf(1.6, widest=0.4, pointed=1.9, stalk=0.4, lobes=4, depth=0.18),
        Leaf(3.6, stalk=0.3), per_node=2, turn=90, saturation=0.34, red=0.2, bloom=1.0),
    "Loose Silky-bent": Plant(
        (4, 8), 78, Leaf(25, widest=0.3, pointed=0.8), turn=150, bend=1.1, red=0.2),
    "Maize": Plant(
        (2, 4), 96, Leaf(4.6, widest=0.42), turn=172, bend=0.8, gloss=0.3),
    "Scentless Mayweed": Plant(
        (4, 8), 116, Leaf(40, stalk=0.25, leaflets=5),
        Leaf(3.4, stalk=0.4), bend=0.5),
    "Shepherds Purse": Plant(
        (5, 10), 82, Leaf(2.9, widest=0.68, pointed=1.2, stalk=0.35, lobes=4, depth=0.6),
        Leaf(1.8, stalk=0.6), saturation=0.48, hairs=8),
    "Small-flowered Cranesbill": Plant(
        (2, 6), 132, Leaf(1.0, stalk=1.1, lobes=7, depth=0.3, palmate=True),
        Leaf(0.9, stalk=0.8, notch=0.12), saturation=0.5, red=0.5, hairs=12),
    "Sugar beet": Plant(
        (1, 2), 94, Leaf(1.9, stalk=0.45),
        Leaf(3.2, widest=0.55, stalk=0.25), per_node=2, turn=50, red=1.0, gloss=1.0),
}  # fmt: skip

SPECIES = tuple(_PLANTS)


def draw_data_set(root: Path, images_per_class: int, size: int = 150, seed: int = 42) -> Iterator[Path]:
    """Draw ``images_per_class`` JPEG images of each species, one folder per species.

    This is a generator: an image is drawn when its path is asked for, so the caller can show
    progress.  Each image depends only on the seed, its species and its index.  Files of the same
    name are overwritten.

    Args:
        root: Folder of the data set, made if missing.  Images go to
            ``root/<species>/<slug>_000.jpg``, where the slug is the species in lower case.
        images_per_class: Images of each species.
        size: Width and height of an image in pixels, at least ``MIN_SIZE``.
        seed: Any number; another one gives another data set.

    Yields:
        The path of each image, once it is written.

    Raises:
        ValueError: If ``images_per_class`` or ``size`` is too small (when the first path is asked
            for).
    """
    if images_per_class < 1:
        raise ValueError(f"images_per_class must be at least 1, not {images_per_class}")
    for species in SPECIES:
        slug = species.lower().replace(" ", "-")
        for index in range(images_per_class):
            image = draw_seedling(species, random.Random(f"{seed}/{species}/{index}"), size)
            path = Path(root) / species / f"{slug}_{index:03d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as partial:
                image.save(partial, "jpeg", quality=90)
            yield path


def draw_seedling(species: str, rng: random.Random, size: int = 150) -> Image.Image:
    """Draw one seedling seen from above.

    Args:
        species: One of ``SPECIES``.
        rng: Source of all chance: the same state gives the same image (but for a few pixels on
            edges, which old releases of Pillow or numpy may round differently).
        size: Width and height of the image in pixels, at least ``MIN_SIZE``.

    Returns:
        An RGB image of ``size`` x ``size`` pixels.

    Raises:
        ValueError: If the species is unknown or the size too small.
    """
    if species not in _PLANTS:
        raise ValueError(f"unknown species {species!r}; the species are {', '.join(SPECIES)}")
    if size < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE} pixels, not {size}")
    noise = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
    sun = cmath.rect(1, rng.uniform(0, math.tau))  # direction to the light, within the image
    image = _soil(size, sun, rng, noise)
    _Painter(image, _PLANTS[species], sun, rng).seedling()
    return _photograph(image.reduce(SUPERSAMPLING), rng, noise)


def _soil(size: int, sun: complex, rng: random.Random, noise: np.random.Generator) -> Image.Image:
    """Return a supersampled RGB image of earth strewn with stones and bits of straw."""
    tone = rng.uniform(75, 110)
    relief = np.full((size, size), tone, np.float32)
    for cells, weight in ((5, 18), (size // 5, 16), (size, 26)):  # damp patches, crumbs, grains
        octave = Image.fromarray(noise.random((cells, cells), np.float32) - 0.5)
        relief += weight * np.asarray(octave.resize((size, size), Image.Resampling.BICUBIC))
    earth = relief[..., None] * np.array([1.06, 0.96, rng.uniform(0.76, 0.9)], np.float32)
    side = size * SUPERSAMPLING
    image = Image.fromarray(earth.clip(0, 255).astype(np.uint8)).resize((side, side))

    draw = ImageDraw.Draw(image, "RGBA")
    corners = np.exp(1j * np.linspace(0, math.tau, 7, endpoint=False))
    for x, y, chance, grey, warm in noise.random((rng.randrange(20, 90), 5)).tolist():
        radius = side * (0.005 + 0.02 * chance**4)  # many grains, few stones
        centre, stone = complex(x, y) * side, radius * corners * (0.7 + 0.5 * noise.random(7))
        level = tone * (0.75 + 0.7 * grey)
        _polygon(draw, centre + stone - 0.45 * radius * sun, (*SHADOW, 110))
        _polygon(draw, centre + stone, _rgb(1.04 * level, level, (0.78 + 0.18 * warm) * level))
        _polygon(draw, centre + 0.55 * stone + 0.2 * radius * sun, (255, 250, 240, 34))
    for _ in range(rng.randrange(4)):
        straw = side * complex(rng.random(), rng.random()) * np.ones(2)
        straw[1] += cmath.rect(side * rng.uniform(0.05, 0.2), rng.uniform(0, math.tau))
        _line(draw, straw - 0.004 * side * sun, (*SHADOW, 90), side / 130)
        _line(draw, straw, (186, 160, 112, 230), side / 130)
    return image


def _photograph(image: Image.Image, rng: random.Random, noise: np.random.Generator) -> Image.Image:
    """Return the image as a camera takes it: unevenly lit, warm or cold, blurred and noisy."""
    image = image.filter(ImageFilter.GaussianBlur(image.width * rng.uniform(0.0007, 0.003)))
    brightness, warmth = rng.uniform(0.9, 1.25), rng.uniform(-0.05, 0.05)
    cast = np.array([1 + warmth, 1 + rng.uniform(-0.03, 0.03), 1 - warmth], np.float32)
    ramp = np.linspace(-0.5, 0.5, image.width, dtype=np.float32)
    light = 1 + rng.uniform(-0.2, 0.2) * ramp + rng.uniform(-0.2, 0.2) * ramp[:, None]
    grain = rng.uniform(4, 12) * (noise.random((*light.shape, 3), np.float32) - 0.5)
    pixels = np.asarray(image) * light[..., None] * (brightness * cast) + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@cache
def _margin(leaf: Leaf) -> tuple[np.ndarray, np.ndarray]:
    """Return one margin of a blade from base to tip: place along the midrib, distance from it.

    Both have shape (points,) and are relative to the length of the blade.
    """
    if leaf.palmate:
        angle = np.linspace(math.pi, 0, 12 * leaf.lobes)  # the stalk arrives at pi
        radius = 1 - leaf.depth * (1 - abs(np.cos(angle * leaf.lobes / 2)) ** 0.7)
        radius -= 0.05 * (1 - abs(np.cos(angle * leaf.lobes * 1.5)))  # teeth of the lobes
        radius *= 1 - 0.85 * np.exp(-(((math.pi - angle) / 0.28) ** 2))  # cleft for the stalk
        return (1 + radius * np.cos(angle)) / 2, radius * np.sin(angle) / (2 * leaf.ratio)
    along = np.linspace(0, 1, max(20, 8 * leaf.lobes + 1))
    rise, fall = leaf.pointed * leaf.widest, leaf.pointed * (1 - leaf.widest)
    width = along**rise * (1 - along) ** fall / (leaf.widest**rise * (1 - leaf.widest) ** fall)
    indent = leaf.notch * (1 - width) ** 2 * (along > leaf.widest)
    phase = along * leaf.lobes % 1
    width *= 1 - leaf.depth * (1 - np.sin(math.pi * phase**1.6))  # lobes lean to the tip
    return along - indent, width / (2 * leaf.ratio)


class _Painter:
    """Paints one seedling on an image of soil.

    Points and directions are complex numbers, x + iy in pixels: a rotation is then a product.
    Lines and outlines are complex arrays of shape (points,).
    """

    def __init__(self, image: Image.Image, kind: Plant, sun: complex, rng: random.Random) -> None:
        self.draw = ImageDraw.Draw(image, "RGBA")  # in this mode translucent colours blend
        self.side, self.kind, self.sun, self.rng = image.width, kind, sun, rng
        self.hue = kind.hue + rng.uniform(-5, 5)
        self.saturation = min(1, kind.saturation * rng.uniform(0.85, 1.15))
        self.red = kind.red * rng.uniform(0.3, 1)
        self.shade = -sun * self.side * rng.uniform(0.012, 0.03)  # from a leaf to its shadow

    def seedling(self) -> None:
        """Paint the whole plant, its lowest and oldest leaves first."""
        kind, rng = self.kind, self.rng
        age = rng.random()
        reach = self.side * (0.36 + 0.1 * age) * rng.uniform(0.95, 1.05)
        heart = self.side * complex(rng.uniform(0.45, 0.55), rng.uniform(0.45, 0.55))
        heading = rng.uniform(0, math.tau)
        if kind.seed_leaf:
            for across in (-math.pi / 2, math.pi / 2):
                length = reach * (0.7 - 0.25 * age) * rng.uniform(0.9, 1.1)
                self.leaf(kind.seed_leaf, heart, heading + across + rng.gauss(0, 0.1), length)
        young, grown = kind.nodes
        nodes = young + round(age * (grown - young))
        for node in range(nodes):
            length = reach * (1 - 0.6 * node / nodes) * rng.uniform(0.88, 1.05)
            for place in range(kind.per_node):
                turn = math.radians(node * kind.turn + place * 360 / kind.per_node)
                direction = heading + turn + rng.gauss(0, 0.13)
                self.leaf(kind.leaf, heart, direction, length * rng.uniform(0.88, 1.05))

    def leaf(self, leaf: Leaf, heart: complex, heading: float, length: float) -> None:
        """Paint a leaf that reaches ``length`` pixels from the heart of the plant to its tip."""
        rng, forward = self.rng, cmath.rect(1, heading)
        bend = rng.uniform(-1, 1) * self.kind.bend
        blade = length / (1 + leaf.stalk)
        base = heart + (length - blade) * forward
        hue, value = self.hue + rng.uniform(-3, 3), rng.uniform(0.48, 0.68)
        green = [255 * part for part in colorsys.hsv_to_rgb(hue / 360, self.saturation, value)]
        stalk = _mix(_mix(green, PALE, 0.25), (150, 50, 70), self.red)
        if leaf.stalk:
            ends = np.array([heart, base + 0.03 * blade * forward])
            self.strokes([ends], stalk, 0.011 * self.side + 0.02 * blade)
        if leaf.leaflets:
            twigs = list(self.twigs(base, heading, blade, bend, leaf.leaflets))
            self.strokes(twigs, _rgb(*green), max(0.006 * self.side, blade / leaf.ratio))
            return
        along, width = _margin(leaf)
        curve = np.exp(0.5j * bend * along)  # the midrib is an arc: chord and normal follow
        rib = base + blade * forward * along * np.sinc(bend * along / math.tau) * curve
        normal = 1j * blade * forward * curve**2 * width * rng.uniform(0.86, 1.14)
        wave = 0.1 * rng.random() * np.sin(rng.uniform(5, 9) * along + rng.uniform(0, math.tau))
        margins = np.stack([normal * (1 + wave), normal * (wave - 1)])
        self.blade(leaf, rib, margins, _rgb(*green), stalk)

    def blade(self, leaf: Leaf, rib: np.ndarray, margins: np.ndarray, green: Colour, stalk: Colour) -> None:
        """Paint a blade and its shadow; the two margins are offsets from the midrib."""
        draw, kind, thin = self.draw, self.kind, 0.004 * self.side
        left, right = margins
        lit, dim = margins if (left * np.conj(self.sun)).real.sum() > 0 else margins[::-1]
        outline = _between(rib + left, rib + right)
        for distance in (1.0, 0.75, 0.5, 0.25):  # shadows that overlap are soft at the edge
            _polygon(draw, outline + distance * self.shade, (*SHADOW, 42))
        _polygon(draw, outline, green)
        for part in (0.75, 0.5, 0.25):
            inner = _between(rib + part * left, rib + part * right)
            _polygon(draw, inner, (*PALE, round(14 + 46 * kind.bloom)))
        _polygon(draw, _between(rib, rib + dim), (0, 20, 10, 46))
        middle = slice(len(rib) // 4, 3 * len(rib) // 4)
        glint = _between((rib + 0.35 * lit)[middle], (rib + 0.65 * lit)[middle])
        _polygon(draw, glint, (255, 255, 255, round(60 * kind.gloss)))
        for part in (0.34, 0.24, 0.15, 0.08):
            foot = slice(max(2, round(part * len(rib))))
            base = _between((rib + left)[foot], (rib + right)[foot])
            _polygon(draw, base, (*stalk, round(110 * self.red)))
        _line(draw, rib, (*PALE, 90), thin)
        for margin in margins:
            if leaf.ratio < 6:  # blades of grass are too narrow for side veins
                for start in range(len(rib) // 5, 4 * len(rib) // 5, len(rib) // 6):
                    end = start + len(rib) // 8
                    vein = np.array([rib[start], rib[end] + 0.8 * margin[end]])
                    _line(draw, vein, (*PALE, 44), thin)
            for _ in range(kind.hairs):
                root = self.rng.randrange(2, len(rib) - 1)
                hair = rib[root] + margin[root] * np.array([1.0, 1.2])
                _line(draw, hair, (*PALE, 110), thin / 2)

    def twigs(self, base: complex, heading: float, length: float, bend: float, pairs: int) -> Iterator[np.ndarray]:
        """Yield the straight pieces of a feather: of its midrib and, likewise, of its leaflets."""
        joints = max(2, pairs + 1)
        for joint in range(joints):
            end = base + cmath.rect(length / joints, heading)
            yield np.array([base, end])
            base, heading = end, heading + bend / joints
            if joint < pairs:
                reach = 0.5 * length * math.sin(math.pi * (joint + 1.2) / (pairs + 1.4)) ** 0.7
                for side in (-1, 1):
                    lean = heading + side * self.rng.uniform(0.65, 0.95)
                    part = reach * self.rng.uniform(0.8, 1.1)
                    yield from self.twigs(base, lean, part, -0.3 * side, pairs // 3)

    def strokes(self, lines: Iterable[np.ndarray], colour: Colour, width: float) -> None:
        """Paint thin lines, with the shadows of all of them underneath."""
        for shift, fill in ((0.8 * self.shade, (*SHADOW, 100)), (0, colour)):
            for line in lines:
                _line(self.draw, line + shift, fill, width)


def _between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the outline of the area between two lines that run the same way."""
    return np.concatenate([first, second[::-1]])


def _polygon(draw: ImageDraw.ImageDraw, outline: np.ndarray, colour: Colour) -> None:
    draw.polygon(outline.view(np.float64).tolist(), fill=colour)


def _line(draw: ImageDraw.ImageDraw, line: np.ndarray, colour: Colour, width: float) -> None:
    draw.line(line.view(np.float64).tolist(), fill=colour, width=max(1, round(width)))


def _rgb(*channels: float) -> Colour:
    return tuple(min(255, max(0, round(channel))) for channel in channels)


def _mix(first: Iterable[float], second: Iterable[float], weight: float) -> Colour:
    """Return the first colour mixed with the second, whose weight is 0 to 1."""
    return _rgb(*(a + weight * (b - a) for a, b in zip(first, second, strict=True)))
