"""Accuracy of train.py's recipe, and of changes to it, on the pictures in data1 and on several random splits.

    python -m benchmarks.accuracy                                   the recipe on three splits
    python -m benchmarks.accuracy --what ablations --splits 0       one change at a time
    python -m benchmarks.accuracy --jobs 2                          two runs at once, with half of the cores each

Each run is `makedata.py`, `mean_std.py`, `train.py` and `test.py` with another seed for the split and for the weights; it
is measured on the last epoch's EMA weights, so that nothing is chosen by the pictures that it is measured on. Runs that
are finished are not repeated, and one that was interrupted is continued. Prints tables in Markdown and leaves
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

from common.options import UserError, run
from common.plots import plot_confusion_matrix

WHAT: str = "recipe"  # recipe or ablations
SPLITS: list[int] = [0, 1, 2]  # seeds of the splits, which are those of the weights and the augmentation, too
OPTIONS: list[str] = []  # options of train.py for every run, such as --options=--model,unireplknet_t
JOBS: int = 1  # runs at once
OUTPUT: str = "accuracy"  # folder for splits and runs

ROOT = Path(__file__).resolve().parent.parent

# Options of train.py, each beside the recipe in its constants.
RECIPE = {"recipe": []}
ABLATIONS = {
    "recipe": [],
    "whole pictures": ["--crop", "1"],
}


def python(*words, threads=None):
    """Run a Python script of the repository with `words`; UserError with its message if it fails."""
    environment = os.environ | {"TQDM_DISABLE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, ROOT / words[0], *words[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode not in (0, 3):
        raise UserError(f"{' '.join(map(str, words))} failed: {done.stderr.strip() or done.stdout.strip()}")


def prepare_split(split):
    """Split data1 anew; returns the folder."""
    folder = Path(OUTPUT, f"data.{split}")
    if not (folder / "mean_std.json").is_file():
        python("makedata.py", "--target", str(folder), "--seed", str(split))
        python("mean_std.py", "--output", str(folder / "mean_std.json"))
    return folder


def run_once(name, options, split, threads):
    """Train and test once.

    Returns:
        dict: minutes; images a second; confusion matrices of the raw weights' accuracy and of the EMA weights, with and
        without test-time augmentation.
    """
    data, folder = Path(OUTPUT, f"data.{split}"), Path(OUTPUT, name, str(split))
    result = folder / "accuracy.json"
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    common = ["--data", str(data), "--seed", str(split), "--output", str(folder), "--resume", "auto"]
    python("train.py", *common, *OPTIONS, *options, threads=threads)
    (checkpoint,) = folder.glob("*/last.pth")
    matrices = {}
    for what, flag in (("plain", "--no-tta"), ("tta", "--tta")):
        test = ["--checkpoint", str(checkpoint), str(data / "val"), "--output", str(folder / what), flag]
        python("test.py", *test, threads=threads)
        with open(folder / what / "confusion_matrix.csv", newline="", encoding="utf-8-sig") as file:
            classes, *rows = csv.reader(file)
        matrices[what] = [[int(cell) for cell in row[1:]] for row in rows]
    with open(checkpoint.with_name("log.csv"), newline="", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    figures = dict(
        classes=classes[1:],
        epochs=len(log),
        minutes=sum(float(row["seconds"]) for row in log) / 60,
        images_a_second=float(np.median([float(row["img_per_s"]) for row in log])),
        raw=float(log[-1]["val_acc1"]),
        minutes_to_95=minutes_to(log, 95),
        **matrices,
    )
    result.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return figures


def minutes_to(log, accuracy):
    """Minutes of training until the EMA weights first reach `accuracy`, or None."""
    minutes = np.cumsum([float(row["seconds"]) for row in log]) / 60
    return next((float(m) for m, row in zip(minutes, log) if float(row["ema_acc1"]) >= accuracy), None)


def accuracy(matrix):
    """Share of the diagonal of a confusion matrix, in percent."""
    return 100 * np.trace(matrix) / np.sum(matrix)


def mean_and_spread(values):
    """ "mean ± standard deviation" of some figures."""
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def main():
    if WHAT not in ("recipe", "ablations"):
        raise UserError(f"WHAT must be recipe or ablations, got {WHAT!r}")
    if not SPLITS or JOBS < 1:
        raise UserError("SPLITS must hold a seed or more, and JOBS be at least 1")
    for split in SPLITS:
        prepare_split(split)
    experiments = RECIPE if WHAT == "recipe" else ABLATIONS
    threads = max((os.cpu_count() or 1) // JOBS, 1) if JOBS > 1 else None
    runs = [(name, options, split) for name, options in experiments.items() for split in SPLITS]
    with ThreadPoolExecutor(JOBS) as pool:  # each thread waits for a process of its own
        started = [pool.submit(run_once, *run, threads) for run in runs]
        results = [job.result() for job in tqdm(started, desc="runs", unit="run", leave=False)]

    print("| run | n | EMA | with --tta | raw weights | minutes | images/s |\n|---|---|---|---|---|---|---|")
    for name in experiments:
        own = [result for run, result in zip(runs, results) if run[0] == name]
        figures = [
            [accuracy(result["plain"]) for result in own],
            [accuracy(result["tta"]) for result in own],
            [result["raw"] for result in own],
        ]
        n = len(SPLITS) * int(np.sum(own[0]["plain"]))
        minutes, speed = (np.mean([result[key] for result in own]) for key in ("minutes", "images_a_second"))
        print(f"| {name} | {n} | {' | '.join(map(mean_and_spread, figures))} | {minutes:.1f} | {speed:.0f} |")

    recipe = [result for run, result in zip(runs, results) if run[0] == "recipe"]
    matrix, classes = np.sum([result["tta"] for result in recipe], 0), recipe[0]["classes"]
    print("\n| class | n | precision | recall | F1 |\n|---|---|---|---|---|")
    for index, name in enumerate(classes):
        right, said, true = matrix[index, index], matrix[:, index].sum(), matrix[index].sum()
        f1 = 2 * right / max(said + true, 1)
        print(f"| {name} | {true} | {100 * right / max(said, 1):.1f} | {100 * right / true:.1f} | {100 * f1:.1f} |")
    plot_confusion_matrix(matrix, classes, Path(OUTPUT, "confusion_matrix.png"))


if __name__ == "__main__":
    run(main)
