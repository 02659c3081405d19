"""torchrun with several processes on the CPU (gloo): the same run as one process with as many images a step."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import psutil
import pytest
import torch
from conftest import DEFAULTS, ROOT, SMALL, fill_classes
from kill import differences

import makedata
import train
from common import distributed, optimizer
from common.checkpoint import load_checkpoint
from common.options import ConstantError, UserError

# 51 training images: 12 batches of 4, so 3 steps of 16 images an epoch.
OPTIONS = "--model unireplknet_test --img-size 32 --batch-size 4 --epochs 3 --workers 0 --device cpu".split()
OPTIONS += "--amp off --mix-prob 0.5 --optimizer adamw --learning-rate 5e-4".split()


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill_classes(tmp_path / "data1", {"a": 24, "b": 24, "c": 25})
    makedata.main()
    return tmp_path


def launch(processes, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / "tests" / "tiny.py"), *OPTIONS, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    return subprocess.Popen(command, env=environment, **pipes)


def finish(process, status=0):
    out, errors = process.communicate(timeout=240)
    assert process.returncode == status, errors
    return out, errors


def end_of(place, output):
    return load_checkpoint(place / output / "unireplknet_test" / "last.pth")


@pytest.fixture
def alone(place, monkeypatch):
    """A run of one process, in this one: alone(**constants) -> its last checkpoint."""
    constants = DEFAULTS | SMALL | dict(EPOCHS=3, MIX_PROB=0.5, LEARNING_RATE=5e-4, WARMUP_EPOCHS=None)

    def run(**changed):
        for name, value in (constants | changed).items():
            monkeypatch.setattr(train, name, value)
        assert train.main() == 0
        return end_of(place, (constants | changed)["OUTPUT"])

    return run


def test_one_two_and_four_processes_learn_the_same(place, alone):
    expected = alone(ACCUMULATE=4, OUTPUT="with_1")
    for processes in (2, 4):
        output = f"with_{processes}"
        out, _ = finish(launch(processes, "--accumulate", str(4 // processes), "--output", output))
        assert out.count("best acc1") == 1  # one process reports for all
        assert f"processes   {processes}" in out and "3 an epoch, of 16 images" in out
        run = end_of(place, output)
        for row, other in zip(run["history"], expected["history"], strict=True):
            assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-2)
            assert row["train_acc1"] == pytest.approx(other["train_acc1"], abs=3.2)  # one of 32 unmixed images
        # The batch norms' statistics are those of the first process, which sees fewer batches. Adam divides by the
        # gradient's size, so that rounding becomes up to a whole step where that is tiny; 9 steps move up to 3e-3.
        names = [name for name in expected["state_dict"] if "running" not in name and "tracked" not in name]
        apart = [(run["state_dict"][name] - expected["state_dict"][name]).flatten().abs() for name in names]
        assert torch.cat(apart).median() < 1e-4
        assert run["ema_updates"] == 9


def test_validation_counts_every_image_once(place, alone):
    """Where only the head learns, and hardly so, 1 and 2 processes must give the same metrics."""
    alone(EPOCHS=1, OUTPUT="one")
    start = str(place / "one" / "unireplknet_test" / "last.pth")
    options = ["--pretrained", start, "--epochs", "1", "--learning-rate", "1e-9", "--freeze-epochs", "2"]
    finish(launch(2, *options, "--output", "two"))
    expected = alone(PRETRAINED=start, EPOCHS=1, LEARNING_RATE=1e-9, FREEZE_EPOCHS=2, OUTPUT="again")["history"][-1]
    row = end_of(place, "two")["history"][-1]
    for name in ("val_loss", "val_acc1", "val_acc5", "ema_loss", "ema_acc1"):
        assert row[name] == pytest.approx(expected[name], rel=1e-4), name


def test_two_processes_stopped_by_a_signal_resume_exactly(place, alone, capsys):
    muon = ["--optimizer", "muon"]
    finish(launch(2, "--output", "straight", *muon))
    process = launch(2, "--output", "stopped", "--save-minutes", "1e-9", *muon)
    until = time.monotonic() + 120
    while not (place / "stopped" / "unireplknet_test" / "last.pth").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "saved; resume with --resume auto" in out, errors
    finish(launch(2, "--output", "stopped", "--resume", "auto", *muon))
    assert not differences(end_of(place, "stopped"), end_of(place, "straight"))
    assert alone(OUTPUT="stopped", RESUME="auto", EPOCHS=4, OPTIMIZER="muon")["epoch"] == 4
    out = capsys.readouterr().out
    assert "processes was 2, is 1" in out and "bit-identical" in out


def test_one_killed_process_ends_the_others(place):
    process = launch(4, "--output", "killed", "--epochs", "1000")
    until = time.monotonic() + 120
    while not (place / "killed" / "unireplknet_test" / "last.pth").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    workers = [child for child in psutil.Process(process.pid).children() if "tiny.py" in " ".join(child.cmdline())]
    assert len(workers) == 4
    workers[2].kill()
    started = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - started < 60
    assert not [one for one in workers if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_an_error_on_one_process_ends_all_with_its_message(place):
    victim = sorted((place / "data" / "train" / "a").iterdir())[3]
    victim.unlink()
    victim.write_bytes(b"no image")
    process = launch(2, "--cache-gb", "0")  # with a cache, the processes find the image before they train
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    lines = [line for line in errors.splitlines() if "error: " in line]
    assert sum(victim.name in line and "cannot be read as an image" in line for line in lines) == 1
    assert all(victim.name in line or "another process of this run has ended" in line for line in lines), lines
    assert 'train.py", line' not in errors  # no traceback of the script's own


def test_muon_s_matrices_are_shared_out_among_the_processes(monkeypatch):
    matrices = [torch.randn(height, 2 * height) for height in (4, 5, 6, 7, 5)]  # one stack for each height
    settings = dict(coefficients=[(3.4445, -4.7750, 2.0315)] * 5, eps=1e-7, safety_factor=1.0)
    expected = optimizer.orthogonalise(matrices, **settings)
    monkeypatch.setattr(optimizer.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(optimizer.dist, "get_world_size", lambda: 3)
    computed = []
    for rank in range(3):
        owners = []
        monkeypatch.setattr(optimizer.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(optimizer.dist, "broadcast", lambda stack, owner, owners=owners: owners.append(owner))
        found = optimizer.orthogonalise(matrices, **settings)
        assert owners == [0, 1, 2, 0]
        computed.append([torch.equal(a, b) for a, b in zip(found, expected)])
    assert computed == [
        [True, False, False, True, False],
        [False, True, False, False, True],
        [False, False, True, False, False],
    ]


@pytest.fixture
def run_as(monkeypatch):
    """Call train.main() as process 0 of several, without the others."""

    def run(world_size, **constants):
        processes = nullcontext((torch.device("cpu"), 0, world_size))
        monkeypatch.setattr(train.distributed, "processes", lambda *_: processes)
        for name, value in (DEFAULTS | SMALL | constants).items():
            monkeypatch.setattr(train, name, value)
        train.main()

    return run


def test_synchronised_batch_norm_needs_gpus(place, run_as):
    with pytest.raises(UserError, match="SYNC_BATCH_NORM works on GPUs only; set it to False"):
        run_as(2, SYNC_BATCH_NORM=True)


def test_too_many_processes_for_the_images(place, run_as):
    with pytest.raises(UserError, match="51 training images are too few for 52 processes"):
        run_as(52)


def test_a_gpu_that_a_person_chose_is_not_exchanged_for_another(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(distributed, "choose_device", torch.device)
    with pytest.raises(ConstantError, match="DEVICE must be .* under torchrun, .* got 'cuda:3'"):
        distributed.processes("cuda:3").__enter__()
