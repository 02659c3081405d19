"""mean_std.py against the plain definitions of the statistics."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_manifest, write_former_manifest
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

import makedata
import mean_std
from common.dataset import CachedImageFolder
from common.manifest import choose_mean_and_std
from common.options import UserError
from mean_std import get_mean_and_std, moments

SIZES = [(48, 48), (31, 17), (8, 90), (200, 3), (1, 2), (64, 64), (5, 5)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mean_std, "WORKERS", 0)
    return tmp_path


@pytest.fixture
def pixels(draw_image):
    """Pixels of `data1`, images of many sizes in two classes: list of float64 arrays (pixels, 3), from 0 to 1."""
    pixels_of_images = []
    for number, size in enumerate(SIZES):
        path = Path("data1", "ab"[number % 2], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        image = draw_image(path.name, size, (40 * number, 128, 250 - 30 * number))
        image.save(path)
        pixels_of_images.append(np.asarray(image).reshape(-1, 3) / 255)
    return pixels_of_images


def written():
    return json.loads(Path("data/mean_std.json").read_text(encoding="utf-8"))


def change(path):
    """Paint one pixel of an image and save it as a new file, as most editors do."""
    image = Image.open(path).copy()
    image.putpixel((0, 0), tuple(255 - value for value in image.getpixel((0, 0))))
    path.unlink()
    image.save(path)


@pytest.mark.parametrize(
    "open_folder", [lambda root: ImageFolder(root, ToTensor()), CachedImageFolder], ids=["ToTensor", "images"]
)
def test_mean_and_std_are_those_of_a_loop_over_single_images(open_folder, pixels):
    mean, std, loader = 0, 0, DataLoader(ImageFolder("data1", ToTensor()), batch_size=1)
    for image, _ in loader:
        mean += image.double().mean(dim=(0, 2, 3)) / len(loader)
        std += image.double().flatten(2).std(dim=2)[0] / len(loader)
    assert len(loader) == len(pixels)
    found = get_mean_and_std(open_folder("data1"), workers=0)
    assert [type(values) for values in found] == [list, list] and type(found[0][0]) is float
    np.testing.assert_allclose(found, [mean.tolist(), std.tolist()], rtol=0, atol=1e-6)


def test_the_file_holds_both_definitions_exactly(pixels, capsys):
    assert mean_std.main() == 0
    report = written()
    everything = np.concatenate(pixels)
    np.testing.assert_allclose(report["mean"], np.mean([one.mean(0) for one in pixels], axis=0), atol=1e-12)
    np.testing.assert_allclose(report["std"], np.mean([one.std(0, ddof=1) for one in pixels], axis=0), atol=1e-12)
    np.testing.assert_allclose(report["pixel_std"], everything.std(0), atol=1e-12)
    assert not np.allclose(report["std"], report["pixel_std"], atol=0.01)
    assert report["pictures"] == len(SIZES)
    lines = capsys.readouterr().out.splitlines()
    for name, key in (("mean", "mean"), ("std per image", "std"), ("std pixel", "pixel_std")):
        assert f"{name:14} [{', '.join(f'{value:.6f}' for value in report[key])}]" in lines


def test_workers_change_nothing(make_data1):
    make_data1("data1", {"a": 40, "b": 30}, size=8)
    dataset = CachedImageFolder("data1")
    assert get_mean_and_std(dataset, workers=2) == get_mean_and_std(dataset, workers=0)


def test_a_large_image_loses_nothing_to_rounding(draw_image):
    """Almost white with little noise, the case in which float32 sums go astray."""
    tile = np.asarray(draw_image("large", 100)) % 4 + np.uint8([250, 0, 100])
    image = Image.fromarray(np.tile(tile, (40, 40, 1)))
    n = image.width * image.height
    assert n == 16_000_000
    values = tile.reshape(-1, 3) / 255
    mean, std, number, total, squares = moments(image)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, values.std(0) * math.sqrt(n / (n - 1)), rtol=1e-9)
    assert (number == n).all()
    np.testing.assert_allclose(total, 1600 * values.sum(0), rtol=1e-12)
    np.testing.assert_allclose(squares, 1600 * (values**2).sum(0), rtol=1e-12)


def test_constant_and_single_pixel_images_have_no_deviation():
    Path("data1/a").mkdir(parents=True)
    Image.new("RGB", (1, 1), (255, 51, 0)).save("data1/a/1.png")
    Image.new("RGB", (30, 20), (255, 51, 0)).save("data1/a/2.png")
    for dataset in (CachedImageFolder("data1"), CachedImageFolder("data1", ToTensor())):
        mean, std = get_mean_and_std(dataset, workers=0)
        np.testing.assert_allclose(mean, [1, 0.2, 0], atol=1e-7)
        np.testing.assert_allclose(std, [0, 0, 0], atol=1e-7)
    with pytest.raises(UserError, match="all images in data1 show one and the same colour"):
        mean_std.main()
    assert not Path("data/mean_std.json").exists()


@pytest.mark.parametrize(
    "colours, std, noted",
    [
        ([(0, 0, 90), (0, 0, 160)], [1, 1, 70 / 2 / 255], ["red", "green", "blue"]),  # each of a single colour
        (["noise", "noise"], [1, 1, 0.25], ["red", "green"]),  # fluorescence: one channel is used
    ],
)
def test_a_channel_without_deviation_gets_one_to_divide_by(colours, std, noted, capsys):
    Path("data1/a").mkdir(parents=True)
    for number, colour in enumerate(colours):
        if colour == "noise":
            pixels = np.zeros((30, 30, 3), np.uint8)
            pixels[..., 2] = np.random.default_rng(number).choice([64, 191], (30, 30))
            image = Image.fromarray(pixels)
        else:
            image = Image.new("RGB", (9, 9), colour)
        image.save(f"data1/a/{number}.png")
    assert mean_std.main() == 0
    np.testing.assert_allclose(written()["std"], std, atol=3e-3)
    out = capsys.readouterr().out
    assert [name for name in ("red", "green", "blue") if f"the {name} channel has a single value" in out] == noted


def test_a_data_set_of_tensors_needs_no_files():
    tensors = torch.rand(5, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    mean, std = get_mean_and_std([(tensor, 0) for tensor in tensors], workers=0)
    np.testing.assert_allclose(mean, tensors.mean(dim=(0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(std, tensors.flatten(2).std(2).mean(0), atol=1e-6)


def test_the_fingerprint_is_that_of_makedata_until_a_image_changes(make_data1):
    paths = make_data1("data1", {"a": 6, "玉米": 5})
    assert makedata.main() == 0
    manifest = json.loads(Path("data/manifest.json").read_text(encoding="utf-8"))
    assert mean_std.main() == 0
    assert written()["fingerprint"] == manifest["fingerprint"]
    change(paths[3])
    mean_std.main()
    assert written()["fingerprint"] != manifest["fingerprint"]
    makedata.main()
    manifest = json.loads(Path("data/manifest.json").read_text(encoding="utf-8"))
    assert written()["fingerprint"] == manifest["fingerprint"]


def test_the_fingerprint_is_that_of_makedata_where_files_are_skipped(make_data1):
    make_data1("data1", {"a": 6, "b": 5})
    Path("data1/a/broken.jpg").write_bytes(b"broken")
    Path("data1/a/notes.txt").write_text("notes")
    Path("data1/b/again.png").write_bytes(Path("data1/b/000.png").read_bytes())
    assert makedata.main() == mean_std.main() == 3
    manifest = json.loads(Path("data/manifest.json").read_text(encoding="utf-8"))
    assert written()["fingerprint"] == manifest["fingerprint"] and written()["pictures"] == 12


def test_hidden_files_are_ignored_silently(make_data1, capsys):
    """macOS leaves files such as ._000.png on other systems' drives."""
    make_data1("data1", {"a": 3})
    Path("data1/a/._000.png").write_bytes(b"resource fork")
    assert mean_std.main() == 0
    assert "skipped" not in capsys.readouterr().out


def test_broken_images_are_listed_and_skipped(pixels, capsys):
    mean_std.main()
    before = written()
    capsys.readouterr()
    for name in ("a/broken.jpg", "b/empty.png"):
        Path("data1", name).write_bytes(b"broken" if "broken" in name else b"")
    assert mean_std.main() == 3
    out = capsys.readouterr().out
    listed = [line for line in out.splitlines() if line.startswith("skipped: ")]
    assert len(listed) == 2
    assert str(Path("data1/a/broken.jpg")) in listed[0] and str(Path("data1/b/empty.png")) in listed[1]
    assert f"{len(SIZES)} of {len(SIZES) + 2} in data1" in out
    assert written() == before
    with pytest.raises(UserError, match="broken.jpg"):
        get_mean_and_std(CachedImageFolder("data1"), workers=0)


def test_nothing_is_written_without_a_readable_image():
    Path("data1/a").mkdir(parents=True)
    Path("data1/a/empty.png").touch()
    with pytest.raises(UserError, match="no image in data1"):
        mean_std.main()
    with pytest.raises(UserError, match="no image"):
        get_mean_and_std([], workers=0)
    assert sorted(os.listdir()) == ["data1"]


def test_a_source_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.setattr(mean_std, "SOURCE", "nowhere")
    with pytest.raises(UserError, match="no folder nowhere"):
        mean_std.main()


def test_output_may_be_elsewhere_or_nowhere(pixels, monkeypatch):
    monkeypatch.setattr(mean_std, "OUTPUT", "")
    assert mean_std.main() == 0 and sorted(os.listdir()) == ["data1"]
    monkeypatch.setattr(mean_std, "OUTPUT", "a/b/c.json")
    assert mean_std.main() == 0 and json.loads(Path("a/b/c.json").read_text())["pictures"] == len(SIZES)


def test_data1_is_never_changed(pixels):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("data1").glob("*/*")}
    mean_std.main()
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("data1").glob("*/*")} == before


def test_the_command_line(run_script, pixels):
    Path("data1/a/broken.jpg").write_bytes(b"broken")
    done = run_script("mean_std.py", "--workers", "0")
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert str(Path("data1/a/broken.jpg")) in done.stdout and written()["pictures"] == len(SIZES)


def test_images_that_makedata_has_read_are_not_decoded_again(make_data1, monkeypatch, capsys):
    paths = make_data1("data1", {"a": 5, "b": 4})
    mean_std.main()
    expected = written()
    makedata.main()
    calls = []
    monkeypatch.setattr(mean_std, "moments", lambda image: calls.append(1) or moments(image))
    mean_std.main()
    assert not calls
    assert written() == expected  # to the last bit
    change(paths[3])
    mean_std.main()
    assert len(calls) == 1 and written()["mean"] != expected["mean"]


def test_the_normalisation_is_that_of_the_constants_the_statistics_or_imagenet(make_data1, capsys):
    assert choose_mean_and_std("data", [0.1] * 3, [0.2] * 3, None) == ([0.1] * 3, [0.2] * 3, "MEAN and STD")
    mean, _, source = choose_mean_and_std("data", None, None, None)
    assert mean == [0.485, 0.456, 0.406] and source.startswith("ImageNet")
    make_data1("data1", {"a": 3, "b": 3})
    makedata.main()
    mean_std.main()
    assert choose_mean_and_std("data", None, None, None)[0] == written()["mean"]
    assert "warning" not in capsys.readouterr().out
    make_data1("data1", {"a": 4})
    makedata.main()
    choose_mean_and_std("data", None, None, dict(mels=32))
    out = capsys.readouterr().out
    assert "warning: makedata.py makes other spectrograms" in out and "warning: the images have changed" in out
    Path("data/mean_std.json").write_text("{}")
    with pytest.raises(UserError, match="mean_std.json (is damaged|cannot be used)"):
        choose_mean_and_std("data", None, None, None)


def test_a_manifest_of_an_earlier_version_has_no_sums(make_data1):
    make_data1("data1", {"a": 3, "b": 3})
    makedata.main()
    mean_std.main()
    expected, manifest = written(), read_manifest()
    write_former_manifest(manifest)
    mean_std.main()
    assert written() == expected
    for file in manifest["files"]:
        del file["sums"]
    Path("data/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert mean_std.main() == 0
    assert written()["fingerprint"] == manifest["fingerprint"]
