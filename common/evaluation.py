"""Pictures whose classes are known, and a network's answers on them: what the tools measure with."""

import random
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.dataset import open_image_folder
from common.options import UserError
from common.sounds import file_kind


def choose_pictures(folder, classes, count, seed=0, sound=None):
    """Choose pictures of folder/<class>/, as many of each class as there are, in an order that mixes the classes.

    Args:
        folder: such as data/val.
        classes: names in the network's order.
        count: pictures in all; 0: every one.
        seed: any integer.
        sound: None for pictures; for recordings see common/sounds.py.

    Returns:
        (paths, labels), two lists.

    Raises:
        UserError: if the folder holds other classes.
    """
    pictures = open_image_folder(folder, sound=sound)
    if pictures.classes != list(classes):
        different = sorted(set(pictures.classes) ^ set(classes))
        raise UserError(
            f"{folder} and the checkpoint must have the same classes, but only one of them has {', '.join(different)}; "
            "run train.py on these pictures, or give another folder"
        )
    by_class = [[] for _ in classes]
    for path, label in random.Random(seed).sample(pictures.samples, len(pictures)):
        by_class[label].append((len(by_class[label]), label, Path(path)))
    chosen = sorted(sum(by_class, []))[: count or None]  # the first of each class, then the second of each, ...
    return [path for _, _, path in chosen], [label for _, label, _ in chosen]


def read_batches(paths, transform, batch_size, description, sound=None):
    """Read pictures, or recordings, with a progress bar: yields tensors (up to `batch_size`, 3, H, W)."""
    load = file_kind(sound).load
    with tqdm(total=len(paths), desc=description, unit="img", leave=False) as bar:
        for start in range(0, len(paths), batch_size):
            batch = [transform(load(path)) for path in paths[start : start + batch_size]]
            yield torch.stack(batch)
            bar.update(len(batch))


@torch.inference_mode()
def compute_logits(network, paths, transform, batch_size=32, description="pictures", sound=None):
    """A network's logits on pictures.

    Args:
        network: function on images (N, 3, H, W).
        paths: the files.
        transform: function on PIL RGB pictures.
        sound: None for pictures; for recordings see common/sounds.py.

    Returns:
        float32 array (pictures, classes).
    """
    batches = read_batches(paths, transform, batch_size, description, sound)
    return np.concatenate([network(images).float().cpu().numpy() for images in batches])


def accuracy(logits, labels):
    """Share of the pictures whose largest logit is the right one, in percent."""
    return 100 * float((logits.argmax(1) == np.asarray(labels)).mean())
