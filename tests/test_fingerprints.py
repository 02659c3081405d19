"""A run that is resumed on other data says what changed; images that stand on both sides of the split are named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CLASSES, fill_classes
from kill import differences
from PIL import Image

import makedata
import mean_std
import train
from common import fingerprints
from common.checkpoint import load_checkpoint, save_checkpoint
from common.dataset import open_image_folder
from common.fingerprints import describe_change, fingerprint_images, fingerprint_part


def replace(path, draw):
    """Another image in the place of `path`."""
    draw(f"another {path.name}").save(path)


def exchange(one, other):
    spare = one.with_name("spare.png")
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def replace_in_secret(path, draw):
    """Another image of the same size in bytes, with the same time."""
    draw("uncompressed").save(path.with_suffix(".bmp"))
    status, before = path.stat(), path.read_bytes()
    path.write_bytes(before[:-20] + bytes(8) + before[-12:])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    path.with_suffix(".bmp").unlink()
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


# what is done to a/000.png ... a/004.png, b/000.png ... b/004.png: (how, what is said, others, in another order)
CHANGES = {
    "nothing": (lambda a, b, draw: None, "", False, False),
    "one replaced": (lambda a, b, draw: replace(a / "001.png", draw), "are others (1 of 10 replaced)", True, True),
    "replaced, of the same size and time": (
        lambda a, b, draw: replace_in_secret(a / "001.png", draw), "are others (1 of 10 replaced)", True, True,
    ),
    "three replaced": (
        lambda a, b, draw: [replace(path, draw) for path in (a / "001.png", b / "000.png", b / "004.png")],
        "are others (3 of 10 replaced)", True, True,
    ),
    "one removed": (lambda a, b, draw: (b / "002.png").unlink(), "are others (1 removed)", True, True),
    "one added": (lambda a, b, draw: draw("new").save(b / "9.png"), "are others (1 added)", True, True),
    "a copy added": (
        lambda a, b, draw: shutil.copy(a / "001.png", a / "9.png"), "are others (1 added)", True, True,
    ),
    "one added, one removed": (
        lambda a, b, draw: [draw("new").save(b / "9.png"), (a / "000.png").unlink()],
        "are others (1 added, 1 removed)", True, True,
    ),
    "renamed in order": (
        lambda a, b, draw: (a / "001.png").rename(a / "001b.png"),
        "are the same, under other names or in another order (1 renamed)", False, False,
    ),
    "renamed to the end": (
        lambda a, b, draw: (a / "001.png").rename(a / "9.png"),
        "are the same, under other names or in another order (1 renamed)", False, True,
    ),
    "exchanged in a class": (
        lambda a, b, draw: exchange(a / "000.png", a / "004.png"),
        "are the same, under other names or in another order (2 renamed)", False, True,
    ),
    "moved to another class": (
        lambda a, b, draw: (a / "002.png").rename(b / "9.png"), "are others (1 moved to another class)", True, True,
    ),
    "exchanged between classes": (
        lambda a, b, draw: exchange(a / "003.png", b / "003.png"), "are others (2 moved to another class)", True, True,
    ),
    "a replaced image moved": (
        lambda a, b, draw: [(a / "002.png").rename(b / "9.png"), draw("new").save(a / "002.png")],
        "are others (1 added, 1 moved to another class)", True, True,
    ),
    "saved again": (
        lambda a, b, draw: Image.open(a / "002.png").save(a / "002.png", compress_level=1),
        "are others (1 of 10 replaced)", True, True,
    ),
    "everything": (
        lambda a, b, draw: [replace(path, draw) for folder in (a, b) for path in folder.iterdir()],
        "are others (10 of 10 replaced)", True, True,
    ),
}  # fmt: skip


def look(root):
    """The fingerprints of a folder, without a memory of hashes."""
    dataset = open_image_folder(root)
    return fingerprint_part(dataset, *fingerprints.content_hashes(dataset, None))


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_counted_and_its_consequences_known(name, tmp_path, draw_image):
    change, *expected = CHANGES[name]
    fill_classes(tmp_path, dict(a=5, b=5))
    before = look(tmp_path)
    change(tmp_path / "a", tmp_path / "b", draw_image)
    assert describe_change(before, look(tmp_path), ["a", "b"]) == tuple(expected)


@pytest.mark.parametrize("name", CHANGES)
def test_of_many_images_checkpoints_hold_little_and_say_which_classes_changed(name, tmp_path, draw_image, monkeypatch):
    monkeypatch.setattr(fingerprints, "MAX_FILES", 3)
    change, text, others, reordered = CHANGES[name]
    fill_classes(tmp_path, dict(a=5, b=5))
    before = look(tmp_path)
    change(tmp_path / "a", tmp_path / "b", draw_image)
    after = look(tmp_path)
    assert before["files"] is None
    said, *consequences = describe_change(before, after, ["a", "b"])
    assert consequences == [others, reordered] and bool(said) == bool(text)
    for label, folder in enumerate("ab"):
        changed = before["by_class"][label] != after["by_class"][label]
        assert others is False or changed == (f"in {folder}" in said or f", {folder}" in said), said


def test_a_checkpoint_holds_16_bytes_an_image_in_plain_types(place, tmp_path):
    sets = [open_image_folder(f"data/{part}") for part in ("train", "val")]
    images = fingerprint_images(Path("none"), *sets)
    torch.save(images, tmp_path / "images.pth")
    loaded = torch.load(tmp_path / "images.pth", weights_only=True)
    assert loaded["val"]["files"].shape == (9, 2) and loaded["train"]["files"].dtype == torch.int64
    assert [count for count, _ in loaded["train"]["by_class"]] == [7, 7, 7]


# --- runs


def lines(capsys, start):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(start)]


def val_images():
    return sorted(path for path in Path("data/val").rglob("*.png"))


def test_with_other_validation_images_the_best_starts_anew_and_the_old_one_is_kept(
    run_train, capsys, draw_image, monkeypatch
):
    results = iter([90.0, 95.0, 10.0, 20.0, 15.0])
    validate = train.validate

    def set_accuracy(*arguments):
        metrics, *predictions = validate(*arguments)
        return dict(metrics, acc1=next(results)), *predictions

    monkeypatch.setattr(train, "validate", set_accuracy)
    constants = dict(EMA_DECAY=0.0, RESUME="auto")
    folder = run_train(EPOCHS=2, **constants)
    best = (folder / "best.pth").read_bytes()
    victim = val_images()[2]
    victim.unlink()  # since data consists of links
    draw_image("another").save(victim)
    capsys.readouterr()
    run_train(EPOCHS=4, **constants)
    out = capsys.readouterr().out
    assert "changed     the validation images are others (1 of 9 replaced): the best accuracy starts anew\n" in out
    assert "best checkpoint on the earlier validation images is now" in out
    assert (folder / "best.1.pth").read_bytes() == best
    assert json.loads((folder / "result.1.json").read_text(encoding="utf-8"))["acc1"] == 95.0
    saved = load_checkpoint(folder / "best.pth")
    assert saved["epoch"] == 4 and saved["best_acc1"] == 20.0
    assert [row["val_acc1"] for row in saved["history"]] == [90.0, 95.0, 10.0, 20.0]
    run_train(EPOCHS=5, **constants)  # on the same images as before: nothing more is said or renamed
    assert not [line for line in lines(capsys, "changed") if "images" in line]
    assert load_checkpoint(folder / "best.pth")["epoch"] == 4 and not (folder / "best.2.pth").exists()


def test_a_run_killed_before_its_first_new_best_still_keeps_the_old_one(run_train, monkeypatch, draw_image):
    folder = run_train(EPOCHS=1)
    best = load_checkpoint(folder / "best.pth")
    del best["data"]  # as an earlier version saved it
    save_checkpoint(best, folder / "best.pth")
    val_images()[0].unlink()
    original = train.train_one_epoch

    def save_and_end(state, *arguments, folder, **options):
        folder.save_last(state)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_one_epoch", save_and_end)
    with pytest.raises(KeyboardInterrupt):
        run_train(EPOCHS=2, RESUME="auto")
    assert load_checkpoint(folder / "last.pth")["best_acc1"] == -1 and not (folder / "best.1.pth").exists()
    monkeypatch.setattr(train, "train_one_epoch", original)
    run_train(EPOCHS=2, RESUME="auto")
    assert load_checkpoint(folder / "best.1.pth")["epoch"] == 1 and load_checkpoint(folder / "best.pth")["epoch"] == 2


def test_images_under_other_names_in_the_same_order_change_no_bit(run_train, capsys, monkeypatch):
    straight = load_checkpoint(run_train(EPOCHS=2, OUTPUT="straight") / "last.pth")
    original = train.train_one_epoch

    def stop_in_epoch_2(state, *arguments, **options):
        if state.epoch == 1:
            raise KeyboardInterrupt
        return original(state, *arguments, **options)

    monkeypatch.setattr(train, "train_one_epoch", stop_in_epoch_2)
    with pytest.raises(KeyboardInterrupt):
        run_train(EPOCHS=2)
    monkeypatch.setattr(train, "train_one_epoch", original)
    for path in [*val_images(), *Path("data/train").rglob("*.png")]:
        path.rename(path.with_name(f"{path.stem} (1).png"))
    capsys.readouterr()
    folder = run_train(EPOCHS=2, RESUME="auto")
    out = capsys.readouterr().out
    assert "the training images are the same, under other names or in another order (21 renamed)" in out
    assert "anew" not in out and "bit-identical" not in out
    assert not differences(load_checkpoint(folder / "last.pth"), straight)


def edit_statistics():
    path = Path("data/mean_std.json")
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | dict(mean=[0.1, 0.2, 0.3])), encoding="utf-8")


def split_again(**constants):
    for name, value in constants.items():
        setattr(makedata, name, value)
    makedata.main()


OTHER_DATA = {
    "mean_std.json": (edit_statistics, {}, ["changed     mean of the pixels was [", "is [0.1, 0.2, 0.3]"], False),
    "MEAN": (lambda: None, dict(MEAN=[0.5] * 3, STD=[0.2] * 3), ["MEAN was None", "std of the pixels was"], False),
    "another seed": (lambda: split_again(SEED=7), {}, ["the training images are others (", "starts anew"], True),
    "another ratio": (lambda: split_again(VAL_RATIO=0.5), {}, ["6 removed", "6 added"], True),
    "groups": (lambda: split_again(GROUP=r"00(\d)"), {}, ["the validation images are others"], True),
}


@pytest.mark.parametrize("name", OTHER_DATA)
def test_other_data_and_statistics_are_said_when_a_run_is_resumed(name, run_train, capsys, monkeypatch):
    change, constants, expected, anew = OTHER_DATA[name]
    for constant in ("SEED", "VAL_RATIO", "GROUP"):
        monkeypatch.setattr(makedata, constant, getattr(makedata, constant))  # set back after the test
    mean_std.main()
    folder = run_train(EPOCHS=1)
    change()
    capsys.readouterr()
    run_train(EPOCHS=2, RESUME="auto", **constants)
    out = capsys.readouterr().out
    assert all(text in out for text in expected) and "will not be bit-identical" in out, out
    assert (folder / "best.1.pth").exists() == anew


def test_a_checkpoint_of_an_earlier_version_resumes_quietly(run_train, capsys):
    folder = run_train(EPOCHS=1)
    saved = load_checkpoint(folder / "last.pth")
    del saved["data"]
    save_checkpoint(saved, folder / "last.pth")
    val_images()[0].unlink()
    capsys.readouterr()
    run_train(EPOCHS=2, RESUME="auto")
    assert not [line for line in lines(capsys, "changed") if "images" in line]


# --- images on both sides


def both_sides(change):
    """Make data/ by hand as a person would, and `change` it."""
    train_folder, val_folder = Path("data/train/Maize"), Path("data/val/Maize")
    change(sorted(train_folder.iterdir()), sorted(val_folder.iterdir()), train_folder, val_folder)


def copy_all(train_images, val_images, train_folder, val_folder):
    for path in val_images:
        shutil.copy(path, train_folder / f"copy of {path.name}")


COMMON = {
    "all of a class": (copy_all, "3 of 9 validation images"),
    "one of the same name": (lambda t, v, tf, vf: shutil.copy(t[0], vf / t[0].name), "1 of 10 validation images"),
    "under another name": (lambda t, v, tf, vf: shutil.copy(v[0], tf / "x.png"), "1 of 9 validation images"),
    "a hard link": (lambda t, v, tf, vf: os.link(v[0], tf / "x.png"), "1 of 9 validation images"),
    "in another class": (
        lambda t, v, tf, vf: shutil.copy(v[0], tf.with_name("玉米 苗") / "x.png"),
        "images, 1 of them in another class",
    ),
    "twice in val": (
        lambda t, v, tf, vf: [shutil.copy(t[0], vf / "x.png"), shutil.copy(t[0], vf / "y.png")],
        "2 of 11 validation images",
    ),
}  # fmt: skip


@pytest.mark.parametrize("cache_gb", [0.0, 8.0])
@pytest.mark.parametrize("name", COMMON)
def test_images_on_both_sides_are_counted_and_named(name, cache_gb, run_train, capsys, monkeypatch):
    change, text = COMMON[name]
    both_sides(change)
    monkeypatch.setattr(train, "create_loaders", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_train(CACHE_GB=cache_gb)
    [warning] = lines(capsys, "warning: ")
    assert text in warning and "are also training images" in warning and "makedata.py" in warning
    assert warning.count(".png is ") in (1, 2, 3) and str(Path("data", "train")) in warning


def test_a_split_without_common_images_gets_no_warning(run_train, capsys):
    run_train(EPOCHS=1)
    assert not lines(capsys, "warning: ") and len(CLASSES) == 3


def test_more_images_than_a_start_can_read_are_compared_by_size_until_their_hashes_are_known(
    place, monkeypatch, capsys
):
    train_set, val_set = (open_image_folder(place / "data" / part) for part in ("train", "val"))
    unknown, cache = None, place / "data" / "cache"
    exact = fingerprint_images(cache, train_set, val_set)["train"]
    monkeypatch.setattr(fingerprints, "MAX_READ", 3)
    monkeypatch.setattr(fingerprints, "hash_contents", lambda *_: pytest.fail("a file is read"))
    rough = fingerprint_part(train_set, *fingerprints.content_hashes(train_set, unknown))
    assert "compared by the sizes of the files" in capsys.readouterr().out and not rough["hashed"]
    assert describe_change(rough, exact, train_set.classes) == ("", False, False)
    path = Path(train_set.files[0])
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content + b"more")
    other = fingerprint_part(train_set, *fingerprints.content_hashes(train_set, unknown))
    assert describe_change(rough, other, train_set.classes)[1:] == (True, True)
