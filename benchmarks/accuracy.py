"""Accuracy of train.py's recipe, and of changes to it, on the pictures in data1, over several random splits.

    python -m benchmarks.accuracy --jobs 2                          the recipe on three splits, two runs at once
    python -m benchmarks.accuracy --what ablations --splits 0       one change at a time
    python -m benchmarks.accuracy --what fine_tuning                from the weights of other classes, and from scratch
    python -m benchmarks.accuracy --what weights                    train on every picture, and write weights to ship

Each run is `makedata.py`, `mean_std.py`, `train.py` and `test.py`, with one seed for the split and for the weights.
Measured are the last epoch's EMA weights, so that nothing is chosen by the pictures that it is measured on. Runs that
are finished are not repeated, and one that was interrupted is continued. Prints tables in Markdown, and leaves
confusion_matrix.png of all splits together.
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.checkpoint import load_checkpoint, save_checkpoint
from common.options import UserError, run
from common.plots import plot_confusion_matrix
from makedata import place

WHAT: str = "recipe"  # recipe, ablations, fine_tuning or weights
SPLITS: list[int] = [0, 1, 2]  # seeds of the splits, which are those of the weights and the augmentation, too
# Options of train.py for every run: the smallest network, on pictures that suit a CPU.
OPTIONS: str = "--model unireplknet_a --img-size 160 --start-size 64 --epochs 60 --drop-path 0"
JOBS: int = 1  # runs at once, each with its share of the cores
SOURCE: str = "data1"  # folder that holds <class>/<picture>
OUTPUT: str = "accuracy"  # folder for splits and runs

ROOT = Path(__file__).resolve().parent.parent

# Name of a run -> options of train.py beside the recipe, which is its constants and OPTIONS.
ABLATIONS = {
    "recipe": [],
    "AdamW, learning rate 1e-3": ["--optimizer", "adamw", "--learning-rate", "1e-3"],
    "crops of 70 % and more": ["--crop", "0.7"],
    "no Mixup, no CutMix": ["--mix-prob", "0"],
    "no Cutout": ["--cutout", "0"],
    "no label smoothing": ["--smoothing", "0"],
    "layer scale from 1e-6": ["--layer-scale", "1e-6"],
    "full size from the start": ["--start-size", "0"],
}


def python(*words, threads=None):
    """Run a script of the repository with `words`; UserError with its message if it fails."""
    environment = os.environ | {"TQDM_DISABLE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, str(ROOT / words[0]), *map(str, words[1:])]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode not in (0, 3):
        raise UserError(f"{' '.join(map(str, words))} failed: {done.stderr.strip() or done.stdout.strip()}")


def prepare_split(source, target, split, *options):
    """Split `source` into `target`, which is returned, unless that was done before."""
    if not (target / "mean_std.json").is_file():
        python("makedata.py", "--source", source, "--target", target, "--seed", split, *options)
        python("mean_std.py", "--source", source, "--output", target / "mean_std.json")
    return target


def train(data, folder, options, split, threads):
    """Train on `data`, or go on with it; returns last.pth."""
    common = ["--data", data, "--seed", split, "--output", folder, "--resume", "auto"]
    python("train.py", *common, *OPTIONS.split(), *options, threads=threads)
    (checkpoint,) = folder.glob("*/last.pth")
    return checkpoint


def measure(checkpoint, data, folder, tta):
    """Confusion matrix (true classes, predicted classes) of a checkpoint on data/val."""
    options = ["--checkpoint", checkpoint, data / "val", "--output", folder, "--tta" if tta else "--no-tta"]
    python("test.py", *options)
    with open(folder / "confusion_matrix.csv", newline="", encoding="utf-8-sig") as file:
        return [[int(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]]


def run_once(name, options, split, data, threads):
    """Train and test once.

    Returns:
        dict of plain types: classes, epochs, minutes, images a second, accuracy of the raw weights, confusion matrices
        of the EMA weights without (plain) and with test-time augmentation (tta), ...
    """
    folder = Path(OUTPUT, name.replace(" ", "_"), str(split))
    result = folder / "accuracy.json"
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    checkpoint = train(data, folder, options, split, threads)
    with open(checkpoint.with_name("log.csv"), newline="", encoding="utf-8") as file:
        log = [{name: float(cell or "nan") for name, cell in row.items()} for row in csv.DictReader(file)]
    minutes = np.cumsum([row["seconds"] for row in log]) / 60
    figures = dict(
        classes=load_checkpoint(checkpoint)["classes"],
        epochs=len(log),
        minutes=minutes[-1],
        minutes_to_95=next((m for m, row in zip(minutes, log) if row["ema_acc1"] >= 95), None),
        images_a_second=float(np.median([row["img_per_s"] for row in log])),
        raw=log[-1]["val_acc1"],
        plain=measure(checkpoint, data, folder / "plain", tta=False),
        tta=measure(checkpoint, data, folder / "tta", tta=True),
    )
    result.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return figures


def run_all(experiments, data):
    """Every experiment on every split: {name: [what `run_once` returned, ...]}.

    Args:
        experiments: {name: options of train.py, or function on a split that returns them}.
        data: function on a split that returns its folder.
    """
    folders = {split: data(split) for split in SPLITS}
    threads = max((os.cpu_count() or 1) // JOBS, 1) if JOBS > 1 else None
    runs = [(name, options, split) for split in SPLITS for name, options in experiments.items()]
    with ThreadPoolExecutor(JOBS) as pool:  # each thread waits for a process of its own
        jobs = [
            pool.submit(
                run_once, name, options(split) if callable(options) else options, split, folders[split], threads
            )
            for name, options, split in runs
        ]
        done = [job.result() for job in tqdm(jobs, desc="runs", unit="run", leave=False)]
    return {name: [result for run, result in zip(runs, done) if run[0] == name] for name in experiments}


def accuracy(matrix):
    """Share of the diagonal of a confusion matrix, in percent."""
    return 100 * np.trace(matrix) / np.sum(matrix)


def mean_and_spread(values):
    """Mean and standard deviation in words."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def print_runs(results):
    """One row for each experiment."""
    print("| run | splits | EMA weights | with --tta | raw weights | minutes | to 95 % | images/s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, own in results.items():
        accuracies = [[accuracy(result[what]) for result in own] for what in ("plain", "tta")]
        accuracies.append([result["raw"] for result in own])
        minutes, speed = (np.mean([result[key] for result in own]) for key in ("minutes", "images_a_second"))
        reached = [result["minutes_to_95"] for result in own]
        to_95 = "-" if None in reached else f"{np.mean(reached):.0f}"
        cells = [name, len(own), *map(mean_and_spread, accuracies), f"{minutes:.1f}", to_95, f"{speed:.0f}"]
        print(f"| {' | '.join(map(str, cells))} |")


def print_classes(results):
    """One row for each class, over all splits, with test-time augmentation; and the confusion matrix as a picture."""
    matrix, classes = np.sum([result["tta"] for result in results], 0), results[0]["classes"]
    print("\n| class | pictures | precision | recall | F1 |\n|---|---|---|---|---|")
    for index, name in enumerate(classes):
        right, said, true = matrix[index, index], matrix[:, index].sum(), matrix[index].sum()
        shares = (right / max(said, 1), right / true, 2 * right / (said + true))
        print(f"| {name} | {true} | {' | '.join(f'{100 * share:.1f}' for share in shares)} |")
    plot_confusion_matrix(matrix, classes, Path(OUTPUT, "confusion_matrix.png"))


def compare_fine_tuning():
    """Train on one half of the classes, then on the other half: from these weights, and from scratch for longer."""
    classes = sorted(folder for folder in Path(SOURCE).iterdir() if folder.is_dir())
    for half, own in (("known", classes[::2]), ("new", classes[1::2])):
        for picture in (picture for folder in own for picture in folder.iterdir()):
            target = Path(OUTPUT, f"data1.{half}", picture.parent.name, picture.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                place(picture, target, link=True)

    def data(half):
        return lambda split: prepare_split(Path(OUTPUT, f"data1.{half}"), Path(OUTPUT, f"data.{half}.{split}"), split)

    known = run_all({"known classes": []}, data("known"))

    def fine_tune(split):
        (checkpoint,) = Path(OUTPUT, "known_classes", str(split)).glob("*/last.pth")
        # A network that knows pictures of full size would have to learn small ones anew; fewer epochs make up for it.
        return ["--pretrained", checkpoint, "--epochs", 8, "--start-size", 0]

    new = run_all({"new classes from scratch": ["--epochs", 12], "fine-tuned": fine_tune}, data("new"))
    print_runs(known | new)


def train_weights():
    """Train on every picture of SOURCE and write the EMA weights in half precision, with all that test.py needs."""
    data = prepare_split(Path(SOURCE), Path(OUTPUT, "data.all"), SPLITS[0], "--val-ratio", 0.001)
    for picture in (data / "val").glob("*/*"):  # makedata.py keeps one of each class, which are learned from, too
        target = data / "train" / picture.relative_to(data / "val")
        if not target.exists():
            place(picture, target, link=True)
    checkpoint = load_checkpoint(train(data, Path(OUTPUT, "weights"), [], SPLITS[0], None))
    state_dict = {
        name: tensor.half() if tensor.is_floating_point() and "running" not in name else tensor
        for name, tensor in checkpoint["state_dict_ema"].items()
    }
    for name in ("DATA", "OUTPUT", "RESUME"):  # where this run lay is nobody's concern
        del checkpoint["config"][name]
    keep = ("arch", "model_args", "classes", "mean", "std", "img_size", "epoch", "pictures_train", "config", "versions")
    path = Path(OUTPUT, f"seedlings_{checkpoint['arch']}.pth")
    save_checkpoint(dict(state_dict=state_dict) | {name: checkpoint[name] for name in keep}, path)
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB, trained on {checkpoint['pictures_train']} pictures")


def main():
    if not SPLITS or JOBS < 1:
        raise UserError("SPLITS must hold a seed or more, and JOBS be at least 1")
    if WHAT in ("recipe", "ablations"):
        experiments = {"recipe": []} if WHAT == "recipe" else ABLATIONS
        results = run_all(experiments, lambda split: prepare_split(SOURCE, Path(OUTPUT, f"data.{split}"), split))
        print_runs(results)
        print_classes(results["recipe"])
    elif WHAT == "fine_tuning":
        compare_fine_tuning()
    elif WHAT == "weights":
        train_weights()
    else:
        raise UserError(f"WHAT must be recipe, ablations, fine_tuning or weights, got {WHAT!r}")


if __name__ == "__main__":
    run(main)
