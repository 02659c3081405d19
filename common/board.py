"""What train.py shows in TensorBoard if TENSORBOARD is set.

    tensorboard --logdir checkpoints
"""

import io
from numbers import Number

import numpy as np
from PIL import Image
from sklearn.metrics import confusion_matrix

from common.extras import require
from common.plots import plot_augmentation, plot_confusion_matrix


class Board:
    """Writes a run's metrics and plots into <folder>/tensorboard.

    Args:
        folder: the run's folder.
        epoch: number of finished epochs; what an earlier part of the run wrote after them is dropped.

    Raises:
        UserError: if the package tensorboard is missing.
    """

    def __init__(self, folder, epoch):
        require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard, which not everybody has

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=epoch + 1)

    def add_plot(self, name, epoch, plot, *args):
        """Add what the function `plot` of common/plots.py draws from `args`."""
        file = io.BytesIO()
        plot(*args, file)
        self.writer.add_image(name, np.asarray(Image.open(file).convert("RGB")), epoch, dataformats="HWC")
        self.writer.flush()

    def add_augmentation(self, epoch, dataset, transform, mixup):
        """Add the sheet of augmented training images.

        Args:
            epoch: number of finished epochs.
            dataset: a `CachedImageFolder`, of which six images are shown.
            transform, mixup: see `plot_augmentation`.
        """
        chosen = [dataset.samples[index] for index in np.linspace(0, len(dataset) - 1, 6).astype(int)]
        images, labels = [dataset.loader(path) for path, _ in chosen], [label for _, label in chosen]
        self.add_plot("augmentation", epoch, plot_augmentation, images, labels, dataset.classes, transform, mixup)

    def add_epoch(self, row, labels, predictions, classes):
        """Add one epoch.

        Args:
            row: the epoch's row of log.csv, a dict.
            labels, predictions: class numbers of the validation images.
            classes: class names.
        """
        for name, value in row.items():
            prefix, _, kind = name.partition("_")
            if isinstance(value, Number) and name != "epoch":
                # loss/train, loss/val and loss/ema stand side by side.
                tag = f"{kind}/{prefix}" if prefix in ("train", "val", "ema") else name
                self.writer.add_scalar(tag, value, row["epoch"])
        matrix = confusion_matrix(labels, predictions, labels=range(len(classes)))
        self.add_plot("confusion matrix", row["epoch"], plot_confusion_matrix, matrix, classes)
