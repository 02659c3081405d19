"""What can happen to a process that reads images; a module of its own, since started processes import it.

    python tests/faulty.py     lets each happen (not on Windows), and prints what a script then says, and their number
"""

import os
import signal
import sys
import threading
from pathlib import Path

import torch
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/
from common.images import ImageError, load_image
from common.loading import Loader
from common.options import UserError, end_processes
from common.workers import StoodStill


class Faulty(Dataset):
    """64 images, one of which does something to the process that reads it."""

    def __init__(self, fault):
        self.fault = fault

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index == 21:
            result = FAULTS[self.fault][0]()
            return result or (torch.zeros(3, 8, 8), index)
        return torch.zeros(3, 8, 8), index


def throw(error):
    raise error


def throw_with_cause():
    try:
        raise UserError("first: of two")
    except UserError as error:
        raise UserError("second: of two") from error


# name -> (what happens to the process, the error that must come out of it, its words)
FAULTS = {
    "none": (lambda: None, None, ""),
    "broken image": (lambda: load_image("no Error: image.png"), ImageError, "^no Error: image.png cannot be read"),
    "two lines": (lambda: throw(UserError("a\nb: c")), UserError, "^a\nb: c$"),
    "caused": (lambda: throw_with_cause(), UserError, "^second: of two$"),
    "no file": (lambda: open("nowhere/a.png"), OSError, "^.Errno 2. No such file or directory: 'nowhere/a.png'$"),
    "memory": (lambda: throw(MemoryError("std::bad_alloc")), UserError, r"memory is full .*bad_alloc.*lower WORKERS"),
    "open files": (lambda: throw(OSError(24, "Too many open files")), UserError, "ulimit -n 65536, or lower WORKERS"),
    "mmap": (lambda: throw(RuntimeError("unable to mmap 9 bytes")), UserError, "WORKERS to 0 .*--shm-size"),
    "a bug": (lambda: throw(KeyError("x")), KeyError, "Traceback"),
    "cannot be sent": (threading.Lock, TypeError, "cannot pickle '_thread.lock'"),  # in a list, see `read_all`
    "killed": (lambda: os.kill(os.getpid(), 9), UserError, "SIGKILL.*memory is full.*WORKERS .* 0"),
    "bus error": (lambda: os.kill(os.getpid(), signal.SIGBUS), UserError, "shared memory is full.*--shm-size=8g"),
    "crash": (lambda: os.kill(os.getpid(), signal.SIGSEGV), UserError, "ended by the signal SIGSEGV; .*WORKERS 0"),
    "ends": (lambda: os._exit(3), UserError, "ended with status 3; .*WORKERS 0"),
    "stands still": (lambda: os.kill(os.getpid(), signal.SIGSTOP), StoodStill, "nothing came for .* training images"),
}


def read_all(fault, persistent=True, method=None, workers=2):
    minutes = 0.02 if fault == "stands still" else 5  # starting a process takes half a minute on a busy machine
    loader = Loader(
        Faulty(fault), 4, num_workers=workers, persistent_workers=persistent and workers > 0, wait_minutes=minutes,
        multiprocessing_context=method, what="training images", collate_fn=list if fault == "cannot be sent" else None,
    )  # fmt: skip
    batches = [batch for _ in range(2) for batch in loader]
    return loader, [index for _, labels in batches for index in labels.tolist()]


def main():
    for number, (name, (_, expected, _)) in enumerate(FAULTS.items(), start=1):
        try:
            read_all(name, method="fork")
            said, kind = "", None
        except Exception as error:
            said, kind = next(iter(str(error).splitlines()), ""), type(error)
        end_processes()
        verdict = "as expected" if kind is expected else "NOT EXPECTED"
        print(f"{number:3} {name:16} {verdict:12}  {said[:140]}", flush=True)
    print(f"{len(FAULTS)} faults of a process that reads images")


if __name__ == "__main__":
    main()
