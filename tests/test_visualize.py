"""tools/visualize.py, tools/grad_cam.py, the page of tools/web_demo.py, and fonts of common/plots.py."""

import csv
import shutil
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, ROOT, SMALL
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import nn
from torchvision import transforms

from common import plots
from common.augment import BatchMixup
from common.checkpoint import build_network, load_checkpoint, save_checkpoint
from common.dataset import PixelTransform, eval_transform
from common.images import load_image
from common.options import ConstantError, UserError, set_constants
from common.text import label, width
from tools import visualize, web_demo
from tools.grad_cam import grad_cam, overlay

CHECKPOINT = Path("checkpoints", SMALL["MODEL"], "best.pth")


@pytest.fixture
def place(trained_copy, monkeypatch):
    """A copy of `trained`, in which visualize.main() does little."""
    constants = dict(IMAGES=6, SHOWN=1, COMPARE=[], FIELD_SIZE=64, FIELD_IMAGES=2, DEVICE="cpu")
    for name, value in constants.items():
        monkeypatch.setattr(visualize, name, value)
    return trained_copy


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
    off = dict(CROP=1.0, CUTOUT=0.0, HFLIP=0.0, VFLIP=0.0, ROTATION=0.0, COLOR_JITTER=0.0)
    off |= dict(QUALITY=0.0)
    checkpoint["config"] |= off | dict(MIXUP=0.3, CUTMIX=0.0, MIX_PROB=0.7)
    CHECKPOINT.unlink()  # a hard link, which other tests share
    save_checkpoint(checkpoint, CHECKPOINT)
    images, labels, classes, transform, mixup, _ = draw_augmentation()
    assert f"augmentation of {CHECKPOINT}" in capsys.readouterr().out
    assert classes == list(CLASSES) and labels == [0, 1]
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob) == (0.3, 0.0, 0.7)
    assert torch.equal(transform(images[0]), PixelTransform(32)(images[0]))


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
    assert values["BATCH_SIZE"] == 32 and values["ROTATION"] == 180 and values["MEAN"] is None
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
        (["--field-size", "16"], "FIELD_SIZE must be a whole number from 32 to 4096"),
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
    logits, cam, where = grad_cam(network, images, classes)
    with torch.no_grad():
        maps = torch.einsum("nchw,nc->nhw", network.conv(images), network.head.weight[classes]).relu()
        torch.testing.assert_close(logits, network(images))
    torch.testing.assert_close(cam, maps / maps.amax((1, 2), keepdim=True))
    assert where == "stage 1 of 1, 8 x 8" and not cam.requires_grad and network.conv.weight.grad is None


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
    """At once, in one line each, and without asking the hub again and again."""
    monkeypatch.setattr("common.hub.can_reach", lambda address: False)
    monkeypatch.setattr("timm.create_model", None)
    assert visualize.open_network("resnet50.a1_in1k", "cpu") is None
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("skipped         resnet50.a1_in1k: cannot download model.safetensors from https://")
    assert "set COMPARE to files" in line and "HF_ENDPOINT=https://hf-mirror.com" in line


def test_central_square():
    field = np.zeros((32, 32))
    field[16, 16], field[16, 19], field[1, 1] = 0.5, 0.4, 0.1
    assert [visualize.central_square(field, percent) for percent in (50, 90, 99)] == [1, 7, 31]


@pytest.mark.parametrize("normalised", [True, False])
def test_an_augmented_image_is_drawn_without_its_normalisation(normalised, draw_image, monkeypatch):
    sheets = []
    monkeypatch.setattr(plots, "plot_sheet", lambda *args: sheets.append(args))
    image = draw_image("an image", 8)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.1, 0.4, 0.6], [0.2, 0.3, 0.4])])
    transform = transform if normalised else PixelTransform(8)
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
    if plots.Fonts().families("玉米")[1]:
        pytest.skip("this machine has no font with Chinese characters")
    cells = []
    for name in "玉米":
        plots.plot_confusion_matrix([0], [0], [name], tmp_path / "matrix.png")
        cells.append(np.asarray(Image.open(tmp_path / "matrix.png").convert("L")))
    assert (cells[0] != cells[1]).any()  # boxes for characters that are missing look alike


def test_the_page_predicts_as_the_network(place, draw_image):
    checkpoint = load_checkpoint(CHECKPOINT)
    photo = place / "玉米 照片.png"
    draw_image("a photograph", (90, 60)).save(photo)
    predictor = web_demo.Predictor(checkpoint, torch.device("cpu"), 2)
    probabilities, cam, where, _ = predictor(photo)
    transform = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])
    with torch.no_grad():
        logits = build_network(checkpoint, merge=False)(transform(load_image(photo))[None])[0]
    every = dict(zip(checkpoint["classes"], (logits / checkpoint["calibration"]["temperature"]).softmax(0).tolist()))
    top = sorted(every, key=every.get, reverse=True)[:2]
    assert probabilities == pytest.approx({name: every[name] for name in top}, abs=1e-5)
    assert list(probabilities) == top and cam.size == (90, 60)
    assert where == "Grad-CAM: stage 1 of 4, 8 x 8"


def test_the_page_takes_recordings_and_spectrograms(place):
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("librosa")
    sound = dict(sample_rate=8000, seconds=0.5, padding="silence", window=32.0, hop=10.0, mels=32, decibels=80.0)
    checkpoint = load_checkpoint(CHECKPOINT) | dict(sound=sound, img_size=[32, 51])
    predictor = web_demo.Predictor(checkpoint, torch.device("cpu"), 3)
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 4000)
    soundfile.write(place / "noise.wav", samples, 8000)
    predictor.kind.load(place / "noise.wav").convert("L").save(place / "noise.wav.png")
    expected, cam, _, _ = predictor(place / "noise.wav")
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


# --- names and sizes of figures

NAMES = ["Common wheat", "$x^2_{$", "$", "_hidden", "__", "a\\b{%#}", "\\frac{", "&~", "玉米 苗", "🌱🌾"]
NAMES += ["हिन्दी", "قمح", "line\nbreak", "tab\there", "n" * 200, "麦" * 100, "--help", "a\udc80b"]
NAMES += ["👨\u200d👩\ufe0f", " ", "\u202eright", "<b>"]


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """Figures that are written, as (figure, width and height in pixels); they are not drawn, which takes longer."""
    written = []
    monkeypatch.chdir(tmp_path)

    def note(figure, path, dpi, **_):
        Path(path).touch()
        written.append((figure, figure.get_size_inches() * dpi))

    monkeypatch.setattr(Figure, "savefig", note)
    return written


def texts_of(figure):
    return [text.get_text() for text in figure.findobj(Text)]


@pytest.mark.parametrize("number", [1, 2, 12, 30, 31, 300, 1_000, 21_841])
@pytest.mark.parametrize("name", ["class", "a name of a hundred characters " * 4])
def test_a_confusion_matrix_of_any_number_of_classes_has_a_bounded_size(number, name, figures):
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, number, (2, 2_000))
    plots.plot_confusion_matrix(labels, predictions, [f"{name} {i}" for i in range(number)], "matrix.png")
    [(figure, size)] = figures
    assert max(size) <= 2_200 and min(size) >= 500
    axes = figure.axes[0]
    counts = [text for text in axes.texts if text.get_text().isdigit()]
    assert len(counts) == (len(set(zip(labels, predictions))) if number <= 30 else 0)
    assert 0 < len(axes.get_xticks()) <= 60 and max(axes.images[0].get_array().shape) <= 1_000
    assert len(figure.artists + figure.findobj(Text)) < 2_000
    assert all(width(line) <= 50 for text in texts_of(figure) for line in text.split("\n"))


def test_the_worst_confusions_are_named_where_counts_do_not_fit(figures):
    classes = [f"species {i}" for i in range(40)]
    labels, predictions = np.arange(40).repeat(10), np.arange(40).repeat(10)
    predictions[70:76], predictions[0:2] = 9, 5
    plots.plot_confusion_matrix(labels, predictions, classes, "matrix.png")
    bars = figures[0][0].axes[1]
    assert [text.get_text() for text in bars.get_yticklabels()] == [
        "species 7\npredicted species 9", "species 0\npredicted species 5",
    ]  # fmt: skip
    assert [patch.get_width() for patch in bars.patches] == [6, 2]
    assert [text.get_text() for text in bars.texts] == [" 60 %", " 20 %"]


def test_counts_may_stand_for_several_images(figures):
    plots.plot_confusion_matrix([0, 1, 1], [0, 0, 1], ["a", "b"], "matrix.png", counts=[7, 2, 6])
    figure = figures[0][0]
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["2", "6", "7"]
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[100, 0], [25, 75]])


def test_every_other_figure_has_a_bounded_size(figures, tmp_path, capsys):
    image, rng = Image.new("RGB", (2, 2)), np.random.default_rng(0)
    plots.plot_sheet([image] * 5_000, ["x"] * 5_000, "mistakes.png")
    assert "mistakes.png shows 144 of 5000 places" in capsys.readouterr().out
    plots.plot_sheet([image] * 400, ["x"] * 400, "rows.png", 100, ["a", "b", "c", "d"])
    plots.plot_sheet([image] * 7, ["x"] * 7, "few.png")
    assert capsys.readouterr().out.count("places") == 1
    history = [dict(epoch=epoch, train_loss=1.0, val_loss=2.0, train_acc1=3.0) for epoch in range(10_000)]
    plots.plot_curves(history, tmp_path)
    for number in (2, 40, 41, 300):
        labels = rng.integers(0, number, 1_000)
        plots.plot_map(rng.normal(size=(1_000, 2)), labels, [f"class {i}" for i in range(number)], "map.png")
    fields = {f"network {i} " * 9: (np.full((8, 8), 1 / 64), {50: 5, 90: 7, 99: 8}) for i in range(14)}
    plots.plot_receptive_fields(fields, "fields.png")
    plots.plot_kernels({f"stages.{i}": rng.normal(size=(9, 7, 7)) for i in range(8)}, "kernels.png")
    sizes = [size for _, size in figures]
    assert len(sizes) == 3 + 2 + 4 + 2 and np.max(sizes) <= plots.MAX_SIDE
    assert len(figures[0][0].axes) == 144 and len(figures[1][0].axes) == 48
    for figure, _ in figures[5:9]:
        assert len(figure.axes[0].texts) <= 60


def test_a_large_image_of_a_sheet_is_drawn_from_a_small_copy(figures):
    image = Image.new("RGB", (4_000, 3_000))
    plots.plot_sheet([image], ["x"], "sheet.png")
    assert figures[0][0].axes[0].images[0].get_array().shape == (450, 600, 3) and image.size == (4_000, 3_000)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_is_shown_as_it_is(name, figures):
    """As a tick, a legend, a caption: on one line, never as mathematics, and no name is hidden."""
    points = np.random.default_rng(0).normal(size=(6, 2))
    plots.plot_confusion_matrix([0, 1], [0, 1], [name, "other"], "matrix.png")
    plots.plot_map(points, [0, 0, 0, 1, 1, 1], [name, "other"], "map.png")
    plots.plot_sheet([None], [f"{label(name)} 0.93\ntrue: {label(name)}"], "sheet.png")
    shown = label(name)
    assert "\n" not in shown and width(shown) <= 28 and shown.isprintable()
    for figure, _ in figures:
        assert any(shown in text for text in texts_of(figure))
        assert not any(text.get_parse_math() or text.get_usetex() for text in figure.findobj(Text))
    legend = [text.get_text() for text in figures[1][0].axes[0].get_legend().get_texts()]
    assert legend == [shown, "other"]


def test_names_of_all_kinds_are_drawn(tmp_path):
    names = NAMES[:12] + NAMES[-8:]
    plots.plot_confusion_matrix(range(20), range(20), names, tmp_path / "matrix.png")
    plots.plot_map(np.arange(40.0).reshape(20, 2), range(20), names, tmp_path / "map.png")
    for name in ("matrix", "map"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert 700 < max(image.size) <= 2_200 and np.asarray(image.convert("L")).std() > 5


def test_a_missing_font_is_named_once_for_each_kind(tmp_path, monkeypatch, capsys, figures):
    lost = plots.Fonts()
    monkeypatch.setattr(lost, "look", lambda chars, paths: {char for char in chars if ord(char) > 127})
    lost.known.update({char: plots.BASE_FONT for char in map(chr, range(127))})
    monkeypatch.setattr(plots, "fonts", lambda: lost)
    monkeypatch.setattr(plots.sys, "platform", "linux")
    for names in (["玉米", "b"], ["小麦", "b"], ["🌱", "हिन्दी"], ["ไทย", "🌾"]):
        plots.plot_confusion_matrix([0], [0], names, "matrix.png")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("figures show boxes instead; install one" in line for line in lines)
    assert "玉米" in lines[0] and "fonts-noto-cjk" in lines[0] and "google-noto-sans-cjk-fonts" in lines[0]
    assert any("🌱" in line and "fonts-symbola" in line for line in lines)
    assert any("fonts-noto-core" in line for line in lines)
    monkeypatch.setattr(plots.sys, "platform", "win32")
    plots.report_missing({"玉"}, set())
    assert "apt" not in capsys.readouterr().out


def test_fonts_are_found_by_their_glyphs():
    fonts = plots.Fonts()
    families, missing = fonts.families("wheat äΩж \n\uffff")
    assert families == [plots.BASE_FONT] and missing == {"\uffff"}
    assert fonts.families("")[0] == [plots.BASE_FONT]


@pytest.mark.parametrize(
    "size, where",
    [(32, "stage 1 of 4, 8 x 8"), (64, "stage 2 of 4, 8 x 8"), (96, "stage 3 of 4, 6 x 6"),
     (160, "stage 4 of 4, 5 x 5"), (224, "stage 4 of 4, 7 x 7"), ((64, 224), "stage 2 of 4, 8 x 28")],
)  # fmt: skip
def test_grad_cam_of_small_images_takes_an_earlier_stage(size, where):
    network = timm.create_model(SMALL["MODEL"], num_classes=3).eval()
    height, width = (size, size) if isinstance(size, int) else size
    _, cam, found = grad_cam(network, torch.rand(1, 3, height, width))
    assert found == where and cam.shape == (1, height, width)


def test_the_stage_of_grad_cam_stands_in_its_figure(place, monkeypatch, capsys):
    sheets = []
    monkeypatch.setattr(visualize, "plot_sheet", lambda *args: sheets.append(args))
    monkeypatch.setattr(visualize, "WHAT", ["gradcam"])
    visualize.main()
    assert sheets and all("Grad-CAM\nstage 1 of 4, 8 x 8" in rows for *_, rows in sheets)
    assert "maps of stage 1 of 4, 8 x 8" in capsys.readouterr().out
