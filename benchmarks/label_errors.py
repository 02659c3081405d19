"""How many wrong labels tools/cross_validate.py finds: change some on purpose, and look for them.

    python benchmarks/label_errors.py --source data1 --options="--model unireplknet_a --img-size 96 --epochs 20"

Of the images in SOURCE the share CHANGED gets another class, each at random. They are cross-validated with the OPTIONS
of train.py, and label_errors.csv is compared with what was changed: of N changed labels, how many are among the first
N rows, and at what row half of them and nine in ten are found. Interrupted, the same command goes on where it stopped.
Writes to OUTPUT: labels.csv, data, and cross_validation with its sheet of suspicious images.
"""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import numpy as np

from common.files import write_csv
from common.images import is_image, scan_class_folders
from common.options import Limits, Name, NonNegativeInt, UserError, run

SOURCE: Name = "data1"  # folder that holds <class>/<image>
CHANGED: Annotated[float, Limits(0, 0.5)] = 0.05  # share of the labels that is changed
FOLDS: Annotated[int, Limits(2, 100)] = 5  # see tools/cross_validate.py
OPTIONS: str = "--model unireplknet_a --img-size 96 --start-size 64 --epochs 20 --drop-path 0"  # of train.py
SEED: NonNegativeInt = 0  # of the changed labels, the split and the folds
OUTPUT: Name = "label_errors"  # folder for the changed labels and the result

ROOT = Path(__file__).resolve().parent.parent


def main():
    folder = Path(OUTPUT)
    data, result = folder / "data", folder / "cross_validation"
    changed = change_labels(Path(SOURCE), CHANGED, SEED, folder)
    python("makedata.py", "--source", SOURCE, "--labels", folder / "labels.csv", "--target", data, "--seed", SEED)
    python("mean_std.py", "--source", data / "train", "--output", data / "mean_std.json")
    options = ["--folds", FOLDS, "--data", data, "--output", result, "--seed", SEED]
    python("tools/cross_validate.py", *options, *OPTIONS.split())
    with open(result / "label_errors.csv", newline="", encoding="utf-8-sig") as file:
        found = [Path(row["image"]).resolve() in changed for row in csv.DictReader(file)]
    print(describe(found, len(changed)))


def change_labels(source, share, seed, folder):
    """Write labels.csv, in which a `share` of the images has another class; returns the paths of these images."""
    files = scan_class_folders(source).choose(is_image)
    classes = files.classes
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(files), round(share * len(files)), replace=False)
    labels = np.array(files.labels)
    labels[chosen] = (labels[chosen] + generator.integers(1, len(classes), len(chosen))) % len(classes)
    images = [f"{classes[true]}/{name}" for name, true in zip(files.names, files.labels)]
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "labels.csv", [["image", "class"], *([path, classes[k]] for path, k in zip(images, labels))])
    return {(source / images[number]).resolve() for number in chosen}


def python(*words):
    """Run a script of the repository with `words`, whose output is shown."""
    done = subprocess.run([sys.executable, str(ROOT / words[0]), *map(str, words[1:])])
    if done.returncode not in (0, 3):  # 3: some images cannot be read
        raise UserError(f"{words[0]} did not come to its end; the same command goes on from there")


def describe(found, count):
    """One sentence on the rows of label_errors.csv.

    Args:
        found: for each row whether its label was changed.
        count: number of changed labels.
    """
    places = np.flatnonzero(found) + 1
    rows = {share: places[int(np.ceil(share * count)) - 1] for share in (0.5, 0.9) if len(places) >= share * count}
    parts = [f"{share:.0%} of them in the first {row}" for share, row in rows.items()]
    first = f"{np.sum(found[:count])} of the first {count} rows are changed labels"
    sentence = f"{count} changed labels, {len(found)} rows: {first}, {len(places)} of all rows"
    return "; ".join([sentence, *([", ".join(parts)] if parts else [])])


if __name__ == "__main__":
    run(main)
