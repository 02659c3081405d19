"""The folder of a run, checkpoints/<model>: one run at a time, nothing of an earlier run lost, everything to resume.

    last.pth, last.1.pth         the newest checkpoints, each with all that a resumed run needs
    best.pth                     the checkpoint of the epoch with the highest validation accuracy
    log.csv, loss.png, acc.png   one row for each epoch, and learning curves
    result.json, classification_report.txt   metrics of the best epoch
    class_indices.json           number and name of each class

What a run needs is saved first, as .pth files. The others are for people: one that cannot be written ends nothing, and
all of them are written again after the next epoch and at the next start, from what the checkpoints hold.
"""

import contextlib
import math
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torchvision

from common import distributed
from common.agreement import ON_CONSTANTS, ON_DATA, constant_facts, data_facts
from common.augment import CUTOUT_ERROR
from common.checkpoint import SaveError, check_finite, earlier_checkpoint, load_checkpoint, load_file, load_newest
from common.checkpoint import save_checkpoint
from common.dataset import height_and_width
from common.device import choose_amp
from common.faults import Diverged, StepGuard
from common.file_checks import check_fields, naming
from common.files import SideFiles, write_csv, write_json, write_text
from common.fingerprints import describe_change
from common.gpu import find_triton_remedy
from common.locks import hold_lock
from common.manifest import fingerprint_sorted
from common.options import UserError
from common.plots import plot_curves
from common.renamed import FORMER_CONSTANTS, upgrade_config
from ema import ModelEma
from models import describe_implementation

# What a checkpoint needs to be resumed, besides what any has; common/checkpoint_check.py knows what the values may be.
RESUMED = dict(optimizer=dict, scaler=dict, epoch=int, ema_updates=int, history=list)

IMBALANCE = 10  # ratio of the largest class to the smallest one from which on it is printed
KEEP = 2  # newest checkpoints that are kept; one that is damaged is skipped when a run is resumed

# --- what a constant that was changed does to a run that is resumed
NO_EFFECT = ("DATA", "CACHE_GB", "WORKERS", "OUTPUT", "RESUME", "SAVE_MINUTES", "WAIT_MINUTES", "TENSORBOARD")
ONLY_AT_THE_START = ("PRETRAINED", "LAYER_SCALE")
MAY_DIFFER = (*NO_EFFECT, "DEVICE")  # among the processes of one run


class Totals(NamedTuple):
    """Sums over images of an epoch; `correct` counts among the `unmixed` ones."""

    loss: float = 0.0
    correct: float = 0.0
    unmixed: float = 0.0
    images: float = 0.0

    def plus(self, other):
        return Totals(*(mine + theirs for mine, theirs in zip(self, other)))


@dataclass
class TrainingState:
    """All that changes during training. A checkpoint holds all of it, and nothing else is needed to resume: order and
    augmentation of the images, Mixup and stochastic depth follow from seed, epoch and batch."""

    model: torch.nn.Module
    ema: ModelEma | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0  # finished epochs
    images: int = 0  # images of the next epoch that are done, on all processes
    totals: Totals = Totals()  # of these images
    seconds: float = 0.0  # that they took
    skipped: int = 0  # steps of this epoch without a finite loss and gradient, which were not taken
    skipped_in_a_row: int = 0
    micro_batches: int = 1  # parts in which each batch is computed, more than one after memory ran out
    best_acc1: float = -1.0
    best_size: int | list = 0  # image size at which it was measured, as in `img_size`
    best: dict | None = None  # the epoch that best.pth is of: `result`, and `cells` of the confusion matrix
    history: list = field(default_factory=list)  # one dict for each finished epoch
    img_size: int | list = 0  # at which the weights are validated: one number for a square, or [height, width]

    # attribute -> key of a checkpoint
    COUNTERS = dict(
        epoch="epoch",
        images="pictures",
        totals="totals",
        seconds="seconds",
        skipped="skipped",
        skipped_in_a_row="skipped_in_a_row",
        micro_batches="pieces",
        best_acc1="best_acc1",
        best_size="best_size",
        best="best",
        history="history",
    )

    def __post_init__(self):
        self.guard = StepGuard(self, ("totals", "skipped", "skipped_in_a_row", "micro_batches"))

    def start_epoch(self):
        self.images, self.totals, self.seconds, self.skipped = 0, Totals(), 0.0, 0

    def out_of_patience(self, patience):
        """Whether the last `patience` epochs, 0 for any number, brought no new best accuracy; says so where they did
        not."""
        stale = 0 if self.best is None else self.epoch - self.best["result"]["epoch"]
        if not patience or stale < patience:
            return False
        print(f"no new best accuracy for {stale} epochs, so the run ends after {self.epoch} (PATIENCE {patience})")
        return True

    def networks(self):
        """{prefix in log.csv: network to validate}; the last one is what test.py uses."""
        return dict(val=self.model) | ({} if self.ema is None else dict(ema=self.ema.ema))

    def to_checkpoint(self):
        """What a checkpoint holds: plain types and tensors."""
        counters = {key: getattr(self, name) for name, key in self.COUNTERS.items()}
        return dict(
            state_dict=self.model.state_dict(),
            state_dict_ema=None if self.ema is None else self.ema.ema.state_dict(),
            ema_updates=0 if self.ema is None else self.ema.updates,
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            img_size=self.img_size,
            **counters | dict(totals=list(self.totals)),
        )

    def load(self, checkpoint, path):
        """Resume from a checkpoint, which is that of `path`.

        Raises:
            UserError: if its optimizer has other groups of parameters, or a state that is not that of this network.
        """
        # The groups' settings are those of this run; lr is not one of them, but what the last step used.
        settings = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        expected = rehearse(self.optimizer)
        self.model.load_state_dict(checkpoint["state_dict"])
        if self.ema is not None:
            self.ema.load(checkpoint.get("state_dict_ema") or checkpoint["state_dict"], checkpoint["ema_updates"])
        for group, own in zip(checkpoint["optimizer"]["param_groups"], settings):
            if "fused" in own:
                group["fused"] = own["fused"]  # which decides where a step's number is kept
            if "gram" in own:
                own["gram"] = group.get("gram", False)  # how the run was begun, to the same bits
        try:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except ValueError as error:
            raise UserError(
                "cannot resume: LAYER_DECAY (which depends on PRETRAINED), or WEIGHT_DECAY to or from 0, changes the "
                "groups of parameters; set them back"
            ) from error
        with naming(path, "resume another checkpoint, or set PRETRAINED to this one"):
            check_state(self.optimizer.state_dict()["state"], expected)
        for group, own in zip(self.optimizer.param_groups, settings):
            group.update(own)
        if checkpoint.get("scaler"):  # empty without fp16
            self.scaler.load_state_dict(checkpoint["scaler"])
        checkpoint = dict(best_size=checkpoint.get("img_size", 0)) | checkpoint  # which earlier versions did not save
        for name, key in self.COUNTERS.items():
            setattr(self, name, checkpoint.get(key, getattr(self, name)))
        self.totals = Totals(*self.totals)


def rehearse(optimizer):
    """What the state of an optimizer looks like after a step, found out by one whose results are thrown away.

    Args:
        optimizer: not used yet; its state and the weights are to be loaded afterwards.

    Returns:
        {number of a parameter: {name: shape, or () for a number}}; None if this optimizer takes no such step.
    """
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except Exception:  # some need more than gradients, and each fails in its own way; then the check is left out
        return None
    finally:
        optimizer.zero_grad(set_to_none=True)
    return {number: shapes(state) for number, state in optimizer.state_dict()["state"].items()}


def shapes(state):
    """{name: shape} of what an optimizer keeps for one parameter; () for a number, which may be a tensor."""
    return {name: tuple(value.shape) if torch.is_tensor(value) else () for name, value in state.items()}


def check_state(states, expected):
    """ValueError unless the states of an optimizer are as `rehearse` found; those of frozen parameters are missing."""
    for number, state in states.items() if expected is not None else ():
        if shapes(state) != expected.get(number):
            raise ValueError(f"its optimizer's state {number} is not that of this network")


def set_aside(folder):
    """Rename the folder of an earlier run, unless it is empty, so that nothing is lost."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        number = next(n for n in range(1, 10**6) if not Path(f"{folder}.{n}").exists())
        print(f"the earlier run in {folder} is now in {folder.rename(f'{folder}.{number}')}")


def lock(folder):
    """Keep other processes from training in `folder`: a context; UserError if another one does."""
    refusal = f"another run is training in {folder}; wait for it, end it, or set OUTPUT to another folder"
    # Beside the folder, which may be renamed while it is held.
    return hold_lock(f"{folder}.lock", refusal)


class RunFolder(contextlib.ExitStack):
    """The folder of one run of train.py, locked inside `with RunFolder(...) as folder`; only one process writes.

    Args:
        output: folder that holds <model>/.
        model: name of the network.
        resume: "": a new run; "auto": continue last.pth if there is one; a path: continue that checkpoint.
        save_minutes: minutes between checkpoints inside an epoch; 0: none there.
    """

    def __init__(self, output, model, resume, save_minutes):
        super().__init__()
        self.path = Path(output, model)
        self.resume = resume
        self.save_seconds = 60 * save_minutes or math.inf
        self.saved = time.perf_counter()
        self.resumed = Path(resume)  # path of the checkpoint that is resumed
        self.about = {}  # what every checkpoint holds besides the state
        self.side_files = SideFiles("training goes on, and it is written after a later epoch or at the next start")
        self.progress = None  # epochs and images of the next one that the last checkpoint holds
        self.writes = distributed.rank() == 0

    def __enter__(self):
        if self.writes:
            self.enter_context(lock(self.path))
        return super().__enter__()

    def load(self, config, device):
        """The checkpoint to resume, the newest one that is intact; None for a new run.

        All processes agree on the constants first. Then the first one reads the checkpoint, and the others get it.

        Args:
            config: {constant: value}.
            device: the `torch.device` of this process.

        Raises:
            UserError: if it is damaged, holds no optimizer state, or is of another network or optimizer.
        """
        distributed.agree(constant_facts(config, MAY_DIFFER, device), ON_CONSTANTS)
        self.refuse_to_forget(distributed.gather((distributed.host_name(), self.newest())))
        return distributed.from_first(self.read, config["MODEL"], config["OPTIMIZER"])

    def newest(self):
        """The checkpoint that "auto" would resume, as this process sees it; "" if there is none."""
        files = sorted(self.path.glob("last*.pth"), reverse=True) if self.resume == "auto" else []
        return str(files[0]) if files else ""

    def refuse_to_forget(self, reports):
        """UserError if the first process, which decides what is resumed, lacks a checkpoint that another one has.

        Args:
            reports: (host, its path or "") of each process.
        """
        first, path = reports[0]
        host, elsewhere = next((report for report in reports if report[1]), ("", ""))
        if elsewhere and not path:
            raise UserError(
                f"{elsewhere} is on {host}, but not on {first}, which leads this run and would begin a new one; copy "
                "it there, set OUTPUT to a folder on a common disk, or omit --resume"
            )

    def read(self, arch, optimizer):
        """`load` for the first process."""
        checkpoint, path = None, Path(self.resume)
        if self.resume == "auto":
            checkpoint, path = load_newest(self.path / "last.pth")
        elif self.resume:
            checkpoint = load_checkpoint(path)
        self.resumed = path
        if checkpoint is None:
            return None
        if "optimizer" not in checkpoint:
            raise UserError(f"{path} holds no optimizer state, so it cannot be resumed; set PRETRAINED to it instead")
        with naming(path, "resume another checkpoint, or set PRETRAINED to this one"):
            check_fields(checkpoint, RESUMED)
        checkpoint["config"] = upgrade_config(checkpoint.get("config", {}))
        self.refuse(path, "MODEL", arch, checkpoint["arch"])
        self.refuse(path, "OPTIMIZER", optimizer, checkpoint["config"].get("OPTIMIZER", "adamw"))
        started = f", {checkpoint['pictures']} images of the next" if checkpoint.get("pictures") else ""
        print(f"resume      {path}: {checkpoint['epoch']} epochs finished{started}")
        return checkpoint

    def refuse(self, path, name, here, there):
        """UserError unless the checkpoint's value is that of this run."""
        if here != there:
            raise UserError(f"cannot resume {path}: {name} there is {there}, here {here}")

    def begin(self, about, checkpoint, clock):
        """Make the folder, renaming that of another run.

        All processes agree on the data first.

        Args:
            about: what checkpoints hold besides the state.
            checkpoint: of the run that is resumed; what differs from it is printed. Where its best accuracy was
                measured on other images, it is taken out.
            clock: the run's `common.clock.Clock`.
        """
        self.about, self.clock = about, clock
        distributed.agree(data_facts(about), ON_DATA)
        if checkpoint is not None:
            self.refuse(self.resume, "the classes", about["classes"], checkpoint["classes"])
            self.refuse(self.resume, "how spectrograms are made", about.get("sound"), checkpoint.get("sound"))
            self.refuse(self.resume, "VALUE_RANGE", about.get("value_range"), checkpoint.get("value_range"))
        if self.writes:
            here = self.resume == "auto" or self.resume and Path(self.resume).resolve().parent == self.path.resolve()
            if not here:
                set_aside(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
        if checkpoint is not None and describe_changes(checkpoint, about):
            checkpoint |= dict(best_acc1=-1.0, best_size=0, best=None)

    def save(self, state, name, keep=1):
        """Write a checkpoint, unless its weights are not finite: then the one before is the better one."""
        content = state.to_checkpoint()
        check_finite(content["state_dict"], content["state_dict_ema"] or {})
        save_checkpoint(self.about | content, self.path / name, keep)

    def save_last(self, state):
        """Write last.pth; the one before becomes last.1.pth."""
        if self.writes:
            with distributed.saving:
                self.save(state, "last.pth", KEEP)
        self.saved, self.progress = time.perf_counter(), (state.epoch, state.images)

    @contextlib.contextmanager
    def saved_on_error(self, state):
        """Inside this context an error of any kind is raised only after what was trained before it is saved.

        Not where the run diverges, since the checkpoint before is the better one, nor where saving is what failed.
        """
        self.progress = state.epoch, state.images
        self.clock.begin(state)
        try:
            yield
        except (Diverged, SaveError):
            raise
        except Exception:  # of any kind: it is raised again, so nothing is hidden
            self.save_after_error(state)
            raise

    def save_after_error(self, state):
        """Save the state as it was before the step that failed, if that is possible and newer than what is saved."""
        if self.progress == (state.epoch, state.images):
            if self.progress > (0, 0):
                print(f"an error ends the run in epoch {state.epoch + 1}; it is saved, and resumed by --resume auto")
            return
        try:
            if state.guard.restore():
                self.save_last(state)
                print(f"an error ends the run in epoch {state.epoch + 1}; it is saved, and resumed by --resume auto")
            else:
                print("an error ends the run while the weights change, so nothing is saved; --resume auto goes back")
        except Exception as error:  # which must not hide the one that is raised
            print(f"an error ends the run, and it cannot be saved ({error})")

    def save_if_due(self, state):
        """`save_last` if the last checkpoint is older than `save_minutes`; says how long the run will take."""
        if self.writes:
            self.clock.look(state)
        if time.perf_counter() - self.saved >= self.save_seconds:
            self.save_last(state)

    def finish_epoch(self, state, metrics, validation, validation_seconds, last_size):
        """Add an epoch to the history, and write its files.

        Args:
            state: changed in place.
            metrics: what train.py's `train_one_epoch` returned.
            validation: {prefix: what `validate` returned} for each of `state.networks`.
            validation_seconds: how long that took.
            last_size: image size at which the weights are validated in the last epoch, as in `img_size`.

        Returns:
            The row of log.csv.
        """
        row = dict(epoch=state.epoch + 1) | metrics
        for prefix, (results, _, _) in validation.items():
            row |= {f"{prefix}_{name}": value for name, value in results.items()}
        row["seconds"] = state.seconds + validation_seconds
        # The last ones are those of the weights that test.py uses: the EMA's, if there is one.
        results, labels, predictions = validation[prefix]
        is_best = self.is_best(state, results, last_size)
        if is_best and self.writes and state.best_acc1 < 0:
            self.set_best_aside()
        if is_best:
            best = dict(result=self.describe_epoch(state, results, len(labels)), cells=count_cells(labels, predictions))
            state.best, state.best_acc1, state.best_size = best, results["acc1"], state.img_size
        state.history.append(row)
        state.epoch += 1
        state.start_epoch()
        # First what cannot be made again; best.pth before last.pth, since a run that is killed in between repeats this
        # epoch and finds it the best again.
        if self.writes and is_best:
            self.save(state, "best.pth")
        self.save_last(state)
        print(format_row(row, state.ema is not None))
        if self.writes:
            self.clock.finish_epoch(state, row)
        self.write_side_files(state)
        return row

    def is_best(self, state, results, last_size):
        """Whether the epoch just validated is the best. Accuracies at different image sizes are not compared: the last
        size counts, before it the larger one."""
        size, best, last = map(to_area, (state.img_size, state.best_size, last_size))
        better = results["acc1"] > state.best_acc1 if size == best else size == last or (size > best and best != last)
        return (better or not (self.path / "best.pth").is_file()) and math.isfinite(results["loss"])

    def set_best_aside(self):
        """Rename best.pth and what belongs to it, if it is there and was chosen by other validation images."""
        path = self.path / "best.pth"
        if not path.is_file():
            return
        with contextlib.suppress(UserError, KeyError, TypeError):  # damaged, or of an earlier version: renamed, too
            if load_file(path)["data"]["val"]["by_class"] == self.about["data"]["val"]["by_class"]:
                return
        number = next(n for n in range(1, 10**6) if not earlier_checkpoint(path, n).exists())
        for name in ("best.pth", "result.json", "classification_report.txt"):
            if (self.path / name).is_file():
                (self.path / name).rename(earlier_checkpoint(self.path / name, number))
        print(f"the best checkpoint on the earlier validation images is now {earlier_checkpoint(path, number)}")

    def describe_epoch(self, state, results, val_images):
        """Content of result.json for the epoch that was just validated."""
        about = self.about
        result = dict(arch=about["arch"], epoch=state.epoch + 1, **results)
        result |= dict(weights="raw" if state.ema is None else "ema")
        result |= dict(train_pictures=about["pictures_train"], val_pictures=val_images)
        return result | {name: about[name] for name in ("classes", "config", "versions")}

    def write_side_files(self, state):
        """Write all files but the checkpoints."""
        if not self.writes:
            return

        def write(name, function, *arguments):
            self.side_files.write(self.path / name, function, *arguments)

        indices = dict(enumerate(self.about["classes"]))
        write("class_indices.json", write_json, self.path / "class_indices.json", indices)
        if state.best is not None and (self.path / "best.pth").is_file():
            write("result.json", write_json, self.path / "result.json", state.best["result"])
            write("classification_report.txt", self.write_report, state.best)
        if state.history:
            write("log.csv", write_csv, self.path / "log.csv", state.history, "utf-8")
            write("loss.png and acc.png", plot_curves, state.history, self.path)

    def write_report(self, best):
        write_text(self.path / "classification_report.txt", report_epoch(best))

    def print_history(self, state):
        """Print the header of the table and the epochs before this start, whose files are written again."""
        self.write_side_files(state)
        for row in [None, *state.history]:
            print(format_row(row, state.ema is not None))

    def finish(self, state, val_images):
        """Print the report of the best epoch."""
        if self.side_files.failed:
            self.write_side_files(state)
        report = self.path / "classification_report.txt"
        with contextlib.suppress(Exception):  # a checkpoint of an earlier version has the report in this file only
            print(f"\n{report_epoch(state.best) if state.best else report.read_text(encoding='utf-8')}")
        weights = "weights" if state.ema is None else "EMA weights"
        print(f"best acc1 {state.best_acc1:.2f} % on {val_images} validation images ({weights}), in {self.path}")


def count_cells(labels, predictions):
    """The cells of a confusion matrix that are not 0: int tensor (cells, 3) of true class, predicted class, count."""
    pairs, counts = torch.tensor([labels, predictions]).unique(dim=1, return_counts=True)
    return torch.cat([pairs, counts[None]]).T.contiguous()


def report_epoch(best):
    """Text of classification_report.txt for `TrainingState.best`."""
    from sklearn.metrics import classification_report  # takes two seconds to import

    labels, predictions, counts = best["cells"].T
    labels, predictions = (values.repeat_interleave(counts).numpy() for values in (labels, predictions))
    classes = best["result"]["classes"]
    numbers = range(len(classes))
    return classification_report(labels, predictions, labels=numbers, target_names=classes, digits=4, zero_division=0)


def to_img_size(size):
    """(height, width) as checkpoints hold it: one number for a square, else [height, width]."""
    height, width = size
    return height if height == width else [height, width]


def to_area(img_size):
    """Pixels of an image of `img_size`: one number for a square, or [height, width]."""
    return math.prod(height_and_width(img_size))


def print_summary(about, state, sizes, train_loader, val_set, statistics, learning_rate):
    """Print what the run is made of, and where derived values come from."""
    config, versions, classes = about["config"], about["versions"], about["classes"]
    device, sampler = next(state.model.parameters()).device, train_loader.batch_sampler
    (height, width), (start, _), (test, _) = sizes.full, sizes.training(0), sizes.last
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    print(f"network     {about['arch']}, {parameters / 1e6:.1f} million parameters, {height} x {width} pixels")
    if (start, test) != (height, height):
        print(f"image size  {start} pixels in the first epoch, {height} at the end, {test} in validation from then on")
    if about.get("sound") is not None:
        print(f"spectrogram {', '.join(f'{name} {value}' for name, value in about['sound'].items())}")
        print(f"            keeps its own size; IMG_SIZE {config['IMG_SIZE']} and FIT are for images")
    elif config["FIT"] != "squeeze":
        print(f"fit         {config['FIT']}: images keep their aspect ratio")
    convolution = describe_implementation(device, choose_amp(config["AMP"], device) or torch.float32)
    print(f"large conv  {convolution}")
    if device.type == "cuda" and find_triton_remedy(convolution):
        print(f"            {find_triton_remedy(convolution)}")
    where = f"{versions['threads']} threads" if device.type == "cpu" else versions["device"]
    print(f"device      {device}, {where}, {versions['precision']}, torch {versions['torch']}, timm {versions['timm']}")
    print(f"loading     {train_loader.num_workers} workers{' (chosen for the device)' * (config['WORKERS'] is None)}")
    if sampler.world_size > 1:
        print(f"processes   {sampler.world_size}")
    kind = "images" if about.get("sound") is None else "spectrograms"
    print(f"{kind:11} {about['pictures_train']} for training, {len(val_set)} for validation")
    print(f"classes     {len(classes)}: {', '.join(classes[:24])}{', ...' if len(classes) > 24 else ''}")
    print_imbalance(about["data"]["train"]["by_class"], classes, config["BALANCE"])
    mean, std = ([round(value, 4) for value in about[name]] for name in ("mean", "std"))
    print(f"mean, std   {mean}, {std} from {statistics}")
    print(f"augmented   {describe_augmentation(config, about.get('sound'))}")
    if config["CUTOUT"] and CUTOUT_ERROR:
        print(f"cutout      torchvision's RandomErasing, since torchtoolbox cannot be imported ({CUTOUT_ERROR})")
    steps, warmup, peak = (learning_rate.keywords[name] for name in ("steps", "warmup_steps", "highest"))
    step_images = sampler.batch_size * sampler.world_size * config["ACCUMULATE"]
    print(f"steps       {steps // config['EPOCHS']:,} an epoch, of {step_images} images; {steps:,} in all")
    print(f"lr          {peak:.2e} at its peak: LEARNING_RATE {config['LEARNING_RATE']} x sqrt({step_images} / 32)")
    if warmup >= steps:
        print(f"            never reached: {config['WARMUP_EPOCHS']:g} warm-up epochs of {config['EPOCHS']}")


def print_imbalance(by_class, classes, balance):
    """Print the largest and the smallest class where they are far apart, and what can be done about it.

    Args:
        by_class: [(number of training images, ...), ...] of the classes.
        balance: the constant BALANCE.
    """
    counts = [row[0] for row in by_class]
    few, many = min(counts), max(counts)
    if many > IMBALANCE * few:
        names = (f"{classes[counts.index(count)]} {count}" for count in (many, few))
        what = "no class weights: --balance 1 compensates" if not balance else f"BALANCE {balance:g} compensates"
        print(f"imbalance   {' and '.join(names)} training images; {what} (logit adjustment)")


def describe_augmentation(config, sound):
    """The constants of the augmentation that is on, in one line."""
    names = ["CUTOUT", "HFLIP", "VFLIP", "ROTATION", "COLOR_JITTER", "QUALITY"]
    if sound is not None:
        names = ["TIME_SHIFT", "GAIN", "NOISE", "SPEC_MASK"]
    elif config["CROP"] < 1:
        names.insert(0, "CROP")
    if config["MIX_PROB"]:
        names += ["MIXUP"] if sound is not None else ["MIXUP", "CUTMIX"]
    return ", ".join(f"{name} {config[name]}" for name in names if config[name]) or "not at all"


def format_row(row, with_ema):
    """One line for one epoch; the header for None."""
    columns = [("epoch", "5d"), ("lr", "9.2e"), ("train_loss", "10.4f"), ("train_acc1", "10.2f"), ("val_loss", "8.4f")]
    columns += [("val_acc1", "8.2f"), ("val_acc5", "8.2f")]
    if with_ema:
        columns += [("ema_loss", "8.4f"), ("ema_acc1", "8.2f"), ("ema_acc5", "8.2f")]
    columns += [("img_per_s", "9.1f"), ("seconds", "7.1f")]
    if row is None:
        return "  ".join(f"{name:>{spec[:-1].split('.')[0]}}" for name, spec in columns)
    cells = [("-" if row.get(name) is None else format(row[name], spec), spec) for name, spec in columns]
    return "  ".join(f"{cell:>{spec[:-1].split('.')[0]}}" for cell, spec in cells)


def describe_run(
    *, arch, model_args, mean, std, sound, config, train_set, images, device, amp_dtype, compiled, world_size,
    convolutions,
):  # fmt: skip
    """What every checkpoint of a run holds besides its state.

    Args:
        config: {constant: value}.
        train_set: the training images, of type `CachedImageFolder`.
        images: see `common.fingerprints.fingerprint_images`.
        device, amp_dtype, compiled, world_size: how and where it is computed, which together with the versions of the
            packages decides the last bits.
        convolutions: how they are computed, from `choose_convolutions`.
    """
    return dict(
        arch=arch,
        model_args=model_args,
        classes=train_set.classes,
        mean=mean,
        std=std,
        **({} if sound is None else dict(sound=sound)),
        **({} if train_set.value_range is None else dict(value_range=train_set.value_range)),
        **({} if sound is not None or config["FIT"] == "squeeze" else dict(fit=config["FIT"])),
        config=config,
        pictures_train=len(train_set),
        pictures_fingerprint=fingerprint_names(train_set.files, sound),
        data=images,
        convolutions=convolutions,
        versions=dict(
            python=platform.python_version(),
            torch=str(torch.__version__),
            torchvision=str(torchvision.__version__),
            timm=timm.__version__,
            processes=world_size,
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            precision="float32" if amp_dtype is None else f"autocast {str(amp_dtype).removeprefix('torch.')}",
            compiled=compiled,
        ),
    )


def fingerprint_names(files, sound):
    """`fingerprint` of the names train/<class>/<name> of the training images.

    Args:
        files: their `common.columns.Files`, those of a class one after the other.
        sound: see `read_sound`; spectrograms are known by the names of their recordings.
    """

    def sorted_names():
        # In the order of all names at once, but only those of one class are held.
        first = np.searchsorted(files.labels, range(len(files.classes) + 1))
        for label in sorted(range(len(files.classes)), key=lambda label: f"{files.classes[label]}/"):
            names = files.names[first[label] : first[label + 1]]
            for name in sorted(name if sound is None else name.removesuffix(".png") for name in names):
                yield f"train/{files.classes[label]}/{name}"

    return fingerprint_sorted(sorted_names())


def describe_changes(checkpoint, about):
    """Print what differs from the run that is resumed, and what follows; also if there is nothing left to train.

    Args:
        checkpoint: of the run that is resumed, its config upgraded.
        about: what checkpoints of this run hold besides the state.

    Returns:
        Whether the validation images are others, so that accuracies cannot be compared.
    """
    old, new = checkpoint["config"], about["config"]
    exact = True
    for name in (name for name in new if name in old and old[name] != new[name] and name not in NO_EFFECT):
        if name in ONLY_AT_THE_START:
            print(f"changed     {name}: network and weights come from the checkpoint all the same")
            continue
        print(f"changed     {name} was {old[name]!r}, is {new[name]!r} from here on")
        exact = False
    for name, value in FORMER_CONSTANTS.items():
        if name in old and old[name] != value:
            print(f"changed     {name} was {old[name]!r}, is always {value!r} now")
            exact = False
    for name, value in about["versions"].items():
        if checkpoint.get("versions", {}).get(name, value) != value:
            print(f"changed     {name} was {checkpoint['versions'][name]}, is {value}")
            exact = False
    for name in ("mean", "std"):
        if list(checkpoint[name]) != list(about[name]):
            print(f"changed     {name} of the pixels was {checkpoint[name]}, is {about[name]}")
            exact = False
    start_anew = False
    for part, kind in (("train", "training"), ("val", "validation")):
        if part not in checkpoint.get("data", {}):  # of an earlier version
            continue
        text, others, reordered = describe_change(checkpoint["data"][part], about["data"][part], about["classes"])
        start_anew = others and part == "val"
        if text:
            print(f"changed     the {kind} images {text}{': the best accuracy starts anew' * start_anew}")
        exact = exact and not reordered
    names = checkpoint.get("pictures_fingerprint", about["pictures_fingerprint"])
    if "data" not in checkpoint and names != about["pictures_fingerprint"]:
        print("changed     the training images are others; their order differs")
        exact = False
    if not exact:
        print("            so the result will not be bit-identical to that of an uninterrupted run")
    if checkpoint["epoch"] >= new["EPOCHS"]:
        print(f"complete    nothing is left to train, since EPOCHS is {new['EPOCHS']}; a larger one prolongs the run")
    return start_anew
