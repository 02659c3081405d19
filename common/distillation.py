"""Knowledge distillation: a network learns what other, better networks say of its training images.

TEACHER of train.py names these networks. They see each batch as the student does, augmented and mixed, though always
at full size, and their predictions are the targets, in place of labels, since they also say which other classes an
image resembles (Hinton et al., "Distilling the knowledge in a neural network", arXiv:1503.02531). That both see the
same crops and mixtures, and that labels are not used, is the recipe of Beyer et al., "Knowledge distillation: A good
teacher is patient and consistent", CVPR 2022, arXiv:2106.05237.
"""

import numpy as np
import torch
import torch.nn.functional as F

from common.checkpoint import build_network, find_checkpoints, load_checkpoint
from common.dataset import height_and_width
from common.device import choose_layout
from common.evaluation import match_classes
from common.options import UserError

UNKNOWN = "whether it was trained on validation images is not known; accuracies may flatter"


def check_teacher(text):
    """Read the checkpoints of TEACHER once, so that what cannot be used is refused before anything is written.

    Raises:
        UserError: if one is missing or cannot be read.
    """
    try:
        for path in find_checkpoints(text) if text else []:
            load_checkpoint(path)
    except UserError as error:
        raise UserError(f"TEACHER: {error}") from error


class Teacher:
    """Function of images (N, 3, H, W), normalised for the student -> targets (N, classes): probabilities, which are the
    mean of those of all networks.

    Each network gets the images in its own size and normalisation.

    Args:
        text: the checkpoints, see `common.checkpoint.find_checkpoints`.
        student: what its checkpoints hold of its classes and images, see `common.run_folder.describe_run`; the other
            networks may know more classes.
        device: a `torch.device`.
        amp: function that returns the autocast context.

    Raises:
        UserError: if a network cannot be used, lacks a class, or takes other images.
    """

    def __init__(self, text, student, device, amp):
        self.amp, self.members = amp, []
        for path in find_checkpoints(text):
            about = load_checkpoint(path)
            places = match_classes(student["classes"], about["classes"])
            missing = [name for name in student["classes"] if name not in places]
            if missing:
                raise UserError(f"{path} does not know {', '.join(missing)}; set TEACHER to a network of all classes")
            for name, what in (("sound", "kind of spectrograms"), ("fit", "FIT"), ("value_range", "VALUE_RANGE")):
                if about.get(name) != student.get(name):
                    raise UserError(f"{path} was trained with another {what} than this run; choose another TEACHER")
            network = build_network(about).to(device, memory_format=choose_layout(device)).requires_grad_(False)
            # From the student's normalisation to that of this network.
            means, stds = (torch.tensor([student[key], about[key]], device=device) for key in ("mean", "std"))
            scale, shift = stds[0] / stds[1], (means[0] - means[1]) / stds[1]
            size, columns = height_and_width(about["img_size"]), [places[name] for name in student["classes"]]
            self.members.append((network, scale[:, None, None], shift[:, None, None], size, columns))
            seen = describe_seen(about["data"], student["data"]) if "data" in about else UNKNOWN
            print(f"teacher     {path}: {about['arch']}, {size[0]}x{size[1]}; {seen}")
        print("            targets are predictions instead of labels, so SMOOTHING has no effect")

    @torch.no_grad()
    def __call__(self, images):
        total = 0.0
        for network, scale, shift, size, columns in self.members:
            own = images * scale + shift
            if own.shape[2:] != size:
                own = F.interpolate(own, size=size, mode="bilinear", antialias=True)
            with self.amp():
                logits = network(own.contiguous(memory_format=choose_layout(images.device)))
            total = total + logits[:, columns].float().softmax(1)
        return total / len(self.members)


def describe_seen(data, own_data):
    """How many of the student's validation images a network was trained on, in words; of these the student learns.

    Args:
        data, own_data: see `common.fingerprints.fingerprint_images`.
    """
    theirs, own = data["train"], own_data["val"]
    if theirs["files"] is None or own["files"] is None or not (theirs["hashed"] and own["hashed"]):
        return UNKNOWN
    seen = int(np.isin(own["files"][:, 1], theirs["files"][:, 1]).sum())
    if seen:
        return f"warning: it was trained on {seen} of {own['images']} validation images, so that accuracies flatter"
    return "it was trained on none of the validation images"
