"""The examples: the network as a backbone, with any size of picture."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from examples import detection, segmentation
from examples.scene import CLASSES, draw_scene


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Both examples on small pictures, in `tmp_path`; returns a function that sets constants."""
    monkeypatch.chdir(tmp_path)

    def configure(script, **constants):
        for name, value in (dict(WIDTH=75, HEIGHT=50, BATCH_SIZE=2, DEVICE="cpu") | constants).items():
            monkeypatch.setattr(script, name, value)

    return configure


def losses(out):
    return [float(loss) for loss in re.search(r"loss ([\d.]+) at the start, ([\d.]+) at the end", out).groups()]


def test_segmentation_learns(small, tmp_path, capsys):
    small(segmentation, STEPS=30)
    segmentation.main()
    start, end = losses(capsys.readouterr().out)
    assert end < 0.9 * start
    assert Image.open(tmp_path / "results" / "segmentation.png").width > 500


def test_detection_learns(small, tmp_path, capsys):
    small(detection, WIDTH=100, HEIGHT=70, STEPS=40)
    detection.main()
    start, end = losses(capsys.readouterr().out)
    assert end < 0.9 * start
    assert Image.open(tmp_path / "results" / "detection.png").width > 500


@pytest.mark.parametrize("size", [(384, 384), (640, 640), (333, 250), (97, 61)])
def test_maps_of_any_size_of_picture(size):
    backbone = detection.Backbone().eval()
    with torch.no_grad():
        maps = backbone.body(torch.zeros(1, 3, *size))
        pyramid = backbone(torch.zeros(1, 3, *size))
    for stride, features in zip((4, 8, 16, 32), maps):
        assert features.shape[-2:] == tuple(-(-edge // stride) for edge in size)
    assert [tuple(level.shape[-2:]) for level in pyramid.values()][:4] == [tuple(m.shape[-2:]) for m in maps]


def test_a_scene_has_boxes_around_its_masks():
    image, mask, boxes, labels = draw_scene("a key", 160, 120)
    assert image.shape == (3, 120, 160) and mask.shape == (120, 160) and len(boxes) == len(labels) > 0
    assert set(mask.unique().tolist()) <= set(range(len(CLASSES)))
    rows, columns = np.nonzero(mask.numpy())
    outer = [boxes[:, 0].min(), boxes[:, 1].min(), boxes[:, 2].max(), boxes[:, 3].max()]
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [int(edge) for edge in outer]
    assert torch.equal(draw_scene("a key", 160, 120)[0], image)


def test_mean_iou():
    truth = torch.tensor([[0, 0, 1, 1]])
    assert segmentation.mean_iou(truth, truth) == 100
    assert segmentation.mean_iou(torch.tensor([[0, 1, 1, 1]]), truth) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
