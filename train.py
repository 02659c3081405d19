"""Train UniRepLKNet on data/train and validate it on data/val, on pictures or on sounds.

    python train.py                                      with the constants below
    python train.py --epochs 3 --model unireplknet_a     with some of them changed
    python train.py --resume auto                        continue the last run of this model
    torchrun --nproc_per_node=8 train.py                 on 8 GPUs

Leaves in checkpoints/<model>/: last.pth, best.pth, log.csv, result.json, loss.png, acc.png, class_indices.json and
classification_report.txt. A folder of an earlier run is renamed, never overwritten.

Exit status: 0; 1 an error; 2 a wrong option; 130 after Ctrl-C and 143 after SIGTERM, saved and ready to be continued.
"""

import csv
import json
import math
import os
import platform
import random
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from sklearn.metrics import classification_report
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.optim import Muon, create_optimizer_v2, list_optimizers, muon
from timm.utils import distribute_bn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from tqdm import tqdm

from common import distributed
from common.board import Board
from common.cache import open_cache
from common.checkpoint import (
    SEEDLINGS,
    check_finite,
    load_checkpoint,
    load_file,
    load_newest,
    save_checkpoint,
)
from common.dataset import (
    EpochBatches,
    SeededPictures,
    eval_transform,
    height_and_width,
    open_image_folder,
    seed_everything,
)
from common.device import choose_device, choose_layout, choose_workers, has_bfloat16, keep_freed_memory, prefetch
from common.faults import copy_tensors, first_non_finite_layer
from common.faults import Interrupt, Stopped, ignore_signals_in_worker
from common.manifest import CACHE, MANIFEST, STATISTICS, fingerprint, read_json, read_sound
from common.options import UserError, read_constants, run
from common.plots import plot_curves
from common.run_folder import lock, set_aside
from common.schedule import warmup_cosine
from common.sounds import add_noise, change_gain, file_kind, mask, picture_size, shift_time
from ema import ModelEma, unwrap
from models import UniRepLKNet, describe_implementation, load_weights

# torchtoolbox 0.1.8 still uses np.int, which NumPy removed in 1.24; its Cutout works once the name is there.
np.int = int
try:
    from torchtoolbox.transform import Cutout

    CUTOUT_ERROR = ""
except Exception as error:  # it imports OpenCV, which fails in many ways where a system library is missing
    CUTOUT_ERROR = f"{type(error).__name__}: {error}"
del np.int

# --- data
DATA: str = "data"  # folder that holds train/<class> and val/<class>; makedata.py makes it
IMG_SIZE: int = 224  # edge in pixels to which every picture is resized; at least 32
START_SIZE: int = 0  # edge in the first epoch, a multiple of 32; grows by 32 at a time; 0: IMG_SIZE from the start
TEST_SIZE: int = 0  # edge for validation and test.py, a multiple of 32, larger where crops are learned; 0: IMG_SIZE
BATCH_SIZE: int = 32  # pictures that pass through the network at once, on each GPU
CACHE_GB: float = 8.0  # largest size of data/cache, which keeps pictures decoded and resized; 0: decode in each epoch
WORKERS: int = -1  # processes that read pictures; -1: one for each core, up to 8, beside a GPU, else 0; 0: none
MEAN: list[float] | None = None  # of each channel, pixels from 0 to 1; None: from mean_std.py, else ImageNet's
STD: list[float] | None = None  # likewise

# --- augmentation of pictures
CROP: float = 1.0  # smallest share of a picture's area that is cut out and resized; 1: whole pictures
CUTOUT: float = 0.25  # probability that a rectangle of a picture is erased; 0: off
CUTOUT_SCALE: list[float] = [0.02, 0.4]  # smallest and largest share of the picture that is erased
CUTOUT_RATIO: list[float] = [0.4, 2.5]  # smallest and largest aspect ratio of the rectangle
HFLIP: float = 0.5  # probability of mirroring left to right; 0: off
VFLIP: float = 0.5  # probability of mirroring top to bottom, right for pictures from above; 0: off
QUARTER_TURNS: bool = True  # turn by a random multiple of 90 degrees, right for pictures from above
ROTATION: float = 0.0  # largest turn in degrees to either side; 0: off
COLOR_JITTER: float = 0.2  # largest relative change of brightness, contrast and saturation; 0: off

# --- augmentation of sounds, instead of that of pictures and CutMix
TIME_SHIFT: float = 0.1  # largest shift to either side, as a share of the time; 0: off
GAIN: float = 6.0  # largest change of the loudness in decibels; 0: off
NOISE: float = 0.5  # probability of white noise; 0: off
NOISE_LEVELS: list[float] = [40.0, 80.0]  # smallest and largest distance of noise from the loudest place in decibels
TIME_MASK: float = 0.1  # longest stretch that is masked, as a share of the time (SpecAugment); 0: off
FREQUENCY_MASK: float = 0.1  # widest band that is masked, as a share of the mel bands (SpecAugment); 0: off

# --- augmentation of both
MIXUP: float = 0.8  # alpha of Mixup's Beta distribution; 0: no Mixup
CUTMIX: float = 1.0  # alpha of CutMix's Beta distribution; 0: no CutMix
MIX_PROB: float = 0.2  # probability that a batch is mixed at all; 0: off
MIX_SWITCH: float = 0.5  # probability that a mixed batch gets CutMix instead of Mixup
BALANCE: float = 0.0  # logit adjustment for classes of unequal size: 1: as if they were equal; 0: off
SMOOTHING: float = 0.1  # label smoothing: share of the target spread evenly over all classes; 0: off

# --- network
MODEL: str = "unireplknet_t"  # unireplknet_a f p n t s b l xl, or any other classifier that timm knows
PRETRAINED: str = ""  # "": from scratch; "seedlings": this repository's; "in1k" or another tag: download; a path
DROP_PATH: float = 0.1  # stochastic depth: probability that the last block is skipped; 0: off
LAYER_SCALE: float = 0.1  # first value of each block's layer scale, 1e-6 in the paper; 0: none
FREEZE_EPOCHS: int = 0  # first epochs in which only the head learns, for PRETRAINED; 0: off
GRAD_CHECKPOINTING: bool = False  # compute each block twice instead of keeping it in memory

# --- optimisation
OPTIMIZER: str = "muon"  # "muon", "adamw" or another that timm knows; muon learned most from few pictures
EPOCHS: int = 100  # passes over data/train
LEARNING_RATE: float = 2e-3  # highest learning rate for 32 pictures a step; that of others is scaled by the root
MIN_LEARNING_RATE: float = 1e-6  # learning rate at the end
WARMUP_EPOCHS: float = 5  # epochs in which the learning rate rises to its highest; 0: off
WEIGHT_DECAY: float = 0.05  # times the learning rate: share that matrices and kernels lose in each step; 0: off
LAYER_DECAY: float = 1.0  # factor on the learning rate from each layer to the one before it; 1: off
ACCUMULATE: int = 1  # batches for one step of the optimizer; 1: off
CLIP_GRAD: float = 5.0  # largest norm of the gradient of one step; 0: off
USE_EMA: bool = True  # keep averaged weights, which are validated too, and which test.py uses
EMA_DECAY: float = 0.9998  # 1 / (1 - EMA_DECAY) is about the number of steps averaged; reached by a warm-up

MAX_SKIPPED: int = 10  # steps in a row with a loss or gradient that is not finite, after which the run stops

# --- machine
DEVICE: str = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
AMP: str = "auto"  # mixed precision: "auto": bf16 where the device has it, else fp16 on cuda; "bf16", "fp16", "off"
CHANNELS_LAST: str = "auto"  # keep pictures as NHWC in memory: "auto": on a CPU, where it is faster; "on", "off"
COMPILE: str = "auto"  # torch.compile: "on", "off"; "auto": on cuda under Linux in runs of 5,000 steps or more
SPLIT_BATCHES: bool = True  # where memory runs out, compute each batch in halves, quarters, ...; still one step
DETERMINISTIC: bool = False  # on a GPU: slower kernels that add in a fixed order, so that a run can be repeated exactly
SYNC_BATCH_NORM: bool = False  # on several GPUs: batch norms look at the pictures of all of them

# --- run
OUTPUT: str = "checkpoints"  # folder that holds <model>/, where the run leaves its files
RESUME: str = ""  # "": a new run; "auto": continue <model>/last.pth if there is one; a path: continue that checkpoint
SAVE_MINUTES: float = 10.0  # minutes between checkpoints inside an epoch; each epoch's end has one; 0: there only
KEEP: int = 2  # newest checkpoints to keep: last.pth, last.1.pth, ...; one that is damaged is passed over
TENSORBOARD: bool = False  # also write curves, augmentation and confusion matrices for TensorBoard (a package)
SEED: int = 42  # first weights, order of the pictures and augmentation

# --- what a constant that was changed does to a run that is continued
NO_EFFECT = ("CACHE_GB", "WORKERS", "OUTPUT", "RESUME", "SAVE_MINUTES", "KEEP", "MAX_SKIPPED", "TENSORBOARD")
ONLY_AT_THE_START = ("PRETRAINED", "LAYER_SCALE")

STEPS_TO_COMPILE = 5000  # compiling takes minutes and saves some hundredths of a second a step


def choose_amp(device):
    """The dtype in which autocast computes on `device`, or None where mixed precision is off."""
    choices = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
    if AMP in choices:
        return choices[AMP]
    if AMP != "auto":
        raise UserError(f'AMP must be "auto", "bf16", "fp16" or "off", got {AMP!r}')
    if has_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else None


def choose_mean_and_std(sound=None):
    """Mean, std (three floats each) and where they come from: the constants, mean_std.py's file, or ImageNet."""
    if (MEAN is None) != (STD is None):
        raise UserError("MEAN and STD go together: set both or neither")
    if MEAN is not None:
        if len(MEAN) != 3 or len(STD) != 3 or min(STD) <= 0:
            raise UserError(f"MEAN and STD must hold three values each, STD above 0, got {MEAN} and {STD}")
        return list(MEAN), list(STD), "the constants"
    statistics, manifest = Path(DATA, STATISTICS), Path(DATA, MANIFEST)
    if not statistics.is_file():
        return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD), "ImageNet, since mean_std.py was not run"
    measured = read_json(statistics)
    source = f"{statistics}, {measured['pictures']} {file_kind(sound).name}s"
    if measured.get("sound") != sound:
        print("warning: makedata.py makes other pictures of the sounds since mean_std.py was run; run it again")
    if manifest.is_file() and read_json(manifest)["fingerprint"] != measured["fingerprint"]:
        print("warning: the pictures have changed since mean_std.py was run; run it again")
    return measured["mean"], measured["std"], source


def quarter_turn(picture):
    """Turn a PIL picture by a random multiple of 90 degrees."""
    return picture.rotate(90 * random.randrange(4))


def train_transform(mean, std, sound=None):
    """What is done to a training picture: PIL RGB -> float tensor (3, IMG_SIZE, IMG_SIZE).

    To the picture of a recording, where `sound` says how it was made (see common/sounds.py): -> (3, mel bands, frames).
    """
    if sound is not None:
        return sound_transform(mean, std, sound)
    steps = [transforms.Resize((IMG_SIZE, IMG_SIZE))]
    if CROP < 1:
        steps.append(transforms.RandomResizedCrop(IMG_SIZE, (CROP, 1.0)))
    if CUTOUT and not CUTOUT_ERROR:
        steps.append(Cutout(CUTOUT, tuple(CUTOUT_SCALE), tuple(CUTOUT_RATIO)))
    if HFLIP:
        steps.append(transforms.RandomHorizontalFlip(HFLIP))
    if VFLIP:
        steps.append(transforms.RandomVerticalFlip(VFLIP))
    if QUARTER_TURNS:
        steps.append(transforms.Lambda(quarter_turn))
    if ROTATION:
        steps.append(transforms.RandomRotation(ROTATION, transforms.InterpolationMode.BILINEAR))
    if COLOR_JITTER:
        steps.append(transforms.ColorJitter(COLOR_JITTER, COLOR_JITTER, COLOR_JITTER))
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    if CUTOUT and CUTOUT_ERROR:
        steps.append(transforms.RandomErasing(CUTOUT, tuple(CUTOUT_SCALE), tuple(CUTOUT_RATIO)))
    return transforms.Compose(steps)


def sound_transform(mean, std, sound):
    """`train_transform` of recordings."""
    decibels = sound["decibels"]
    steps = [transforms.ToTensor()]
    if TIME_SHIFT:
        steps.append(partial(shift_time, share=TIME_SHIFT))
    if GAIN:
        steps.append(partial(change_gain, largest=GAIN / decibels))
    if NOISE:
        steps.append(partial(add_noise, probability=NOISE, levels=NOISE_LEVELS, decibels=decibels))
    steps.append(transforms.Normalize(mean, std))
    for share, dim in ((TIME_MASK, 2), (FREQUENCY_MASK, 1)):
        if share:
            steps.append(partial(mask, share=share, dim=dim))
    return transforms.Compose(steps)


def describe_augmentation(sound):
    """The constants of the augmentation that is on, in one line."""
    names = ["CROP"] if CROP < 1 else []
    names += ["CUTOUT", "HFLIP", "VFLIP", "QUARTER_TURNS", "ROTATION", "COLOR_JITTER"]
    if sound is not None:
        names = ["TIME_SHIFT", "GAIN", "NOISE", "TIME_MASK", "FREQUENCY_MASK"]
    if MIX_PROB:
        names += ["MIXUP", "CUTMIX"] if sound is None else ["MIXUP"]
    on = [f"{name} {globals()[name]}" for name in names if globals()[name]]
    return f"of {file_kind(sound).name}s: {', '.join(on) or 'none'}"


def choose_sizes(sound):
    """(height, width) in pixels of what the network sees in training and in validation.

    A crop that is scaled to IMG_SIZE shows things larger than the whole picture does, so that the network expects them
    larger (Touvron et al., "Fixing the train-test resolution discrepancy", NeurIPS 2019).
    """
    if sound is not None:
        return picture_size(sound), picture_size(sound)
    return (IMG_SIZE, IMG_SIZE), (TEST_SIZE or IMG_SIZE, TEST_SIZE or IMG_SIZE)


def open_data(mean, std, device, rank, ranks, sound=None):
    """Open data/train and data/val.

    Returns:
        (loader of this process's training batches, loader of its validation batches, class names).
    """
    if not Path(DATA, "train").is_dir():
        raise UserError(f"there is no folder {Path(DATA, 'train')}; run makedata.py first")
    size, val_size = choose_sizes(sound)
    train_set = open_image_folder(Path(DATA, "train"), train_transform(mean, std, sound), sound)
    val_set = open_image_folder(Path(DATA, "val"), eval_transform(val_size, mean, std), sound)
    if train_set.classes != val_set.classes:
        different = sorted(set(train_set.classes) ^ set(val_set.classes))
        raise UserError(
            f"{DATA}/train and {DATA}/val must hold the same classes, but only one of them has "
            f"{', '.join(different)}; run makedata.py again"
        )
    if len(train_set.classes) < 2:
        raise UserError(f"{DATA}/train holds one class only, {train_set.classes[0]}; a classifier needs two or more")

    if CACHE_GB:
        cache_pictures((train_set, size), (val_set, val_size), sound=sound)
    workers = choose_workers(WORKERS, device)
    loading = dict(
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals_in_worker,
    )
    # A last, smaller batch would weigh its pictures more and disturb the batch norms, so it is dropped; in each epoch
    # it holds other pictures. A set smaller than a batch is one batch.
    batch_size = min(BATCH_SIZE, len(train_set) // ranks)
    if batch_size < 1:
        raise UserError(f"{DATA}/train holds {len(train_set)} pictures, too few for {ranks} processes; start fewer")
    if batch_size == 1 and max(size if sound else [training_size(0)]) <= 32:
        raise UserError(
            "batch norm cannot learn from single pictures of 32 pixels; raise BATCH_SIZE, or IMG_SIZE and START_SIZE"
        )
    batches = EpochBatches(len(train_set), batch_size, SEED, rank, ranks)
    train_loader = DataLoader(SeededPictures(train_set, SEED), batch_sampler=batches, **loading)
    val_loader = DataLoader(Subset(val_set, range(rank, len(val_set), ranks)), BATCH_SIZE, **loading)
    return train_loader, val_loader, train_set.classes


def cache_pictures(*picture_sets, sound=None):
    """Let later epochs read resized pixels instead of decoding the files again, as far as CACHE_GB and the disk go.

    Args:
        picture_sets: pairs of a `PictureFolder` and its (height, width).
    """
    folder, in_use, kept = Path(DATA, CACHE), [], 0
    for pictures, size in picture_sets:
        paths = [path for path, _ in pictures.samples]
        pictures.cache, result = open_cache(paths, size, folder, CACHE_GB * 1e9, in_use, sound)
        if pictures.cache is None:
            print(f"cache       {kept} pictures; the others are decoded in each epoch ({result})")
            return
        kept += pictures.cache.count
        in_use.append(result)
    gigabytes = sum(path.stat().st_size for path in in_use) / 1e9
    wanted = sum(len(pictures) for pictures, _ in picture_sets)
    print(f"cache       {kept} of {wanted} pictures in {folder}, {gigabytes:.2f} GB")


def create_network(classes, size, checkpoint=None):
    """Build MODEL with an output for each class name; a new run's starts from PRETRAINED.

    Args:
        size: (height, width) in pixels of the smallest pictures that it will see.
        checkpoint: of the run that is continued, whose weights will replace these.

    Returns:
        (network, arguments that build it again without stochastic depth).
    """
    arguments = dict(num_classes=len(classes))
    if MODEL.startswith("unireplknet"):
        arguments["layer_scale_init_value"] = LAYER_SCALE
        # A residual stream in bfloat16 would lose what a layer scale as small as the paper's leaves of each block.
        arguments["published_arithmetic"] = 0 < LAYER_SCALE < 0.01
    if checkpoint is not None:
        arguments = checkpoint["model_args"]
    try:
        model = timm.create_model(MODEL, drop_path_rate=DROP_PATH or None, **arguments)
    except TypeError as error:
        raise UserError(f"{MODEL} has no stochastic depth; set DROP_PATH to 0 ({error})") from error
    try:
        if GRAD_CHECKPOINTING:
            model.set_grad_checkpointing()
        if not isinstance(model, UniRepLKNet):  # which takes any size
            with torch.inference_mode():
                model.eval()(torch.zeros(1, 3, *size))
    except (AssertionError, RuntimeError, ValueError) as error:  # timm's networks refuse in many ways
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{MODEL} does not work with pictures of {size[0]} x {size[1]} pixels, or not with GRAD_CHECKPOINTING "
            f"{GRAD_CHECKPOINTING} ({reason}); set IMG_SIZE to the size it was made for and START_SIZE to 0, or "
            "GRAD_CHECKPOINTING to False"
        ) from error
    if PRETRAINED and checkpoint is None:
        print(f"pretrained  {PRETRAINED}: {load_pretrained(model, classes)}")
    return model, arguments


def load_pretrained(model, classes):
    """Load PRETRAINED into `model`, whatever its classes; returns what was loaded and what was not, in words."""
    if not isinstance(model, UniRepLKNet):
        raise UserError(f"PRETRAINED works with the UniRepLKNet variants, not with {MODEL}; set one of them to ''")
    if PRETRAINED == "seedlings" or Path(PRETRAINED).is_file():
        state_dict = load_file(SEEDLINGS if PRETRAINED == "seedlings" else PRETRAINED)
    else:
        tags = timm.list_pretrained(f"{MODEL}.*")
        if f"{MODEL}.{PRETRAINED}" not in tags:
            choices = ", ".join(tag.split(".", 1)[1] for tag in tags)
            raise UserError(f"PRETRAINED {PRETRAINED!r} is neither a file nor a published tag of {MODEL} ({choices})")
        published = timm.get_pretrained_cfg(f"{MODEL}.{PRETRAINED}")
        try:
            state_dict = timm.models.load_state_dict_from_hf(
                published.hf_hub_id, published.hf_hub_filename, weights_only=True
            )
        except Exception as error:  # no network, a proxy, a hub that is down: many kinds
            raise UserError(
                f"cannot download {published.hf_hub_filename} from {published.hf_hub_id} ({type(error).__name__}); "
                "download it by hand and set PRETRAINED to its path"
            ) from error
    head = model.get_classifier()
    fresh = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    try:
        loaded = load_weights(model, state_dict)
    except ValueError as error:
        raise UserError(f"PRETRAINED {PRETRAINED!r}: {error}") from error
    known = state_dict.get("classes", classes)  # published weights do not tell theirs
    if known != classes and len(known) == len(classes):
        head.load_state_dict(fresh)  # sure of the wrong answers, it would cost the first epochs
        loaded += "; the head starts anew, since its classes are others"
    return loaded


def learning_rate(step, steps, warmup_steps, pictures):
    """Learning rate of step `step` (from 0) of `steps`, of `pictures` each: linear warm-up, then half a cosine.

    For optimizers that divide by the gradient's size, it grows with the root of the pictures in a step (Malladi et al.,
    "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", NeurIPS 2022).
    """
    return warmup_cosine(step, steps, warmup_steps, LEARNING_RATE * math.sqrt(pictures / 32), MIN_LEARNING_RATE)


def training_size(epoch):
    """Edge in pixels of the training pictures in epoch `epoch` (from 0): IMG_SIZE in the last third of the run.

    Small pictures first cost a fraction of the time (Tan and Le, "EfficientNetV2", ICML 2021, Section 4).
    """
    full_from = 2 * EPOCHS // 3
    if not START_SIZE or epoch >= full_from:
        return IMG_SIZE
    return (START_SIZE + (IMG_SIZE - START_SIZE) * epoch // full_from) // 32 * 32


def validation_size(epoch, sound=None):
    """Edge in pixels, or [height, width], of what the weights of epoch `epoch` (from 0) are validated and tested on.

    As long as the training pictures grow it is theirs: the network does not know larger ones yet.
    """
    if sound is not None:
        return list(picture_size(sound))
    size = training_size(epoch)
    return size if size < IMG_SIZE else TEST_SIZE or IMG_SIZE


def create_optimizer(model, device):
    """timm's OPTIMIZER with the constants.

    Muon (Jordan et al., 2024) takes the momentum of each matrix, and of each dense kernel as a matrix, to the nearest
    orthogonal one, so that all directions learn equally fast; depthwise kernels and vectors are left to AdamW.
    """
    if OPTIMIZER not in list_optimizers():
        raise UserError(f'OPTIMIZER {OPTIMIZER!r} is unknown; set it to "muon", "adamw" or another that timm lists')
    fused = dict(fused=True) if OPTIMIZER == "adamw" and device.type in ("cpu", "cuda") else {}
    layer_decay = LAYER_DECAY if LAYER_DECAY != 1 else None
    optimizer = create_optimizer_v2(model, OPTIMIZER, LEARNING_RATE, WEIGHT_DECAY, layer_decay=layer_decay, **fused)
    if isinstance(optimizer, Muon) and not has_bfloat16(device):
        optimizer.step = orthogonalise_in_float32(optimizer.step)
    return optimizer


def orthogonalise_in_float32(step):
    """Muon's `step`, orthogonalising in float32: timm's has no option for it, and bfloat16 is many times slower on a
    device without it. timm's function is exchanged only while the step runs."""

    @wraps(step)
    def step_in_float32(closure=None):
        original = muon.zeropower_via_newtonschulz
        muon.zeropower_via_newtonschulz = partial(original, dtype=torch.float32)
        try:
            return step(closure)
        finally:
            muon.zeropower_via_newtonschulz = original

    return step_in_float32


def create_criterion(labels, num_classes, device):
    """Cross entropy of logits (N, classes) and targets (N, classes), averaged over N.

    BALANCE adds the log of each class's share of the training pictures to its logit, so that the network learns what
    speaks for a class beyond its being frequent (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021,
    equation 10).

    Args:
        labels: class of each training picture.
    """
    shares = torch.bincount(torch.tensor(labels), minlength=num_classes) / len(labels)
    adjustment = BALANCE * shares.log().to(device)
    return lambda logits, targets: F.cross_entropy(logits + adjustment, targets)


def create_mixup(num_classes, sound=None):
    """timm's Mixup with the constants; it also makes the targets of a batch that is not mixed.

    Sounds add up, as in Mixup; a rectangle out of one spectrogram in another, as in CutMix, is nothing that is heard.
    """
    cutmix = CUTMIX if sound is None else 0.0
    return Mixup(
        mixup_alpha=MIXUP,
        cutmix_alpha=cutmix,
        prob=MIX_PROB if MIXUP or cutmix else 0.0,
        switch_prob=MIX_SWITCH,
        label_smoothing=SMOOTHING,
        num_classes=num_classes,
    )


def mix(mixup, images, labels):
    """Mix a batch and smooth its labels: images (N, 3, H, W), labels (N,) -> images, targets (N, classes).

    timm's Mixup pairs pictures and takes even batches only; of an odd batch the last picture passes unmixed.
    """
    even = len(images) // 2 * 2
    if even == len(images):
        return mixup(images, labels)
    smooth = F.one_hot(labels[even:], mixup.num_classes) * (1 - SMOOTHING) + SMOOTHING / mixup.num_classes
    if even == 0:
        return images, smooth
    mixed, targets = mixup(images[:even].clone(), labels[:even])
    return torch.cat([mixed, images[even:]]), torch.cat([targets, smooth])


@dataclass
class Run:
    """All that changes while a network is trained. A checkpoint holds all of it, and nothing else is needed to go on:
    the order of the pictures, their augmentation, Mixup and stochastic depth follow from seed, epoch and batch."""

    model: torch.nn.Module
    ema: ModelEma | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    criterion: Callable = F.cross_entropy
    epoch: int = 0  # epochs that are finished
    pictures: int = 0  # pictures of the next epoch that are done, on all processes
    totals: list = field(default_factory=lambda: [0.0] * 4)  # of these: loss, right among the unmixed, unmixed, number
    seconds: float = 0.0  # that they took
    skipped: int = 0  # steps of this epoch left out, since loss or gradient was not finite
    skipped_in_a_row: int = 0
    pieces: int = 1  # parts in which each batch is computed, more than one after memory ran out
    best_acc1: float = -1.0
    best_size: int | list = 0  # `validation_size` at which it was measured
    history: list = field(default_factory=list)  # one dict for each finished epoch

    COUNTERS = (
        "epoch",
        "pictures",
        "totals",
        "seconds",
        "skipped",
        "skipped_in_a_row",
        "pieces",
        "best_acc1",
        "best_size",
        "history",
    )

    def start_epoch(self):
        self.pictures, self.totals, self.seconds, self.skipped = 0, [0.0] * 4, 0.0, 0

    def state(self):
        """What a checkpoint holds: plain types and tensors."""
        return dict(
            state_dict=unwrap(self.model).state_dict(),
            state_dict_ema=None if self.ema is None else self.ema.ema.state_dict(),
            ema_updates=0 if self.ema is None else self.ema.updates,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            **{name: getattr(self, name) for name in self.COUNTERS},
        )

    def load(self, checkpoint):
        """Continue from a checkpoint; ValueError if its optimizer has other groups of parameters."""
        self.model.load_state_dict(checkpoint["state_dict"])
        if self.ema is not None:
            self.ema.load(checkpoint["state_dict_ema"] or checkpoint["state_dict"], checkpoint["ema_updates"])
        # The groups' constants are those of this call; lr is not one of them, but what the last step used.
        constants = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        for group, own in zip(checkpoint["optimizer"]["param_groups"], constants):
            if "fused" in own:
                group["fused"] = own["fused"]  # which decides where a step's number is kept
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for group, own in zip(self.optimizer.param_groups, constants):
            group.update(own)
        self.scaler.load_state_dict(checkpoint["scaler"])
        checkpoint = dict(best_size=checkpoint.get("img_size", 0)) | checkpoint  # which earlier versions did not save
        for name in self.COUNTERS:
            setattr(self, name, checkpoint.get(name, getattr(self, name)))


def resize(images, size):
    """Images (N, 3, H, W) at `size`, an edge or [height, width], in pixels."""
    size = height_and_width(size)
    return images if images.shape[2:] == size else F.interpolate(images, size=size, mode="bilinear", antialias=True)


def prepare_batch(run, batch, number, mixup):
    """Batch `number` of the whole run on the device: images (N, 3, H, W), labels (N,), targets (N, classes)."""
    seed_everything(SEED, "step", number)  # Mixup, dropout and stochastic depth depend on the batch's number only
    images, labels = (tensor.to(run.device, non_blocking=True, copy=True) for tensor in batch)  # Mixup works in place
    if START_SIZE:
        images = resize(images, training_size(run.epoch))
    images = images.contiguous(memory_format=choose_layout(run.device, CHANNELS_LAST))
    images, targets = mix(mixup, images, labels)
    return images, labels, targets


def compute_gradients(run, network, batches, numbers, mixup, amp_dtype):
    """Forward and backward pass of one step; the mean gradient of all processes is left in the parameters.

    Returns:
        Tensor (4,): loss, right among the unmixed, unmixed, pictures, each summed over the step's pictures.
    """
    totals = torch.zeros(4, device=run.device)
    for batch, number in zip(batches, numbers):
        images, labels, targets = prepare_batch(run, batch, number, mixup)
        parts = list(zip(images.chunk(run.pieces), labels.chunk(run.pieces), targets.chunk(run.pieces)))
        for part, (x, y, target) in enumerate(parts):
            last = number == numbers[-1] and part == len(parts) - 1
            # The processes exchange gradients once a step, with the last part.
            wait = network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext()
            with wait:
                with torch.autocast(run.device.type, amp_dtype, enabled=amp_dtype is not None):
                    logits = network(x)
                    loss = run.criterion(logits, target)
                run.scaler.scale(loss * (len(x) / len(images) / len(batches))).backward()
            with torch.no_grad():
                unmixed = target.gather(1, y[:, None]).squeeze(1) > 1 - SMOOTHING - 1e-4
                right = (logits.argmax(1) == y) & unmixed
                count = torch.full((), float(len(x)), device=run.device)  # unlike torch.tensor, without waiting
                totals += torch.stack([loss.detach() * count, right.sum(), unmixed.sum(), count])
    return totals


def wants_compile(device, steps):
    """Whether torch.compile is to be used in a run that has `steps` steps in all."""
    pays = device.type == "cuda" and sys.platform == "linux" and steps >= STEPS_TO_COMPILE and not GRAD_CHECKPOINTING
    return COMPILE == "on" or (COMPILE == "auto" and pays)


def compile_network(model, pictures, size, device, amp_dtype):
    """`model` compiled for training with so many pictures of `size` (height, width) at once; `model` itself, and one
    line, where that fails."""
    started = time.perf_counter()
    buffers = [buffer.clone() for buffer in model.buffers()]
    if dist.is_initialized():
        torch._dynamo.config.optimize_ddp = False  # it cuts the graph, and knows no autograd functions in it
    compiled = torch.compile(model.train().requires_grad_(True), dynamic=False)  # not as FREEZE_EPOCHS left it
    images = torch.zeros(pictures, 3, *size, device=device)
    images = images.contiguous(memory_format=choose_layout(device, CHANNELS_LAST))
    try:
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            loss = compiled(images).float().mean()
        loss.backward()
        print(f"compile     in {time.perf_counter() - started:.0f} s")
    except Exception as error:  # no C compiler, a kernel that cannot be built: many kinds
        if not is_out_of_memory(error):  # a full memory is dealt with in the first step
            reason = str(error).strip().partition("\n")[0]
            print(f"compile     failed, so it is off: {type(error).__name__}: {reason}")
            compiled = model
    copy_tensors(buffers, list(model.buffers()))
    model.zero_grad(set_to_none=True)
    return compiled


def is_out_of_memory(error):
    """Whether PyTorch's error says that the GPU's or the computer's memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def explain_not_finite(run, loader, step, batches, numbers, mixup, amp_dtype):
    """Where the loss or gradient of a step that was left out comes from, in words."""
    sampler, pictures = loader.batch_sampler, loader.dataset.pictures
    sampler.start = step * ACCUMULATE
    paths = [[pictures.samples[index][0] for _, index in keys] for keys, _ in zip(sampler, batches)]
    origin = "the output of every layer is finite, but not the loss or the gradient"
    for batch, number, names in zip(batches, numbers, paths):
        broken = [name for name, image in zip(names, batch[0]) if not image.isfinite().all()]
        if broken:
            return f"not finite after the augmentation: {', '.join(broken[:4])}; look at MEAN and STD"
        images, _, _ = prepare_batch(run, batch, number, mixup)
        with torch.autocast(run.device.type, amp_dtype, enabled=amp_dtype is not None):
            layer = first_non_finite_layer(unwrap(run.model), images)
        if layer is not None:
            origin = f"the first layer with a non-finite output is {layer}"
            break
    names = [name for batch in paths for name in batch]
    others = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (
        f"{origin}; pictures {', '.join(names[:4])}{others}. Lower LEARNING_RATE, set CLIP_GRAD above 0, or set AMP to "
        '"off"'
    )


def train_one_epoch(run, loader, mixup, amp_dtype, interrupt, save):
    """One pass over data/train, or what is left of it in a run that is continued.

    Args:
        run: changed in place.
        interrupt: the `Interrupt` that is obeyed between two steps.
        save: function that writes a checkpoint.

    Returns:
        dict: lr of the last step; train_loss; train_acc1 in percent, on the pictures that were not mixed; number of
        skipped steps; img_per_s.

    Raises:
        Stopped: after SIGTERM or Ctrl-C; what was trained is in `run`.
        UserError: if MAX_SKIPPED steps in a row have no finite loss and gradient; if memory runs out for good.
    """
    epoch = run.epoch + 1
    model = run.model.train()
    if epoch <= FREEZE_EPOCHS:
        model.eval()  # frozen batch norms keep their statistics, too
        unwrap(model).get_classifier().train()
    for parameter in unwrap(model).parameters():
        parameter.requires_grad_(epoch > FREEZE_EPOCHS)
    unwrap(model).get_classifier().requires_grad_(True)
    # Made anew in each epoch, since it notes which parameters learn.
    sampler = loader.batch_sampler
    network = DistributedDataParallel(model) if sampler.ranks > 1 else model

    pictures_per_step = sampler.batch_size * sampler.ranks * ACCUMULATE
    steps = math.ceil(len(loader) / ACCUMULATE)
    first_step = min(run.pictures // pictures_per_step, steps)
    sampler.epoch, sampler.start = epoch, first_step * ACCUMULATE
    reader = prefetch(loader, run.device)
    buffers = list(model.buffers())
    buffers_before = [buffer.clone() for buffer in buffers]  # a forward pass changes those of batch norms
    started, saved = time.perf_counter() - run.seconds, time.perf_counter()
    bar = dict(desc=f"epoch {epoch}/{EPOCHS}", unit="step", total=steps, initial=first_step, leave=False)
    bar = tqdm(range(first_step, steps), disable=sampler.rank > 0, **bar)
    for step in bar:
        batches = [next(reader) for _ in range(min(ACCUMULATE, len(loader) - step * ACCUMULATE))]
        # A batch has the same number, and so the same Mixup, however many processes share the work.
        first = (epoch - 1) * (sampler.length // sampler.batch_size) + step * ACCUMULATE * sampler.ranks + sampler.rank
        numbers = [first + index * sampler.ranks for index in range(len(batches))]
        lr = learning_rate((epoch - 1) * steps + step, EPOCHS * steps, round(WARMUP_EPOCHS * steps), pictures_per_step)
        for group in run.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

        copy_tensors(buffers, buffers_before)
        while True:
            try:
                totals = compute_gradients(run, network, batches, numbers, mixup, amp_dtype)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if not SPLIT_BATCHES or sampler.ranks > 1 or run.pieces >= sampler.batch_size:
                    raise UserError(
                        "memory is full; lower BATCH_SIZE, and raise ACCUMULATE to keep the same step, lower IMG_SIZE, "
                        "or set GRAD_CHECKPOINTING"
                    ) from error
            # Not inside `except`: there the error still holds the memory of the pass that failed.
            run.optimizer.zero_grad(set_to_none=True)
            copy_tensors(buffers_before, buffers)
            run.pieces *= 2
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
            bar.write(
                f"memory is full: each batch of {sampler.batch_size} is now computed in {run.pieces} parts; the steps "
                "stay the same, but for the batch norms, which see one part at a time"
            )

        run.scaler.unscale_(run.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD or math.inf)
        # What all processes must agree on, summed over them, and fetched at once, since the CPU waits for the device.
        stop = torch.full_like(norm, interrupt.signal is not None)
        flags = torch.stack([~norm.isfinite(), stop])
        *totals, bad_gradient, stop = distributed.total(torch.cat([totals, flags])).tolist()
        bad_loss = not math.isfinite(totals[0])
        # fp16's scaler looks for the largest scale by going too far now and then, and leaves such a step out itself.
        if bad_gradient and not bad_loss and run.scaler.get_scale() > 1:
            run.totals = [before + now for before, now in zip(run.totals, totals)]
            run.scaler.step(run.optimizer)
        elif bad_loss or bad_gradient:
            copy_tensors(buffers_before, buffers)
            run.skipped += 1
            run.skipped_in_a_row += 1
            what = "loss" if bad_loss else "gradient"
            if run.skipped == 1:
                bar.write(f"warning: epoch {epoch}, step {step + 1}: the {what} is not finite; the step is left out")
            if run.skipped_in_a_row >= MAX_SKIPPED:
                why = explain_not_finite(run, loader, step, batches, numbers, mixup, amp_dtype)
                raise UserError(
                    f"the {what} was not finite in {run.skipped_in_a_row} steps in a row, the last of them epoch "
                    f"{epoch}, step {step + 1}: {why}; none of them reached the weights, and what was saved is good"
                )
        else:
            run.totals = [before + now for before, now in zip(run.totals, totals)]
            run.skipped_in_a_row = 0
            run.scaler.step(run.optimizer)
            if run.ema is not None:
                run.ema.update(model)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)

        run.pictures = (step + 1) * pictures_per_step
        run.seconds = time.perf_counter() - started
        if step % 20 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{run.totals[0] / max(run.totals[3], 1):.3f}", lr=f"{lr:.1e}")
        if stop:
            raise Stopped
        if SAVE_MINUTES and time.perf_counter() - saved >= 60 * SAVE_MINUTES:
            save()
            saved = time.perf_counter()

    loss, right, unmixed, pictures = run.totals
    return dict(
        lr=learning_rate(epoch * steps - 1, EPOCHS * steps, round(WARMUP_EPOCHS * steps), pictures_per_step),
        train_loss=loss / pictures if pictures else None,
        train_acc1=100 * right / unmixed if unmixed else None,
        skipped=run.skipped,
        img_per_s=pictures / run.seconds if run.seconds else None,
    )


@torch.inference_mode()
def validate(model, loader, size, amp_dtype, device, description, interrupt=None):
    """One pass over data/val at `size` (see `validation_size`); each process takes a part, all get the whole's figures.

    Returns:
        (dict: loss, acc1 and acc5 in percent, each weighted by picture; true labels; predicted labels).

    Raises:
        Stopped: after SIGTERM or Ctrl-C.
    """
    model.eval()
    loss, labels_seen, top_classes = 0.0, [], []
    for images, labels in tqdm(loader, desc=description, unit="batch", leave=False, disable=distributed.rank() > 0):
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        images = resize(images, size).contiguous(memory_format=choose_layout(device, CHANNELS_LAST))
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(images)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        labels_seen += labels.tolist()
        top_classes += logits.topk(min(5, logits.shape[1])).indices.tolist()
        # Several processes must take the same number of batches, or they wait for each other forever.
        if interrupt is not None and interrupt.signal and not dist.is_initialized():
            raise Stopped
    losses, labels_seen, top_classes = zip(*distributed.gather((float(loss), labels_seen, top_classes)))
    labels, top_classes = torch.tensor(sum(labels_seen, [])), torch.tensor(sum(top_classes, []))
    hits = top_classes == labels[:, None]  # (pictures, 5)
    figures = dict(
        loss=sum(losses) / len(labels),
        acc1=100 * hits[:, 0].float().mean().item(),
        acc5=100 * hits.any(1).float().mean().item(),
    )
    return figures, labels.tolist(), top_classes[:, 0].tolist()


def load_resume(folder, classes, sound):
    """The checkpoint that RESUME asks for, as it is or the newest before it that is whole; None for a new run."""
    if not RESUME:
        return None
    if RESUME == "auto":
        checkpoint, path = load_newest(folder / "last.pth")
    else:
        checkpoint, path = load_checkpoint(RESUME), Path(RESUME)
    if checkpoint is None:
        return None
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} holds no optimizer state, so it cannot be continued; set PRETRAINED to it instead")
    for name, here, there in (
        ("MODEL", MODEL, checkpoint["arch"]),
        ("OPTIMIZER", OPTIMIZER, checkpoint.get("config", {}).get("OPTIMIZER", "adamw")),
        ("the classes", classes, checkpoint["classes"]),
        ("how sounds become pictures", sound, checkpoint.get("sound")),
    ):
        if here != there:
            raise UserError(f"cannot continue {path}: {name} there is {there}, here {here}")
    begun = f", {checkpoint['pictures']} pictures of the next" if checkpoint.get("pictures") else ""
    print(f"resume      {path}: {checkpoint['epoch']} epochs finished{begun}")
    return checkpoint


def describe_changes(checkpoint, about):
    """Say what differs from the run that is continued, and what follows.

    Args:
        checkpoint: of the run that is continued.
        about: what `about_run` returned for this one.
    """
    old, new = checkpoint.get("config", {}), about["config"]
    exact = True
    for name in (name for name in new if name in old and old[name] != new[name] and name not in NO_EFFECT):
        if name in ONLY_AT_THE_START:
            print(f"changed     {name}: the network and its weights come from the checkpoint all the same")
            continue
        print(f"changed     {name} was {old[name]!r}, is {new[name]!r} from here on")
        exact = False
    for name, value in about["versions"].items():
        if checkpoint.get("versions", {}).get(name, value) != value:
            print(f"changed     {name} was {checkpoint['versions'][name]}, is {value}")
            exact = False
    if checkpoint.get("pictures_fingerprint", about["pictures_fingerprint"]) != about["pictures_fingerprint"]:
        print(f"changed     other pictures in {DATA}/train; they come in another order")
        exact = False
    if not exact:
        print("            so the end will not be, to the last bit, what it would have been")


def prepare_folder(folder):
    """Make the folder of this run; that of another run is renamed, so that nothing is lost."""
    continued = RESUME == "auto" or (RESUME and Path(RESUME).resolve().parent == folder.resolve())
    if not continued:
        set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)


def write_history(history, folder):
    """Write log.csv, loss.png and acc.png from one dict per epoch."""
    with open(folder / "log.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in history for name in row))
        writer.writeheader()
        writer.writerows(history)
    plot_curves(history, folder)


def format_row(row):
    """One line for one epoch; the header for None."""
    columns = [("epoch", "5d"), ("lr", "9.2e"), ("train_loss", "10.4f"), ("train_acc1", "10.2f"), ("val_loss", "8.4f")]
    columns += [("val_acc1", "8.2f"), ("val_acc5", "8.2f")]
    if USE_EMA:
        columns += [("ema_loss", "8.4f"), ("ema_acc1", "8.2f"), ("ema_acc5", "8.2f")]
    columns += [("img_per_s", "9.1f"), ("seconds", "7.1f")]
    if row is None:
        return "  ".join(f"{name:>{spec[:-1].split('.')[0]}}" for name, spec in columns)
    cells = [("-" if row.get(name) is None else format(row[name], spec), spec) for name, spec in columns]
    return "  ".join(f"{cell:>{spec[:-1].split('.')[0]}}" for cell, spec in cells)


def about_run(classes, mean, std, model_args, pictures, ranks, sound, computed):
    """What a checkpoint tells about its run, besides the run's state.

    Args:
        computed: how and where it is computed, which decides with the packages' versions about the last bits.
    """
    return dict(
        arch=MODEL,
        model_args=model_args,
        classes=classes,
        mean=mean,
        std=std,
        img_size=validation_size(EPOCHS - 1, sound),
        **({} if sound is None else dict(sound=sound)),
        config={name: globals()[name] for name in read_constants(__file__)},
        pictures_train=len(pictures),
        pictures_fingerprint=fingerprint(Path(path).relative_to(DATA).as_posix() for path, _ in pictures.samples),
        versions=dict(
            python=platform.python_version(),
            torch=str(torch.__version__),
            torchvision=str(torchvision.__version__),
            timm=timm.__version__,
            processes=ranks,
            threads=torch.get_num_threads(),
            **computed,
        ),
    )


def save(run, about, path, keep=1):
    """Write a checkpoint, unless its weights are not finite: then the one before is the better one."""
    state = run.state()
    check_finite(state["state_dict"], state["state_dict_ema"] or {})
    save_checkpoint(about | state, path, keep)


def write_best(run, about, figures, labels, predictions, folder):
    """Write best.pth, result.json and classification_report.txt."""
    save(run, about, folder / "best.pth")
    classes = about["classes"]
    report = classification_report(
        labels, predictions, labels=range(len(classes)), target_names=classes, digits=4, zero_division=0
    )
    (folder / "classification_report.txt").write_text(report, encoding="utf-8")
    result = dict(arch=MODEL, epoch=run.epoch, **figures, weights="ema" if USE_EMA else "raw")
    result |= dict(train_pictures=about["pictures_train"], val_pictures=len(labels))
    result |= dict(classes=classes, config=about["config"], versions=about["versions"])
    text = json.dumps(result, indent=2, ensure_ascii=False)
    (folder / "result.json").write_text(text + "\n", encoding="utf-8")


def finish_epoch(run, row, loader, amp_dtype, interrupt, about, folder):
    """Validate, add the epoch to the history, and save its weights if they are the best.

    Returns:
        (true labels, predicted labels) of the validation.

    Raises:
        Stopped: after SIGTERM or Ctrl-C, with `run` as it was.
    """
    started = time.perf_counter()
    row = dict(epoch=run.epoch + 1) | row
    models = dict(val=unwrap(run.model)) | ({} if run.ema is None else dict(ema=run.ema.ema))
    for prefix, model in models.items():
        if dist.is_initialized():  # each process validates a part, with the batch norm statistics of the first one
            distribute_bn(model, dist.get_world_size())
        figures, labels, predictions = validate(
            model, loader, about["img_size"], amp_dtype, run.device, prefix, interrupt
        )
        row |= {f"{prefix}_{name}": value for name, value in figures.items()}
    row["seconds"] = run.seconds + time.perf_counter() - started
    print(format_row(row))

    # `figures` and `predictions` are those of the weights that test.py will use: the EMA's, where there is one.
    # Accuracies on pictures of different sizes are not compared: the last size counts, before it the larger one.
    size, last_size = about["img_size"], validation_size(EPOCHS - 1, about.get("sound"))
    if size == run.best_size:
        is_best = figures["acc1"] > run.best_acc1
    else:
        is_best = size == last_size or size > run.best_size != last_size
    is_best = (is_best or not (folder / "best.pth").is_file()) and math.isfinite(figures["loss"])
    if is_best:
        run.best_acc1, run.best_size = figures["acc1"], size
    run.history.append(row)
    run.epoch += 1
    run.start_epoch()
    # best.pth before last.pth: a run that is killed in between repeats this and finds the epoch the best again.
    if distributed.rank() == 0 and is_best:
        write_best(run, about, figures, labels, predictions, folder)
    return labels, predictions


def main():
    if IMG_SIZE < 32 or min(BATCH_SIZE, EPOCHS, ACCUMULATE, KEEP, MAX_SKIPPED) < 1:
        raise UserError("IMG_SIZE must be at least 32; BATCH_SIZE, EPOCHS, ACCUMULATE, KEEP and MAX_SKIPPED at least 1")
    if MODEL not in timm.list_models():
        near = timm.list_models("unireplknet*")
        raise UserError(f"MODEL {MODEL!r} is unknown; choose one of {', '.join(near)}, or another name that timm lists")
    if START_SIZE and (START_SIZE % 32 or not 32 <= START_SIZE <= IMG_SIZE):
        raise UserError(f"START_SIZE must be 0, or 32, 64, 96, ... up to IMG_SIZE ({IMG_SIZE}), got {START_SIZE}")
    if TEST_SIZE and TEST_SIZE < 32:
        raise UserError(f"TEST_SIZE must be 0 or at least 32, got {TEST_SIZE}")
    if not 0 < CROP <= 1:
        raise UserError(f"CROP must lie above 0 and be at most 1, got {CROP}")
    if COMPILE not in ("auto", "on", "off"):
        raise UserError(f'COMPILE must be "auto", "on" or "off", got {COMPILE!r}')
    device = choose_device(DEVICE)
    if distributed.launched() and device.type == "cuda":
        device = choose_device(f"cuda:{distributed.local_rank()}")
        torch.cuda.set_device(device)
    if DETERMINISTIC and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with this setting
        torch.use_deterministic_algorithms(True)
    # Batches have few sizes, so it pays to try cuDNN's algorithms once; which one wins can vary, though.
    torch.backends.cudnn.benchmark = not DETERMINISTIC
    if device.type == "cpu":
        keep_freed_memory()
    rank, ranks = distributed.join(device)
    # Depthwise gradients have other strides than DistributedDataParallel's buffers: it copies them, which is no error.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one process tells what all do
    try:
        status = train(device, rank, ranks)
        if ranks > 1:
            distributed.leave(device, status)
        return status
    except RuntimeError as error:
        if ranks > 1 and distributed.is_lost_process(error):
            raise UserError("another process of this run has ended; its message says why") from error
        raise


def train(device, rank, ranks):
    """Everything after the choice of the device; returns the exit status."""
    amp_dtype = choose_amp(device)
    sound = read_sound(DATA)
    if START_SIZE and sound is not None:
        raise UserError("START_SIZE is for pictures; set it to 0 for sounds")
    mean, std, mean_source = choose_mean_and_std(sound)
    train_loader, val_loader, classes = open_data(mean, std, device, rank, ranks, sound)
    pictures = train_loader.dataset.pictures

    folder = Path(OUTPUT, MODEL)
    held = lock(folder) if rank == 0 else nullcontext()
    held.__enter__()
    checkpoint = load_resume(folder, classes, sound)
    distributed.gather(None)  # all have read before the first one writes

    (height, width), _ = choose_sizes(sound)
    smallest = (training_size(0),) * 2 if sound is None else (height, width)
    seed_everything(SEED)
    model, model_args = create_network(classes, smallest, checkpoint)
    if SYNC_BATCH_NORM and ranks > 1:
        if device.type != "cuda":
            raise UserError("SYNC_BATCH_NORM works on GPUs only; set it to False")
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=choose_layout(device, CHANNELS_LAST))
    ema = ModelEma(model, EMA_DECAY) if USE_EMA else None
    optimizer = create_optimizer(model, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    mixup = create_mixup(len(classes), sound)
    run = Run(model, ema, optimizer, scaler, device, create_criterion(pictures.targets, len(classes), device))
    to_compile = wants_compile(device, EPOCHS * math.ceil(len(train_loader) / ACCUMULATE))
    amp_name = "float32" if amp_dtype is None else f"autocast {str(amp_dtype).removeprefix('torch.')}"
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    computed = dict(device=device_name, precision=amp_name, compiled=to_compile)
    about = about_run(classes, mean, std, model_args, pictures, ranks, sound, computed)
    if rank == 0:
        prepare_folder(folder)
    if checkpoint is not None:
        describe_changes(checkpoint, about)
        try:
            run.load(checkpoint)
        except ValueError as error:
            raise UserError(
                "cannot continue: LAYER_DECAY (which depends on PRETRAINED), or WEIGHT_DECAY to or from 0, groups the "
                "parameters anew; set them back"
            ) from error

    parameters = sum(parameter.numel() for parameter in model.parameters())
    val_pictures = len(val_loader.dataset.dataset)
    print(f"network     {MODEL}, {parameters / 1e6:.1f} million parameters, {height} x {width} pixels")
    print(f"large conv  {describe_implementation(device, amp_dtype or torch.float32)}")
    print(f"device      {device}, {amp_name}, torch {torch.__version__}, timm {timm.__version__}")
    if ranks > 1:
        step_pictures = train_loader.batch_sampler.batch_size * ACCUMULATE * ranks
        print(f"processes   {ranks}, together {step_pictures} pictures a step")
    print(f"{file_kind(sound).name + 's':11} {len(pictures)} for training, {val_pictures} for validation")
    if sound is not None:
        print(f"sound       {', '.join(f'{name} {value}' for name, value in sound.items())}")
    print(f"augmented   {describe_augmentation(sound)}")
    print(f"classes     {len(classes)}: {', '.join(classes[:24])}{', ...' if len(classes) > 24 else ''}")
    print(f"mean, std   {[round(v, 4) for v in mean]}, {[round(v, 4) for v in std]} from {mean_source}")
    if CUTOUT and CUTOUT_ERROR:
        print(f"cutout      torchvision's RandomErasing, since torchtoolbox cannot be imported ({CUTOUT_ERROR})")
    if rank == 0:
        names = json.dumps(dict(enumerate(classes)), indent=2, ensure_ascii=False)
        (folder / "class_indices.json").write_text(names + "\n", encoding="utf-8")
    board = Board(folder, run.epoch) if TENSORBOARD and rank == 0 else None
    if board is not None:
        board.add_augmentation(run.epoch, pictures, classes, train_transform([0.0] * 3, [1.0] * 3, sound), mixup, mix)

    def save_last():
        if rank == 0:
            save(run, about, folder / "last.pth", KEEP)

    print(format_row(None))
    for row in run.history:
        print(format_row(row))
    with Interrupt() as interrupt:
        try:
            compiled_size = None
            while run.epoch < EPOCHS:
                about["img_size"] = validation_size(run.epoch, sound)
                size = (training_size(run.epoch),) * 2 if sound is None else (height, width)
                if to_compile and size != compiled_size and run.epoch >= FREEZE_EPOCHS:
                    batch_size = train_loader.batch_sampler.batch_size
                    run.model = compile_network(model, batch_size, size, device, amp_dtype)
                    compiled_size, to_compile = size, run.model is not model
                row = train_one_epoch(run, train_loader, mixup, amp_dtype, interrupt, save_last)
                answers = finish_epoch(run, row, val_loader, amp_dtype, interrupt, about, folder)
                save_last()
                if rank == 0:
                    write_history(run.history, folder)
                if board is not None:
                    board.add_epoch(run.history[-1], *answers, classes)
        except Stopped:
            save_last()
            print(
                f"stopped in epoch {run.epoch + 1} of {EPOCHS} and saved; the same command with --resume auto goes on"
            )
            return interrupt.exit_status

    if rank == 0:
        write_history(run.history, folder)
        if (folder / "classification_report.txt").is_file():
            print(f"\n{(folder / 'classification_report.txt').read_text(encoding='utf-8')}")
    weights = "EMA weights" if USE_EMA else "weights"
    print(f"best acc1 {run.best_acc1:.2f} % on {val_pictures} validation pictures ({weights}), in {folder}")
    return 0


if __name__ == "__main__":
    run(main)
