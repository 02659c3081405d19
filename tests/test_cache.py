"""The cache of decoded images: the same tensors as without it, whatever happens to the files."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill_classes
from kill import differences
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

import makedata
from common import cache, contents
from common.cache import cache_images, open_cache
from common.checkpoint import load_checkpoint
from common.dataset import EpochBatches, SeededImages, eval_transform, open_image_folder
from common.images import ImageError, load_image, scan_class_folders

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
    assert not npy_files()
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


@pytest.fixture
def read(monkeypatch):
    """List of the files that are hashed."""
    read, hash_file = [], contents.hash_file
    monkeypatch.setattr(contents, "hash_file", lambda path: read.append(path) or hash_file(path))
    return read


def test_a_changed_image_is_decoded_again_and_nothing_else_is_read(paths, draw_image, read):
    open_cache(paths, 32, FOLDER, 1e9)
    assert sorted(read) == sorted(paths)
    read.clear()
    draw_image("another", (60, 40)).save(paths[3])
    os.utime(paths[3], ns=(0, 12345))  # in case the file system's clock is coarse
    cached, _ = open_cache(paths, 32, FOLDER, 1e9)
    assert read == [paths[3]]
    assert all(map(np.array_equal, pixels(cached), resized(paths, 32)))
    # A file that was only touched, or linked, is no other image.
    os.utime(paths[5], ns=(0, 54321))
    os.link(paths[6], "link.png")
    before = npy_files()
    open_cache(paths, 32, FOLDER, 1e9)
    assert npy_files() == before and len(before) == 2


# --- Two files of equal size and time of modification whose contents are exchanged: how people and programs do it.


def by_rename(first, second):
    first.rename("aside")
    second.rename(first)
    Path("aside").rename(second)


def by_copy_with_times(first, second):
    """cp -p, or an archive that is unpacked over the files."""
    for path in (first, second):
        shutil.copy2(path, path.with_suffix(".aside"))
    shutil.copy2(first.with_suffix(".aside"), second)
    shutil.copy2(second.with_suffix(".aside"), first)
    for path in (first, second):
        path.with_suffix(".aside").unlink()


def by_new_files(first, second):
    """rsync --times, and most editors: a new file beside, renamed over the old one."""
    for path, other in ((first, second.read_bytes()), (second, first.read_bytes())):
        times = path.stat()
        path.with_suffix(".aside").write_bytes(other)
        os.utime(path.with_suffix(".aside"), ns=(times.st_atime_ns, times.st_mtime_ns))
        path.with_suffix(".aside").replace(path)


def by_removing_first(first, second):
    """The new file is likely to get the inode of the old one."""
    contents, times = [first.read_bytes(), second.read_bytes()], first.stat().st_mtime_ns
    for path, content in zip((first, second), reversed(contents)):
        path.unlink()
        path.write_bytes(content)
        os.utime(path, ns=(times, times))


def by_writing_in_place(first, second):
    contents, times = [first.read_bytes(), second.read_bytes()], first.stat().st_mtime_ns
    for path, content in zip((first, second), reversed(contents)):
        with open(path, "r+b") as file:
            file.write(content)
        os.utime(path, ns=(times, times))


def by_hard_links(first, second):
    folder = Path(tempfile.mkdtemp(dir="."))
    for path in (first, second):
        os.link(path, folder / path.name)
    for path, other in ((first, second), (second, first)):
        path.unlink()
        os.link(folder / other.name, path)


def by_symbolic_links(first, second):
    folder = Path(tempfile.mkdtemp(dir=".")).resolve()
    for path in (first, second):
        path.rename(folder / path.name)
    for path, other in ((first, second), (second, first)):
        path.symlink_to(folder / other.name)


def by_overwriting_one(first, second):
    """Not exchanged: both have one content now."""
    times = first.stat().st_mtime_ns
    first.write_bytes(second.read_bytes())
    os.utime(first, ns=(times, times))


EXCHANGES = [value for name, value in list(globals().items()) if name.startswith("by_")]


def same_stamps(*paths):
    """Give files equal times, of whole seconds as in a ZIP archive, and check that their sizes are equal."""
    for path in paths:
        os.utime(path, ns=(1_700_000_000 * 10**9,) * 2)
    assert len({(path.stat().st_size, path.stat().st_mtime_ns) for path in paths}) == 1


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("suffix", ["bmp", "tif", "ppm"])
def test_exchanged_images_of_equal_size_and_time_are_seen(suffix, exchange, tmp_path, monkeypatch, draw_image):
    monkeypatch.chdir(tmp_path)
    folder = Path("images")
    folder.mkdir()
    paths = [folder / f"{number}.{suffix}" for number in range(5)]
    for path in paths:
        draw_image(path.name, (40, 40)).save(path)
    same_stamps(*paths)
    monkeypatch.setattr(contents.time, "sleep", lambda seconds: None)  # even without the wait for the clock's tick
    names = list(map(str, paths))
    for _ in range(2):
        cached, _ = open_cache(names, 40, FOLDER, 1e9)
        exchange(paths[1], paths[3])
        expected = resized(paths, 40)
        cached, _ = open_cache(names, 40, FOLDER, 1e9)
        assert all(map(np.array_equal, pixels(cached), expected))


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("where", ["data1", "data/train"])
def test_a_run_after_makedata_learns_what_is_in_the_files_now(where, exchange, tmp_path, monkeypatch, draw_image):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path("data1", name).mkdir(parents=True)
        for number in range(8):
            draw_image(f"{name}{number}", (32, 32)).save(Path("data1", name, f"{number}.bmp"))
    same_stamps(*Path("data1").glob("*/*"))
    makedata.main()
    exchange(*sorted(Path(where, "a").iterdir())[1:3])
    train_set = open_image_folder("data/train", np.asarray)
    expected = [train_set[index][0].copy() for index in range(len(train_set))]
    cache_images(FOLDER, 1.0, (train_set, (32, 32)))
    assert train_set.cache.count == len(expected)
    assert all(np.array_equal(train_set[index][0], expected[index]) for index in range(len(train_set)))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_exchanged_spectrograms_are_seen(exchange, tmp_path, monkeypatch):
    """PNG files as makedata.py writes them, whose sizes are equal here by a comment of some length."""
    monkeypatch.chdir(tmp_path)
    Path("data/train/a").mkdir(parents=True)
    paths, images = [Path(f"data/train/a/{number}.wav.png") for number in range(4)], []
    for number, path in enumerate(paths):
        levels = np.random.default_rng(number).integers(0, 256, (32, 51), dtype=np.uint8)
        Image.fromarray(levels).save(path)
        images.append(path.read_bytes())
    for path, image in zip(paths, images):
        path.write_bytes(image + bytes(max(map(len, images)) - len(image)))
    same_stamps(*paths)
    names = list(map(str, paths))
    open_cache(names, (32, 51), FOLDER, 1e9)
    exchange(paths[0], paths[2])
    expected = [np.asarray(load_image(path)) for path in paths]
    cached, _ = open_cache(names, (32, 51), FOLDER, 1e9)
    assert all(map(np.array_equal, pixels(cached), expected))


def test_an_image_that_changes_within_one_tick_of_the_clock_is_read_again(paths, monkeypatch):
    """The second change leaves all times as they are: only the time at which the file was read tells."""
    stamp = contents.read_stamp(paths[0])

    def read_stamp(path):
        return stamp if path == paths[0] else real(path)

    real = contents.read_stamp
    monkeypatch.setattr(contents, "read_stamp", read_stamp)
    monkeypatch.setattr(contents.time, "time_ns", lambda: stamp[2] + 1000)  # just after the first change
    monkeypatch.setattr(contents.time, "sleep", lambda seconds: None)
    first = contents.hash_contents(paths, FOLDER)[0]
    Path(paths[0]).write_bytes(Path(paths[1]).read_bytes())
    assert contents.hash_contents(paths, FOLDER)[0] == contents.hash_file(paths[1]) != first


def test_images_that_change_while_they_are_decoded_are_not_cached(paths, monkeypatch):
    class Meanwhile(cache.ResizedImages):
        def __getitem__(self, index):
            if index == 5:
                Path(paths[2]).write_bytes(Path(paths[3]).read_bytes())
            return super().__getitem__(index)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "ResizedImages", Meanwhile)
        assert open_cache(paths, 32, FOLDER, 1e9) == (None, "images were changed while they were read")
    assert not npy_files()
    cached, _ = open_cache(paths, 32, FOLDER, 1e9)
    assert all(map(np.array_equal, pixels(cached), resized(paths, 32)))


@pytest.mark.parametrize("link", [True, False])
def test_after_makedata_nothing_is_read_to_know_what_it_is(link, tmp_path, monkeypatch, read):
    monkeypatch.chdir(tmp_path)
    fill_classes("data1", {"a": 6, "b": 6})
    monkeypatch.setattr(makedata, "LINK", link)
    for _ in range(2):
        makedata.main()
        sets = [(open_image_folder(f"data/{side}"), (32, 32)) for side in ("train", "val")]
        assert cache_images(FOLDER, 1.0, *sets).startswith("cache       12 of 12")
        contents.hash_contents(scan_class_folders("data1").files, FOLDER)
        assert read == []


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png") if hasattr(os, "mkfifo") else (tmp_path / "pipe.png").mkdir()
    paths = [str(tmp_path / name) for name in ("pipe.png", "none.png", "image.png")]
    Path(paths[2]).write_bytes(b"content")
    assert list(contents.hash_contents(paths, missing_ok=True)) == ["", "", contents.hash_file(paths[2])]
    for path in paths[:2]:
        with pytest.raises(OSError, match=Path(path).name):
            contents.hash_contents([path])


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


def save_other_rows(path):
    np.savez(path, files=np.zeros(3))


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text('{"00": 1}'),
    "cut off": lambda path: os.truncate(path, 300),
    "a bit": lambda path: path.write_bytes(path.read_bytes()[:400] + b"#" + path.read_bytes()[401:]),
    "other rows": save_other_rows,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_memory_is_forgotten(damage, paths, read):
    open_cache(paths, 32, FOLDER, 1e9)
    DAMAGE[damage](FOLDER / "contents.npz")
    read.clear()
    cached, _ = open_cache(paths, 32, FOLDER, 1e9)
    assert cached.count == 12 and len(npy_files()) == 1 and len(read) == 12
    assert (len(contents.load_memory(FOLDER)) == 12) == (damage != "a folder")


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
    folder.mkdir(parents=True, exist_ok=True)
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
    assert not npy_files() and sets[0][0].cache is None
    room = (128 + 21 * 3 * 32**2) / 1e9
    line = cache_images(FOLDER, room, *sets)
    assert line == "cache       21 images; the others are decoded in each epoch (CACHE_GB is full)"
    assert sets[0][0].cache.count == 21 and sets[1][0].cache is None
