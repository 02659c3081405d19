"""Knowledge distillation: what the targets are, and which teachers are refused."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train
from common.augment import BatchMixup
from common.checkpoint import build_network, load_checkpoint, save_checkpoint
from common.options import UserError
from conftest import CLASSES, SMALL

BEST = f"checkpoints/{SMALL['MODEL']}/best.pth"
OTHER = dict(OUTPUT="student", EPOCHS=1)


@pytest.fixture
def place(trained_copy):
    return trained_copy


@pytest.fixture
def batches(monkeypatch):
    """(images, labels, targets) of the batches of a run."""
    prepare, seen = train.prepare_batch, []

    def record(*arguments, **options):
        seen.append(prepare(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(train, "prepare_batch", record)
    return seen


def save_teacher(path, change=lambda checkpoint: None):
    """Another network like best.pth, whose logits differ."""
    checkpoint = load_checkpoint(BEST)
    weights = checkpoint["state_dict_ema"]
    weights["head.weight"] = torch.randn(weights["head.weight"].shape, generator=torch.Generator().manual_seed(1))
    change(checkpoint)
    save_checkpoint(checkpoint, path)
    return path


def predict(path, images, mean, std, size=32):
    """What a network says of images that are normalised by `mean` and `std`."""
    about = load_checkpoint(path)
    pixels = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    own = (pixels - torch.tensor(about["mean"])[:, None, None]) / torch.tensor(about["std"])[:, None, None]
    if size != images.shape[2]:
        own = F.interpolate(own, size=(size, size), mode="bilinear", antialias=True)
    with torch.inference_mode():
        return build_network(about)(own).softmax(1)


def test_targets_are_the_mean_prediction_of_the_same_mixed_images(run_train, place, batches, capsys):
    other = save_teacher("other.pth")
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    run_train(TEACHER=f"{BEST},{other}", MEAN=mean, STD=std, MIX_PROB=1.0, **OTHER)
    out = capsys.readouterr().out
    assert f"teacher     {Path(BEST)}: unireplknet_test, 32x32; it was trained on none of the validation images" in out
    assert "so SMOOTHING has no effect" in out and len(batches) > 1
    for images, _, targets in batches:
        expected = sum(predict(path, images, mean, std) for path in (BEST, other)) / 2
        torch.testing.assert_close(targets, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(targets.sum(1), torch.ones(len(images)))


def test_a_teacher_gets_images_of_its_own_size_and_may_know_more_classes(run_train, place, batches, capsys):
    names = list(CLASSES)

    def change(checkpoint):
        checkpoint["classes"] = [*names[1:], "another", names[0]]
        for key in ("state_dict", "state_dict_ema"):
            head = {name: tensor for name, tensor in checkpoint[key].items() if name.startswith("head.")}
            checkpoint[key] |= {name: torch.cat([t[:1] + 1, t.flip(0)])[: len(names) + 1] for name, t in head.items()}
        checkpoint["model_args"] |= dict(num_classes=len(names) + 1)
        checkpoint["img_size"] = checkpoint["best_size"] = 64
        del checkpoint["data"], checkpoint["best"], checkpoint["calibration"]

    path = save_teacher("more.pth", change)
    run_train(TEACHER=path, **OTHER)
    assert "64x64; whether it was trained on validation images is not known" in capsys.readouterr().out
    data = load_checkpoint(f"student/{SMALL['MODEL']}/last.pth")
    images, _, targets = batches[0]
    with torch.inference_mode():
        more = build_network(load_checkpoint(path))
        own = F.interpolate(images, size=(64, 64), mode="bilinear", antialias=True)
        expected = more(own)[:, [len(names), *range(len(names) - 1)]].softmax(1)
    assert data["classes"] == names
    torch.testing.assert_close(targets, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mixed", [0.0, 1.0])
def test_a_teacher_sees_full_size_while_start_size_makes_images_smaller(mixed):
    images, labels = torch.rand(4, 3, 32, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    mixup = BatchMixup(3, 0.8, 1.0, mixed)
    options = dict(device=torch.device("cpu"), normalise=torch.nn.Identity(), mixup=mixup, seed=42)
    full, *_ = train.prepare_batch((images, labels), 0, size=(32, 64), **options)
    small, _, targets = train.prepare_batch(
        (images, labels), 0, size=(16, 32), teacher=lambda seen: seen.flatten(1), **options
    )
    assert torch.equal(targets, full.flatten(1)) and torch.equal(full, images) == (not mixed)
    torch.testing.assert_close(small, F.interpolate(full, size=(16, 32), mode="bilinear", antialias=True))


def test_a_teacher_that_knows_validation_images_is_pointed_out(run_train, place, capsys):
    for file in place.glob("data/val/*/*"):  # trained on some of what is validation now
        shutil.copy(file, place / "data" / "train" / file.parent.name / f"again_{file.name}")
        break
    shutil.rmtree(place / "data" / "cache", ignore_errors=True)
    first = run_train(OUTPUT="first", EPOCHS=1)
    next(place.glob("data/train/*/again_*")).unlink()
    capsys.readouterr()
    run_train(TEACHER=str(first / "last.pth"), **OTHER)
    assert "warning: it was trained on 1 of 9 validation images, so that accuracies flatter" in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_its_teacher(run_train, place, batches, capsys):
    run_train(TEACHER=BEST, **OTHER)
    capsys.readouterr()
    run_train(TEACHER=BEST, RESUME="auto", **OTHER | dict(EPOCHS=2))
    assert "TEACHER" not in capsys.readouterr().out
    run_train(RESUME="auto", **OTHER | dict(EPOCHS=3))
    assert f"TEACHER was '{BEST}', is ''" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(classes=["x", *c["classes"][1:]]), f"does not know {list(CLASSES)[0]}; set TEACHER"),
        (lambda c: c.update(fit="pad"), "was trained with another FIT than this run; choose another TEACHER"),
        (lambda c: c.update(value_range=[0, 1023]), "was trained with another VALUE_RANGE"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(run_train, place, change, message):
    path = save_teacher("wrong.pth", lambda saved: [change(saved), saved.pop("data"), saved.pop("best")])
    with pytest.raises(UserError, match=message):
        run_train(TEACHER=path, **OTHER)
    assert not list(place.glob("student/*/*.pth"))


@pytest.mark.parametrize("text", ["missing.pth", "none*.pth", "broken.pth", f"{BEST},missing.pth"])
def test_a_teacher_that_cannot_be_read_is_refused_before_anything_is_written(run_train, place, text):
    (place / "broken.pth").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="^TEACHER: .*" + text.split(",")[-1].replace("*", r"\*")):
        run_train(TEACHER=text, **OTHER)
    assert not (place / "student").exists()
