"""Labelled images, and a network's predictions on them: what the tools measure with."""

import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from common.dataset import open_image_folder
from common.images import load_image
from common.options import UserError
from common.progress import Progress

MAX_COLUMNS = 1000  # classes up to which a table of confusions has a column for each


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
    index = match_classes(dataset.classes, classes)
    if not len(dataset.classes) == len(classes) == len(set(index.values())):
        different = sorted(set(dataset.classes) ^ set(classes))
        raise UserError(
            f"{folder} and the checkpoint must have the same classes, but only one of them has {', '.join(different)}; "
            "run train.py on these images, or give another folder"
        )
    order = np.array(random.Random(seed).sample(range(len(dataset)), len(dataset)))
    labels = np.array([index[name] for name in dataset.classes])[dataset.targets[order]]
    place = np.empty(len(order), int)  # of each image among those of its class
    for label in range(len(classes)):
        place[labels == label] = np.arange(np.count_nonzero(labels == label))
    chosen = np.lexsort((labels, place))[: count or None]  # the first of each class, then the second of each, ...
    return [Path(dataset.files[index]) for index in order[chosen]], labels[chosen].tolist()


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
    with Progress(total=len(paths), desc=description, unit="img", leave=False) as bar:
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


def accuracy_interval(correct, count):
    """Wilson's 95 % confidence interval of an accuracy, which holds for independent images: two numbers in percent.

    Args:
        correct: number of correct predictions.
        count: number of images, at least one.
    """
    from scipy.stats import binomtest  # takes a second to import

    interval = binomtest(int(correct), int(count)).proportion_ci(0.95, method="wilson")
    return 100 * interval.low, 100 * interval.high


def coverage_curve(probabilities, labels):
    """Accuracy of the most confident images, as fractions: (coverage (N,), accuracy (N,)), from one image to all.

    Of images of the same confidence, such as 1.0, none comes first: each counts as their mean.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    _, place = np.unique(-probabilities.max(1), return_inverse=True)
    correct = np.bincount(place, probabilities.argmax(1) == labels) / np.bincount(place)
    number = np.arange(1, len(labels) + 1)
    return number / len(labels), np.cumsum(correct[np.sort(place)]) / number


def match_classes(names, classes):
    """Which class the name of a folder means: the one that is equal, or else equal but for its Unicode form and case.

    macOS decomposes accents, and neither macOS nor Windows distinguishes case. Where several classes come into
    question, none is meant.

    Args:
        names: of folders.
        classes: names in the network's order.

    Returns:
        {name: index of its class}, of those that mean one.
    """
    indices = {}
    for simplify in (str, normal_form, lambda name: normal_form(name).casefold()):
        simple = [simplify(name) for name in classes]
        times, places = Counter(simple), {name: index for index, name in enumerate(simple)}
        for name in names:
            if name not in indices and times[simplify(name)] == 1:
                indices[name] = places[simplify(name)]
    return indices


def normal_form(name):
    return unicodedata.normalize("NFC", name)


def report_classes(labels, predictions, classes):
    """Precision, recall and F1 of the classes that occur among the labels, and their averages.

    A class of which there is no image has no recall, so it takes no part in the averages. Where it is predicted, the
    recall of the true class is the lower, and so is the accuracy.

    Args:
        labels, predictions: int arrays (images,), at least one image.
        classes: class names.

    Returns:
        The text of scikit-learn's `classification_report`, and below it how many classes occur.
    """
    from sklearn.metrics import classification_report  # takes two seconds to import

    present = np.unique(labels)
    names = [classes[number] for number in present]
    text = classification_report(labels, predictions, labels=present, target_names=names, digits=4, zero_division=0)
    absent, counts = np.unique(predictions[~np.isin(predictions, present)], return_counts=True)
    if len(absent):  # scikit-learn then has other averages in place of the accuracy
        rate, width = (predictions == labels).mean(), max(map(len, [*names, "weighted avg"]))
        row = f"\n{'accuracy':>{width}} {'':20} {rate:9.4f} {len(labels):9}"
        text = re.sub(r"\n *micro avg .*(?=\n *macro avg)", row, text)
    if len(present) < len(classes):
        text += f"\n{len(present)} of {len(classes)} classes occur among the images; the averages are over them\n"
    if len(absent):
        wrong = ", ".join(f"{classes[number]} ({count})" for number, count in zip(absent, counts))
        text += f"predicted, though there is no image of it: {wrong}\n"
    return text


def tabulate_confusions(labels, predictions, classes):
    """The confusion matrix as rows of a table.

    Args:
        labels, predictions: int arrays (images,).
        classes: class names.

    Returns:
        A row and a column for each class, with names; beyond `MAX_COLUMNS` classes, for which that would be gigabytes,
        a row for each pair of a true and a predicted class that occurs, the most frequent first.
    """
    from sklearn.metrics import confusion_matrix  # takes two seconds to import

    if len(classes) <= MAX_COLUMNS:
        matrix = confusion_matrix(labels, predictions, labels=range(len(classes)))
        return [["true class \\ predicted class", *classes], *([name, *row] for name, row in zip(classes, matrix))]
    pairs, counts = np.unique(np.stack([labels, predictions]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rows = zip(pairs.T[order], counts[order])
    rows = [[classes[true], classes[predicted], count] for (true, predicted), count in rows]
    return [["true class", "predicted class", "images"], *rows]
