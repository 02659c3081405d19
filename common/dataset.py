"""Images as PyTorch data sets, and the transform of validation and prediction."""

import hashlib
import random
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from common.audio import is_sound
from common.fit import fit_to
from common.images import ImageError, is_image, load_image, scan_class_folders
from common.manifest import read_value_range
from common.options import UserError, raise_all


class CachedImageFolder(Dataset):
    """The images of root/<class>/, like torchvision's `ImageFolder`, but a million of them fit into 40 MB.

    Args:
        root: folder that contains <class>/<image>.
        transform: function of a PIL RGB image, such as a `PixelTransform`; None returns the image as it is.
        value_range: see `load_image`.

    Attributes:
        root: as str.
        classes, class_to_idx: sorted class names, and {name: number}.
        files: `common.columns.Files`, the paths of the images, sorted by class and name.
        targets: int32 array (images,): the class of each.
        cache: a `common.cache.Cache` of the images, resized as by the transform's first step; None reads the files.
        passed: a line about the files that are passed over; "" if there are none.

    Raises:
        UserError: if there is no class folder, or one contains no image.
    """

    def __init__(self, root, transform=None, value_range=None):
        folders = scan_class_folders(root)
        self.files = folders.choose(is_image)
        self.root = self.files.root
        self.classes = self.files.classes
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self.targets = self.files.labels
        self.transform = transform
        self.loader = partial(load_image, value_range=value_range)
        self.value_range = value_range
        self.cache = None
        self.passed = folders.describe_passed(is_image)
        problems = []
        for label in np.flatnonzero(np.bincount(self.targets, minlength=len(self.classes)) == 0):
            name = self.classes[label]
            if any(map(is_sound, folders[name])):  # an earlier version's data/, or the user's own folders
                raise UserError(
                    f"{Path(root) / name} contains recordings; run makedata.py, which writes their spectrograms"
                )
            problems.append(f"{Path(root) / name} contains no image; put some there, or remove the folder")
        raise_all(problems)

    @property
    def samples(self):
        """The sequence of (path, class), which are made when they are asked for."""
        return Pairs(self.files, self.targets)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        image = None
        if self.cache is not None:
            get = self.cache.get_pixels if isinstance(self.transform, PixelTransform) else self.cache.get
            image = get(index)
        if image is None:
            image = self.loader(self.files[index])
        return image if self.transform is None else self.transform(image), int(self.targets[index])


class Pairs(Sequence):
    """Two sequences as one of pairs."""

    def __init__(self, first, second):
        self.first = first
        self.second = second

    def __len__(self):
        return len(self.first)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Pairs(self.first[index], self.second[index])
        return self.first[index], int(self.second[index])


def open_image_folder(root, transform=None):
    """Open `root/<class>/` as a `CachedImageFolder`, with the value range of the manifest beside `root`, and say which
    files are passed over.

    Raises:
        UserError: if there is no class folder, or one contains no image.
    """
    dataset = CachedImageFolder(root, transform, read_value_range(Path(root).parent))
    if dataset.passed:
        print(dataset.passed)
    return dataset


def height_and_width(img_size):
    """(height, width) in pixels of a checkpoint's img_size, which is an int for a square, or both."""
    return (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)


class PixelTransform(transforms.Compose):
    """Resizes, then applies other transforms in a row: PIL RGB -> uint8 tensor (3, height, width).

    Without others it is `eval_transform` but for the normalisation, which `common.device.Normalise` applies to whole
    batches. A cached image, which was resized before, may be given as its pixels, a uint8 tensor (3, height, width).

    Args:
        img_size: side in pixels, or (height, width).
        steps: functions of a uint8 tensor (3, height, width) -> likewise.
        fit: how images of another shape are resized; see `common.fit`.
    """

    def __init__(self, img_size, steps=(), fit="squeeze"):
        super().__init__(steps)
        self.resize = fit_to(height_and_width(img_size), fit)

    def __call__(self, image):
        return super().__call__(image if torch.is_tensor(image) else pil_to_tensor(self.resize(image)))


def eval_transform(img_size, mean, std, fit="squeeze"):
    """The transform of validation and prediction: PIL RGB -> float tensor (3, height, width).

    Args:
        img_size: side in pixels, or (height, width).
        mean, std: three values each, for pixels from 0 to 1.
        fit: how images of another shape are resized, as in training; see `common.fit`.
    """
    return transforms.Compose(
        [fit_to(height_and_width(img_size), fit), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )


def transform_of(checkpoint, img_size=None):
    """The `eval_transform` of the network in a checkpoint, or in what an ONNX file says about itself.

    Args:
        checkpoint: a dict with "img_size", "mean", "std" and, unless images are squeezed, "fit".
        img_size: another size than its own; None: its own.
    """
    size = checkpoint["img_size"] if img_size is None else img_size
    return eval_transform(size, checkpoint["mean"], checkpoint["std"], checkpoint.get("fit", "squeeze"))


CPU = torch.device("cpu")


def seed_everything(*key, device=None):
    """Seed random, NumPy and PyTorch with a hash of `key`, such as (seed, epoch, index).

    Args:
        device: the `torch.device` of random tensors; None: every device. Those on the CPU are always seeded.
    """
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    if device is not None and device.type == "cpu":
        # torch.manual_seed does the same, but first formats a stack trace for each kind of device that has not been
        # started, for the case that it will be: half of the time that a small image takes.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class SeededImages(Dataset):
    """Training images whose augmentation depends on (seed, epoch, index) only, not on workers or earlier images.

    Args:
        dataset: with random transforms, such as a `CachedImageFolder`.
        seed: any integer.
    """

    def __init__(self, dataset, seed):
        self.dataset = dataset
        self.seed = seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, index = key
        seed_everything(self.seed, epoch, index, device=CPU)
        return self.dataset[index]


class EpochBatches(Sampler):
    """Batches of (epoch, index) in an order that depends on (seed, epoch) only.

    Of N processes, process `rank` takes every N-th batch, so that no image is seen twice and all take equally many.
    What does not fill a batch of every process is dropped; these are other images in each epoch.

    Args:
        length: number of images.
        batch_size: images per batch.
        seed: any integer.
        rank: index of this process.
        world_size: number of processes.

    Attributes:
        epoch: set it before each pass.
        start: number of this process's batches to skip at the beginning, for an epoch that was interrupted.
    """

    def __init__(self, length, batch_size, seed, rank=0, world_size=1):
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

    def __len__(self):
        return self.length // (self.batch_size * self.world_size)

    def __iter__(self):
        order = array("q", range(self.length))  # shuffled as a list would be, in a quarter of its memory
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        for number in range(self.start, len(self)):
            first = (number * self.world_size + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]


class ImageFiles(Dataset):
    """Files for prediction: (what `transform` makes of one, ""), or (None, reason) if it cannot be read.

    Args:
        paths: the files.
        transform: function of a PIL RGB image.
        load: function of a path -> PIL RGB image; `ImageError` if it cannot be read.
    """

    def __init__(self, paths, transform, load=load_image):
        self.paths = paths
        self.transform = transform
        self.load = load

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return self.transform(self.load(self.paths[index])), ""
        except ImageError as error:
            return None, str(error)
