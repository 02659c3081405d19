"""torchrun with several processes on the CPU (gloo): the same run as one process with as many pictures a step."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import DEFAULTS, ROOT, SMALL, fill_classes
from kill import differences

import makedata
import train
from common.checkpoint import load_checkpoint
from common.options import UserError

# 51 training pictures: 12 batches of 4, so 3 steps of 16 pictures an epoch.
OPTIONS = "--model unireplknet_a --img-size 32 --batch-size 4 --epochs 3 --workers 0 --device cpu".split()
OPTIONS += "--amp off --mix-prob 0.5 --optimizer adamw --learning-rate 5e-4".split()


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill_classes(tmp_path / "data1", {"a": 24, "b": 24, "c": 25})
    makedata.main()
    return tmp_path


def launch(processes, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / "train.py"), *OPTIONS, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    return subprocess.Popen(command, env=environment, **pipes)


def finish(process, status=0):
    out, errors = process.communicate(timeout=240)
    assert process.returncode == status, errors
    return out, errors


def end_of(place, output):
    return load_checkpoint(place / output / "unireplknet_a" / "last.pth")


def test_one_two_and_four_processes_learn_the_same(place):
    runs = {}
    for processes in (1, 2, 4):
        output = f"with_{processes}"
        out, _ = finish(launch(processes, "--accumulate", str(4 // processes), "--output", output))
        runs[processes] = end_of(place, output)
        assert out.count("best acc1") == 1  # one process speaks for all
        assert ("together 16 pictures a step" in out) == (processes > 1)
    alone = runs[1]
    for processes in (2, 4):
        for row, expected in zip(runs[processes]["history"], alone["history"], strict=True):
            assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-2)
            assert row["train_acc1"] == pytest.approx(expected["train_acc1"], abs=3.2)  # one of 32 unmixed pictures
        # The batch norms' statistics are those of the first process, which sees fewer batches. Adam divides by the
        # gradient's size, so that rounding becomes up to a whole step where that is tiny; 9 steps move up to 3e-3.
        names = [name for name in alone["state_dict"] if "running" not in name and "tracked" not in name]
        theirs = runs[processes]["state_dict"]
        apart = torch.cat([(theirs[name] - alone["state_dict"][name]).flatten().abs() for name in names])
        assert apart.median() < 1e-4
        assert runs[processes]["ema_updates"] == 9


def test_validation_counts_every_picture_once(place):
    """With a learning rate of 0 and no training statistics in play, 1 and 2 processes must give the same figures."""
    finish(launch(1, "--output", "one", "--epochs", "1"))
    options = ["--epochs", "2", "--learning-rate", "0", "--min-learning-rate", "0", "--freeze-epochs", "2"]
    rows = []
    for processes in (1, 2):
        output = f"with_{processes}"
        start = ["--pretrained", str(place / "one" / "unireplknet_a" / "last.pth"), "--output", output]
        finish(launch(processes, *options, *start))
        rows.append(end_of(place, output)["history"][-1])
    for name in ("val_loss", "val_acc1", "val_acc5", "ema_loss", "ema_acc1"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-5), name


def test_two_processes_stopped_by_a_signal_continue_exactly(place):
    finish(launch(2, "--output", "straight"))
    process = launch(2, "--output", "stopped", "--save-minutes", "1e-9")
    until = time.monotonic() + 120
    while not (place / "stopped" / "unireplknet_a" / "last.pth").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "saved; the same command with --resume auto goes on" in out, errors
    finish(launch(2, "--output", "stopped", "--resume", "auto"))
    assert not differences(end_of(place, "stopped"), end_of(place, "straight"))
    out, _ = finish(launch(1, "--output", "stopped", "--resume", "auto", "--epochs", "4"))
    assert "processes was 2, is 1" in out and "to the last bit" in out
    assert end_of(place, "stopped")["epoch"] == 4


def test_one_killed_process_ends_the_others(place):
    process = launch(4, "--output", "killed", "--epochs", "1000")
    until = time.monotonic() + 120
    while not (place / "killed" / "unireplknet_a" / "last.pth").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    ranks = [child for child in psutil.Process(process.pid).children() if "train.py" in " ".join(child.cmdline())]
    assert len(ranks) == 4
    ranks[2].kill()
    started = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - started < 60
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]


def test_an_error_on_one_process_ends_all_with_its_message(place):
    victim = sorted((place / "data" / "train" / "a").iterdir())[3]
    victim.unlink()
    victim.write_bytes(b"no picture")
    process = launch(2, "--cache-gb", "0")  # with a cache, the processes find the picture before they train
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    lines = [line for line in errors.splitlines() if "error: " in line]
    assert sum(victim.name in line and "cannot be read as a picture" in line for line in lines) == 1
    assert all(victim.name in line or "another process of this run has ended" in line for line in lines), lines
    assert 'train.py", line' not in errors  # no traceback of the script's own


def test_synchronised_batch_norm_needs_gpus(place, monkeypatch):
    for name, value in (DEFAULTS | SMALL | dict(SYNC_BATCH_NORM=True)).items():
        monkeypatch.setattr(train, name, value)
    with pytest.raises(UserError, match="SYNC_BATCH_NORM works on GPUs only; set it to False"):
        train.train(torch.device("cpu"), rank=0, ranks=2)


def test_too_many_processes_for_the_pictures(place, monkeypatch):
    for name, value in (DEFAULTS | SMALL).items():
        monkeypatch.setattr(train, name, value)
    with pytest.raises(UserError, match="holds 51 pictures, too few for 52 processes"):
        train.train(torch.device("cpu"), rank=0, ranks=52)
