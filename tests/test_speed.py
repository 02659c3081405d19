"""What train.py does to be fast changes no result: torch.compile, the fused optimizer, batches copied ahead."""

import contextlib
import csv
import functools
import sys

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import train
from benchmarks import cpu, data, depthwise, throughput
from common.device import prefetch
from common.options import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def losses(folder):
    with open(folder / "log.csv", encoding="utf-8") as file:
        return [(float(row["train_loss"]), float(row["val_loss"])) for row in csv.DictReader(file)]


def test_compile_decides_by_itself(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert train.wants_compile(CUDA, 5000) and not train.wants_compile(CUDA, 4999)
    assert not train.wants_compile(CPU, 10**6)
    monkeypatch.setattr(train, "GRAD_CHECKPOINTING", True)
    assert not train.wants_compile(CUDA, 10**6)
    monkeypatch.setattr(train, "GRAD_CHECKPOINTING", False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert not train.wants_compile(CUDA, 10**6)
    monkeypatch.setattr(train, "COMPILE", "on")
    assert train.wants_compile(CPU, 1)
    monkeypatch.setattr(train, "COMPILE", "off")
    assert not train.wants_compile(CUDA, 10**6)
    monkeypatch.setattr(train, "COMPILE", "yes")
    with pytest.raises(UserError, match='COMPILE must be "auto", "on" or "off"'):
        train.main()


def test_a_compiled_run_gives_the_same_losses_and_one_that_cannot_compile_goes_on(run_train, monkeypatch, capsys):
    small = dict(EPOCHS=1, BATCH_SIZE=8, DROP_PATH=0.0)
    plain = losses(run_train(**small, OUTPUT="plain", COMPILE="off"))
    real_compile = torch.compile

    def fail(model, dynamic):
        def call(images):
            model(images)  # the batch norms' statistics change before it fails
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

        return call

    monkeypatch.setattr(torch, "compile", fail)
    assert losses(run_train(**small, OUTPUT="failed", COMPILE="on")) == plain
    text = capsys.readouterr().out
    assert "compile     failed, so it is off: RuntimeError: Failed to find C compiler." in text

    monkeypatch.setattr(torch, "compile", functools.partial(real_compile, backend="eager"))
    folder = run_train(**small, OUTPUT="compiled", COMPILE="on")
    assert "compile     in " in capsys.readouterr().out
    assert losses(folder) == [pytest.approx(row, rel=1e-4) for row in plain]
    state = torch.load(folder / "last.pth", weights_only=True)
    assert not any(name.startswith("_orig_mod") for name in state["state_dict"])


def test_pictures_that_grow_are_compiled_at_each_size_and_validated_without(run_train, monkeypatch):
    sizes, validated = [], []
    monkeypatch.setattr(train, "compile_network", lambda model, n, size, *_: sizes.append(size) or torch.compile(model))
    validate = train.validate
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(train, "validate", lambda model, *rest: validated.append(model) or validate(model, *rest))
    run_train(EPOCHS=4, IMG_SIZE=64, START_SIZE=32, COMPILE="on", FREEZE_EPOCHS=1, USE_EMA=False)
    assert sizes == [(32, 32), (64, 64)]
    assert not any(hasattr(model, "_orig_mod") for model in validated)


@pytest.mark.parametrize(("saved", "here"), [(True, None), (None, True)])
def test_a_checkpoint_of_the_fused_optimizer_can_be_continued_without_it_and_the_other_way(saved, here):
    def start(fused):
        torch.manual_seed(0)
        model = timm.create_model("unireplknet_a", num_classes=2)
        optimizer = create_optimizer_v2(model, "adamw", 1e-3, 0.05, fused=fused)
        return train.Run(model, None, optimizer, torch.amp.GradScaler("cpu", enabled=False), CPU)

    def step(run):
        for parameter in run.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        run.optimizer.step()

    first, other = start(saved), start(here)
    step(first)
    other.load(first.state())
    assert {group["fused"] for group in other.optimizer.param_groups} == {here}
    for run in (first, other):
        step(run)
    for a, b in zip(first.model.parameters(), other.model.parameters()):
        torch.testing.assert_close(a, b)


class FakeTensor:
    """Notes what is done to it."""

    def __init__(self, number, notes):
        self.number, self.notes = number, notes

    def to(self, device, non_blocking):
        self.notes.append(f"copy {self.number}")
        return self

    def record_stream(self, stream):
        self.notes.append(f"keep {self.number}")


class FakeStream:
    """Counts its events; a wait is noted with the event's number."""

    def __init__(self, notes):
        self.notes, self.events = notes, 0

    def record_event(self):
        self.events += 1
        return self.events - 1

    def wait_event(self, event):
        self.notes.append(f"wait {event}")


def test_batches_are_copied_one_ahead_and_waited_for(monkeypatch):
    notes = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(notes))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(notes))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for batch in prefetch([[FakeTensor(number, notes)] for number in range(3)], CUDA):
        notes.append(f"use {batch[0].number}")
    assert notes == [
        *("copy 0", "copy 1", "wait 0", "keep 0", "use 0"),
        *("copy 2", "wait 1", "keep 1", "use 1"),
        *("wait 2", "keep 2", "use 2"),
    ]
    assert list(prefetch(iter([1, 2]), CPU)) == [1, 2] and list(prefetch([], CUDA)) == []


@pytest.mark.parametrize("script", [depthwise, throughput])
def test_benchmarks_run_on_a_cpu(script, monkeypatch, capsys):
    small = dict(MODELS=["unireplknet_a"], DEVICE="cpu", REPEATS=1)
    small |= dict(IMG_SIZE=32, BATCH_SIZES=[2], PEER="") if script is throughput else dict(IMG_SIZES=[32], BATCH_SIZE=2)
    for name, value in small.items():
        monkeypatch.setattr(script, name, value)
    script.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == (5 if script is throughput else 20)
    assert "Error" not in "".join(rows)
    monkeypatch.setattr(script, "MODELS", ["resnet18"])
    with pytest.raises(UserError, match="MODELS"):
        script.main()


def test_the_cpu_s_benchmark_runs_in_small(monkeypatch, capfd):
    for name, value in dict(MODELS=["unireplknet_a"], SIZES=[32], BATCH_SIZE=2, REPEATS=1, MAPS=((4, 8),)).items():
        monkeypatch.setattr(cpu, name, value)
    cpu.main()
    rows = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 + 4  # titles, then one convolution, one training step, inference of 2 and of 1
    ratios = [float(line.split("|")[-2]) for line in rows if "ratio" not in line]
    assert len(ratios) == 4 and min(ratios) > 0
    monkeypatch.setattr(cpu, "MODELS", ["resnet18"])
    with pytest.raises(UserError, match="'resnet18' is unknown; choose among unireplknet_a"):
        cpu.main()


@pytest.mark.parametrize("drawn", [True, False])
def test_the_benchmark_of_reading_runs_in_small(drawn, monkeypatch, tmp_path, make_data1, capsys):
    monkeypatch.chdir(tmp_path)
    if not drawn:
        make_data1("data1", {"a": 6, "b": 6})
    for name, value in dict(PICTURES=8, SIZES=[40], IMG_SIZE=32, REPEATS=1).items():
        monkeypatch.setattr(data, name, value)
    data.main()
    out = capsys.readouterr().out
    assert f"8 pictures {'drawn' if drawn else 'from data1'}" in out
    assert sum(line.startswith(("| 40 png |", "| 40 jpg |")) for line in out.splitlines()) == 6
