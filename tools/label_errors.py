"""Probable label errors: images whose label and whose out-of-fold prediction disagree more than chance explains.

Confident learning (Northcutt, Jiang and Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR
70, 2021, arXiv:1911.00068): an image counts as a confident example of a class if the class's probability is at least
the mean that the images with this label reach. An image that is labelled i, but a confident example of j and not of i
as much, is a probable error. The predictions must come from networks that were not trained on the image.
"""

import numpy as np


def find_label_errors(labels, probabilities):
    """Which labels are probably wrong, the most suspicious first.

    The rule is that of the confident joint (section 3.1 of the paper); an image of which several classes are confident
    counts for the most probable of them. What the networks merely predict otherwise is listed, too. The order is that
    of the normalised margin, the probability of the label minus the highest one of another class.

    Args:
        labels: int array (images,).
        probabilities: float array (images, classes), out-of-fold.

    Returns:
        (int array of the indices of suspicious images, bool array (images,): whether the rule applies, int array
        (images,) of the class suggested for each image, float array (images,) of the margins).
    """
    labels, number = np.asarray(labels), np.arange(len(labels))
    given, classes = probabilities[number, labels], probabilities.shape[1]
    sums, counts = np.bincount(labels, given, classes), np.bincount(labels, minlength=classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)  # (classes,)
    confident = np.where(probabilities >= thresholds - 1e-6, probabilities, -1.0)
    counted = np.where(confident.max(1) >= 0, confident.argmax(1), labels)
    others = probabilities.copy()
    others[number, labels] = -1.0
    margins = given - others.max(1)
    wrong = counted != labels
    order = np.argsort(margins, kind="stable")
    return order[wrong[order] | (margins[order] < 0)], wrong, np.where(wrong, counted, others.argmax(1)), margins
