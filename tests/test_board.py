"""train.py's switch for TensorBoard."""

import csv
import shutil

import pytest
import torch
from conftest import CLASSES
from torchvision import transforms

import train
from common.augment import BatchMixup
from common.board import Board
from common.dataset import open_image_folder
from common.options import UserError

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(folder):
    """What is in the event files of a run."""
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    return events


def row(epoch):
    return dict(epoch=epoch, lr=0.1, train_loss=1 / epoch, val_loss=2 / epoch, ema_acc1=10.0 * epoch, note="text")


def test_curves_confusion_matrices_and_the_sheet(tmp_path, make_data1):
    make_data1(tmp_path / "train", dict.fromkeys(CLASSES, 2))
    dataset = open_image_folder(tmp_path / "train")
    board = Board(tmp_path, 0)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.2] * 3)])
    board.add_augmentation(0, dataset, transform, BatchMixup(len(CLASSES), mixup=0.8, prob=0.2))
    for epoch in (1, 2):
        board.add_epoch(row(epoch), [0, 1, 2, 2], [0, 1, 1, 2], dataset.classes)
    events = read(tmp_path)
    assert sorted(events.Tags()["scalars"]) == ["acc1/ema", "loss/train", "loss/val", "lr"]
    assert [(event.step, event.value) for event in events.Scalars("loss/train")] == [(1, 1.0), (2, 0.5)]
    assert [event.step for event in events.Images("confusion matrix")] == [1, 2]
    assert len(events.Images("augmentation")) == 1


def test_a_resumed_run_writes_each_epoch_once(tmp_path):
    board = Board(tmp_path, 0)
    for epoch in (1, 2):
        board.add_epoch(row(epoch), [0, 1], [0, 1], ["a", "b"])
    board.writer.close()
    Board(tmp_path, 1).add_epoch(row(2), [0, 1], [0, 1], ["a", "b"])
    assert [event.step for event in read(tmp_path).Scalars("loss/val")] == [1, 2]


def test_a_run_with_it_has_the_same_weights(run_train):
    folder, plain = run_train(TENSORBOARD=True, OUTPUT="with", EPOCHS=1), run_train(OUTPUT="without", EPOCHS=1)
    assert not (plain / "tensorboard").exists()
    events = read(folder)
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        [logged] = csv.DictReader(file)
    for tag, column in (("loss/train", "train_loss"), ("acc1/ema", "ema_acc1"), ("lr", "lr")):
        [event] = events.Scalars(tag)
        assert event.step == 1 and event.value == pytest.approx(float(logged[column]), rel=1e-5)
    assert len(events.Images("augmentation")) == len(events.Images("confusion matrix")) == 1
    weights = [torch.load(path / "last.pth", weights_only=True)["state_dict"] for path in (folder, plain)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_an_absent_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        Board(tmp_path, 0)


def test_a_board_that_fails_ends_nothing_and_catches_up(run_train, monkeypatch, capsys):
    """The folder is blocked at first, then a plot fails, and then the thread that writes: the disk is full."""
    from tensorboard.summary.writer import record_writer

    original, writes = record_writer.RecordWriter.write, []

    def write(writer, data):
        writes.append(1)
        if len(writes) > 3 and "full" in state:
            raise OSError(28, "No space left on device")
        return original(writer, data)

    state = set()
    monkeypatch.setattr(record_writer.RecordWriter, "write", write)
    train_epoch = train.RunFolder.finish_epoch

    def finish_epoch(folder, *arguments):
        row = train_epoch(folder, *arguments)
        if row["epoch"] == 1:
            shutil.rmtree(folder.path / "tensorboard")
            (folder.path / "tensorboard").touch()  # a file in the way
        if row["epoch"] == 2:
            (folder.path / "tensorboard").unlink()
        state.add("full") if row["epoch"] == 3 else state.discard("full")
        return row

    monkeypatch.setattr(train.RunFolder, "finish_epoch", finish_epoch)
    folder = run_train(TENSORBOARD=True, EPOCHS=4)
    captured = capsys.readouterr()
    assert captured.out.count("warning: ") == 1 and "tensorboard" in captured.out and "Traceback" not in captured.err
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert [event.value for event in read(folder).Scalars("loss/train")] == pytest.approx(losses, rel=1e-5)
    # Removed in between, it is written again as far as the checkpoint knows it.
    shutil.rmtree(folder / "tensorboard")
    run_train(TENSORBOARD=True, EPOCHS=4, RESUME="auto")
    assert [event.step for event in read(folder).Scalars("loss/train")] == [1, 2, 3, 4]
    run_train(TENSORBOARD=True, EPOCHS=5, RESUME="auto")
    events = read(folder)
    assert [event.step for event in events.Scalars("lr")] == [1, 2, 3, 4, 5]
