"""The content of each file as a hash, and a memory of these hashes, so that a file is read again only if it may differ.

data/cache/contents.npz is the memory, one row for each file, which `numpy.load` opens. A row holds while the
file's size, times of change, and inode are those recorded; else the file is hashed again. The size and the time of
modification alone would not do: another image of equal size may be given the same time, by an archive, `rsync --times`
or `cp -p`. Nobody sets the time of the last change of a file's status (ctime), and another file has another inode.
Windows has the time of creation in its place.
"""

import contextlib
import hashlib
import os
import stat
import time
from itertools import islice

import numpy as np

from common.columns import Hashes, digest_texts, find
from common.progress import Progress
from common.workers import WAIT_MINUTES, map_in_threads

CONTENTS = "contents.npz"
STAMP = np.dtype([("size", "<i8"), ("mtime", "<i8"), ("ctime", "<i8"), ("inode", "<u8")])  # times in ns
ROW = np.dtype([("path", "S16"), ("stamp", STAMP), ("sha256", "S32")])
BLOCK = 512  # files that a thread looks at at once
# A file that changes twice within one tick of the file system's clock has the same times after both changes.
TICK = 50_000_000  # ns, more than the tick of any current system
COARSE_TICK = 2_500_000_000  # ns, likewise for those with whole seconds, such as FAT


def hash_file(path):
    """SHA-256 of a file, as hex; read in blocks, since a recording may be larger than the memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_contents(paths, folder=None, *, missing_ok=False, wait_minutes=WAIT_MINUTES):
    """SHA-256 of each file; only files that are new or may have changed are read.

    Args:
        paths: the files, a sequence of str.
        folder: that of the memory, such as data/cache, which is made and updated if possible; None: no memory.
        missing_ok: whether what cannot be read, or is not a file, is to have the hash "".
        wait_minutes: without a file read after which to give up; 0: never.

    Returns:
        `Hashes`, a sequence of hex digits.

    Raises:
        OSError: if a file cannot be read.
    """
    known, stamps = recall(paths, folder)
    digests = known.digests
    missing = np.flatnonzero(~digests.any(1))
    if not len(missing):
        return known
    await_tick(stamps[missing])
    started = time.time_ns()

    def hash_block(indices):
        for index in indices:
            try:
                digests[index], stamps[index] = hash_settled(paths[index], stamps[index])
            except OSError:
                if not missing_ok:
                    raise
        return len(indices)

    blocks = np.array_split(missing, -(-len(missing) // 16))
    with Progress(total=len(missing), desc="hashing", unit="file", leave=False) as bar:
        for count in map_in_threads(hash_block, blocks, "files to hash", wait_minutes):
            bar.update(count)
    settled = missing[is_settled(stamps[missing], started) & digests[missing].any(1)]
    if folder is not None and len(settled):
        remember([paths[index] for index in settled], stamps[settled], Hashes(digests[settled]), folder)
    return known


def recall(paths, folder):
    """What the memory in `folder` knows of the files.

    Returns:
        (`Hashes`, unknown where the file is new or may have changed; array (files,) of `STAMP`).
    """
    stamps = read_stamps(paths)
    digests = np.zeros((len(paths), 32), np.uint8)
    memory = load_memory(folder) if folder is not None else []
    if len(memory):
        rows = find(digest_texts(paths), memory["path"])
        same = (rows >= 0) & (memory["stamp"][rows] == stamps) & (stamps["size"] >= 0)
        digests[same] = memory["sha256"][rows[same]].view(np.uint8).reshape(-1, 32)
    return Hashes(digests), stamps


def remember(paths, stamps, hashes, folder):
    """Add files to the memory in `folder`, or replace what it knows of them; what cannot be written is forgotten.

    Args:
        paths: sequence of str.
        stamps: array (files,) of `STAMP`, taken before the files were read, and equal afterwards.
        hashes: `Hashes` of the files.
        folder: such as data/cache.
    """
    new = np.empty(len(paths), ROW)
    new["path"], new["stamp"], new["sha256"] = digest_texts(paths), stamps, hashes.keys()
    old = load_memory(folder)
    both = np.concatenate([old[find(old["path"], new["path"]) < 0], new])
    path = os.path.join(folder, CONTENTS)
    part = f"{path}.{os.getpid()}"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(part, "wb") as file:
            np.savez(file, files=both)
        os.replace(part, path)
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(folder, "contents.json"))  # of an earlier version, without ctime and inode
    except OSError:  # read-only or full: the next run hashes again
        with contextlib.suppress(OSError):
            os.unlink(part)


def load_memory(folder):
    """The memory in `folder`: array (files,) of `ROW`; empty if there is none, or a damaged one: it only saves time."""
    try:
        with np.load(os.path.join(folder, CONTENTS), allow_pickle=False) as file:
            memory = file["files"]
        if memory.dtype == ROW and memory.ndim == 1:
            return memory
    except Exception:  # noqa: S110  zip archives and arrays that are damaged raise many kinds
        pass
    return np.empty(0, ROW)


def read_stamps(paths):
    """Size, times and inode of each file: array (files,) of `STAMP`; size -1 for what is not there or not a file."""
    if len(paths) <= BLOCK:
        return read_block(paths)
    rest = iter(paths)
    blocks = iter(lambda: list(islice(rest, BLOCK)), [])
    # Threads, since a network drive takes a while to answer.
    return np.concatenate(list(map_in_threads(read_block, blocks, "sizes and times of files")))


def read_block(paths):
    return np.array([read_stamp(path) for path in paths], STAMP)


def read_stamp(path):
    """Size, time of modification, time of change and inode of one file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, 0, 0, 0
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device would never end
        return -1, 0, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino % 2**64


def hash_settled(path, stamp):
    """Hash a file that nobody changes meanwhile: (uint8 array (32,), its stamp before and after).

    Raises:
        OSError: if it cannot be read.
    """
    before = stamp.item()
    for _ in range(3):
        if before[0] < 0:
            os.stat(path)  # raises the error that says why
            raise OSError(f"{path} is not a regular file")
        content = np.frombuffer(bytes.fromhex(hash_file(path)), np.uint8)
        after = read_stamp(path)
        if after == before:
            break
        before = after
    return content, after


def newest_change(stamps):
    """When each file was last changed, in ns."""
    return stamps["ctime"] if os.name == "posix" else stamps["mtime"]


def await_tick(stamps):
    """Wait until what changes from now on gets another time than these files have: up to `TICK`."""
    changed = newest_change(stamps)
    wait = changed[changed <= time.time_ns()].max(initial=0) + TICK - time.time_ns()
    if wait > 0:
        time.sleep(wait / 1e9)


def is_settled(stamps, started):
    """Whether the stamps change if the files change again after the time `started`, when they were not read yet."""
    changed = newest_change(stamps)
    tick = np.where(changed % 10**9 == 0, COARSE_TICK, TICK)
    return (stamps["size"] >= 0) & (changed + tick <= started)
