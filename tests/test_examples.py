"""The examples: the network as a backbone, with any image size."""

import re
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from common.options import ConstantError
from examples import scene, segmentation

TINY = dict(depths=(1, 1, 1, 1), dims=(16, 32, 64, 128), kernel_sizes=((3,), (13,), (13,), (13,)))


@pytest.fixture
def tiny(monkeypatch):
    """Backbones with few blocks and channels."""
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, **TINY))


@pytest.fixture
def small(tiny, tmp_path, monkeypatch):
    """Run an example with a tiny network on small images in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(script, **constants):
        for name, value in (dict(WIDTH=75, HEIGHT=50, BATCH_SIZE=2, DEVICE="cpu") | constants).items():
            monkeypatch.setattr(script, name, value)
        script.main()

    return run


def losses(out):
    return [float(loss) for loss in re.search(r"loss ([\d.]+) at the start, ([\d.]+) at the end", out).groups()]


def test_segmentation_learns(small, tmp_path, capsys):
    small(segmentation, STEPS=10, BATCH_SIZE=1, LEARNING_RATE=5e-3)
    start, end = losses(capsys.readouterr().out)
    assert end < 0.9 * start
    assert Image.open(tmp_path / "results" / "segmentation.png").width > 500


def test_a_backbone_that_does_not_fit_is_refused():
    scene.check_backbone("unireplknet_a", True)
    for name in ("resnet18", "vit_tiny_patch16_224", "unireplknet"):
        with pytest.raises(ConstantError, match="MODEL must be a timm model .* 'unireplknet_a', got '" + name):
            scene.check_backbone(name, False)


def test_a_scene_has_boxes_around_its_masks():
    image, mask, boxes, labels = scene.draw_scene("a key", 160, 120)
    assert image.shape == (3, 120, 160) and mask.shape == (120, 160) and len(boxes) == len(labels) > 0
    assert set(mask.unique().tolist()) <= set(range(len(scene.CLASSES)))
    rows, columns = np.nonzero(mask.numpy())
    outer = [boxes[:, 0].min(), boxes[:, 1].min(), boxes[:, 2].max(), boxes[:, 3].max()]
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [int(side) for side in outer]
    assert torch.equal(scene.draw_scene("a key", 160, 120)[0], image)


def test_mean_iou():
    truth = torch.tensor([[0, 0, 1, 1]])
    assert segmentation.mean_iou(truth, truth) == 100
    assert segmentation.mean_iou(torch.tensor([[0, 1, 1, 1]]), truth) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
