"""Train UniRepLKNet on data/train and validate it on data/val, on images or on spectrograms of sounds.

    python train.py                                      with the constants below
    python train.py --epochs 3 --model unireplknet_a     with some of them changed
    python train.py --resume auto                        resume the last run of this model
    torchrun --nproc_per_node=8 train.py                 on 8 GPUs

Writes to checkpoints/<model>/: last.pth, best.pth, log.csv, result.json, loss.png, acc.png, class_indices.json and
classification_report.txt. The folder of an earlier run is renamed, never overwritten.

Exit status: 0; 1 an error; 2 a wrong option or constant; 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP (the
terminal was closed), saved and ready to be resumed.
"""

import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models import split_model_name_tag
from timm.optim import list_optimizers
from timm.utils import distribute_bn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

from common import distributed
from common.audio import spectrogram_size
from common.augment import BatchMixup, spectrogram_transform, train_transform
from common.board import Board
from common.cache import cache_images
from common.calibration import calibrate
from common.clock import Clock
from common.convolutions import choose_convolutions
from common.dataset import EpochBatches, PixelTransform, SeededImages, open_image_folder, seed_everything
from common.device import NetworkForSize, Normalise, choose_amp, choose_layout, choose_workers, prefetch, wants_compile
from common.distillation import Teacher, check_teacher
from common.faults import Interrupt, Stopped, explain_not_finite, skip_step, split_when_out_of_memory
from common.fingerprints import fingerprint_images
from common.loading import Loader
from common.manifest import CACHE, STATISTICS, choose_mean_and_std, read_sound
from common.network import adopt_input, check_environment, check_pretrained, create_network, freeze, load_pretrained
from common.network import read_weights
from common.optimizer import create_optimizer
from common.options import Channels, ConstantError, Fraction, ImageSize, MultipleOf32, Name, NonNegative
from common.options import NonNegativeInt, Positive, PositiveChannels, PositiveInt, Probability, Rate, Rotation
from common.options import UserError, Workers, current_values, fill_in, run
from common.progress import Progress
from common.run_folder import RunFolder, Totals, TrainingState, describe_run, print_summary, to_img_size
from common.schedule import ImageSizes, warmup_cosine
from ema import ModelEma

# --- what is changed most
DATA: Name = "data"  # folder that holds train/<class> and val/<class>; makedata.py makes it
MODEL: Name = "unireplknet_t"  # unireplknet_a f p n t s b l xl, or any other classifier of timm, also as name.tag
PRETRAINED: str = ""  # "": from scratch; "seedlings"; "in1k" or another tag: download; a path; "hf-hub:owner/name"
IMG_SIZE: ImageSize | None = None  # training image size in pixels; None: as pretrained weights expect, else 224
BATCH_SIZE: PositiveInt = 32  # images in a batch, on each GPU
EPOCHS: PositiveInt | None = None  # passes over data/train; None: 100, or 20 for fine-tuning (with PRETRAINED)
LEARNING_RATE: Positive = 2e-3  # peak learning rate at batch size 32; scaled by sqrt(batch / 32)
OPTIMIZER: Name = "muon"  # "muon", "adamw" or another of timm's; muon learned most from few images
WORKERS: Workers | None = None  # processes that load images; None: one for each core, up to 8, beside a GPU, else 0
DEVICE: Name = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
OUTPUT: Name = "checkpoints"  # folder that holds <model>/, to which the run writes its files
RESUME: str = ""  # "": a new run; "auto": resume <model>/last.pth if there is one; a path: resume that checkpoint
SEED: int = 42  # of initial weights, order of the images and augmentation

# --- data
START_SIZE: MultipleOf32 | None = None  # image size in the first epoch, growing to IMG_SIZE; None: IMG_SIZE
FIT: Literal["squeeze", "pad", "crop"] = "squeeze"  # images to squares: distorted, with margins, or cut
TEST_SIZE: ImageSize | None = None  # for validation and test.py, larger where crops are learned; None: IMG_SIZE
CACHE_GB: NonNegative = 8.0  # maximum size of data/cache, which keeps resized images; 0: decode in each epoch
MEAN: Channels | None = None  # of pixels from 0 to 1; None: as pretrained weights expect, mean_std.py's, ImageNet's
STD: PositiveChannels | None = None  # likewise

# --- augmentation of images
CROP: Fraction = 1.0  # minimum area fraction of RandomResizedCrop; 1: whole images
CUTOUT: Probability = 0.25  # probability of erasing a rectangle; 0: off
HFLIP: Probability = 0.5  # probability of a horizontal flip; 0: off
VFLIP: Probability = 0.5  # probability of a vertical flip, suitable for overhead images; 0: off
ROTATION: Rotation = 180.0  # maximum in degrees, 180 for overhead images; "quarter": multiples of 90 degrees; 0: off
COLOR_JITTER: Probability = 0.2  # maximum relative change of brightness, contrast and saturation; 0: off
QUALITY: Probability = 0.5  # probability of a random blur, sharpening, resampling, JPEG compression or noise; 0: off

# --- augmentation of spectrograms, instead of that of images and CutMix
TIME_SHIFT: Probability = 0.1  # maximum shift as a fraction of the duration; 0: off
GAIN: NonNegative = 6.0  # maximum change of loudness in decibels; 0: off
NOISE: Probability = 0.5  # probability of white noise; 0: off
SPEC_MASK: Probability = 0.1  # maximum masked fraction of duration and of mel bands (SpecAugment); 0: off

# --- targets
MIXUP: NonNegative = 0.8  # alpha of Mixup's Beta distribution; 0: no Mixup
CUTMIX: NonNegative = 1.0  # alpha of CutMix's Beta distribution; 0: no CutMix
MIX_PROB: Probability = 0.2  # probability that a batch is mixed, by Mixup or CutMix in turns; 0: off
SMOOTHING: Rate = 0.1  # label smoothing; 0: off
TEACHER: str = ""  # knowledge distillation: a checkpoint, or several, whose predictions are the targets; "": labels
BALANCE: NonNegative = 0.0  # class imbalance: logit adjustment (the effect of class weights); 1: full; 0: off

# --- network
DROP_PATH: Rate = 0.1  # stochastic depth rate of the last block; 0: off
LAYER_SCALE: NonNegative = 0.1  # initial layer scale of each block, 1e-6 in the paper; 0: none
FREEZE_EPOCHS: NonNegativeInt = 0  # first epochs in which only the head is trained, for fine-tuning; 0: off
GRAD_CHECKPOINTING: bool = False  # recompute activations in the backward pass: less memory, more time

# --- optimisation
PATIENCE: NonNegativeInt = 0  # early stopping: epochs without a new best accuracy after which the run ends; 0: off
WARMUP_EPOCHS: NonNegative | None = None  # linear learning-rate warm-up; 0: off; None: 5, or 1 for fine-tuning
WEIGHT_DECAY: NonNegative = 0.05  # decoupled weight decay; 0: off
LAYER_DECAY: Fraction | None = None  # layer-wise learning-rate decay; 1: off; None: off, or 0.9 for fine-tuning
ACCUMULATE: PositiveInt = 1  # gradient accumulation steps; 1: off
CLIP_GRAD: NonNegative = 5.0  # maximum gradient norm; 0: off
EMA_DECAY: Rate = 0.9998  # of the weight average that test.py uses, over about 1 / (1 - EMA_DECAY) steps; 0: no EMA

# --- machine
AMP: Literal["auto", "bf16", "fp16", "off"] = "auto"  # mixed precision; "auto": bf16 where supported, else fp16 on cuda
COMPILE: Literal["auto", "on", "off"] = "auto"  # torch.compile; "auto": on cuda, Linux, from 5,000 steps on
DETERMINISTIC: bool = False  # on a GPU: slower kernels that add in a fixed order, so that a run can be repeated exactly
SYNC_BATCH_NORM: bool = False  # on several GPUs: batch norm statistics over all of them

# --- files
SAVE_MINUTES: NonNegative = 10.0  # minutes between checkpoints inside an epoch; 0: at the end of each epoch only
WAIT_MINUTES: NonNegative = 10.0  # minutes to wait for images when a drive stands still, then save and stop; 0: forever
TENSORBOARD: bool = False  # also log curves, augmentation and confusion matrices for TensorBoard (a package)

# Values of constants that are None.
DEFAULTS = {
    "training from scratch": dict(EPOCHS=100, WARMUP_EPOCHS=5, LAYER_DECAY=1.0),
    "fine-tuning": dict(EPOCHS=20, WARMUP_EPOCHS=1, LAYER_DECAY=0.9),
}


def main():
    arch, tag = split_model_name_tag(MODEL)
    check_choices(arch, tag, OPTIMIZER, PRETRAINED, TEACHER, RESUME, DATA)
    if (MEAN is None) != (STD is None):
        raise ConstantError("MEAN and STD go together: set both or neither")
    if START_SIZE and IMG_SIZE and START_SIZE > IMG_SIZE:
        raise ConstantError(f"START_SIZE must be at most IMG_SIZE ({IMG_SIZE}), got {START_SIZE}")

    with (
        distributed.processes(DEVICE, DETERMINISTIC) as (device, rank, world_size),
        RunFolder(OUTPUT, arch, RESUME, SAVE_MINUTES) as folder,
    ):
        pretrained = PRETRAINED or tag
        config = current_values(globals()) | dict(MODEL=arch, PRETRAINED=pretrained)
        config = fill_in(config, DEFAULTS, "fine-tuning" if pretrained else "training from scratch")
        epochs = config["EPOCHS"]
        checkpoint = folder.load(config, device)
        fresh = pretrained and checkpoint is None
        weights = distributed.from_first(read_weights, arch, pretrained, tag) if fresh else None

        # --- data
        sound = read_sound(DATA)  # how spectrograms were made; None: images
        config = adopt_input(config, weights, checkpoint, sound, Path(DATA, STATISTICS))
        mean, std, statistics = choose_mean_and_std(DATA, config["MEAN"], config["STD"], sound)
        if sound is None:
            full = (config["IMG_SIZE"],) * 2
            sizes = ImageSizes(epochs, full, (TEST_SIZE,) * 2 if TEST_SIZE else None, START_SIZE)
            transform = train_transform(
                sizes.full, mean, fit=FIT, crop=CROP, cutout=CUTOUT, hflip=HFLIP, vflip=VFLIP,
                rotation=ROTATION, color_jitter=COLOR_JITTER, quality=QUALITY,
            )  # fmt: skip
        else:
            sizes = ImageSizes(epochs, spectrogram_size(sound))
            transform = spectrogram_transform(
                mean, std, decibels=sound["decibels"], time_shift=TIME_SHIFT, gain=GAIN, noise=NOISE,
                spec_mask=SPEC_MASK,
            )  # fmt: skip
        train_set, val_set = open_data(DATA, transform, PixelTransform(sizes.last, fit=FIT))
        classes = train_set.classes
        cached = (train_set, sizes.full), (val_set, sizes.last)
        with distributed.first_on_each_machine():
            how = dict(fit=FIT, workers=WORKERS, wait_minutes=WAIT_MINUTES)
            print(cache_images(Path(DATA, CACHE), CACHE_GB, *cached, **how))
            images = fingerprint_images(Path(DATA, CACHE), train_set, val_set)
        train_loader, val_loader = create_loaders(
            train_set, val_set, BATCH_SIZE, choose_workers(WORKERS, device), WAIT_MINUTES, SEED, rank, world_size
        )
        batch_size = train_loader.batch_sampler.batch_size
        if batch_size == 1 and max(sizes.training(0)) <= 32:
            raise UserError("batch norm cannot learn from single images of 32 pixels; raise BATCH_SIZE or IMG_SIZE")

        # --- network and optimizer
        seed_everything(SEED)
        model, model_args = create_network(
            arch, classes, sizes.training(0), DROP_PATH, LAYER_SCALE, GRAD_CHECKPOINTING, checkpoint
        )
        if weights is not None:
            print(f"pretrained  {pretrained}: {load_pretrained(model, weights, classes)}")
        if SYNC_BATCH_NORM and world_size > 1:
            if device.type != "cuda":
                raise UserError("SYNC_BATCH_NORM works on GPUs only; set it to False")
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.to(device, memory_format=choose_layout(device))
        ema = ModelEma(model, EMA_DECAY) if EMA_DECAY else None
        optimizer = create_optimizer(model, OPTIMIZER, LEARNING_RATE, WEIGHT_DECAY, config["LAYER_DECAY"], device)
        amp_dtype = choose_amp(AMP, device)
        amp = partial(torch.autocast, device.type, amp_dtype, enabled=amp_dtype is not None)
        state = TrainingState(
            model, ema, optimizer, torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
        )

        # --- what each step does
        normalise = Normalise(mean, std, device)
        steps = math.ceil(len(train_loader) / ACCUMULATE)  # of one epoch
        step_images = batch_size * world_size * ACCUMULATE
        # For optimizers that divide by the gradient's size, the learning rate grows with the root of the batch size
        # (Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", NeurIPS 2022).
        peak, warmup_steps = LEARNING_RATE * math.sqrt(step_images / 32), round(config["WARMUP_EPOCHS"] * steps)
        learning_rate = partial(
            warmup_cosine, steps=epochs * steps, warmup_steps=warmup_steps, highest=peak, lowest=1e-6
        )
        # Sounds add up, as in Mixup; a rectangle of one spectrogram in another, as in CutMix, is nothing one hears.
        mixup = BatchMixup(len(classes), MIXUP, CUTMIX if sound is None else 0.0, MIX_PROB, SMOOTHING)
        criterion = create_criterion(train_set.targets, len(classes), BALANCE, device)
        compiling = wants_compile(COMPILE, device, epochs * steps, GRAD_CHECKPOINTING)
        convolutions = choose_convolutions(model, sizes, train_loader, val_loader, amp_dtype, DETERMINISTIC, checkpoint)
        compiled_for = NetworkForSize(model, compiling, batch_size, amp)

        # --- the run
        about = describe_run(
            arch=arch, model_args=model_args, mean=mean, std=std, sound=sound, config=config, train_set=train_set,
            images=images, device=device, amp_dtype=amp_dtype, compiled=compiling, world_size=world_size,
            convolutions=convolutions,
        )  # fmt: skip
        teacher = Teacher(TEACHER, about, device, amp) if TEACHER else None
        folder.begin(about, checkpoint, Clock(about, sizes, device.type))
        if checkpoint is not None:
            state.load(checkpoint, folder.resumed)
        print_summary(about, state, sizes, train_loader, val_set, statistics, learning_rate)
        board = Board(folder.path, state.epoch, state.history) if TENSORBOARD and rank == 0 else None
        if board is not None:
            board.add_augmentation(state.epoch, train_set, transform, mixup)
        folder.print_history(state)
        with Interrupt() as interrupt, folder.saved_on_error(state):
            try:
                while state.epoch < epochs and not distributed.from_first(state.out_of_patience, PATIENCE):
                    size, val_size = sizes.training(state.epoch), sizes.validation(state.epoch)
                    state.img_size, frozen = to_img_size(val_size), state.epoch < FREEZE_EPOCHS
                    network = model if frozen else compiled_for(size)
                    prepare = partial(
                        prepare_batch, size=size, device=device, normalise=normalise, mixup=mixup, teacher=teacher,
                        seed=SEED,
                    )  # fmt: skip
                    train_metrics = train_one_epoch(
                        state, network, train_loader, prepare, criterion, learning_rate, amp, accumulate=ACCUMULATE,
                        clip_grad=CLIP_GRAD, frozen=frozen, description=f"epoch {state.epoch + 1}/{epochs}",
                        interrupt=interrupt, folder=folder,
                    )  # fmt: skip
                    started = time.perf_counter()
                    validation = {
                        name: validate(network, val_loader, val_size, normalise, amp, name, interrupt)
                        for name, network in state.networks().items()
                    }
                    row = folder.finish_epoch(
                        state, train_metrics, validation, time.perf_counter() - started, to_img_size(sizes.last)
                    )
                    if board is not None:
                        board.add_epoch(row, *list(validation.values())[-1][1:], classes)
                # The temperature for calibrated probabilities, and statistics by which test.py calls an image unknown.
                if not distributed.from_first(calibrate, folder, train_set, val_set, val_loader, normalise, interrupt):
                    raise Stopped("in calibration")
            except Stopped as stopped:
                folder.save_last(state)
                where = str(stopped) or f"in epoch {state.epoch + 1} of {epochs}"
                print(f"stopped {where} and saved; resume with --resume auto")
                return distributed.leave(device, interrupt.exit_status)
        folder.finish(state, len(val_set))
        return distributed.leave(device, 0)


def check_choices(arch, tag, optimizer, pretrained, teacher, resume, data):
    """Refuse names that nobody knows before anything is read or written."""
    if arch not in timm.list_models():
        near = ", ".join(timm.list_models("unireplknet*"))
        raise ConstantError(f"MODEL must be one of {near}, or another name that timm lists, got {arch!r}")
    if optimizer not in list_optimizers():
        raise ConstantError(f'OPTIMIZER must be "muon", "adamw" or another that timm lists, got {optimizer!r}')
    if distributed.rank() == 0 and resume not in ("", "auto") and not Path(resume).is_file():
        raise ConstantError(f'RESUME must be "", "auto" or the path of a checkpoint, got {resume!r}')
    check_environment()
    check_teacher(teacher)
    if distributed.rank() == 0 and not resume:
        check_pretrained(arch, tag, pretrained)
    if not Path(data, "train").is_dir():
        raise UserError(f"there is no folder {Path(data, 'train')}; run makedata.py first")


def open_data(data, transform, val_transform):
    """The data sets in `data`/train and `data`/val; UserError unless both hold the same two or more classes."""
    train_set = open_image_folder(Path(data, "train"), transform)
    val_set = open_image_folder(Path(data, "val"), val_transform)
    if train_set.classes != val_set.classes:
        different = sorted(set(train_set.classes) ^ set(val_set.classes))
        raise UserError(
            f"{data}/train and {data}/val must hold the same classes, but only one of them has {', '.join(different)}; "
            "run makedata.py again"
        )
    if len(train_set.classes) < 2:
        raise UserError(f"{data}/train holds one class only, {train_set.classes[0]}; a classifier needs two or more")
    return train_set, val_set


def create_loaders(train_set, val_set, batch_size, workers, wait_minutes, seed, rank, world_size):
    """Loaders of this process's part of the training and the validation batches."""
    loading = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())
    loading |= dict(wait_minutes=wait_minutes)
    # A last, smaller batch would weigh its images more and disturb the batch norms, so it is dropped; in each epoch
    # it holds other images. A set smaller than a batch is one batch.
    fits = min(batch_size, len(train_set) // world_size)
    if fits < 1:
        raise UserError(f"{len(train_set)} training images are too few for {world_size} processes; start fewer")
    if fits < batch_size:
        print(f"batch size  {fits}, since there are {len(train_set)} training images (BATCH_SIZE is {batch_size})")
    batches = EpochBatches(len(train_set), fits, seed, rank, world_size)
    images, val_part = SeededImages(train_set, seed), Subset(val_set, range(rank, len(val_set), world_size))
    train_loader = Loader(images, batch_sampler=batches, what="training images", together="batch", **loading)
    return train_loader, Loader(val_part, batch_size, what="validation images", together="end", **loading)


def create_criterion(labels, num_classes, balance, device):
    """Cross entropy of logits (N, classes) and targets (N, classes), averaged over N.

    `balance` adds the log of each class's frequency to its logit, so that the network learns what speaks for a class
    beyond its being frequent (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 10).

    Args:
        labels: class of each training image.
    """
    frequencies = torch.bincount(torch.tensor(labels), minlength=num_classes) / len(labels)
    adjustment = balance * frequencies.log().to(device)
    return lambda logits, targets: F.cross_entropy(logits + adjustment, targets)


def train_one_epoch(
    state, network, loader, prepare, criterion, learning_rate, amp, *, accumulate, clip_grad, frozen, description,
    interrupt, folder,
):  # fmt: skip
    """One pass over data/train, or the rest of it in a run that is resumed.

    Args:
        state: the `TrainingState`, changed in place.
        network: its model, or that compiled.
        prepare: function (batch, its number in the run) -> images, labels, targets; see `prepare_batch`.
        criterion: function of logits and targets.
        learning_rate: function of the step, from 0 over the whole run.
        amp: function that returns the autocast context.
        accumulate: batches in a step of the optimizer.
        clip_grad: maximum gradient norm; 0: off.
        frozen: whether only the head is trained.
        interrupt: the `Interrupt` that is obeyed between two steps.
        folder: the `RunFolder`, which saves now and then.

    Returns:
        dict: lr of the last step; train_loss; train_acc1 in percent, on the images that were not mixed; number of
        skipped steps; img_per_s.

    Raises:
        Stopped: after a signal such as Ctrl-C; what was trained is in `state`.
        UserError: if too many steps in a row have no finite loss and gradient; if memory runs out for good.
    """
    model, sampler = state.model, loader.batch_sampler
    network.train()
    freeze(model, frozen)
    if sampler.world_size > 1:  # in each epoch anew, since it notes which parameters are trained
        network = DistributedDataParallel(network)
    steps = math.ceil(len(loader) / accumulate)
    step_images = sampler.batch_size * sampler.world_size * accumulate
    first_step = min(state.images // step_images, steps)
    sampler.epoch, sampler.start = state.epoch + 1, first_step * accumulate
    reader = prefetch(loader, next(model.parameters()).device)
    started = time.perf_counter() - state.seconds
    bar = dict(desc=description, unit="step", total=steps, initial=first_step, leave=False)
    bar = Progress(range(first_step, steps), disable=sampler.rank > 0, **bar)
    for step in bar:
        batches = [next(reader) for _ in range(min(accumulate, len(loader) - step * accumulate))]
        # A batch has the same number, and so the same Mixup, however many processes share the work.
        first = state.epoch * (sampler.length // sampler.batch_size) + step * accumulate * sampler.world_size
        numbers = [first + index * sampler.world_size + sampler.rank for index in range(len(batches))]
        lr = learning_rate(state.epoch * steps + step)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

        state.guard.begin()
        while True:
            totals = 0  # of this step, see `Totals`
            with split_when_out_of_memory(state, sampler):
                for images, labels, targets, weight, last in micro_batches(
                    batches, numbers, prepare, state.micro_batches
                ):
                    # The processes exchange gradients once a step, with the last micro-batch.
                    alone = sampler.world_size > 1 and not last
                    with network.no_sync() if alone else nullcontext():
                        with amp():
                            logits = network(images)
                            loss = criterion(logits, targets)
                        state.scaler.scale(loss * weight).backward()
                    totals = totals + measure(loss, logits, labels)
                break
            # Again, in smaller micro-batches. Out here the error no longer holds the memory of its pass.
            torch.cuda.empty_cache()
            state.optimizer.zero_grad(set_to_none=True)
            state.guard.undo()
            bar.write(
                f"memory is full: each batch of {sampler.batch_size} is now computed in {state.micro_batches} parts; "
                "the steps stay the same, but for the batch norms, which see one part at a time"
            )

        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)
        # What all processes must agree on, summed over them, and fetched at once, since the CPU waits for the device.
        flags = torch.stack([~norm.isfinite(), torch.full_like(norm, interrupt.signal is not None)])
        *totals, bad_gradient, stop = distributed.total(torch.cat([totals, flags])).tolist()
        totals = Totals(*totals)
        # fp16's scaler looks for the largest scale by going too far now and then, and skips such a step by itself.
        searching = bad_gradient and state.scaler.get_scale() > 1
        if not math.isfinite(totals.loss) or bad_gradient and not searching:
            state.guard.undo()
            explain = partial(explain_not_finite, state, loader, step * accumulate, batches, numbers, prepare, amp)
            skip_step(state, "gradient" if math.isfinite(totals.loss) else "loss", step, explain, bar)
        else:
            state.totals = state.totals.plus(totals)
            state.guard.change()
            if not bad_gradient:
                state.scaler.step(state.optimizer)
                state.skipped_in_a_row = 0
                if state.ema is not None:
                    state.ema.update(model)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)

        state.images = (step + 1) * step_images
        state.seconds = time.perf_counter() - started
        state.guard.end()
        if step % 20 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{state.totals.loss / max(state.totals.images, 1):.3f}", lr=f"{lr:.1e}")
        if stop:
            raise Stopped
        folder.save_if_due(state)

    loss, correct, unmixed, images = state.totals
    return dict(
        lr=learning_rate((state.epoch + 1) * steps - 1),
        train_loss=loss / images if images else None,
        train_acc1=100 * correct / unmixed if unmixed else None,
        skipped=state.skipped,
        img_per_s=images / state.seconds if state.seconds else None,
    )


def micro_batches(batches, numbers, prepare, count):
    """The batches of a step, prepared and cut into `count` parts each.

    Yields:
        images (n, 3, H, W), labels (n,), targets (n, classes), weight of their loss in the step's mean, whether they
        are the last.
    """
    for batch, number in zip(batches, numbers):
        whole = prepare(batch, number)
        parts = list(zip(*(tensor.chunk(count) for tensor in whole)))
        for part in parts:
            yield *part, len(part[0]) / len(whole[0]) / len(batches), number == numbers[-1] and part is parts[-1]


def prepare_batch(batch, number, *, size, device, normalise, mixup, seed, teacher=None):
    """Batch `number` of the run on the device, normalised, mixed and resized to (height, width).

    Returns:
        images (N, 3, height, width); labels (N,), -1 for images that were mixed; targets (N, classes), from the labels
        or by the teacher.
    """
    seed_everything(seed, "step", number, device=device)  # Mixup, dropout, drop path: by the batch's number only
    images, labels = (tensor.to(device, non_blocking=True, copy=True) for tensor in batch)  # Mixup works in place
    images, targets = mixup(normalise(images), labels)
    unmixed = targets.gather(1, labels[:, None]).squeeze(1) > 1 - mixup.label_smoothing - 1e-4
    if teacher is not None:  # which sees full size also while START_SIZE makes the images smaller
        targets = teacher(images)
    images = resize(images, size).contiguous(memory_format=choose_layout(device))
    return images, torch.where(unmixed, labels, -1), targets


def resize(images, size):
    """Images (N, 3, H, W) at `size` (height, width)."""
    return images if images.shape[2:] == size else F.interpolate(images, size=size, mode="bilinear", antialias=True)


@torch.no_grad()
def measure(loss, logits, labels):
    """The `Totals` of a micro-batch as a tensor (4,), since fetching them at once would wait for the device."""
    count = torch.full((), float(len(labels)), device=labels.device)  # unlike torch.tensor, without waiting
    return torch.stack([loss.detach() * count, (logits.argmax(1) == labels).sum(), (labels >= 0).sum(), count])


@torch.inference_mode()
def validate(model, loader, size, normalise, amp, description, interrupt=None):
    """One pass over data/val at `size` (height, width); each process takes a part, all get the metrics of the whole.

    Returns:
        (dict: loss, acc1 and acc5 in percent, each weighted by image; true labels; predicted labels).

    Raises:
        Stopped: after a signal such as Ctrl-C.
    """
    if dist.is_initialized():  # all with the batch norm statistics of the first process
        distribute_bn(model, dist.get_world_size())
    model.eval()
    device = next(model.parameters()).device
    loss, labels_seen, top_classes = 0.0, [], []
    for images, labels in Progress(loader, desc=description, unit="batch", leave=False, disable=distributed.rank() > 0):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        images = resize(normalise(images), size).contiguous(memory_format=choose_layout(device))
        with amp():
            logits = model(images)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        labels_seen += labels.tolist()
        top_classes += logits.topk(min(5, logits.shape[1])).indices.tolist()
        # Several processes must take the same number of batches, or they wait for each other forever.
        if interrupt is not None and interrupt.signal and not dist.is_initialized():
            raise Stopped
    losses, labels_seen, top_classes = zip(*distributed.gather((float(loss), labels_seen, top_classes)))
    labels, top_classes = torch.tensor(sum(labels_seen, [])), torch.tensor(sum(top_classes, []))
    hits = top_classes == labels[:, None]  # (images, 5)
    metrics = dict(
        loss=sum(losses) / len(labels),
        acc1=100 * hits[:, 0].float().mean().item(),
        acc5=100 * hits.any(1).float().mean().item(),
    )
    return metrics, labels.tolist(), top_classes[:, 0].tolist()


if __name__ == "__main__":
    run(main, closed_output="ignore", fail=distributed.fail)
