"""What the scripts share: order and augmentation of the images depend on the seed and the epoch only."""

import json
import random

import numpy as np
import pytest
import torch
from torchvision import transforms

from common.dataset import CachedImageFolder, EpochBatches, SeededImages, open_image_folder, seed_everything
from common.device import choose_device
from common.extras import require
from common.options import ConstantError, UserError
from common.text import WIDE, label, pad, read_text, width


def test_every_image_once_an_epoch_in_another_order():
    sampler = EpochBatches(50, 5, seed=1)
    orders = []
    for sampler.epoch in (1, 2):
        keys = [key for batch in sampler for key in batch]
        assert {epoch for epoch, _ in keys} == {sampler.epoch}
        orders.append([index for _, index in keys])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] != orders[1] != list(range(50))
    other = EpochBatches(50, 5, seed=2)
    other.epoch = sampler.epoch = 1
    assert list(sampler) != list(other)
    batches = list(sampler)
    sampler.start = 3
    assert list(sampler) == batches[3:] and len(sampler) == 10


@pytest.mark.parametrize(("length", "size", "world_size"), [(50, 5, 2), (50, 5, 3), (47, 4, 4), (8, 8, 1), (9, 4, 2)])
def test_processes_share_the_batches_of_one(length, size, world_size):
    one = EpochBatches(length, size, seed=3)
    parts = [EpochBatches(length, size, 3, rank, world_size) for rank in range(world_size)]
    in_turn = [batch for step in zip(*parts) for batch in step]
    assert len({len(list(part)) for part in parts}) == 1
    assert in_turn == list(one)[: len(one) // world_size * world_size]


def test_augmentation_depends_on_seed_epoch_and_image_only(tmp_path, make_data1):
    make_data1(tmp_path, {"a": 3, "b": 3})
    transform = transforms.Compose([transforms.RandomRotation(180), transforms.ToTensor()])
    images = CachedImageFolder(tmp_path, transform)
    dataset = SeededImages(images, seed=7)
    first = dataset[3, 1][0]
    dataset[1, 5]
    random.random(), np.random.rand(), torch.rand(1)
    assert torch.equal(dataset[3, 1][0], first)
    assert not torch.equal(dataset[4, 1][0], first)
    assert not torch.equal(SeededImages(images, seed=8)[3, 1][0], first)


def test_seed_everything_reaches_all_three_generators():
    draws = []
    for key in ((1, 2), (1, 2), (2, 1)):
        seed_everything(*key)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert draws[0] == draws[1] and all(a != b for a, b in zip(draws[0], draws[2]))


def test_hidden_folders_are_no_classes(tmp_path, make_data1):
    make_data1(tmp_path, {"b": 1, "a": 1, ".ipynb_checkpoints": 1})
    assert open_image_folder(tmp_path).classes == ["a", "b"]


@pytest.mark.parametrize(
    "modules, task, packages",
    [
        (["not_there"], [], "not_there"),
        (["not_there", "json", "nor_there.part"], [], "not_there nor_there"),
        (["not_there"], ["not_there", "json", "third"], "not_there third"),
    ],
)
def test_all_missing_packages_are_named_at_once(modules, task, packages):
    with pytest.raises(UserError) as error:
        require(*modules, task=task)
    what = "packages" if " " in packages else "package"
    assert str(error.value).startswith(f"this needs the {what} {packages} (")
    assert str(error.value).endswith(f"; pip install {packages}")


def test_packages_of_later_steps_are_not_needed_before(monkeypatch):
    assert require("json", "json.decoder", task=["not_there"]) == [json, json.decoder]


DEVICES = ["gpu", "GPU", "CUDA", "0", "gpu:0", "cuda0", "Cuda:1", "cuda 1", "nvidia", "cuda:7777"]


@pytest.mark.parametrize("name", DEVICES)
def test_a_device_that_is_misspelt_or_absent_gets_a_sentence(name):
    with pytest.raises(ConstantError) as error:
        choose_device(name)
    text = str(error.value)
    assert text.startswith(f"DEVICE {name!r} is not available here (") and "\n" not in text
    if name != "cuda:7777":
        number = name.strip("gpuGPUCUDAcuda: nvi")
        assert f'did you mean "cuda{":" + number if number else ""}"?' in text


@pytest.mark.parametrize("name", ["graphics", "cpu:x", "tpu", "meta", "GPU card"])
def test_a_device_that_nobody_knows_gets_a_sentence(name):
    with pytest.raises(ConstantError, match=r'is not available here \(.*\); set it to "auto" or "cpu"$'):
        choose_device(name)


LABELS = ["short", "n" * 300, "玉" * 300, "a\nb\t", "a\u200db\ufe0f", "a\udc80", "e\u0301" * 90, ""]


@pytest.mark.parametrize("name", LABELS, ids=ascii)
def test_a_label_fits_and_is_printable(name):
    shown = label(name)
    assert width(shown) <= WIDE and shown.isprintable()
    assert shown == name or not name.isprintable() or width(name) > WIDE
    assert width(pad(shown, 30)) == 30
    assert label(f"{name}1") != label(f"{name}2")  # ends differ in data sets


@pytest.mark.parametrize("content", ["a\r\nb", "a\rb", "a\nb"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_files_of_all_systems_are_read(content, encoding, tmp_path):
    (tmp_path / "a.txt").write_bytes(content.encode(encoding))
    assert read_text(tmp_path / "a.txt") == "a\nb"
