"""What a script prints, where nobody reads it any more: `python test.py photos | head`, or a terminal that was closed.

This module imports the standard library only.
"""

import contextlib
import errno
import os
import sys

CLOSED_PIPE = 141  # exit status that shells show for a process which SIGPIPE has ended: 128 + 13
# What writing raises once the other end of the pipe or terminal is gone; Windows calls that an invalid argument.
GONE = {errno.EPIPE, errno.EIO, errno.ESHUTDOWN, errno.ECONNRESET} | ({errno.EINVAL} if os.name == "nt" else set())


class Output:
    """A standard stream whose text goes nowhere from the moment on when nobody reads it any more.

    Args:
        stream: sys.stdout or sys.stderr.
        policy: see `guard_output`.

    Attributes:
        gone: whether its reader is gone.
    """

    def __init__(self, stream, policy):
        self.stream = stream
        self.policy = policy
        self.gone = False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *arguments):
        try:
            if not self.gone:
                function(*arguments)
        except OSError as error:
            if error.errno in GONE:
                self.gone = True
                self.discard()
                if self.policy == "end":
                    raise SystemExit(CLOSED_PIPE) from None
            elif self.policy != "ignore":
                raise

    def discard(self):
        """Let the system, too, discard what is written: by libraries, and by Python when it ends."""
        with contextlib.suppress(OSError, ValueError):  # a stream without a file of its own, as in a notebook
            nowhere, number = os.open(os.devnull, os.O_WRONLY), self.stream.fileno()
            os.dup2(nowhere, number)
            os.close(nowhere)


@contextlib.contextmanager
def guard_output(policy):
    """Inside this context no traceback follows where the reader of stdout or stderr is gone.

    Args:
        policy: "finish": go on silently, so that the script's files become complete, and end with status 141 in place
            of a success, as if SIGPIPE had ended it; "end": end at once with this status; "ignore": go on, whatever
            keeps the text from being written, and end as always.
    """
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # in place of a stream that was closed before Python started
        sys.stdout, sys.stderr = Output(before[0] or nowhere, policy), Output(before[1] or nowhere, "ignore")
        output = sys.stdout
        try:
            yield
        except SystemExit as end:
            if output_is_gone(output) and policy != "ignore" and end.code in (None, 0, 3):
                raise SystemExit(CLOSED_PIPE) from None
            raise
        finally:
            output_is_gone(output)  # what is left in its buffer must not raise an error when Python ends
            sys.stdout, sys.stderr = before


def output_is_gone(output):
    """Whether the reader of an `Output` is gone, which shows only when everything is written."""
    with contextlib.suppress(SystemExit, ValueError):
        output.flush()
    return output.gone
