"""The folder of a run, checkpoints/<model>: one run at a time, nothing of an earlier run lost."""

import contextlib
from pathlib import Path

from filelock import FileLock, Timeout

from common.options import UserError


def set_aside(folder):
    """Rename the folder of an earlier run, unless it is empty, so that nothing is lost."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        number = next(n for n in range(1, 10**6) if not Path(f"{folder}.{n}").exists())
        print(f"the earlier run in {folder} is now in {folder.rename(f'{folder}.{number}')}")


@contextlib.contextmanager
def lock(folder):
    """Keep other processes from training in `folder`; the system frees the lock with the process, so a crash leaves
    none behind.

    Raises:
        UserError: if another process holds it.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, which may be renamed while it is held.
    held = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        held.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"another run is training in {folder}; wait for it, end it, or set OUTPUT to another folder"
        ) from error
    except NotImplementedError:  # some network drives have no locks
        print(f"warning: {folder.parent} supports no locks, so nothing keeps a second run out of {folder}")
    try:
        yield
    finally:
        held.release()
