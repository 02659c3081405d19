"""What breaks a run, and what train.py must do about it: one test for each fault."""

import csv
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial, partialmethod
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from faulty import FAULTS, Faulty, read_all
from forked import start_training
from kill import differences, kill_and_compare
from tqdm import tqdm

import train
from common import checkpoint, faults, run_folder
from common.augment import BatchMixup
from common.checkpoint import load_checkpoint, load_file, load_newest, save_checkpoint
from common.faults import Interrupt, first_non_finite_layer, is_out_of_memory
from common.images import ImageError, load_image
from common.loading import Loader, message_of
from common.options import UserError, end_processes
from common.output import guard_output
from common.workers import StoodStill, map_in_processes, watched

# 21 training images: 5 batches of 4, so 3 steps an epoch; enough randomness to notice a step that is not repeated.
RUN = dict(EPOCHS=3, ACCUMULATE=2, MIX_PROB=0.7, DROP_PATH=0.3)
OPTIONS = "--model unireplknet_test --img-size 32 --batch-size 4 --workers 0 --device cpu --amp off".split()
OPTIONS += ["--optimizer", "adamw"]


STRAIGHT = []


@pytest.fixture(autouse=True)
def nothing_left_by_others():
    """Processes that tests before this one have left running, such as those of a loader in a kept traceback, end."""
    end_processes()


@pytest.fixture
def straight(run_train):
    """The end of RUN when nothing happens, the same for each test."""
    if not STRAIGHT:
        STRAIGHT.append(load_checkpoint(run_train(**RUN, OUTPUT="straight") / "last.pth"))
    return STRAIGHT[0]


def at_step(monkeypatch, numbers, action):
    """Call `action(parameters)` after the gradients of the steps `numbers` (from 1, over all epochs) are computed."""
    original, steps = torch.nn.utils.clip_grad_norm_, []

    def clip_grad_norm_(parameters, max_norm):
        parameters = list(parameters)
        steps.append(1)
        if len(steps) in numbers:
            action(parameters)
        return original(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_grad_norm_)


def start(folder, *words, **options):
    """train.py as a process of its own, see `Forked`."""
    return start_training(folder, *OPTIONS, *words, **options)


def wait_for(path, run, seconds=120):
    until = time.monotonic() + seconds
    while not path.exists():
        assert run.poll() is None and time.monotonic() < until, run.communicate()
        time.sleep(0.02)


# --- interruptions


def test_killed_while_training_and_while_saving_the_run_ends_the_same(place):
    different, kills = kill_and_compare(place, kills=2, epochs=2)
    assert (different, kills) == ([], 2)


ASKED = [(signal.SIGTERM, 143, 2), (signal.SIGTERM, 143, 3), (signal.SIGINT, 130, 5), (signal.SIGINT, 130, 3)]
ASKED += [(signal.SIGHUP, 129, 2)] if hasattr(signal, "SIGHUP") else []


@pytest.mark.parametrize(("number", "status", "step"), ASKED)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    number, status, step, run_train, straight, monkeypatch, capsys
):
    before = signal.getsignal(signal.SIGINT)
    at_step(monkeypatch, {step}, lambda _: os.kill(os.getpid(), number))
    folder = run_train(status, **RUN)
    saved = load_checkpoint(folder / "last.pth")
    # A signal in an epoch's last step (3) stops the validation; the epoch counts as not finished.
    assert saved["epoch"] == (step - 1) // 3 and saved["pictures"] == 8 * (step - 3 * saved["epoch"])
    assert "resume with --resume auto" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    monkeypatch.chdir(folder.parent.parent)
    assert not differences(load_checkpoint(run_train(**RUN, RESUME="auto") / "last.pth"), straight)


@pytest.mark.parametrize("epoch", [0, 2])  # after the last one, no step is left that would set anything anew
def test_a_signal_during_validation_does_not_lose_the_epoch(epoch, run_train, straight, monkeypatch):
    original, calls = train.validate, []

    def validate(*arguments):
        calls.append(1)
        if len(calls) == 2 * epoch + 1:  # an epoch validates the weights and their EMA
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(train, "validate", validate)
    folder = run_train(143, **RUN)
    saved = load_checkpoint(folder / "last.pth")
    assert saved["epoch"] == epoch and saved["pictures"] == 24
    assert not differences(load_checkpoint(run_train(**RUN, RESUME="auto") / "last.pth"), straight)


posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no signals between processes")

# A process that computes in C, as PyTorch does, and looks at Python's signals only in between.
BUSY = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from common.faults import Interrupt
with Interrupt() as interrupt:
    while not interrupt.signal:
        print("busy", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(float(sys.argv[2])))
    sys.exit(interrupt.exit_status)
"""


def start_busy(seconds):
    """Start `BUSY`, which looks at signals after about `seconds`, measured on this machine."""
    began = time.perf_counter()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
    iterations = min(1e5 * seconds / (time.perf_counter() - began), 2e9)  # OpenSSL takes no more
    command = [sys.executable, "-c", BUSY, str(ROOT), str(iterations)]
    busy = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert busy.stdout.readline() == "busy\n", busy.communicate()
    return busy


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_answered_at_once_and_the_second_ends_at_once(number):
    busy = start_busy(600)
    # Whoever starts several processes may pass a signal on to them that they have received themselves.
    for _ in range(3):
        busy.send_signal(number)
        time.sleep(0.05)
    assert busy.stderr.readline() == "\n"
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    answer = busy.stderr.readline()
    assert answer.startswith(f"{name} received; finishing this step") and "another" in answer and "without" in answer
    time.sleep(1.1)
    assert busy.poll() is None
    busy.send_signal(number)
    out, errors = busy.communicate(timeout=30)
    assert busy.returncode == 128 + number and "ended at once" in errors and "Traceback" not in errors


@posix
def test_a_closed_terminal_that_sends_sighup_twice_ends_nothing_at_once():
    busy = start_busy(3)
    for _ in range(3):
        busy.send_signal(signal.SIGHUP)
        time.sleep(0.3)
    out, errors = busy.communicate(timeout=60)
    assert busy.returncode == 129 and errors.count("SIGHUP received") == 1


@posix
def test_sighup_that_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert interrupt.signal is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupt.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@posix
def test_ctrl_c_in_a_terminal_reaches_the_workers_too_and_the_run_still_saves(place):
    run = start(place, "--epochs", "1000", "--workers", "2", session=True)
    wait_for(place / "checkpoints" / "unireplknet_test" / "last.pth", run)
    os.killpg(run.pid, signal.SIGINT)
    out, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and "saved" in out and "Traceback" not in errors, errors
    assert "Ctrl-C received; finishing this step" in errors
    assert left_of(run) == []


def left_of(run):
    """Command lines of the processes of a run that was started in a session of its own."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == run.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


@posix
def test_a_closed_terminal_ends_no_run(place):
    """Its output fails from then on, as after `nohup`, or in a session of its own, which gets no SIGHUP."""
    master, terminal = os.openpty()
    run = start(place, "--epochs", "3", "--save-minutes", "1e-9", session=True, terminal=terminal)
    os.close(terminal)
    folder = place / "checkpoints" / "unireplknet_test"
    until = time.monotonic() + 120
    while not (folder / "last.pth").exists():
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    os.close(master)
    assert run.wait(timeout=120) == 0
    assert load_checkpoint(folder / "last.pth")["epoch"] == 3


@posix
@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_output_that_nobody_receives_is_dropped(kind, monkeypatch):
    other, end = os.openpty() if kind == "terminal" else os.pipe()
    lost = open(end, "w", encoding="utf-8", buffering=1)
    monkeypatch.setattr(sys, "stdout", lost)
    monkeypatch.setattr(sys, "stderr", lost)
    print("heard")
    with guard_output("ignore"):
        assert sys.stdout.isatty() == (kind == "terminal") and sys.stdout.encoding == "utf-8"
        os.close(other)
        print("lost")
        with tqdm(total=2) as bar:
            bar.update()
            bar.write("a line")
        print("lost, too", file=sys.stderr, flush=True)
    assert sys.stdout is lost
    lost.close()  # what it still holds is no error either, as it would be when Python ends


def test_metrics_that_are_not_finite_make_no_best_checkpoint(run_train, monkeypatch):
    original, results = train.validate, []

    def validate(*arguments):
        metrics, labels, predictions = original(*arguments)
        results.append(metrics["acc1"])
        if len(results) in (1, 3):
            metrics = dict(metrics, loss=float("nan"), acc1=100.0)
        return metrics, labels, predictions

    monkeypatch.setattr(train, "validate", validate)
    folder = run_train(EPOCHS=3, EMA_DECAY=0.0)
    assert load_checkpoint(folder / "best.pth")["epoch"] == 2
    assert load_checkpoint(folder / "last.pth")["best_acc1"] == results[1]


def test_a_finished_run_that_is_continued_stays_as_it_is(run_train, straight, capsys):
    folder = run_train(**RUN)
    before = (folder / "last.pth").read_bytes()
    capsys.readouterr()
    run_train(**RUN, RESUME="auto")
    assert (folder / "last.pth").read_bytes() == before
    assert "best acc1" in capsys.readouterr().out


# --- processes that read images


def test_the_table_of_faults_has_many_members():
    print(f"{len(FAULTS) - 1} faults of reading processes")
    assert len(FAULTS) >= 15


@posix
@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "anew"])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_happens_to_a_reading_process_is_one_sentence_and_leaves_nothing_running(fault, persistent, capfd):
    _, error, words = FAULTS[fault]
    if error is None:
        loader, indices = read_all(fault, persistent, "fork")
        assert indices == [*range(64)] * 2
        loader.close()
    else:
        with pytest.raises(error, match=words) as caught:
            read_all(fault, persistent, "fork")
        if isinstance(caught.value, (UserError, OSError)):
            assert "Traceback" not in str(caught.value) and "Traceback" not in capfd.readouterr().err
    if fault == "stands still":  # on a busy machine it may still be starting them, which a script's end ends
        end_processes()
    assert multiprocessing.active_children() == []
    assert [child for child in psutil.Process().children() if child.name() == "pt_data_worker"] == []


@posix
def test_processes_that_are_spawned_end_alike():
    _, error, words = FAULTS["broken image"]
    with pytest.raises(error, match=words):
        read_all("broken image", method="spawn")
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("fault", ["broken image", "memory", "no file", "a bug"])
def test_without_processes_the_errors_are_the_same(fault):
    _, error, words = FAULTS[fault]
    with pytest.raises(error, match="x" if fault == "a bug" else words):
        read_all(fault, workers=0)


def test_a_pass_that_is_given_up_leaves_nothing_running_and_the_next_one_begins_anew():
    loader = Loader(Faulty("none"), 4, num_workers=2, persistent_workers=True)
    for _, labels in loader:
        break
    assert multiprocessing.active_children() == []
    assert [index for _, labels in loader for index in labels.tolist()] == [*range(64)]
    loader.close()


@posix
def test_a_process_ends_with_its_parent_whatever_kills_that():
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from common.workers import map_in_processes\n"
        "print('ready', flush=True)\n"
        "list(map_in_processes(time.sleep, [1000] * 40, 2, 'files'))\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, ROOT], stdout=subprocess.PIPE, start_new_session=True, text=True
    )
    run.stdout.readline()
    until = time.monotonic() + 60
    while len(left_of(run)) < 3:
        assert time.monotonic() < until
        time.sleep(0.05)
    run.kill()
    run.wait()
    while left_of(run):
        assert time.monotonic() < until, left_of(run)
        time.sleep(0.05)


@posix
@pytest.mark.parametrize("how", ["killed", "error", "given up"])
def test_a_pool_of_processes_leaves_nothing_running(how):
    action = dict(killed=kill_at_21, error=fail_at_21).get(how, abs)
    results = map_in_processes(action, range(64), 2, "files")
    if how == "given up":
        assert next(results) == 0
        results.close()
    else:
        error, words = (UserError, "SIGKILL|killed.*WORKERS") if how == "killed" else (UserError, "the 21st")
        with pytest.raises(error, match=words):
            list(results)
    until = time.monotonic() + 30
    while multiprocessing.active_children():
        assert time.monotonic() < until
        time.sleep(0.02)
    assert list(map_in_processes(abs, range(-64, 0), 2, "files")) == [*range(64, 0, -1)]


def kill_at_21(number):
    if number == 21:
        os.kill(os.getpid(), 9)


def fail_at_21(number):
    if number == 21:
        raise UserError("the 21st")


@posix
def test_a_small_shared_memory_is_named():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; __file__ = 'x'\n"
        "from faulty import Faulty\n"
        "from common.loading import Loader\n"
        "from common.options import run\n"
        "def main():\n"
        "    list(Loader(Faulty('none'), 32, num_workers=2))\n"
        "run.__globals__['set_constants'] = lambda *_: {}\n"
        "run.__globals__['script_name'] = lambda *_: 'x'\n"
        "run(main)\n"
    )
    shell = 'mount -t tmpfs -o size=16k tmpfs /dev/shm && exec "$@"'
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a /dev/shm of its own needs root on Linux")
    command = ["unshare", "-m", "sh", "-c", shell, "sh", sys.executable, "-c", code, ROOT, ROOT / "tests"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = subprocess.Popen(command, start_new_session=True, **pipes)
    out, errors = run.communicate(timeout=120)
    assert run.returncode == 1 and "error: the shared memory is full" in errors and "Traceback" not in errors, errors
    assert "WORKERS to 0" in errors and "--shm-size" in errors
    assert left_of(run) == []


@posix
def test_a_broken_image_beside_workers_ends_the_run_with_its_sentence(place):
    victim = sorted((place / "data" / "train" / "Maize").iterdir())[0]
    victim.unlink()
    victim.write_bytes(b"garbage")
    run = start(place, "--workers", "2", "--cache-gb", "0", session=True)
    out, errors = run.communicate(timeout=120)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert run.returncode == 1 and len(lines) == 1 and victim.name in lines[0] and "Traceback" not in errors, errors
    assert left_of(run) == []


def test_the_message_of_an_error_survives_the_way_out_of_a_process():
    for message in ("plain", "a.jpg cannot be read (OSError: cut off)", "one\ntwo: three", "ImageError: x", "中文 图"):
        try:
            raise ImageError(message)
        except ImageError:
            from torch._utils import ExceptionWrapper

            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
        with pytest.raises(ImageError) as caught:
            wrapped.reraise()
        assert message_of(caught.value) == message != str(caught.value)
        assert message_of(ImageError(message)) == message


# --- readers that stand still


@pytest.fixture
def stand_still(monkeypatch):
    """stand_still(epoch, workers): let whoever reads its 6th image of that epoch stand still until the test ends."""
    test_ended = threading.Event()

    def patch(epoch, workers):
        original, reads = train.SeededImages.__getitem__, []

        def read(dataset, key):
            reads.append(key[0])
            if reads.count(epoch) == 6:
                Path("standing").touch()
                os.kill(os.getpid(), signal.SIGSTOP) if workers else test_ended.wait()
            return original(dataset, key)

        monkeypatch.setattr(train.SeededImages, "__getitem__", read)

    yield patch
    test_ended.set()


@posix
@pytest.mark.parametrize("workers", [0, 2])
def test_a_reader_that_stands_still_is_named_and_the_run_saves_and_stops(
    workers, run_train, straight, stand_still, monkeypatch, capsys
):
    monkeypatch.setattr("common.workers.SAY_SECONDS", 0.5)
    stand_still(2, workers)
    with pytest.raises(StoodStill, match="nothing came for 0.1 minutes while waiting for training images"):
        run_train(**RUN, WORKERS=workers, WAIT_MINUTES=0.1)
    out, errors = capsys.readouterr()
    assert "saved, and resumed by --resume auto" in out and errors.count("waiting for training images for") >= 3
    assert end_processes() == [] == multiprocessing.active_children()
    folder = Path.cwd()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert not differences(load_checkpoint(run_train(**RUN, RESUME="auto") / "last.pth"), straight)


@posix
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_while_a_reader_stands_still_saves_and_stops(workers, run_train, straight, stand_still, monkeypatch):
    stand_still(2, workers)
    main = os.getpid()
    monkeypatch.setattr(Loader, "look", partialmethod(signal_once, Loader.look, main))
    folder = run_train(143, **RUN, WORKERS=workers, WAIT_MINUTES=0.0)
    saved = load_checkpoint(folder / "last.pth")
    assert saved["epoch"] == 1 and multiprocessing.active_children() == []
    monkeypatch.undo()
    monkeypatch.chdir(folder.parent.parent)
    assert not differences(load_checkpoint(run_train(**RUN, RESUME="auto") / "last.pth"), straight)


def signal_once(loader, look, main):
    if Path("standing").exists():
        os.kill(main, signal.SIGTERM)
    look(loader)


def test_watched_reads_in_order_and_only_while_it_is_waited_for():
    inside, seen = [], []

    def numbers():
        for number in range(50):
            inside.append(1)
            time.sleep(0.001)
            inside.pop()
            yield number

    for number in watched(numbers, "numbers"):
        assert not inside
        time.sleep(0.001)
        assert not inside
        seen.append(number)
    assert seen == [*range(50)]
    with pytest.raises(ZeroDivisionError):
        list(watched(lambda: (1 // number for number in (1, 0)), "numbers"))


# --- files


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "one bit":
        content[len(content) // 2] ^= 4
    elif how == "zeros":
        content[len(content) // 3 : len(content) // 3 + 4096] = bytes(4096)
    else:
        content = b""
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "one bit", "zeros", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(how, run_train, straight, capsys):
    folder = run_train(**RUN)
    damage(folder / "last.pth", how)
    folder = run_train(**RUN, RESUME="auto")
    out = capsys.readouterr().out
    assert f"{Path('checkpoints/unireplknet_test/last.pth')} is damaged" in out and "2 epochs finished" in out
    assert not differences(load_checkpoint(folder / "last.pth"), straight)


def test_if_every_checkpoint_is_damaged_nothing_is_overwritten(run_train):
    folder = run_train(**RUN)
    for name in ("last.pth", "last.1.pth"):
        damage(folder / name, "one bit")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match="last.1.pth is damaged"):
        run_train(**RUN, RESUME="auto")
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_any_single_bit_is_noticed_or_harmless(tmp_path):
    tensors = dict(weight=torch.arange(600.0).reshape(20, 30), names=["a", "b"], epoch=3)
    save_checkpoint(tensors, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    noticed = 0
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        (tmp_path / "y.pth").write_bytes(changed)
        try:
            loaded = load_file(tmp_path / "y.pth")
        except UserError:
            noticed += 1
            continue
        assert torch.equal(loaded.pop("weight"), tensors["weight"])
        assert loaded == dict(names=["a", "b"], epoch=3)
    assert noticed > 300  # the 2,400 bytes of the tensor alone


def test_the_newest_checkpoints_are_kept(run_train):
    folder = run_train(EPOCHS=4)
    epochs = {file.name: load_checkpoint(file)["epoch"] for file in folder.glob("last*.pth")}
    assert epochs == {"last.pth": 4, "last.1.pth": 3}
    assert load_newest(folder / "last.pth")[1] == folder / "last.pth"
    (folder / "last.pth").unlink()  # killed between the renames
    assert load_newest(folder / "last.pth")[0]["epoch"] == 3


def test_a_failed_save_leaves_the_file_before_it(tmp_path):
    path = tmp_path / "last.pth"
    save_checkpoint(dict(epoch=1), path, keep=2)
    with pytest.raises((AttributeError, TypeError)):
        save_checkpoint(dict(epoch=2, tensor=torch.zeros(3), broken=(n for n in "x")), path, keep=2)
    assert torch.load(path, weights_only=True) == dict(epoch=1)


@contextmanager
def file_system(folder, options):
    """A file system of its own at `folder`; skips the test where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root on Linux")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_the_last_checkpoint_stays_whole(place):
    disk = place / "disk"
    with file_system(disk, "size=8m"):  # each checkpoint takes about 1 MB
        filler = disk / "filler"
        run = start(place, "--epochs", "1000", "--output", str(disk), "--resume", "auto")
        folder = disk / "unireplknet_test"
        wait_for(folder / "log.csv", run)
        with open(filler, "wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
                    file.flush()
            except OSError:
                pass
            else:
                pytest.fail("the disk is not full")
        out, errors = run.communicate(timeout=60)
        assert run.returncode == 1 and "Traceback" not in errors
        assert "No space left on device" in errors and "make room on the disk" in errors.lower(), errors
        assert load_newest(folder / "last.pth")[0]["epoch"] >= 1
        assert not list(folder.glob("*.part"))
        filler.unlink()
        run = start(place, "--epochs", "2", "--output", str(disk), "--resume", "auto")
        out, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors


@pytest.mark.skipif(os.name != "posix", reason="Windows has no limit on the size of files")
def test_a_quota_stops_the_save_and_the_file_before_it_stays(tmp_path):
    code = (
        "import resource, sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from common import checkpoint; from common.checkpoint import save_checkpoint\n"
        "checkpoint.PAUSES = (0.01,)\n"
        "save_checkpoint(dict(epoch=1), 'last.pth')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "save_checkpoint(dict(epoch=2, weight=torch.zeros(100_000)), 'last.pth')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True)
    assert "SaveError: cannot save last.pth (File too large)" in done.stderr
    assert load_file(tmp_path / "last.pth") == dict(epoch=1)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


def test_a_read_only_folder_is_named(place):
    disk = place / "disk"
    with file_system(disk, "size=1m,ro"):
        out, errors = start(place, "--epochs", "1", "--output", str(disk)).communicate(timeout=120)
        assert errors.strip().splitlines()[-1].startswith("error:") and "Read-only" in errors and "disk" in errors
        assert "Traceback" not in errors


# --- files for people


def block(path):
    """Put a folder that is not empty in the place of a file."""
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "inside").touch()


def read_side_files(folder):
    """{name: content} of a run's files for people, without times and OUTPUT."""
    texts = [name for name in SIDE_FILES if name.endswith((".json", ".txt"))]
    files = {name: (folder / name).read_text(encoding="utf-8") for name in texts}
    files["result.json"] = files["result.json"].replace(f'"{folder.parent.name}"', '"output"')
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        files["log.csv"] = [
            {name: cell for name, cell in row.items() if name not in ("seconds", "img_per_s")}
            for row in csv.DictReader(file)
        ]
    return files


SIDE_FILES = ("class_indices.json", "result.json", "classification_report.txt", "log.csv", "loss.png", "acc.png")


def test_side_files_that_fail_end_nothing_and_are_written_as_soon_as_possible(
    run_train, straight, monkeypatch, capsys, learning_curves, place
):
    expected = read_side_files(run_train(**RUN, OUTPUT="straight"))
    folder = place / "checkpoints" / "unireplknet_test"

    def hinder(_):
        if not (folder / "log.csv").is_dir():
            for name in SIDE_FILES:
                block(folder / name)
        else:
            shutil.rmtree(folder / "log.csv")

    at_step(monkeypatch, {4, 8}, hinder)
    run_train(**RUN)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 5 and len([line for line in warnings if "Is a directory" in line or os.name == "nt"]) == 5
    assert all(sum(name in line for line in warnings) == 1 for name in SIDE_FILES if name != "loss.png")
    assert not differences(load_checkpoint(folder / "last.pth"), straight)
    assert (folder / "log.csv").is_file() and (folder / "loss.png").is_dir()
    for name in SIDE_FILES:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    run_train(**RUN, RESUME="auto")  # the run is finished
    out = capsys.readouterr().out
    assert expected["classification_report.txt"] in out and "warning" not in out
    assert read_side_files(folder) == expected
    assert all((folder / name).stat().st_size > 1000 for name in ("loss.png", "acc.png"))


@pytest.mark.parametrize("name", ["plot_curves", "classification_report", "write_json", "write_csv", "write_text"])
def test_whatever_fails_in_a_report_the_run_ends_well(name, run_train, straight, monkeypatch, capsys):
    def fail(*_, **__):
        raise MemoryError

    module = "sklearn.metrics" if name == "classification_report" else "common.run_folder"
    monkeypatch.setattr(f"{module}.{name}", fail)
    folder = run_train(**RUN)
    warned = sum(line.startswith("warning: cannot write") for line in capsys.readouterr().out.splitlines())
    assert warned == (2 if name == "write_json" else 1)
    assert not differences(load_checkpoint(folder / "last.pth"), straight)


# --- checkpoints that cannot be saved at once


def fail_often(monkeypatch, module, name, numbers, error):
    """Let the calls `numbers` (from 1) of a function fail, or each from one number on."""
    original, calls = getattr(module, name), []

    def call(*arguments, **options):
        calls.append(1)
        if len(calls) in numbers:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE, errno.EIO, errno.ENOSPC, errno.EBUSY])
@pytest.mark.parametrize(("module", "name"), [(os, "replace"), (os, "fsync"), (torch, "save")])
@pytest.mark.parametrize("first", range(1, 7))
def test_a_checkpoint_that_cannot_be_saved_is_tried_again(first, module, name, code, tmp_path, monkeypatch, capsys):
    path, pauses = tmp_path / "last.pth", []
    for epoch in (1, 2, 3):
        save_checkpoint(dict(epoch=epoch), path, keep=3)
    monkeypatch.setattr(checkpoint.time, "sleep", pauses.append)
    fail_often(monkeypatch, module, name, range(first, first + 4), OSError(code, os.strerror(code)))
    for epoch in (4, 5):
        save_checkpoint(dict(epoch=epoch, tensor=torch.zeros(3)), path, keep=3)
    assert [load_file(tmp_path / f"last{number}.pth")["epoch"] for number in ("", ".1", ".2")] == [5, 4, 3]
    assert pauses == sorted(pauses) or len(pauses) < 4
    assert capsys.readouterr().out.count(os.strerror(code)) <= 2
    assert len(list(tmp_path.iterdir())) == 3


def test_after_half_a_minute_one_sentence_ends_the_run(tmp_path, monkeypatch, capsys):
    path, pauses = tmp_path / "last.pth", []
    save_checkpoint(dict(epoch=1), path)
    monkeypatch.setattr(checkpoint.time, "sleep", pauses.append)
    fail_often(monkeypatch, os, "replace", range(1, 100), PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(checkpoint.SaveError, match="cannot save .*last.pth .Permission denied.; what was saved before"):
        save_checkpoint(dict(epoch=2), path)
    assert 20 < sum(pauses) < 60 and pauses == sorted(pauses)
    assert capsys.readouterr().out.count("\n") == 1
    assert load_file(path) == dict(epoch=1) and len(list(tmp_path.iterdir())) == 1
    pauses.clear()
    fail_often(monkeypatch, torch, "save", [1], RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(checkpoint.SaveError, match="device-side assert"):
        save_checkpoint(dict(epoch=2), path)
    assert pauses == []  # waiting does not help


# --- errors inside an epoch of three steps, two batches each (the last one has one)


@pytest.mark.parametrize(
    ("module", "name", "numbers", "error", "images"),
    [
        # module, function, the calls of it that fail (those in the second step of the second epoch), images saved
        (train.SeededImages, "__getitem__", [33], ImageError("a.png cannot be read as an image"), 8),
        (train.SeededImages, "__getitem__", [29], OSError(errno.EIO, "Input/output error", "a.png"), 8),
        (train, "prepare_batch", [9], KeyError("a mistake"), 8),
        (train, "measure", [9], RuntimeError("CUDA error: unspecified launch failure"), 8),
        (torch.nn.utils, "clip_grad_norm_", [5], MemoryError(), 8),
        (train.distributed, "total", [6], RuntimeError("gloo: connection closed by peer"), 16),
        (train, "validate", [3], ImageError("b.png cannot be read as an image"), 24),
        (train, "validate", [4], ZeroDivisionError(), 24),
        (train.RunFolder, "is_best", [2], TypeError("a mistake"), 24),
        (torch.optim.AdamW, "step", [5], RuntimeError("CUDA out of memory, but too late"), None),
        (train.ModelEma, "update", [5], RuntimeError("a mistake"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value if isinstance(value, str) else "",
)
def test_an_error_inside_an_epoch_saves_what_was_trained_before_it(
    module, name, numbers, error, images, run_train, straight, monkeypatch, capsys, place
):
    with monkeypatch.context() as patch:
        fail_often(patch, module, name, numbers, error)
        with pytest.raises((type(error), UserError)) as raised:
            run_train(**RUN)
    assert raised.value is error or raised.value.__cause__ is error
    folder, out = place / "checkpoints" / "unireplknet_test", capsys.readouterr().out
    saved = load_checkpoint(folder / "last.pth")
    assert (saved["epoch"], saved["pictures"], saved["pieces"]) == (1, images or 0, 1)
    assert ("an error ends the run in epoch 2; it is saved" in out) == (images is not None)
    assert ("while the weights change" in out) == (images is None)
    assert not differences(load_checkpoint(run_train(**RUN, RESUME="auto") / "last.pth"), straight)


def test_memory_that_is_full_for_good_is_no_setting_of_the_resumed_run(run_train, monkeypatch, place):
    fail_often(monkeypatch, train, "measure", range(3, 99), torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(UserError, match="lower BATCH_SIZE"):
        run_train(EPOCHS=1, IMG_SIZE=64)
    saved = load_checkpoint(place / "checkpoints" / "unireplknet_test" / "last.pth")
    assert (saved["pictures"], saved["pieces"]) == (8, 1)


def test_an_error_before_anything_new_was_trained_saves_nothing(run_train, monkeypatch, place):
    folder = place / "checkpoints" / "unireplknet_test"
    for options in (dict(), dict(RESUME="auto")):
        with monkeypatch.context() as patch:
            fail_often(patch, train, "prepare_batch", [6 if options == {} else 1], KeyError("a mistake"))
            with pytest.raises(KeyError):
                run_train(**RUN | options)
        assert load_checkpoint(folder / "last.pth")["epoch"] == 1 and not (folder / "last.1.pth").exists()


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_save_that_fails_hides_no_error(name, run_train, monkeypatch, place, capsys):
    def fail(*_, **__):
        monkeypatch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        raise KeyError("the first error")

    monkeypatch.setattr(checkpoint, "PAUSES", ())
    monkeypatch.setattr(train, "validate", fail)
    with pytest.raises(KeyError, match="the first error"):
        run_train(**RUN)
    assert "it cannot be saved (cannot save" in capsys.readouterr().out


# --- a process that ends between two file operations


class Killed(BaseException):
    """Ends a run as SIGKILL does: after it, no file operation succeeds."""


def kill_at(monkeypatch, number):
    """Let file operation `number` (from 1), and all after it, raise `Killed`; returns the list of those before it."""
    done = []

    def patch(module, name):
        original = getattr(module, name)

        def operate(*arguments, **options):
            if len(done) + 1 >= number:
                raise Killed
            done.append(f"{name} {Path(arguments[-1] if name == 'replace' else str(arguments[0])).name}")
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, operate)

    for name in ("replace", "fsync", "open"):
        patch(os, name)
    patch(torch, "save")
    patch(Path, "unlink")
    patch(Path, "write_text")
    return done


class OneEpoch:
    """A run of a network of two weights, of which only the end of each epoch happens."""

    def __init__(self, path):
        self.path = path
        self.folder = run_folder.RunFolder(path.parent, path.name, "auto", 0)
        model = torch.nn.Linear(1, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        self.state = run_folder.TrainingState(model, None, optimizer, torch.amp.GradScaler("cpu", enabled=False))
        about = dict.fromkeys(("arch", "model_args", "mean", "std", "config", "versions", "pictures_train"), 1)
        self.folder.about, self.folder.clock = about | dict(classes=["a", "b"]), Mock()
        path.mkdir(parents=True, exist_ok=True)
        saved, _ = load_newest(path / "last.pth", check=id)
        if saved is not None:
            self.state.load(saved, path)
        self.folder.print_history(self.state)

    def finish_epochs(self, epochs):
        for epoch in range(self.state.epoch, epochs):
            torch.nn.init.constant_(self.state.model.weight, epoch + 1)
            self.state.img_size = 32
            results = dict(loss=1.0, acc1=[50.0, 75.0, 60.0][epoch], acc5=100.0)
            validation = dict(val=(results, [0, 0, 1, 1], [0, epoch % 2, 1, 1]))
            self.folder.finish_epoch(self.state, dict(lr=0.1, train_loss=1.0), validation, 0.0, 32)
        return self


def test_a_run_that_is_killed_between_two_file_operations_ends_the_same(tmp_path, monkeypatch):
    def plot_curves(history, folder):
        (folder / "loss.png").write_text(str(history))

    monkeypatch.setattr(run_folder, "plot_curves", plot_curves)
    monkeypatch.setattr(run_folder.time, "perf_counter", lambda: 0.0)
    straight = OneEpoch(tmp_path / "straight").finish_epochs(3).path
    names = {file.name for file in straight.iterdir()}
    assert {"last.pth", "last.1.pth", "best.pth", "result.json", "log.csv"} < names
    points = states = 0
    while True:
        path = tmp_path / f"killed{points}"
        OneEpoch(path).finish_epochs(1)
        with monkeypatch.context() as patch:
            done = kill_at(patch, points + 1)
            try:
                OneEpoch(path).finish_epochs(2)
                break
            except Killed:
                points += 1
        saved, _ = load_newest(path / "last.pth", check=id)
        best = load_checkpoint(path / "best.pth", check=id)
        assert saved["epoch"] in (1, 2) and best["epoch"] >= saved["best"]["result"]["epoch"]
        states += best["epoch"] == 2 and saved["epoch"] == 1  # best.pth is written, last.pth is not
        OneEpoch(path).finish_epochs(3)
        assert {file.name for file in path.iterdir() if file.suffix != ".part"} == names
        for name in names:
            if name.endswith(".pth"):
                one, other = (load_checkpoint(folder / name, check=id) for folder in (path, straight))
                assert torch.equal(one["best"].pop("cells"), other["best"].pop("cells"))
                assert torch.equal(one["state_dict"].pop("weight"), other["state_dict"].pop("weight"))
                assert all(one[part] == other[part] for part in ("epoch", "history", "best"))
            else:
                assert (path / name).read_bytes() == (straight / name).read_bytes(), (done, name)
        assert json.loads((path / "result.json").read_text(encoding="utf-8"))["epoch"] == 2
    assert points > 20 and states > 3


# --- two runs at once


HOLD = "import sys, time; sys.path.insert(0, sys.argv[1]); from common.run_folder import lock\n"
HOLD += "held = lock(sys.argv[2]); held.__enter__(); print('held', flush=True); time.sleep(600)"


def test_two_runs_in_one_folder_are_refused_and_a_crash_frees_the_folder(run_train, place):
    folder = Path("checkpoints", "unireplknet_test")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, ROOT, folder], cwd=place, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline().strip() == b"held"
        with pytest.raises(UserError, match="another run is training in"):
            run_train(EPOCHS=1)
        assert not folder.exists()
    finally:
        holder.kill()
        holder.wait()
    run_train(EPOCHS=1)


# --- numbers


def poison_loss(monkeypatch, steps):
    """Make the loss NaN in some steps (from 1, over all epochs)."""
    original, calls = F.cross_entropy, []

    def cross_entropy(logits, target, **options):
        loss = original(logits, target, **options)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) in steps:
                return loss * float("nan")
        return loss

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)


def poison_gradient(monkeypatch, steps):
    def poison(parameters):
        parameters[-2].grad[0, 0] = float("inf")

    at_step(monkeypatch, steps, poison)


def poison_input(monkeypatch, steps):
    original, calls = BatchMixup.__call__, []

    def mix(mixup, images, labels):
        calls.append(1)
        images, targets = original(mixup, images, labels)
        return (images * float("nan") if len(calls) in steps else images), targets

    monkeypatch.setattr(BatchMixup, "__call__", mix)


@pytest.mark.parametrize("poison", [poison_loss, poison_gradient, poison_input], ids=lambda f: f.__name__)
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_step_that_is_not_finite_reaches_nothing(poison, amp, run_train, monkeypatch, capsys):
    before, models = [], []
    create, cut = train.create_network, train.micro_batches

    def create_network(*arguments):
        models.append(create(*arguments))
        return models[0]

    def micro_batches(*arguments):
        before.append({name: tensor.clone() for name, tensor in models[0][0].state_dict().items()})
        return cut(*arguments)

    monkeypatch.setattr(train, "create_network", create_network)
    monkeypatch.setattr(train, "micro_batches", micro_batches)
    poison(monkeypatch, {3})
    folder = run_train(EPOCHS=1, AMP=amp)  # 5 steps
    saved = load_checkpoint(folder / "last.pth")
    # In fp16 an infinite gradient with a finite loss is the scaler's way to find its scale, and no alarm; the batch
    # norms keep what they saw.
    alarm = (poison, amp) != (poison_gradient, "fp16")
    unchanged = before[2] if alarm else [name for name in before[2] if "running" not in name and "tracked" not in name]
    assert all(torch.equal(before[2][name], before[3][name]) for name in unchanged)
    if amp != "fp16":
        assert not torch.equal(before[3]["head.weight"], before[4]["head.weight"])
    assert all(tensor.isfinite().all() for part in ("state_dict", "state_dict_ema") for tensor in saved[part].values())
    assert torch.isfinite(torch.tensor(saved["history"][0]["train_loss"]))
    assert saved["history"][0]["skipped"] == alarm
    assert ("step 3" in capsys.readouterr().out) == alarm


@pytest.mark.parametrize(
    ("poison", "words"),
    [
        (poison_loss, "the loss was not finite in 4 steps in a row, .* epoch 2, step 3: the output of every layer is"),
        (poison_gradient, "the gradient was not finite in 4 steps"),
        (poison_input, "the normalised images are not finite .data.*; check MEAN and STD"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_too_many_such_steps_in_a_row_stop_the_run(poison, words, run_train, monkeypatch):
    monkeypatch.setattr(faults, "MAX_SKIPPED", 4)
    poison(monkeypatch, {2, 5, 6, 7, 8, 9})  # 5 steps an epoch
    with pytest.raises(UserError, match=words) as error:
        run_train(EPOCHS=3)
    assert ("Lower LEARNING_RATE" in str(error.value)) == (poison != poison_input)
    assert str(error.value).count(".png") == 4
    saved = load_checkpoint(Path("checkpoints/unireplknet_test/last.pth"))
    assert saved["epoch"] == 1 and saved["history"][0]["skipped"] == 2 and saved["skipped_in_a_row"] == 1


def test_an_image_that_is_not_finite_is_named(run_train, monkeypatch, place):
    monkeypatch.setattr(faults, "MAX_SKIPPED", 1)
    original = train.train_transform
    victim = sorted((place / "data" / "train" / "Maize").iterdir())[0]
    pixels = load_image(victim).tobytes()

    def train_transform(*arguments, **options):
        augment = original(*arguments, **options)
        return lambda image: augment(image) * (float("nan") if image.tobytes() == pixels else 1)

    monkeypatch.setattr(train, "train_transform", train_transform)
    with pytest.raises(UserError, match=f"not finite after the augmentation: .*{victim.name}; check MEAN"):
        run_train(EPOCHS=3, CACHE_GB=0.0)  # the cached image has other pixels


def test_a_deviation_that_overflows_is_named(run_train, monkeypatch):
    monkeypatch.setattr(faults, "MAX_SKIPPED", 1)
    with pytest.raises(UserError, match="the normalised images are not finite .data.*; check MEAN and STD"):
        run_train(MEAN=[0.5] * 3, STD=[1e-40] * 3)


@pytest.mark.parametrize("clip", [0.0, 5.0])
def test_an_absurd_learning_rate_stops_the_run_before_it_ruins_a_checkpoint(clip, run_train, place, monkeypatch):
    monkeypatch.setattr(faults, "MAX_SKIPPED", 3)
    with pytest.raises(UserError, match="[Ll]ower LEARNING_RATE"):
        run_train(LEARNING_RATE=1e20, CLIP_GRAD=clip, EPOCHS=20, WARMUP_EPOCHS=0.0)
    for file in (place / "checkpoints" / "unireplknet_test").glob("*.pth"):
        saved = load_checkpoint(file)
        for part in ("state_dict", "state_dict_ema"):
            assert all(tensor.isfinite().all() for tensor in saved[part].values()), (file, part)


def test_the_first_layer_that_is_not_finite_is_found():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Sequential(torch.nn.ReLU()))
    images = torch.ones(4, 2)
    before = network[1].running_mean.clone()
    assert first_non_finite_layer(network, images) is None
    assert torch.equal(network[1].running_mean, before)
    network[2].register_forward_hook(lambda *_: torch.full((2,), float("inf")))
    assert first_non_finite_layer(network, images) == "2 (Sequential)"
    network[0].weight.data[0, 0] = float("nan")
    assert first_non_finite_layer(network, images) == "0 (Linear)"
    assert not any(module._forward_hooks for module in network[:2])


# --- memory


def limit_memory(monkeypatch, most, error):
    """Let the loss of more than `most` images run out of memory."""
    original = F.cross_entropy

    def cross_entropy(logits, target, **options):
        if len(logits) > most and torch.is_grad_enabled():
            raise error("out of memory: DefaultCPUAllocator: can't allocate memory")
        return original(logits, target, **options)

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_out_of_memory_halves_the_batch_and_keeps_the_step(error, run_train, monkeypatch, capsys):
    limit_memory(monkeypatch, 2, error)
    constants = dict(IMG_SIZE=64, BATCH_SIZE=8, EPOCHS=2)
    folder = run_train(**constants)
    saved = load_checkpoint(folder / "last.pth")
    assert saved["pieces"] == 4 and saved["ema_updates"] == 4  # 2 steps an epoch, as before
    assert capsys.readouterr().out.count("memory is full") == 2
    # Continued, it begins with the parts that fit, and says nothing.
    run_train(**constants | dict(EPOCHS=3), RESUME="auto")
    assert "memory is full" not in capsys.readouterr().out


def test_micro_batches_give_the_gradient_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.rand(7, 3, 4, 4, generator=generator), torch.randint(3, (7,), generator=generator))] * 2
    mixup = BatchMixup(3, 0.8, 1.0, prob=1.0, smoothing=0.1)
    options = dict(size=(4, 4), device=torch.device("cpu"), normalise=torch.nn.Identity(), mixup=mixup, seed=0)
    prepare = partial(train.prepare_batch, **options)
    gradients, sums = [], []
    for count in (1, 2, 4):
        torch.manual_seed(0)
        model, total = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)), 0
        for images, labels, targets, weight, last in train.micro_batches(batches, [5, 6], prepare, count):
            logits = model(images)
            loss = F.cross_entropy(logits, targets)
            (loss * weight).backward()
            total = total + train.measure(loss, logits, labels)
        assert last
        gradients.append(model[1].weight.grad)
        sums.append(total)
    for gradient, total in zip(gradients[1:], sums[1:]):
        torch.testing.assert_close(gradient, gradients[0])
        torch.testing.assert_close(total, sums[0])


FULL = """
DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes. Error code 12 (Cannot allocate memory)
[enforce fail at alloc_cpu.cpp:75] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.
could not create a primitive
could not create a memory object
CUDA out of memory. Tried to allocate 20.00 MiB
CUDA error: out of memory
Triton Error [CUDA]: out of memory
CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`
CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`
cuDNN error: CUDNN_STATUS_ALLOC_FAILED
CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED
HIP out of memory. Tried to allocate 2.00 GiB
HIP error: hipErrorOutOfMemory
MIOpen Error: miopenStatusAllocFailed
MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, max allowed: 9.07 GB)
Invalid buffer size: 12.34 GB
XPU out of memory. Tried to allocate 1.00 GiB
UR error: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY
Intel oneMKL ERROR: insufficient memory
std::bad_alloc
bad allocation
Unable to allocate 3.20 GiB for an array with shape (9, 9) and data type float64
[WinError 1455] The paging file is too small for this operation to complete
NCCL Error 1: unhandled cuda error, Cuda failure 2 'out of memory'
""".strip().splitlines()
OTHER = """
could not create a primitive descriptor for a convolution forward propagation primitive
CUDA error: device-side assert triggered
CUDA error: an illegal memory access was encountered
cuDNN error: CUDNN_STATUS_EXECUTION_FAILED
cuDNN error: CUDNN_STATUS_NOT_SUPPORTED
CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`
view size is not compatible with input tensor's size and stride
Expected all tensors to be on the same device
Sizes of tensors must match except in dimension 1
Connection closed by peer [127.0.0.1]:1234
invalid memory format
""".strip().splitlines()


def test_all_spellings_of_a_full_memory_are_known():
    print(f"{len(FULL)} spellings")
    assert [text for text in FULL if not is_out_of_memory(RuntimeError(text))] == []
    assert [text for text in OTHER if is_out_of_memory(RuntimeError(text))] == []
    assert all(map(is_out_of_memory, (MemoryError(), torch.OutOfMemoryError("x"), OSError(12, "x"))))


def test_if_nothing_fits_one_sentence_says_what_to_lower(run_train, monkeypatch):
    limit_memory(monkeypatch, 0, torch.OutOfMemoryError)
    with pytest.raises(UserError, match="lower BATCH_SIZE"):
        run_train(IMG_SIZE=64)


def test_other_errors_are_not_taken_for_a_full_memory(run_train, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(F, "cross_entropy", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        run_train()


# --- continuing with other constants


def test_changed_constants_are_named_with_what_follows(run_train, capsys):
    run_train(EPOCHS=1)
    capsys.readouterr()
    folder = run_train(EPOCHS=2, WEIGHT_DECAY=0.1, LAYER_SCALE=0.2, SAVE_MINUTES=3.0, RESUME="auto")
    out = capsys.readouterr().out
    assert "EPOCHS was 1, is 2 from here on" in out and "WEIGHT_DECAY was 0.05, is 0.1 from here on" in out
    assert "LAYER_SCALE: network and weights come from the checkpoint" in out and "SAVE_MINUTES" not in out
    assert "the result will not be bit-identical" in out
    groups = load_checkpoint(folder / "last.pth")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


def test_what_breaks_the_network_is_refused(run_train):
    run_train(EPOCHS=1)
    with pytest.raises(UserError, match="LAYER_DECAY"):
        run_train(EPOCHS=2, RESUME="auto", LAYER_DECAY=0.8)


def test_the_network_is_built_as_the_checkpoint_has_it(run_train):
    arguments = load_checkpoint(run_train(EPOCHS=1, LAYER_SCALE=1e-6) / "last.pth")["model_args"]
    assert arguments["published_arithmetic"] is True
    for constants in (dict(LAYER_SCALE=0.1), dict(LAYER_SCALE=0.0)):
        folder = run_train(EPOCHS=2, RESUME="auto", **constants)
        assert load_checkpoint(folder / "last.pth")["model_args"] == arguments


def test_another_device_or_precision_is_named(run_train, capsys):
    folder = run_train(EPOCHS=1, AMP="off")
    saved = load_checkpoint(folder / "last.pth")
    saved["versions"] |= dict(device="NVIDIA H100", precision="autocast bfloat16", compiled=True)
    save_checkpoint(saved, folder / "last.pth")
    capsys.readouterr()
    run_train(EPOCHS=2, AMP="off", RESUME="auto")
    out = capsys.readouterr().out
    assert "device was NVIDIA H100, is cpu" in out and "precision was autocast bfloat16, is float32" in out
    assert "compiled was True, is False" in out and "the result will not be bit-identical" in out


def test_ema_may_be_turned_on_and_off(run_train, monkeypatch):
    run_train(EPOCHS=1, EMA_DECAY=0.0)
    monkeypatch.setattr(train, "warmup_cosine", lambda step, steps, warmup_steps, highest, lowest: 0.0)
    folder = run_train(EPOCHS=2, RESUME="auto")
    saved = load_checkpoint(folder / "last.pth")
    assert torch.equal(saved["state_dict"]["head.weight"], saved["state_dict_ema"]["head.weight"])
    folder = run_train(EPOCHS=3, RESUME="auto", EMA_DECAY=0.0)
    assert load_checkpoint(folder / "last.pth")["state_dict_ema"] is None


def test_a_checkpoint_of_an_earlier_version_continues(run_train):
    folder = run_train(EPOCHS=1)
    saved = load_checkpoint(folder / "last.pth")
    for name in ("totals", "pictures", "seconds", "skipped", "skipped_in_a_row", "pieces", "pictures_fingerprint"):
        del saved[name]
    save_checkpoint(saved, folder / "last.pth")
    folder = run_train(EPOCHS=2, RESUME="auto")
    assert load_checkpoint(folder / "last.pth")["epoch"] == 2


def test_another_batch_size_goes_on_at_the_same_place_of_the_epoch(run_train, monkeypatch):
    at_step(monkeypatch, {3}, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    folder = run_train(143, EPOCHS=1)  # 5 steps of 4; 12 images are done
    seen = []
    original = train.prepare_batch

    def prepare_batch(batch, number, **options):
        seen.append((number, len(batch[0])))
        return original(batch, number, **options)

    monkeypatch.setattr(train, "prepare_batch", prepare_batch)
    run_train(EPOCHS=1, BATCH_SIZE=6, RESUME="auto")
    assert seen == [(2, 6)]  # 3 steps of 6
    history = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert history["epoch"] == 1
