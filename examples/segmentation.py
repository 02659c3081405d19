"""Semantic segmentation with UniRepLKNet: train on your own images and masks, evaluate, predict, export.

    python examples/segmentation.py --demo --epochs 10            draw fields with plants and train on them
    python examples/segmentation.py --data my_data                train on images/ and masks/ in my_data
    python examples/segmentation.py --data my_data --resume auto  resume what was interrupted
    python examples/segmentation.py --data my_data --evaluate test  evaluate on another part, or on a folder of its own
    python examples/segmentation.py --predict photos              predict the masks of new images
    python examples/segmentation.py --export model.onnx           write an ONNX file, compared with PyTorch

The last three take the newest best.pth, or that of --checkpoint. docs/dense.md says how the files are laid out.

The head is that of Panoptic FPN's semantic branch (Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019,
Section 3.1): a feature pyramid, whose levels are brought to stride 4, summed and classified.

Writes to checkpoints/segmentation/<model>/: last.pth, best.pth, log.csv, result.json, loss.png, miou.png, iou.csv (of
each class), sheet.png (image, truth, prediction, difference) and skipped.csv (annotations that cannot be used). With
--predict to results/segmentation/: <image>.png, whose values are those of the training masks, and <image>_overlay.jpg.

Exit status: 0; 1 an error; 2 a wrong option or constant; 3 done, but some files were left out (with --evaluate and
--predict); 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP, saved and ready to be resumed.
"""

import json
import math
import sys
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # ema.py, common/, models/, prepare/, examples/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import split_model_name_tag
from timm.optim import list_optimizers
from torch import nn
from torchvision import tv_tensors
from torchvision.ops import FeaturePyramidNetwork
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from common.dense import DenseFolder, DenseState, backbone_args, build_dense, check_backbone, choose_kernels
from common.dense import choose_normalisation, create_backbone, create_train_loader, describe_dense_run, find_dense
from common.dense import load_dense, train_one_epoch
from common.dataset import ImageFiles, seed_everything
from common.device import Normalise, choose_amp, choose_device, choose_layout, choose_workers, prepare_device
from common.extras import require
from common.faults import Interrupt, Stopped
from common.file_checks import check_fields, check_kind
from common.files import list_files, write_csv, written_whole
from common.images import is_another_kind, is_hidden, is_image, why_not
from common.loading import Loader
from common.network import check_pretrained, read_weights
from common.optimizer import create_optimizer
from common.options import Ascending, ConstantError, ImageSize, Length, Limits, Name, NonNegative
from common.options import Positive, PositiveInt, Probability, Rate, UserError, Workers, current_values, run
from common.plots import new_figure, save_figure
from common.progress import Progress
from common.schedule import warmup_cosine
from common.text import label
from ema import ModelEma
from examples.masks import IGNORED, LAYOUT, LISTED, UNKNOWN, ClassTable, MaskedImages, check_pairs, check_parts
from examples.masks import describe_other_classes, find_labelled, find_part, print_flaws, read_classes, refuse_empty
from examples.masks import refuse_overwriting, write_flaws
from examples.scene import write_scenes

# --- what is changed most
DATA: Name = "segmentation"  # folder with images/train, images/val, masks/train, masks/val and classes.txt
LIST: str = ""  # "": those folders; a CSV file with the columns image, mask and split instead
IGNORE: list[str] = ["255", "unlabelled", "unlabeled", "void"]  # values of masks, or classes, that do not count
MODEL: Name = "unireplknet_a"  # backbone, a timm model with feature maps of strides 4 to 32, also as name.tag
PRETRAINED: str = ""  # "": from scratch; "in1k" or another tag: download; a path; "hf-hub:owner/name"
IMG_SIZE: Annotated[list[ImageSize], Length(2)] = [192, 256]  # height and width in pixels of the training crops
SHORT_SIDE: ImageSize | None = None  # shorter side to which images are resized; None: the median, at most 512
BATCH_SIZE: PositiveInt = 8  # images in a batch; batch norm needs 4 or more crops of this size
EPOCHS: PositiveInt = 100  # passes over the training images
LEARNING_RATE: Positive = 2e-3  # peak learning rate
OPTIMIZER: Name = "muon"  # "muon", "adamw" or another of timm's
WORKERS: Workers | None = None  # processes that load images; None: one for each core, up to 8, beside a GPU, else 0
DEVICE: Name = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
OUTPUT: Name = "checkpoints/segmentation"  # folder that holds <model>/, to which the run writes its files
RESUME: str = ""  # "": a new run; "auto": resume <model>/last.pth if there is one; a path: resume that checkpoint
SEED: Annotated[int, Limits(0, 2**32 - 1)] = 42  # of initial weights, order of the images and augmentation
DEMO: bool = False  # draw fields with crops and weeds into DATA, if it is not there, and use them

# --- instead of training
EVALUATE: str = ""  # part of DATA or LIST, or folder with images/ and masks/, to evaluate CHECKPOINT on; "": off
PREDICT: str = ""  # image, or folder of images, whose masks CHECKPOINT predicts; "": off
EXPORT: str = ""  # ONNX file to write of CHECKPOINT; "": off
EXPORT_SIZE: Annotated[list[ImageSize], Length(2)] | None = None  # height and width of EXPORT; None: shorter side x 4:3
CHECKPOINT: str = ""  # that these use; "": the newest best.pth in OUTPUT
RESULTS: Name = "results/segmentation"  # folder to which they write

# --- augmentation
SCALE: Annotated[list[Positive], Length(2), Ascending()] = [0.75, 1.5]  # range of random resizing; 1,1: off
HFLIP: Probability = 0.5  # probability of a horizontal flip; 0: off
COLOR_JITTER: Probability = 0.3  # maximum relative change of brightness, contrast and saturation; 0: off

# --- loss and evaluation
BALANCE: Probability = 0.5  # class weights: frequencies to the power -BALANCE; 1: inverse; 0: off
VALIDATE_EVERY: PositiveInt = 1  # epochs between two validations; the last epoch is always validated
WINDOW: ImageSize | None = None  # side in pixels of half overlapping windows in evaluation; None: whole images

# --- network
HEAD_WIDTH: Annotated[int, Limits(8, 1024, multiple=8)] = 64  # channels of the feature pyramid and the head
DROP_PATH: Rate = 0.0  # stochastic depth rate of the last block; 0: off
LAYER_SCALE: NonNegative = 0.1  # initial layer scale of each block, 1e-6 in the paper; 0: none

# --- optimisation
WARMUP_EPOCHS: NonNegative = 2  # linear learning-rate warm-up; 0: off
WEIGHT_DECAY: NonNegative = 0.05  # decoupled weight decay; 0: off
CLIP_GRAD: NonNegative = 5.0  # maximum gradient norm; 0: off
EMA_DECAY: Rate = 0.9998  # of the moving average of the weights, which is validated and used; 0: off
AMP: Literal["auto", "bf16", "fp16", "off"] = "auto"  # mixed precision; "auto": bf16 where supported, else fp16 on cuda
SAVE_MINUTES: NonNegative = 10.0  # minutes between checkpoints inside an epoch; 0: at the end of each epoch only

NOT_TRAINED = ("LIST", "DEMO", "EVALUATE", "PREDICT", "EXPORT", "CHECKPOINT", "RESULTS", "VALIDATE_EVERY")
MAX_SHORT_SIDE = 512  # pixels, where SHORT_SIDE is None
MAX_ASPECT = 8  # longer side of a resized image in shorter sides; a narrower image stays smaller than SHORT_SIDE
SHOWN = 4  # images of sheet.png
TOLERANCE = 1e-4  # accepted difference of a logit in an ONNX file, relative to the largest one
# What a checkpoint holds besides REQUIRED of common/dense.py.
Fields = dict(head_width=Annotated[int, Limits(8, 1024, multiple=8)], short_side=ImageSize, window=ImageSize | None)
Fields |= dict(values=Annotated[list[Annotated[int, Limits(0, 255)]], Length(256)], colours=list)


def main():
    arch, tag = split_model_name_tag(MODEL)
    if sum(map(bool, (EVALUATE, PREDICT, EXPORT))) > 1:
        raise ConstantError("EVALUATE, PREDICT and EXPORT are three different runs; set one of them")
    if EVALUATE or PREDICT or EXPORT:
        device = choose_device(DEVICE)
        path = find_dense(CHECKPOINT, OUTPUT)
        checkpoint = load_dense(path, "segmentation", build, check_fields_of)
        if EXPORT:
            refuse_overwriting([path], [Path(EXPORT)])
            side = checkpoint["short_side"]
            return export(checkpoint, Path(EXPORT), EXPORT_SIZE or [side, round(side * 4 / 3)])
        predictor, workers = Predictor(checkpoint, device, choose_amp(AMP, device)), choose_workers(WORKERS, device)
        if PREDICT:
            return predict(predictor, PREDICT, workers, Path(RESULTS))
        return evaluate_on(predictor, DATA, LIST, EVALUATE, workers, Path(RESULTS))
    check_choices(arch, tag, OPTIMIZER, PRETRAINED, RESUME)
    device = choose_device(DEVICE)
    prepare_device(device)
    with DenseFolder(OUTPUT, arch, RESUME, SAVE_MINUTES, "segmentation", "miou", "mean IoU / %") as folder:
        checkpoint = folder.load(arch, OPTIMIZER, build, check_fields_of)
        pretrained = PRETRAINED or tag
        weights = read_weights(arch, pretrained, tag) if pretrained and checkpoint is None else None

        # --- data
        if DEMO and not Path(DATA).exists():
            write_scenes(DATA, dict(train=48, val=12), IMG_SIZE[1], IMG_SIZE[0])
            print(f"demo        drew fields with crops and weeds into {DATA}")
        table = read_classes(Path(DATA, "classes.txt"), IGNORE) if Path(DATA).is_dir() else None
        if table and checkpoint:
            refuse_other_classes(checkpoint, table, f"cannot resume {folder.resumed}")
        train_part, val_part, flaws = open_data(DATA, LIST, table)
        short_side = SHORT_SIDE or min(MAX_SHORT_SIDE, max(32, round(float(np.median(train_part.short_sides)))))
        mean, std = (checkpoint["mean"], checkpoint["std"]) if checkpoint else choose_normalisation(weights)
        transform = train_transform(IMG_SIZE, short_side, SCALE, HFLIP, COLOR_JITTER, mean)
        train_set, val_set = MaskedImages(train_part.pairs, table, transform), MaskedImages(val_part.pairs, table)
        workers = choose_workers(WORKERS, device)
        loader = create_train_loader(train_set, BATCH_SIZE, SEED, workers)
        batch_size = loader.batch_sampler.batch_size
        if batch_size == 1 and max(IMG_SIZE) <= 32:
            raise UserError("batch norm cannot learn from single crops of 32 pixels; raise BATCH_SIZE or IMG_SIZE")

        # --- network and optimizer
        seed_everything(SEED)
        amp_dtype = choose_amp(AMP, device)
        amp = partial(torch.autocast, device.type, amp_dtype, enabled=amp_dtype is not None)
        model_args = checkpoint["model_args"] if checkpoint else backbone_args(arch, LAYER_SCALE)
        head_width = checkpoint["head_width"] if checkpoint else HEAD_WIDTH
        model = Segmenter(create_backbone(arch, model_args, DROP_PATH, weights), head_width, len(table.names))
        model.to(device, memory_format=choose_layout(device))
        ema = ModelEma(model, EMA_DECAY) if EMA_DECAY else None
        optimizer = create_optimizer(model, OPTIMIZER, LEARNING_RATE, WEIGHT_DECAY, 1, device)
        scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
        state = DenseState(model, ema, optimizer, scaler)

        # --- what each step does
        steps = len(loader)
        learning_rate = partial(
            warmup_cosine, steps=EPOCHS * steps, warmup_steps=round(WARMUP_EPOCHS * steps), highest=LEARNING_RATE,
            lowest=1e-6,
        )  # fmt: skip
        class_weights = balance_classes(train_part.pixels, BALANCE)
        compute_loss = SegmentationLoss(Normalise(mean, std, device), class_weights, device)
        kernels = choose_kernels(model, IMG_SIZE, batch_size, EPOCHS * steps, amp_dtype, checkpoint)

        # --- the run
        config = current_values(globals()) | dict(MODEL=arch, PRETRAINED=pretrained, SHORT_SIDE=short_side)
        about = describe_dense_run(
            task="segmentation", arch=arch, model_args=model_args, classes=table.names, mean=mean, std=std,
            config={name: value for name, value in config.items() if name not in NOT_TRAINED},
            train_names=[pair.name for pair in train_part.pairs], val_names=[pair.name for pair in val_part.pairs],
            device=device, amp_dtype=amp_dtype, head_width=head_width, short_side=short_side, window=WINDOW,
            convolutions=kernels, values=table.by_value.tolist(),
            colours=[[*colour, own] for colour, own in table.by_colour.items()],
        )  # fmt: skip
        folder.begin(about, checkpoint, state, tuple(IMG_SIZE), EPOCHS)
        write_flaws(flaws, folder.path / "skipped.csv")
        print_summary(about, state, train_part, val_part, class_weights, steps)
        folder.print_history(state)
        with Interrupt() as interrupt, folder.saved_on_error(state):
            try:
                while state.epoch < EPOCHS:
                    metrics = train_one_epoch(
                        state, loader, compute_loss, learning_rate, amp, clip_grad=CLIP_GRAD, seed=SEED,
                        description=f"epoch {state.epoch + 1}/{EPOCHS}", interrupt=interrupt, folder=folder,
                    )  # fmt: skip
                    started, results = time.perf_counter(), {}
                    if (state.epoch + 1) % VALIDATE_EVERY == 0 or state.epoch + 1 == EPOCHS:
                        predictor = Predictor(about, device, amp_dtype, state.network().eval())
                        results, _ = evaluate(predictor, val_set, workers, "validation", interrupt)
                    folder.finish_epoch(state, metrics, results, time.perf_counter() - started)
                if state.history and not (folder.path / "last.pth").is_file():  # a finished run, continued elsewhere
                    folder.save_last(state)
                best = load_dense(folder.best_path(), "segmentation", build, check_fields_of)
                predictor = Predictor(best, device, amp_dtype)
                results, ious = evaluate(predictor, val_set, workers, "best epoch", interrupt)
            except Stopped:
                folder.save_last(state)
                epoch = min(state.epoch + 1, EPOCHS)
                print(f"stopped in epoch {epoch} of {EPOCHS} and saved; resume with --resume auto")
                return interrupt.exit_status
        write_results(predictor, val_set, ious, folder.path)
        print_ious(table.names, ious)
        print(f"best mIoU {results['miou']:.2f} % on {len(val_set)} validation images, epoch {state.best_epoch}, in "
              f"{folder.path}; {len(flaws)} files left out")  # fmt: skip


def check_choices(arch, tag, optimizer, pretrained, resume):
    """Refuse what cannot work before anything is read or written."""
    check_backbone(arch)
    if optimizer not in list_optimizers():
        raise ConstantError(f'OPTIMIZER must be "muon", "adamw" or another that timm lists, got {optimizer!r}')
    if resume not in ("", "auto") and not Path(resume).is_file():
        raise ConstantError(f'RESUME must be "", "auto" or the path of a checkpoint, got {resume!r}')
    if not resume:
        check_pretrained(arch, tag, pretrained)
    require("torchmetrics")


def open_data(data, list_file, table):
    """The training and the validation part, both `Checked`, and what is left out, a list of `Flaw`, which is printed.

    Args:
        data: folder with images/, masks/ and classes.txt.
        list_file: a table instead of the folders, see `read_list`; "": none.
        table: of the classes, or None if there is no folder.

    Raises:
        UserError: if there is no folder, or nothing in a part can be used.
    """
    if table is None:
        raise UserError(f"there is no folder {data}; {LAYOUT}")
    found = [(find_part(data, list_file, name), name) for name in ("train", "val")]
    checked = [check_pairs(*pairs_and_flaws, table, f"checking {name}") for pairs_and_flaws, name in found]
    flaws = [flaw for part in checked for flaw in part.flaws]
    print_flaws(flaws, sum(len(part.pairs) for part in checked))
    for part, (_, name) in zip(checked, found):
        refuse_empty(part, name)
    check_parts(*checked)
    absent = [name for name, count in zip(table.names, checked[0].pixels) if not count]
    if len(absent) == len(table.names) - 1:
        raise UserError(
            f"no training mask has the class {', '.join(absent[:10])}; correct its value in classes.txt (masks of 0 "
            f"and 255 need {absent[0]},255)"
        )
    if absent:
        print(f"note: no training mask has the class {', '.join(absent[:10])}; is its value right in classes.txt?")
    return *checked, flaws


def refuse_other_classes(about, table, what):
    """UserError if a `ClassTable` is not that of a checkpoint; `what` is not possible then."""
    difference = describe_other_classes(table, table_of(about))
    if difference:
        raise UserError(f"{what}: classes.txt differs from the checkpoint's classes, {difference}; correct classes.txt")


def table_of(about):
    """The `ClassTable` of a checkpoint, or of what it holds besides the state."""
    colours = {tuple(colour): own for *colour, own in about["colours"]}
    return ClassTable(about["classes"], np.array(about["values"], np.uint8), colours)


def train_transform(size, short_side, scale, hflip, color_jitter, mean):
    """Augmentation: function (image, mask) of tv_tensors -> crops of `size` (height, width).

    Args:
        short_side: of an image in pixels, at scale 1.
        scale: range of the random factor on it.
        mean: three values for pixels from 0 to 1, the colour beside images smaller than a crop.
    """
    low, high = (max(1, round(factor * short_side)) for factor in scale)
    fill = {tv_tensors.Image: [round(255 * value) for value in mean], tv_tensors.Mask: IGNORED}
    steps = [v2.RandomShortestSize(range(low, high + 1), max_size=MAX_ASPECT * high, antialias=True)]
    steps.append(v2.RandomCrop(size, pad_if_needed=True, fill=fill))
    if hflip:
        steps.append(v2.RandomHorizontalFlip(hflip))
    if color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
    return v2.Compose(steps)


class Segmenter(nn.Module):
    """Images (N, 3, H, W) -> logits (N, classes, H, W), one vector per pixel.

    Semantic branch of Panoptic FPN: each level of a feature pyramid passes through 3 x 3 convolutions with group norm,
    each followed by an upsampling by 2, until its stride is 4; the sum of the levels is classified. Group norm does not
    mind small batches.

    Args:
        body: from `create_backbone`.
        width: channels of the pyramid and the branches; 256 and 128 in the paper.
        classes: number of them.
    """

    def __init__(self, body, width, classes):
        super().__init__()
        self.body = body
        channels = body.feature_info.channels()
        self.pyramid = FeaturePyramidNetwork(channels, width)
        self.branches = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(8, width), nn.ReLU())
                for _ in range(max(level, 1))
            )
            for level in range(len(channels))
        )
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, images):
        maps = self.pyramid({str(level): features for level, features in enumerate(self.body(images))})
        levels = list(maps.values())  # strides 4, 8, 16, 32
        total = 0
        for level, branch in enumerate(self.branches):
            features = levels[level]
            for number, block in enumerate(branch):
                features = block(features)
                if level:
                    features = upsample(features, levels[level - 1 - number].shape[2:])
            total = total + features
        return upsample(self.classify(total), images.shape[2:])

    def no_weight_decay(self):
        names = getattr(self.body.model, "no_weight_decay", set)()
        return {f"body.model.{name}" for name in names}


def upsample(features, size):
    """Features (N, C, h, w) at `size` (height, width), bilinearly."""
    return F.interpolate(features, size, mode="bilinear", align_corners=False)


def build(checkpoint):
    """The network of a checkpoint, without its weights."""
    body = create_backbone(checkpoint["arch"], checkpoint["model_args"])
    return Segmenter(body, checkpoint["head_width"], len(checkpoint["classes"]))


def check_fields_of(checkpoint):
    """ValueError unless what only this script's checkpoints hold can be used."""
    check_fields(checkpoint, Fields)
    check_kind(checkpoint["config"].get("IGNORE", []), list[str], "its IGNORE")
    known = {*range(len(checkpoint["classes"])), IGNORED, UNKNOWN}
    if not set(checkpoint["values"]) <= known:
        raise ValueError("its values name classes that it does not have")
    for row in checkpoint["colours"]:
        plain = isinstance(row, list) and len(row) == 4 and all(type(x) is int and 0 <= x <= 255 for x in row)
        if not plain or row[3] not in known:
            raise ValueError(f"its colours must be lists of red, green, blue and class, got {row!r:.60}")


def balance_classes(pixels, balance):
    """Weights of the classes (classes,) in the loss: their frequencies to the power -`balance`, scaled such that the
    mean over all pixels is 1; classes without pixels get the weight of the rarest one.

    Args:
        pixels: of each class in the training masks.
    """
    frequencies = pixels / pixels.sum()
    frequencies = np.where(pixels > 0, frequencies, frequencies[pixels > 0].min())
    weights = frequencies**-balance
    return torch.tensor(weights / (weights * pixels).sum() * pixels.sum(), dtype=torch.float32)


class SegmentationLoss:
    """Function (model, batch of images and masks) -> cross entropy, weighted by class, of the pixels with a class.

    Args:
        normalise: a `Normalise`.
        class_weights: (classes,).
        device: a `torch.device`.
    """

    def __init__(self, normalise, class_weights, device):
        self.normalise = normalise
        self.class_weights = class_weights.to(device)
        self.device = device

    def __call__(self, model, batch):
        images, masks = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        images = self.normalise(images).contiguous(memory_format=choose_layout(self.device))
        masks = masks.long()
        losses = F.cross_entropy(
            model(images).float(), masks, self.class_weights, ignore_index=IGNORED, reduction="sum"
        )
        # Unlike PyTorch's mean it is 0, not NaN, for crops without any class.
        total = self.class_weights[masks.clamp(max=len(self.class_weights) - 1)] * (masks != IGNORED)
        return losses / total.sum().clamp(min=1.0)


def print_summary(about, state, train_part, val_part, class_weights, steps):
    """Print what the run is made of."""
    config, versions, names = about["config"], about["versions"], about["classes"]
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    print(f"network     {about['arch']} and a feature pyramid, {parameters / 1e6:.1f} million parameters")
    where = f"{versions['threads']} threads" if versions["device"] == "cpu" else versions["device"]
    print(f"device      {where}, {versions['precision']}, torch {versions['torch']}, timm {versions['timm']}")
    print(f"images      {len(train_part.pairs)} for training, {len(val_part.pairs)} for validation, shorter side "
          f"{about['short_side']} pixels, crops of {config['IMG_SIZE'][0]} x {config['IMG_SIZE'][1]}")  # fmt: skip
    fractions = 100 * train_part.pixels / train_part.pixels.sum()
    texts = [f"{n} {f:.1f} % x {w:.2f}" for n, f, w in zip(names, fractions, class_weights.tolist())]
    print(f"classes     {len(names)}, with their pixels and weights: {', '.join(texts[:24])}")
    print(f"steps       {steps} an epoch, of {config['BATCH_SIZE']} crops; {steps * config['EPOCHS']:,} in all")


class Predictor:
    """Function of an image, a uint8 tensor (3, H, W) -> logits (classes, H, W), float32 on `device`.

    The image is resized to the shorter side of the training images, but see `MAX_ASPECT`, and the logits back to the
    image's size.

    Args:
        about: a checkpoint, or what it holds besides the state.
        device: a `torch.device`.
        amp_dtype: of autocast, or None.
        network: in eval mode; None: that of the checkpoint, in the inference structure.
    """

    def __init__(self, about, device, amp_dtype, network=None):
        self.about = about
        self.device = device
        self.amp_dtype = amp_dtype
        self.network = build_dense(about, build, device) if network is None else network
        self.normalise = Normalise(about["mean"], about["std"], device)
        self.table = table_of(about)

    @torch.inference_mode()
    def __call__(self, image):
        height, width = image.shape[1:]
        short_side = self.about["short_side"]
        factor = min(short_side / min(height, width), MAX_ASPECT * short_side / max(height, width))
        size = [max(32, round(factor * side)) for side in (height, width)]
        if size != [height, width]:
            image = v2.functional.resize(image, size, antialias=True)
        image = self.normalise(image[None].to(self.device)).contiguous(memory_format=choose_layout(self.device))
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            logits = slide(self.network, image, self.about["window"], len(self.about["classes"]))
        return upsample(logits.float(), (height, width))[0]


def slide(network, image, window, classes):
    """Logits (1, classes, H, W) of an image (1, 3, H, W), whole or as the mean over half overlapping windows.

    Args:
        window: side of the windows in pixels; None, or at least the image's sides: whole.
    """
    height, width = image.shape[2:]
    if window is None or window >= max(height, width):
        return network(image)
    total, counts = image.new_zeros(1, classes, height, width), image.new_zeros(1, 1, height, width)
    for top in places(height, window):
        for left in places(width, window):
            part = (..., slice(top, top + window), slice(left, left + window))
            total[part] += network(image[part].contiguous()).float()
            counts[part] += 1
    return total / counts


def places(side, window):
    """First pixels of windows that overlap by half or more and cover `side` pixels."""
    last = max(side - window, 0)
    count = math.ceil(last / (window / 2)) + 1
    return [round(last * number / max(count - 1, 1)) for number in range(count)]


def evaluate(predictor, dataset, workers, description, interrupt=None):
    """Compare predictions with masks, at the size of the masks.

    Returns:
        ({"loss": mean cross entropy of a pixel, "miou": mean IoU in percent over the classes that occur, "acc": pixels
        of the right class in percent, "iou_<class>": ...}, [IoU in percent, NaN for a class that occurs nowhere]).

    Raises:
        Stopped: after a signal such as Ctrl-C.
    """
    [classification] = require("torchmetrics.classification")
    names = predictor.about["classes"]
    settings = dict(num_classes=len(names), ignore_index=IGNORED, validate_args=False)
    jaccard = classification.MulticlassJaccardIndex(average="none", zero_division=math.nan, **settings)
    accuracy = classification.MulticlassAccuracy(average="micro", **settings)
    jaccard, accuracy = jaccard.to(predictor.device), accuracy.to(predictor.device)
    loss, pixels = 0.0, 0
    loader = Loader(dataset, None, num_workers=workers, what="validation images")
    for image, mask in Progress(loader, desc=description, unit="image", leave=False):
        logits, mask = predictor(image)[None], mask[None].long().to(predictor.device)
        loss += F.cross_entropy(logits, mask, ignore_index=IGNORED, reduction="sum").item()
        pixels += (mask != IGNORED).sum().item()
        jaccard.update(logits, mask)
        accuracy.update(logits, mask)
        if interrupt is not None and interrupt.signal:
            raise Stopped
    ious = [100 * value for value in jaccard.compute().tolist()]
    results = dict(loss=loss / max(pixels, 1), miou=float(np.nanmean(ious)), acc=100 * accuracy.compute().item())
    return results | {f"iou_{name}": None if math.isnan(iou) else iou for name, iou in zip(names, ious)}, ious


def write_results(predictor, dataset, ious, folder):
    """Write iou.csv and sheet.png, on images evenly spread over a `MaskedImages`."""
    names = predictor.about["classes"]
    texts = ["" if math.isnan(iou) else f"{iou:.2f}" for iou in ious]
    write_csv(folder / "iou.csv", [dict(class_name=name, iou=text) for name, text in zip(names, texts)])
    chosen = sorted({round(place) for place in np.linspace(0, len(dataset) - 1, SHOWN)})
    rows = []
    for index in chosen:
        image, mask = dataset[index]
        rows.append((dataset.pairs[index].name, image, mask.numpy(), predictor(image).argmax(0).cpu().numpy()))
    plot_sheet(rows, names, palette(predictor.table), folder / "sheet.png")


def palette(table):
    """Colours of the classes, uint8 (256, 3): those of classes.txt, else of Pascal VOC; `IGNORED` is black."""
    colours = np.zeros((256, 3), np.uint8)
    for number in range(len(table.names)):
        for bit in range(8):
            # Each three bits of the number + 1 give one bit of red, green and blue, the highest first.
            code = (number + 1) >> (3 * bit)
            colours[number] |= np.array([code & 1, code >> 1 & 1, code >> 2 & 1], np.uint8) << (7 - bit)
    for colour, own in table.by_colour.items():
        colours[own] = colour
    colours[IGNORED] = 0
    return colours


def plot_sheet(rows, names, colours, path):
    """Draw image, truth, prediction and difference side by side, with the colours of the classes below.

    Args:
        rows: (name, image (3, H, W), true classes (H, W), predicted classes (H, W)) of each image.
        names: of the classes.
        colours: see `palette`.
    """
    from matplotlib.patches import Patch

    figure = new_figure(figsize=(12, 2.6 * len(rows) + 0.8), layout="constrained")
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for axes, (name, image, truth, prediction) in zip(grid, rows):
        wrong = (truth != prediction) & (truth != IGNORED)
        difference = np.where(wrong[..., None], [220, 40, 40], 235).astype(np.uint8)
        difference[truth == IGNORED] = 0
        cells = image.permute(1, 2, 0).numpy(), colours[truth], colours[prediction], difference
        share = 100 * wrong.sum() / max((truth != IGNORED).sum(), 1)
        titles = label(name), "truth", "prediction", f"difference: {share:.1f} %"
        for place, cell, title in zip(axes, cells, titles):
            place.imshow(cell, interpolation="nearest")
            place.set_title(title, fontsize=9)
            place.set_xticks([])
            place.set_yticks([])
    patches = [Patch(color=colours[number] / 255, label=label(name)) for number, name in enumerate(names[:40])]
    patches.append(Patch(color="black", label="ignored"))
    figure.legend(handles=patches, loc="outside lower center", ncols=min(8, len(patches)), fontsize=8)
    save_figure(figure, path)


def print_ious(names, ious):
    """Print the IoU of each class, the lowest last."""
    order = sorted(range(len(names)), key=lambda number: -ious[number] if not math.isnan(ious[number]) else 1)
    width = max(map(len, names))
    for number in order:
        print(f"{names[number]:<{width}}  {'-' if math.isnan(ious[number]) else format(ious[number], '6.2f')}")


def predict(predictor, source, workers, folder):
    """Write the predicted mask and an overlay of each image; returns the exit status.

    Args:
        source: an image or a folder of images.
        folder: for the results.

    Raises:
        UserError: if there is no image, or one would be overwritten.
    """
    root = Path(source)
    if not root.exists():
        raise UserError(f"there is no {source}; give an image or a folder of images")
    found = [root] if root.is_file() else [path for path in list_files(root, skip=is_hidden) if not is_hidden(path)]
    files = [path for path in found if is_image(path) or path == root]
    others = [why_not(path) for path in found if is_another_kind(path) and path != root]
    if not files:
        raise UserError(f"{source} holds no image; {others[0] if others else 'give an image or a folder of images'}")
    base = root.parent if root.is_file() else root
    same = Counter(path.with_suffix("") for path in files)  # of a.jpg and a.png, the masks are a.jpg.png and a.png.png
    names = [path.stem if same[path.with_suffix("")] == 1 else path.name for path in files]
    targets = [folder / path.relative_to(base).parent / f"{name}.png" for path, name in zip(files, names)]
    overlays = [target.with_name(f"{target.stem}_overlay.jpg") for target in targets]
    refuse_overwriting(files, targets + overlays)
    for reason in others[:LISTED]:
        print(f"left out    {reason}")
    colours, table = palette(predictor.table), predictor.table
    values = np.arange(256, dtype=np.uint8)  # the value in a mask of each class
    for value, own in reversed(list(enumerate(table.by_value))):
        if own < len(table.names):
            values[own] = value
    by_value = np.zeros((256, 3), np.uint8)
    by_value[values[: len(table.names)]] = colours[: len(table.names)]
    loader = Loader(ImageFiles(files, pil_to_tensor), None, num_workers=workers, what="images")
    done, skipped = 0, len(others)
    progress = Progress(loader, desc="predicting", unit="image", leave=False)
    for target, overlay_path, (image, reason) in zip(targets, overlays, progress):
        if image is None:
            print(f"left out    {reason}")
            skipped += 1
            continue
        classes = predictor(image).argmax(0).cpu().numpy().astype(np.uint8)
        target.parent.mkdir(parents=True, exist_ok=True)
        mask = Image.fromarray(values[classes])
        mask.putpalette(by_value.tobytes())
        overlay = Image.blend(Image.fromarray(image.permute(1, 2, 0).numpy()), Image.fromarray(colours[classes]), 0.5)
        for one, place in ((mask, target), (overlay, overlay_path)):
            with written_whole(place) as partial_path:
                one.save(partial_path, format="PNG" if place.suffix == ".png" else "JPEG", quality=92)
        done += 1
    print(f"{done} masks and overlays in {folder}; {skipped} files left out")
    return 3 if skipped else 0


def evaluate_on(predictor, data, list_file, where, workers, folder):
    """Evaluate on labelled images; returns the exit status.

    Args:
        data, list_file, where: see `find_labelled`.
        folder: for the results.

    Raises:
        UserError: if nothing can be used, or classes.txt is another one than the checkpoint's.
    """
    pairs, flaws, place = find_labelled(data, list_file, where)
    if (place / "classes.txt").is_file():
        table = read_classes(place / "classes.txt", predictor.about["config"].get("IGNORE", []))
        refuse_other_classes(predictor.about, table, f"cannot evaluate on {place}")
    outputs = [folder / name for name in ("skipped.csv", "iou.csv", "sheet.png")]
    refuse_overwriting([list_file, *(path for pair in pairs for path in (pair.image, pair.mask))], outputs)
    part = check_pairs(pairs, flaws, predictor.table, "checking")
    print_flaws(part.flaws, len(part.pairs))
    folder.mkdir(parents=True, exist_ok=True)
    write_flaws(part.flaws, folder / "skipped.csv")
    refuse_empty(part, where)
    dataset = MaskedImages(part.pairs, predictor.table)
    results, ious = evaluate(predictor, dataset, workers, "evaluation")
    write_results(predictor, dataset, ious, folder)
    print_ious(predictor.table.names, ious)
    print(f"mIoU {results['miou']:.2f} %, pixel accuracy {results['acc']:.2f} % on {len(dataset)} images; "
          f"{len(part.flaws)} files left out; in {folder}")  # fmt: skip
    return 3 if part.flaws else 0


def export(checkpoint, path, size):
    """Write the network, in the inference structure, as an ONNX file: images (N, 3, H, W), normalised -> logits (N,
    classes, H, W). Metadata: classes, mean, std and size, as JSON.

    Args:
        checkpoint: from `load_dense`.
        path: ONNX file.
        size: [height, width] in pixels; kernels that are larger than a map are cut to it, so the size is fixed.

    Raises:
        UserError: if a logit of the file differs from the trained network's by more than `TOLERANCE` times the largest.
    """
    onnx, onnxruntime, _ = require("onnx", "onnxruntime", "onnxscript")
    device = torch.device("cpu")
    trained, merged = (build_dense(checkpoint, build, device, merge) for merge in (False, True))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial_path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's about itself
            torch.onnx.export(
                merged, (torch.zeros(2, 3, *size),), partial_path, dynamo=True, opset_version=18, verbose=False,
                input_names=["images"], output_names=["logits"], external_data=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
        model = onnx.load(partial_path)
        about = {name: checkpoint[name] for name in ("classes", "mean", "std")} | dict(size=size)
        onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in about.items()})
        onnx.save(model, partial_path)
        session = onnxruntime.InferenceSession(partial_path, providers=["CPUExecutionProvider"])
        images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            logits = trained(images)
        written = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        difference = (written - logits).abs().max().item() / logits.abs().max().item()
        if not difference <= TOLERANCE:
            raise UserError(
                f"{path} is not written, since a logit differs by {difference:.1e} of the largest one; export with "
                "another version of PyTorch"
            )
    print(f"{path}: {size[0]} x {size[1]} pixels, largest difference {difference:.1e} of the largest logit of PyTorch")
    print(f"            mean {checkpoint['mean']}, std {checkpoint['std']}, classes {', '.join(checkpoint['classes'])}")


if __name__ == "__main__":
    run(main)
