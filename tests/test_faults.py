"""What breaks a run, and what train.py must do about it: one test for each fault."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from kill import differences, kill_and_compare

import train
from common import faults
from common.augment import BatchMixup
from common.checkpoint import load_checkpoint, load_file, load_newest, save_checkpoint
from common.faults import first_non_finite_layer
from common.images import load_image
from common.options import UserError

# 21 training images: 5 batches of 4, so 3 steps an epoch; enough randomness to notice a step that is not repeated.
RUN = dict(EPOCHS=3, ACCUMULATE=2, MIX_PROB=0.7, DROP_PATH=0.3)
OPTIONS = "--model unireplknet_test --img-size 32 --batch-size 4 --workers 0 --device cpu --amp off".split()
OPTIONS += ["--optimizer", "adamw"]


@pytest.fixture
def straight(run_train):
    """The end of RUN when nothing happens."""
    return load_checkpoint(run_train(**RUN, OUTPUT="straight") / "last.pth")


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


def start(folder, *options):
    """train.py as a process of its own."""
    command = [sys.executable, str(ROOT / "tests" / "tiny.py"), *OPTIONS, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def wait_for(path, run, seconds=120):
    until = time.monotonic() + seconds
    while not path.exists():
        assert run.poll() is None and time.monotonic() < until, run.communicate()
        time.sleep(0.02)


# --- interruptions


def test_killed_while_training_and_while_saving_the_run_ends_the_same(place):
    different, kills = kill_and_compare(place, kills=2, epochs=2)
    assert (different, kills) == ([], 2)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [2, 3, 5])
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


@pytest.mark.skipif(os.name != "posix", reason="Windows has no signals between processes")
def test_the_second_ctrl_c_ends_at_once(place):
    run = start(place, "--epochs", "1000", "--save-minutes", "0", "--workers", "1")
    wait_for(place / "checkpoints" / "unireplknet_test" / "last.pth", run)
    # Stopped in between, the process gets both signals before it can finish its step.
    run.send_signal(signal.SIGSTOP)
    run.send_signal(signal.SIGINT)
    run.send_signal(signal.SIGCONT)
    time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    out, errors = run.communicate(timeout=30)
    assert run.returncode in (-signal.SIGINT, 130) and "Traceback" not in errors
    load_checkpoint(place / "checkpoints" / "unireplknet_test" / "last.pth")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no signals between processes")
def test_ctrl_c_in_a_terminal_reaches_the_workers_too_and_the_run_still_saves(place):
    command = [sys.executable, str(ROOT / "tests" / "tiny.py"), *OPTIONS, "--epochs", "1000", "--workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    run = subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, **pipes)
    wait_for(place / "checkpoints" / "unireplknet_test" / "last.pth", run)
    os.killpg(run.pid, signal.SIGINT)
    out, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and "saved" in out and "Traceback" not in errors, errors


def test_metrics_that_are_not_finite_make_no_best_checkpoint(run_train, monkeypatch):
    original, results = train.validate, []

    def validate(*arguments):
        metrics, labels, predictions = original(*arguments)
        results.append(metrics["acc1"])
        if len(results) in (1, 3):
            metrics = dict(metrics, loss=float("nan"), acc1=100.0)
        return metrics, labels, predictions

    monkeypatch.setattr(train, "validate", validate)
    folder = run_train(EPOCHS=3, USE_EMA=False)
    assert load_checkpoint(folder / "best.pth")["epoch"] == 2
    assert load_checkpoint(folder / "last.pth")["best_acc1"] == results[1]


def test_a_finished_run_that_is_continued_stays_as_it_is(run_train, straight, capsys):
    folder = run_train(**RUN)
    before = (folder / "last.pth").read_bytes()
    capsys.readouterr()
    run_train(**RUN, RESUME="auto")
    assert (folder / "last.pth").read_bytes() == before
    assert "best acc1" in capsys.readouterr().out


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
        "from common.checkpoint import save_checkpoint\n"
        "save_checkpoint(dict(epoch=1), 'last.pth')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "save_checkpoint(dict(epoch=2, weight=torch.zeros(100_000)), 'last.pth')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], cwd=tmp_path, capture_output=True, text=True)
    assert "UserError: cannot save last.pth (File too large)" in done.stderr
    assert load_file(tmp_path / "last.pth") == dict(epoch=1)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


def test_a_read_only_folder_is_named(place):
    disk = place / "disk"
    with file_system(disk, "size=1m,ro"):
        out, errors = start(place, "--epochs", "1", "--output", str(disk)).communicate(timeout=120)
        assert errors.strip().splitlines()[-1].startswith("error:") and "Read-only" in errors and "disk" in errors
        assert "Traceback" not in errors


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
        (poison_input, r"the first layer with a non-finite output is downsample_layers.0.0 \(Conv2d\); images data"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_too_many_such_steps_in_a_row_stop_the_run(poison, words, run_train, monkeypatch):
    monkeypatch.setattr(faults, "MAX_SKIPPED", 4)
    poison(monkeypatch, {2, 5, 6, 7, 8, 9})  # 5 steps an epoch
    with pytest.raises(UserError, match=words) as error:
        run_train(EPOCHS=3)
    assert "Lower LEARNING_RATE" in str(error.value) and str(error.value).count(".png") == 4
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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
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
    prepare = partial(train.prepare_batch, size=(4, 4), device=torch.device("cpu"), mixup=mixup, seed=0)
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
    run_train(EPOCHS=1, USE_EMA=False)
    monkeypatch.setattr(train, "warmup_cosine", lambda step, steps, warmup_steps, highest, lowest: 0.0)
    folder = run_train(EPOCHS=2, RESUME="auto")
    saved = load_checkpoint(folder / "last.pth")
    assert torch.equal(saved["state_dict"]["head.weight"], saved["state_dict_ema"]["head.weight"])
    folder = run_train(EPOCHS=3, RESUME="auto", USE_EMA=False)
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
