"""tools/cross_validate.py: no network is asked about an image that it has seen; interrupted, it ends the same."""

import csv
import json
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT, SMALL, fill_classes
from forked import CAN_FORK, start_script, start_training
from kill import differences

import makedata
from benchmarks import label_errors
from common.checkpoint import load_checkpoint
from common.options import ConstantError, UserError, to_option
from tools import cross_validate
from tools.label_errors import find_label_errors

TRAIN = dict(SMALL, EPOCHS=1)
TRAIN.pop("DEVICE")
OPTIONS = [word for name, value in TRAIN.items() for word in (to_option(name), str(value))]


def run_here(script, *options):
    """`cross_validate.start` with the tests' tiny network."""
    start = start_training if script == "train.py" else partial(start_script, script)
    process = start(".", *options)
    process.communicate(300)
    return process.returncode


@pytest.fixture
def validate(monkeypatch):
    """Call the tool's main() with some constants changed."""
    monkeypatch.setattr(cross_validate, "start", run_here)
    monkeypatch.setattr(cross_validate, "plot_confusion_matrix", lambda *args: args[-1].touch())

    def run(**constants):
        for name, value in (dict(FOLDS=2, DEVICE="cpu", OPTIONS=OPTIONS) | constants).items():
            monkeypatch.setattr(cross_validate, name, value)
        return cross_validate.main()

    return run


def read(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_every_image_is_predicted_once_by_a_network_that_has_not_seen_it(place, validate, monkeypatch, capsys):
    seen, build = {}, cross_validate.make_data

    def look(pool, inside, folder):
        build(pool, inside, folder)
        for side in ("train", "val"):
            seen[folder.name, side] = {path.read_bytes() for path in (folder / "data" / side).rglob("*.png")}

    monkeypatch.setattr(cross_validate, "make_data", look)
    monkeypatch.setattr(cross_validate, "SHOWN", 3)
    assert validate() is None
    rows, folder = read("cross_validation/out_of_fold.csv"), Path("cross_validation")
    assert len({row["image"] for row in rows}) == 30 and all(Path(row["image"]).parts[0] == "data1" for row in rows)
    for row in rows:
        content, fold = Path(row["image"]).read_bytes(), f"fold{row['fold']}"
        assert content in seen[fold, "val"] and content not in seen[fold, "train"]
        values = [float(row[f"probability of {name}"]) for name in sorted(CLASSES)]
        assert sum(values) == pytest.approx(1, abs=1e-4)
        assert row["predicted"] == sorted(CLASSES)[int(np.argmax(values))]
        assert row["class"] == Path(row["image"]).parts[1]
    # Stratified: each fold has half of each class.
    folds = read("cross_validation/folds.csv")
    assert sorted((row["class"], row["fold"]) for row in folds) == sorted(
        (name, fold) for name in CLASSES for fold in "12" for _ in range(5)
    )
    hits = [row["class"] == row["predicted"] for row in rows]
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["pooled"] == pytest.approx(100 * np.mean(hits)) and result["images"] == 30
    by_fold = [100 * np.mean([hit for hit, row in zip(hits, rows) if row["fold"] == fold]) for fold in "12"]
    assert result["acc1"] == pytest.approx(by_fold) and result["std"] == pytest.approx(np.std(by_fold, ddof=1))
    with open(folder / "confusion_matrix.csv", encoding="utf-8-sig", newline="") as file:
        matrix = np.array([[int(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]])
    assert matrix.sum(1).tolist() == [10] * 3 and np.trace(matrix) == sum(hits)
    out = capsys.readouterr().out
    assert "mean and standard deviation of 2 folds" in out and 'test.py --checkpoint "cross_validation/fold*/*/' in out
    for number in (1, 2):  # the statistics, too, are those of the images that this network saw
        checkpoint = load_checkpoint(folder / f"fold{number}" / SMALL["MODEL"] / "last.pth")
        pixels = [np.asarray(image) / 255 for image in images_of([r for r in folds if r["fold"] != str(number)])]
        assert checkpoint["mean"] == pytest.approx(np.mean([p.mean((0, 1)) for p in pixels], 0), abs=1e-6)
        assert not (folder / f"fold{number}" / "data").exists()


def images_of(rows):
    from common.images import load_image

    return [load_image(row["image"]) for row in rows]


def test_an_interrupted_run_goes_on_to_the_same_end(place, validate, monkeypatch, capsys):
    validate(OUTPUT="whole")
    calls = []

    def interrupted(script, *options):
        calls.append(script)
        if calls.count("train.py") == 2 and script == "train.py":
            return 130
        return run_here(script, *options)

    monkeypatch.setattr(cross_validate, "start", interrupted)
    assert validate(OUTPUT="parts") == 130
    assert "fold 2 of 2 is not finished; the same command goes on" in capsys.readouterr().out
    assert not Path("parts/out_of_fold.csv").exists()
    calls.clear()

    def recorded(script, *options):
        calls.append(script)
        return run_here(script, *options)

    monkeypatch.setattr(cross_validate, "start", recorded)
    assert validate(OUTPUT="parts") is None
    assert calls == ["train.py"]  # nothing is done twice
    for number in (1, 2):
        paths = [Path(folder, f"fold{number}", SMALL["MODEL"], "last.pth") for folder in ("whole", "parts")]
        assert not differences(*(torch.load(path, weights_only=True) for path in paths))
    for name in ("out_of_fold.csv", "label_errors.csv", "result.json", "report.txt"):
        assert Path("whole", name).read_bytes() == Path("parts", name).read_bytes()


def start_forked(command, **options):
    """In place of `subprocess.Popen`."""
    script = Path(command[1]).relative_to(ROOT).as_posix()
    if script == "train.py":
        return start_training(".", *command[2:])
    return start_script(script, ".", *command[2:])


@pytest.mark.skipif(not CAN_FORK, reason="processes cannot be forked")
def test_a_signal_is_passed_on_to_the_training(place, monkeypatch):
    monkeypatch.setattr(cross_validate.subprocess, "Popen", start_forked)  # inherited by the process that is forked
    words = ["--folds", 2, "--device", "cpu", *OPTIONS, "--epochs", 100000]
    process = start_script("tools/cross_validate.py", ".", *words, session=True)
    try:
        until = time.monotonic() + 120
        while not list(Path("cross_validation").glob("fold1/*/last.pth")) and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
    out = process.read(0)
    assert "fold 1 of 2 is not finished; the same command goes on from there" in out


def test_other_settings_begin_anew_and_nothing_is_lost(place, validate, monkeypatch, capsys):
    monkeypatch.setattr(cross_validate, "train_fold", lambda *args: 130)
    validate()
    Path("cross_validation/mark").touch()
    validate()
    assert Path("cross_validation/mark").exists()
    validate(SEED=1)
    assert not Path("cross_validation/mark").exists() and Path("cross_validation.1/mark").exists()
    assert "the earlier run in cross_validation is now in cross_validation.1" in capsys.readouterr().out


def folds_of(folds=3, seed=0):
    pool = cross_validate.read_pool(Path("data"))
    return pool, cross_validate.choose_folds(pool, folds, seed)


def test_folds_do_not_depend_on_the_split_and_identical_files_stay_together(place, monkeypatch):
    for path in Path("data1/Maize").glob("00[0-4].png"):
        shutil.copy(path, path.with_name(f"copy {path.name}"))
    found = []
    for seed in (1, 2):
        monkeypatch.setattr(makedata, "SEED", seed)
        makedata.main()
        pool, folds = folds_of()
        found.append({source: fold for source, fold in zip(pool.sources, folds)})
        for content in set(pool.contents):
            assert len({fold for key, fold in zip(pool.contents, folds) if key == content}) == 1
    assert found[0] == found[1] and len(found[0]) == 35


def test_groups_stay_together(place, monkeypatch):
    for path in Path("data1").rglob("*.png"):
        path.rename(path.with_name(f"plant{int(path.stem) % 5}-{path.name}"))
    monkeypatch.setattr(makedata, "GROUP", "plant[0-9]")
    makedata.main()
    pool, folds = folds_of()
    plants = {}
    for source, fold in zip(pool.sources, folds):
        plants.setdefault(Path(source).name[:6], set()).add(fold)
    assert len(plants) == 5 and all(len(some) == 1 for some in plants.values())
    with pytest.raises(UserError, match="has 5 groups, fewer than FOLDS 6; lower FOLDS"):
        folds_of(6)


def test_folders_that_makedata_did_not_make(place):
    shutil.rmtree("data")
    fill_classes("data/train", {"a": 6, "b": 6})
    fill_classes("data/val", {"b": 4, "a": 4})  # of the same names, and other colours
    pool, folds = folds_of()
    assert len(pool.paths) == 20 and (pool.sources == pool.paths).all()
    assert len({(label, name) for label, name in zip(pool.labels, pool.names)}) == 20


@pytest.mark.parametrize(
    "constants, message",
    [
        (dict(OPTIONS=["--resume", "auto"]), "OPTIONS must not contain --resume"),
        (dict(OPTIONS=["--output=x"]), "OPTIONS must not contain --output=x"),
        (dict(DATA="nowhere"), "there is no folder nowhere/train and no folder nowhere/val; run makedata.py"),
        (dict(FOLDS=11), "class 'Common wheat' has 10 different images, fewer than FOLDS 11"),
        (dict(DEVICE="gpu"), "DEVICE"),
    ],
)
def test_what_cannot_be_done_gets_a_sentence(constants, message, place, validate):
    with pytest.raises(UserError, match=message):
        validate(**constants)
    assert not Path("cross_validation").exists()


def test_options_of_train_py_are_passed_on_and_wrong_ones_refused_there(place):
    from common.options import set_constants

    namespace = vars(cross_validate).copy()
    set_constants(namespace, ["--folds=3", "--epochs", "2", "--tensorboard", "--mean=0.1,0.2,0.3"], unknown="OPTIONS")
    assert namespace["FOLDS"] == 3 and namespace["OPTIONS"] == ["--epochs", "2", "--tensorboard", "--mean=0.1,0.2,0.3"]
    with pytest.raises(ConstantError, match="FOLDS must be a whole number"):
        set_constants(namespace, ["--folds", "1", "--epochs", "2"], unknown="OPTIONS")
    process = start_script("tools/cross_validate.py", ".", "--device", "cpu", "--epoch", "3")
    _, errors = process.communicate(100)
    assert process.returncode == 2
    assert "unrecognized arguments: --epoch" in errors and "did you mean --epochs" in errors


# --- label errors


def test_confident_learning_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 1])
    first = np.array([0.9, 0.8, 0.6, 0.1, 0.2, 0.3, 0.55])
    order, by_rule, suggested, margins = find_label_errors(labels, np.stack([first, 1 - first], 1))
    # Thresholds: mean of 0.9, 0.8, 0.6, 0.1 = 0.6; mean of 0.8, 0.7, 0.45 = 0.65. Only the fourth is confident of 1.
    assert by_rule.tolist() == [False, False, False, True, False, False, False]
    assert order.tolist() == [3, 6] and suggested[order].tolist() == [1, 0]
    assert margins[order] == pytest.approx([-0.8, -0.1])


def test_wrong_labels_come_first():
    generator = np.random.default_rng(0)
    true = generator.integers(0, 12, 2000)
    logits = generator.normal(size=(2000, 12))
    logits[np.arange(2000), true] += generator.gamma(6, 1.2, 2000)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = true.copy()
    wrong = generator.choice(2000, 100, replace=False)
    labels[wrong] = (true[wrong] + generator.integers(1, 12, 100)) % 12
    order, by_rule, suggested, _ = find_label_errors(labels, probabilities)
    assert len(set(order[:100]) & set(wrong)) >= 90 and np.mean(suggested[wrong] == true[wrong]) > 0.9
    assert set(np.flatnonzero(by_rule)) <= set(order)


def test_a_class_without_images_is_never_suggested_by_the_rule():
    probabilities = np.array([[0.2, 0.1, 0.7], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
    _, by_rule, _, _ = find_label_errors([0, 0, 1], probabilities)
    assert not by_rule.any()


def test_labels_changed_on_purpose_are_others_and_are_counted(place):
    changed = label_errors.change_labels(Path("data1"), 0.25, 0, Path("changed"))
    assert changed == label_errors.change_labels(Path("data1"), 0.25, 0, Path("again"))
    with open("changed/labels.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(Path("data1", row["image"]) for row in rows) == sorted(Path("data1").glob("*/*.png"))
    images = [(Path("data1", row["image"]), row["class"]) for row in rows]
    different = {path.resolve() for path, name in images if path.parent.name != name}
    assert different == changed and len(changed) == round(0.25 * len(rows))
    sentence = label_errors.describe([True, True, False, True, True, False], 4)
    assert "4 changed labels, 6 rows: 3 of the first 4 rows are changed labels, 4 of all rows" in sentence
    assert "50% of them in the first 2, 90% of them in the first 5" in sentence
    assert label_errors.describe([False, True], 4).endswith("1 of all rows")
