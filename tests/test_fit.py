"""FIT: images of any shape become squares in one way, which training, cache, prediction and exports share."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image

from common.augment import augmentation_from_config, train_transform
from common.cache import cache_images
from common.checkpoint import load_checkpoint
from common.dataset import eval_transform, open_image_folder, transform_of
from common.file_checks import check_input
from common.fit import FITS, MARGIN, fit_to, visible_part
from common.images import load_image
from tools import web_demo

RED, GREEN, BLUE = (250, 0, 0), (0, 250, 0), (0, 0, 250)
BEST = Path("checkpoints", SMALL["MODEL"], "best.pth")


def stripes(width, height):
    """Three stripes along the longer side: red, green, blue."""
    image = Image.new("RGB", (width, height), GREEN)
    third = max(width, height) // 3
    first, last = ((third, height), (width - third, 0)) if width > height else ((width, third), (0, height - third))
    image.paste(RED, (0, 0, *first))
    image.paste(BLUE, (*last, width, height))
    return image


@pytest.mark.parametrize("size", [(90, 30), (30, 90), (900, 100), (33, 32)])
@pytest.mark.parametrize("fit", FITS)
def test_what_is_kept_of_an_image(fit, size):
    image = stripes(*size)
    fitted = np.asarray(fit_to((32, 32), fit)(image)).astype(int)
    assert fitted.shape == (32, 32, 3)
    middle = fitted[:, 16] if size[1] > size[0] else fitted[16]
    long = max(size) / min(size) > 2
    if fit == "crop" and long:  # the ends are cut off
        assert (abs(fitted - GREEN) < 60).all()
        return
    assert (abs(middle[0] - RED) < 20).all() and (abs(middle[-1] - BLUE) < 20).all()
    margin = (abs(fitted - MARGIN) < 2).all(-1)
    if fit == "pad" and long:
        assert margin.any() and abs(margin.mean() - (1 - min(size) / max(size))) < 0.07
    else:
        assert margin.sum() <= 32


def test_squeeze_computes_what_it_always_has():
    from torchvision import transforms

    image = stripes(90, 31)
    assert fit_to((32, 32))(image).tobytes() == transforms.Resize((32, 32))(image).tobytes()


@pytest.mark.parametrize("fit", FITS)
def test_an_image_of_the_right_size_stays_as_it_is(fit, draw_image):
    image = draw_image("a", 32)
    assert fit_to((32, 32), fit)(image).tobytes() == image.tobytes()


@pytest.mark.parametrize("fit", FITS)
def test_cache_training_and_validation_see_the_same_pixels(fit, place, tmp_path):
    for number, path in enumerate(Path("data/train/Maize").iterdir()):
        stripes(60 + number, 25).save(path)  # hard links: in data1, too
    sets = [open_image_folder("data/train", None) for _ in range(2)]
    steps = fit_to((32, 32), fit)
    expected = [np.asarray(steps(load_image(path))) for path in sets[0].files]
    line = cache_images(tmp_path / "cache", 1.0, (sets[0], (32, 32)), fit=fit)
    assert line.startswith("cache       21 of 21")
    assert all((np.asarray(sets[0][index][0]) == pixels).all() for index, pixels in enumerate(expected))
    other = FITS[FITS.index(fit) - 1]
    cache_images(tmp_path / "cache", 1.0, (sets[1], (32, 32)), fit=other)  # does not find the other one's
    assert sets[0].cache.path != sets[1].cache.path
    mean, std = [0.0] * 3, [1.0] * 3
    image = stripes(80, 30)
    pixels = torch.from_numpy(np.array(steps(image))).permute(2, 0, 1) / 255
    assert torch.equal(eval_transform(32, mean, std, fit)(image), pixels)
    assert torch.equal(train_transform((32, 32), mean, fit=fit)(image) / 255, pixels)
    config = dict(FIT=fit)
    assert torch.equal(augmentation_from_config(config, 3, (32, 32), mean, std)[0](image) / 255, pixels)


@pytest.fixture
def padded(run_train, place):
    """Checkpoint of a run with FIT "pad" whose images are not square."""
    for path in Path("data1").rglob("*.png"):
        load_image(path).resize((60, 24)).save(path)
    run_train(FIT="pad", EPOCHS=1)
    return load_checkpoint(BEST)


def test_a_run_keeps_its_fit_and_all_tools_use_it(padded, place, monkeypatch, capsys):
    assert padded["fit"] == padded["config"]["FIT"] == "pad"
    photo = next(Path("data/val/Maize").iterdir())
    expected = eval_transform(32, padded["mean"], padded["std"], "pad")(load_image(photo))
    assert torch.equal(transform_of(padded)(load_image(photo)), expected)
    predictor = web_demo.Predictor(padded, torch.device("cpu"), 3)
    assert torch.equal(predictor.transform(load_image(photo)), expected)
    overlay = predictor(photo)[1]
    assert overlay.size == visible_part(load_image(photo), "pad").size == (60, 60)


def test_a_resumed_run_says_that_its_fit_has_changed(padded, run_train, capsys):
    run_train(FIT="pad", EPOCHS=2, RESUME="auto")
    assert "changed     FIT" not in capsys.readouterr().out
    run_train(FIT="crop", EPOCHS=3, RESUME="auto")
    out = capsys.readouterr().out
    assert "changed     FIT was 'pad', is 'crop'" in out and "fit         crop" in out
    assert load_checkpoint("checkpoints/unireplknet_test/last.pth")["fit"] == "crop"


def test_an_exported_network_keeps_it(padded, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from common.checkpoint import build_network
    from common.onnx_network import OnnxNetwork
    from tools.export import write_onnx, write_timm

    write_onnx(build_network(padded), padded, tmp_path / "model.onnx")
    assert OnnxNetwork(tmp_path / "model.onnx").about["fit"] == "pad"
    write_timm(padded, tmp_path / "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text(encoding="utf-8"))
    assert config["pretrained_cfg"]["crop_mode"] == "border"


def test_a_checkpoint_without_it_squeezes(trained, tmp_path):
    checkpoint = load_checkpoint(trained / BEST)
    assert "fit" not in checkpoint
    image = stripes(80, 30)
    expected = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])(image)
    assert torch.equal(transform_of(checkpoint)(image), expected)


@pytest.mark.parametrize("fit", ["stretch", 3, None, ["pad"]])
def test_a_fit_that_does_not_exist_is_refused(fit):
    about = dict(classes=["a", "b"], mean=[0.5] * 3, std=[0.5] * 3, img_size=32, fit=fit)
    with pytest.raises(ValueError, match="its fit must be"):
        check_input(about)
    check_input(about | dict(fit="crop"))
