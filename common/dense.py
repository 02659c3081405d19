"""What the dense tasks share, examples/segmentation.py and examples/detection.py: backbone, run folder and epochs.

A script for such a task builds a network around `create_backbone`, a `DenseState` of it and a `DenseFolder`, then
calls `train_one_epoch` with its own loss and `DenseFolder.finish_epoch` with its own metrics:

    with DenseFolder(OUTPUT, arch, RESUME, SAVE_MINUTES, "segmentation", "miou", "mean IoU / %") as folder:
        checkpoint = folder.load(arch, OPTIMIZER, build)
        state = DenseState(model, ema, optimizer, scaler)
        folder.begin(about, checkpoint, state, img_size, EPOCHS)
        with Interrupt() as interrupt, folder.saved_on_error(state):
            while state.epoch < EPOCHS:
                metrics = train_one_epoch(state, loader, compute_loss, ...)
                results = validate(state.network())     # of the script: {"miou": ..., "loss": ...}, or {}
                folder.finish_epoch(state, metrics, results, seconds)

Checkpoints, resuming to the same bits, interrupts and failures are those of train.py, see common/run_folder.py.
"""

import math
import platform
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from common.checkpoint import REMEDY, load_checkpoint, load_newest
from common.checkpoint_check import COUNTERS, UNIREPLKNET_ARGS, check_arch, check_both_weights, check_history
from common.checkpoint_check import check_optimizer, check_settings
from common.clock import Clock
from common.dataset import EpochBatches, SeededImages, seed_everything
from common.faults import Stopped, skip_step
from common.file_checks import NORMALISATION, check_fields, check_keys, check_kind, check_names, naming
from common.files import write_csv, write_json
from common.loading import Loader
from common.manifest import fingerprint_sorted
from common.network import load_pretrained
from common.options import ConstantError, UserError
from common.plots import plot_curve
from common.progress import Progress
from common.run_folder import RESUMED, RunFolder, Totals, TrainingState, describe_changes, set_aside
from common.schedule import ImageSizes
from models import UniRepLKNet, depthwise_choice  # noqa: F401  which registers the variants with timm

STRIDES = [4, 8, 16, 32]
REQUIRED = ("task", "arch", "model_args", "state_dict", "classes", "mean", "std", "config")  # keys of a checkpoint
NOT_FINITE = 'lower LEARNING_RATE, set CLIP_GRAD above 0, or set AMP to "off"'

# --- backbone


def check_backbone(arch):
    """ConstantError unless timm has a network `arch` with maps of `STRIDES` for images of any size."""
    try:
        with torch.device("meta"):
            maps = create_backbone(arch, {})(torch.zeros(1, 3, 96, 160))
        fits = [tuple(features.shape[2:]) for features in maps] == [(96 // s, 160 // s) for s in STRIDES]
    except Exception:  # unknown, or no backbone: timm refuses in many ways
        fits = False
    if not fits:
        raise ConstantError(
            f"MODEL must be a timm model with feature maps of strides 4, 8, 16 and 32, such as 'unireplknet_a', "
            f"got {arch!r}"
        )


def backbone_args(arch, layer_scale):
    """Arguments of timm that build `arch` for training from scratch or fine-tuning, as train.py sets them.

    Args:
        arch: plain name of a network.
        layer_scale: initial layer scale of each block of a UniRepLKNet; 0: none.
    """
    if not arch.startswith("unireplknet"):
        return {}
    return dict(layer_scale_init_value=layer_scale, published_arithmetic=0 < layer_scale < 0.01)


def create_backbone(arch, model_args, drop_path=0.0, weights=None):
    """A network of timm as a function of images that returns its feature maps of `STRIDES`.

    Args:
        arch: plain name of the network.
        model_args: see `backbone_args`.
        drop_path: stochastic depth rate of the last block; 0: off.
        weights: from `common.network.read_weights`, or None: random ones.

    Returns:
        timm's `FeatureGetterNet`: images (N, 3, H, W) -> [maps (N, channels[i], ceil(H / s), ceil(W / s)), ...];
        channels are `feature_info.channels()`.

    Raises:
        UserError: if the weights are of another network, or it has no stochastic depth.
    """
    with torch.device("meta"):
        strides = [stage["reduction"] for stage in timm.create_model(arch).feature_info]
    # Of several maps with one stride the last one, which is the deepest.
    places = [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES]
    arguments = model_args | (dict(drop_path_rate=drop_path) if drop_path else {})
    try:
        backbone = timm.create_model(arch, features_only=True, feature_cls="getter", out_indices=places, **arguments)
    except TypeError as error:
        raise UserError(f"{arch} has no stochastic depth; set DROP_PATH to 0 ({error})") from error
    if weights is not None:
        network = timm.create_model(arch, **model_args)
        print(f"pretrained  {load_pretrained(network, weights, None)}")
        backbone.model.load_state_dict({name: network.state_dict()[name] for name in backbone.model.state_dict()})
    return backbone


def choose_normalisation(weights):
    """(mean, std) of pixels from 0 to 1, lists of three: as pretrained weights expect, else ImageNet's."""
    expected = {} if weights is None else weights["expected"]
    default = dict(MEAN=list(IMAGENET_DEFAULT_MEAN), STD=list(IMAGENET_DEFAULT_STD))
    return [list(expected.get(name) or default[name]) for name in ("MEAN", "STD")]


# --- a run


@dataclass
class DenseState(TrainingState):
    """All that changes during training; see `TrainingState`.

    Args:
        model: the network.
        ema: a `ModelEma` of it, or None.
        optimizer: from `common.optimizer.create_optimizer`.
        scaler: a `torch.amp.GradScaler`, which fp16 needs.
    """

    best_metric: float = -1.0  # highest value of the metric that chooses best.pth; -1: none yet
    best_epoch: int = 0  # from 1; 0: none yet

    COUNTERS = {name: name for name in ("epoch", "totals", "seconds", "skipped", "skipped_in_a_row", "history")}
    COUNTERS |= dict(images="pictures", best_metric="best_metric", best_epoch="best_epoch")

    def network(self):
        """The network that is validated and used for predictions: the EMA's, if there is one."""
        return self.model if self.ema is None else self.ema.ema

    def to_checkpoint(self):
        content = super().to_checkpoint()
        del content["img_size"]  # such networks take any
        return content


def choose_kernels(model, img_size, batch_size, steps, amp_dtype, checkpoint):
    """Measure how the large-kernel convolutions of the training images are computed fastest here, and print it.

    Args:
        model: the network, on its device; one without large kernels is left alone.
        img_size: (height, width) of the training images.
        batch_size, steps: of the whole run.
        amp_dtype: of autocast, or None.
        checkpoint: of the run that is resumed, which goes on as it began, or None.

    Returns:
        What the checkpoints hold of it, as "convolutions".
    """
    choice = depthwise_choice.choose_convolutions(
        model,
        [depthwise_choice.Use(tuple(img_size), batch_size, steps, training=True)],
        dtype=amp_dtype or torch.float32,
        stored=None if checkpoint is None else checkpoint.get("convolutions", {}),
    )
    if choice.line:
        print(f"kernels     {choice.line}")
    return choice.record


def describe_dense_run(*, task, arch, model_args, classes, mean, std, config, train_names, val_names, device, amp_dtype,
                       **others):  # fmt: skip
    """What every checkpoint of a run holds besides its state.

    Args:
        task: "segmentation" or "detection".
        arch, model_args: of the backbone.
        classes: names.
        mean, std: see `choose_normalisation`.
        config: {constant: value}, from `common.options.current_values`.
        train_names, val_names: of the images, in their order.
        device, amp_dtype: how and where it is computed.
        others: what the task needs besides, plain types; its `check` must know them.
    """
    return dict(
        task=task,
        arch=arch,
        model_args=model_args,
        classes=list(classes),
        mean=list(mean),
        std=list(std),
        config=config,
        pictures_train=len(train_names),
        pictures_fingerprint=fingerprint_sorted(train_names),
        images_val=len(val_names),
        val_fingerprint=fingerprint_sorted(val_names),
        versions=dict(
            python=platform.python_version(),
            torch=str(torch.__version__),
            torchvision=str(torchvision.__version__),
            timm=timm.__version__,
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            precision="float32" if amp_dtype is None else f"autocast {str(amp_dtype).removeprefix('torch.')}",
        ),
        **others,
    )


class DenseFolder(RunFolder):
    """The folder of one run, OUTPUT/<name>, locked inside `with DenseFolder(...) as folder`.

    It gets last.pth, last.1.pth, best.pth, log.csv, result.json, loss.png and <metric>.png.

    Args:
        output, name, resume, save_minutes: see `RunFolder`.
        task: "segmentation" or "detection", which checkpoints must be of.
        metric: key of the validation result that chooses best.pth, such as "miou"; higher is better.
        quantity: what it is called in the plot, such as "mean IoU / %".
    """

    def __init__(self, output, name, resume, save_minutes, task, metric, quantity):
        super().__init__(output, name, resume, save_minutes)
        self.task = task
        self.metric = metric
        self.quantity = quantity

    def load(self, arch, optimizer, build, check=lambda checkpoint: None):
        """The checkpoint to resume, the newest one that is intact; None for a new run.

        Args:
            arch, optimizer: of this run, which must be those of the checkpoint.
            build, check: see `check_dense`.

        Raises:
            UserError: if it is damaged, of another kind, or of another network or optimizer.
        """
        checkpoint, path = None, Path(self.resume)
        check = partial(check_dense, task=self.task, build=build, check=check)
        if self.resume == "auto":
            checkpoint, path = load_newest(self.path / "last.pth", REQUIRED, check)
        elif self.resume:
            checkpoint = load_checkpoint(path, REQUIRED, check)
        self.resumed = path
        if checkpoint is None:
            return None
        with naming(path, REMEDY):
            check_fields(checkpoint, RESUMED)
        self.refuse(path, "MODEL", arch, checkpoint["arch"])
        self.refuse(path, "OPTIMIZER", optimizer, checkpoint["config"].get("OPTIMIZER", optimizer))
        started = f", {checkpoint['pictures']} images of the next" if checkpoint.get("pictures") else ""
        print(f"resume      {path}: {checkpoint['epoch']} epochs finished{started}")
        return checkpoint

    def begin(self, about, checkpoint, state, img_size, epochs):
        """Make the folder, renaming that of another run, and take up the state of the run that is resumed.

        Args:
            about: from `describe_dense_run`.
            checkpoint: what `load` returned; what differs from it is printed.
            state: the `DenseState`, changed in place.
            img_size: (height, width) of the training images, by whose area the time that is left is estimated.
            epochs: of the whole run.
        """
        self.about = about
        self.clock = Clock(about, ImageSizes(epochs, img_size), state_device(state).type)
        self.clock.hinted = True  # its hint names options of train.py
        if checkpoint is not None:
            self.refuse(self.resume, "the classes", about["classes"], checkpoint["classes"])
        here = self.resume == "auto" or self.resume and Path(self.resume).resolve().parent == self.path.resolve()
        if not here:
            set_aside(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None:
            describe_changes(checkpoint, about)
            state.load(checkpoint, self.resumed)
            if checkpoint.get("val_fingerprint", about["val_fingerprint"]) != about["val_fingerprint"]:
                print(f"changed     the validation images are others: the best {self.metric} starts anew")
                state.best_metric, state.best_epoch = -1.0, 0

    def finish_epoch(self, state, metrics, results, seconds):
        """Add an epoch to the history, and write its files.

        Args:
            state: changed in place.
            metrics: what `train_one_epoch` returned.
            results: {name: number} of the validation of `state.network()`, which become the columns val_<name>; {}:
                this epoch was not validated.
            seconds: that the validation took.

        Returns:
            The row of log.csv.
        """
        row = dict(epoch=state.epoch + 1) | metrics | {f"val_{name}": value for name, value in results.items()}
        row["seconds"] = state.seconds + seconds
        metric = results.get(self.metric)
        is_best = metric is not None and math.isfinite(metric)
        is_best = is_best and (metric > state.best_metric or not (self.path / "best.pth").is_file())
        if is_best:
            state.best_metric, state.best_epoch = metric, state.epoch + 1
        state.history.append(row)
        state.epoch += 1
        state.start_epoch()
        # best.pth first: a run that is killed in between repeats this epoch and finds it the best again.
        if is_best:
            self.save(state, "best.pth")
        self.save_last(state)
        print(self.format_row(row))
        self.clock.finish_epoch(state, row)
        self.write_side_files(state)
        return row

    def best_path(self):
        """Path of the checkpoint to evaluate in the end: best.pth, or last.pth if a run was continued elsewhere and has
        not been validated since."""
        return next(path for path in (self.path / "best.pth", self.path / "last.pth") if path.is_file())

    def write_side_files(self, state):
        """Write all files but the checkpoints."""

        def write(name, function, *arguments):
            self.side_files.write(self.path / name, function, *arguments)

        if state.best_epoch:
            about = {name: self.about[name] for name in ("task", "arch", "classes", "config", "versions")}
            result = about | state.history[state.best_epoch - 1]
            write("result.json", write_json, self.path / "result.json", result)
        if state.history:
            write("log.csv", write_csv, self.path / "log.csv", state.history, "utf-8")
            for name, quantity in (("loss", "loss"), (self.metric, self.quantity)):
                if any(row.get(f"{prefix}_{name}") is not None for row in state.history for prefix in ("train", "val")):
                    path = self.path / f"{name}.png"
                    write(path.name, plot_curve, state.history, name, quantity, path)

    def print_history(self, state):
        """Print the header of the table and the epochs before this start, whose files are written again."""
        self.write_side_files(state)
        for row in [None, *state.history]:
            print(self.format_row(row))

    def format_row(self, row):
        """One line for one epoch; the header for None."""
        columns = [("epoch", "5d"), ("lr", "9.2e"), ("train_loss", "10.4f"), ("val_loss", "8.4f")]
        columns += [(f"val_{self.metric}", f"{max(8, len(self.metric) + 4)}.2f"), ("img_per_s", "9.1f")]
        columns += [("seconds", "7.1f")]
        if row is None:
            return "  ".join(f"{name:>{spec[:-1].split('.')[0]}}" for name, spec in columns)
        cells = [("-" if row.get(name) is None else format(row[name], spec), spec) for name, spec in columns]
        return "  ".join(f"{cell:>{spec[:-1].split('.')[0]}}" for cell, spec in cells)


def state_device(state):
    """The `torch.device` of a run's network."""
    return next(state.model.parameters()).device


def create_train_loader(dataset, batch_size, seed, workers, collate=None, what="training images"):
    """The loader of training batches, whose order and augmentation depend on (seed, epoch, index) only.

    Args:
        dataset: what it returns for an index may depend on random, NumPy and PyTorch, which are seeded before.
        batch_size: images; a last, smaller batch is dropped, in each epoch with other images.
        workers: processes that load images.
        collate: function of a list of items; None: PyTorch's.
        what: is read, for messages.

    Raises:
        UserError: if there is no image.
    """
    if not len(dataset):
        raise UserError(f"there are no {what}")
    fits = min(batch_size, len(dataset))
    if fits < batch_size:
        print(f"batch size  {fits}, since there are {len(dataset)} training images (BATCH_SIZE is {batch_size})")
    loading = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=torch.cuda.is_available())
    batches = EpochBatches(len(dataset), fits, seed)
    return Loader(SeededImages(dataset, seed), batch_sampler=batches, collate_fn=collate, what=what, **loading)


def train_one_epoch(
    state, loader, compute_loss, learning_rate, amp, *, clip_grad, seed, description, interrupt, folder
):  # fmt: skip
    """One pass over the training images, or the rest of it in a run that is resumed.

    Args:
        state: the `DenseState`, changed in place.
        loader: from `create_train_loader`.
        compute_loss: function (model, batch of the loader) -> scalar; it copies the batch to the device. It is called
            in training mode, inside `amp`, with all random generators seeded by the number of the step.
        learning_rate: function of the step, from 0 over the whole run.
        amp: function that returns the autocast context.
        clip_grad: maximum gradient norm; 0: off.
        seed: of the run.
        description: for the progress bar.
        interrupt: the `common.faults.Interrupt` that is obeyed between two steps.
        folder: the `DenseFolder`, which saves now and then.

    Returns:
        dict: lr of the last step, train_loss, number of skipped steps, img_per_s.

    Raises:
        Stopped: after a signal such as Ctrl-C; what was trained is in `state`.
        UserError: if too many steps in a row have no finite loss and gradient.
    """
    model, sampler, device = state.model, loader.batch_sampler, state_device(state)
    model.train()
    steps = len(loader)
    first_step = min(state.images // sampler.batch_size, steps)
    sampler.epoch, sampler.start = state.epoch + 1, first_step
    reader = iter(loader)
    started = time.perf_counter() - state.seconds
    bar = Progress(
        range(first_step, steps), desc=description, unit="step", total=steps, initial=first_step, leave=False
    )
    for step in bar:
        batch, number = next(reader), state.epoch * steps + step
        lr = learning_rate(number)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        seed_everything(seed, "step", number, device=device)  # dropout, drop path, sampling: by the step only
        state.guard.begin()
        with amp():
            loss = compute_loss(model, batch)
        state.scaler.scale(loss).backward()
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)
        value, bad_gradient = loss.item(), not norm.isfinite().item()
        # fp16's scaler looks for the largest scale by going too far now and then, and skips such a step by itself.
        searching = bad_gradient and state.scaler.get_scale() > 1
        if not math.isfinite(value) or bad_gradient and not searching:
            state.guard.undo()
            skip_step(state, "loss" if not math.isfinite(value) else "gradient", step, lambda: NOT_FINITE, bar)
        else:
            count = sampler.batch_size
            state.totals = state.totals.plus(Totals(loss=value * count, images=float(count)))
            state.guard.change()
            state.scaler.step(state.optimizer)
            if not bad_gradient:
                state.skipped_in_a_row = 0
                if state.ema is not None:
                    state.ema.update(model)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.images = (step + 1) * sampler.batch_size
        state.seconds = time.perf_counter() - started
        state.guard.end()
        if step % 20 == 0 or step == steps - 1:
            bar.set_postfix(loss=f"{state.totals.loss / max(state.totals.images, 1):.3f}", lr=f"{lr:.1e}")
        if interrupt.signal is not None:
            raise Stopped
        folder.save_if_due(state)
    images = state.totals.images
    return dict(
        lr=learning_rate((state.epoch + 1) * steps - 1),
        train_loss=state.totals.loss / images if images else None,
        skipped=state.skipped,
        img_per_s=images / state.seconds if state.seconds else None,
    )


# --- checkpoints


def check_dense(checkpoint, task, build, check=lambda checkpoint: None):
    """ValueError unless this can be a checkpoint of a dense task; its keys are `REQUIRED`.

    Args:
        checkpoint: dict.
        task: "segmentation" or "detection".
        build: function of a checkpoint -> the network without its weights; called under `torch.device("meta")`.
        check: function of the checkpoint that checks first what `build` reads besides arch, model_args and classes;
            ValueError if it cannot be used.
    """
    if checkpoint["task"] != task:
        raise ValueError(f"its task must be {task!r}, got {checkpoint['task']!r:.40}")
    check_arch(checkpoint["arch"])
    known = UNIREPLKNET_ARGS if checkpoint["arch"].startswith("unireplknet") else {}
    check_keys(checkpoint["model_args"], known, "its model_args")
    for key, value in checkpoint["model_args"].items():
        check_kind(value, known[key], f"its model_args' {key}")
    check_names(checkpoint["classes"], "its classes")
    check_fields(checkpoint, NORMALISATION)
    for key, kind in (COUNTERS | dict(best_metric=float, best_epoch=COUNTERS["epoch"])).items():
        if key in checkpoint:
            check_kind(checkpoint[key], kind, f"its {key}")
    check_history(checkpoint.get("history", []))
    for name in ("config", "versions"):
        check_settings(checkpoint.get(name, {}), f"its {name}")
    check_optimizer(checkpoint)
    check(checkpoint)
    try:
        with torch.device("meta"):
            network = build(checkpoint)
    except Exception as error:  # sizes that do not fit together; timm's networks refuse in many ways
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"its network cannot be built ({reason})") from error
    check_both_weights(checkpoint, network)


def load_dense(path, task, build, check=lambda checkpoint: None):
    """Read a checkpoint of a dense task, for predictions; UserError if it is damaged or of another kind."""
    return load_checkpoint(path, REQUIRED, partial(check_dense, task=task, build=build, check=check))


def find_dense(path, output):
    """Path of the checkpoint to use: `path`; for "" the newest best.pth in a folder of `output`.

    Raises:
        UserError: if there is none.
    """
    if path:
        return Path(path)
    found = sorted(Path(output).glob("*/best.pth"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise UserError(f"there is no {output}/*/best.pth; train first, or give one with --checkpoint")
    return found[-1]


def build_dense(checkpoint, build, device, merge=True):
    """The network of a checkpoint with its EMA weights, or the raw ones where there are none, in eval mode.

    Args:
        checkpoint: from `load_dense`.
        build: see `check_dense`.
        device: a `torch.device`.
        merge: True gives the inference structure, which computes the same faster.
    """
    model = build(checkpoint)
    model.load_state_dict(checkpoint.get("state_dict_ema") or checkpoint["state_dict"])
    model = model.eval()
    return (timm.utils.reparameterize_model(model) if merge else model).to(device)
