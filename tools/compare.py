"""Which run was better? One table and one figure of several runs of train.py.

    python tools/compare.py                                       all in checkpoints/
    python tools/compare.py checkpoints/unireplknet_a*            some of them; folders or patterns

Prints for each run, the best one first, the constants in which the runs differ, the best and the last validation
accuracy and how long it took, and writes results/compare.csv and results/compare.png, the learning curves of all. The
accuracies are those of the weights that test.py uses. Runs whose validation images differ cannot be compared by them.

Exit status: 0; 1 an error; 2 a wrong option or constant; 3 done, but some folders hold no run.
"""

import csv
import glob
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

from common.files import write_csv
from common.manifest import read_json
from common.options import Name, PositiveInt, UserError, run
from common.plots import plot_runs
from common.run_folder import NO_EFFECT
from common.text import label, pad, width

FOLDERS: list[Name] = []  # folders of runs, or patterns; []: all in checkpoints/
WIDTH: PositiveInt = 24  # characters of a constant's value in the printed table, from which it is shortened
OUTPUT: Name = "results"  # folder for compare.csv and compare.png


def main():
    runs, reasons = read_runs(find_folders(FOLDERS))
    for reason in reasons:
        print(f"skipped: {reason}")
    if not runs:
        raise UserError("there is no run to compare; give folders of train.py, such as checkpoints/unireplknet_t")
    runs.sort(key=lambda one: -one.best)
    table = make_table(runs)
    folder = Path(OUTPUT)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "compare.csv", table)
    plot_runs({one.name: one.history for one in runs}, folder / "compare.png")
    print_table(table, WIDTH)
    images = {one.val_images for one in runs if one.val_images is not None}
    if len(images) > 1:
        numbers = ", ".join(map(str, sorted(images)))
        print(f"\nwarning: the runs have different numbers of validation images ({numbers})")
    print(f"\nfiles in {folder}: compare.csv, compare.png")
    return 3 if reasons else 0


@dataclass
class Run:
    """What a folder says of its run."""

    name: str
    history: list  # one dict of numbers for each epoch
    key: str  # "ema" or "val": the weights that test.py uses
    config: dict = field(default_factory=dict)  # train.py's constants; empty if unknown
    val_images: int | None = None

    @property
    def best(self):
        """Highest accuracy in percent; -1 if there is none."""
        values = (row.get(f"{self.key}_acc1") for row in self.history)
        return max((value for value in values if value is not None), default=-1)


def find_folders(names):
    """The folders that `names`, or patterns, stand for; UserError for one that stands for none."""
    folders = {}
    for name in names or ["checkpoints/*"]:
        found = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not found:
            raise UserError(f"there is no folder {name}; give folders that train.py wrote, or a pattern of some")
        # A pattern also finds files, such as locks, which are no one's mistake.
        folders |= {Path(path): None for path in found if Path(path).is_dir() or path == name and names}
    # So does a shell's, which names them beside the folders.
    beside = {path.parent for path in folders if path.is_dir()}
    return [path for path in folders if path.is_dir() or path.parent not in beside]


def read_runs(folders):
    """(list of `Run`, a sentence for each folder that holds none)."""
    runs, reasons = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except (UserError, OSError, ValueError) as error:
            reasons.append(f"{folder} {error}" if isinstance(error, ValueError) else str(error))
    return runs, reasons


def read_run(folder):
    """The `Run` in a folder of train.py; UserError or ValueError if there is none."""
    path = folder / "log.csv"
    if not folder.is_dir():
        raise ValueError("is a file, not the folder of a run; give the folder that contains it")
    if not path.is_file():
        raise ValueError("holds no log.csv, so no run of train.py that finished an epoch; give another folder")
    history = read_log(path)
    key = "ema" if any(row.get("ema_acc1") is not None for row in history) else "val"
    result = read_json(folder / "result.json") if (folder / "result.json").is_file() else {}
    config = result.get("config", {})
    if not isinstance(config, dict) or not isinstance(result.get("val_pictures", 0), int):
        raise UserError(f"{folder / 'result.json'} is not train.py's; delete it, or give another folder")
    return Run(folder.as_posix(), history, key, config, result.get("val_pictures"))


def read_log(path):
    """The rows of log.csv as dicts of numbers, None for empty cells; UserError if it is damaged or not train.py's."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        rows = [{name: float(cell) if cell else None for name, cell in row.items()} for row in rows]
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}); resume the run, which writes it again") from error
    if not rows or not {"epoch", "val_acc1", "seconds"} <= rows[0].keys() or any(r["epoch"] is None for r in rows):
        raise UserError(f"{path} has no epoch, or is not train.py's; give another folder")
    return rows


def make_table(runs):
    """Header and a row for each run: name, the constants that differ, accuracies, epochs and minutes."""
    names = dict.fromkeys(name for one in runs for name in one.config)
    different = [
        name for name in names if name not in NO_EFFECT and len({repr(one.config.get(name, "?")) for one in runs}) > 1
    ]
    rows = [["run", *different, "best acc1 / %", "in epoch", "last acc1 / %", "epochs", "minutes"]]
    for one in runs:
        key = f"{one.key}_acc1"
        best = next((row for row in one.history if row.get(key) == one.best), {"epoch": None})
        last = one.history[-1]
        minutes = sum(row["seconds"] or 0 for row in one.history) / 60
        cells = [one.config.get(name, "?") for name in different]
        accuracies = [None if value is None else f"{value:.2f}" for value in (best.get(key), last.get(key))]
        epochs = [best["epoch"] and int(best["epoch"]), int(last["epoch"])]
        rows.append([one.name, *cells, accuracies[0], epochs[0], accuracies[1], epochs[1], f"{minutes:.1f}"])
    return rows


def print_table(rows, most):
    """Print rows in columns of equal width, cells besides those of the first column in at most `most` characters."""
    rows = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    rows = [[label(cell, most if place else 60) for place, cell in enumerate(row)] for row in rows]
    widths = [max(map(width, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(pad(cell, columns) for cell, columns in zip(row, widths)).rstrip())


if __name__ == "__main__":
    run(main, positional="FOLDERS")
