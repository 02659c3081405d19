"""Locks, by which a process notices that another one writes the same files."""

import contextlib
from pathlib import Path

from filelock import FileLock, Timeout

from common.options import UserError


@contextlib.contextmanager
def hold_lock(path, refusal, remove=False):
    """Hold a lock; the system frees it with the process, so that a crash leaves none behind.

    Args:
        path: file of the lock, outside of folders that are renamed while it is held.
        refusal: one sentence, for the case that another process holds it.
        remove: the file at the end.

    Raises:
        UserError: the `refusal`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(path)
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise UserError(refusal) from error
    except NotImplementedError:  # some network drives have no locks
        print(f"warning: {path.parent} supports no locks, so nothing notices a second process there")
    try:
        yield
    finally:
        if remove:
            with contextlib.suppress(OSError):  # Windows removes it itself
                path.unlink()
        held.release()
