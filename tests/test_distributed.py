"""torchrun with several processes on the CPU (gloo): the same run as one process with as many images a step."""

import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch
from conftest import DEFAULTS, ROOT, SMALL, fill_classes
from forked import CAN_FORK, find_no_groups, save_time, touch_curves
from kill import differences

import makedata
import train
from common import agreement, dataset, distributed, optimizer, run_folder
from common.agreement import describe_disagreement
from common.checkpoint import load_checkpoint
from common.images import ImageError
from common.options import ConstantError, UserError, run
from common.workers import StoodStill
from models import depthwise_choice

# 51 training images: 12 batches of 4, so 3 steps of 16 images an epoch.
OPTIONS = "--model unireplknet_test --img-size 32 --batch-size 4 --epochs 3 --workers 0 --device cpu".split()
OPTIONS += "--amp off --mix-prob 0.5 --optimizer adamw --learning-rate 5e-4".split()


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill_classes(tmp_path / "data1", {"a": 24, "b": 24, "c": 25})
    makedata.main()
    return tmp_path


def launch(processes, *options, machines=("--standalone",), folder=None):
    command = [sys.executable, "-m", "torch.distributed.run", *machines, f"--nproc_per_node={processes}"]
    command += [str(ROOT / "tests" / "tiny.py"), *OPTIONS, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    environment |= {"TEST_HOST": folder.name} if folder else {}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    return subprocess.Popen(command, env=environment, cwd=folder, **pipes)


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
    monkeypatch.setattr(depthwise_choice, "find_groups", find_no_groups)
    monkeypatch.setattr(run_folder, "plot_curves", touch_curves)

    def run(**changed):
        for name, value in (constants | changed).items():
            monkeypatch.setattr(train, name, value)
        assert train.main() == 0
        return end_of(place, (constants | changed)["OUTPUT"])

    return run


def test_one_two_and_four_processes_learn_the_same(place, alone, processes):
    expected = alone(ACCUMULATE=4, OUTPUT="with_1")
    for count in (2, 4):
        output = f"with_{count}"
        out, _ = processes(count, "--accumulate", str(4 // count), "--output", output)
        assert out.count("best acc1") == 1  # one process reports for all
        assert f"processes   {count}" in out and "3 an epoch, of 16 images" in out
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


def test_validation_counts_every_image_once(place, alone, processes):
    """Where only the head learns, and hardly so, 1 and 2 processes must give the same metrics."""
    alone(EPOCHS=1, OUTPUT="one")
    start = str(place / "one" / "unireplknet_test" / "last.pth")
    options = ["--pretrained", start, "--epochs", "1", "--learning-rate", "1e-9", "--freeze-epochs", "2"]
    processes(2, *options, "--output", "two")
    expected = alone(PRETRAINED=start, EPOCHS=1, LEARNING_RATE=1e-9, FREEZE_EPOCHS=2, OUTPUT="again")["history"][-1]
    row = end_of(place, "two")["history"][-1]
    for name in ("val_loss", "val_acc1", "val_acc5", "ema_loss", "ema_acc1"):
        assert row[name] == pytest.approx(expected[name], rel=1e-4), name


def test_two_processes_stopped_by_a_signal_resume_exactly(place, alone, processes, capsys):
    muon = ["--optimizer", "muon"]
    processes(2, "--output", "straight", *muon)
    process = launch(2, "--output", "stopped", "--save-minutes", "1e-9", *muon)
    until = time.monotonic() + 120
    while not (place / "stopped" / "unireplknet_test" / "last.pth").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "saved; resume with --resume auto" in out, errors
    processes(2, "--output", "stopped", "--resume", "auto", *muon)
    assert not differences(end_of(place, "stopped"), end_of(place, "straight"))
    assert alone(OUTPUT="stopped", RESUME="auto", EPOCHS=4, OPTIMIZER="muon")["epoch"] == 4
    out = capsys.readouterr().out
    assert "processes was 2, is 1" in out and "bit-identical" in out


def test_one_killed_process_ends_the_others(place):
    process = launch(2, "--output", "killed", "--epochs", "1000")
    until = time.monotonic() + 120
    while not (place / "killed" / "unireplknet_test" / "last.pth").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    workers = [child for child in psutil.Process(process.pid).children() if "tiny.py" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[1].kill()
    started = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - started < 60
    assert not [one for one in workers if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_an_error_on_one_process_ends_all_with_its_message(place, processes):
    victim = sorted((place / "data" / "train" / "a").iterdir())[3]
    victim.unlink()
    victim.write_bytes(b"no image")
    # With a cache, the processes find the image before they train.
    _, errors = processes(2, "--cache-gb", "0", statuses=[1, 1])
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


# --- several machines, each with a folder of its own


class Machines:
    """Processes of one run, forked from this one, on machines that are folders: machines.start(...), then .end().

    Args:
        folders: that of each machine, named like the host.
    """

    def __init__(self, folders):
        self.folders = folders
        self.processes = []

    def start(self, act, *options, per_machine=1):
        """Fork; in each process, `act(host)` changes something, and train.py runs with `options`."""
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun
        count = len(self.folders)
        self.started = time.monotonic()
        for number in range(count * per_machine):
            folder = self.folders[number // per_machine]
            process = os.fork()
            if process:
                self.processes.append(process)
                continue
            status = 70
            gc.freeze()  # what is garbage here may end by waiting for threads, which are not forked: an earlier store
            multiprocessing.process._children.clear()  # those of this process are not its children
            try:
                for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
                    stream.flush()
                    path = folder / f"{name}.{number}"
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1 if name == "out" else 2)
                sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
                os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.store.port), RANK=str(number))
                os.environ |= dict(TORCHELASTIC_USE_AGENT_STORE="True")
                os.environ |= dict(LOCAL_RANK=str(number % per_machine), WORLD_SIZE=str(count * per_machine))
                os.environ |= dict(GROUP_RANK=str(number // per_machine), GROUP_WORLD_SIZE=str(count))
                os.chdir(folder)
                distributed.host_name = lambda folder=folder: folder.name
                save_time()
                vars(train).update(DEFAULTS)
                sys.argv = ["train.py", *OPTIONS, "--epochs", "1", *options]
                act(folder.name)
                run(train.main, fail=distributed.fail)
            except SystemExit as end:
                status = end.code or 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def read(self, stream):
        """[what each machine's processes have written to "out" or "err"]."""
        return [
            "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"{stream}.*")))
            for folder in self.folders
        ]

    def end(self):
        """(exit status of each process, [what each machine's processes wrote to stderr])."""
        statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in self.processes]
        self.processes = []
        return statuses, self.read("err")


@pytest.fixture
def processes(place):
    """Train in several processes of this machine: processes(count, *options, statuses) -> (stdout, stderr) of all."""
    if not CAN_FORK:
        return lambda count, *options, statuses=(): finish(launch(count, *options), status=max(statuses, default=0))

    def train_in(count, *options, statuses=None):
        machine = Machines([place])
        machine.start(lambda host: None, "--epochs", "3", *options, per_machine=count)
        ends, [errors] = machine.end()
        assert ends == (statuses or [0] * count), errors
        return *machine.read("out"), errors

    return train_in


@pytest.fixture
def machines(tmp_path, monkeypatch):
    """Two `Machines`, node-a and node-b."""
    if not CAN_FORK:
        pytest.skip("processes are forked")
    monkeypatch.chdir(tmp_path)
    machines = Machines([tmp_path / "node-a", tmp_path / "node-b"])
    for folder in machines.folders:
        fill_classes(folder / "data1", {"a": 8, "b": 8})
    for folder in machines.folders:
        os.chdir(folder)
        makedata.main()
    yield machines
    for process in machines.processes:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def on_b(action):
    """What is done on node-b only."""
    return lambda host: action() if host == "node-b" else None


def first_image(part="train"):
    return min(Path("data", part, "a").iterdir())


def write(path, content):
    path.unlink(missing_ok=True)  # since data consists of links
    path.write_bytes(content)


def set_option(*words):
    sys.argv += words


def change_statistics():
    statistics = dict(mean=[0.1] * 3, std=[0.2] * 3, pictures=1, fingerprint="")
    Path("data/mean_std.json").write_text(json.dumps(statistics), encoding="utf-8")


def change_hash(name):
    original = agreement.hash_code
    agreement.hash_code = lambda path: "sha256:other" if path.name == name else original(path)


def raise_value_error(*_):
    raise ValueError("a mistake")


# what differs on node-b: (how, what both say, exit status)
REFUSED = {
    "a constant": (lambda: set_option("--smoothing", "0"), "node-b: SMOOTHING is 0.0, on node-a it is 0.1; set ", 1),
    "constants": (
        lambda: set_option("--mixup", "0", "--hflip", "0", "--epochs", "2", "--seed", "1"),
        "node-b: EPOCHS is 2, on node-a it is 1; SEED is 1, on node-a it is 42; .*; 1 more; set the constants", 1,
    ),
    "a kernel": (
        lambda: os.environ.update(UNIREPLKNET_DEPTHWISE="pytorch"),
        "node-b: UNIREPLKNET_DEPTHWISE is pytorch, on node-a it is default; set", 1,
    ),
    "a version": (
        lambda: setattr(agreement.PIL, "__version__", "1.0"), "node-b: Pillow is 1.0, on node-a it is .*; install", 1,
    ),
    "the code": (lambda: change_hash("augment.py"), "node-b: common/augment.py is not the same as on node-a; inst", 1),
    "an image": (
        lambda: shutil.copy(first_image("val"), Path("data/train/a/9.png")),
        r"node-b: class 'a' in train is 7 images, on node-a it is 6 images; .*; copy the data folder", 1,
    ),
    "pixels": (
        lambda: write(first_image("val"), first_image().read_bytes()),
        r"node-b: class 'a' in val is not the same as on node-a \(2 images\); .*; copy", 1,
    ),
    "statistics": (change_statistics, r"node-b: the mean of the pixels is \[0.1, .*; their standard deviation is ", 1),
    "no data": (lambda: shutil.rmtree("data"), "node-b: there is no folder data/train; run makedata.py first", 1),
    "a wrong constant": (lambda: set_option("--model", "x"), "node-b: MODEL must be one of .*, got 'x'", 2),
    "a wrong value": (lambda: set_option("--epochs", "x"), "node-b: EPOCHS must be .* got 'x'", 2),
    "a broken image": (lambda: write(first_image(), b""), r"node-b: .*\.png cannot be read as an image", 1),
    "a mistake of the program": (
        lambda: setattr(train, "create_network", raise_value_error), "node-b: ValueError: a mistake", 1,
    ),
    "its checkpoint": (
        lambda: [Path("checkpoints/unireplknet_test").mkdir(parents=True),
                 Path("checkpoints/unireplknet_test/last.pth").touch(), set_option("--resume", "auto")],
        "last.pth is on node-b, but not on node-a, which leads this run", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_machines_disagree_in_ends_all_with_one_sentence(name, machines):
    action, sentence, status = REFUSED[name]
    machines.start(on_b(action), per_machine=2 if name == "a constant" else 1)
    statuses, texts = machines.end()
    assert time.monotonic() - machines.started < 30
    assert set(statuses) == {status}, texts
    for text, host in zip(texts, ("node-a", "node-b")):
        said = re.findall("^error: (.*)$", text, re.MULTILINE)
        if name == "a mistake of the program" and host == "node-b":
            assert not said and text.count("Traceback") == 1 and "ValueError: a mistake" in text
        else:
            assert len(said) == 1 and re.match(sentence, said[0]) or "last.pth is on" in said[0], said
            assert re.search(sentence, said[0]) and "Traceback" not in text, text
    assert not (machines.folders[0] / "checkpoints" / "unireplknet_test" / "last.pth").exists()


REASONS = {"an image": (ImageError, "x.png cannot be read"), "a drive": (StoodStill, "no images for 10 minutes")}


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("name", REASONS)
def test_what_keeps_one_machine_from_its_images_ends_all_with_its_message(name, slow, machines):
    error, message = REASONS[name]

    def lose_disk(path, value_range=None):
        raise error(message)

    def fail_late(message, status):  # after the other process has seen that this one will not come
        time.sleep(2)
        late(message, status)

    def prepare(host):
        set_option("--cache-gb", "0")
        if host == "node-b":
            dataset.load_image = lose_disk
            distributed.fail = fail_late if slow else late

    late = distributed.fail
    machines.start(prepare)
    statuses, texts = machines.end()
    assert statuses == [1, 1], texts
    assert all(re.findall(f"^error: node-b: {message}$", text, re.MULTILINE) for text in texts), texts
    assert all(text.count("error:") == 1 and "Traceback" not in text for text in texts), texts


def test_what_may_differ_between_machines_does(machines):
    def prepare(host):
        if host == "node-b":
            if distributed.local_rank() == 0:
                Path("data").rename("elsewhere")
            set_option("--data", "elsewhere", "--cache-gb", "0", "--output", "other", "--save-minutes", "3")

    machines.start(prepare, per_machine=2)
    statuses, texts = machines.end()
    assert statuses == [0] * 4, texts
    a, b = machines.folders
    assert load_checkpoint(a / "checkpoints" / "unireplknet_test" / "last.pth")["versions"]["processes"] == 4
    assert not (b / "other").exists() and not (b / "checkpoints").exists()
    assert len(list((a / "data" / "cache").glob("*.npy"))) == 2


def test_a_killed_process_ends_the_other_machine(machines, monkeypatch):
    """In an epoch at once; while the other process waits for its word, when it has been silent for long enough."""
    monkeypatch.setattr(distributed.Channel, "SECONDS_OF_SILENCE", 15.0)
    machines.start(lambda host: set_option("--epochs", "1000"))
    last = machines.folders[0] / "checkpoints" / "unireplknet_test" / "last.pth"
    while not last.exists():
        assert time.monotonic() - machines.started < 60
        time.sleep(0.05)
    killed = time.monotonic()
    os.kill(machines.processes[1], signal.SIGKILL)
    statuses, texts = machines.end()
    assert statuses == [1, -signal.SIGKILL] and time.monotonic() - killed < 60
    assert "another process of this run has ended" in texts[0] or "node-b no longer answers" in texts[0], texts[0]
    assert "Traceback" not in texts[0]


def test_two_machines_that_were_killed_resume_exactly_though_one_has_no_checkpoint(machines):
    machines.start(lambda host: None, "--epochs", "3", "--output", "straight")
    assert machines.end()[0] == [0, 0]
    machines.start(lambda host: None, "--epochs", "3", "--save-minutes", "1e-9")
    a, b = machines.folders
    last = a / "checkpoints" / "unireplknet_test" / "last.pth"
    while not last.exists():
        assert time.monotonic() - machines.started < 60
        time.sleep(0.005)
    for process in machines.processes:
        os.kill(process, signal.SIGKILL)
    machines.end()
    assert load_checkpoint(last)["epoch"] < 3 and not (b / "checkpoints").exists()

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    # Of torchrun's machines, the one whose address comes first leads the run.
    where = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr"]
    options = ["--epochs", "3", "--resume", "auto"]
    runs = [
        launch(1, *options, machines=[*where, f"127.0.0.{number}"], folder=folder)
        for number, folder in ((1, a), (2, b))
    ]
    outs = [re.sub(r"\[Gloo\].*\n", "", finish(one)[0]) for one in runs]  # PyTorch 2.9 says that it is connected
    assert "resume      " in outs[0] and outs[0].count("best acc1") == 1 and outs[1] == ""
    assert not differences(end_of(a, "checkpoints"), end_of(a, "straight"))
    assert not (b / "checkpoints").exists()


@pytest.mark.parametrize("early", [True, False])
def test_a_process_that_stands_still_ends_the_run(early, machines, monkeypatch):
    monkeypatch.setattr(distributed.Channel, "SECONDS_TO_COME", 3)
    monkeypatch.setattr(distributed.Channel, "SECONDS_OF_SILENCE", 3)
    monkeypatch.setattr(distributed.Channel, "PATIENCE", {False: 2, True: 2})

    def stand_still(*_):
        os.kill(os.getpid(), signal.SIGSTOP)

    machines.start(on_b(stand_still if early else lambda: setattr(train, "open_data", stand_still)))
    _, status = os.waitpid(machines.processes[0], 0)
    del machines.processes[0]  # the other one is killed at the end of the test
    text = (machines.folders[0] / "err.0").read_text()
    expected = "another machine did not come" if early else "node-b no longer answers"
    assert os.waitstatus_to_exitcode(status) == 1 and f"error: node-a: process 1 on {expected} for " in text, text


def test_what_the_first_process_has_comes_to_the_others_as_it_is(machines, tmp_path):
    """Tensors of every kind and shape, in dicts with keys of every kind, with their strides."""
    images = torch.rand(2, 3, 4, 5)
    value = {
        "a": [images, images.contiguous(memory_format=torch.channels_last), images[:, 1:], torch.tensor(3)],
        7: (torch.empty(0, 2), torch.tensor([True, False]), images.bfloat16()),
        "text": {"b": None, "c": torch.arange(3, dtype=torch.int64), "d": [1.5, "x"]},
    }

    def compare(host):
        with distributed.processes("cpu"):
            got = distributed.from_first((lambda: value) if host == "node-a" else raise_value_error)
            expected, items = [], []
            distributed.map_tensors(expected.append, value)
            distributed.map_tensors(items.append, got)
            for one, other in zip(expected, items, strict=True):
                assert torch.equal(one, other) and one.dtype == other.dtype
                assert one.stride() == other.stride() or not one.is_contiguous()
            assert got["text"]["d"] == [1.5, "x"] and type(got[7]) is tuple and 7 in got
            distributed.leave(torch.device("cpu"), 5)

    machines.start(compare)
    statuses, texts = machines.end()
    assert statuses == [5, 5], texts


def test_a_sentence_names_host_and_difference():
    same = dict(A=1, B="x")
    assert describe_disagreement([("a", same), ("b", dict(same))], "copy it") == ""
    for reports, expected in (
        ([("a", same), ("b", same | dict(A=2))], "b: A is 2, on a it is 1; copy it"),
        ([("a", same), ("a", same | dict(A=None))], "process 1: A is None, on process 0 it is 1; copy it"),
        ([("a", same), ("a", same), ("b", same | dict(B=""))], "b: B is '', on a it is x; copy it"),
        ([("a", same), ("b", dict(A=1))], "b: B is missing; copy it"),
        ([("a", same), ("b", same | dict(C=[1]))], "b: C is missing on a; copy it"),
        ([("a", dict(F="sha256:12")), ("b", dict(F="sha256:13"))], "b: F is not the same as on a; copy it"),
        ([("a", dict(F="3 xsha256:12")), ("b", dict(F="3 xsha256:13"))], "b: F is not the same as on a (3 x); copy it"),
        ([("a", dict(F="3 xsha256:12")), ("b", dict(F="4 xsha256:13"))], "b: F is 4 x, on a it is 3 x; copy it"),
        ([("a", dict(zip("ABCDE", range(5)))), ("b", {})],
         "b: A is missing; B is missing; C is missing; 2 more; copy it"),
    ):  # fmt: skip
        assert describe_disagreement(reports, "copy it") == expected


def test_comments_and_constants_do_not_change_the_code_but_everything_else_does(tmp_path):
    def code(text, **options):
        (tmp_path / "x.py").write_text(text, encoding="utf-8", **options)
        return agreement.hash_code(tmp_path / "x.py")

    plain = code("A: int = 1  # one\n\ndef f(x):\n    return x + 1\n")
    assert plain == code("A: int = 2\n\n\ndef f(x):\n    # added\n    return (x + 1)\n", newline="\r\n")
    assert plain != code("A: int = 1\n\ndef f(x):\n    return x + 2\n")
