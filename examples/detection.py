"""Object detection on your own images and boxes: torchvision's Faster R-CNN on UniRepLKNet, or another timm network.

    python examples/detection.py --demo --epochs 10                       draw fields with plants and train on them
    python examples/detection.py --data photos --model unireplknet_t --pretrained in1k
    python examples/detection.py --data photos --resume auto              resume the last run of this network
    python examples/detection.py --data photos --evaluate test            average precision on another part
    python examples/detection.py --predict new/                           boxes on new images

The last two take the newest best.pth, or that of --checkpoint. Reads Pascal VOC (Annotations/*.xml, JPEGImages/,
ImageSets/Main/train.txt and val.txt; or folders train/ and val/ of images and XML files) or COCO
(annotations/train.json and val.json, and the images); docs/dense.md says more. Needs the package pycocotools.

Writes to checkpoints/detection/<model>/: last.pth, best.pth, log.csv, result.json, loss.png, ap.png, boxes.png
(validation images with truth and prediction) and flaws.txt (annotations that cannot be used). With --evaluate and
--predict to results/detection/: predictions.json (COCO's format of results) and boxes.png, or boxes/<image>.png; with
--evaluate also metrics.json and flaws.txt.

Exit status: 0; 1 an error; 2 a wrong option or constant; 3 done, but some images were left out of an evaluation or a
prediction; 130, 143 or 129 stopped by a signal, saved and ready to be resumed.
"""

import contextlib
import io
import math
import random
import sys
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/, prepare/, examples/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import numpy as np
import torch
from PIL import Image
from timm.models import split_model_name_tag
from timm.optim import list_optimizers
from torch import nn
from torch.utils.data import Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms import v2

from common.dense import DenseFolder, DenseState, backbone_args, build_dense, check_backbone, choose_kernels
from common.dense import choose_normalisation, create_backbone, create_train_loader, describe_dense_run, find_dense
from common.dense import load_dense, train_one_epoch
from common.device import choose_amp, choose_device, choose_layout, choose_workers, prepare_device
from common.extras import require
from common.faults import Interrupt, Stopped
from common.file_checks import check_fields, check_keys
from common.files import list_files, write_json
from common.images import ImageError, is_another_kind, is_hidden, is_image, load_image, why_not
from common.loading import Loader
from common.network import check_environment, check_pretrained, read_weights
from common.optimizer import create_optimizer
from common.options import ConstantError, Fraction, ImageSize, Limits, MultipleOf32, Name, NonNegative
from common.options import Positive, PositiveInt, Probability, Rate, UserError, Workers, current_values, run
from common.plots import add_legend, new_figure, save_figure
from common.progress import Progress
from common.schedule import warmup_cosine
from common.text import label
from ema import ModelEma
from examples.boxes import Flaws, read_boxes, to_coco
from examples.scene import write_scenes

# --- what is changed most
DATA: Name = "detection"  # folder of images and boxes, in Pascal VOC's or COCO's layout
TRAIN: Name = "train"  # part that is trained on: ImageSets/Main/<name>.txt, annotations/<name>.json, or a path of these
VAL: Name = "val"  # part that is validated on, likewise
CLASSES: list[Name] = []  # names of the classes, boxes of others are left out; []: all that TRAIN has
MODEL: Name = "unireplknet_a"  # backbone: a timm network with feature maps of strides 4, 8, 16 and 32, also as name.tag
PRETRAINED: str = ""  # "": from scratch; "in1k" or another tag: download; "seedlings"; a path; "hf-hub:owner/name"
IMG_SIZE: ImageSize = 320  # longer side of an image in pixels, to which it is scaled for validation and prediction
CROP_SIZE: MultipleOf32 = 256  # side of the squares cut from the scaled images for training, in pixels
BATCH_SIZE: PositiveInt = 4  # images per step; batch norm needs 2 or more
EPOCHS: PositiveInt = 80  # passes over TRAIN
LEARNING_RATE: Positive = 2e-3  # peak learning rate at batch size 32; scaled by sqrt(batch / 32)
OPTIMIZER: Name = "muon"  # "muon", "adamw" or another of timm's
WORKERS: Workers | None = None  # processes that load images; None: one for each core, up to 8, beside a GPU, else 0
DEVICE: Name = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
OUTPUT: Name = "checkpoints/detection"  # folder that holds <model>/, to which the run writes its files
RESUME: str = ""  # "": a new run; "auto": resume <model>/last.pth if there is one; a path: resume that checkpoint
SEED: Annotated[int, Limits(0, 2**32 - 1)] = 42  # of initial weights, order of the images and augmentation
DEMO: bool = False  # draw fields with crops and weeds into DATA, if it is not there, and use them

# --- instead of training
EVALUATE: str = ""  # part of DATA, or path of its list or COCO file, on which CHECKPOINT is evaluated; "": none
PREDICT: str = ""  # image, or folder of images, in which CHECKPOINT finds boxes; "": none
CHECKPOINT: str = ""  # for these two; "": the newest OUTPUT/*/best.pth
RESULTS: Name = "results/detection"  # folder to which these two write
SCORE: Probability = 0.5  # lowest score of a box that is drawn; predictions.json has all from 0.02 on

# --- augmentation
SCALE: Annotated[float, Limits(1, 4)] = 1.5  # maximum factor by which images are enlarged or reduced; 1: off
HFLIP: Probability = 0.5  # probability of a horizontal flip; 0: off
VFLIP: Probability = 0.5  # probability of a vertical flip, suitable for overhead and microscope images; 0: off
QUARTER_TURNS: bool = True  # rotate by a random multiple of 90 degrees, likewise
COLOR_JITTER: Probability = 0.2  # maximum relative change of brightness, contrast and saturation; 0: off

# --- network
ANCHOR: Positive = 4.0  # side of the square anchors in strides of their map, 16 to 256 pixels; 8: for images of 800
CHANNELS: Annotated[int, Limits(16, 1024)] = 64  # of the feature pyramid, and a quarter of the box head's; usual: 256
NMS: Fraction = 0.5  # overlap (IoU) above which the box with the lower score is dropped
DROP_PATH: Rate = 0.0  # stochastic depth rate of the last block; 0: off
LAYER_SCALE: NonNegative = 0.1  # initial layer scale of each block, 1e-6 in the paper; 0: none

# --- optimisation
WARMUP_EPOCHS: NonNegative = 2.0  # linear learning-rate warm-up; 0: off
WEIGHT_DECAY: NonNegative = 0.05  # decoupled weight decay; 0: off
CLIP_GRAD: NonNegative = 5.0  # maximum gradient norm; 0: off
EMA_DECAY: Rate = 0.998  # of the moving average of the weights, which is validated and used; 0: off
VALIDATE_EVERY: PositiveInt = 5  # epochs between two validations; the last epoch is always validated
AMP: Literal["auto", "bf16", "fp16", "off"] = "auto"  # mixed precision; "auto": bf16 where supported, else fp16 on cuda
SAVE_MINUTES: NonNegative = 10.0  # minutes between checkpoints inside an epoch; 0: at the end of each epoch only

NOT_TRAINED = ("DEMO", "EVALUATE", "PREDICT", "CHECKPOINT", "RESULTS", "SCORE", "VALIDATE_EVERY")
STRIDES = (4, 8, 16, 32, 64)  # of the feature pyramid
DRAWN = dict(train=40, val=10)  # images of DEMO in each part
LOWEST_SCORE = 0.02  # of a predicted box
NOTHING = dict(boxes=torch.tensor([[-9.0, -9.0, -8.0, -8.0]]), labels=torch.tensor([1]), scores=torch.tensor([0.0]))
MOST_OTHERS = 10  # files that --predict does not read, named one by one
MIN_VISIBLE = 0.3  # fraction of a box's area that must be inside a crop
# What a checkpoint says about its detector, and of which kind it is.
DETECTOR = dict(img_size=ImageSize, anchor=Positive, channels=Annotated[int, Limits(16, 1024)], nms=Fraction)


def main():
    arch, tag = split_model_name_tag(MODEL)
    if EVALUATE and PREDICT:
        raise ConstantError("EVALUATE and PREDICT are two tasks: set one of them")
    if PREDICT:
        check_apart(Path(PREDICT), Path(RESULTS))
    require("pycocotools.coco", "pycocotools.cocoeval")
    if DEMO and not Path(DATA).exists():
        write_scenes(DATA, DRAWN, 320, 240, SEED)
        print(f"drawn       {DRAWN['train']} training images and {DRAWN['val']} validation images in {DATA}")
    if EVALUATE or PREDICT:
        device = choose_device(DEVICE)
        reading = dict(batch_size=BATCH_SIZE, workers=choose_workers(WORKERS, device))
        checkpoint, model = load_detector(find_dense(CHECKPOINT, OUTPUT), device)
        if PREDICT:
            return predict(checkpoint, model, Path(PREDICT), Path(RESULTS), SCORE, reading)
        return evaluate(checkpoint, model, DATA, EVALUATE, Path(RESULTS), SCORE, reading)

    check_choices(arch, tag, OPTIMIZER, PRETRAINED, RESUME, CLASSES)
    device = choose_device(DEVICE)
    prepare_device(device)
    with DenseFolder(OUTPUT, arch, RESUME, SAVE_MINUTES, "detection", "ap", "average precision / %") as folder:
        checkpoint = folder.load(arch, OPTIMIZER, build_detector, check_detector)
        pretrained = PRETRAINED or tag
        weights = read_weights(arch, pretrained, tag) if pretrained and checkpoint is None else None

        # --- data
        classes = CLASSES or (None if checkpoint is None else checkpoint["classes"])
        with Flaws() as flaws:
            train_images, ids = read_boxes(DATA, TRAIN, flaws, classes)
            classes = list(classes or ids)
            val_images, _ = read_boxes(DATA, VAL, flaws, classes)
            check_parts(train_images, val_images, TRAIN, VAL, classes)
        mean, std = choose_normalisation(weights) if checkpoint is None else (checkpoint["mean"], checkpoint["std"])
        augment = Augmentation(IMG_SIZE, CROP_SIZE, SCALE, HFLIP, VFLIP, QUARTER_TURNS, COLOR_JITTER)
        reading = dict(batch_size=BATCH_SIZE, workers=choose_workers(WORKERS, device))
        train_set = TrainingImages(train_images, classes, augment)
        train_loader = create_train_loader(train_set, seed=SEED, collate=list, **reading)
        val_paths = [image.path for image in val_images]
        val_loader = create_loader(val_paths, IMG_SIZE, **reading)
        steps = len(train_loader)

        # --- network and optimizer
        torch.manual_seed(SEED)
        model_args = backbone_args(arch, LAYER_SCALE) if checkpoint is None else checkpoint["model_args"]
        settings = dict(img_size=IMG_SIZE, anchor=ANCHOR, channels=CHANNELS, nms=NMS)
        backbone = create_backbone(arch, model_args, DROP_PATH, weights)
        model = create_detector(backbone, len(classes), mean, std, **settings)
        model.to(device, memory_format=choose_layout(device))
        ema = ModelEma(model, EMA_DECAY) if EMA_DECAY else None
        optimizer = create_optimizer(model, OPTIMIZER, LEARNING_RATE, WEIGHT_DECAY, 1.0, device)
        amp_dtype = choose_amp(AMP, device)
        amp = partial(torch.autocast, device.type, amp_dtype, enabled=amp_dtype is not None)
        state = DenseState(
            model, ema, optimizer, torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
        )
        batch_size = train_loader.batch_sampler.batch_size
        crop = (CROP_SIZE, CROP_SIZE)
        kernels = choose_kernels(model.backbone.body, crop, batch_size, EPOCHS * steps, amp_dtype, checkpoint)
        # The learning rate grows with the root of the batch size, as in train.py.
        learning_rate = partial(
            warmup_cosine, steps=EPOCHS * steps, warmup_steps=round(WARMUP_EPOCHS * steps),
            highest=LEARNING_RATE * math.sqrt(batch_size / 32), lowest=1e-6,
        )  # fmt: skip

        # --- the run
        config = {name: value for name, value in current_values(globals()).items() if name not in NOT_TRAINED}
        about = describe_dense_run(
            task="detection", arch=arch, model_args=model_args, classes=classes, mean=mean, std=std,
            config=config, train_names=[image.path.name for image in train_images],
            val_names=[path.name for path in val_paths], device=device, amp_dtype=amp_dtype,
            detector=settings, category_ids=number_classes(classes, ids), convolutions=kernels,
        )  # fmt: skip
        folder.begin(about, checkpoint, state, crop, EPOCHS)
        flaws.write(folder.path / "flaws.txt")
        print_summary(about, train_images, val_images, steps, EPOCHS)
        folder.print_history(state)
        with Interrupt() as interrupt, folder.saved_on_error(state):
            try:
                while state.epoch < EPOCHS:
                    metrics = train_one_epoch(
                        state, train_loader, compute_loss, learning_rate, amp, clip_grad=CLIP_GRAD, seed=SEED,
                        description=f"epoch {state.epoch + 1}/{EPOCHS}", interrupt=interrupt, folder=folder,
                    )  # fmt: skip
                    started, results = time.perf_counter(), {}
                    if (state.epoch + 1) % VALIDATE_EVERY == 0 or state.epoch + 1 == EPOCHS:
                        found = find_boxes(state.network(), val_loader, amp, interrupt)
                        results, _ = average_precision(val_images, found, about["category_ids"])
                    folder.finish_epoch(state, metrics, results, time.perf_counter() - started)
            except Stopped:
                folder.save_last(state)
                print(f"stopped in epoch {state.epoch + 1} of {EPOCHS} and saved; resume with --resume auto")
                return interrupt.exit_status
        checkpoint, model = load_detector(folder.path / "best.pth", device)
        found = find_boxes(model, val_loader, amp)
        report(val_images, found, checkpoint, folder.path / "boxes.png", SCORE)
        what = f"on {len(val_images)} validation images, in epoch {state.best_epoch}"
        print(f"best AP {state.best_metric:.2f} % {what}; see {folder.path}")
        return 0


def check_apart(source, results):
    """ConstantError if drawings would be written among the images, which they might replace."""
    folder, drawings = source.resolve(), (results / "boxes").resolve()
    if source.is_dir() and (drawings.is_relative_to(folder) or folder.is_relative_to(drawings)):
        raise ConstantError(f"RESULTS must be a folder apart from PREDICT, {source}, got {str(results)!r}")


def load_detector(path, device):
    """(checkpoint, its detector in eval mode on `device`)."""
    checkpoint = load_dense(path, "detection", build_detector, check_detector)
    print(f"checkpoint  {path}: {checkpoint['arch']}, classes {', '.join(checkpoint['classes'])}")
    return checkpoint, build_dense(checkpoint, build_detector, device)


def predict(checkpoint, model, source, results, score, reading):
    """Find boxes in an image or a folder of images; writes `results`/predictions.json and `results`/boxes/*.png.

    Args:
        checkpoint, model: from `load_detector`.
        source: path of the image or folder.
        results: path of a folder, made if need be.
        score: lowest score of a box that is drawn.
        reading: dict of batch_size and workers.

    Returns:
        Exit status: 3 if some images could not be read.
    """
    if not source.exists():
        raise UserError(f"there is no {source}; set PREDICT to an image or a folder of images")
    hidden = []
    files = [source] if source.is_file() else list_files(source, skip=is_hidden, skipped=hidden)
    paths = [path for path in files if is_image(path) or path == source]
    others = [why_not(path) for path in files if is_another_kind(path) and not is_hidden(path) and path != source]
    if not paths:
        why = f" ({others[0]})" if others else ""
        raise UserError(f"{source} holds no images{why}; set PREDICT to an image or a folder of images")
    root = source.parent if source.is_file() else source
    found = find_boxes(model, create_loader(paths, checkpoint["detector"]["img_size"], **reading))
    skipped, rows, drawn = len(others), [], 0
    for number, (path, boxes) in enumerate(zip(paths, found), start=1):
        if isinstance(boxes, ImageError):
            print(f"  {boxes}")
            skipped += 1
            continue
        name = path.relative_to(root)
        rows += [row | dict(file_name=name.as_posix()) for row in to_results(number, boxes, checkpoint["category_ids"])]
        drawn += int((boxes["scores"] >= score).sum())
        drawing = results / "boxes" / name.with_name(f"{name.name}.png")
        drawing.parent.mkdir(parents=True, exist_ok=True)
        plot_boxes([(path, None, boxes)], checkpoint["classes"], score, drawing)
    write_json(results / "predictions.json", rows, None)
    for reason in others[:MOST_OTHERS]:
        print(f"  {reason}")
    if others[MOST_OTHERS:]:
        print(f"  and {len(others) - MOST_OTHERS} more that are not read as images")
    if hidden:
        print(f"passed over {len(hidden)} hidden or system folders ({', '.join(map(str, hidden[:3]))})")
    done = len(paths) + len(others) - skipped
    print(f"{drawn} boxes of score {score} or more in {done} images, drawn in {results / 'boxes'}; all {len(rows)} in "
          f"{results / 'predictions.json'}" + f"; {skipped} images skipped" * (skipped > 0))  # fmt: skip
    return 3 if skipped else 0


def evaluate(checkpoint, model, data, split, results, score, reading):
    """Average precision on a part of the data.

    Writes predictions.json, metrics.json, boxes.png and flaws.txt to `results`.

    Args:
        data, split: see `examples.boxes.read_boxes`.
        checkpoint, model, results, score, reading: see `predict`.

    Returns:
        Exit status: 3 if some images were left out.
    """
    results.mkdir(parents=True, exist_ok=True)
    with Flaws(results / "flaws.txt") as flaws:
        images, _ = read_boxes(data, split, flaws, checkpoint["classes"])
    paths = [image.path for image in images]
    found = find_boxes(model, create_loader(paths, checkpoint["detector"]["img_size"], **reading))
    metrics = report(images, found, checkpoint, results / "boxes.png", score)
    rows = [row for image, boxes in zip(images, found)
            for row in to_results(image.image_id, boxes, checkpoint["category_ids"])]  # fmt: skip
    write_json(results / "predictions.json", rows, None)
    write_json(results / "metrics.json", metrics)
    print(f"written to  {results}: predictions.json, metrics.json, boxes.png, flaws.txt")
    return 3 if flaws.images else 0


def report(images, found, checkpoint, path, score):
    """Print the average precision of each class, and draw a sheet of images with boxes; returns the metrics."""
    metrics, by_class = average_precision(images, found, checkpoint["category_ids"])
    width = max(len(label(name)) for name in [*by_class, "all"])
    print(f"\n{'class':{width}}  boxes      AP    AP50    AP75")
    for name, (count, *values) in [*by_class.items(), ("all", (sum(row[0] for row in by_class.values()),
                                                               *metrics.values()))]:  # fmt: skip
        cells = "  ".join("     -" if math.isnan(value) else f"{value:6.2f}" for value in values)
        print(f"{label(name):{width}}  {count:5d}  {cells}")
    chosen = [round(place) for place in np.linspace(0, len(images) - 1, min(8, len(images)))]
    plot_boxes([(images[n].path, images[n], found[n]) for n in chosen], checkpoint["classes"], score, path)
    return dict(images=len(images)) | metrics | dict(classes={
        name: dict(boxes=count, ap=ap, ap50=ap50, ap75=ap75) for name, (count, ap, ap50, ap75) in by_class.items()
    })  # fmt: skip


def check_choices(arch, tag, optimizer, pretrained, resume, classes):
    """Refuse names that nobody knows before anything is read or written."""
    check_backbone(arch)
    if len(set(classes)) < len(classes):
        raise ConstantError(f"CLASSES must name each class once, got {','.join(classes)}")
    if optimizer not in list_optimizers():
        raise ConstantError(f'OPTIMIZER must be "muon", "adamw" or another that timm lists, got {optimizer!r}')
    check_environment()
    if resume not in ("", "auto") and not Path(resume).is_file():
        raise ConstantError(f'RESUME must be "", "auto" or the path of a checkpoint, got {resume!r}')
    if not resume:
        check_pretrained(arch, tag, pretrained)


def check_detector(checkpoint):
    """ValueError unless a checkpoint says which detector it is of; see `DETECTOR`."""
    check_keys(checkpoint.get("detector"), DETECTOR, "its detector")
    check_fields(checkpoint["detector"], DETECTOR, "its detector's")
    ids = checkpoint.get("category_ids")
    if not isinstance(ids, dict) or list(ids) != checkpoint["classes"] or len(set(ids.values())) < len(ids):
        raise ValueError("its category_ids must be a different whole number for each of its classes")
    check_fields(ids, dict.fromkeys(ids, int), "its category_ids'")


def build_detector(checkpoint):
    """The network of a checkpoint, without its weights."""
    backbone = create_backbone(checkpoint["arch"], checkpoint["model_args"])
    return create_detector(
        backbone, len(checkpoint["classes"]), checkpoint["mean"], checkpoint["std"], **checkpoint["detector"]
    )


def create_detector(backbone, num_classes, mean, std, *, img_size, anchor, channels, nms):
    """torchvision's Faster R-CNN (Ren et al., NeurIPS 2015) with a feature pyramid (Lin et al., CVPR 2017).

    Its pyramid has batch norms, and its head is a quarter of the usual size: from scratch on a few hundred images both
    learn faster, and a CPU computes them in a fraction of the time.

    Args:
        backbone: from `common.dense.create_backbone`.
        num_classes: without the background.
        mean, std: of pixels from 0 to 1.
        img_size: longer side of the images in pixels; only kept for those who use the checkpoint.
        anchor, channels, nms: see the constants.

    Returns:
        `nn.Module`: list of images (3, H, W) from 0 to 1, and for training list of targets (boxes (n, 4) as x1, y1,
        x2, y2; labels (n,) from 1) -> dict of losses, or in eval mode list of dict of boxes, labels, scores.
    """
    pyramid = Pyramid(backbone, channels)
    anchors = AnchorGenerator(tuple((anchor * stride,) for stride in STRIDES), ((0.5, 1.0, 2.0),) * len(STRIDES))
    detector = FasterRCNN(
        pyramid,
        rpn_anchor_generator=anchors,
        rpn_head=PreciseHead(channels, anchors.num_anchors_per_location()[0]),
        box_head=TwoMLPHead(channels * 7 * 7, 4 * channels),
        box_predictor=PrecisePredictor(4 * channels, num_classes + 1),
        rpn_batch_size_per_image=128,
        rpn_pre_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=500,
        rpn_post_nms_top_n_train=300,
        rpn_post_nms_top_n_test=300,
        box_batch_size_per_image=128,
        box_score_thresh=LOWEST_SCORE,
        box_nms_thresh=nms,
    )
    detector.transform = SameSize(img_size, img_size, mean, std)
    return detector


# torchvision computes corners in the precision of what predicts them, and bfloat16 knows whole pixels only from 128 on.


class PreciseHead(RPNHead):
    """torchvision's, whose outputs are float32 with autocast, too."""

    def forward(self, maps):
        return tuple([tensor.float() for tensor in tensors] for tensors in super().forward(maps))


class PrecisePredictor(FastRCNNPredictor):
    """Likewise."""

    def forward(self, features):
        return tuple(tensor.float() for tensor in super().forward(features))


class SameSize(GeneralizedRCNNTransform):
    """Normalises images and pads them to a batch, but leaves their size as it is: they come scaled."""

    def resize(self, image, target=None):
        return image, target


class Pyramid(nn.Module):
    """Images (N, 3, H, W) -> {name: map (N, channels, H / s, W / s)} with strides s = 4, 8, 16, 32 and 64.

    Args:
        body: from `common.dense.create_backbone`.
        channels: of every map.
    """

    def __init__(self, body, channels):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            body.feature_info.channels(), channels, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d
        )
        self.out_channels = channels

    def forward(self, images):
        maps = self.body(images.contiguous(memory_format=choose_layout(images.device)))
        return self.fpn(OrderedDict((str(number), features) for number, features in enumerate(maps)))


def check_parts(train_images, val_images, train, val, classes):
    """UserError if the parts have an image in common, or the training part has no box of a class."""
    there = {name for image in train_images for name in image.counted()}
    lacking = [name for name in classes if name not in there]
    if lacking:
        known = ", ".join(sorted(there))
        raise UserError(f"{train} has no box of {', '.join(lacking)}; take names from {known} as CLASSES")
    common = {image.path.resolve() for image in train_images} & {image.path.resolve() for image in val_images}
    if common:
        raise UserError(
            f"{len(common)} images are in {train} and in {val}, such as {min(common)}, so validation would mean "
            "nothing; take them out of one of the lists"
        )


def number_classes(classes, ids):
    """{class name: COCO's category id, or its number from 1 where the data have none for every class}."""
    known = [ids.get(name) for name in classes]
    return dict(zip(classes, range(1, len(classes) + 1) if None in known else known))


class Augmentation:
    """A random square of a scaled image, and its boxes.

    Args:
        img_size, crop_size, scale, hflip, vflip, quarter_turns, color_jitter: see the constants.
    """

    FILL = (124, 116, 104)  # around an image that is smaller than the square: ImageNet's mean

    def __init__(self, img_size, crop_size, scale, hflip, vflip, quarter_turns, color_jitter):
        self.img_size, self.side, self.scale = img_size, crop_size, math.log(scale)
        self.hflip, self.vflip, self.quarter_turns = hflip, vflip, quarter_turns
        self.jitter = v2.ColorJitter(*(color_jitter,) * 3)

    def __call__(self, image, boxes):
        """PIL RGB image, tensor (n, 4) -> uint8 tensor (3, side, side), tensor (n, 4), which boxes are still seen."""
        factor = self.img_size / max(image.size) * math.exp(random.uniform(-self.scale, self.scale))
        square, corner = Image.new("RGB", (self.side, self.side), self.FILL), []
        for length in image.size:
            beyond = length - self.side / factor  # pixels of the file that the square does not show
            corner.append(random.uniform(min(0, beyond), max(0, beyond)))
        seen = [max(0, start) for start in corner]
        seen += [min(length, start + self.side / factor) for length, start in zip(image.size, corner)]
        size = [max(1, round(factor * (seen[axis + 2] - seen[axis]))) for axis in (0, 1)]
        part = image.resize(size, Image.Resampling.BILINEAR, seen)
        square.paste(part, [round(factor * (seen[axis] - corner[axis])) for axis in (0, 1)])
        boxes = factor * (boxes - torch.tensor([*corner, *corner]))
        clipped = boxes.clamp(0, self.side)
        visible = areas(clipped) > MIN_VISIBLE * areas(boxes)
        visible &= (clipped[:, 2:] - clipped[:, :2] > 1).all(1)

        pixels = self.jitter(v2.functional.pil_to_tensor(square))
        if random.random() < self.hflip:
            pixels, clipped = pixels.flip(2), mirror(clipped, self.side, 0)
        if random.random() < self.vflip:
            pixels, clipped = pixels.flip(1), mirror(clipped, self.side, 1)
        if self.quarter_turns and random.random() < 0.5:  # with the flips all multiples of 90 degrees, and reflections
            pixels, clipped = pixels.transpose(1, 2), clipped[:, [1, 0, 3, 2]]
        return pixels.contiguous(), clipped, visible


def areas(boxes):
    """Areas of boxes (n, 4): tensor (n,)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def mirror(boxes, side, axis):
    """Boxes (n, 4) in an image of `side` pixels that is flipped along `axis`: 0 x, 1 y."""
    boxes = boxes.clone()
    boxes[:, [axis, axis + 2]] = side - boxes[:, [axis + 2, axis]]
    return boxes


class TrainingImages(Dataset):
    """Augmented images with their targets: (uint8 tensor (3, H, W), dict of boxes (n, 4) and labels (n,) from 1).

    Args:
        images: list of `BoxedImage`.
        classes: names.
        augment: an `Augmentation`.
    """

    def __init__(self, images, classes, augment):
        self.images, self.augment = images, augment
        self.numbers = {name: number for number, name in enumerate(classes, start=1)}

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        counted = [place for place, ignored in enumerate(image.ignored) if not ignored]
        boxes = torch.tensor([image.boxes[place] for place in counted]).reshape(-1, 4)
        labels = torch.tensor([self.numbers[image.names[place]] for place in counted], dtype=torch.int64)
        pixels, boxes, visible = self.augment(load_image(image.path), boxes)
        return pixels, dict(boxes=boxes[visible], labels=labels[visible])


def print_summary(about, train_images, val_images, steps, epochs):
    """Print what is trained on what."""
    print(f"network     Faster R-CNN on {about['arch']}, classes {', '.join(about['classes'])}")
    for part, images in (("training", train_images), ("validation", val_images)):
        counts = {name: sum(image.counted().count(name) for image in images) for name in about["classes"]}
        total = ", ".join(f"{count} {name}" for name, count in counts.items())
        ignored = sum(sum(image.ignored) for image in images)
        more = f", and {ignored} that are ignored, as crowds or difficult" if ignored else ""
        print(f"{part:10}  {len(images)} images with {sum(counts.values())} boxes: {total}{more}")
    print(f"steps       {steps} in each of {epochs} epochs")


def compute_loss(model, batch):
    """Sum of the losses of a batch of `TrainingImages`: objectness and boxes of the proposals, classes and boxes."""
    device = next(model.parameters()).device
    images = [pixels.to(device, non_blocking=True) / 255 for pixels, _ in batch]
    targets = [{name: values.to(device, non_blocking=True) for name, values in target.items()} for _, target in batch]
    return sum(model(images, targets).values())


def create_loader(paths, img_size, batch_size, workers):
    """A loader of `ScaledImages` in their order, in lists of `batch_size`."""
    return Loader(ScaledImages(paths, img_size), batch_size, num_workers=workers, collate_fn=list, what="images")


def scaled_size(size, img_size):
    """(width, height) in pixels of an image of `size` (width, height) whose longer side becomes `img_size`."""
    return tuple(max(1, round(length * img_size / max(size))) for length in size)


class ScaledImages(Dataset):
    """Images for validation and prediction: (uint8 tensor (3, H, W), (width, height) of the file), or an `ImageError`.

    Args:
        paths: of the files.
        img_size: longer side of the tensor in pixels.
    """

    def __init__(self, paths, img_size):
        self.paths, self.img_size = paths, img_size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            image = load_image(self.paths[index])
        except ImageError as error:
            return error
        size = scaled_size(image.size, self.img_size)
        return v2.functional.pil_to_tensor(image.resize(size, Image.Resampling.BILINEAR)), image.size


@torch.inference_mode()
def find_boxes(model, loader, amp=contextlib.nullcontext, interrupt=None):
    """Boxes in images.

    Args:
        model: from `create_detector`, in eval mode afterwards.
        loader: from `create_loader`.
        amp: function that returns the autocast context.
        interrupt: see `Stopped`; None: none.

    Returns:
        A list with, for each image, a dict of boxes (n, 4) in pixels of the file, labels (n,) from 1 and scores (n,),
        the highest first; or an `ImageError`.

    Raises:
        Stopped: after a signal such as Ctrl-C.
    """
    model.eval()
    device = next(model.parameters()).device
    found = []
    for batch in Progress(loader, desc="finding boxes", unit="batch", leave=False):
        if interrupt is not None and interrupt.signal is not None:
            raise Stopped
        whole = [item for item in batch if not isinstance(item, ImageError)]
        with amp():
            predictions = iter(model([pixels.to(device) / 255 for pixels, _ in whole]) if whole else [])
        for item in batch:
            if isinstance(item, ImageError):
                found.append(item)
                continue
            (pixels, (width, height)), prediction = item, next(predictions)
            factor = torch.tensor([width / pixels.shape[2], height / pixels.shape[1]] * 2)
            values = {name: prediction[name].float().cpu() for name in ("boxes", "labels", "scores")}
            found.append(values | dict(boxes=values["boxes"] * factor, labels=values["labels"].long()))
    return found


def average_precision(images, found, category_ids):
    """COCO's average precision, by pycocotools.

    Args:
        images: list of `BoxedImage`.
        found: from `find_boxes`.
        category_ids: {class name: id}.

    Returns:
        (dict of ap, the mean over IoU from 0.5 to 0.95, ap50 and ap75, in percent;
        {class name: (boxes, ap, ap50, ap75)}, NaN for a class without boxes).
    """
    coco, cocoeval = require("pycocotools.coco", "pycocotools.cocoeval")
    truth, rows = coco.COCO(), []
    truth.dataset = to_coco(images, category_ids)
    for image, boxes in zip(images, found):
        if isinstance(boxes, ImageError):
            raise boxes
        rows += to_results(image.image_id, boxes, category_ids)
    counts = {name: sum(image.counted().count(name) for image in images) for name in category_ids}
    with contextlib.redirect_stdout(io.StringIO()):  # of which it prints a page
        truth.createIndex()
        # Without any prediction it fails; one of score 0 outside all images changes nothing else.
        nothing = to_results(images[0].image_id, NOTHING, category_ids)
        evaluation = cocoeval.COCOeval(truth, truth.loadRes(rows or nothing), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, -1]  # (IoUs, recalls, classes), all areas, 100 boxes an image
    table = {}
    for place, (name, count) in enumerate(counts.items()):
        values = 100 * precision[:, :, place].mean(1) if count else np.full(len(precision), math.nan)
        table[name] = (count, float(values.mean()), float(values[0]), float(values[5]))
    means = [float(np.nanmean([row[column] for row in table.values()])) for column in (1, 2, 3)]
    return dict(zip(("ap", "ap50", "ap75"), means)), table


def to_results(image_id, boxes, category_ids):
    """Boxes of one image as rows of COCO's format of results."""
    ids = list(category_ids.values())
    return [
        dict(image_id=image_id, category_id=ids[number - 1], bbox=[x1, y1, x2 - x1, y2 - y1], score=score)
        for (x1, y1, x2, y2), number, score in zip(
            boxes["boxes"].tolist(), boxes["labels"].tolist(), boxes["scores"].tolist()
        )
    ]


def plot_boxes(cells, classes, score, path):
    """Draw images with boxes in the colour of their class: truth dotted, predictions solid with their score.

    Args:
        cells: list of (path of an image, its `BoxedImage` or None, boxes as from `find_boxes`).
        classes: names.
        score: lowest score of a box that is drawn.
        path: PNG file to write.
    """
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    columns = min(len(cells), 4)
    lines, width = -(-len(cells) // columns), 4.0 if len(cells) > 1 else 7.0
    figure = new_figure(figsize=(width * columns, 0.78 * width * lines + 0.4), layout="constrained")
    colours = [colormaps["tab10"](number % 10) for number in range(len(classes))]
    for place, (file, truth, boxes) in enumerate(cells, start=1):
        image = load_image(file)
        axes = figure.add_subplot(lines, columns, place, xticks=[], yticks=[])
        size = image.size
        image.thumbnail((1200, 1200))
        axes.imshow(image, extent=(0, size[0], size[1], 0))
        axes.set_xlabel(label(Path(file).name), fontsize=8)
        shown = [] if truth is None else [
            (box, classes.index(name), None) for box, name in zip(truth.boxes, truth.names)
        ]  # fmt: skip
        shown += [
            (box, number - 1, value)
            for box, number, value in zip(*(boxes[name].tolist() for name in ("boxes", "labels", "scores")))
            if value >= score
        ]
        for (x1, y1, x2, y2), number, value in shown:
            style = dict(fill=False, color=colours[number], ls=":" if value is None else "-")
            axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, lw=1.8 if value is None else 1.2, **style))
            if value is not None:
                axes.text(x1, y1, f"{value:.2f}", fontsize=6, va="bottom", color=colours[number], clip_on=True)
    handles = [Line2D([], [], color=colour) for colour in colours]
    add_legend(figure, handles, classes, loc="outside upper center", ncols=min(len(classes), 8), fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    run(main)
