"""UniRepLKNet as the backbone of a segmentation network: all four feature maps, summed, and torchvision's FCN head.

    python examples/segmentation.py

Trains for a few steps on drawn fields, prints the loss and the mean IoU on new fields, and writes
results/segmentation.png.
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/, prepare/, examples/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torchvision.models.segmentation.fcn import FCNHead

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
STEPS: PositiveInt = 120  # training steps
BATCH_SIZE: PositiveInt = 4  # images per step
LEARNING_RATE: Positive = 1e-3  # learning rate of AdamW
DEVICE: Name = "auto"  # "auto": cuda, else mps, else cpu; or a device such as "cuda:1"
SEED: Annotated[int, Limits(0, 2**32 - 1)] = 42  # initial weights and images
OUTPUT: Name = "results"  # folder for the plot


def main():
    check_backbone(MODEL, PRETRAINED)
    torch.manual_seed(SEED)
    device = choose_device(DEVICE)
    model = Segmenter(MODEL, PRETRAINED).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    losses = []
    for step in Progress(range(STEPS), desc="training", unit="step", leave=False):
        images, masks = draw_batch(f"{SEED}/train/{step}", BATCH_SIZE, WIDTH, HEIGHT)
        loss = F.cross_entropy(model(images.to(device)), masks.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    tenth = max(STEPS // 10, 1)
    print(f"loss {sum(losses[:tenth]) / tenth:.3f} at the start, {sum(losses[-tenth:]) / tenth:.3f} at the end")

    images, masks = draw_batch(f"{SEED}/test", 4, WIDTH, HEIGHT)
    with torch.inference_mode():
        predictions = model.eval()(images.to(device)).argmax(1).cpu()
    print(f"mean IoU {mean_iou(predictions, masks):.1f} % on {len(images)} new images")
    path = Path(OUTPUT, "segmentation.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_masks(images, masks, predictions, path)
    print(f"images, ground truth and predictions in {path}")


class Segmenter(nn.Module):
    """Images (N, 3, H, W) -> logits (N, classes, H, W), one vector per pixel.

    Args:
        name: of a timm model.
        pretrained: whether to load its ImageNet weights.
        classes: number of them.
    """

    def __init__(self, name, pretrained=False, classes=len(CLASSES)):
        super().__init__()
        self.body = create_backbone(name, pretrained)
        # The same small number of channels each: on maps of stride 4 the head is what takes the time.
        self.lateral = nn.ModuleList(nn.Conv2d(channels, 64, 1) for channels in self.body.feature_info.channels())
        self.head = FCNHead(64, classes)

    def forward(self, images):
        maps = [conv(m) for conv, m in zip(self.lateral, self.body(images))]  # strides 4, 8, 16, 32
        size = maps[0].shape[-2:]
        summed = sum(F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps)
        return F.interpolate(self.head(summed), images.shape[-2:], mode="bilinear", align_corners=False)


def draw_batch(name, count, width, height):
    """Draw (images (count, 3, height, width), masks (count, height, width))."""
    scenes = [draw_scene(f"{name}/{number}", width, height) for number in range(count)]
    return torch.stack([image for image, _, _, _ in scenes]), torch.stack([mask for _, mask, _, _ in scenes])


def mean_iou(predictions, masks):
    """Mean over the classes of intersection / union, in percent; classes that occur in neither are skipped."""
    ious = []
    for number in range(len(CLASSES)):
        union = ((predictions == number) | (masks == number)).sum()
        if union:
            ious.append(((predictions == number) & (masks == number)).sum() / union)
    return 100 * float(sum(ious) / len(ious))


def plot_masks(images, masks, predictions, path):
    """Draw images, ground truth and predictions; soil black, crop grey, weed white."""
    figure = Figure(figsize=(3.2 * len(images), 8.2), layout="constrained")
    for column, cells in enumerate(zip(images.permute(0, 2, 3, 1), masks, predictions)):
        for row, (cell, title) in enumerate(zip(cells, ("image", "ground truth", "prediction"))):
            axes = figure.add_subplot(3, len(images), row * len(images) + column + 1, xticks=[], yticks=[], title=title)
            axes.imshow(cell.numpy(), cmap="gray", vmin=0, vmax=len(CLASSES) - 1)
    figure.supxlabel("black: soil, grey: crop, white: weed")
    save_figure(figure, path)


if __name__ == "__main__":
    run(main)
