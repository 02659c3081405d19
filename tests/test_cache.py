"""Decoded pictures in data/cache: the same tensors as without, whatever happens to the files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEFAULTS, ROOT, SMALL, draw_picture, fill_classes
from torchvision import transforms

import makedata
import train
from common import cache
from common.cache import open_cache
from common.checkpoint import load_checkpoint
from common.dataset import open_image_folder
from common.images import ImageError, load_image
from tests.kill import differences

FOLDER = Path("data/cache")


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """Twelve pictures of several sizes, and the working folder beside them."""
    monkeypatch.chdir(tmp_path)
    paths = fill_classes("pictures", {"a": 6, "b": 5}, size=(60, 40))
    paths.append(Path("pictures/b/large.jpg"))
    draw_picture("large", (300, 200)).save(paths[-1])
    return [str(path) for path in paths]


def pixels(kept):
    return [np.asarray(kept.get(index)) for index in range(kept.count)]


def resized(paths, size):
    return [np.asarray(transforms.Resize((size, size))(load_image(path))) for path in paths]


def npy_files():
    return sorted(FOLDER.glob("*.npy"))


@pytest.mark.parametrize("size", [32, 48, 224])
def test_pixels_equal_those_of_decoding(size, paths):
    kept, path = open_cache(paths, size, FOLDER, 1e9)
    assert kept.count == 12
    assert all(map(np.array_equal, pixels(kept), resized(paths, size)))
    assert np.load(path).shape == (12, size, size, 3)


def test_pixels_equal_with_processes(paths, monkeypatch):
    monkeypatch.setattr(cache, "WORTH_PROCESSES", 0)
    kept, _ = open_cache(paths, 32, FOLDER, 1e9)
    assert all(map(np.array_equal, pixels(kept), resized(paths, 32)))


def batches(cache_gb, workers, monkeypatch):
    """All tensors of two epochs of training and of validation."""
    for name, value in (DEFAULTS | SMALL | dict(CACHE_GB=cache_gb, WORKERS=workers)).items():
        monkeypatch.setattr(train, name, value)
    train_loader, val_loader, _ = train.open_data([0.5] * 3, [0.2] * 3, torch.device("cpu"), 0, 1)
    tensors = []
    for epoch in range(2):
        train_loader.batch_sampler.epoch = epoch
        tensors += [tensor for loader in (train_loader, val_loader) for batch in loader for tensor in batch]
    return tensors


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_equal_those_without_a_cache_tensor_for_tensor(workers, place, monkeypatch):
    expected = batches(0, 0, monkeypatch)
    assert not FOLDER.exists()
    for _ in range(2):  # made, then found
        actual = batches(1, workers, monkeypatch)
        assert len(actual) == len(expected) and all(map(torch.equal, actual, expected))
    monkeypatch.setattr(cache, "ResizedPictures", None)  # nothing is decoded any more
    assert all(map(torch.equal, batches(1, 0, monkeypatch), expected))


def test_a_run_ends_the_same_with_and_without(run_train, capsys):
    with_cache = load_checkpoint(run_train(CACHE_GB=1.0, OUTPUT="with") / "last.pth")
    assert "cache       30 of 30 pictures" in capsys.readouterr().out
    without = load_checkpoint(run_train(CACHE_GB=0.0, OUTPUT="without") / "last.pth")
    assert not differences(with_cache, without)


def test_a_changed_picture_is_decoded_again_and_nothing_else_is_read(paths, monkeypatch):
    open_cache(paths, 32, FOLDER, 1e9)
    draw_picture("another", (60, 40)).save(paths[3])
    os.utime(paths[3], ns=(0, 12345))  # in case the file system's clock is coarse
    read = []
    hash_file = cache.hash_file
    monkeypatch.setattr(cache, "hash_file", lambda path: read.append(path) or hash_file(path))
    kept, _ = open_cache(paths, 32, FOLDER, 1e9)
    assert read == [paths[3]]
    assert all(map(np.array_equal, pixels(kept), resized(paths, 32)))
    # A file that was only touched is no other picture.
    os.utime(paths[5], ns=(0, 54321))
    before = npy_files()
    open_cache(paths, 32, FOLDER, 1e9)
    assert npy_files() == before and len(before) == 2


def test_a_limit_keeps_the_first_pictures_and_removes_the_set_used_least(paths):
    room = 128 + 7 * 3 * 32**2
    kept, _ = open_cache(paths, 32, FOLDER, room)
    assert kept.count == 7 and kept.get(7) is None
    first, second = (open_cache(paths[:n], 32, FOLDER, 1e9)[1] for n in (3, 4))
    os.utime(first, ns=(1, 1))
    third = open_cache(paths[:2], 32, FOLDER, 3 * 128 + 13 * 3 * 32**2)[1]
    assert not first.exists() and second.exists() and third.exists()
    # The files of this run stay, even if they are the oldest.
    os.utime(second, ns=(1, 1))
    kept, fourth = open_cache(paths[6:8], 32, FOLDER, 2 * 128 + 6 * 3 * 32**2 + 100, [second])
    assert kept.count == 2 and second.exists() and fourth.exists() and not third.exists()
    assert sum(path.stat().st_size for path in npy_files()) <= 2 * 128 + 6 * 3 * 32**2 + 100
    assert open_cache(paths[8:], 32, FOLDER, 100, [second]) == (None, "CACHE_GB is full")


def test_if_the_file_goes_away_pictures_are_decoded(place):
    pictures = open_image_folder("data/train", np.asarray)
    expected = [pictures[index][0] for index in range(len(pictures))]
    paths = [path for path, _ in pictures.samples]
    pictures.cache, path = open_cache(paths, 48, FOLDER, 1e9)
    path.unlink()
    assert all(np.array_equal(pictures[index][0], expected[index]) for index in range(len(pictures)))


@pytest.mark.parametrize("content", ["", "{", "[]", "[[1]]", '{"00": 1}', "null"])
def test_a_damaged_memory_is_forgotten(content, paths):
    open_cache(paths, 32, FOLDER, 1e9)
    (FOLDER / "contents.json").write_text(content)
    kept, _ = open_cache(paths, 32, FOLDER, 1e9)
    assert kept.count == 12 and len(npy_files()) == 1
    assert len(json.loads((FOLDER / "contents.json").read_text())) >= 12


def test_a_file_that_was_cut_off_is_made_again(paths):
    _, path = open_cache(paths, 32, FOLDER, 1e9)
    os.truncate(path, 1000)
    kept, _ = open_cache(paths, 32, FOLDER, 1e9)
    assert all(map(np.array_equal, pixels(kept), resized(paths, 32)))


def test_a_broken_picture_is_named_and_no_part_is_left(paths):
    Path(paths[4]).write_bytes(b"no picture")
    with pytest.raises(ImageError, match="004.png"):
        open_cache(paths, 32, FOLDER, 1e9)
    assert not list(FOLDER.glob("*.npy*"))


SLOW = """
import time
from common import cache
from common.cache import open_cache
read = cache.ResizedPictures.__getitem__
def slow(pictures, index):
    time.sleep({seconds})
    return read(pictures, index)
cache.ResizedPictures.__getitem__ = slow
from pathlib import Path
kept, path = open_cache(sorted(map(str, Path("pictures").rglob("*.*"))), 32, Path("data/cache"), 1e9)
print(kept.count)
"""


def start(seconds):
    """A process that makes the cache, slowly."""
    environment = os.environ | dict(PYTHONPATH=str(ROOT))
    return subprocess.Popen(
        [sys.executable, "-c", SLOW.format(seconds=seconds)], env=environment, stdout=subprocess.PIPE
    )


def wait_for_part(process):
    while not list(FOLDER.glob("*.npy.part")):
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
def test_a_kill_while_it_is_written_leaves_nothing_wrong(paths):
    paths = sorted(paths)
    process = start(0.1)
    wait_for_part(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(FOLDER.glob("*.npy.part")) and not npy_files()
    kept, _ = open_cache(paths, 32, FOLDER, 1e9)
    assert all(map(np.array_equal, pixels(kept), resized(paths, 32)))
    assert not list(FOLDER.glob("*.npy.part"))


def test_of_two_runs_at_once_one_decodes(paths):
    paths = sorted(paths)
    process = start(0.1)
    wait_for_part(process)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "ResizedPictures", None)
        kept, _ = open_cache(paths, 32, FOLDER, 1e9)  # waits for the other one
    assert process.wait() == 0 and process.stdout.read().strip() == b"12"
    assert all(map(np.array_equal, pixels(kept), resized(paths, 32)))


def mount(folder, options):
    """Mount a memory disk; the test is skipped where that is not allowed."""
    folder.mkdir(parents=True)
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder]).returncode
    ):
        pytest.skip("mounting is not allowed here")


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_a_read_only_folder_and_too_little_room_only_cost_time(place, run_train, monkeypatch, capsys):
    mount(FOLDER, "size=60k")
    try:
        run_train()
        assert "only 0.0 are free" in capsys.readouterr().out
        # Full while it is written: another program was faster.
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1e9, 0, 1e9))
        run_train()
        assert "No space left on device" in capsys.readouterr().out
        assert not list(FOLDER.glob("*.npy*"))
        subprocess.run(["mount", "-o", "remount,ro", FOLDER], check=True)
        run_train()
        assert "Read-only file system" in capsys.readouterr().out
    finally:
        subprocess.run(["umount", FOLDER], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_read_only_cache_that_is_there_is_used(paths, monkeypatch):
    mount(FOLDER, "size=1m")
    try:
        open_cache(paths, 32, FOLDER, 1e9)
        subprocess.run(["mount", "-o", "remount,ro", FOLDER], check=True)
        monkeypatch.setattr(cache, "ResizedPictures", None)
        kept, _ = open_cache(paths, 32, FOLDER, 1e9)
        assert kept.count == 12
    finally:
        subprocess.run(["umount", FOLDER], check=True)


def test_makedata_keeps_it_and_the_user_s_own_files(place, run_train):
    run_train()
    before = {path.name: path.stat().st_mtime_ns for path in npy_files()}
    makedata.main()
    assert {path.name: path.stat().st_mtime_ns for path in npy_files()} == before and len(before) == 2
    (FOLDER / "mine.npy").write_bytes(b"mine")
    with pytest.raises(makedata.UserError, match=r"mine\.npy was not put there by makedata"):
        makedata.main()
    assert (FOLDER / "mine.npy").read_bytes() == b"mine"
