"""Checkpoints: plain types and tensors, written so that a stopped write harms nothing, read without running code."""

import contextlib
import glob
import os
import time
import warnings
from pathlib import Path

import timm
import torch

from common.checkpoint_check import UnsafeFile, check_classifier, check_container
from common.dataset import height_and_width
from common.file_checks import naming
from common.options import UserError
from common.renamed import upgrade_checkpoint
from models import UniRepLKNet  # which registers the variants with timm, too

# Weights that come with the repository: unireplknet_a trained on 12 species of plant seedlings.
SEEDLINGS = Path(__file__).resolve().parent.parent / "checkpoints" / "seedlings_unireplknet_a.pth"

# What test.py and the tools need of a checkpoint; train.py adds what it needs to continue.
REQUIRED = ("arch", "model_args", "state_dict", "classes", "mean", "std", "img_size")
REMEDY = "use another checkpoint, or train again"


class SaveError(UserError):
    """A checkpoint that is not written: the file system refuses it, or its weights are not finite."""


PAUSES = (0.2, 0.5, 1, 2, 4, 8, 15)  # s between attempts to save, half a minute in all


def save_checkpoint(checkpoint, path, keep=1):
    """Write `checkpoint` to `path` in one step: a reader, or a stopped run, finds the old file or the new one, whole.

    PyTorch's file is a zip archive with a CRC-32 of each tensor, which `load_file` verifies. What fails is tried again
    for a while, since a virus scanner or a cloud drive holds a file for a moment, and network drives come back.

    Args:
        checkpoint: plain types and tensors.
        path: the file, such as last.pth.
        keep: 2 or more keeps the files that were there before: last.1.pth is the one before last.pth, and so on.

    Raises:
        SaveError: if it cannot be written; what was there before is still there, whole.
    """
    path = Path(path)
    for number, pause in enumerate((*PAUSES, None)):
        try:
            return write_checkpoint(checkpoint, path, keep)
        except (OSError, RuntimeError) as error:  # PyTorch's writer turns a full disk into a RuntimeError
            cause = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            reason = getattr(cause, "strerror", None) or str(error).partition("\n")[0]
            if pause is None or cause is None:
                raise SaveError(
                    f"cannot save {path} ({reason}); what was saved before is whole. Make room on the disk, allow "
                    "writing there, or set OUTPUT to another folder"
                ) from error
        if number == 0:
            print(f"warning: cannot save {path} ({reason}); trying again for {sum(PAUSES):.0f} s")
        time.sleep(pause)


def write_checkpoint(checkpoint, path, keep):
    """One attempt of `save_checkpoint`; OSError or RuntimeError if it fails."""
    partial = path.with_name(f"{path.name}.part")
    try:
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        # An attempt that failed after these renames has left no file at `path`, and they must not be done twice.
        for number in reversed(range(1, keep)) if path.is_file() else ():
            newer = earlier_checkpoint(path, number - 1)
            if newer.is_file():
                os.replace(newer, earlier_checkpoint(path, number))
        os.replace(partial, path)
    except (OSError, RuntimeError):
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new names, too, are to be on the disk
        with contextlib.suppress(OSError):  # some network drives do this for files only
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def check_finite(*state_dicts):
    """SaveError if a weight is not finite: then the checkpoint before is the better one."""
    for weights in state_dicts:
        name = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
        if name is not None:
            raise SaveError(f"{name} is no longer finite, so nothing is saved over what is there; lower LEARNING_RATE")


def earlier_checkpoint(path, number):
    """Name of the checkpoint `number` saves before `path`: last.1.pth for 1, `path` itself for 0."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}") if number else path


def load_newest(path, required=REQUIRED, check=check_classifier):
    """Read `path`, or the newest of the checkpoints before it that is whole; says so where one is damaged.

    Args:
        path: the file, such as last.pth.
        required, check: see `load_checkpoint`.

    Returns:
        (checkpoint, its path), or (None, `path`) if there is none at all.

    Raises:
        UserError: if there are some, and each is damaged.
    """
    path = Path(path)
    numbered = (file for file in path.parent.glob(f"{path.stem}.*{path.suffix}") if file.stem.split(".")[-1].isdigit())
    files = [path] if path.is_file() else []
    files += sorted(numbered, key=lambda file: int(file.stem.split(".")[-1]))
    for file in files:
        try:
            return load_checkpoint(file, required, check), file
        except UserError as error:
            if file == files[-1]:
                raise
            print(f"warning: {error}; trying the checkpoint before it")
    return None, path


def load_file(path):
    """Read any file that `torch.save` wrote, without running code that may be in it.

    Raises:
        UserError: if it does not exist, is damaged, claims to be larger than it is, or holds more than plain types and
            tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; give the path of a file that train.py saved")
    try:
        check_container(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's pickle protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnsafeFile as error:
        raise UserError(
            f"{path} cannot be used: it holds more than plain types and tensors, namely {error}, and could run code; "
            "save its state_dict alone"
        ) from error
    except Exception as error:  # damaged files fail in many ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
        raise UserError(f"{path} is damaged or no checkpoint ({reason}); use another one") from error


def load_checkpoint(path, required=REQUIRED, check=check_classifier):
    """Read a checkpoint, whose every value that is used was checked.

    Args:
        path: the file.
        required: keys that it must have.
        check: function of the checkpoint; ValueError if a value cannot be used.

    Returns:
        dict with at least the keys in `required`.

    Raises:
        UserError: see `load_file`; if keys are missing, as in the authors' files, which hold weights only; and if a
            value cannot be used.
    """
    checkpoint = load_file(path)
    missing = [key for key in required if key not in checkpoint] if isinstance(checkpoint, dict) else required
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}, so another script saved it; give a checkpoint of this one. To start "
            "from weights alone set PRETRAINED to them in train.py"
        )
    checkpoint = upgrade_checkpoint(checkpoint)
    with naming(path, REMEDY):
        check(checkpoint)
    return checkpoint


def find_checkpoint(path):
    """The checkpoint to use: `path`; for "seedlings" `SEEDLINGS`; for "" the newest checkpoints/*/best.pth, else those.

    Raises:
        UserError: if there is none.
    """
    if path:
        return SEEDLINGS if path == "seedlings" else Path(path)
    found = sorted(Path("checkpoints").glob("*/best.pth"), key=lambda file: file.stat().st_mtime)
    if not found and not SEEDLINGS.is_file():
        raise UserError("there is no checkpoints/*/best.pth; run train.py first, or give one with --checkpoint")
    if not found:
        print("there is no checkpoints/*/best.pth, so the weights for seedlings, which came along, are used")
    return found[-1] if found else SEEDLINGS


def find_checkpoints(text):
    """The paths of the checkpoints, or .onnx files, whose predictions are to be averaged: a list.

    Args:
        text: see `find_checkpoint`; or several paths separated by commas, each of which may be a pattern such as
            "cross_validation/fold*/*/last.pth".

    Raises:
        UserError: if there is none, or a pattern matches no file.
    """
    if not text or text == "seedlings" or Path(text).is_file():
        return [find_checkpoint(text)]
    paths = {}
    for word in text.split(","):
        found = [word] if Path(word).is_file() or not glob.has_magic(word) else sorted(glob.glob(word, recursive=True))
        if not found:
            raise UserError(f"no file matches {word}; give a file that train.py saved, or a pattern of some")
        paths |= {find_checkpoint(path): None for path in found if path}
    return list(paths)


def build_network(checkpoint, merge=True):
    """Build the network of a checkpoint with its EMA weights, or the raw ones where there are none.

    Args:
        checkpoint: what `load_checkpoint` returned.
        merge: True gives the inference structure, which computes the same faster.

    Returns:
        `nn.Module` in eval mode: images (N, 3, height, width) -> logits (N, len(classes)).

    Raises:
        UserError: if the network cannot be built so, or its predictions are not finite.
    """
    try:
        model = timm.create_model(checkpoint["arch"], **checkpoint["model_args"])
        model.load_state_dict(checkpoint.get("state_dict_ema") or checkpoint["state_dict"])
    except (RuntimeError, TypeError, ValueError) as error:  # a network that timm does not know, other weights, ...
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot build the network {checkpoint['arch']!r} of the checkpoint: {reason}") from error
    model.eval()
    # Finite weights may still overflow. A UniRepLKNet takes any size, and a small one is fast.
    size = (64, 64) if isinstance(model, UniRepLKNet) else height_and_width(checkpoint["img_size"])
    with torch.inference_mode():
        finite = model(torch.zeros(1, 3, *size)).isfinite().all()
    if not finite:
        raise UserError(
            f"the network {checkpoint['arch']} cannot be used: its predictions are not finite; {REMEDY}"
        )
    return timm.utils.reparameterize_model(model) if merge else model
