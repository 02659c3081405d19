"""Pictures of results: learning curves, confusion matrix, mistakes."""

import warnings

import numpy as np
from matplotlib import font_manager, rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
installed = {font.name for font in font_manager.fontManager.ttflist}
rcParams["font.sans-serif"] = ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
rcParams["axes.unicode_minus"] = False


def save(figure, path):
    """Write `figure` to the PNG file `path`."""
    with warnings.catch_warnings():
        # Without such a font Chinese names are drawn as boxes; a warning for each character would bury the results.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, dpi=120)


CURVES = (("train", "o", "-", "training"), ("val", "s", "--", "validation"), ("ema", "^", ":", "validation, EMA"))


def plot_curves(history, folder):
    """Draw loss.png and acc.png into `folder`.

    Args:
        history: one dict for each epoch, with `epoch` and `<train|val|ema>_<loss|acc1>`; None or absent is left out.
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
        save(figure, folder / f"{figure_name}.png")


def plot_confusion_matrix(matrix, classes, path):
    """Draw a confusion matrix with counts.

    Args:
        matrix: int array (true class, predicted class).
        classes: their names.
        path: PNG file to write.
    """
    size = max(5, 1.8 + 0.45 * len(classes))
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted class", ylabel="true class")
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="share of the true class / %", shrink=0.8)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 30:  # more would not be legible
        for (true, predicted), count in np.ndenumerate(matrix):
            if count:
                color = "white" if share[true, predicted] > 0.5 else "black"
                axes.text(predicted, true, count, ha="center", va="center", color=color, fontsize=8)
    save(figure, path)


def plot_mistakes(pictures, captions, path):
    """Draw a sheet of pictures with a caption under each.

    Args:
        pictures: PIL pictures.
        captions: one text for each.
        path: PNG file to write.
    """
    columns = min(6, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.6 * rows), layout="constrained")
    for number, (picture, caption) in enumerate(zip(pictures, captions), start=1):
        axes = figure.add_subplot(rows, columns, number, xticks=[], yticks=[], frame_on=False)
        axes.imshow(picture)
        axes.set_xlabel(caption, fontsize=8)
    save(figure, path)
