"""tools/visualize.py, tools/grad_cam.py, the page of tools/web_demo.py, and fonts of common/plots.py."""

import csv
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, ROOT, SMALL
from PIL import Image
from torch import nn
from torchvision import transforms

from common import plots
from common.augment import BatchMixup
from common.checkpoint import build_network, load_checkpoint, save_checkpoint
from common.dataset import eval_transform
from common.images import load_image
from common.options import ConstantError, UserError, set_constants
from tools import visualize, web_demo
from tools.grad_cam import grad_cam, overlay

CHECKPOINT = Path("checkpoints", SMALL["MODEL"], "best.pth")


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A copy of `trained`, in which visualize.main() does little."""
    shutil.copytree(trained, tmp_path / "place", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "place")
    constants = dict(IMAGES=6, SHOWN=1, COMPARE=[], FIELD_SIZE=64, FIELD_IMAGES=2, DEVICE="cpu")
    for name, value in constants.items():
        monkeypatch.setattr(visualize, name, value)
    return tmp_path / "place"


@pytest.fixture
def draw_augmentation(monkeypatch):
    """Run visualize.main() for augmentation alone, without drawing; returns the arguments of `plot_augmentation`."""
    drawn = []
    monkeypatch.setattr(visualize, "plot_augmentation", lambda *args: drawn.append(args))
    monkeypatch.setattr(visualize, "WHAT", ["augmentation"])

    def draw():
        visualize.main()
        return drawn[-1]

    return draw


def test_all_plots_of_a_checkpoint(place, monkeypatch, capsys):
    shutil.copytree(CHECKPOINT.parent, "other")
    shutil.copytree(CHECKPOINT.parent, place / "elsewhere" / "other")
    monkeypatch.setattr(visualize, "COMPARE", ["other/best.pth", "elsewhere/other/best.pth"])
    visualize.main()
    names = ["augmentation", "receptive_field", "kernels", "features", *(f"gradcam/{name}" for name in CLASSES)]
    for name in names:
        pixels = np.asarray(Image.open(place / "results" / f"{name}.png").convert("L"))
        assert pixels.shape[1] > 250 and pixels.std() > 5, name
    with open(place / "results" / "receptive_field.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert rows[0][1:] == rows[1][1:] == rows[2][1:] and "pixels" in header[1]
    assert [row[0] for row in rows] == [SMALL["MODEL"], "other", "elsewhere/other/best.pth"]  # no name hides another
    out = capsys.readouterr().out
    assert "skipped" not in out and f"augmentation of {CHECKPOINT}" in out


def test_augmentation_is_that_of_the_checkpoint_s_run(place, draw_augmentation, capsys):
    checkpoint = load_checkpoint(CHECKPOINT)
    off = dict(CROP=1.0, CUTOUT=0.0, HFLIP=0.0, VFLIP=0.0, QUARTER_TURNS=False, ROTATION=0.0, COLOR_JITTER=0.0)
    checkpoint["config"] |= off | dict(MIXUP=0.3, CUTMIX=0.0, MIX_PROB=0.7)
    CHECKPOINT.unlink()  # a hard link, which other tests share
    save_checkpoint(checkpoint, CHECKPOINT)
    images, labels, classes, transform, mixup, _ = draw_augmentation()
    assert f"augmentation of {CHECKPOINT}" in capsys.readouterr().out
    assert classes == list(CLASSES) and labels == [0, 1]
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob) == (0.3, 0.0, 0.7)
    expected = eval_transform(32, checkpoint["mean"], checkpoint["std"])(images[0])
    torch.testing.assert_close(transform(images[0]), expected)


@pytest.mark.parametrize("checkpoint", ["", "train.py"])
def test_augmentation_before_training_is_that_of_train_py_s_constants(
    checkpoint, place, draw_augmentation, tmp_path, monkeypatch, capsys
):
    if not checkpoint:
        shutil.rmtree("checkpoints")
    script = tmp_path / "train.py"
    script.write_text("IMG_SIZE: int = 40  # pixels\nMIXUP: float = 0.5\nMIX_PROB: float = 0.25\nHFLIP: float = 0\n")
    monkeypatch.setattr(visualize, "TRAIN_SCRIPT", script)
    monkeypatch.setattr(visualize, "CHECKPOINT", checkpoint)
    images, _, _, transform, mixup, _ = draw_augmentation()
    assert "augmentation of train.py's constants" in capsys.readouterr().out
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob) == (0.5, 0.0, 0.25)
    assert transform(images[0]).shape == (3, 40, 40)


def test_values_of_a_script_are_read_without_running_it(tmp_path):
    values = visualize.read_values(ROOT / "train.py")
    assert values["IMG_SIZE"] == 224 and values["QUARTER_TURNS"] is True and values["MEAN"] is None
    (tmp_path / "computed.py").write_text("A: int = 1\nB: int = 2 * 3\n")
    with pytest.raises(UserError, match="computed.py, line 2: B is computed; write its value instead"):
        visualize.read_values(tmp_path / "computed.py")
    (tmp_path / "broken.py").write_text("A: int = \n")
    with pytest.raises(UserError, match="broken.py, line 1: .*; fix this line"):
        visualize.read_values(tmp_path / "broken.py")


def test_a_checkpoint_that_holds_no_configuration(place, draw_augmentation, capsys):
    checkpoint = load_checkpoint(CHECKPOINT)
    del checkpoint["config"]
    CHECKPOINT.unlink()
    save_checkpoint(checkpoint, CHECKPOINT)
    with pytest.raises(IndexError):
        draw_augmentation()
    assert f"skipped         augmentation: {CHECKPOINT} does not say" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--shown", "0"], "SHOWN must be a whole number of at least 1"),
        (["--field-size", "16"], "FIELD_SIZE must be a whole number of at least 32"),
        (["gradcams"], 'WHAT must be a list of "augmentation", .* got .*gradcams'),
    ],
)
def test_a_constant_that_is_refused(words, message):
    with pytest.raises(ConstantError, match=message):
        set_constants(vars(visualize).copy(), words, "WHAT")


def test_a_network_that_is_unknown_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(visualize, "COMPARE", ["resnet50"])
    with pytest.raises(ConstantError, match="COMPARE must hold .* got 'resnet50'"):
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
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=1).eval()
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
    torch.manual_seed(0)
    nn.init.uniform_(conv.weight, 0.1, 1)
    network = SimpleNamespace(forward_features=conv)
    field = visualize.receptive_field(network, [torch.rand(1, 3, 33, 33), torch.rand(1, 3, 33, 33)], "cpu")
    expected = np.zeros((33, 33))
    expected[14:19, 14:19] = conv.weight.detach().sum((0, 1))
    np.testing.assert_allclose(field, expected / expected.sum(), atol=1e-8)
    assert visualize.central_square(field, 99) == 5


def test_receptive_field_needs_maps_and_a_gradient():
    network = SimpleNamespace(forward_features=lambda images: images.flatten(1))
    with pytest.raises(UserError, match="needs feature maps"):
        visualize.receptive_field(network, [torch.rand(1, 3, 8, 8)], "cpu")
    network = SimpleNamespace(forward_features=lambda images: -images)
    with pytest.raises(UserError, match="no gradient of this one is positive"):
        visualize.receptive_field(network, [torch.rand(1, 3, 8, 8)], "cpu")


def test_weights_that_cannot_be_downloaded_are_skipped(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(visualize.timm, "create_model", fail)
    assert visualize.open_network("resnet50.a1_in1k", "cpu") is None
    assert "skipped         resnet50.a1_in1k: its weights cannot be downloaded (OSError)" in capsys.readouterr().out


def test_central_square():
    field = np.zeros((32, 32))
    field[16, 16], field[16, 19], field[1, 1] = 0.5, 0.4, 0.1
    assert [visualize.central_square(field, percent) for percent in (50, 90, 99)] == [1, 7, 31]


def test_an_augmented_image_is_drawn_without_its_normalisation(draw_image, monkeypatch):
    sheets = []
    monkeypatch.setattr(plots, "plot_sheet", lambda *args: sheets.append(args))
    image = draw_image("an image", 8)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.1, 0.4, 0.6], [0.2, 0.3, 0.4])])
    mixup = BatchMixup(2, mixup=0.5, prob=0.4)
    plots.plot_augmentation([image, image], [0, 1], ["a", "b"], transform, mixup, "sheet.png")
    [(cells, captions, path, columns, rows)] = sheets
    assert path == "sheet.png" and columns == 2 and rows == ["file", "augmented", "Mixup: 40 % of batches"]
    assert len(cells) == len(captions) == 6 and mixup.mix_prob == 0.4
    for cell in cells[2:]:  # an image mixed with itself is itself
        np.testing.assert_allclose(np.asarray(cell, float), np.asarray(image, float), atol=1)


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.plot_sheet([None], ["玉米"], tmp_path / "sheet.png")
    assert dict(matplotlib.rcParams) == before


def test_chinese_names_are_drawn_where_a_font_has_them(tmp_path):
    if not plots.find_cjk_fonts():
        pytest.skip("this machine has no font with Chinese characters")
    cells = []
    for name in "玉米":
        plots.plot_confusion_matrix(np.eye(1, dtype=int), [name], tmp_path / "matrix.png")
        cells.append(np.asarray(Image.open(tmp_path / "matrix.png").convert("L")))
    assert (cells[0] != cells[1]).any()  # boxes for characters that are missing look alike


def test_the_page_predicts_as_the_network(place, draw_image):
    checkpoint = load_checkpoint(CHECKPOINT)
    photo = place / "玉米 照片.png"
    draw_image("a photograph", (90, 60)).save(photo)
    predictor = web_demo.Predictor(checkpoint, torch.device("cpu"), 2)
    probabilities, cam = predictor(photo)
    transform = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])
    with torch.no_grad():
        logits = build_network(checkpoint, merge=False)(transform(load_image(photo))[None])[0]
    every = dict(zip(checkpoint["classes"], logits.softmax(0).tolist()))
    top = sorted(every, key=every.get, reverse=True)[:2]
    assert probabilities == pytest.approx({name: every[name] for name in top}, abs=1e-5)
    assert list(probabilities) == top and cam.size == (90, 60)


def test_the_page_takes_recordings_and_spectrograms(place):
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("librosa")
    sound = dict(sample_rate=8000, seconds=0.5, padding="silence", window=32.0, hop=10.0, mels=32, decibels=80.0)
    checkpoint = load_checkpoint(CHECKPOINT) | dict(sound=sound, img_size=[32, 51])
    predictor = web_demo.Predictor(checkpoint, torch.device("cpu"), 3)
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 4000)
    soundfile.write(place / "noise.wav", samples, 8000)
    predictor.kind.load(place / "noise.wav").convert("L").save(place / "noise.wav.png")
    expected, cam = predictor(place / "noise.wav")
    assert predictor.kind.name == "recording" and cam.size == (51, 32)
    assert predictor(place / "noise.wav.png")[0] == pytest.approx(expected)


def test_the_page_is_built_or_says_what_is_missing(place):
    try:
        import gradio  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="needs the package gradio .* pip install gradio"):
            web_demo.main()
        return
    for kind in ("image", "recording"):
        page = web_demo.build_page(lambda path: ({}, None), "a title", 5, kind)
        assert "a title" in str(page.get_config_file())
