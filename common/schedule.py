"""Learning rate and image size as functions of the step or epoch."""

import math
from dataclasses import dataclass


def warmup_cosine(step, steps, warmup_steps, highest, lowest):
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up to `highest`, then half a cosine to `lowest`."""
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * min(progress, 1))) / 2


@dataclass(frozen=True)
class ImageSizes:
    """Image sizes of a run, each (height, width) in pixels.

    Small images first cost a fraction of the time (Tan and Le, "EfficientNetV2", ICML 2021, Section 4): the size grows
    from `start` in steps of 32, and reaches `full` in the last third of the run.

    Args:
        epochs: length of the run.
        full: training size at the end.
        test: size for validation and prediction; larger than `full` where crops are learned, since a crop that is
            scaled to the training size shows objects larger than the whole image does (Touvron et al., "Fixing the
            train-test resolution discrepancy", NeurIPS 2019). None: `full`.
        start: training size in the first epoch, one number for a square; None: `full` from the start.
    """

    epochs: int
    full: tuple[int, int]
    test: tuple[int, int] | None = None
    start: int | None = None

    def training(self, epoch):
        """Size of the training images in epoch `epoch` (from 0)."""
        full_from = 2 * self.epochs // 3
        if self.start is None or epoch >= full_from:
            return self.full
        size = (self.start + (self.full[0] - self.start) * epoch // full_from) // 32 * 32
        return size, size

    def validation(self, epoch):
        """Size at which the weights of epoch `epoch` (from 0) are validated and tested: as long as the training images
        grow it is theirs, since the network does not know larger ones yet."""
        size = self.training(epoch)
        return size if size != self.full else self.test or self.full

    @property
    def last(self):
        """Size for validation and prediction after the last epoch."""
        return self.test or self.full
