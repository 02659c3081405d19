"""A cache of decoded and resized images in data/cache, so that they are decoded once and not in every epoch.

Resizing is the first step of training and validation, and nothing before it is random: what follows gets the same
pixels in every epoch, and decoding a large PNG takes longer than anything that comes after it.

data/cache/<size>-<hash>.npy contains one set of images, a uint8 array (images, height, width, 3) in the set's order;
<size> is the side of a square or else <height>x<width>. The hash covers the files' contents, so that a changed image
gives another file, and the file is written beside and renamed, so that it is complete once it is there. Which image has
which content is known from common/contents.py, so that a run does not read all images just to find that they are the
same.
"""

import hashlib
import os
import shutil

import numpy as np
import PIL
import torch
from filelock import FileLock
from PIL import Image
from torch.utils.data import Dataset

from common.contents import hash_contents
from common.dataset import height_and_width
from common.decoding import READER
from common.fit import fit_to
from common.images import load_image
from common.loading import Loader
from common.manifest import CACHE, CACHE_FILES
from common.progress import Progress
from common.workers import WAIT_MINUTES

# common/manifest.py's CACHE_FILES lists these names, too: makedata.py must know which files are not the user's.
LOCK = "lock"
WORTH_PROCESSES = 256  # images; for fewer, starting processes costs more than it saves


def cache_images(folder, gigabytes, *sets, fit="squeeze", workers=None, wait_minutes=WAIT_MINUTES):
    """Let later epochs read resized pixels instead of decoding the files again, as far as limit and disk allow.

    Args:
        folder: data/cache.
        gigabytes: size of the folder; 0: no cache.
        sets: pairs of a `CachedImageFolder`, whose `cache` is set, and its (height, width) in pixels.
        fit: how images of another shape are resized, see `common.fit`.
        workers: processes that decode images; None: one for each core, up to 8, but none for few images.
        wait_minutes: without an image after which to give up; 0: never.

    Returns:
        One line of text that says what is cached.

    Raises:
        ImageError: if an image cannot be read.
        UserError: if images cannot be read for other reasons, see `common.loading.Loader`.
    """
    if not gigabytes:
        return "cache       off; images are decoded in each epoch"
    in_use, cached = [], 0
    for dataset, size in sets:
        dataset.cache, result = open_cache(
            dataset.files, size, folder, gigabytes * 1e9, in_use, dataset.value_range, workers, wait_minutes, fit
        )
        if dataset.cache is None:
            return f"cache       {cached} images; the others are decoded in each epoch ({result})"
        cached += dataset.cache.count
        in_use.append(result)
    size = sum(path.stat().st_size for path in in_use) / 1e9
    return f"cache       {cached} of {sum(len(dataset) for dataset, _ in sets)} images in {folder}, {size:.2f} GB"


class Cache:
    """The first images of a set, decoded and resized.

    Args:
        path: .npy file, uint8 (images, height, width, 3).
        count: number of its images.
    """

    def __init__(self, path, count):
        self.path = path
        self.count = count
        self.rows = None  # mapped at the first use, in each process

    def __getstate__(self):
        return self.__dict__ | dict(rows=None)  # a started worker maps the file itself instead of getting a copy

    def get(self, index):
        """Image `index` as PIL RGB, or None if it is not cached."""
        row = self.read(index)
        return None if row is None else Image.fromarray(row)

    def get_pixels(self, index):
        """Image `index` as uint8 tensor (3, height, width), or None if it is not cached."""
        row = self.read(index)
        return None if row is None else torch.from_numpy(row).permute(2, 0, 1)

    def read(self, index):
        """Image `index` as uint8 array (height, width, 3), or None if it is not cached."""
        if index >= self.count:
            return None
        if self.rows is None:
            try:
                self.rows = np.load(self.path, mmap_mode="r")
            except OSError:  # removed since, to make room or by hand
                self.count = 0
                return None
        return np.array(self.rows[index])


def open_cache(
    paths, img_size, folder, limit, in_use=(), value_range=None, workers=None, wait_minutes=WAIT_MINUTES, fit="squeeze"
):
    """Find the file that contains these images, decoded and resized, or write it.

    Args:
        paths: the files, in order.
        img_size: side in pixels, or (height, width).
        folder: data/cache.
        limit: size of the folder in bytes. Of a larger set the first images are cached.
        in_use: files of other sets, which stay.
        value_range: see `load_image`.
        workers, wait_minutes, fit: see `cache_images`.

    Returns:
        (`Cache`, its file), or (None, the reason why there is none).

    Raises:
        ImageError: if an image cannot be read.
    """
    height, width = height_and_width(img_size)
    image_bytes = 3 * height * width
    try:
        room = max(0, int(limit) - sum(file.stat().st_size for file in in_use)) // image_bytes
        if not room:
            return None, "CACHE_GB is full"
        paths = paths if room >= len(paths) else paths[:room]
        folder.mkdir(parents=True, exist_ok=True)
        contents = hash_contents(paths, folder, wait_minutes=wait_minutes)
        # Another version of Pillow, or of our reader, may decode or resize differently.
        key = hashlib.sha256(f"{PIL.__version__}, reader {READER}, values {value_range}".encode())
        key.update(b"" if fit == "squeeze" else f", {fit}".encode())
        for content in contents:
            key.update(b"\n" + content.encode())
        key = key.hexdigest()[:16]
        path = folder / f"{height if height == width else f'{height}x{width}'}-{key}.npy"
        size = 128 + len(paths) * image_bytes  # 128: the header

        def is_complete():
            return path.is_file() and path.stat().st_size == size

        if not is_complete():
            with FileLock(folder / LOCK):  # a second run waits here, and then finds the file
                if not is_complete():
                    for left_over in folder.glob("*.npy.part"):  # of a run that was killed
                        left_over.unlink()
                    make_room(folder, size, limit, in_use)
                    free = shutil.disk_usage(folder).free
                    if size > free / 2:  # the checkpoints need room, too
                        return None, f"it needs {size / 1e9:.1f} GB, and only {free / 1e9:.1f} are free"
                    images = ResizedImages(paths, (height, width), value_range, fit)
                    write_rows(images, path, workers, wait_minutes)
                    now = hash_contents(paths, folder, wait_minutes=wait_minutes)
                    if not np.array_equal(now.digests, contents.digests):
                        path.unlink()
                        return None, "images were changed while they were read"
        if os.access(path, os.W_OK):
            os.utime(path)  # used now
    except (OSError, NotImplementedError) as error:  # read-only or full; some network drives know no locks
        return None, str(error) or type(error).__name__
    return Cache(path, len(paths)), path


def make_room(folder, size, limit, in_use):
    """Remove the least recently used sets, except those `in_use`, until `size` more bytes fit into `limit`."""
    files = sorted(folder.glob("*.npy"), key=lambda file: file.stat().st_mtime)
    total = sum(file.stat().st_size for file in files) + size
    for file in files:
        if total <= limit:
            return
        if file not in in_use and CACHE_FILES.fullmatch(f"{CACHE}/{file.name}"):
            total -= file.stat().st_size
            file.unlink()


def write_rows(images, path, workers=None, wait_minutes=WAIT_MINUTES):
    """Read all of a `ResizedImages` in parallel into the .npy file `path`, which exists only once it is complete."""
    part = path.with_name(f"{path.name}.part")
    if workers is None:
        workers = 0 if len(images) < WORTH_PROCESSES else min(os.cpu_count() or 1, 8)
    loader = Loader(
        images, 16, num_workers=workers, collate_fn=list, wait_minutes=wait_minutes, what="images for the cache"
    )
    header = dict(descr="|u1", fortran_order=False, shape=(len(images), *images.size, 3))
    try:
        # Written, not mapped: where the disk is full, writing to a map kills the process.
        with open(part, "wb") as file, Progress(total=len(images), desc="caching", unit="img", leave=False) as bar:
            np.lib.format.write_array_header_1_0(file, header)
            for rows in loader:
                for row in rows:
                    file.write(row.tobytes())
                bar.update(len(rows))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class ResizedImages(Dataset):
    """Each file as uint8 array (height, width, 3), resized as for the network.

    Args:
        paths: the files.
        size: (height, width) in pixels.
        value_range: see `load_image`.
        fit: see `cache_images`.
    """

    def __init__(self, paths, size, value_range=None, fit="squeeze"):
        self.paths = paths
        self.size = size
        self.value_range = value_range
        self.resize = fit_to(size, fit)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return np.asarray(self.resize(load_image(self.paths[index], self.value_range)))
