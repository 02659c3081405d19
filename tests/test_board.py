"""train.py's switch for TensorBoard."""

import csv

import pytest
import torch

from common.options import UserError

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(folder):
    """What is in the event files of a run."""
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    return events


def test_curves_sheet_and_confusion_matrices_and_the_same_weights(run_train):
    folder = run_train(TENSORBOARD=True, OUTPUT="with")
    events = read(folder)
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for tag, column in (("loss/train", "train_loss"), ("acc1/ema", "ema_acc1"), ("lr", "lr")):
        points = [(event.step, event.value) for event in events.Scalars(tag)]
        assert points == [(int(row["epoch"]), pytest.approx(float(row[column]), rel=1e-5)) for row in rows]
    assert [event.step for event in events.Images("confusion matrix")] == [1, 2]
    assert len(events.Images("augmentation")) == 1

    plain = run_train(OUTPUT="without")
    assert not (plain / "tensorboard").exists()
    weights = [torch.load(path / "last.pth", weights_only=True)["state_dict"] for path in (folder, plain)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_run_that_goes_on_writes_each_epoch_once(run_train):
    run_train(TENSORBOARD=True, EPOCHS=1)
    folder = run_train(TENSORBOARD=True, EPOCHS=2, RESUME="auto")
    assert [event.step for event in read(folder).Scalars("loss/val")] == [1, 2]


def test_an_absent_package_is_named(run_train, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        run_train(TENSORBOARD=True)
