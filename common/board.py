"""What train.py shows in TensorBoard, where TENSORBOARD is set.

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
    """Writes a run's figures and pictures into <folder>/tensorboard.

    Args:
        folder: of the run.
        epoch: epochs that are finished; what an earlier part of the run wrote after them is dropped.
    """

    def __init__(self, folder, epoch):
        require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard, which not everybody has

        self.writer = SummaryWriter(folder / "tensorboard", purge_step=epoch + 1)

    def add_picture(self, name, epoch, plot, *args):
        """Add what the function `plot` of common/plots.py draws from `args`."""
        file = io.BytesIO()
        plot(*args, file)
        self.writer.add_image(name, np.asarray(Image.open(file).convert("RGB")), epoch, dataformats="HWC")
        self.writer.flush()

    def add_augmentation(self, epoch, pictures, classes, transform, mixup, mix):
        """Add the sheet of what is done to training pictures; for the arguments see `plot_augmentation`."""
        chosen = [pictures.samples[index] for index in np.linspace(0, len(pictures) - 1, 6).astype(int)]
        photos, labels = [pictures.loader(path) for path, _ in chosen], [label for _, label in chosen]
        self.add_picture("augmentation", epoch, plot_augmentation, photos, labels, classes, transform, mixup, mix)

    def add_epoch(self, row, labels, predictions, classes):
        """Add one epoch: its row of log.csv, and the confusion matrix of its validation."""
        for name, value in row.items():
            prefix, _, kind = name.partition("_")
            if isinstance(value, Number) and name != "epoch":
                # loss/train, loss/val and loss/ema stand side by side.
                tag = f"{kind}/{prefix}" if prefix in ("train", "val", "ema") else name
                self.writer.add_scalar(tag, value, row["epoch"])
        matrix = confusion_matrix(labels, predictions, labels=range(len(classes)))
        self.add_picture("confusion matrix", row["epoch"], plot_confusion_matrix, matrix, classes)
