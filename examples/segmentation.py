"""UniRepLKNet as the backbone of a segmentation network: all four maps, summed, and torchvision's FCN head.

    python examples/segmentation.py

Trains for a few steps on drawn fields, prints the loss and the mean IoU on new ones, and leaves
results/segmentation.png.
"""

import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torchvision.models.segmentation.fcn import FCNHead
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
STEPS: int = 120  # steps of training
BATCH_SIZE: int = 4  # pictures in each step
LEARNING_RATE: float = 1e-3  # of AdamW
DEVICE: str = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
SEED: int = 42  # first weights and pictures
OUTPUT: str = "results"  # folder for the picture


class Segmenter(nn.Module):
    """Images (N, 3, H, W) -> logits (N, classes, H, W) for each pixel."""

    def __init__(self, classes=len(CLASSES)):
        super().__init__()
        self.body = timm.create_model(MODEL, features_only=True, pretrained=PRETRAINED)
        # To the same few channels each: on maps of stride 4 the head is what takes the time.
        self.lateral = nn.ModuleList(nn.Conv2d(channels, 64, 1) for channels in self.body.feature_info.channels())
        self.head = FCNHead(64, classes)

    def forward(self, images):
        maps = [conv(m) for conv, m in zip(self.lateral, self.body(images))]  # strides 4, 8, 16, 32
        size = maps[0].shape[-2:]
        summed = sum(F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps)
        return F.interpolate(self.head(summed), images.shape[-2:], mode="bilinear", align_corners=False)


def draw_batch(name, count):
    """(images (count, 3, HEIGHT, WIDTH), masks (count, HEIGHT, WIDTH))."""
    scenes = [draw_scene(f"{name}/{number}", WIDTH, HEIGHT) for number in range(count)]
    return torch.stack([image for image, _, _, _ in scenes]), torch.stack([mask for _, mask, _, _ in scenes])


def mean_iou(answers, masks):
    """Mean over the classes of intersection / union, in percent."""
    shares = []
    for number in range(len(CLASSES)):
        union = ((answers == number) | (masks == number)).sum()
        if union:
            shares.append(((answers == number) & (masks == number)).sum() / union)
    return 100 * float(sum(shares) / len(shares))


def plot_masks(images, masks, answers, path):
    """Draw pictures, true masks and answers; soil black, crop grey, weed white."""
    figure = Figure(figsize=(3.2 * len(images), 8.2), layout="constrained")
    for column, cells in enumerate(zip(images.permute(0, 2, 3, 1), masks, answers)):
        for row, (cell, title) in enumerate(zip(cells, ("picture", "truth", "answer"))):
            axes = figure.add_subplot(3, len(images), row * len(images) + column + 1, xticks=[], yticks=[], title=title)
            axes.imshow(cell, cmap="gray", vmin=0, vmax=len(CLASSES) - 1)
    figure.supxlabel("black: soil, grey: crop, white: weed")
    save(figure, path)


def main():
    torch.manual_seed(SEED)
    device = choose_device(DEVICE)
    model = Segmenter().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    losses = []
    for step in tqdm(range(STEPS), desc="training", unit="step", leave=False):
        images, masks = draw_batch(f"{SEED}/train/{step}", BATCH_SIZE)
        loss = F.cross_entropy(model(images.to(device)), masks.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    tenth = max(STEPS // 10, 1)
    print(f"loss {sum(losses[:tenth]) / tenth:.3f} at the start, {sum(losses[-tenth:]) / tenth:.3f} at the end")

    images, masks = draw_batch(f"{SEED}/test", 4)
    with torch.inference_mode():
        answers = model.eval()(images.to(device)).argmax(1).cpu()
    print(f"mean IoU {mean_iou(answers, masks):.1f} % on {len(images)} new pictures")
    path = Path(OUTPUT, "segmentation.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_masks(images, masks, answers, path)
    print(f"pictures, masks and answers in {path}")


if __name__ == "__main__":
    run(main)
