"""Kill a run of train.py with SIGKILL again and again, and compare its end with that of an uninterrupted run.

    python tests/kill.py --kills 30

Images are drawn into a temporary folder. Half of the kills come after a random time, half while a checkpoint is being
written. Both runs save after every step. Prints one line for each kill; exit status 0 if weights, EMA, optimizer state
and history are the same to the last bit.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from forked import start_training
from tiny import ROOT

PARTS = ("state_dict", "state_dict_ema", "ema_updates", "optimizer", "scaler", "epoch", "best_acc1", "history")


def flat(value, name=""):
    """{name: leaf} of nested dicts and lists, without what only tells of time."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: value}
    leaves = {}
    for key, item in items:
        if key not in ("seconds", "img_per_s"):
            leaves |= flat(item, f"{name}/{key}")
    return leaves


def differences(one, other):
    """Names of what differs, to the last bit, between two checkpoints of train.py."""
    one, other = (flat({part: checkpoint[part] for part in PARTS}) for checkpoint in (one, other))
    names = set(one) ^ set(other)
    for name in set(one) & set(other):
        a, b = one[name], other[name]
        if not (torch.equal(a, b) if torch.is_tensor(a) else a == b):
            names.add(name)
    return sorted(names)


def modified(path):
    """When a file was last modified, in ns; None if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def kill_and_compare(folder, kills, epochs=4, seed=0, device="cpu", say=print):
    """Train in `folder`, which holds data/, twice; returns the `differences` of the two ends and the number of kills.

    Args:
        folder: with data/train and data/val.
        kills: how often the second run is killed.
        epochs: length of both runs.
        seed: of the moments.
        device: "cpu", or "cuda" with deterministic algorithms.
        say: function that takes one line for each kill.
    """
    options = f"--model unireplknet_test --img-size 32 --batch-size 4 --epochs {epochs} --mix-prob 0.7 --drop-path 0.3"
    options += f" --workers 0 --device {device} --deterministic --resume auto --save-minutes 1e-9 --accumulate 2"
    options += " --optimizer muon"
    words = options.split()

    started = time.monotonic()
    finish(start_training(folder, *words, "--output", "straight"))
    length = time.monotonic() - started
    last = Path(folder, "killed", "unireplknet_test", "last.pth")
    partial = last.with_name("last.pth.part")
    moments = random.Random(seed)
    done = 0
    while done < kills:
        run = start_training(folder, *words, "--output", "killed")
        if done % 2:
            kind = "while saving"
            seen = modified(partial)
            for _ in range(moments.randrange(1, 4)):  # the first to third save of this start
                while run.poll() is None and modified(partial) in (None, seen):
                    pass
                seen = modified(partial)
        else:
            kind = "at random"
            while run.poll() is None and not last.with_name("class_indices.json").exists():
                time.sleep(0.01)
            time.sleep(moments.uniform(0, length))
        run.kill()
        _, errors = run.communicate()
        if run.returncode == 0:  # it came to its end first: begin again, and count the next kill
            shutil.rmtree(last.parent)
            continue
        if "Traceback" in errors or "error:" in errors:
            raise RuntimeError(errors)
        done += 1
        saved = torch.load(last, weights_only=True) if last.exists() else {"epoch": 0, "pictures": 0}
        state = f"{saved['epoch']} epochs and {saved['pictures']} images saved, part file {partial.exists()}"
        say(f"kill {done:2} {kind:12}: {state}")
    finish(start_training(folder, *words, "--output", "killed"))
    ends = [
        torch.load(Path(folder, name, "unireplknet_test", "last.pth"), weights_only=True)
        for name in ("straight", "killed")
    ]
    return differences(*ends), done


def finish(run):
    """Wait for a run that must succeed."""
    _, errors = run.communicate()
    if run.returncode:
        raise RuntimeError(errors)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    from conftest import fill_classes

    with tempfile.TemporaryDirectory() as folder:
        fill_classes(Path(folder, "data1"), {"a": 20, "b": 20, "c": 20})
        subprocess.run([sys.executable, str(ROOT / "makedata.py")], cwd=folder, check=True, capture_output=True)
        different, done = kill_and_compare(folder, options.kills, options.epochs, options.seed, options.device)
    print(f"{done} kills; different from the uninterrupted run: {', '.join(different) or 'nothing'}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
