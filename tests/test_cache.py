"""The cache of decoded images: the same tensors as without it, whatever happens to the files."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill_classes
from kill import differences
from torch.utils.data import DataLoader
from torchvision import transforms

import makedata
from common import cache
from common.cache import cache_images, open_cache
from common.checkpoint import load_checkpoint
from common.dataset import EpochBatches, SeededImages, eval_transform, open_image_folder
from common.images import ImageError, load_image

FOLDER = Path("data/cache")


@pytest.fixture
def paths(tmp_path, monkeypatch, draw_image):
    """Twelve images of several sizes, and the working folder beside them."""
    monkeypatch.chdir(tmp_path)
    paths = fill_classes("images", {"a": 6, "b": 5}, size=(60, 40))
    paths.append(Path("images/b/large.jpg"))
    draw_image("large", (300, 200)).save(paths[-1])
    return [str(path) for path in paths]


def pixels(cached):
    return [np.asarray(cached.get(index)) for index in range(cached.count)]


def resized(paths, size):
    return [np.asarray(transforms.Resize((size, size))(load_image(path))) for path in paths]


def npy_files():
    return sorted(FOLDER.glob("*.npy"))


@pytest.mark.parametrize("size", [32, 48, 224])
def test_pixels_equal_those_of_decoding(size, paths):
    cached, path = open_cache(paths, size, FOLDER, 1e9)
    assert cached.count == 12
    assert all(map(np.array_equal, pixels(cached), resized(paths, size)))
    assert np.load(path).shape == (12, size, size, 3)


def test_pixels_equal_with_processes(paths, monkeypatch):
    monkeypatch.setattr(cache, "WORTH_PROCESSES", 0)
    cached, _ = open_cache(paths, 32, FOLDER, 1e9)
    assert all(map(np.array_equal, pixels(cached), resized(paths, 32)))


def batches(gigabytes, workers):
    """All tensors of two epochs of training, with random augmentation, and of validation."""
    steps = [transforms.RandomHorizontalFlip(), transforms.ColorJitter(0.2), transforms.ToTensor()]
    train_set = open_image_folder("data/train", transforms.Compose([transforms.Resize((32, 32)), *steps]))
    val_set = open_image_folder("data/val", eval_transform(32, [0.5] * 3, [0.2] * 3))
    cache_images(FOLDER, gigabytes, (train_set, (32, 32)), (val_set, (32, 32)))
    sampler = EpochBatches(len(train_set), 4, seed=42)
    train_loader = DataLoader(SeededImages(train_set, 42), batch_sampler=sampler, num_workers=workers)
    val_loader = DataLoader(val_set, 4, num_workers=workers)
    tensors = []
    for epoch in range(2):
        sampler.epoch = epoch
        tensors += [tensor for loader in (train_loader, val_loader) for batch in loader for tensor in batch]
    return tensors


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_equal_those_without_a_cache_tensor_for_tensor(workers, place, monkeypatch):
    expected = batches(0, 0)
    assert not FOLDER.exists()
    for _ in range(2):  # made, then found
        actual = batches(1, workers)
        assert len(actual) == len(expected) and all(map(torch.equal, actual, expected))
    monkeypatch.setattr(cache, "ResizedImages", None)  # nothing is decoded any more
    assert all(map(torch.equal, batches(1, 0), expected))


def test_a_run_ends_the_same_with_and_without(run_train, capsys):
    constants = dict(EPOCHS=1, BATCH_SIZE=8)
    with_cache = load_checkpoint(run_train(CACHE_GB=1.0, OUTPUT="with", **constants) / "last.pth")
    assert "cache       30 of 30 images" in capsys.readouterr().out
    without = load_checkpoint(run_train(CACHE_GB=0.0, OUTPUT="without", **constants) / "last.pth")
    assert not differences(with_cache, without)


def test_a_changed_image_is_decoded_again_and_nothing_else_is_read(paths, draw_image, monkeypatch):
    open_cache(paths, 32, FOLDER, 1e9)
    draw_image("another", (60, 40)).save(paths[3])
    os.utime(paths[3], ns=(0, 12345))  # in case the file system's clock is coarse
    read = []
    hash_file = cache.hash_file
    monkeypatch.setattr(cache, "hash_file", lambda path: read.append(path) or hash_file(path))
    cached, _ = open_cache(paths, 32, FOLDER, 1e9)
    assert read == [paths[3]]
    assert all(map(np.array_equal, pixels(cached), resized(paths, 32)))
    # A file that was only touched is no other image.
    os.utime(paths[5], ns=(0, 54321))
    before = npy_files()
    open_cache(paths, 32, FOLDER, 1e9)
    assert npy_files() == before and len(before) == 2


def test_a_limit_keeps_the_first_images_and_removes_the_set_used_least(paths):
    room = 128 + 7 * 3 * 32**2
    cached, _ = open_cache(paths, 32, FOLDER, room)
    assert cached.count == 7 and cached.get(7) is None
    first, second = (open_cache(paths[:n], 32, FOLDER, 1e9)[1] for n in (3, 4))
    os.utime(first, ns=(1, 1))
    third = open_cache(paths[:2], 32, FOLDER, 3 * 128 + 13 * 3 * 32**2)[1]
    assert not first.exists() and second.exists() and third.exists()
    # The files of this run stay, even if they are the oldest.
    os.utime(second, ns=(1, 1))
    cached, fourth = open_cache(paths[6:8], 32, FOLDER, 2 * 128 + 6 * 3 * 32**2 + 100, [second])
    assert cached.count == 2 and second.exists() and fourth.exists() and not third.exists()
    assert sum(path.stat().st_size for path in npy_files()) <= 2 * 128 + 6 * 3 * 32**2 + 100
    assert open_cache(paths[8:], 32, FOLDER, 100, [second]) == (None, "CACHE_GB is full")


def test_if_the_file_goes_away_images_are_decoded(place):
    dataset = open_image_folder("data/train", np.asarray)
    expected = [dataset[index][0] for index in range(len(dataset))]
    paths = [path for path, _ in dataset.samples]
    dataset.cache, path = open_cache(paths, 48, FOLDER, 1e9)
    path.unlink()
    assert all(np.array_equal(dataset[index][0], expected[index]) for index in range(len(dataset)))


@pytest.mark.parametrize("content", ["", "{", "[]", "[[1]]", '{"00": 1}', "null"])
def test_a_damaged_memory_is_forgotten(content, paths):
    open_cache(paths, 32, FOLDER, 1e9)
    (FOLDER / "contents.json").write_text(content)
    cached, _ = open_cache(paths, 32, FOLDER, 1e9)
    assert cached.count == 12 and len(npy_files()) == 1
    assert len(json.loads((FOLDER / "contents.json").read_text())) >= 12


def test_a_file_that_was_cut_off_is_made_again(paths):
    _, path = open_cache(paths, 32, FOLDER, 1e9)
    os.truncate(path, 1000)
    cached, _ = open_cache(paths, 32, FOLDER, 1e9)
    assert all(map(np.array_equal, pixels(cached), resized(paths, 32)))


def test_a_broken_image_is_named_and_no_part_is_left(paths):
    Path(paths[4]).write_bytes(b"no image")
    with pytest.raises(ImageError, match="004.png"):
        open_cache(paths, 32, FOLDER, 1e9)
    assert not list(FOLDER.glob("*.npy*"))


def cache_slowly(paths, seconds):
    """Cache the images, each of which takes some time."""

    class SlowImages(cache.ResizedImages):
        def __getitem__(self, index):
            time.sleep(seconds)
            return super().__getitem__(index)

    cache.ResizedImages = SlowImages
    cached, _ = open_cache(paths, 32, FOLDER, 1e9)
    assert cached.count == len(paths)


def start(paths, seconds):
    """A process that makes the cache, slowly."""
    # Linux copies this process; elsewhere a new one imports everything again, which takes seconds.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    process = context.Process(target=cache_slowly, args=(paths, seconds))
    process.start()
    return process


def wait_for_part(process):
    while not list(FOLDER.glob("*.npy.part")):
        assert process.is_alive()
        time.sleep(0.01)


def test_a_kill_while_it_is_written_leaves_nothing_wrong(paths):
    paths = sorted(paths)
    process = start(paths, 0.1)
    wait_for_part(process)
    process.kill()
    process.join()
    assert list(FOLDER.glob("*.npy.part")) and not npy_files()
    cached, _ = open_cache(paths, 32, FOLDER, 1e9)
    assert all(map(np.array_equal, pixels(cached), resized(paths, 32)))
    assert not list(FOLDER.glob("*.npy.part"))


def test_of_two_runs_at_once_one_decodes(paths):
    paths = sorted(paths)
    process = start(paths, 0.05)
    wait_for_part(process)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "ResizedImages", None)
        cached, _ = open_cache(paths, 32, FOLDER, 1e9)  # waits for the other one
    process.join()
    assert process.exitcode == 0
    assert all(map(np.array_equal, pixels(cached), resized(paths, 32)))


def mount(folder, options):
    """Mount a memory disk; the test is skipped where that is not allowed."""
    folder.mkdir(parents=True)
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder]).returncode
    ):
        pytest.skip("mounting is not allowed here")


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_a_read_only_folder_and_too_little_room_only_cost_time(place, monkeypatch):
    dataset = open_image_folder("data/train", np.asarray)
    mount(FOLDER, "size=60k")
    try:
        line = cache_images(FOLDER, 1.0, (dataset, (32, 32)))
        assert line.startswith("cache       0 images; the others are decoded") and "only 0.0 are free" in line
        # Full while it is written: another program was faster.
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1e9, 0, 1e9))
        assert "No space left on device" in cache_images(FOLDER, 1.0, (dataset, (32, 32)))
        assert not list(FOLDER.glob("*.npy*"))
        subprocess.run(["mount", "-o", "remount,ro", FOLDER], check=True)
        assert "Read-only file system" in cache_images(FOLDER, 1.0, (dataset, (32, 32)))
        assert dataset.cache is None and dataset[0][0].shape == (48, 48, 3)
    finally:
        subprocess.run(["umount", FOLDER], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_read_only_cache_that_is_there_is_used(paths, monkeypatch):
    mount(FOLDER, "size=1m")
    try:
        open_cache(paths, 32, FOLDER, 1e9)
        subprocess.run(["mount", "-o", "remount,ro", FOLDER], check=True)
        monkeypatch.setattr(cache, "ResizedImages", None)
        cached, _ = open_cache(paths, 32, FOLDER, 1e9)
        assert cached.count == 12
    finally:
        subprocess.run(["umount", FOLDER], check=True)


def test_makedata_keeps_it_and_the_user_s_own_files(place):
    sets = [(open_image_folder(f"data/{side}", np.asarray), (32, 32)) for side in ("train", "val")]
    assert cache_images(FOLDER, 1.0, *sets).startswith("cache       30 of 30 images in ")
    before = {path.name: path.stat().st_mtime_ns for path in npy_files()}
    makedata.main()
    assert {path.name: path.stat().st_mtime_ns for path in npy_files()} == before and len(before) == 2
    (FOLDER / "mine.npy").write_bytes(b"mine")
    with pytest.raises(makedata.UserError, match=r"mine\.npy was not put there by makedata"):
        makedata.main()
    assert (FOLDER / "mine.npy").read_bytes() == b"mine"


def test_no_cache_and_a_full_one(place):
    sets = [(open_image_folder(f"data/{side}", np.asarray), (32, 32)) for side in ("train", "val")]
    assert cache_images(FOLDER, 0, *sets) == "cache       off; images are decoded in each epoch"
    assert not FOLDER.exists() and sets[0][0].cache is None
    room = (128 + 21 * 3 * 32**2) / 1e9
    line = cache_images(FOLDER, room, *sets)
    assert line == "cache       21 images; the others are decoded in each epoch (CACHE_GB is full)"
    assert sets[0][0].cache.count == 21 and sets[1][0].cache is None
