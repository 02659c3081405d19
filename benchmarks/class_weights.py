"""train.py with class weights in the loss in place of logit adjustment, for benchmarks/accuracy.py to compare the two.

    python benchmarks/class_weights.py                  with the constants of train.py, and all of its options

Each image weighs 1 / (number of training images of its class), scaled so that the mean weight of an image is 1: what
scikit-learn calls "balanced".
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT))  # common/, train.py
from common.options import answer_early

answer_early(__name__, str(ROOT / "train.py"))  # --help and wrong options, before imports that take seconds

import torch
import torch.nn.functional as F

import train
from common.options import ConstantError, run


def create_criterion(labels, num_classes, balance, device):
    """Cross entropy of logits (N, classes) and targets (N, classes) with class weights, averaged over N.

    Args:
        labels: class of each training image.
        balance: must be 0.
    """
    if balance:
        raise ConstantError("BALANCE is logit adjustment, which class weights replace here; leave it at 0")
    weights = len(labels) / (num_classes * torch.bincount(torch.tensor(labels), minlength=num_classes)).to(device)

    def criterion(logits, targets):
        # The weight of a class in each term of a mixed or smoothed target; F.cross_entropy divides by N.
        return F.cross_entropy(logits, targets, weight=weights.to(logits.dtype))

    return criterion


if __name__ == "__main__":
    train.create_criterion = create_criterion
    run(train.main)
