"""benchmarks/accuracy.py in small: what it tells is what test.py finds, and nothing is run twice."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES

from benchmarks import accuracy
from common.checkpoint import load_checkpoint
from common.options import UserError


@pytest.fixture
def small(tmp_path, monkeypatch, make_data1):
    monkeypatch.chdir(tmp_path)
    make_data1("data1", CLASSES)
    options = "--model unireplknet_a --img-size 32 --batch-size 4 --epochs 1 --optimizer adamw --amp off"
    for name, value in dict(SPLITS=[3], OPTIONS=options).items():
        monkeypatch.setattr(accuracy, name, value)
    return monkeypatch


def test_the_recipe_is_measured_by_test_py(small, capsys):
    accuracy.main()
    table = capsys.readouterr().out
    folder = Path("accuracy/recipe/3")
    with open(folder / "tta" / "predictions.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    right = [Path(row["image"]).parent.name == row["class_1"] for row in rows]
    figures = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))
    assert np.sum(figures["tta"]) == len(rows) == 9
    assert accuracy.accuracy(figures["tta"]) == pytest.approx(100 * np.mean(right))
    assert f"| recipe | 1 | {accuracy.accuracy(figures['plain']):.2f} | {100 * np.mean(right):.2f} |" in table
    assert all(f"| {name} | 3 |" in table for name in CLASSES) and Path("accuracy/confusion_matrix.png").is_file()

    small.setattr(accuracy, "python", None)  # what is finished is not run again
    accuracy.main()
    assert capsys.readouterr().out == table


def test_weights_to_ship_are_small_and_know_every_picture(small):
    small.setattr(accuracy, "WHAT", "weights")
    accuracy.main()
    shipped = load_checkpoint("accuracy/seedlings_unireplknet_a.pth")
    assert shipped["pictures_train"] == sum(CLASSES.values()) and shipped["classes"] == list(CLASSES)
    whole = load_checkpoint("accuracy/weights/unireplknet_a/last.pth")["state_dict_ema"]
    for name, tensor in whole.items():
        assert np.allclose(shipped["state_dict"][name], tensor, rtol=1e-3, atol=1e-6), name
    assert Path("accuracy/seedlings_unireplknet_a.pth").stat().st_size < 10e6


def test_fine_tuning_starts_from_a_network_that_knows_other_classes(small, capsys):
    """Which networks are trained, on which classes, and from which weights; the training itself is left out."""
    small.setattr(accuracy, "WHAT", "fine_tuning")
    checkpoint = Path("accuracy/known_classes/3/unireplknet_a/last.pth")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    calls = []

    def run_all(experiments, data):
        options = {name: value(3) if callable(value) else value for name, value in experiments.items()}
        classes = {path.parent.name for path in data(3).glob("*/*/*") if path.suffix == ".png"}
        calls.append((options, classes))
        return {}

    small.setattr(accuracy, "run_all", run_all)
    accuracy.main()
    (known, known_classes), (new, new_classes) = calls
    assert known_classes | new_classes == set(CLASSES) and not known_classes & new_classes
    assert known == {"known classes": []}
    assert new["new classes from scratch"] == ["--epochs", 12]
    assert new["fine-tuned"][:4] == ["--pretrained", checkpoint, "--epochs", 8]


def test_bad_constants(small):
    for name, value in dict(WHAT="everything", SPLITS=[], JOBS=0).items():
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match=name):
            patch.setattr(accuracy, name, value)
            accuracy.main()


def test_mean_and_spread():
    assert accuracy.mean_and_spread([95.0]) == "95.00"
    assert accuracy.mean_and_spread([94.0, 95.0, 96.0]) == "95.00 ± 1.00"
