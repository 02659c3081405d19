"""What train.py does to be fast changes no result: torch.compile, the fused optimizer, batches copied ahead."""

import contextlib
import csv
import functools
import importlib
import multiprocessing
import sys
import threading
import types

import pytest
import timm
import torch

import models
import train
from benchmarks import cpu, data, depthwise, throughput
from common import device
from common.device import prefetch, wants_compile
from common.optimizer import create_optimizer
from common.options import ConstantError
from common.run_folder import TrainingState
from models import DepthwiseConv2d, depthwise_choice
from tools.conv_report import find_shapes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODEL = "unireplknet_test"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def losses(folder):
    with open(folder / "log.csv", encoding="utf-8") as file:
        return [(float(row["train_loss"]), float(row["val_loss"])) for row in csv.DictReader(file)]


def test_compile_decides_by_itself(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert wants_compile("auto", CUDA, 5000, False) and not wants_compile("auto", CUDA, 4999, False)
    assert not wants_compile("auto", CPU, 10**6, False)
    assert not wants_compile("auto", CUDA, 10**6, grad_checkpointing=True)
    monkeypatch.setattr(sys, "platform", "win32")
    assert not wants_compile("auto", CUDA, 10**6, False)
    assert wants_compile("on", CPU, 1, True)
    assert not wants_compile("off", CUDA, 10**6, False)


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


def test_images_that_grow_are_compiled_at_each_size_and_validated_without(run_train, monkeypatch):
    sizes, trained, validated = [], [], []

    class Compiled(torch.nn.Module):
        """Stands in for the result of torch.compile."""

        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

        def forward(self, images):
            trained.append(tuple(images.shape[-2:]))
            return self._orig_mod(images)

    monkeypatch.setattr(device, "compile_network", lambda model, n, size, *_: sizes.append(size) or Compiled(model))
    validate = train.validate
    monkeypatch.setattr(train, "validate", lambda model, *rest: validated.append(model) or validate(model, *rest))
    run_train(EPOCHS=4, IMG_SIZE=64, START_SIZE=32, COMPILE="on", FREEZE_EPOCHS=1, EMA_DECAY=0.0)
    assert sizes == [(32, 32), (64, 64)] and set(trained) == set(sizes)
    assert validated and not any(hasattr(model, "_orig_mod") for model in validated)


@pytest.mark.parametrize(("saved", "here"), [(True, None), (None, True)])
def test_a_checkpoint_of_the_fused_optimizer_can_be_resumed_without_it_and_the_other_way(saved, here):
    def start(fused):
        torch.manual_seed(0)
        model = timm.create_model(MODEL, num_classes=2)
        optimizer = create_optimizer(model, "adamw", 1e-3, 0.05, 1.0, CPU if fused else torch.device("mps"))
        return TrainingState(model, None, optimizer, torch.amp.GradScaler("cpu", enabled=False))

    def step(state):
        for parameter in state.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
        state.optimizer.step()

    first, other = start(saved), start(here)
    step(first)
    other.load(first.to_checkpoint(), "last.pth")
    assert {group["fused"] for group in other.optimizer.param_groups} == {here}
    for state in (first, other):
        step(state)
    for a, b in zip(first.model.parameters(), other.model.parameters()):
        torch.testing.assert_close(a, b)


class FakeTensor:
    """Records what is done to it."""

    def __init__(self, number, notes):
        self.number, self.notes = number, notes

    def to(self, device, non_blocking):
        self.notes.append(f"copy {self.number}")
        return self

    def record_stream(self, stream):
        self.notes.append(f"keep {self.number}")


class FakeStream:
    """Counts its events; a wait is recorded with the event's number."""

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
    small = dict(MODELS=[MODEL], DEVICE="cpu", REPEATS=1)
    small |= dict(IMG_SIZE=32, BATCH_SIZES=[2], PEER="") if script is throughput else dict(IMG_SIZES=[32], BATCH_SIZE=2)
    for name, value in small.items():
        monkeypatch.setattr(script, name, value)
    script.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cases = 4 if script is throughput else len(find_shapes(timm.create_model(MODEL), 32))
    assert len(rows) == 1 + cases
    assert "Error" not in "".join(rows)
    monkeypatch.setattr(script, "MODELS", ["resnet18"])
    with pytest.raises(ConstantError, match="MODELS"):
        script.main()


@pytest.mark.parametrize("parts", [["convolutions", "run"], ["training", "optimizer", "recipe", "inference"]], ids=len)
def test_the_cpu_s_benchmark_runs_in_small(parts, monkeypatch, capfd, tmp_path):
    """In threads instead of processes, which take long to start; what "published" changes is undone afterwards."""
    threads = types.SimpleNamespace(Pipe=multiprocessing.Pipe, Process=threading.Thread)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: threads)
    monkeypatch.setattr(DepthwiseConv2d, "forward", DepthwiseConv2d.forward)
    monkeypatch.setattr(models.depthwise, "takes_nchw", models.depthwise.takes_nchw)
    monkeypatch.setattr(cpu, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # exporting takes long
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    small = dict(MODELS=[MODEL], SIZES=[32], RECIPE_SIZES=[32, 64], RUN_SIZES=[32], BATCH_SIZE=2, REPEATS=1)
    small |= dict(PARTS=parts, MAPS=((4, 8),), KERNELS=((5, 1), (3, 2)))
    for name, value in small.items():
        monkeypatch.setattr(cpu, name, value)
    with depthwise_choice.installed({}):
        cpu.main()
    rows = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| ")]
    titles = [row for row in rows if "ratio" in row]
    assert len(titles) == len(parts)
    counts = dict(convolutions=2, optimizer=1, training=1, recipe=2, inference=2, run=5)
    assert len(rows) - len(titles) == sum(counts[part] for part in parts)
    assert all(float(row.split("|")[-2]) > 0 for row in rows if row not in titles)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MODELS", ["resnet18"], "'resnet18' is unknown; choose among unireplknet_a"),
        ("SIZES", [32, 64], "SIZES must hold one size for each of the 1 MODELS"),
    ],
)
def test_the_cpu_s_benchmark_refuses_what_does_not_fit(name, value, message, monkeypatch):
    for constant, small in (("MODELS", [MODEL]), ("SIZES", [32]), (name, value)):
        monkeypatch.setattr(cpu, constant, small)
    with pytest.raises(ConstantError, match=message):
        cpu.main()


@pytest.mark.parametrize("drawn", [True, False])
def test_the_benchmark_of_reading_runs_in_small(drawn, monkeypatch, tmp_path, make_data1, capsys):
    monkeypatch.chdir(tmp_path)
    if drawn:  # without the process that calls makedata.py and mean_std.py, which takes long to start
        monkeypatch.setattr(data, "Scripts", lambda: contextlib.nullcontext(lambda name, root: None))
    else:
        make_data1("data1", {"a": 6, "b": 6})
    for name, value in dict(IMAGES=8, SIZES=[40], IMG_SIZE=32, REPEATS=1).items():
        monkeypatch.setattr(data, name, value)
    data.main()
    out = capsys.readouterr().out
    assert f"8 images {'drawn' if drawn else 'from data1'}" in out
    assert sum(line.startswith(("| 40 png |", "| 40 jpg |")) for line in out.splitlines()) == 6
