"""UniRepLKNet as the backbone of a detector: torchvision's feature pyramid and Faster R-CNN.

    python examples/detection.py

Trains for a few steps on drawn fields, prints the loss, and writes results/detection.png: detections on new fields.
"""

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/, prepare/, examples/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import models  # noqa: F401  registers the UniRepLKNet variants with timm
from common.device import choose_device
from common.options import ImageSize, Limits, Name, Positive, PositiveInt, run
from common.plots import save_figure
from common.progress import Progress
from examples.scene import CLASSES, check_backbone, create_backbone, draw_scene

MODEL: Name = "unireplknet_a"  # backbone, a timm model with four feature maps
PRETRAINED: bool = False  # start from ImageNet weights, which are downloaded
WIDTH: ImageSize = 220  # of an image in pixels; need not be a multiple of 32
HEIGHT: ImageSize = 180  # likewise
STEPS: PositiveInt = 80  # training steps
BATCH_SIZE: PositiveInt = 4  # images per step
LEARNING_RATE: Positive = 5e-4  # learning rate of AdamW
DEVICE: Name = "auto"  # "auto": cuda, else mps, else cpu; or a device such as "cuda:1"
SEED: Annotated[int, Limits(0, 2**32 - 1)] = 42  # initial weights and images
OUTPUT: Name = "results"  # folder for the plot


def main():
    check_backbone(MODEL, PRETRAINED)
    torch.manual_seed(SEED)
    device = choose_device(DEVICE)
    model = create_detector(MODEL, PRETRAINED, WIDTH, HEIGHT).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    losses = []
    for step in Progress(range(STEPS), desc="training", unit="step", leave=False):
        images, targets = draw_batch(f"{SEED}/train/{step}", BATCH_SIZE, WIDTH, HEIGHT)
        images = [image.to(device) for image in images]
        targets = [{name: tensor.to(device) for name, tensor in target.items()} for target in targets]
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    tenth = max(STEPS // 10, 1)
    print(f"loss {sum(losses[:tenth]) / tenth:.3f} at the start, {sum(losses[-tenth:]) / tenth:.3f} at the end")

    images, targets = draw_batch(f"{SEED}/test", 4, WIDTH, HEIGHT)
    with torch.inference_mode():
        detections = model.eval()([image.to(device) for image in images])
    detections = [
        {name: tensor.cpu()[detection["scores"].cpu() > 0.5] for name, tensor in detection.items()}
        for detection in detections
    ]
    path = Path(OUTPUT, "detection.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_boxes(images, targets, detections, path)
    print(f"ground truth and detections in {path}")


def create_detector(name, pretrained, width, height):
    """Build a Faster R-CNN for `CLASSES` whose input is not rescaled.

    Args:
        name, pretrained: see `Backbone`.
        width, height: of the images in pixels.
    """
    anchors = AnchorGenerator(sizes=((24,), (48,), (96,), (192,), (384,)), aspect_ratios=((0.5, 1.0, 2.0),) * 5)
    return FasterRCNN(
        Backbone(name, pretrained),
        num_classes=len(CLASSES),
        min_size=min(width, height),
        max_size=max(width, height),
        rpn_anchor_generator=anchors,
        box_batch_size_per_image=64,  # 512 by default: too many for a CPU, and for few objects per image
        rpn_post_nms_top_n_train=200,
        box_nms_thresh=0.3,
    )


class Backbone(nn.Module):
    """Images (N, 3, H, W) -> {name: map (N, out_channels, H / s, W / s)} with strides s = 4, 8, 16, 32 and 64.

    Args:
        name: of a timm model.
        pretrained: whether to load its ImageNet weights.
        out_channels: of every map.
    """

    def __init__(self, name, pretrained=False, out_channels=64):
        super().__init__()
        self.body = create_backbone(name, pretrained)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, images):
        return self.fpn(OrderedDict((str(number), maps) for number, maps in enumerate(self.body(images))))


def draw_batch(name, count, width, height):
    """Draw (images, targets) as torchvision's detectors take them."""
    scenes = [draw_scene(f"{name}/{number}", width, height) for number in range(count)]
    images = [image for image, _, _, _ in scenes]
    return images, [dict(boxes=boxes, labels=labels) for _, _, boxes, labels in scenes]


def plot_boxes(images, targets, detections, path):
    """Draw ground-truth boxes (dotted) and detections (solid, with class and score)."""
    figure = Figure(figsize=(3.2 * len(images), 3.2), layout="constrained")
    for number, (image, target, detection) in enumerate(zip(images, targets, detections), start=1):
        axes = figure.add_subplot(1, len(images), number, xticks=[], yticks=[])
        axes.imshow(image.permute(1, 2, 0).numpy())
        for boxes, line in ((target["boxes"], ":"), (detection["boxes"], "-")):
            for x1, y1, x2, y2 in boxes.tolist():
                axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color="white", lw=1.5, ls=line))
        for (x1, y1, _, _), label, score in zip(detection["boxes"].tolist(), detection["labels"], detection["scores"]):
            axes.text(x1, y1, f"{CLASSES[label]} {score:.2f}", fontsize=7, va="bottom", color="white")
    save_figure(figure, path)


if __name__ == "__main__":
    run(main)
