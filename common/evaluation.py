"""Labelled images, and a network's predictions on them: what the tools measure with."""

import random
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.dataset import open_image_folder
from common.images import load_image
from common.options import UserError


def choose_images(folder, classes, count, seed=0):
    """Choose images of folder/<class>/, equally many of each class as far as there are, with the classes interleaved.

    Args:
        folder: such as data/val.
        classes: names in the network's order.
        count: total number of images; 0: all of them. A smaller number chooses the first of a larger one.
        seed: any integer.

    Returns:
        (paths, labels), two lists.

    Raises:
        UserError: if the folder holds other classes.
    """
    dataset = open_image_folder(folder)
    if dataset.classes != list(classes):
        different = sorted(set(dataset.classes) ^ set(classes))
        raise UserError(
            f"{folder} and the checkpoint must have the same classes, but only one of them has {', '.join(different)}; "
            "run train.py on these images, or give another folder"
        )
    by_class = [[] for _ in classes]
    for path, label in random.Random(seed).sample(dataset.samples, len(dataset)):
        by_class[label].append((len(by_class[label]), label, Path(path)))
    chosen = sorted(sum(by_class, []))[: count or None]  # the first of each class, then the second of each, ...
    return [path for _, _, path in chosen], [label for _, label, _ in chosen]


def read_batches(paths, transform, batch_size, description, load=load_image):
    """Read files batch by batch, with a progress bar.

    Args:
        paths: the files.
        transform: function on PIL RGB images.
        batch_size: images in a batch; the last one may be smaller.
        description: text beside the progress bar.
        load: function on a path that returns a PIL RGB image.

    Yields:
        Tensors (N, 3, H, W).
    """
    with tqdm(total=len(paths), desc=description, unit="img", leave=False) as bar:
        for start in range(0, len(paths), batch_size):
            batch = [transform(load(path)) for path in paths[start : start + batch_size]]
            yield torch.stack(batch)
            bar.update(len(batch))


@torch.inference_mode()
def compute_logits(network, paths, transform, batch_size=32, description="images", load=load_image):
    """Compute a network's logits on files; for the arguments see `read_batches`.

    Args:
        network: function on images (N, 3, H, W) that returns logits (N, classes).

    Returns:
        float32 array (images, classes).
    """
    batches = read_batches(paths, transform, batch_size, description, load)
    return np.concatenate([network(images).float().cpu().numpy() for images in batches])


def accuracy(logits, labels):
    """Top-1 accuracy in percent."""
    return 100 * float((logits.argmax(1) == np.asarray(labels)).mean())
