"""How long a run will take, said after a minute and after the first epoch; a remedy where a CPU needs over a day."""

import math

from common.progress import Progress

FIRST_LOOK = 60  # s of training after which the first estimate is made, unless an epoch is over before
A_DAY = 86400  # s
# Relative cost of a training step: minutes per epoch in the README's table of variants.
COST = dict(a=13, f=17, p=22, n=32, t=51, s=81, b=132, l=285, xl=461)


class Clock:
    """Estimates of the time that is left, printed once by the first process, each by time measured in this start.

    Args:
        about: what checkpoints hold besides the state: arch, config, number of training images, ...
        sizes: the run's `common.schedule.ImageSizes`; the time of an epoch grows with the area of its images.
        device: type of the device, such as "cpu".
    """

    def __init__(self, about, sizes, device):
        self.arch = about["arch"]
        self.on_cpu = device == "cpu"
        self.images = about["pictures_train"]
        self.areas = [math.prod(sizes.training(epoch)) for epoch in range(sizes.epochs)]
        self.began = (0.0, 0)  # (seconds, images) of the epoch in which this process started, when it did
        self.said = self.done = self.hinted = False  # the first estimate, that by an epoch, and the hint

    def begin(self, state):
        """Before the first step of this process; `state` may be that of a run that is resumed."""
        self.began = state.seconds, state.images

    def look(self, state):
        """After each step: the first estimate, as soon as there is something to tell."""
        if self.said:
            return
        seconds, images = state.seconds - self.began[0], state.images - self.began[1]
        if seconds >= FIRST_LOOK and images > 0:
            self.said = True
            rest = 1 - state.images / self.images + sum(self.areas[state.epoch + 1 :]) / self.areas[state.epoch]
            self.tell(seconds / images * self.images * rest, f"by the first {images} images")

    def finish_epoch(self, state, row):
        """After each epoch: the estimate by the first one that this process trained.

        Args:
            state: its `epoch` is the number of finished epochs.
            row: of log.csv.
        """
        complete = not self.began[1]
        self.began = (0.0, 0)
        if not self.done and complete and state.epoch < len(self.areas):
            rest = sum(self.areas[state.epoch :]) / self.areas[state.epoch - 1]
            self.tell(row["seconds"] * rest, f"by the {row['seconds']:.0f} s of epoch {row['epoch']}")
            self.said = self.done = True

    def tell(self, seconds, reason):
        """Print an estimate, and a hint where it is a long wait."""
        Progress.write(f"time left   about {in_words(seconds)}, {reason}")
        if self.on_cpu and seconds > A_DAY and not self.hinted:
            Progress.write(f"            {describe_remedy(self.arch, seconds)}")
            self.hinted = True


def describe_remedy(arch, seconds):
    """What takes less time on a CPU, in one line.

    Args:
        arch: of the network.
        seconds: that are left.
    """
    smaller, cost = "", COST.get(arch.removeprefix("unireplknet_"))
    if cost is None:
        smaller = "--model unireplknet_a may take less, and "
    elif cost > COST["a"]:
        smaller = f"--model unireplknet_a takes about {in_words(seconds * COST['a'] / cost)}, and "
    return f"on this CPU {smaller}half of --img-size takes a quarter of the time"


def in_words(seconds):
    """A duration in the unit in which one thinks of it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * A_DAY else f"{seconds / A_DAY:.1f} days"
