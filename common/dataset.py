"""Pictures as PyTorch data sets, and what is done to a picture before the network sees it."""

import hashlib
import random
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from common.images import ImageError, is_hidden, scan_class_folders
from common.options import UserError
from common.sounds import file_kind, is_sound


class PictureFolder(ImageFolder):
    """torchvision's `ImageFolder` that reads by `load_image` or `load_sound`, and passes over hidden files and folders.

    Args:
        root: folder that holds <class>/<picture>.
        transform: function on PIL RGB pictures.
        sound: None for pictures; for recordings see common/sounds.py.

    Attributes:
        cache: a `Cache` of the pictures, resized as the transform's first step does; None reads the files.
    """

    def __init__(self, root, transform=None, sound=None):
        kind = file_kind(sound)
        super().__init__(root, transform, loader=kind.load, is_valid_file=kind.fits)
        self.cache = None

    def __getitem__(self, index):
        picture = None if self.cache is None else self.cache.get(index)
        if picture is None:
            return super().__getitem__(index)
        return self.transform(picture), self.targets[index]

    def find_classes(self, directory):
        classes = sorted(entry.name for entry in Path(directory).iterdir() if entry.is_dir() and not is_hidden(entry))
        return classes, {name: index for index, name in enumerate(classes)}


def open_image_folder(root, transform=None, sound=None):
    """Open `root/<class>/` as a `PictureFolder`.

    Raises:
        UserError: if there is no class folder, or one holds no picture (or recording, with `sound`).
    """
    classes, _ = scan_class_folders(root)
    kind = file_kind(sound)
    for name, files in classes.items():
        if not any(map(kind.fits, files)):
            if sound is None and any(map(is_sound, files)):  # makedata.py notes how they are to be read
                raise UserError(f"{Path(root) / name} holds recordings, but no manifest says so; run makedata.py first")
            raise UserError(f"{Path(root) / name} holds no {kind.name}; put some there, or remove the folder")
    return PictureFolder(root, transform, sound)


def height_and_width(img_size):
    """(height, width) in pixels of what a checkpoint calls img_size: one number for a square, or both."""
    return (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)


def eval_transform(img_size, mean, std):
    """What is done to a picture for validation and prediction: PIL RGB -> float tensor (3, height, width).

    Args:
        img_size: edge in pixels, or (height, width); the picture is squeezed to that, as in training.
        mean, std: three values each, for pixels from 0 to 1.
    """
    return transforms.Compose(
        [transforms.Resize(height_and_width(img_size)), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )


def seed_everything(*key):
    """Seed random, NumPy and PyTorch (every device) with a number made of `key`, such as (seed, epoch, index)."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class SeededPictures(Dataset):
    """Training pictures whose augmentation depends on (seed, epoch, index) only, not on workers or on what came before.

    Args:
        pictures: a `PictureFolder` with random transforms.
        seed: any integer.
    """

    def __init__(self, pictures, seed):
        self.pictures = pictures
        self.seed = seed

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, key):
        epoch, index = key
        seed_everything(self.seed, epoch, index)
        return self.pictures[index]


class EpochBatches(Sampler):
    """Batches of (epoch, index) in an order that depends on (seed, epoch) only.

    Of N processes, process `rank` takes every N-th batch, so that no picture is seen twice and all take as many. What
    does not fill a batch for each process is dropped; in each epoch that is other pictures.

    Args:
        length: number of pictures.
        batch_size: pictures in a batch.
        seed: any integer.
        rank, ranks: number of this process, from 0, and how many there are.

    Attributes:
        epoch: set it before each pass.
        start: this process's batches to leave out at the beginning, for an epoch that was interrupted.
    """

    def __init__(self, length, batch_size, seed, rank=0, ranks=1):
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.ranks = ranks
        self.epoch = 0
        self.start = 0

    def __len__(self):
        return self.length // (self.batch_size * self.ranks)

    def __iter__(self):
        order = list(range(self.length))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        for number in range(self.start, len(self)):
            first = (number * self.ranks + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]


class PictureFiles(Dataset):
    """Files for prediction: (tensor, "") each, or (None, reason) for one that cannot be read.

    Args:
        paths: the files.
        transform: function on PIL RGB pictures.
        sound: None for pictures; for recordings see common/sounds.py.
    """

    def __init__(self, paths, transform, sound=None):
        self.paths = paths
        self.transform = transform
        self.load = file_kind(sound).load

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return self.transform(self.load(self.paths[index])), ""
        except ImageError as error:
            return None, str(error)
