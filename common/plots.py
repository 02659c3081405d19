"""Plots of results: learning curves, confusion matrix, sheets of images, and what a network has learned."""

import contextlib
import copy
import functools
import logging
import math
import sys
import unicodedata
import warnings

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import Normalize

from common.evaluation import coverage_curve
from common.files import written_whole
from common.text import label, printable, width

# A figure of a data set of any size stays within these bounds.
MAX_SIDE = 6000  # pixels
MAX_NUMBERED = 30  # classes of a confusion matrix whose cells show their counts
MAX_TICKS = 60  # labels along a side
MAX_CELLS = 1000  # cells along a side; more classes share one
MAX_CONFUSIONS = 25  # pairs of classes beside a matrix without counts
MAX_COLUMNS, MAX_ROWS = 12, 12  # images of a sheet
MAX_IMAGE = 600  # pixels of an image's longer side in a sheet
MAX_LEGEND = 40  # classes of a map with a legend

# Fonts that have Chinese, Japanese and Korean characters, on Windows, macOS and Linux, the most legible first. Others
# are found by what they contain.
CJK_FONTS = (
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
)
BASE_FONT = "DejaVu Sans"  # comes with matplotlib


class Fonts:
    """Which of this machine's fonts has a character; they are looked at when the first one has it not.

    Attributes:
        known: {character: name of a font, or None if none has it}.
        reported: kinds of fonts of which it was said that they are missing.
    """

    def __init__(self):
        self.known, self.reported = {}, set()

    def families(self, text):
        """Names of the fonts that `text` needs, the base font first, and the set of characters that no font has."""
        chars = {char for char in text if not char.isspace()}
        if new := chars - self.known.keys():
            self.search(new)
        found = dict.fromkeys([BASE_FONT, *sorted(filter(None, (self.known[char] for char in chars)))])
        return list(found), {char for char in chars if self.known[char] is None}

    def search(self, chars):
        """Complete `known` by `chars`."""
        from matplotlib import font_manager

        manager = font_manager.fontManager
        left = self.look(chars, [font_manager.findfont(BASE_FONT)])
        if left:
            left = self.look(left, self.rank(manager.ttflist))
        if left:
            # matplotlib lists the fonts once, at its first start: one that was installed since is not in its list.
            listed = {font.fname for font in manager.ttflist}
            for path in set(font_manager.findSystemFonts()) - listed:
                with contextlib.suppress(Exception):  # a font that matplotlib cannot read
                    manager.addfont(path)
            left = self.look(left, self.rank(font for font in manager.ttflist if font.fname not in listed))
        self.known.update(dict.fromkeys(left))

    def look(self, chars, paths):
        """Note the characters that the font files have; returns those that none has."""
        from matplotlib import font_manager

        left = set(chars)
        for path in paths:
            if not left:
                break
            with contextlib.suppress(Exception):  # a file that is gone or damaged
                font = font_manager.get_font(path)
                for char in sorted(left):
                    if has_glyph(font, char):
                        self.known[char] = font_manager.FontProperties(fname=path).get_name()
                        left.discard(char)
        return left

    @staticmethod
    def rank(fonts):
        """Paths of the files of fonts, those of `CJK_FONTS` first, and upright ones before others."""
        place = {name: number for number, name in enumerate(CJK_FONTS)}
        # A last-resort font has boxes for all characters.
        fonts = [font for font in fonts if "lastresort" not in font.name.lower().replace(" ", "").replace("-", "")]
        order = sorted(fonts, key=lambda f: (place.get(f.name, len(place)), f.style != "normal", f.name, f.fname))
        return list(dict.fromkeys(font.fname for font in order))


def has_glyph(font, char):
    """Whether an opened font can draw a character; fonts of coloured bitmaps, as of emoji, cannot."""
    if not font.get_char_index(ord(char)):
        return False
    font.set_size(10, 100)
    font.load_char(ord(char))
    return True


@functools.cache
def fonts():
    """The `Fonts` of this machine."""
    return Fonts()


def report_missing(chars, reported):
    """Say which characters no font has, and what to install: once for each kind of font.

    Args:
        chars: the characters.
        reported: set of the kinds that were reported, which is completed.
    """
    kinds = {}
    for char in sorted(chars):
        kinds.setdefault(choose_font(char), []).append(char)
    for (name, debian, fedora), of_kind in kinds.items():
        if name not in reported:
            reported.add(name)
            shown = f"{''.join(of_kind[:10])}{'...' if len(of_kind) > 10 else ''}"
            remedy = f"install one that has them, such as {name}"
            if sys.platform == "linux":
                remedy += f" (Debian, Ubuntu: apt install {debian}; Fedora: dnf install {fedora})"
            print(f"note: no font on this machine has the characters {shown}, so figures show boxes instead; {remedy}")


def choose_font(char):
    """(a free font that has a character, its package for Debian and Ubuntu, and for Fedora)."""
    if unicodedata.category(char) == "So":  # emoji; those of Noto are bitmaps, which matplotlib cannot draw
        return "Symbola", "fonts-symbola", "gdouros-symbola-fonts"
    if unicodedata.east_asian_width(char) in "WFH":
        return "Noto Sans CJK", "fonts-noto-cjk", "google-noto-sans-cjk-fonts"
    return "Noto Sans", "fonts-noto-core", "google-noto-fonts-all"


def new_figure(**options):
    """A `matplotlib.figure.Figure`; matplotlib is imported when the first one is drawn, since that takes a second."""
    from matplotlib.figure import Figure

    return Figure(**options)


def save_figure(figure, path):
    """Write a figure as a PNG file of at most `MAX_SIDE` pixels a side, in fonts that have its characters.

    What is written is shown as it is: `$` and `\\` are no mathematics.

    Args:
        figure: `matplotlib.figure.Figure`.
        path: PNG file, or a binary file object.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        axis.get_ticklabels()  # makes those that are to be drawn
    texts = figure.findobj(Text)
    for text in texts:
        text.set_parse_math(False)
        text.set_usetex(False)
        text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
    # The list of families itself: of a generic one such as sans-serif, matplotlib takes the first font for all
    # characters.
    families, missing = fonts().families("".join(text.get_text() for text in texts))
    if missing:
        report_missing(missing, fonts().reported)
    with rc_context({"font.family": families, "axes.unicode_minus": False}), silent_fonts():
        for text in texts:  # which took their fonts when they were made
            text.set_fontfamily(families)
        dpi = min(120, MAX_SIDE / max(figure.get_size_inches()))
        if hasattr(path, "write"):
            figure.savefig(path, dpi=dpi)
            return
        with written_whole(path) as partial:
            figure.savefig(partial, dpi=dpi, format="png")


def add_legend(place, handles, names, **options):
    """Add a legend to axes or a figure; matplotlib itself hides names that begin with an underscore."""
    legend = place.legend(handles, ["name"] * len(names), **options)
    for text, name in zip(legend.get_texts(), names):
        text.set_text(label(name))


@contextlib.contextmanager
def silent_fonts():
    """Within this context matplotlib does not report that a font lacks a character or a weight.

    Without a font that has them, Chinese names are drawn as boxes; a warning for each character would bury the results.
    """
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


CURVES = (("train", "o", "-", "training"), ("val", "s", "--", "validation"), ("ema", "^", ":", "validation, EMA"))


def plot_curves(history, folder):
    """Draw loss.png and acc.png into `folder`.

    Args:
        history: one dict per epoch, with `epoch` and `<train|val|ema>_<loss|acc1>`; None or absent: skipped.
    """
    error = None
    for figure_name, key, quantity in (("loss", "loss", "cross-entropy"), ("acc", "acc1", "top-1 accuracy / %")):
        try:
            plot_curve(history, key, quantity, folder / f"{figure_name}.png")
        except Exception as failure:  # the other one can be drawn all the same
            error = failure
    if error is not None:
        raise error


def plot_curve(history, key, quantity, path):
    """Draw one metric of `plot_curves` into a PNG file."""
    figure = new_figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch", ylabel=quantity)
    for prefix, marker, line, name in CURVES:
        points = [(row["epoch"], row.get(f"{prefix}_{key}")) for row in history]
        points = [(epoch, value) for epoch, value in points if value is not None]
        if points:
            axes.plot(*zip(*points), line, marker=marker, markevery=max(1, len(points) // 15), ms=5, label=name)
    axes.locator_params("x", integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def plot_runs(runs, path):
    """Draw the validation accuracy and the training loss of several runs side by side.

    Args:
        runs: {name: rows as in `plot_curves`}, in the order of the legend.
        path: PNG file to write.
    """
    figure = new_figure(figsize=(13, 5.5), layout="constrained")
    panels = zip(figure.subplots(1, 2), (("ema_acc1", "val_acc1"), ("train_loss",)))
    for axes, keys in panels:
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation accuracy / %" if len(keys) > 1 else "training loss (cross-entropy)")
        handles = []
        for number, history in enumerate(runs.values()):
            key = next((key for key in keys if any(row.get(key) is not None for row in history)), keys[-1])
            points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None] or [(math.nan, math.nan)]
            # The colours repeat after ten runs, so the line style changes.
            style = ("-", "--", ":", "-.")[number // 10 % 4]
            size = 4 if len(points) < 9 else 0
            handles += axes.plot(*zip(*points), style, color=f"C{number % 10}", marker="o", ms=size)
        axes.locator_params("x", integer=True)
        axes.grid(alpha=0.3)
    names, columns = list(runs)[:MAX_LEGEND], min(3, len(runs))
    add_legend(figure, handles[:MAX_LEGEND], names, loc="outside lower center", ncols=columns)
    save_figure(figure, path)


def plot_calibration(raw, calibrated, labels, path):
    """Draw a reliability diagram with a histogram of the confidences, and beside it the accuracy against the coverage.

    Args:
        raw, calibrated: probabilities, arrays (N, classes), before and after calibration.
        labels: array (N,).
        path: PNG file to write.
    """
    figure = new_figure(figsize=(11, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[4, 1])
    axes = figure.add_subplot(grid[0, 0], title="reliability: is 80 % right in 80 of 100 cases?")
    strip = figure.add_subplot(grid[1, 0], xlabel="confidence of the prediction / %", ylabel="images / %")
    curve = figure.add_subplot(grid[:, 1], title="coverage: what if the least confident go to a person?")
    axes.plot([0, 100], [0, 100], color="0.6", lw=1)
    edges = np.linspace(0, 1, 11)
    styles = (("before", raw, "tab:orange", "--"), ("calibrated", calibrated, "tab:blue", "-"))
    for number, (name, probabilities, color, line) in enumerate(styles):
        confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
        place = np.minimum((10 * confidence).astype(int), 9)
        counts = np.bincount(place, minlength=10)
        full = counts > 0
        means, right = (np.bincount(place, v, 10)[full] / counts[full] for v in (confidence, correct))
        # Bars: two standard errors, wide where a bin has few images, which then say little.
        error = 2 * np.sqrt(np.maximum(right * (1 - right), 0.25 / counts[full]) / counts[full])
        low, high = np.minimum(error, right), np.minimum(error, 1 - right)
        axes.errorbar(100 * means, 100 * right, 100 * np.stack([low, high]), color=color, lw=1, ls="none", alpha=0.5)
        axes.plot(100 * means, 100 * right, line, color=color, lw=1.5)
        sizes = 12 + 240 * counts[full] / counts.max()
        axes.scatter(100 * means, 100 * right, sizes, color=color, alpha=0.75, label=name, zorder=3)
        strip.bar(10 * np.arange(10) + 3 + 4 * number, 100 * counts / len(labels), 3.6, color=color)
        share, accuracy = (100 * fraction for fraction in coverage_curve(probabilities, labels))
        first = max(0, min(len(labels) // 20, len(labels) - 1))  # of the first few images it says nothing
        curve.plot(share[first:], accuracy[first:], line, color=color, lw=2, label=name)
    for part in (50, 80, 100):
        place = min(np.searchsorted(share, part), len(labels) - 1)
        curve.plot(share[place], accuracy[place], "o", color=color, ms=6)
        text = f"{accuracy[place]:.1f} % of the\n{part} % kept"
        at = share[place], accuracy[place]
        curve.annotate(text, at, (-6, -14), textcoords="offset points", ha="right", va="top")
    axes.set(xlim=(0, 100), ylim=(0, 104), ylabel="accuracy / %", xticks=100 * edges, xticklabels=[])
    strip.set(xlim=(0, 100), xticks=100 * edges)
    bottom = min(curve.get_ylim()[0], 90)
    curve.set(xlim=(0, 102), ylim=(max(0, bottom - 6), 101), ylabel="accuracy of those kept / %")
    curve.set_xlabel("coverage: the most confident images that are kept / %")
    axes.legend(loc="upper left")
    curve.legend(loc="lower left")
    for each in (axes, strip, curve):
        each.grid(alpha=0.3)
    save_figure(figure, path)


def plot_stress(accuracies, count, path):
    """Draw the accuracy under disturbances as bars, beside that on the images as they are.

    Args:
        accuracies: {name: accuracy in percent, or None if it was not measured}; the first is that without any.
        count: number of images.
        path: PNG file to write.
    """
    (_, clean), *rest = accuracies.items()
    figure = new_figure(figsize=(8, 1.6 + 0.38 * len(rest)), layout="constrained")
    axes = figure.add_subplot(xlabel=f"accuracy / % on {count} images", ylim=(len(rest) - 0.4, -0.6))
    values = [0.0 if value is None else value for _, value in rest]
    lost = ["tab:blue" if value > clean - 1 else "tab:orange" if value > clean - 5 else "tab:red" for value in values]
    axes.barh(range(len(rest)), values, color=lost, height=0.7)
    axes.axvline(clean, color="black", lw=1.2)
    for place, (_, value) in enumerate(rest):
        text = "not for this size" if value is None else f" {value:.1f} ({value - clean:+.1f})"
        axes.text(max(value or 0, clean), place, f" {text}", va="center", fontsize=9)
    axes.set_yticks(range(len(rest)), [name for name, _ in rest])
    axes.set_title(f"as they are: {clean:.1f} %; within 1 point blue, 5 points orange, more red", fontsize=10)
    axes.set_xlim(0, 125)
    axes.set_xticks(range(0, 101, 20))
    axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path)


def plot_confusion_matrix(labels, predictions, classes, path, counts=None):
    """Draw a confusion matrix: with counts, or for many classes beside a list of those most often confused.

    Args:
        labels, predictions: class numbers of the same images.
        classes: class names.
        path: PNG file to write.
        counts: how many images each pair stands for; None: one.
    """
    number = len(classes)
    cells = np.asarray(labels, dtype=np.int64) * number + np.asarray(predictions, dtype=np.int64)
    cells, inverse = np.unique(cells, return_inverse=True)
    counts = np.bincount(inverse.ravel(), counts, len(cells)).astype(np.int64)
    true, predicted = np.divmod(cells, max(number, 1))
    ticks = range(0, number, -(-number // MAX_TICKS) or 1)
    names = [label(classes[tick]) for tick in ticks]
    if number <= MAX_NUMBERED:
        # Long names beside both axes leave the cells their size.
        size = max(5, 1.8 + 0.45 * number) + 0.06 * max(map(width, names), default=0)
        figure = new_figure(figsize=(size + 1, size), layout="constrained")
        axes = figure.add_subplot()
    else:
        figure = new_figure(figsize=(15, 9), layout="constrained")
        axes, bars = figure.subplots(1, 2, width_ratios=[2, 1])
        draw_confusions(bars, true, predicted, counts, classes)

    share = max(1, -(-number // MAX_CELLS))  # classes in a cell's side
    matrix = np.zeros((-(-number // share),) * 2)
    np.add.at(matrix, (true // share, predicted // share), counts)
    fraction = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    edges = (-0.5, number - 0.5)
    image = axes.imshow(100 * fraction, cmap="Blues", vmin=0, vmax=100, extent=(*edges, *edges[::-1]))
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    note = f" (a cell is {share} x {share} classes)" if share > 1 else ""
    axes.set_xlabel(f"predicted class{note}")
    axes.set_ylabel("true class")
    size, angle, aligned = (10, 45, "baseline") if number <= MAX_NUMBERED else (7, 90, "center")
    axes.set_xticks(ticks, names, rotation=angle, ha="right", va=aligned, rotation_mode="anchor", fontsize=size)
    axes.set_yticks(ticks, names, fontsize=size)
    if number <= MAX_NUMBERED:
        for row, column, count in zip(true, predicted, counts):
            color = "white" if fraction[row, column] > 0.5 else "black"
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    save_figure(figure, path)


def draw_confusions(axes, true, predicted, counts, classes):
    """Draw the pairs of classes that are confused most often as bars; for the arguments see `plot_confusion_matrix`."""
    totals = np.bincount(true, counts, len(classes))
    wrong = np.flatnonzero(true != predicted)
    worst = wrong[np.argsort(-counts[wrong], kind="stable")][:MAX_CONFUSIONS]
    axes.set_title("most frequent confusions" if len(worst) else "no confusions")
    axes.barh(range(len(worst)), counts[worst], color="C0")
    pairs = [f"{label(classes[true[i]])}\npredicted {label(classes[predicted[i]])}" for i in worst]
    axes.set_yticks(range(len(worst)), pairs, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("images, and their % of the true class")
    axes.locator_params("x", integer=True)
    axes.margins(x=0.12)
    for place, i in enumerate(worst):
        axes.text(counts[i], place, f" {100 * counts[i] / totals[true[i]]:.0f} %", va="center", fontsize=7)


def plot_sheet(images, captions, path, columns=6, rows=()):
    """Draw a sheet of images with a caption under each, and say where there are more than fit.

    Args:
        images: PIL images, or arrays (H, W, 3); None leaves the place empty.
        captions: one text for each image.
        path: PNG file to write.
        columns: number of images side by side; without `rows` more for many images.
        rows: a text to the left of each row; (): none.
    """
    if not rows:
        columns = min(max(columns, math.ceil(math.sqrt(len(images)))), MAX_COLUMNS)
    columns = min(columns, len(images))
    fits = range(MAX_ROWS * columns) if len(images) > MAX_ROWS * columns else range(len(images))
    cells = [number for number in fits if number % columns < MAX_COLUMNS]
    if len(cells) < len(images):
        print(f"{path} shows {len(cells)} of {len(images)} places; a figure has no more")
    columns = min(columns, MAX_COLUMNS)
    lines = -(-len(cells) // columns)
    # Inches. A layout engine would take minutes for hundreds of cells, whose sizes are known.
    width, height, side, left = 2.2, 2.6, 2.0, 0.4 if rows else 0.0
    figure = new_figure(figsize=(left + width * columns, height * lines))
    for place, number in enumerate(cells):
        line, column = divmod(place, columns)
        corner = left + width * column + (width - side) / 2, height * (lines - line) - side - 0.06
        box = (corner[0], corner[1], side, side) / np.tile(figure.get_size_inches(), 2)
        axes = figure.add_axes(box, xticks=[], yticks=[], frame_on=False)
        image = images[number]
        if isinstance(image, Image.Image) and max(image.size) > MAX_IMAGE:
            image = image.copy()
            image.thumbnail((MAX_IMAGE, MAX_IMAGE))
        if image is not None:
            axes.imshow(image)
        axes.set_xlabel(captions[number], fontsize=8)
        if rows and column == 0:
            axes.set_ylabel(rows[line], fontsize=9)
    save_figure(figure, path)


def plot_augmentation(images, labels, classes, transform, mixup, path):
    """Draw what training does to images: as they are, augmented, and the augmented batch mixed in each way.

    Args:
        images: PIL RGB images.
        labels: class number of each image.
        classes: class names.
        transform: the run's augmentation: PIL RGB -> tensor (3, H, W), uint8, or float, whose normalisation is undone.
        mixup: the run's `BatchMixup`. It mixes every batch here; the rows say how many it mixes in training.
        path: PNG file to write.
    """
    classes = [label(name) for name in classes]
    names = [classes[number] for number in labels]
    batch, labels = torch.stack([transform(image) for image in images]), torch.tensor(labels)
    batch = batch if batch.is_floating_point() else batch / 255
    cells, captions, rows = [*images, *to_pixels(batch, transform)], 2 * names, ["file", "augmented"]
    for name, alpha, other, switch in (
        ("Mixup", mixup.mixup_alpha, mixup.cutmix_alpha, 0.0),
        ("CutMix", mixup.cutmix_alpha, mixup.mixup_alpha, 1.0),
    ):
        frequency = mixup.mix_prob * (1 - abs(switch - mixup.switch_prob) if other else 1)
        if alpha and frequency:
            always = copy.copy(mixup)
            always.mix_prob, always.switch_prob = 1.0, switch
            mixed, targets = always(batch.clone(), labels)
            cells.extend(to_pixels(mixed, transform))
            for weights, indices in zip(*targets.topk(min(2, len(classes)))):
                captions.append("\n".join(f"{weight:.2f} {classes[i]}" for weight, i in zip(weights, indices)))
            rows.append(f"{name}: {100 * frequency:.0f} % of batches")
    plot_sheet(cells, captions, path, len(images), rows)


def to_pixels(images, transform):
    """Undo a transform's normalisation: tensor (N, 3, H, W) -> uint8 array (N, H, W, 3)."""
    for step in reversed(getattr(transform, "transforms", [])):
        if isinstance(step, Normalize):
            mean, std = (torch.tensor(values)[:, None, None] for values in (step.mean, step.std))
            images = images * std + mean
    return (255 * images.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()


def plot_kernels(kernels, path, channels=6):
    """Draw the large kernels of each stage: mean absolute value, its decay with the distance, and single channels.

    Args:
        kernels: {name of the stage: array (channels of all its blocks, k, k)}.
        path: PNG file to write.
        channels: number of single channels to draw, those with the largest weights.
    """
    columns = channels + 2
    figure = new_figure(figsize=(1.9 * columns + 1.2, 2.1 * len(kernels) + 0.5), layout="constrained")
    grid = figure.add_gridspec(len(kernels), columns, width_ratios=[1, 1.6] + [1] * channels)
    for line, (stage, weights) in enumerate(kernels.items()):
        size = weights.shape[-1]
        half = size // 2
        extent = (-half - 0.5, half + 0.5, half + 0.5, -half - 0.5)
        largest = np.abs(weights).max((1, 2), keepdims=True)
        mean = (np.abs(weights) / np.maximum(largest, 1e-12)).mean(0)  # (k, k)

        axes = figure.add_subplot(grid[line, 0], title=f"{stage}, {len(weights)} channels\nmean", ylabel="taps")
        axes.imshow(mean, cmap="gray", vmin=0, extent=extent)
        offset = np.abs(np.arange(size) - half)
        distance = np.maximum(offset[:, None], offset)
        profile = [mean[distance == d].mean() for d in range(half + 1)]
        axes = figure.add_subplot(grid[line, 1], title="by distance", xlabel="taps from the centre", ylim=(0, 1))
        axes.set_ylabel("relative to the\nlargest weight")
        axes.plot(profile, "o-", ms=4)
        axes.grid(alpha=0.3)
        for place, channel in enumerate(np.argsort(-largest.ravel(), kind="stable")[:channels]):
            axes = figure.add_subplot(grid[line, 2 + place], xticks=[], yticks=[], title=f"channel {channel}")
            limit = largest[channel, 0, 0]
            image = axes.imshow(weights[channel], cmap="gray", vmin=-limit, vmax=limit, extent=extent)
        figure.colorbar(image, ax=figure.axes[-channels:], shrink=0.8, ticks=[-limit, 0, limit]).ax.set_yticklabels(
            ["-max", "0", "max"]
        )
    save_figure(figure, path)


def plot_receptive_fields(fields, path):
    """Draw effective receptive fields side by side.

    Args:
        fields: {name: (array (size, size) of sum 1,
            {percent: side in pixels of the central square that holds it})}.
        path: PNG file to write.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    columns = min(len(fields), 6)
    lines = -(-len(fields) // columns)
    figure = new_figure(figsize=(3.4 * columns + 0.8, 4.1 * lines), layout="constrained")
    for number, (name, (field, sides)) in enumerate(fields.items(), start=1):
        axes = figure.add_subplot(lines, columns, number, title=label(name, 36), xlabel="pixels")
        half = len(field) / 2
        relative = np.maximum(field / field.max(), 1e-4)
        image = axes.imshow(relative, cmap="gray", norm=LogNorm(1e-4, 1), extent=(-half, half, half, -half))
        for (percent, side), line in zip(sides.items(), ("-", "--", ":")):
            square = Rectangle((-side / 2, -side / 2), side, side, fill=False, color="tab:orange", ls=line, lw=1.5)
            square.set_label(f"{percent} %: {side} px")
            axes.add_patch(square)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=7, handlelength=1.2)
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="gradient / its largest value", format="%g")
    save_figure(figure, path)


MARKERS = "os^Dv<>Pp*Xhd8H"


def plot_map(points, labels, classes, path):
    """Draw images as points of a plane, each class with a marker and its name at its median.

    Args:
        points: array (images, 2).
        labels: class number of each image.
        classes: class names.
        path: PNG file to write.
    """
    figure = new_figure(figsize=(8.5, 6.5), layout="constrained")
    axes = figure.add_subplot(xticks=[], yticks=[], title="t-SNE of the pooled features: nearby images are similar")
    labels = np.asarray(labels)
    present = np.unique(labels)
    named = set(present[:: -(-len(present) // MAX_TICKS) or 1])  # more names would hide the points and each other
    if len(named) < len(present):
        axes.set_xlabel(f"names of {len(named)} of {len(present)} classes")
    handles, names = [], [label(classes[number]) for number in present]
    for number, name in zip(present, names):
        mine = points[labels == number]
        color, marker = f"C{number % 10}", MARKERS[number % len(MARKERS)]
        handles += axes.plot(*mine.T, marker, color=color, ms=5, mec="black", mew=0.3, alpha=0.8)
        if number in named:
            box = dict(boxstyle="round,pad=0.15", fc="white", ec="none", alpha=0.7)
            axes.text(*np.median(mine, axis=0), name, fontsize=8, ha="center", va="center", bbox=box)
    if len(present) <= MAX_LEGEND:
        add_legend(axes, handles, names, bbox_to_anchor=(1, 1), loc="upper left", fontsize=8)
    save_figure(figure, path)
