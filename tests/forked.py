"""Scripts as processes of their own that are forked from this one, with all that it has imported.

A new Python needs ten seconds of processor time for its imports on a slow machine. Where processes cannot be forked,
one is started all the same.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile

from tiny import ROOT  # whose import registers unireplknet_test

from common import calibration, checkpoint, run_folder
from models import depthwise_choice

CAN_FORK = hasattr(os, "fork") and sys.platform != "darwin"


class Forked:
    """A script that runs in a forked process; the part of `subprocess.Popen` that the tests need.

    Args:
        script: relative to the repository root.
        words: of its command line.
        cwd: its current folder.
        session: whether it has a session of its own, as in a terminal of its own.
        terminal: file descriptor of its stdin, stdout and stderr; None: they are kept for `communicate`.
        environment: {name: value} of variables.
        before: function that is called in the process before the script starts.
    """

    def __init__(self, script, *words, cwd, session=False, terminal=None, environment={}, before=lambda: None):
        self.files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
        streams = [file.fileno() for file in self.files] if terminal is None else [terminal] * 2

        def run():
            gc.freeze()  # garbage of this process may end by waiting for its threads, which are not forked
            if session:
                os.setsid()
            stdin = os.open(os.devnull, os.O_RDONLY) if terminal is None else terminal
            for number, stream in enumerate([stdin, *streams]):
                os.dup2(stream, number)
            sys.stdin = open(0, closefd=False)
            sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
            os.chdir(cwd)
            os.environ.update(environment)
            sys.argv = [str(ROOT / script), *map(str, words)]
            before()
            runpy.run_path(sys.argv[0], run_name="__main__")

        self.process = multiprocessing.get_context("fork").Process(target=run)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self), timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple(self.read(number) for number in (0, 1))

    def read(self, number):
        """What the process has written so far to stdout (0) or stderr (1)."""
        return os.pread(self.files[number].fileno(), 10**8, 0).decode("utf-8", "replace")

    def kill(self):
        self.process.kill()

    def send_signal(self, number):
        os.kill(self.pid, number)


def start_training(folder, *words, **options):
    """train.py with unireplknet_test as a process of its own, see `Forked`."""
    return start_script("train.py", folder, *words, before=save_time, otherwise="tests/tiny.py", **options)


def start_script(script, folder, *words, otherwise=None, **options):
    """A script as a process of its own, see `Forked`; where processes cannot be forked, the script `otherwise`."""
    if CAN_FORK:
        return Forked(script, *words, cwd=folder, **options)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    command = [sys.executable, ROOT / (otherwise or script), *map(str, words)]
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def save_time():
    checkpoint.PAUSES = (0.1, 0.1)  # a test of a full disk need not wait for half a minute
    run_folder.plot_curves = touch_curves
    calibration.plot_calibration = touch_diagram
    depthwise_choice.find_groups = find_no_groups


def find_no_groups(model, uses):
    """Instead of the convolutions that could be chosen: all stay as by default, as the tests have it anyway."""
    return {}


def touch_curves(history, folder):
    """Instead of the learning curves, which take longer than the epochs they show."""
    for name in ("loss.png", "acc.png"):
        (folder / name).touch()


def touch_diagram(*arguments):
    """Instead of the reliability diagram."""
    arguments[-1].touch()
