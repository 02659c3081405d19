"""Train UniRepLKNet on data/train and validate it on data/val.

    python train.py                                      with the constants below
    python train.py --epochs 3 --model unireplknet_a     with some of them changed
    python train.py --resume auto                        continue the last run of this model

Leaves in checkpoints/<model>/: last.pth, best.pth, log.csv, result.json, loss.png, acc.png, class_indices.json and
classification_report.txt. A folder of an earlier run is renamed, never overwritten.
"""

import csv
import json
import math
import platform
import random
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from sklearn.metrics import classification_report
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.optim import create_optimizer_v2
from torch.utils.data import BatchSampler, DataLoader
from torchvision import transforms
from tqdm import tqdm

from common.checkpoint import load_checkpoint, load_file, save_checkpoint
from common.dataset import EpochSampler, SeededPictures, eval_transform, open_image_folder, seed_everything
from common.device import choose_device, choose_workers
from common.manifest import MANIFEST, STATISTICS, read_json
from common.options import UserError, read_constants, run
from common.plots import plot_curves
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
BATCH_SIZE: int = 32  # pictures that pass through the network at once
WORKERS: int = -1  # processes that read pictures; -1: one for each core, up to 8, beside a GPU, else 0; 0: none
MEAN: list[float] | None = None  # of each channel, pixels from 0 to 1; None: from mean_std.py, else ImageNet's
STD: list[float] | None = None  # likewise

# --- augmentation
CUTOUT: float = 0.5  # probability that a rectangle of a picture is erased; 0: off
CUTOUT_SCALE: list[float] = [0.02, 0.4]  # smallest and largest share of the picture that is erased
CUTOUT_RATIO: list[float] = [0.4, 2.5]  # smallest and largest aspect ratio of the rectangle
HFLIP: float = 0.5  # probability of mirroring left to right; 0: off
VFLIP: float = 0.5  # probability of mirroring top to bottom, right for pictures from above; 0: off
QUARTER_TURNS: bool = True  # turn by a random multiple of 90 degrees, right for pictures from above
ROTATION: float = 0.0  # largest turn in degrees to either side; 0: off
COLOR_JITTER: float = 0.2  # largest relative change of brightness, contrast and saturation; 0: off
MIXUP: float = 0.8  # alpha of Mixup's Beta distribution; 0: no Mixup
CUTMIX: float = 1.0  # alpha of CutMix's Beta distribution; 0: no CutMix
MIX_PROB: float = 0.1  # probability that a batch is mixed at all; 0: off
MIX_SWITCH: float = 0.5  # probability that a mixed batch gets CutMix instead of Mixup
SMOOTHING: float = 0.1  # label smoothing: share of the target spread evenly over all classes; 0: off

# --- network
MODEL: str = "unireplknet_t"  # unireplknet_a f p n t s b l xl, or any other classifier that timm knows
PRETRAINED: str = ""  # "": from scratch; "in1k" or another published tag: download; a path: weights from that file
DROP_PATH: float = 0.1  # stochastic depth: probability that the last block is skipped; 0: off
LAYER_SCALE: float = 0.1  # first value of each block's layer scale, 1e-6 in the paper; 0: none
FREEZE_EPOCHS: int = 0  # first epochs in which only the head learns, sensible with PRETRAINED; 0: off
GRAD_CHECKPOINTING: bool = False  # compute each block twice instead of keeping it in memory

# --- optimisation
EPOCHS: int = 100  # passes over data/train
LEARNING_RATE: float = 1e-3  # highest learning rate, for BATCH_SIZE * ACCUMULATE pictures a step
MIN_LEARNING_RATE: float = 1e-6  # learning rate at the end
WARMUP_EPOCHS: float = 5  # epochs in which the learning rate rises to its highest; 0: off
WEIGHT_DECAY: float = 0.05  # AdamW's, on matrices and kernels only; 0: off
LAYER_DECAY: float = 1.0  # factor on the learning rate from each layer to the one before it; 1: off
ACCUMULATE: int = 1  # batches for one step of the optimizer; 1: off
CLIP_GRAD: float = 5.0  # largest norm of the gradient of one step; 0: off
USE_EMA: bool = True  # keep averaged weights, which are validated too, and which test.py uses
EMA_DECAY: float = 0.9998  # 1 / (1 - EMA_DECAY) is about the number of steps averaged; reached by a warm-up

# --- machine
DEVICE: str = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
AMP: str = "auto"  # mixed precision: "auto": bf16 or else fp16 on cuda, off elsewhere; "bf16", "fp16", "off"
CHANNELS_LAST: bool = False  # keep pictures as NHWC in memory
COMPILE: bool = False  # torch.compile: a slow start, faster steps afterwards

# --- run
OUTPUT: str = "checkpoints"  # folder that holds <model>/, where the run leaves its files
RESUME: str = ""  # "": a new run; "auto": continue <model>/last.pth if there is one; a path: continue that checkpoint
SEED: int = 42  # first weights, order of the pictures and augmentation


def choose_amp(device):
    """The dtype in which autocast computes on `device`, or None where mixed precision is off."""
    choices = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
    if AMP in choices:
        return choices[AMP]
    if AMP != "auto":
        raise UserError(f'AMP must be "auto", "bf16", "fp16" or "off", got {AMP!r}')
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def choose_mean_and_std():
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
    source = f"{statistics}, {measured['pictures']} pictures"
    if manifest.is_file() and read_json(manifest)["fingerprint"] != measured["fingerprint"]:
        print("warning: the pictures have changed since mean_std.py was run; run it again")
    return measured["mean"], measured["std"], source


def quarter_turn(picture):
    """Turn a PIL picture by a random multiple of 90 degrees."""
    return picture.rotate(90 * random.randrange(4))


def train_transform(mean, std):
    """What is done to a training picture: PIL RGB -> float tensor (3, IMG_SIZE, IMG_SIZE)."""
    steps = [transforms.Resize((IMG_SIZE, IMG_SIZE))]
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


def open_data(mean, std, device):
    """Open data/train and data/val.

    Returns:
        (loader of training batches, its `EpochSampler`, loader of validation batches, class names).
    """
    if not Path(DATA, "train").is_dir():
        raise UserError(f"there is no folder {Path(DATA, 'train')}; run makedata.py first")
    train_set = open_image_folder(Path(DATA, "train"), train_transform(mean, std))
    val_set = open_image_folder(Path(DATA, "val"), eval_transform(IMG_SIZE, mean, std))
    if train_set.classes != val_set.classes:
        different = sorted(set(train_set.classes) ^ set(val_set.classes))
        raise UserError(
            f"{DATA}/train and {DATA}/val must hold the same classes, but only one of them has "
            f"{', '.join(different)}; run makedata.py again"
        )
    if len(train_set.classes) < 2:
        raise UserError(f"{DATA}/train holds one class only, {train_set.classes[0]}; a classifier needs two or more")

    workers = choose_workers(WORKERS, device)
    loading = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())
    sampler = EpochSampler(len(train_set), SEED)
    # A last, smaller batch would weigh its pictures more and disturb the batch norms, so it is dropped; in each epoch
    # it holds other pictures. A set smaller than a batch is one batch.
    batch_size = min(BATCH_SIZE, len(train_set))
    if batch_size == 1 and IMG_SIZE <= 32:
        raise UserError("batch norm cannot learn from single pictures of 32 pixels; raise BATCH_SIZE or IMG_SIZE")
    batches = BatchSampler(sampler, batch_size, drop_last=True)
    train_loader = DataLoader(SeededPictures(train_set, SEED), batch_sampler=batches, **loading)
    val_loader = DataLoader(val_set, BATCH_SIZE, **loading)
    return train_loader, sampler, val_loader, train_set.classes


def create_network(num_classes):
    """Build MODEL with `num_classes` outputs and load PRETRAINED.

    Returns:
        (network, arguments that build it again without stochastic depth).
    """
    arguments = dict(num_classes=num_classes)
    if MODEL not in timm.list_models():
        near = timm.list_models("unireplknet*")
        raise UserError(f"MODEL {MODEL!r} is unknown; choose one of {', '.join(near)}, or another name that timm lists")
    if MODEL.startswith("unireplknet"):
        arguments["layer_scale_init_value"] = LAYER_SCALE
    try:
        model = timm.create_model(MODEL, drop_path_rate=DROP_PATH or None, **arguments)
    except TypeError as error:
        raise UserError(f"{MODEL} has no stochastic depth; set DROP_PATH to 0 ({error})") from error
    if GRAD_CHECKPOINTING:
        model.set_grad_checkpointing()
    if PRETRAINED:
        print(f"pretrained  {PRETRAINED}: {load_pretrained(model)}")
    return model, arguments


def load_pretrained(model):
    """Load PRETRAINED into `model`, whatever the number of classes; returns what was loaded and what was skipped."""
    if not isinstance(model, UniRepLKNet):
        raise UserError(f"PRETRAINED works with the UniRepLKNet variants, not with {MODEL}; set one of them to ''")
    if Path(PRETRAINED).is_file():
        state_dict = load_file(PRETRAINED)
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
    try:
        return load_weights(model, state_dict)
    except ValueError as error:
        raise UserError(f"PRETRAINED {PRETRAINED!r}: {error}") from error


def learning_rate(step, steps, warmup_steps):
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then half a cosine."""
    if step < warmup_steps:
        return LEARNING_RATE * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)
    return MIN_LEARNING_RATE + (LEARNING_RATE - MIN_LEARNING_RATE) * (1 + math.cos(math.pi * min(progress, 1))) / 2


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


def train_one_epoch(model, ema, loader, mixup, optimizer, scaler, amp_dtype, device, epoch):
    """One pass over data/train.

    Returns:
        dict: train_loss; train_acc1 in percent, on the pictures that were not mixed; img_per_s.

    Raises:
        UserError: if the loss is no longer finite.
    """
    model.train()
    if epoch <= FREEZE_EPOCHS:
        model.eval()  # frozen batch norms keep their statistics, too
        unwrap(model).get_classifier().train()
    for parameter in unwrap(model).parameters():
        parameter.requires_grad_(epoch > FREEZE_EPOCHS)
    unwrap(model).get_classifier().requires_grad_(True)

    steps_per_epoch = math.ceil(len(loader) / ACCUMULATE)
    step = (epoch - 1) * steps_per_epoch
    totals = torch.zeros(3, device=device)  # loss, right among the unmixed, unmixed; fetched rarely, it makes us wait
    started = time.perf_counter()
    bar = tqdm(loader, desc=f"epoch {epoch}/{EPOCHS}", unit="batch", leave=False)
    for batch, (images, labels) in enumerate(bar):
        if batch % ACCUMULATE == 0:
            seed_everything(SEED, "step", step)  # Mixup, dropout and stochastic depth depend on the step only
            lr = learning_rate(step, EPOCHS * steps_per_epoch, round(WARMUP_EPOCHS * steps_per_epoch))
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            batches_of_step = min(ACCUMULATE, len(loader) - batch)

        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        if CHANNELS_LAST:
            images = images.contiguous(memory_format=torch.channels_last)
        images, targets = mix(mixup, images, labels)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(images)
            loss = F.cross_entropy(logits, targets)
        scaler.scale(loss / batches_of_step).backward()

        if batch % ACCUMULATE == batches_of_step - 1:
            if CLIP_GRAD:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if ema is not None:
                ema.update(model)

        with torch.no_grad():
            unmixed = targets.gather(1, labels[:, None]).squeeze(1) > 1 - SMOOTHING - 1e-4
            right = (logits.argmax(1) == labels) & unmixed
            totals += torch.stack([loss.detach() * len(images), right.sum(), unmixed.sum()]).float()
        if batch % 20 == 0 or batch == len(loader) - 1:
            mean_loss = totals[0].item() / ((batch + 1) * len(images))
            bar.set_postfix(loss=f"{mean_loss:.3f}", lr=f"{lr:.1e}")
            if not math.isfinite(mean_loss):
                raise UserError(
                    f"the loss became {mean_loss} in epoch {epoch}, batch {batch + 1}; what was saved is from before. "
                    'Lower LEARNING_RATE, set CLIP_GRAD above 0, or set AMP to "off", and start again'
                )

    pictures = len(loader) * len(images)
    _, right, unmixed = totals.tolist()
    return dict(
        lr=lr,
        train_loss=mean_loss,
        train_acc1=100 * right / unmixed if unmixed else None,
        img_per_s=pictures / (time.perf_counter() - started),
    )


@torch.inference_mode()
def validate(model, loader, amp_dtype, device, description):
    """One pass over data/val.

    Returns:
        (dict: loss, acc1 and acc5 in percent, each weighted by picture; true labels; predicted labels).
    """
    model.eval()
    loss, labels_seen, top_classes = 0.0, [], []
    for images, labels in tqdm(loader, desc=description, unit="batch", leave=False):
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        if CHANNELS_LAST:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(images)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        labels_seen.append(labels)
        top_classes.append(logits.topk(min(5, logits.shape[1])).indices)
    labels, top_classes = torch.cat(labels_seen), torch.cat(top_classes)
    hits = top_classes == labels[:, None]  # (pictures, 5)
    figures = dict(
        loss=float(loss) / len(labels),
        acc1=100 * hits[:, 0].float().mean().item(),
        acc5=100 * hits.any(1).float().mean().item(),
    )
    return figures, labels.tolist(), top_classes[:, 0].tolist()


def load_resume(folder, classes):
    """The checkpoint that RESUME asks for, or None for a new run."""
    path = folder / "last.pth" if RESUME == "auto" else Path(RESUME)
    if not RESUME or (RESUME == "auto" and not path.is_file()):
        return None
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} holds no optimizer state, so it cannot be continued; set PRETRAINED to it instead")
    for name, here, there in (("MODEL", MODEL, checkpoint["arch"]), ("the classes", classes, checkpoint["classes"])):
        if here != there:
            raise UserError(f"cannot continue {path}: {name} there is {there}, here {here}")
    return checkpoint


def prepare_folder(folder):
    """Make the folder of this run; that of another run is renamed, so that nothing is lost."""
    continued = RESUME == "auto" or (RESUME and Path(RESUME).resolve().parent == folder.resolve())
    if not continued and folder.is_dir() and any(folder.iterdir()):
        number = next(n for n in range(1, 10**6) if not Path(f"{folder}.{n}").exists())
        print(f"the earlier run in {folder} is now in {folder.rename(f'{folder}.{number}')}")
    folder.mkdir(parents=True, exist_ok=True)


def write_history(history, folder):
    """Write log.csv, loss.png and acc.png from one dict per epoch."""
    with open(folder / "log.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, history[0].keys())
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
    cells = [("-" if row[name] is None else format(row[name], spec), spec) for name, spec in columns]
    return "  ".join(f"{cell:>{spec[:-1].split('.')[0]}}" for cell, spec in cells)


def main():
    if IMG_SIZE < 32 or min(BATCH_SIZE, EPOCHS, ACCUMULATE) < 1:
        raise UserError("IMG_SIZE must be at least 32; BATCH_SIZE, EPOCHS and ACCUMULATE at least 1")
    constants = {name: globals()[name] for name in read_constants(__file__)}
    device = choose_device(DEVICE)
    amp_dtype = choose_amp(device)
    mean, std, mean_source = choose_mean_and_std()
    train_loader, sampler, val_loader, classes = open_data(mean, std, device)

    seed_everything(SEED)
    model, model_args = create_network(len(classes))
    model.to(device)
    if CHANNELS_LAST:
        model.to(memory_format=torch.channels_last)
    ema = ModelEma(model, EMA_DECAY) if USE_EMA else None
    optimizer = create_optimizer_v2(
        model, "adamw", LEARNING_RATE, WEIGHT_DECAY, layer_decay=LAYER_DECAY if LAYER_DECAY != 1 else None
    )
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    mixup = Mixup(
        mixup_alpha=MIXUP,
        cutmix_alpha=CUTMIX,
        prob=MIX_PROB if MIXUP or CUTMIX else 0.0,
        switch_prob=MIX_SWITCH,
        label_smoothing=SMOOTHING,
        num_classes=len(classes),
    )

    folder = Path(OUTPUT, MODEL)
    checkpoint = load_resume(folder, classes)
    prepare_folder(folder)
    history, best_acc1, first_epoch = [], -1.0, 1
    if checkpoint is not None:
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        if ema is not None and checkpoint["state_dict_ema"] is not None:
            ema.load(checkpoint["state_dict_ema"], checkpoint["ema_updates"])
        history, best_acc1 = checkpoint["history"], checkpoint["best_acc1"]
        first_epoch = checkpoint["epoch"] + 1
    if COMPILE:
        model = torch.compile(model)

    parameters = sum(parameter.numel() for parameter in unwrap(model).parameters())
    amp_name = "float32" if amp_dtype is None else f"autocast {str(amp_dtype).removeprefix('torch.')}"
    print(f"network     {MODEL}, {parameters / 1e6:.1f} million parameters, {IMG_SIZE} x {IMG_SIZE} pixels")
    print(f"large conv  {describe_implementation(device, amp_dtype or torch.float32)}")
    print(f"device      {device}, {amp_name}, torch {torch.__version__}, timm {timm.__version__}")
    print(f"pictures    {len(train_loader.dataset)} for training, {len(val_loader.dataset)} for validation")
    print(f"classes     {len(classes)}: {', '.join(classes[:24])}{', ...' if len(classes) > 24 else ''}")
    print(f"mean, std   {[round(v, 4) for v in mean]}, {[round(v, 4) for v in std]} from {mean_source}")
    if CUTOUT and CUTOUT_ERROR:
        print(f"cutout      torchvision's RandomErasing, since torchtoolbox cannot be imported ({CUTOUT_ERROR})")
    if checkpoint is not None:
        print(f"resume      epoch {first_epoch} of {EPOCHS}, best acc1 so far {best_acc1:.2f}")
    (folder / "class_indices.json").write_text(
        json.dumps(dict(enumerate(classes)), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )

    print(format_row(None))
    for epoch in range(first_epoch, EPOCHS + 1):
        started = time.perf_counter()
        sampler.epoch = epoch
        row = dict(epoch=epoch)
        row |= train_one_epoch(model, ema, train_loader, mixup, optimizer, scaler, amp_dtype, device, epoch)
        figures, labels, predictions = validate(model, val_loader, amp_dtype, device, "val")
        row |= {f"val_{name}": value for name, value in figures.items()}
        if ema is not None:
            figures, labels, predictions = validate(ema.ema, val_loader, amp_dtype, device, "val ema")
            row |= {f"ema_{name}": value for name, value in figures.items()}
        row["seconds"] = time.perf_counter() - started
        history.append(row)
        print(format_row(row))

        # `figures` and `predictions` are those of the weights that test.py will use: the EMA's, where there is one.
        is_best = figures["acc1"] > best_acc1 or not (folder / "best.pth").is_file()
        best_acc1 = max(best_acc1, figures["acc1"])
        checkpoint = dict(
            arch=MODEL,
            model_args=model_args,
            state_dict=unwrap(model).state_dict(),
            state_dict_ema=None if ema is None else ema.ema.state_dict(),
            ema_updates=0 if ema is None else ema.updates,
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
            epoch=epoch,
            best_acc1=best_acc1,
            history=history,
            classes=classes,
            mean=mean,
            std=std,
            img_size=IMG_SIZE,
            config=constants,
            versions=dict(
                python=platform.python_version(),
                torch=str(torch.__version__),
                torchvision=str(torchvision.__version__),
                timm=timm.__version__,
            ),
        )
        # best.pth first: a run that is stopped in between repeats this epoch and finds it the best again.
        if is_best:
            save_checkpoint(checkpoint, folder / "best.pth")
            report = classification_report(
                labels, predictions, labels=range(len(classes)), target_names=classes, digits=4, zero_division=0
            )
            (folder / "classification_report.txt").write_text(report, encoding="utf-8")
            result = dict(arch=MODEL, epoch=epoch, **figures, weights="ema" if USE_EMA else "raw")
            result |= dict(train_pictures=len(train_loader.dataset), val_pictures=len(val_loader.dataset))
            result |= dict(classes=classes, config=constants, versions=checkpoint["versions"])
            text = json.dumps(result, indent=2, ensure_ascii=False)
            (folder / "result.json").write_text(text + "\n", encoding="utf-8")
        save_checkpoint(checkpoint, folder / "last.pth")
        write_history(history, folder)

    if (folder / "classification_report.txt").is_file():
        print(f"\n{(folder / 'classification_report.txt').read_text(encoding='utf-8')}")
    weights = "EMA weights" if USE_EMA else "weights"
    print(f"best acc1 {best_acc1:.2f} % on {len(val_loader.dataset)} validation pictures ({weights}), in {folder}")


if __name__ == "__main__":
    run(main)
