"""Processes that read files for a script: how they begin and end, and how the script waits for what they read.

Nothing here needs PyTorch, which makedata.py does without.
"""

import multiprocessing
import multiprocessing.queues
import os
import queue
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from common.options import READER, UserError

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
WAIT_MINUTES = 10.0  # without any file read, after which a script gives up
SAY_SECONDS = 60.0  # between two lines that say what the script waits for
LOOK_SECONDS = 0.5  # between two looks at what may have happened while it waits
END = object()


class StoodStill(UserError):
    """Nothing could be read for too long."""


def start_worker(*_):
    """The first thing that a process does which reads files: `worker_init_fn` of a DataLoader, `initializer` of a pool.

    A terminal sends Ctrl-C, and a cluster SIGTERM, to all processes, but the last step of a run still needs its
    images. So such a process ignores signals; it ends when its parent kills it (see `common.options.run`) or is gone.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # that of the parent, see `common.faults.Interrupt`
    multiprocessing.queues.Queue._on_queue_feeder_error = send_error
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Wait until the process that started this one is gone, then end this one, whatever it is doing."""
    parent, number = multiprocessing.parent_process(), os.getppid()
    # Of several processes, each may hold the others' ends of the pipes by which `join` notices the parent's end, so
    # the parent's number is compared, too; under Windows, it never changes.
    while parent.is_alive() and os.getppid() == number:
        parent.join(1)
    os._exit(1)


def send_error(results, error, item):
    """Put the error into a DataLoader's queue in place of an item that cannot be sent, as when /dev/shm is full.

    By default it is only printed, and the script waits for the item forever.
    """
    from torch._utils import ExceptionWrapper  # by which a DataLoader's processes report all their errors

    results.put((item[0], ExceptionWrapper(where="in a DataLoader worker process")))


def describe_end(status):
    """One sentence on a process that ended before its work was done.

    Args:
        status: `exitcode` of the `multiprocessing.Process`.
    """
    if status == -getattr(signal, "SIGBUS", 0):
        return describe_full_shared_memory("a process that read files got a bus error")
    if status == -getattr(signal, "SIGKILL", 0):
        return (
            "a process that read files was killed (SIGKILL), which the system does when memory is full; set WORKERS "
            "to a smaller number, or to 0, and start again"
        )
    if status < 0:
        how = f"by the signal {signal.Signals(-status).name}" if -status in list(signal.Signals) else f"({status})"
        return f"a process that read files was ended {how}; start again, with WORKERS 0 if this happens again"
    return f"a process that read files ended with status {status}; start again, with WORKERS 0 if this happens again"


def describe_full_shared_memory(reason):
    """One sentence on shared memory that is too small."""
    return (
        f"the shared memory is full, through which processes send images ({reason}); set WORKERS to 0 or lower "
        "BATCH_SIZE, or give a container more: docker run --shm-size=8g"
    )


def map_in_processes(function, items, workers, what):
    """What `function` makes of each item, in order, computed by `workers` processes; see `watched` for `what`.

    Only a few items more than there are processes are held at once.

    Raises:
        StoodStill: after `WAIT_MINUTES` without a result.
        UserError: if a process was killed.
    """
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    complete = False
    try:
        yield from watched(lambda: map_ahead(pool, function, items, 4 * workers), what)
        complete = True
    except BrokenProcessPool as error:
        raise UserError(
            "a process that read files was killed, which the system does when memory is full; set WORKERS to a smaller "
            "number, or to 0, and start again"
        ) from error
    finally:
        processes = [] if complete else list((pool._processes or {}).values())
        pool.shutdown(wait=complete, cancel_futures=True)
        for process in processes:
            process.kill()


def map_in_threads(function, items, what, minutes=WAIT_MINUTES):
    """What `function` makes of each item, in order, computed by a thread for each core, up to 8; see `watched`."""
    threads = min(os.cpu_count() or 1, 8)
    pool = ThreadPoolExecutor(threads, thread_name_prefix=READER)
    try:
        yield from watched(lambda: map_ahead(pool, function, items, 4 * threads), what, minutes)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def map_ahead(pool, function, items, ahead):
    """What `function` makes of each item, in order, with `ahead` items taken before their results are asked for."""
    tasks = deque()
    for item in items:
        tasks.append(pool.submit(function, item))
        if len(tasks) > ahead:
            yield tasks.popleft().result()
    while tasks:
        yield tasks.popleft().result()


def watched(start, what, minutes=WAIT_MINUTES, look=lambda: None):
    """The items of an iterable, read in a thread, so that this one can look around while it waits for them.

    The thread works only while this one waits. So nothing that both use, such as the random generators, needs a lock,
    and all is computed in the same order as without the thread.

    Args:
        start: function that returns the iterable; called in the thread, too.
        what: what is waited for; every minute, a line says so.
        minutes: without an item after which to give up; 0: never.
        look: function that is called now and then during the wait, and may raise what is to end it.

    Raises:
        StoodStill: after `minutes` without an item. The thread is abandoned; `common.options.run` ends it.
    """
    requests, answers = queue.SimpleQueue(), queue.SimpleQueue()
    threading.Thread(target=serve, args=(start, requests, answers), name=READER, daemon=True).start()
    try:
        while True:
            requests.put(True)
            item, error = wait(answers, what, minutes, look)
            if error is not None:
                raise error
            if item is END:
                return
            yield item
    finally:
        requests.put(False)


def serve(start, requests, answers):
    """Answer each request with (the next item of `start()`, None), (`END`, None), or (None, the error)."""
    if hasattr(signal, "pthread_sigmask"):  # processes inherit it, which a signal would end before `start_worker`
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    iterator = None
    while requests.get():
        try:
            if iterator is None:
                iterator = iter(start())
            answers.put((next(iterator, END), None))
        except BaseException as error:
            answers.put((None, error))


def wait(answers, what, minutes, look):
    """The next answer; see `watched`."""
    waited, said = 0.0, 0.0
    while True:
        try:
            return answers.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            look()
        waited += LOOK_SECONDS  # the clock goes on while the computer sleeps, or the script is stopped by Ctrl-Z
        if minutes and waited >= 60 * minutes:
            raise StoodStill(
                f"nothing came for {minutes:g} minutes while waiting for {what}; see whether the drive or the network "
                "that holds the files still answers, and start again"
            )
        if waited >= said + SAY_SECONDS:
            said = waited
            line = f"waiting for {what} for {waited / 60:.0f} min; does the drive or the network still answer?"
            tqdm.write(line, file=sys.stderr)
