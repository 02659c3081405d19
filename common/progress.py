"""Progress of long work: tqdm's bar in a terminal or notebook, a line a minute in a log file or pipe."""

import builtins
import sys

from tqdm import tqdm

LINE_SECONDS = 60  # between two lines; work that takes less gets none
LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt} {unit}, {elapsed} so far, {remaining} left{postfix}"


class Lines:
    """A stream on which each state of a bar that is written becomes a line of its own.

    Args:
        stream: a text stream.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        text = text.strip()  # of the carriage return that moves back to the beginning, and what clears a bar
        if text:
            self.stream.write(f"{text}\n")


class Progress(tqdm):
    """tqdm's bar on sys.stderr, for its arguments; where that is no terminal, a line every `LINE_SECONDS`."""

    def __init__(self, *arguments, **options):
        self.in_lines = not (sys.stderr.isatty() or hasattr(builtins, "__IPYTHON__"))
        if self.in_lines:
            options |= dict(file=Lines(sys.stderr), mininterval=LINE_SECONDS, delay=LINE_SECONDS, miniters=1)
            options |= dict(bar_format=LINE)
        super().__init__(*arguments, **options)

    def set_postfix(self, *arguments, **values):
        super().set_postfix(*arguments, refresh=not self.in_lines, **values)
