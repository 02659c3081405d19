"""Files for people and other programs: written whole, and in a long run such that one that fails ends nothing.

This module imports the standard library only.
"""

import contextlib
import functools
import json
import os
import time
from pathlib import Path

from common.options import UserError
from common.tables import TableWriter

PAUSES = (0.1, 0.3, 0.6)  # s between attempts to replace a file; virus scanners under Windows hold one for a moment


@contextlib.contextmanager
def written_whole(path):
    """Yields the path of a new file to write, which then takes the place of `path`: what reads `path`, and a script
    that is stopped, finds the old file or the new one, never a part.

    Raises:
        UserError: if it cannot be written; the file that was there before is still there.
    """
    path = Path(path)
    # The file that a symbolic link leads to, so that the link stays.
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():  # /dev/null is written to, not replaced
        partial = target
    else:
        partial = target.with_name(f"{target.name[:40]}.part")  # a long name has no room for an ending
    try:
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError("it is read-only")  # which renaming would not respect
        yield partial
        if partial != target:
            replace(partial, target)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UserError(
            f"cannot write {path} ({reason}); close it in other programs, allow writing there, or make room on the disk"
        ) from error
    finally:
        if partial != target:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def replace(source, target):
    """`os.replace`, tried again where another program holds one of the files for a moment."""
    for pause in (*PAUSES, None):
        try:
            return os.replace(source, target)
        except PermissionError:
            if pause is None:
                raise
            time.sleep(pause)


def write_text(path, text, encoding="utf-8"):
    """Write a text file whole; names that are not UTF-8 keep their bytes."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding=encoding, errors="surrogateescape")


def write_json(path, value, indent=2):
    """Write plain types as a JSON file, whole."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_csv(path, rows, encoding="utf-8-sig"):
    """Write a CSV file, whole, with names that no program takes for formulas, see `common.tables`.

    Args:
        path: the file.
        rows: iterable of lists; or list of dicts, whose keys, in the order in which they first occur, are the header.
        encoding: by default UTF-8 with a byte order mark, for Excel.
    """
    with (
        written_whole(path) as partial,
        open(partial, "w", newline="", encoding=encoding, errors="surrogateescape") as file,
    ):
        writer = TableWriter(file)
        if rows and isinstance(rows, list) and isinstance(rows[0], dict):
            writer.write_dicts(rows)
        else:
            writer.writerows(rows)


def list_files(folder, skip=lambda name: False, skipped=None):
    """All files below `folder`, sorted, also in folders that symbolic links lead to, but not in a circle.

    Args:
        folder: its path.
        skip: function of a folder's name that says whether it is left out.
        skipped: list to which the paths of the folders that are left out are added; None: nowhere.
    """
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        if skipped is not None:
            skipped += [Path(place, name) for name in folders if skip(name)]
        folders[:] = [name for name in folders if not skip(name)]
        above = real_folders(Path(os.path.abspath(place)))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in above]
        files += [Path(place, name) for name in names]
    return sorted(files)


@functools.cache
def real_folders(folder):
    """The real paths of a folder and of those that its path leads through."""
    above = real_folders(folder.parent) if folder.parent != folder else ()
    return (*above, os.path.realpath(folder))


def is_circle(folder):
    """Whether the path of a folder leads through one folder twice, by a symbolic link to one above."""
    folders = real_folders(Path(os.path.abspath(folder)))
    return len(set(folders)) < len(folders)


def identity(path):
    """What two ways to write one path have in common: "a.jpg" and "./a.jpg", but not a file and a link to it."""
    path = Path(path)
    if ".." in path.parts:  # which leads elsewhere behind a symbolic link
        start = len(path.parts) - path.parts[::-1].index("..")
        path = Path(os.path.realpath(Path(*path.parts[:start])), *path.parts[start:])
    return os.path.normcase(os.path.abspath(path))


class SideFiles:
    """Writes files that can be made again: one that fails ends nothing, whatever the reason, and is named once.

    Args:
        remark: what becomes of such a file, for the warning; None: no warning.

    Attributes:
        failed: {path: why it was not written at the last attempt}.
    """

    def __init__(self, remark):
        self.remark = remark
        self.failed = {}
        self.named = set()

    def write(self, path, function, *arguments):
        """Call `function(*arguments)`, which writes `path`; returns whether it did."""
        try:
            function(*arguments)
        except Exception as error:  # of the file system, or of what draws a plot: many kinds
            self.failed[path] = message = describe_failure(path, error)
            if path not in self.named and self.remark is not None:
                self.named.add(path)
                print(f"warning: {message}; {self.remark}")
            return False
        self.failed.pop(path, None)
        return True


def describe_failure(path, error):
    """Why a file could not be written, in one line that names it."""
    if isinstance(error, UserError):
        return str(error)
    reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
    return f"cannot write {path} ({f'{type(error).__name__}: {reason}' if reason else type(error).__name__})"
