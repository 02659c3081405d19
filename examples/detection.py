"""UniRepLKNet as the backbone of a detector: torchvision's feature pyramid and Faster R-CNN.

    python examples/detection.py

Trains for a few steps on drawn fields, prints the loss, and leaves results/detection.png: what it finds on new ones.
"""

import sys
from collections import OrderedDict
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # models/ and common/
import models  # noqa: F401  registers the UniRepLKNet variants with timm
from common.device import choose_device
from common.options import run
from common.plots import save
from examples.scene import CLASSES, draw_scene

MODEL: str = "unireplknet_a"  # backbone, one of timm's names
PRETRAINED: bool = False  # start from ImageNet's weights, which are downloaded
WIDTH: int = 220  # of a picture in pixels; any size will do
HEIGHT: int = 180  # likewise
STEPS: int = 80  # steps of training
BATCH_SIZE: int = 4  # pictures in each step
LEARNING_RATE: float = 5e-4  # of AdamW
DEVICE: str = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
SEED: int = 42  # first weights and pictures
OUTPUT: str = "results"  # folder for the picture


class Backbone(nn.Module):
    """Images (N, 3, H, W) -> {name: map (N, out_channels, H / s, W / s)} with s = 4, 8, 16, 32 and 64."""

    def __init__(self, out_channels=64):
        super().__init__()
        self.body = timm.create_model(MODEL, features_only=True, pretrained=PRETRAINED)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels, LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, images):
        return self.fpn(OrderedDict((str(number), maps) for number, maps in enumerate(self.body(images))))


def create_detector():
    """A Faster R-CNN for `CLASSES`; pictures are neither enlarged nor made smaller."""
    anchors = AnchorGenerator(sizes=((24,), (48,), (96,), (192,), (384,)), aspect_ratios=((0.5, 1.0, 2.0),) * 5)
    return FasterRCNN(
        Backbone(),
        num_classes=len(CLASSES),
        min_size=min(WIDTH, HEIGHT),
        max_size=max(WIDTH, HEIGHT),
        rpn_anchor_generator=anchors,
        box_batch_size_per_image=64,  # 512 by default: too many for a CPU, and for few objects in a picture
        rpn_post_nms_top_n_train=200,
        box_nms_thresh=0.3,
    )


def draw_batch(name, count):
    """(images, targets) as torchvision's detectors take them."""
    scenes = [draw_scene(f"{name}/{number}", WIDTH, HEIGHT) for number in range(count)]
    images = [image for image, _, _, _ in scenes]
    return images, [dict(boxes=boxes, labels=labels) for _, _, boxes, labels in scenes]


def plot_boxes(images, targets, found, path):
    """Draw true boxes (dotted) and found ones (solid, with class and score)."""
    figure = Figure(figsize=(3.2 * len(images), 3.2), layout="constrained")
    for number, (image, target, answer) in enumerate(zip(images, targets, found), start=1):
        axes = figure.add_subplot(1, len(images), number, xticks=[], yticks=[])
        axes.imshow(image.permute(1, 2, 0))
        for boxes, line in ((target["boxes"], ":"), (answer["boxes"], "-")):
            for x1, y1, x2, y2 in boxes.tolist():
                axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color="white", lw=1.5, ls=line))
        for (x1, y1, _, _), label, score in zip(answer["boxes"].tolist(), answer["labels"], answer["scores"]):
            axes.text(x1, y1, f"{CLASSES[label]} {score:.2f}", fontsize=7, va="bottom", color="white")
    save(figure, path)


def main():
    torch.manual_seed(SEED)
    device = choose_device(DEVICE)
    model = create_detector().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    losses = []
    for step in tqdm(range(STEPS), desc="training", unit="step", leave=False):
        images, targets = draw_batch(f"{SEED}/train/{step}", BATCH_SIZE)
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

    images, targets = draw_batch(f"{SEED}/test", 4)
    with torch.inference_mode():
        found = model.eval()([image.to(device) for image in images])
    found = [{name: tensor.cpu()[answer["scores"].cpu() > 0.5] for name, tensor in answer.items()} for answer in found]
    path = Path(OUTPUT, "detection.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_boxes(images, targets, found, path)
    print(f"true and found boxes in {path}")


if __name__ == "__main__":
    run(main)
