"""Checkpoints: plain types and tensors, written so that a stopped write harms nothing, read without running code."""

import os
import pickle
import re
import warnings
from pathlib import Path

import timm
import torch

import models  # noqa: F401  registers the UniRepLKNet variants with timm
from common.options import UserError

# What test.py and the tools need of a checkpoint; train.py adds what it needs to continue.
REQUIRED = ("arch", "model_args", "state_dict", "classes", "mean", "std", "img_size")


def save_checkpoint(checkpoint, path):
    """Write `checkpoint` to `path` in one step: a reader, or a stopped run, finds the old file or the new one."""
    partial = Path(f"{path}.part")
    with open(partial, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_file(path):
    """Read any file that `torch.save` wrote, without running code that may be in it.

    Raises:
        UserError: if it does not exist, is damaged, or holds more than plain types and tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; give the path of a file that train.py saved")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's pickle protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        if isinstance(error, pickle.UnpicklingError):
            code = re.search(r"GLOBAL (\S+)", str(error))
            raise UserError(
                f"{path} is not loaded, since it holds more than plain types and tensors"
                f"{f', namely {code[1]},' if code else ''} and could run code; save its state_dict alone"
            ) from error
        reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
        raise UserError(f"{path} is damaged or no checkpoint ({reason}); use another one") from error


def load_checkpoint(path):
    """Read a checkpoint that train.py saved.

    Returns:
        dict with at least the keys in `REQUIRED`.

    Raises:
        UserError: see `load_file`; and if keys are missing, as in the authors' files, which hold weights only.
    """
    checkpoint = load_file(path)
    missing = [key for key in REQUIRED if key not in checkpoint] if isinstance(checkpoint, dict) else REQUIRED
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}, so it was not saved by train.py; to start from its weights set "
            "PRETRAINED to it in train.py"
        )
    return checkpoint


def build_network(checkpoint, merge=True):
    """Build the network of a checkpoint with its EMA weights, or the raw ones where there are none.

    Args:
        checkpoint: what `load_checkpoint` returned.
        merge: True gives the inference structure, which computes the same faster.

    Returns:
        `nn.Module` in eval mode: images (N, 3, img_size, img_size) -> logits (N, len(classes)).
    """
    model = timm.create_model(checkpoint["arch"], **checkpoint["model_args"])
    model.load_state_dict(checkpoint.get("state_dict_ema") or checkpoint["state_dict"])
    model.eval()
    return timm.utils.reparameterize_model(model) if merge else model
