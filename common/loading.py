"""The DataLoader of all scripts: one that neither waits forever nor leaves a process behind."""

import errno
import re
import time
from multiprocessing.connection import wait

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from common.distributed import keep_step
from common.faults import Interrupt, Stopped, is_out_of_memory
from common.options import UserError
from common.workers import WAIT_MINUTES, describe_end, describe_full_shared_memory, start_worker, watched
from common.workers import StoodStill as StoodStill  # for those who use the loader


class Loader(DataLoader):
    """A DataLoader that says what it waits for, obeys signals while it waits, and explains its errors.

    The batches are those of torch's DataLoader, in the same order. Its processes are killed when a pass ends early, by
    an error or because nobody asks for the next batch any more; otherwise they end, or persist, as torch's do.

    Args:
        args, options: see `torch.utils.data.DataLoader`.
        what: what is read, for messages.
        wait_minutes: without a batch after which to give up; 0: never.
        together: in a run of several processes, which all have such a loader, where they wait for each other: "batch"
            if they have equally many batches, else "end"; None: nowhere.

    Raises:
        Stopped: on iteration, if a signal arrives inside `with Interrupt()` while it waits for a batch.
        StoodStill: after `wait_minutes` without a batch.
        UserError: an error that the user can fix, also that of a process; if a process was killed; if the shared memory
            or the memory is full.
    """

    def __init__(self, *args, what="images", wait_minutes=WAIT_MINUTES, together=None, **options):
        super().__init__(*args, worker_init_fn=start_worker, **options)
        self.what = what
        self.wait_minutes = wait_minutes
        self.together = together
        self.batches = None  # torch's iterator

    def __iter__(self):
        device = torch.cuda.current_device() if self.pin_memory and torch.cuda.is_initialized() else None
        complete = False
        try:
            batches = watched(lambda: self.start(device), self.what, self.wait_minutes, self.look)
            yield from keep_step(batches, self.together == "batch", self.look) if self.together else batches
            complete = True
        except (RuntimeError, OSError, EOFError, MemoryError, UserError) as error:
            explained = self.explain(error)
            if explained is error:
                raise
            raise explained from error
        finally:
            if not complete:
                self.close()

    def start(self, device):
        """torch's iterator, made in the thread that reads from it.

        Args:
            device: number of the GPU for which batches are pinned, which a new thread does not know; None: none.
        """
        if device is not None:
            torch.cuda.set_device(device)
        if not self.persistent_workers:
            self.batches = None
        self.batches = super().__iter__()
        return self.batches

    def processes(self):
        """Those that read, as far as torch lets them be known."""
        return getattr(self.batches, "_workers", ())

    def look(self):
        """Called now and then during the wait for a batch."""
        if Interrupt.active is not None and Interrupt.active.signal is not None:
            raise Stopped
        for process in self.processes():
            if process.exitcode:  # torch itself looks every five seconds
                raise UserError(describe_end(process.exitcode))

    def explain(self, error):
        """The error to raise in place of `error`: in one sentence if the user can fix it."""
        text = message_of(error)
        if text == str(error).strip() and isinstance(error, (OSError, EOFError)):
            # The connection is lost before the process is, and its files are closed before its status is known.
            ended = wait([process.sentinel for process in self.processes()], 3)
            for process in self.processes():
                if process.sentinel in ended:
                    process.join(3)
        lost = [process.exitcode for process in self.processes() if process.exitcode]
        if lost:
            stopping = Interrupt.active is not None and Interrupt.active.signal is not None
            return Stopped() if stopping else UserError(describe_end(lost[0]))
        if isinstance(error, UserError):
            return error if text == str(error).strip() else type(error)(text)
        starting = self.num_workers > 0 and self.batches is None
        if (
            re.search("shared memory|unable to mmap|torch_shm_manager", text)
            or starting
            and getattr(error, "errno", None) == errno.ENOSPC
        ):
            return UserError(describe_full_shared_memory(text))
        if "Too many open files" in text:
            return UserError(
                f"too many files are open ({text}); raise the limit with ulimit -n 65536, or lower WORKERS"
            )
        if is_out_of_memory(error):
            return UserError(f"memory is full while reading {self.what} ({text}); lower WORKERS or BATCH_SIZE")
        if starting:
            return UserError(f"the processes that read {self.what} cannot be started ({text}); set WORKERS to 0")
        return OSError(text) if isinstance(error, OSError) and text != str(error).strip() else error

    def close(self):
        """Kill the processes; a later pass starts new ones."""
        if getattr(self.batches, "_worker_pids_set", False):
            # Otherwise torch, which hears of every process that ends, raises an error for those killed here.
            signal_handling._remove_worker_pids(id(self.batches))
            self.batches._worker_pids_set = False
        for process in self.processes():
            process.kill()
        wait_until = time.monotonic() + 5  # the system kills none in the middle of a read from a network drive
        for process in self.processes():
            process.join(max(0.0, wait_until - time.monotonic()))
        if self.batches is not None:
            # torch's way to end them asks them, and may wait forever for one that was killed while it held a lock.
            self.batches._shutdown = True
        self.batches = self._iterator = None


def message_of(error):
    """The message of an error, without the traceback that torch puts around that of a process."""
    text = str(error).strip()
    if "Traceback (most recent call last)" not in text:
        return text
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    _, found, message = f"\n{text}".rpartition(f"\n{name}: ")
    return message if found else text.splitlines()[-1]
