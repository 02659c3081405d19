"""What train.py shows in TensorBoard if TENSORBOARD is set.

    tensorboard --logdir checkpoints
"""

import contextlib
import io
import threading
from numbers import Number

import numpy as np
from PIL import Image

from common.extras import require
from common.files import SideFiles
from common.plots import plot_augmentation, plot_confusion_matrix


class Board:
    """Writes a run's metrics and plots into <folder>/tensorboard; what cannot be written ends nothing.

    Args:
        folder: the run's folder.
        epoch: number of finished epochs; what an earlier part of the run wrote after them is dropped.
        history: the run's list of rows of log.csv, from which metrics that are missing are added, at the start or after
            a failure; their confusion matrices are not.

    Raises:
        UserError: if the package tensorboard is missing.
    """

    def __init__(self, folder, epoch, history=()):
        require("tensorboard")
        self.folder = folder / "tensorboard"
        self.history = history
        self.writer = None
        self.epoch = min(epoch, self.count_written()) if history else epoch  # metrics up to it are written
        self.side_files = SideFiles("training goes on, and its metrics are written after a later epoch")
        self.write(self.add_rows)

    def count_written(self):
        """Number of epochs whose metrics an earlier part of the run wrote, without a gap."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        try:
            events = EventAccumulator(str(self.folder), {"scalars": 0, "images": 1})
            events.Reload()
            written = {event.step for event in events.Scalars("lr")}
        except Exception:  # no such folder, no metrics, damaged files
            return 0
        return next(epoch for epoch in range(len(written) + 1) if epoch + 1 not in written)

    def write(self, function, *arguments):
        """Call a function that writes; after a failure the next call begins a new file."""
        if not self.side_files.write(self.folder, function, *arguments) and self.writer is not None:
            with contextlib.suppress(Exception):
                self.writer.close()
            self.writer = None

    def open(self):
        """Open a file, unless one is open."""
        if self.writer is not None:
            return
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard, which not everybody has

        before = threading.excepthook

        def report(failure):
            """The thread that writes would print a traceback, but the next call raises its error anyway."""
            if type(failure.thread).__name__ != "_AsyncWriterThread":
                before(failure)

        threading.excepthook = report
        self.writer = SummaryWriter(self.folder, purge_step=self.epoch + 1)

    def add_plot(self, name, epoch, plot, *args):
        """Add what the function `plot` of common/plots.py draws from `args`."""
        self.open()
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
        self.write(self.add_sheet, epoch, dataset, transform, mixup)

    def add_sheet(self, epoch, dataset, transform, mixup):
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
        self.write(self.add_rows, row)
        self.write(self.add_matrix, row["epoch"], labels, predictions, classes)

    def add_matrix(self, epoch, labels, predictions, classes):
        self.add_plot("confusion matrix", epoch, plot_confusion_matrix, labels, predictions, classes)

    def add_rows(self, *rows):
        """Add the metrics of these epochs, and of those before them that are missing."""
        self.open()
        rows = {row["epoch"]: row for row in (*self.history, *rows) if row["epoch"] > self.epoch}
        for epoch, row in rows.items():
            for name, value in row.items():
                prefix, _, kind = name.partition("_")
                if isinstance(value, Number) and name != "epoch":
                    # loss/train, loss/val and loss/ema stand side by side.
                    tag = f"{kind}/{prefix}" if prefix in ("train", "val", "ema") else name
                    self.writer.add_scalar(tag, value, epoch)
        self.writer.flush()
        self.epoch = max(rows, default=self.epoch)
