"""The examples: the network as a backbone, with any image size."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from common import dense
from common.network import read_weights
from common.options import ConstantError
from examples import scene


def test_a_backbone_that_does_not_fit_is_refused():
    for name in ("unireplknet_a", "resnet18"):
        dense.check_backbone(name)
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "unireplknet"):
        with pytest.raises(ConstantError, match="MODEL must be a timm model .* 'unireplknet_a', got '" + name):
            dense.check_backbone(name)


@pytest.mark.parametrize("size", [(384, 384), (333, 250), (97, 61)])
def test_maps_of_any_image_size(size):
    backbone = dense.create_backbone("unireplknet_test", dense.backbone_args("unireplknet_test", 0.1)).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, *size))
    assert [features.shape[1] for features in maps] == backbone.feature_info.channels() == [8, 16, 16, 32]
    for stride, features in zip((4, 8, 16, 32), maps):
        assert features.shape[-2:] == tuple(-(-side // stride) for side in size)


def test_a_backbone_starts_from_a_classifier_of_train_py(capsys):
    """The weights in the repository are those of a classifier with 12 classes."""
    weights = read_weights("unireplknet_a", "seedlings")
    backbone = dense.create_backbone("unireplknet_a", dense.backbone_args("unireplknet_a", 0.1), weights=weights)
    assert "loaded 624 of 626 tensors" in capsys.readouterr().out
    own = backbone.state_dict()
    assert len(own) > 600
    for name, tensor in own.items():
        assert torch.equal(tensor, weights["state_dict"][name.removeprefix("model.")]), name
    mean, std = dense.choose_normalisation(weights)
    assert mean == weights["expected"]["MEAN"] and len(std) == 3


def test_a_scene_has_boxes_around_its_masks():
    image, mask, boxes, labels = scene.draw_scene("a key", 160, 120)
    assert image.shape == (3, 120, 160) and mask.shape == (120, 160) and len(boxes) == len(labels) > 0
    assert set(mask.unique().tolist()) <= set(range(len(scene.CLASSES)))
    rows, columns = np.nonzero(mask.numpy())
    outer = [boxes[:, 0].min(), boxes[:, 1].min(), boxes[:, 2].max(), boxes[:, 3].max()]
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [int(side) for side in outer]
    assert torch.equal(scene.draw_scene("a key", 160, 120)[0], image)


def test_scenes_are_written_as_people_have_them(tmp_path):
    scene.write_scenes(tmp_path, dict(train=2, val=1), 80, 60)
    mask = np.array(Image.open(tmp_path / "masks/train/001.png"))
    _, drawn, boxes, labels = scene.draw_scene("0/train/1", 80, 60)
    assert np.array_equal(mask, drawn.numpy()) and Image.open(tmp_path / "images/train/001.jpg").size == (80, 60)
    content = json.loads((tmp_path / "boxes/train.json").read_text(encoding="utf-8"))
    own = [row for row in content["annotations"] if row["image_id"] == 1]
    assert [row["category_id"] for row in own] == labels.tolist()
    x, y, width, height = own[0]["bbox"]
    assert [x, y, x + width, y + height] == boxes[0].tolist()
    assert (tmp_path / "classes.txt").read_text(encoding="utf-8").split() == list(scene.CLASSES)
