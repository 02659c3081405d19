"""Plots of results: learning curves, confusion matrix, sheets of images, and what a network has learned."""

import contextlib
import copy
import functools
import logging
import warnings

import numpy as np
import torch
from matplotlib import font_manager, rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from torchvision.transforms import Normalize

# Fonts that have Chinese, Japanese and Korean characters, on Windows, macOS and Linux.
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


@functools.cache
def find_cjk_fonts():
    """Names of those of `CJK_FONTS` that this machine has, as a tuple; searched for once."""
    fonts = font_manager.fontManager
    if not {font.name for font in fonts.ttflist} & set(CJK_FONTS):
        # matplotlib lists the fonts once, at its first start: one that was installed since is not in its list.
        for path in set(font_manager.findSystemFonts()) - {font.fname for font in fonts.ttflist}:
            with contextlib.suppress(Exception):  # a font that matplotlib cannot read
                fonts.addfont(path)
    return tuple(name for name in CJK_FONTS if name in {font.name for font in fonts.ttflist})


def save_figure(figure, path):
    """Write a figure as a PNG file, in fonts that have the characters of every class name as far as there are any.

    Args:
        figure: `matplotlib.figure.Figure`.
        path: PNG file, or a binary file object.
    """
    # The list of families itself: of a generic one such as sans-serif, matplotlib takes the first font for all
    # characters.
    families = ["DejaVu Sans", *find_cjk_fonts()]
    with rc_context({"font.family": families, "axes.unicode_minus": False}), silent_fonts():
        for text in figure.findobj(Text):  # which took their fonts when they were made
            text.set_fontfamily(families)
        figure.savefig(path, dpi=120)


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
    for figure_name, key, label in (("loss", "loss", "cross-entropy"), ("acc", "acc1", "top-1 accuracy / %")):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="epoch", ylabel=label)
        for prefix, marker, line, name in CURVES:
            points = [(row["epoch"], row.get(f"{prefix}_{key}")) for row in history]
            points = [(epoch, value) for epoch, value in points if value is not None]
            if points:
                axes.plot(*zip(*points), line, marker=marker, markevery=max(1, len(points) // 15), ms=5, label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
        save_figure(figure, folder / f"{figure_name}.png")


def plot_confusion_matrix(matrix, classes, path):
    """Draw a confusion matrix with counts.

    Args:
        matrix: int array (true class, predicted class).
        classes: class names.
        path: PNG file to write.
    """
    size = max(5, 1.8 + 0.45 * len(classes))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted class", ylabel="true class")
    fraction = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(100 * fraction, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="% of the true class", shrink=0.8)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 30:  # more would not be legible
        for (true, predicted), count in np.ndenumerate(matrix):
            if count:
                color = "white" if fraction[true, predicted] > 0.5 else "black"
                axes.text(predicted, true, count, ha="center", va="center", color=color, fontsize=8)
    save_figure(figure, path)


def plot_sheet(images, captions, path, columns=6, rows=()):
    """Draw a sheet of images with a caption under each.

    Args:
        images: PIL images, or arrays (H, W, 3); None leaves the place empty.
        captions: one text for each image.
        path: PNG file to write.
        columns: number of images side by side.
        rows: a text to the left of each row; (): none.
    """
    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    figure = Figure(figsize=(2.2 * columns + (0.4 if rows else 0), 2.6 * lines), layout="constrained")
    for number, (image, caption) in enumerate(zip(images, captions)):
        axes = figure.add_subplot(lines, columns, number + 1, xticks=[], yticks=[], frame_on=False)
        if image is not None:
            axes.imshow(image)
        axes.set_xlabel(caption, fontsize=8)
        if rows and number % columns == 0:
            axes.set_ylabel(rows[number // columns], fontsize=9)
    save_figure(figure, path)


def plot_augmentation(images, labels, classes, transform, mixup, path):
    """Draw what training does to images: as they are, augmented, and the augmented batch mixed in each way.

    Args:
        images: PIL RGB images.
        labels: class number of each image.
        classes: class names.
        transform: the run's augmentation: PIL RGB -> tensor (3, H, W); the normalisation in it is undone here.
        mixup: the run's `BatchMixup`. It mixes every batch here; the rows say how many it mixes in training.
        path: PNG file to write.
    """
    names = [classes[label] for label in labels]
    batch, labels = torch.stack([transform(image) for image in images]), torch.tensor(labels)
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
    figure = Figure(figsize=(1.9 * columns + 1.2, 2.1 * len(kernels) + 0.5), layout="constrained")
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
    figure = Figure(figsize=(3.4 * len(fields) + 0.8, 4.1), layout="constrained")
    for number, (name, (field, sides)) in enumerate(fields.items(), start=1):
        axes = figure.add_subplot(1, len(fields), number, title=name, xlabel="pixels")
        half = len(field) / 2
        relative = np.maximum(field / field.max(), 1e-4)
        image = axes.imshow(relative, cmap="gray", norm=LogNorm(1e-4, 1), extent=(-half, half, half, -half))
        for (percent, side), line in zip(sides.items(), ("-", "--", ":")):
            square = Rectangle((-side / 2, -side / 2), side, side, fill=False, color="tab:orange", ls=line, lw=1.5)
            square.set_label(f"{percent} %: {side} px")
            axes.add_patch(square)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=7, handlelength=1.2)
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="gradient / its largest value")
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
    figure = Figure(figsize=(8.5, 6.5), layout="constrained")
    axes = figure.add_subplot(xticks=[], yticks=[], title="t-SNE of the pooled features: nearby images are similar")
    labels = np.asarray(labels)
    for number, name in enumerate(classes):
        mine = points[labels == number]
        if len(mine):
            color, marker = f"C{number % 10}", MARKERS[number % len(MARKERS)]
            axes.plot(*mine.T, marker, color=color, ms=5, mec="black", mew=0.3, alpha=0.8, label=name)
            box = dict(boxstyle="round,pad=0.15", fc="white", ec="none", alpha=0.7)
            axes.text(*np.median(mine, axis=0), name, fontsize=8, ha="center", va="center", bbox=box)
    if len(classes) <= 40:
        axes.legend(bbox_to_anchor=(1, 1), loc="upper left", fontsize=8)
    save_figure(figure, path)
