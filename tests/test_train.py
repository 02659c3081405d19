"""train.py as users run it, on images of three colours that a network learns within seconds."""

import csv
import json
import math
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES
from kill import differences
from PIL import Image
from timm.optim import muon
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

import makedata
import train
from common import augment, device, network, optimizer
from common.augment import BatchMixup, ColorCutout, train_transform
from common.checkpoint import SEEDLINGS, build_network, load_checkpoint, save_checkpoint
from common.device import has_bfloat16
from common.options import ConstantError, UserError
from common.renamed import upgrade_config
from common.schedule import ImageSizes, warmup_cosine

FILES = {
    "last.pth",
    "best.pth",
    "log.csv",
    "result.json",
    "loss.png",
    "acc.png",
    "class_indices.json",
    "classification_report.txt",
    "calibration.json",
    "calibration.png",
}


def test_a_run_learns_and_leaves_its_files(calibrated, run_train, place, capsys, learning_curves):
    folder = run_train(EPOCHS=8, LEARNING_RATE=5e-3, LAYER_SCALE=1.0, SMOOTHING=0.0)
    assert {file.name for file in folder.iterdir()} == FILES | {"last.1.pth"}
    with open(folder / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 9))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])

    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["acc1"] == max(float(row["ema_acc1"]) for row in rows) >= 80
    assert result["config"]["EPOCHS"] == 8 and result["classes"] == list(CLASSES)
    indices = json.loads((folder / "class_indices.json").read_text(encoding="utf-8"))
    assert list(indices.values()) == list(CLASSES) and list(indices) == ["0", "1", "2"]
    report = (folder / "classification_report.txt").read_text(encoding="utf-8")
    assert all(name in report for name in CLASSES) and "玉米 苗" in capsys.readouterr().out
    for name in ("loss.png", "acc.png", "calibration.png"):
        with Image.open(folder / name) as image:
            assert image.width > 500 and np.asarray(image).std() > 5

    best, last = (torch.load(folder / f"{name}.pth", weights_only=True) for name in ("best", "last"))
    assert last["epoch"] == 8 and best["epoch"] == result["epoch"] and best["best_acc1"] == result["acc1"]
    assert last["arch"] == "unireplknet_test" and last["img_size"] == 32 and len(last["mean"]) == 3
    assert not torch.equal(last["state_dict"]["head.weight"], last["state_dict_ema"]["head.weight"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(run_train, monkeypatch, optimizer):
    constants = dict(EPOCHS=4, MIX_PROB=0.7, DROP_PATH=0.3, COLOR_JITTER=0.3, QUALITY=0.5, ROTATION=20.0)
    constants |= dict(OPTIMIZER=optimizer)
    constants |= dict(EPOCHS=3, IMG_SIZE=64, START_SIZE=32) if optimizer == "muon" else {}
    straight = load_checkpoint(run_train(**constants, OUTPUT="straight") / "last.pth")

    original = train.train_one_epoch

    def stop_in_epoch_3(state, *arguments, **options):
        if state.epoch == constants["EPOCHS"] - 2:
            raise KeyboardInterrupt
        return original(state, *arguments, **options)

    monkeypatch.setattr(train, "train_one_epoch", stop_in_epoch_3)
    with pytest.raises(KeyboardInterrupt):
        run_train(**constants)
    monkeypatch.setattr(train, "train_one_epoch", original)
    folder = run_train(**constants, RESUME="auto")
    assert not differences(load_checkpoint(folder / "last.pth"), straight)
    assert len((folder / "log.csv").read_text().splitlines()) == 1 + constants["EPOCHS"]
    with pytest.raises(UserError, match="OPTIMIZER there is"):
        run_train(**constants | dict(OPTIMIZER="lion"), RESUME="auto")


def test_early_stopping_ends_a_run_and_does_so_again_when_resumed(run_train, monkeypatch, capsys):
    """PATIENCE epochs without a new best accuracy end it, saved and with its report; resumed or not."""
    original, epochs = train.validate, []

    def falling(*arguments):
        metrics, *labels = original(*arguments)
        if arguments[5] == "ema":
            epochs.append(len(epochs) + 1)
        return metrics | dict(acc1=91.0 - len(epochs)), *labels

    monkeypatch.setattr(train, "validate", falling)
    constants = dict(EPOCHS=6, PATIENCE=2)
    folder = run_train(**constants)
    text = capsys.readouterr().out
    assert "no new best accuracy for 2 epochs, so the run ends after 3 (PATIENCE 2)" in text
    assert "best acc1 90.00 %" in text and "macro avg" in text and epochs == [1, 2, 3]
    straight = load_checkpoint(folder / "last.pth")
    assert straight["epoch"] == 3 and load_checkpoint(folder / "best.pth")["epoch"] == 1

    run_train(**constants, RESUME="auto")  # complete: nothing to do
    assert "best acc1 90.00 %" in capsys.readouterr().out and epochs == [1, 2, 3]
    epochs.clear()
    original_epoch = train.train_one_epoch

    def stop_in_epoch_3(state, *arguments, **options):
        if state.epoch == 2 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return original_epoch(state, *arguments, **options)

    stopped = []
    monkeypatch.setattr(train, "train_one_epoch", stop_in_epoch_3)
    with pytest.raises(KeyboardInterrupt):
        run_train(**constants, OUTPUT="again")
    again = load_checkpoint(run_train(**constants, OUTPUT="again", RESUME="auto") / "last.pth")
    assert epochs == [1, 2, 3] and not differences(again, straight)


def test_a_run_can_be_ended_early_with_a_short_decay_of_the_learning_rate(
    calibrated, run_train, monkeypatch, capsys
):
    """Stopped, by PATIENCE too, and resumed with fewer EPOCHS than were planned, it ends as if planned so."""
    original = train.validate

    def constant(*arguments):
        metrics, *labels = original(*arguments)
        return metrics | dict(acc1=50.0), *labels

    monkeypatch.setattr(train, "validate", constant)
    constants = dict(IMG_SIZE=64, START_SIZE=32)
    sizes = []
    original_epoch = train.train_one_epoch

    def note_size(state, network, loader, prepare, *arguments, **options):
        sizes.append(prepare.keywords["size"][0])
        return original_epoch(state, network, loader, prepare, *arguments, **options)

    monkeypatch.setattr(train, "train_one_epoch", note_size)
    run_train(**constants, EPOCHS=30, PATIENCE=3)
    folder = run_train(**constants, EPOCHS=6, RESUME="auto")
    with open(folder / "log.csv", encoding="utf-8") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert len(rates) == 6 and rates[4] < rates[3] / 10 and rates[5] == pytest.approx(1e-6)
    assert sizes == [32, 32, 32, 32, 64, 64]
    assert "calibration" in load_checkpoint(folder / "last.pth") and "nothing is left" not in capsys.readouterr().out
    for epochs in (6, 5):
        run_train(**constants, EPOCHS=epochs, RESUME="auto")
        assert f"nothing is left to train, since EPOCHS is {epochs}; a larger" in capsys.readouterr().out
    assert len(sizes) == 6


def test_workers_change_nothing(run_train):
    a = load_checkpoint(run_train(EPOCHS=1, OUTPUT="a") / "last.pth")
    b = load_checkpoint(run_train(EPOCHS=1, OUTPUT="b", WORKERS=2) / "last.pth")
    assert not differences(a, b)


def test_another_seed_gives_another_run(run_train):
    a = load_checkpoint(run_train(EPOCHS=1, OUTPUT="a") / "last.pth")
    b = load_checkpoint(run_train(EPOCHS=1, OUTPUT="b", SEED=1) / "last.pth")
    assert not torch.equal(a["state_dict"]["head.weight"], b["state_dict"]["head.weight"])


def test_an_earlier_run_is_renamed_not_overwritten(run_train, capsys):
    folder = run_train(EPOCHS=1)
    before = (folder / "last.pth").read_bytes()
    run_train(EPOCHS=1, SEED=1)
    assert (folder.parent / "unireplknet_test.1" / "last.pth").read_bytes() == before
    assert (folder / "last.pth").read_bytes() != before
    assert "unireplknet_test.1" in capsys.readouterr().out


def test_a_run_continued_elsewhere_has_a_best_checkpoint_and_leaves_the_other_folder_alone(calibrated, run_train):
    first = run_train(EPOCHS=1, OUTPUT="first")
    second = run_train(EPOCHS=1, OUTPUT="second", SEED=1)
    before = (second / "last.pth").read_bytes()
    run_train(EPOCHS=2, OUTPUT="second", RESUME=str(first / "last.pth"))
    assert {file.name for file in second.iterdir()} == FILES
    assert (second.parent / "unireplknet_test.1" / "last.pth").read_bytes() == before


@pytest.mark.parametrize(("batch_size", "img_size"), [(1, 40), (3, 32), (5, 32), (1000, 32)])
def test_odd_batches_and_sets_smaller_than_a_batch(run_train, batch_size, img_size):
    folder = run_train(EPOCHS=1, BATCH_SIZE=batch_size, IMG_SIZE=img_size, MIX_PROB=1.0)
    checkpoint = load_checkpoint(folder / "last.pth")
    assert math.isfinite(checkpoint["history"][0]["train_loss"])
    assert checkpoint["ema_updates"] == max(21 // batch_size, 1)


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 5), (2, 3), (5, 1), (7, 1)])
def test_one_step_of_the_optimizer_for_each_group_of_batches(run_train, monkeypatch, accumulate, steps):
    calls = []
    original = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: calls.append(1) or original(self, *a, **k))
    run_train(EPOCHS=1, ACCUMULATE=accumulate)
    assert len(calls) == steps


def test_gradients_are_clipped_after_unscaling(run_train, monkeypatch):
    norms = []
    original = torch.nn.utils.clip_grad_norm_

    def record(parameters, max_norm):
        parameters = list(parameters)
        norm = original(parameters, max_norm)
        after = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        norms.append((norm.item(), after.item()))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    folder = run_train(EPOCHS=3, AMP="fp16", CLIP_GRAD=0.01)
    assert len(norms) == 15
    # Steps that the scaler leaves out while it looks for its scale are no alarm.
    assert sum(row["skipped"] for row in load_checkpoint(folder / "last.pth")["history"]) == 0
    norms = [(before, after) for before, after in norms if math.isfinite(before)]  # the scaler skips the others
    assert norms
    for before, after in norms:
        assert before < 1000  # the scaler's factor of 65,536 is gone
        assert after == pytest.approx(min(before, 0.01), rel=1e-2)


@pytest.mark.parametrize(
    "constants",
    [
        dict(AMP="bf16"),
        dict(EMA_DECAY=0.0, CLIP_GRAD=0.0),
        dict(GRAD_CHECKPOINTING=True),
        dict(LAYER_DECAY=0.7, LAYER_SCALE=0.0, CUTOUT=0.0, HFLIP=0.0, VFLIP=0.0, COLOR_JITTER=0.0, ROTATION=30.0),
        dict(MIXUP=0.0, CUTMIX=0.0, MIX_PROB=1.0),
        dict(MIXUP=0.0, MIX_PROB=1.0),
        dict(MODEL="resnet18"),
        dict(MODEL="convnext_atto", LEARNING_RATE=1e-4),
    ],
    ids=lambda constants: ",".join(constants),
)
def test_switches(calibrated, run_train, constants):
    folder = run_train(EPOCHS=1, **constants)
    assert FILES == {file.name for file in folder.iterdir()}


def test_training_accuracy_skips_mixed_images():
    """A network that reads its prediction from each image's first pixel, correct for all but the last of six images."""
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = torch.tensor([0.0, 1, 2, 0, 1, 0])
    counts = {}
    for probability in (0.0, 1.0):
        mixup = BatchMixup(3, 0.8, 0.0, probability, smoothing=0.1)
        options = dict(size=(4, 4), device=torch.device("cpu"), normalise=torch.nn.Identity(), mixup=mixup, seed=42)
        _, seen, _ = train.prepare_batch((images, labels), 0, **options)
        logits = F.one_hot(images[:, 0, 0, 0].round().long(), 3).float()
        counts[probability] = train.measure(torch.tensor(0.0), logits, seen).tolist()[1:]
    assert counts[0.0] == [5, 6, 6]
    assert counts[1.0] == [2, 2, 6]  # first with last, ...: two pairs of classes 0 and 2, and one of 1 with itself


def test_learning_rate_warms_up_and_follows_half_a_cosine():
    rates = [warmup_cosine(step, 110, 10, 1.0, 0.1) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10 + 33] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2)
    assert warmup_cosine(0, 1, 0, 1.0, 0.1) == 1.0


def test_the_peak_learning_rate_grows_with_the_root_of_the_step_s_images(run_train, capsys):
    folder = run_train(EPOCHS=1, LEARNING_RATE=1e-3, ACCUMULATE=2, WARMUP_EPOCHS=0.0)
    assert "5.00e-04 at its peak: LEARNING_RATE 0.001 x sqrt(8 / 32)" in capsys.readouterr().out
    assert load_checkpoint(folder / "last.pth")["history"][0]["lr"] == pytest.approx(1e-6)
    run_train(EPOCHS=1, WARMUP_EPOCHS=2.0)
    assert "never reached: 2 warm-up epochs of 1" in capsys.readouterr().out


def test_images_grow_in_the_first_two_thirds_of_a_run():
    sizes = ImageSizes(12, (128, 128), start=64)
    assert [sizes.training(epoch)[0] for epoch in range(12)] == [64] * 4 + [96] * 4 + [128] * 4
    sizes = ImageSizes(12, (110, 110), start=64)  # no multiple of 32
    assert {sizes.training(epoch)[0] for epoch in range(12)} == {64, 96, 110}
    sizes = ImageSizes(12, (64, 101))
    assert {sizes.training(epoch) for epoch in range(12)} == {sizes.last} == {(64, 101)}


def test_the_network_sees_images_of_the_epoch_s_size(run_train, monkeypatch):
    sizes, validated = [], []
    prepare, validate = train.prepare_batch, train.validate

    def note_size(*arguments, **options):
        images, *others = prepare(*arguments, **options)
        sizes.append(images.shape[2:])
        return images, *others

    monkeypatch.setattr(train, "prepare_batch", note_size)
    monkeypatch.setattr(train, "validate", lambda *args: validated.append(args[2]) or falling(validate(*args)))

    def falling(results):  # every validation is worse than the one before
        results[0]["acc1"] = 100.0 - len(validated)
        return results

    folder = run_train(EPOCHS=3, IMG_SIZE=64, START_SIZE=32, TEST_SIZE=96)
    assert len(sizes) == 15 and sizes == [(32, 32)] * 10 + [(64, 64)] * 5
    assert validated == [(32, 32)] * 4 + [(96, 96)] * 2
    # An accuracy on small images does not keep that on the larger ones from being the best.
    best = load_checkpoint(folder / "best.pth")
    assert best["epoch"] == 3 and best["img_size"] == 96


def test_a_longer_run_keeps_its_best_until_images_of_that_size_do_better(run_train, monkeypatch):
    """Three more epochs after three: images of 32 pixels, which are not compared, and then of 64 again."""
    results = iter([10.0, 20.0, 15.0, 90.0, 12.0, 40.0])
    validate = train.validate

    def set_accuracy(*arguments):
        metrics, *predictions = validate(*arguments)
        return dict(metrics, acc1=next(results)), *predictions

    monkeypatch.setattr(train, "validate", set_accuracy)
    constants, best = dict(IMG_SIZE=64, START_SIZE=32, EMA_DECAY=0.0), []
    original = train.RunFolder.finish_epoch

    def finish_epoch(folder, *arguments):
        row = original(folder, *arguments)
        best.append(load_checkpoint(folder.path / "best.pth")["epoch"])
        return row

    monkeypatch.setattr(train.RunFolder, "finish_epoch", finish_epoch)
    run_train(EPOCHS=3, **constants)
    run_train(EPOCHS=6, RESUME="auto", **constants)
    assert best == [1, 2, 3, 3, 3, 6]


def test_crops_hold_at_least_their_fraction_of_the_image():
    # An image whose red and green are its columns and rows shows what was cropped.
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    columns, rows = np.meshgrid(ramp, ramp)
    image = Image.fromarray(np.stack([columns, rows, rows], 2))
    torch.manual_seed(0)
    fractions = []
    for crop in (1.0, 0.7):
        transform = train_transform((64, 64), [0.0] * 3, crop=crop)
        for _ in range(30):
            red, green, _ = transform(image) / 255
            fractions.append(float((red.max() - red.min()) * (green.max() - green.min())))
    assert min(fractions[:30]) > 0.99
    assert 0.65 < min(fractions[30:]) < 0.8 and max(fractions[30:]) > 0.85


def test_muon_orthogonalises_and_does_so_in_float32_without_bfloat16(monkeypatch):
    original, dtypes = muon.zeropower_via_newtonschulz, []

    def record(*arguments, dtype=torch.bfloat16, **options):
        dtypes.append(dtype)
        return original(*arguments, dtype=dtype, **options)

    monkeypatch.setattr(muon, "zeropower_via_newtonschulz", record)
    steps = []
    for fast in (True, False):
        monkeypatch.setattr(optimizer, "has_bfloat16", lambda device, fast=fast: fast)
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 48, bias=False)
        before = model.weight.detach().clone()
        muons = optimizer.create_optimizer(model, "muon", 1.0, 0.0, 1.0, torch.device("cpu"))
        model.weight.grad = torch.randn(48, 16)
        muons.step()
        step = before - model.weight.detach()
        steps.append(step / step.norm() * 4)  # 16 singular values of about 1 each
        assert torch.linalg.svdvals(steps[-1]).sub(1).abs().max() < 0.35  # as near as five iterations come
        left, _, right = torch.linalg.svd(model.weight.grad, full_matrices=False)
        assert (steps[-1] - left @ right).abs().max() < 0.15
    assert 0 < (steps[0] - steps[1]).abs().max() < 0.02  # bfloat16 and float32
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize("rank", [1, 5, None])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("shapes", [[(20, 80)], [(80, 20), (20, 80), (7, 7), (20, 80)], [(96, 360)], [(4, 4)]])
def test_muon_on_gram_matrices_orthogonalises_as_timm_does(shapes, scale, rank):
    generator = torch.Generator().manual_seed(0)
    matrices = []
    for height, width in shapes:
        inner = min(rank or height, height, width)
        left, right = (torch.randn(*shape, generator=generator) for shape in ((height, inner), (inner, width)))
        matrices.append(left @ right * scale)
    coefficients = muon.resolve_ns_coefficients("quintic", muon._COEFFICIENTS)
    found = optimizer.orthogonalise(matrices, coefficients, eps=1e-7, safety_factor=1.0)
    for matrix, ours in zip(matrices, found):
        exact = muon.zeropower_via_newtonschulz(matrix, 5, coefficients, dtype=torch.float64)
        assert ours.shape == matrix.shape and ours.dtype == torch.float32
        # Directions that the matrix lacks are lost in the Gram matrix's rounding; bfloat16 would be off by 1e-2.
        assert (ours - exact).abs().max() < (1e-4 if rank is None else 2e-3) * exact.abs().max()


def many_steps(create, stop=None):
    """Weights and state after 6 steps of a small network's optimizer; after `stop` steps, state goes into another."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten())
    model.append(torch.nn.Linear(8, 12))
    muons = create(model)
    for step in range(6):
        if step == stop:
            state = muons.state_dict()
            muons = create(model)
            muons.load_state_dict(state)
        loss = model(torch.randn(4, 3, 5, 5)).square().sum()
        loss.backward()
        muons.step()
        muons.zero_grad()
    return [*model.parameters(), *(muons.state[p].get("momentum_buffer") for p in model.parameters())]


def test_a_run_begun_with_timm_s_muon_is_resumed_to_the_same_bits(monkeypatch):
    def old(model):  # in float32, by timm's function exchanged for the step
        muons = timm.optim.create_optimizer_v2(model, "muon", 1e-2, 0.05)
        muons.step = optimizer.orthogonalise_in_float32(muons.step)
        return muons

    def new(model, gram=False):
        muons = optimizer.create_optimizer(model, "muon", 1e-2, 0.05, 1.0, torch.device("cpu"))
        assert all(group["gram"] for group in muons.param_groups)
        for group in muons.param_groups:
            group["gram"] = gram
        return muons

    monkeypatch.setattr(optimizer, "has_bfloat16", lambda device: False)
    expected, same, other = many_steps(old), many_steps(new), many_steps(partial(new, gram=True))
    for before, after, close in zip(expected, same, other):
        assert (before is None) == (after is None) == (close is None)
        if before is not None:
            assert torch.equal(before, after)
            assert torch.allclose(before, close, rtol=1e-3, atol=1e-4)
    assert not all(torch.equal(a, b) for a, b in zip(expected, other) if a is not None)


def test_a_checkpoint_says_how_muon_was_computed(run_train):
    folder = run_train(EPOCHS=2, OPTIMIZER="muon")
    checkpoint = load_checkpoint(folder / "last.pth")
    gram = ["gram" in group for group in checkpoint["optimizer"]["param_groups"]]
    assert all(gram) == any(gram) == (not has_bfloat16(torch.device("cpu")))
    for group in checkpoint["optimizer"]["param_groups"]:
        group.pop("gram", None)  # as an earlier version saved it
    torch.save(checkpoint, folder / "last.pth")
    run_train(EPOCHS=3, OPTIMIZER="muon", RESUME="auto")
    groups = load_checkpoint(folder / "last.pth")["optimizer"]["param_groups"]
    assert not any(group.get("gram") for group in groups)


@pytest.mark.parametrize("failing", [False, True])
def test_timm_s_muon_is_as_it_was_after_a_step(monkeypatch, failing):
    original = muon.zeropower_via_newtonschulz
    monkeypatch.setattr(optimizer, "has_bfloat16", lambda device: False)
    model = torch.nn.Linear(4, 8)
    muons = optimizer.create_optimizer(model, "adamuon", 1e-3, 0.0, 1.0, torch.device("cpu"))
    model(torch.zeros(1, 4)).sum().backward()

    def closure():
        assert muon.zeropower_via_newtonschulz is not original
        if failing:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError) if failing else nullcontext():
        muons.step(closure)
    assert muon.zeropower_via_newtonschulz is original


def test_muon_takes_matrices_and_dense_kernels_and_leaves_the_rest_to_adamw():
    model = train.timm.create_model("unireplknet_a", num_classes=12)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    muons = optimizer.create_optimizer(model, "muon", 1e-3, 0.05, 1.0, torch.device("cpu"))
    muons.step()
    for name, parameter in model.named_parameters():
        dense = parameter.ndim > 1 and min(parameter.shape[:2]) > 1
        assert ("momentum_buffer" in muons.state[parameter]) == dense, name


def test_logit_adjustment_is_cross_entropy_with_the_log_of_the_frequencies():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(5, 3, generator=generator), torch.eye(3)[[0, 1, 2, 1, 0]]
    labels = [0] * 6 + [1] * 3 + [2]
    plain = train.create_criterion(labels, 3, 0.0, torch.device("cpu"))
    assert torch.equal(plain(logits, targets), F.cross_entropy(logits, targets))
    adjusted = (logits + 0.5 * torch.tensor([0.6, 0.3, 0.1]).log()).log_softmax(1)
    loss = train.create_criterion(labels, 3, 0.5, torch.device("cpu"))(logits, targets)
    torch.testing.assert_close(loss, -(targets * adjusted).sum(1).mean())


def test_a_balanced_run_predicts_the_rare_class_more_often(run_train, place, make_data1):
    shutil.rmtree("data1")
    make_data1(place / "data1", {"a": 40, "b": 8})
    makedata.main()
    biases = []
    for balance in (0.0, 2.0):
        folder = run_train(EPOCHS=2, BALANCE=balance, OUTPUT=str(balance))
        bias = load_checkpoint(folder / "last.pth")["state_dict"]["head.bias"]
        biases.append(float(bias[1] - bias[0]))
    assert biases[1] > biases[0]


@pytest.mark.parametrize(
    ("pretrained", "constants", "expected", "chosen"),
    [
        ("", {}, dict(EPOCHS=100, WARMUP_EPOCHS=5, LAYER_DECAY=1.0), "EPOCHS 100, WARMUP_EPOCHS 5, LAYER_DECAY 1.0"),
        ("weights.pth", {}, dict(EPOCHS=20, WARMUP_EPOCHS=1, LAYER_DECAY=0.9), "EPOCHS 20, WARMUP_EPOCHS 1"),
        ("weights.pth", dict(EPOCHS=50, LAYER_DECAY=1.0), dict(EPOCHS=50, WARMUP_EPOCHS=1, LAYER_DECAY=1.0),
         "WARMUP_EPOCHS 1 for fine-tuning"),
        ("weights.pth", dict(WARMUP_EPOCHS=0), dict(EPOCHS=20, WARMUP_EPOCHS=0, LAYER_DECAY=0.9),
         "EPOCHS 20, LAYER_DECAY 0.9"),
    ],
)  # fmt: skip
def test_what_a_person_set_is_kept_in_fine_tuning(
    pretrained, constants, expected, chosen, run_train, monkeypatch, capsys, place
):
    """Only constants that are None depend on PRETRAINED, and those are printed."""
    if pretrained:
        model = network.timm.create_model("unireplknet_test", num_classes=3)
        torch.save(model.state_dict(), place / pretrained)
    monkeypatch.setattr(train, "train_one_epoch", lambda state, *_, **__: (_ for _ in ()).throw(train.Stopped))
    unset = dict(EPOCHS=None, WARMUP_EPOCHS=None, LAYER_DECAY=None)
    folder = run_train(143, **unset | dict(PRETRAINED=pretrained) | constants)
    config = load_checkpoint(folder / "last.pth")["config"]
    assert {name: config[name] for name in expected} == expected
    assert f"chosen      {chosen}" in capsys.readouterr().out


def test_a_checkpoint_with_old_names_resumes_with_their_values(run_train, capsys):
    """As an earlier version saved it: 0 and -1 where None stands today, and constants that are literals now."""
    folder = run_train(EPOCHS=1)
    saved = load_checkpoint(folder / "last.pth")
    saved["config"] |= dict(START_SIZE=0, TEST_SIZE=0, WORKERS=-1, CUTOUT_SCALE=[0.02, 0.4], KEEP=5, MIX_SWITCH=0.5)
    saved["config"]["USE_EMA"] = True
    mask = saved["config"].pop("SPEC_MASK")
    saved["config"] |= dict(TIME_MASK=mask, FREQUENCY_MASK=mask, MIN_LEARNING_RATE=1e-6)
    save_checkpoint(saved, folder / "last.pth")
    capsys.readouterr()
    run_train(EPOCHS=2, RESUME="auto", WORKERS=None)
    changed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed")]
    assert changed == ["changed     EPOCHS was 1, is 2 from here on"]
    saved["config"] |= dict(MIX_SWITCH=0.9, TIME_MASK=0.7)
    save_checkpoint(saved, folder / "last.pth")
    run_train(EPOCHS=2, RESUME="auto")
    out = capsys.readouterr().out
    assert "MIX_SWITCH was 0.9, is always 0.5 now" in out and f"SPEC_MASK was [0.7, {mask}], is {mask}" in out
    assert upgrade_config({}) == {}
    for turns, rotation, today in (
        (True, 0.0, "quarter"), (True, 180.0, 180.0), (True, 20.0, 180.0), (False, 20.0, 20.0), (False, 0.0, 0.0),
    ):  # fmt: skip
        assert upgrade_config(dict(QUARTER_TURNS=turns, ROTATION=rotation)) == dict(ROTATION=today)
    assert upgrade_config(dict(QUARTER_TURNS=True)) == dict(ROTATION="quarter")
    assert upgrade_config(dict(USE_EMA=False, EMA_DECAY=0.99)) == dict(EMA_DECAY=0.0)
    assert upgrade_config(dict(USE_EMA=True, EMA_DECAY=0.99)) == dict(EMA_DECAY=0.99)


def test_mixing_an_odd_batch_leaves_its_last_image_unmixed():
    torch.manual_seed(0)
    np.random.seed(0)
    mixup = BatchMixup(4, 0.8, 1.0, prob=1.0, smoothing=0.1)
    images, labels = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 2])
    mixed, targets = mixup(images.clone(), labels)
    assert torch.equal(mixed[4], images[4]) and not torch.equal(mixed[:4], images[:4])
    assert targets[4].tolist() == pytest.approx([0.025, 0.025, 0.925, 0.025])
    torch.testing.assert_close(targets.sum(1), torch.ones(5))


def test_validation_weighs_every_image_alike():
    torch.manual_seed(0)
    logits, labels = torch.randn(11, 7), torch.randint(7, (11,))
    loader = DataLoader(TensorDataset(logits.view(11, 1, 1, 7), labels), batch_size=4)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(7, 7, bias=False))
    torch.nn.init.eye_(model[1].weight)
    metrics, true, predicted = train.validate(model, loader, (1, 7), torch.nn.Identity(), nullcontext, "val")
    assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert metrics["acc1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert metrics["acc5"] == pytest.approx(100 * (ranks < 5).double().mean().item())
    assert true == labels.tolist() and predicted == logits.argmax(1).tolist()


def test_frozen_epochs_change_the_head_only(run_train):
    folder = run_train(EPOCHS=1)
    source = load_checkpoint(folder / "last.pth")["state_dict_ema"]
    shutil.copy(folder / "last.pth", "weights.pth")
    folder = run_train(EPOCHS=1, FREEZE_EPOCHS=1, PRETRAINED="weights.pth", EMA_DECAY=0.0)
    frozen = load_checkpoint(folder / "last.pth")["state_dict"]
    changed = {name for name, tensor in frozen.items() if not torch.equal(tensor, source[name])}
    assert changed == {"head.weight", "head.bias"}
    folder = run_train(EPOCHS=2, FREEZE_EPOCHS=1, PRETRAINED="weights.pth", EMA_DECAY=0.0)
    thawed = load_checkpoint(folder / "last.pth")["state_dict"]
    assert not torch.equal(thawed["stages.0.0.pwconv1.1.weight"], source["stages.0.0.pwconv1.1.weight"])


def test_pretrained_weights_of_other_classes(run_train, place, capsys, make_data1):
    shutil.copy(run_train(EPOCHS=1) / "best.pth", "weights.pth")
    shutil.rmtree("data1")
    make_data1(place / "data1", {"a": 4, "b": 4})
    makedata.main()
    run_train(EPOCHS=1, PRETRAINED="weights.pth")
    assert "skipped head.weight ((3, 32) there, (2, 32) here)" in capsys.readouterr().out


@pytest.mark.parametrize(("classes", "anew"), [(list(CLASSES), False), (["a", "b", "c"], True)])
def test_a_head_that_knows_other_classes_starts_anew(classes, anew, trained):
    """As many classes, of other names: the old head would be confident of wrong predictions."""
    path = trained / "checkpoints" / "unireplknet_test" / "best.pth"
    theirs = load_checkpoint(path)["state_dict_ema"]
    model, _ = network.create_network("unireplknet_test", classes, (32, 32), 0.0, 0.1, False, None)
    text = network.load_pretrained(model, network.read_weights("unireplknet_test", str(path)), classes)
    ours = model.state_dict()
    different = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert different == ({"head.weight", "head.bias"} if anew else set())
    assert ("the head starts anew" in text) == anew


def test_a_fine_tuning_that_is_continued_needs_the_pretrained_file_no_more(run_train, capsys):
    shutil.copy(run_train(EPOCHS=1) / "best.pth", "weights.pth")
    run_train(EPOCHS=1, PRETRAINED="weights.pth")
    Path("weights.pth").unlink()
    capsys.readouterr()
    folder = run_train(EPOCHS=2, PRETRAINED="weights.pth", RESUME="auto")
    assert load_checkpoint(folder / "last.pth")["epoch"] == 2
    assert "pretrained" not in capsys.readouterr().out


def test_training_starts_from_the_weights_of_the_repository(run_train, capsys):
    constants = dict(MODEL="unireplknet_a", PRETRAINED="seedlings", EMA_DECAY=0.0)
    folder = run_train(EPOCHS=1, FREEZE_EPOCHS=1, **constants)
    assert "pretrained  seedlings: loaded" in capsys.readouterr().out
    theirs, ours = load_checkpoint(SEEDLINGS)["state_dict"], load_checkpoint(folder / "last.pth")["state_dict"]
    different = {name for name in ours if not torch.equal(ours[name], theirs[name].to(ours[name].dtype))}
    assert different == {"head.weight", "head.bias"}
    with pytest.raises(UserError, match="PRETRAINED: these weights are of another network"):
        run_train(EPOCHS=1, PRETRAINED="seedlings")


def test_statistics_come_from_mean_std_and_are_checked_against_the_images(run_train, place, capsys):
    manifest = json.loads((place / "data" / "manifest.json").read_text(encoding="utf-8"))
    report = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], pictures=30, fingerprint=manifest["fingerprint"])
    (place / "data" / "mean_std.json").write_text(json.dumps(report))
    checkpoint = load_checkpoint(run_train(EPOCHS=1) / "last.pth")
    assert checkpoint["mean"] == [0.1, 0.2, 0.3] and checkpoint["std"] == [0.4, 0.5, 0.6]
    assert "warning" not in capsys.readouterr().out
    (place / "data" / "mean_std.json").write_text(json.dumps(report | dict(fingerprint="other")))
    run_train(EPOCHS=1)
    assert "the images have changed since mean_std.py was run" in capsys.readouterr().out
    checkpoint = load_checkpoint(run_train(EPOCHS=1, MEAN=[0.5] * 3, STD=[0.2] * 3) / "last.pth")
    assert checkpoint["mean"] == [0.5] * 3


@pytest.mark.parametrize(
    ("constants", "sentence"),
    [
        (dict(MODEL="unireplknet_z"), "MODEL must be one of unireplknet_a"),
        (dict(MODEL="unireplknet_a", PRETRAINED="in2k"), r"a published tag of unireplknet_a \(in1k\), got 'in2k'"),
        (dict(PRETRAINED="in1k", MODEL="resnet18"), r"a published tag of resnet18 \(a1_in1k, .*, got 'in1k'"),
        (dict(MODEL="resnet18.in1k"), r"MODEL must have a published tag of resnet18 behind its dot .*, got 'in1k'"),
        (dict(MODEL="resnet18.a1_in1k", PRETRAINED="a2_in1k"), "names the weights 'a1_in1k' and PRETRAINED 'a2_in1k'"),
        (dict(MODEL="hf-hub:timm/resnet18.a1_in1k"), "MODEL must be one of .*, got 'hf-hub:timm/resnet18'"),
        (dict(PRETRAINED="hf-hub:timm"), "PRETRAINED must be .*, got 'hf-hub:timm'"),
        (dict(PRETRAINED="local-dir:weights"), "PRETRAINED must be .*, got 'local-dir:weights'"),
        (dict(RESUME="nowhere.pth"), "RESUME must be .* got 'nowhere.pth'"),
        (dict(DEVICE="cuda:99"), "is not available here"),
        (dict(MEAN=[0.5] * 3), "set both or neither"),
        (dict(OPTIMIZER="adamz"), "OPTIMIZER must be .*, got 'adamz'"),
        (dict(START_SIZE=64), r"START_SIZE must be at most IMG_SIZE \(32\), got 64"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_constants_that_do_not_fit_are_refused_before_anything_is_written(run_train, place, constants, sentence):
    before = sorted(place.rglob("*"))
    with pytest.raises(ConstantError, match=sentence):
        run_train(**constants)
    assert sorted(place.rglob("*")) == before


def test_a_wrong_environment_variable_is_refused_before_anything_is_written(run_train, place, monkeypatch):
    before = sorted(place.rglob("*"))
    monkeypatch.setenv("UNIREPLKNET_DEPTHWISE", "fast")
    with pytest.raises(ConstantError, match="UNIREPLKNET_DEPTHWISE must be .* got 'fast'"):
        run_train()
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(arch="unireplknet_q"), "Unknown model"),
        (dict(model_args=dict(num_classes=7)), "size mismatch|Error"),
        (dict(model_args=dict(colour="red")), "colour"),
    ],
    ids=["network", "weights", "argument"],
)
def test_a_checkpoint_whose_network_cannot_be_built_gets_one_sentence(changed, reason, trained):
    checkpoint = load_checkpoint(trained / "checkpoints" / "unireplknet_test" / "best.pth")
    with pytest.raises(UserError, match=f"cannot build the network .* of the checkpoint: .*({reason})") as error:
        build_network(checkpoint | changed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("constants", "sentence"),
    [
        (dict(DATA="nowhere"), "run makedata.py first"),
        (dict(MODEL="vgg11"), "set DROP_PATH to 0"),
        (dict(MODEL="vit_tiny_patch16_224"), "does not work with images of 32 x 32 pixels"),
        (dict(MODEL="dla46_c", GRAD_CHECKPOINTING=True, DROP_PATH=0.0), "with GRAD_CHECKPOINTING True"),
        (dict(BATCH_SIZE=1), "batch norm cannot learn from single images"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_work_gets_one_sentence(run_train, constants, sentence):
    with pytest.raises(UserError, match=sentence):
        run_train(**constants)


def test_unfit_data_gets_one_sentence(run_train, place):
    val = place / "data" / "val"
    shutil.move(val / "Maize", place / "Maize")
    with pytest.raises(UserError, match="only one of them has Maize"):
        run_train()
    for other in ("玉米 苗", "Maize"):
        shutil.rmtree(place / "data" / "train" / other)
        shutil.rmtree(val / other, ignore_errors=True)
    with pytest.raises(UserError, match="holds one class only"):
        run_train()


def test_a_broken_image_is_named(run_train, place):
    broken = next((place / "data" / "train" / "Maize").iterdir())
    broken.unlink()
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=broken.name):
        run_train(EPOCHS=1)


def test_resuming_another_network_or_other_classes_is_refused(run_train, place):
    folder = run_train(EPOCHS=1)
    with pytest.raises(UserError, match="MODEL there is unireplknet_test, here unireplknet_a"):
        run_train(MODEL="unireplknet_a", RESUME=str(folder / "last.pth"))
    for side in ("train", "val"):
        shutil.rmtree(place / "data" / side / "Maize")
    with pytest.raises(UserError, match="the classes there"):
        run_train(RESUME="auto")


def erased_values(transform, image):
    """Colours (n, 3) of the pixels that a transform changes in 20 copies of `image`."""
    plain = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    changed = []
    for _ in range(20):
        out = transform(image) / 255
        erased = (out - plain).abs().amax(0) > 1 / 255
        changed.append(out[:, erased].T)
    return torch.cat(changed)


MEAN = [0.3, 0.5, 0.7]


@pytest.mark.parametrize("torchtoolbox", [True, False])
def test_cutout_fills_with_the_mean_colour_with_and_without_torchtoolbox(torchtoolbox, monkeypatch, draw_image):
    if torchtoolbox and augment.CUTOUT_ERROR:
        pytest.skip(f"torchtoolbox cannot be imported: {augment.CUTOUT_ERROR}")
    if not torchtoolbox:
        monkeypatch.setattr(augment, "CUTOUT_ERROR", "ImportError: libGL.so.1")
    transform = train_transform((48, 48), MEAN, cutout=1.0)
    kinds = {type(step) for step in transform.transforms}
    assert (ColorCutout in kinds) == torchtoolbox and (transforms.RandomErasing in kinds) != torchtoolbox
    train.seed_everything(0)
    values = erased_values(transform, draw_image("noise", 48))
    assert len(values) > 1000
    # 8 bits round the mean by up to half a level.
    assert (values - torch.tensor(MEAN)).abs().max() <= 0.5 / 255 + 1e-6
    assert not hasattr(np, "int")


def test_quality_blurs_sharpens_resamples_compresses_and_adds_noise(draw_image, monkeypatch):
    pixels = transforms.functional.pil_to_tensor(draw_image("quality", (48, 40)))
    train.seed_everything(0)
    contrast = {}  # of an image of noise: blur takes it away, sharpening and noise add to it
    for kind in range(5):
        monkeypatch.setattr(augment.random, "randrange", lambda *limits, kind=kind: kind)
        changed = [augment.change_quality(pixels, 1.0) for _ in range(12)]
        assert all(new.shape == pixels.shape and new.dtype == torch.uint8 for new in changed)
        assert all(abs(float(new.double().mean() - pixels.double().mean())) < 6 for new in changed)
        assert len({new.numpy().tobytes() for new in changed}) > 4, kind
        contrast[kind] = [float(new.double().std() / pixels.double().std()) for new in changed]
    assert max(contrast[0]) < 1 and min(contrast[0]) < 0.6
    assert min(contrast[1]) > 1
    assert min(contrast[2]) < 0.8
    assert all(0.8 < value < 1.1 for value in contrast[4])
    monkeypatch.undo()
    assert all(torch.equal(augment.change_quality(pixels, 0.0), pixels) for _ in range(5))
    half = [torch.equal(augment.change_quality(pixels, 0.5), pixels) for _ in range(100)]
    assert 30 < sum(half) < 70


@pytest.mark.parametrize("name", ["QUALITY", "SHARPNESS"])  # the second in checkpoints of earlier versions
def test_quality_is_read_from_checkpoints(name):
    transform, _ = augment.augmentation_from_config({name: 0.3}, 3, (32, 32), [0.5] * 3, [0.2] * 3)
    assert transform.transforms[0].keywords == dict(probability=0.3)


@pytest.mark.parametrize("shape", [(32, 32), (20, 50), (33, 7)])
def test_rotation_turns_about_the_middle_and_mirrors_in_the_corners(shape, monkeypatch):
    height, width = shape
    pixels = torch.randint(1, 255, (3, height, width), dtype=torch.uint8)
    assert torch.equal(augment.rotate(pixels, 0.0), pixels)
    monkeypatch.setattr(augment.random, "uniform", lambda low, high: high)
    assert (augment.rotate(pixels, 180.0).int() - pixels.flip(1, 2).int()).abs().max() <= 1
    if height == width:
        assert (augment.rotate(pixels, 90.0).int() - pixels.rot90(-1, (1, 2)).int()).abs().max() <= 1
    constant = torch.full((3, height, width), 77, dtype=torch.uint8)
    assert torch.equal(augment.rotate(constant, 33.0), constant)  # black corners would show


@pytest.mark.parametrize("angle", [7.0, 45.0, 123.0, -60.0])
@pytest.mark.parametrize("size", [(48, 48), (60, 36)])
def test_rotation_is_that_of_pillow_in_a_mirrored_image(size, angle, draw_image, monkeypatch):
    image = draw_image("rotation", size)
    width, height = image.size
    margin = 48  # as far as a corner reaches
    mirrored = transforms.functional.pad(image, margin, padding_mode="symmetric")
    mirrored = mirrored.rotate(-angle, Image.Resampling.BILINEAR)
    expected = mirrored.crop((margin, margin, margin + width, margin + height))
    monkeypatch.setattr(augment.random, "uniform", lambda low, high: angle)
    rotated = augment.rotate(transforms.functional.pil_to_tensor(image), 180.0)
    assert (rotated.int() - transforms.functional.pil_to_tensor(expected).int()).abs().max() <= 1


def test_cutout_is_the_last_change_of_colours(draw_image):
    transform = train_transform((48, 48), MEAN, cutout=1.0, color_jitter=0.5, rotation=30.0)
    train.seed_everything(0)
    image, color = draw_image("noise", 48), (255 * torch.tensor(MEAN)).round()[:, None, None]
    means = [(transform(image) == color).all(0).float().mean() for _ in range(20)]
    assert min(means) > 0.01  # the rectangle is the mean, whatever happens to the rest


def test_from_the_command_line(run_script, place):
    options = "--model unireplknet_a --img-size 32 --epochs 1 --batch-size 8 --workers 1 --optimizer adamw"
    done = run_script("train.py", *options.split())
    assert done.returncode == 0, done.stderr
    assert "best acc1" in done.stdout and "Traceback" not in done.stderr
    wrong = run_script("train.py", "--epoch", "3")
    assert wrong.returncode == 2 and "did you mean --epochs?" in wrong.stderr and "Traceback" not in wrong.stderr


def test_the_cpu_chooses_its_dtype_and_layout(monkeypatch, run_train, capsys):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for has, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(device, "has_bfloat16", lambda device, has=has: has)
        assert device.choose_amp("auto", cpu) == dtype
    assert device.choose_layout(cpu) == torch.channels_last and device.choose_layout(cuda) == torch.contiguous_format
    seen = []
    original = train.prepare_batch

    def prepare_batch(*arguments, **options):
        seen.append(original(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(train, "prepare_batch", prepare_batch)
    monkeypatch.setattr(device, "has_bfloat16", lambda device: True)
    run_train(EPOCHS=1, AMP="auto")
    assert "autocast bfloat16" in capsys.readouterr().out
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _, _ in seen)


def test_both_layouts_learn_the_same(run_train, monkeypatch):
    # Small steps, since Adam divides by the gradient's size, which makes whole steps of rounding where that is tiny.
    losses = []
    for layout in (torch.channels_last, torch.contiguous_format):
        monkeypatch.setattr(train, "choose_layout", lambda device, layout=layout: layout)
        run = load_checkpoint(run_train(EPOCHS=1, LEARNING_RATE=1e-4, OUTPUT=str(layout)) / "last.pth")
        losses.append(run["history"][0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
