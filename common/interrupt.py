"""SIGTERM and Ctrl-C: a long script finishes what it is at, saves, and only then ends."""

import signal


class Stopped(Exception):
    """SIGTERM or Ctrl-C came, and what was begun is finished."""


class Interrupt:
    """Inside `with Interrupt() as interrupt`, SIGTERM (what clusters send before they stop a job) and SIGINT (Ctrl-C)
    are noted and do not end the process; the second one ends it at once.

    Attributes:
        signal: the `signal.Signals` that came; None before.
    """

    def __init__(self):
        self.signal = None
        self.before = {}

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        self.signal = signal.Signals(number)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    @property
    def exit_status(self):
        """What shells expect of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM.

        143 also for a process that stops because another one of the run was told to.
        """
        return 128 + (self.signal or signal.SIGTERM)


def leave_signals_to_the_main_process(worker):
    """`worker_init_fn` of a DataLoader: a terminal sends Ctrl-C to the workers, too, and the last step needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
