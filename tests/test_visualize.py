"""tools/visualize.py, Grad-CAM and the page of tools/demo.py."""

import csv
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, draw_picture
from PIL import Image
from torch import nn

import train
from common import plots
from common.checkpoint import build_network, load_checkpoint
from common.dataset import eval_transform
from common.gradcam import grad_cam, overlay
from common.images import load_image
from common.options import UserError
from tools import demo, visualize


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A copy of `trained`, in which visualize.main() runs on little."""
    shutil.copytree(trained, tmp_path / "place", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "place")
    shutil.copytree("checkpoints/unireplknet_a", "other")
    constants = dict(PICTURES=9, SHOWN=2, COMPARE=["other/best.pth"], FIELD_SIZE=64, FIELD_PICTURES=2, DEVICE="cpu")
    for name, value in constants.items():
        monkeypatch.setattr(visualize, name, value)
    return tmp_path / "place"


def test_all_pictures_of_a_checkpoint(place, capsys):
    visualize.main()
    names = ["augmentation", "receptive_field", "kernels", "features", *(f"gradcam/{name}" for name in CLASSES)]
    for name in names:
        pixels = np.asarray(Image.open(place / "results" / f"{name}.png").convert("L"))
        assert pixels.shape[1] > 400 and pixels.std() > 5, name
    with open(place / "results" / "receptive_field.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert rows[0][1:] == rows[1][1:]
    assert [row[0] for row in rows] == ["unireplknet_a", "other"] and "pixels" in header[1]
    assert "left out" not in capsys.readouterr().out


def test_augmentation_is_what_training_does(place, monkeypatch):
    shutil.rmtree("checkpoints")
    drawn = []
    monkeypatch.setattr(visualize, "plot_augmentation", lambda *args: drawn.append(args))
    monkeypatch.setattr(visualize, "WHAT", ["augmentation"])
    monkeypatch.setattr(train, "IMG_SIZE", 32)
    visualize.main()
    pictures, labels, classes, transform, mixup, mix, _ = drawn[0]
    assert classes == list(CLASSES) and sorted(labels) == [0, 1, 2] and mix is train.mix
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob) == (train.MIXUP, train.CUTMIX, train.MIX_PROB)
    for name in ("CUTOUT", "COLOR_JITTER", "HFLIP", "VFLIP", "QUARTER_TURNS"):
        monkeypatch.setattr(train, name, 0)
    monkeypatch.setattr(train, "CROP", 1.0)
    plain = train.train_transform([0.0] * 3, [1.0] * 3)(pictures[0])
    expected = np.asarray(pictures[0].resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(plain.numpy(), expected, atol=1e-6)
    assert transform(pictures[0]).shape == (3, 32, 32)


def test_names_that_cannot_be_drawn(place, monkeypatch):
    for constants, message in (
        (dict(WHAT=["gradcams"]), "gradcams cannot be drawn; choose from augmentation, gradcam"),
        (dict(SHOWN=0), "SHOWN and FIELD_PICTURES must be at least 1"),
        (dict(WHAT=["receptive_field"], COMPARE=["resnet50"]), "resnet50, which is neither a checkpoint nor one of"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in constants.items():
                patch.setattr(visualize, name, value)
            with pytest.raises(UserError, match=message):
                visualize.main()


class Pooled(nn.Module):
    """Convolution, mean over the map, linear layer: for it Grad-CAM is the sum of the maps by the class's weights."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)
        self.feature_info = [dict(module="conv", num_chs=4)]

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


def test_grad_cam_of_a_network_where_it_is_known():
    torch.manual_seed(0)
    network, images = Pooled().eval(), torch.randn(2, 3, 8, 8)
    classes = torch.tensor([1, 3])
    logits, cam = grad_cam(network, images, classes)
    with torch.no_grad():
        maps = torch.einsum("nchw,nc->nhw", network.conv(images), network.head.weight[classes]).relu()
        torch.testing.assert_close(logits, network(images))
    torch.testing.assert_close(cam, maps / maps.amax((1, 2), keepdim=True))
    assert not cam.requires_grad and network.conv.weight.grad is None


def test_grad_cam_needs_maps():
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3).eval()
    with pytest.raises(UserError, match="feature maps"):
        grad_cam(network, torch.randn(1, 3, 32, 32))


def test_overlay_darkens_what_does_not_count():
    cam = np.zeros((8, 8), dtype=np.float32)
    cam[:, 4:] = 1
    pixels = np.asarray(overlay(Image.new("RGB", (160, 80), (200, 100, 40)), cam))
    assert pixels.shape == (80, 160, 3)
    assert pixels[40, 5].tolist() == [50, 25, 10] and pixels[40, 155].tolist() == [200, 100, 40]
    assert (pixels[40] == 255).all(1).any()


def test_receptive_field_of_a_convolution_is_its_kernel():
    conv = nn.Conv2d(3, 6, 5, padding=2, bias=False)
    nn.init.uniform_(conv.weight, 0.1, 1)
    network = SimpleNamespace(forward_features=conv)
    field = visualize.receptive_field(network, [torch.rand(1, 3, 33, 33), torch.rand(1, 3, 33, 33)], "cpu")
    expected = np.zeros((33, 33))
    expected[14:19, 14:19] = conv.weight.detach().sum((0, 1))
    np.testing.assert_allclose(field, expected / expected.sum(), atol=1e-8)
    assert visualize.middle_square(field, 99) == 5


def test_receptive_field_needs_maps():
    network = SimpleNamespace(forward_features=lambda images: images.flatten(1))
    with pytest.raises(UserError, match="needs feature maps"):
        visualize.receptive_field(network, [torch.rand(1, 3, 8, 8)], "cpu")


def test_weights_that_cannot_be_downloaded_are_left_out(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(visualize.timm, "create_model", fail)
    assert visualize.open_network("resnet50.a1_in1k", "cpu") == {}
    assert "left out    resnet50.a1_in1k: its weights cannot be downloaded (OSError)" in capsys.readouterr().out


def test_middle_square():
    field = np.zeros((32, 32))
    field[16, 16], field[16, 19], field[1, 1] = 0.5, 0.4, 0.1
    assert [visualize.middle_square(field, share) for share in (50, 90, 99)] == [1, 7, 31]


def test_chinese_names_are_drawn_where_a_font_has_them(tmp_path):
    if not plots.find_cjk_fonts():
        pytest.skip("this machine has no font with Chinese characters")
    cells = []
    for name in "玉米":
        plots.plot_sheet([None], [name], tmp_path / "sheet.png")
        cells.append(np.asarray(Image.open(tmp_path / "sheet.png").convert("L")))
    assert (cells[0] != cells[1]).any()  # boxes for characters that are missing look alike


def test_the_page_answers_as_the_network(place):
    checkpoint = load_checkpoint("checkpoints/unireplknet_a/best.pth")
    photo = place / "玉米 照片.png"
    draw_picture("a photograph", (90, 60)).save(photo)
    answers, cam = demo.Answers(checkpoint, torch.device("cpu"))(photo)
    transform = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])
    with torch.no_grad():
        logits = build_network(checkpoint, merge=False)(transform(load_image(photo))[None])[0]
    assert answers == pytest.approx(dict(zip(checkpoint["classes"], logits.softmax(0).tolist())), abs=1e-5)
    assert list(answers.values()) == sorted(answers.values(), reverse=True) and cam.size == (90, 60)


def test_the_page_is_built_or_says_what_is_missing(place):
    try:
        import gradio  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="needs the package gradio .* pip install gradio"):
            demo.main()
        return
    page = demo.build_page(lambda path: ({}, None), "a title")
    assert "a title" in str(page.get_config_file())
