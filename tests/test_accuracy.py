"""benchmarks/accuracy.py in small: it reports what test.py finds, and nothing is run twice."""

import csv
import importlib.util
import json
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASSES, ROOT, SMALL
from PIL import Image

from benchmarks import accuracy, class_weights
from common.checkpoint import load_checkpoint
from common.options import ConstantError, UserError, set_constants

MODEL = SMALL["MODEL"]
OPTIONS = f"--model {MODEL} --img-size 32 --batch-size 8 --epochs 1 --optimizer adamw --amp off --device cpu"


def run_here(*words, threads=None):
    """What `accuracy.python` does in a process, in this one, where all modules are imported."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(words[0]).stem}", ROOT / words[0])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    set_constants(vars(script), [str(word) for word in words[1:]], "IMAGES" if words[0] == "test.py" else None)
    assert not script.main()


class HereExecutor(Executor):
    """Calls at once, in this thread, as signal handlers need it."""

    def __init__(self, workers):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture
def small(tmp_path, monkeypatch, make_data1):
    monkeypatch.chdir(tmp_path)
    make_data1("data1", CLASSES)
    for name, value in dict(SPLITS=[3], OPTIONS=OPTIONS, python=run_here, ThreadPoolExecutor=HereExecutor).items():
        monkeypatch.setattr(accuracy, name, value)
    return monkeypatch


def test_the_recipe_is_measured_by_test_py(small, capsys):
    accuracy.main()
    table = capsys.readouterr().out
    folder = Path("accuracy/recipe/3")
    with open(folder / "tta" / "predictions.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    correct = [Path(row["image"]).parent.name == row["class_1"] for row in rows]
    metrics = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))
    assert np.sum(metrics["tta"]) == len(rows) == 9
    assert accuracy.accuracy(metrics["tta"]) == pytest.approx(100 * np.mean(correct))
    expected = f"| recipe | 1 | {accuracy.accuracy(metrics['plain']):.2f} | {100 * np.mean(correct):.2f} |"
    assert expected in table
    assert all(f"| {name} | 3 |" in table for name in CLASSES) and Path("accuracy/confusion_matrix.png").is_file()
    with open(folder / "plain" / "stress.csv", newline="", encoding="utf-8-sig") as file:
        stress = {row["disturbance"]: row for row in csv.DictReader(file)}
    for name in ("clean", "noise 5/255", "larger images, 64x64"):
        change = float(stress[name]["change"])
        assert f"| {name} | {stress[name]['acc1']} | {change:.2f} |" in table, name
    report = (folder / "plain" / "report.txt").read_text(encoding="utf-8")
    before, after = metrics["doubt"]["NLL"]
    assert float(report.split("negative log-likelihood: ")[1].split()[0]) == pytest.approx(before, abs=3e-3)  # bf16
    assert f" | {before:.3f} | {after:.3f} | {metrics['doubt']['95%'][1]:.2f} |" in table
    errors = int(9 - np.trace(metrics["tta"]))
    between = max(np.array(metrics["tta"])[i, j] + metrics["tta"][j][i] for i in range(3) for j in range(i))
    assert f"{errors} errors, {between} of them between " in table

    small.setattr(accuracy, "python", None)  # what is finished is not run again
    accuracy.main()
    assert expected in capsys.readouterr().out
    small.setattr(accuracy, "OPTIONS", OPTIONS.replace("--epochs 1", "--epochs 2"))
    with pytest.raises(UserError, match="accuracy.json was measured with the options .*--epochs 1.*; set OUTPUT"):
        accuracy.main()


def test_weights_to_ship_are_small_and_know_every_image(small, calibrated):
    small.setattr(accuracy, "WHAT", "weights")
    small.setattr(accuracy, "SPLITS", [3, 4])
    accuracy.main()
    shipped = load_checkpoint(f"accuracy/seedlings_{MODEL}.pth")
    assert shipped["pictures_train"] == sum(CLASSES.values()) and shipped["classes"] == list(CLASSES)
    whole = load_checkpoint(f"accuracy/weights/{MODEL}/last.pth")
    for name, tensor in whole["state_dict_ema"].items():
        assert np.allclose(shipped["state_dict"][name], tensor, rtol=1e-3, atol=1e-6), name
    assert Path(f"accuracy/seedlings_{MODEL}.pth").stat().st_size < 10e6

    # What no image is left for comes from the two runs, what the training images tell from its own.
    first, second = (load_checkpoint(f"accuracy/recipe/{split}/{MODEL}/last.pth")["calibration"] for split in (3, 4))
    calibration, own = shipped["calibration"], whole["calibration"]
    assert calibration["images"] == first["images"] + second["images"] == 18
    assert calibration["temperature"] ** 2 == pytest.approx(first["temperature"] * second["temperature"])
    for name, tensor in calibration["score"].items():
        pooled = (first["score"][name] + second["score"][name]) / 2 if name in ("scale", "quantiles") else None
        assert torch.allclose(tensor, own["score"][name] if pooled is None else pooled), name


def test_calibrations_without_a_score_are_pooled_to_one_without():
    own, *others = (dict(temperature=value, images=3, img_size=32, score=None) for value in (1.0, 0.5, 2.0))
    pooled = accuracy.pool_calibrations(own, others)
    assert pooled == dict(temperature=pytest.approx(1.0), images=6, img_size=32, score=None)


def test_fine_tuning_starts_from_a_network_that_knows_other_classes(small):
    """Which networks are trained, on which classes, and from which weights; without the training itself."""
    small.setattr(accuracy, "WHAT", "fine_tuning")
    checkpoint = Path("accuracy/known_classes/3/unireplknet_a/last.pth")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    calls = []

    def run_all(plan, experiments, data):
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


def test_a_long_tail_is_learned_as_it_is_and_in_two_other_ways(small, make_data1):
    make_data1("many", dict.fromkeys(["A", "B", "C"], 10))
    for name, value in dict(WHAT="imbalance", SOURCE="many", RATIO=4).items():
        small.setattr(accuracy, name, value)
    calls, counts = [], []

    def run_all(plan, experiments, data):
        calls.append((plan.script, experiments))
        counts.append(sorted(len(list(folder.iterdir())) for folder in (data(3) / "train").iterdir()))
        assert len(list(data(3).glob("val/*/*"))) == 3 * 3 and (data(3) / "mean_std.json").is_file()
        matrices = dict(plain=[[8, 2, 0], [0, 10, 0], [4, 0, 6]], tta=[], raw=0, minutes=1, images_a_second=1)
        return {name: [matrices | dict(train_images=[7, 4, 2], minutes_to_95=None)] for name in experiments}

    small.setattr(accuracy, "run_all", run_all)
    small.setattr(accuracy, "print_runs", lambda results: None)
    accuracy.main()
    assert calls == [
        ("train.py", {"long tail": [], "logit adjustment": ["--balance", 1]}),
        ("benchmarks/class_weights.py", {"class weights": []}),
    ]
    assert counts == 2 * [[2, 4, 7]]  # a fourth, half, all


def test_recalls_weigh_each_class_the_same(capsys):
    result = dict(plain=[[8, 2, 0], [0, 10, 0], [0, 1, 1]], train_images=[42, 9, 2])
    accuracy.print_recalls({"long tail": [result]})
    assert "| long tail | 76.67 | 50.00 | 86.36 |" in capsys.readouterr().out  # (80 + 100 + 50) / 3, 19 of 22


def test_class_weights_give_each_class_the_same_share_of_the_loss():
    labels = [0] * 6 + [1] * 3 + [2]
    criterion = class_weights.create_criterion(labels, 3, 0.0, torch.device("cpu"))
    logits, targets = torch.zeros(10, 3), F.one_hot(torch.tensor(labels), 3).float()
    logits.requires_grad_()
    loss = criterion(logits, targets)
    assert loss.item() == pytest.approx(np.log(3))  # the mean weight of an image is 1
    (gradient,) = torch.autograd.grad(loss, logits)
    shares = [gradient[torch.tensor(labels) == k, k].sum().item() for k in range(3)]
    assert shares == pytest.approx([shares[0]] * 3)
    with pytest.raises(ConstantError, match="BALANCE is logit adjustment.*leave it at 0"):
        class_weights.create_criterion(labels, 3, 1.0, torch.device("cpu"))


def test_oblong_images_are_fitted_in_three_ways(small):
    small.setattr(accuracy, "WHAT", "fit")
    calls = []

    def run_all(plan, experiments, data):
        sizes = {Image.open(path).size for path in data(3).glob("*/*/*.png")}
        calls.append((experiments, sizes))
        return {}

    small.setattr(accuracy, "run_all", run_all)
    whole = Image.open(next(Path("data1").glob("*/*.png")))
    accuracy.main()
    ((experiments, sizes),) = calls
    assert experiments == {fit: ["--fit", fit] for fit in ("squeeze", "pad", "crop")}
    assert all(height == round(whole.height * 2 / 3) for _, height in sizes)


def test_a_script_that_fails_says_why():
    with pytest.raises(UserError, match="makedata.py --source nowhere failed: error: there is no folder nowhere"):
        accuracy.python("makedata.py", "--source", "nowhere")


@pytest.mark.parametrize("words", [["--what", "everything"], ["--splits", ""], ["--jobs", "0"]])
def test_bad_constants(words):
    with pytest.raises(ConstantError, match=words[0].removeprefix("--").upper()):
        set_constants(vars(accuracy).copy(), words)


def test_the_options_are_those_of_train_py():
    options = accuracy.OPTIONS.split() + sum(accuracy.ABLATIONS.values(), [])
    spec = importlib.util.spec_from_file_location("script_train", ROOT / "train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert set_constants(vars(script), options)


def test_mean_and_spread():
    assert accuracy.mean_and_spread([95.0]) == "95.00"
    assert accuracy.mean_and_spread([94.0, 95.0, 96.0]) == "95.00 ± 1.00"
