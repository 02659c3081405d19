"""Cross-validation: train on all folds but one, predict that one, and so every image by a network that never saw it.

    python tools/cross_validate.py                                      5 folds with train.py's constants
    python tools/cross_validate.py --folds 10 --model unireplknet_a --epochs 50      other options go to train.py

The images of data/train and data/val are split anew, class by class, whole groups and identical files into one fold;
data/test is not touched. Given the same command again after an interruption, it goes on where it stopped, to the same
end, bit for bit. Writes to cross_validation/:

    fold1/<model>/last.pth, ...   the network of each fold, after its last epoch
    out_of_fold.csv               the prediction for every image, by the network that was not trained on it
    report.txt, result.json       accuracy of each fold, their mean and spread; precision, recall and F1 of each class
    confusion_matrix.csv, .png    of all images
    label_errors.csv, .png        images that are probably labelled wrongly, the most suspicious first
    folds.csv                     which image is in which fold

The weights are those after the last epoch, since best.pth would be chosen by the images that are predicted. Mean and
standard deviation of the pixels are computed in each fold, from its training images.

`python test.py --checkpoint "cross_validation/fold*/*/last.pth" photo.jpg` averages the networks of all folds.

Exit status: 0; 1 an error; 2 a wrong option or constant; 130, 143 or 129 stopped by Ctrl-C, SIGTERM or SIGHUP, saved.
"""

import ast
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # common/, tools/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from common.audio import kind_of
from common.checkpoint import build_network, load_checkpoint
from common.columns import Hashes
from common.contents import hash_contents
from common.dataset import open_image_folder, transform_of
from common.device import choose_device
from common.evaluation import accuracy_interval, compute_logits, report_classes, tabulate_confusions
from common.files import write_csv, write_json, write_text
from common.manifest import CACHE, MANIFEST, STATISTICS, fingerprint, read_json, read_manifest, read_table
from common.options import ConstantError, Limits, Name, NonNegativeInt, UserError, run
from common.plots import plot_confusion_matrix, plot_sheet
from common.run_folder import lock, set_aside
from common.text import label
from common.workers import SIGNALS
from tools.label_errors import find_label_errors

FOLDS: Annotated[int, Limits(2, 100)] = 5  # number of folds, and of networks
DATA: Name = "data"  # folder whose train/ and val/ are split anew; makedata.py makes it
SEED: int = 42  # of the folds, and of each training
DEVICE: Name = "auto"  # to train and predict on; "auto": cuda, else mps, else cpu; or a device such as "cuda:1"
SHOWN: NonNegativeInt = 48  # images in label_errors.png; 0: no such file
OUTPUT: Name = "cross_validation"  # folder for the result; that of other settings is renamed
OPTIONS: list[str] = []  # of train.py; on the command line, whatever is no option of this script

OWN = ("--data", "--output", "--seed", "--device", "--resume")  # options of train.py that are set here
SETTINGS = "settings.json"
DOUBTFUL = 80  # % accuracy below which most disagreement is the networks' fault, not the labels'


def main():
    given = [word for word in OPTIONS if word.split("=")[0].replace("_", "-") in OWN]
    if given:
        raise ConstantError(f"OPTIONS must not contain {', '.join(given)}, which this script sets; omit it")
    device = choose_device(DEVICE)
    pool = read_pool(Path(DATA))
    folds = choose_folds(pool, FOLDS, SEED)
    folder = Path(OUTPUT)
    with lock(folder):
        begin(folder, dict(folds=FOLDS, seed=SEED, options=OPTIONS, constants=read_constants_of_train(), data=pool.key))
        write_csv(folder / "folds.csv", [["image", "class", "fold"], *pool.rows(folds + 1)])
        probabilities = np.zeros((len(pool.paths), len(pool.classes)), np.float32)
        for number in range(FOLDS):
            inside = folds == number
            print(f"\nfold {number + 1} of {FOLDS}: {(~inside).sum()} images to train on, {inside.sum()} to predict")
            own = folder / f"fold{number + 1}"
            status = train_fold(pool, inside, own, ["--seed", SEED, "--device", DEVICE, *OPTIONS])
            if status:
                print(f"fold {number + 1} of {FOLDS} is not finished; the same command goes on from there")
                return status
            probabilities[inside] = predict_fold(pool, inside, own, device)
        write_results(pool, folds, probabilities, folder)
        errors = write_label_errors(pool, folds, probabilities, SHOWN, folder)
    print(f"\n{errors}\n\naverage of all folds: python test.py --checkpoint \"{folder.as_posix()}/fold*/*/last.pth\"")


@dataclass
class Pool:
    """The images that are split into folds, sorted by class and content."""

    paths: np.ndarray  # of text
    sources: np.ndarray  # where makedata.py found them, or the same
    names: np.ndarray  # file names, different in each class
    labels: np.ndarray  # int (images,)
    contents: Hashes
    groups: np.ndarray | None  # of text; None: no groups
    classes: list
    manifest: dict  # what a manifest of a part of them says: sound or value_range
    key: str = ""  # fingerprint of all of this

    def rows(self, *columns):
        """For each image its path, its class, and what stands in these columns."""
        names = (self.classes[number] for number in self.labels)
        return ([source, name, *cells] for source, name, *cells in zip(self.sources, names, *columns))


def read_pool(data):
    """The `Pool` of the images of `data`/train and `data`/val; UserError if they hold different classes."""
    parts = ("train", "val")
    missing = [str(data / part) for part in parts if not (data / part).is_dir()]
    if missing:
        raise UserError(f"there is no folder {' and no folder '.join(missing)}; run makedata.py first")
    train, val = (open_image_folder(data / part) for part in parts)
    if train.classes != val.classes:
        different = ", ".join(sorted(set(train.classes) ^ set(val.classes)))
        raise UserError(f"{data}/train and {data}/val must hold the same classes, but only one of them has {different}")
    known = read_manifest(data)
    table = read_table(data) if known else None
    place = {} if table is None else {path: index for index, path in enumerate(table.path)}
    paths, labels = [*train.files, *val.files], np.concatenate([train.targets, val.targets])
    twins = Counter((number, os.path.basename(path).lower()) for number, path in zip(labels, paths))
    names, sources, groups = [], [], []
    for path, number in zip(paths, labels):
        part, name = Path(path).relative_to(data).parts[0], os.path.basename(path)
        names.append(name if twins[number, name.lower()] == 1 else f"{part}-{name}")
        index = place.get(f"{part}/{train.classes[number]}/{name}")
        sources.append(path if index is None else table.source[index])
        if table is not None and table.group is not None:
            if index is None:
                raise UserError(f"makedata.py did not put {path} there, so its group is unknown; run makedata.py again")
            groups.append(table.group[index])
    contents = hash_contents(paths, data / CACHE)
    order = np.lexsort((paths, contents.keys(), labels))
    kept = {name: known[name] for name in ("sound", "value_range") if known.get(name) is not None}
    columns = (np.array(column, object)[order] for column in (paths, sources, names))
    groups = np.array(groups, object)[order] if groups else None
    pool = Pool(*columns, labels[order], contents[order], groups, train.classes, kept)
    names = (f"{train.classes[number]}/{name}" for number, name in zip(pool.labels, pool.names))
    marks = zip(pool.contents, names, [""] * len(paths) if groups is None else groups)
    pool.key = fingerprint([" ".join(mark) for mark in marks])
    return pool


def choose_folds(pool, folds, seed):
    """Split a pool into folds, stratified: int array (images,), the fold of each.

    Raises:
        UserError: if a class has too few images or groups for so many folds.
    """
    keys = pool.contents.keys() if pool.groups is None else pool.groups
    what = "different images" if pool.groups is None else "groups"
    _, units = np.unique(keys.astype(str) if pool.groups is not None else keys, return_inverse=True)
    for number, name in enumerate(pool.classes):
        count = len(np.unique(units[pool.labels == number]))
        if count < folds:
            raise UserError(f"class {name!r} has {count} {what}, fewer than FOLDS {folds}; lower FOLDS or add images")
    result = np.zeros(len(units), int)
    if pool.groups is None:  # identical files count once
        _, first = np.unique(units, return_index=True)
        splitter = StratifiedKFold(folds, shuffle=True, random_state=seed % 2**32)
        of_unit = np.zeros(len(first), int)
        for number, (_, inside) in enumerate(splitter.split(first, pool.labels[first])):
            of_unit[inside] = number
        result = of_unit[units]
    else:
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed % 2**32)
        for number, (_, inside) in enumerate(splitter.split(units, pool.labels, units)):
            result[inside] = number
    table = np.zeros((folds, len(pool.classes)), int)
    np.add.at(table, (result, pool.labels), 1)
    if not table.all():
        name = pool.classes[np.flatnonzero(~table.all(0))[0]]
        raise UserError(f"with these groups one fold has no image of the class {name!r}; lower FOLDS, or change SEED")
    return result


def begin(folder, settings):
    """Make the folder, or go on in it if its settings are the same; else it is renamed."""
    path = folder / SETTINGS
    if not path.is_file() or read_json(path) != settings:
        set_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def read_constants_of_train():
    """{name: value as it is written} of train.py's constants, which may be changed in the file."""
    body = ast.parse((ROOT / "train.py").read_text(encoding="utf-8-sig")).body
    constants = [node for node in body if isinstance(node, ast.AnnAssign) and node.target.id.isupper()]
    return {node.target.id: ast.unparse(node.value) for node in constants}


def train_fold(pool, inside, folder, options):
    """Train on what is not `inside` the fold, unless that is done; returns the exit status.

    Args:
        pool: a `Pool`.
        inside: bool array (images,): which are to be predicted.
        folder: of this fold.
        options: of train.py.
    """
    if (folder / "probabilities.npy").is_file():
        return 0
    data = folder / "data"
    if not data.is_dir():
        make_data(pool, inside, folder)
    if not (data / STATISTICS).is_file():
        status = start("mean_std.py", "--source", data / "train", "--output", data / STATISTICS)
        if status not in (0, 3):
            return status
    return start("train.py", "--data", data, "--output", folder, "--resume", "auto", *options)


def make_data(pool, inside, folder):
    """Make `folder`/data with train/ and val/, by hard links where the file system has them, all or nothing."""
    part = folder / "data.part"
    shutil.rmtree(part, ignore_errors=True)
    for side in ("train", "val"):
        for name in pool.classes:
            (part / side / name).mkdir(parents=True)
    for path, name, number, held_out in zip(pool.paths, pool.names, pool.labels, inside):
        target = part / ("val" if held_out else "train") / pool.classes[number] / name
        try:
            os.link(os.path.realpath(path), target)
        except OSError:  # another drive, or a file system without links
            shutil.copy2(path, target)
    write_json(part / MANIFEST, pool.manifest | dict(fingerprint=fingerprint(pool.contents[~inside])))
    part.rename(folder / "data")


def start(script, *options):
    """Run a script in a process of its own, which gets the signals that this one gets; returns its exit status."""
    # As this process is started: the number of threads and the like must be the same in all folds.
    process = subprocess.Popen([sys.executable, ROOT / script, *map(str, options)])

    def pass_on(number, frame):
        if os.name == "posix":  # under Windows the console tells both
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def predict_fold(pool, inside, folder, device):
    """Probabilities of the images `inside` a fold, float32 array (images, classes), by the network in its folder."""
    path = folder / "probabilities.npy"
    if path.is_file():
        with contextlib.suppress(ValueError, OSError, EOFError):  # damaged: computed again
            probabilities = np.load(path)
            if probabilities.shape == (inside.sum(), len(pool.classes)):
                return probabilities
    [weights] = folder.glob("*/last.pth")
    checkpoint = load_checkpoint(weights)
    network, kind = build_network(checkpoint).to(device), kind_of(checkpoint)
    paths, transform = pool.paths[inside], transform_of(checkpoint)
    logits = compute_logits(lambda images: network(images.to(device)), paths, transform, 32, "predict", kind.load)
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    partial = path.with_name("probabilities.part")
    with open(partial, "wb") as file:
        np.save(file, probabilities)
    partial.replace(path)
    shutil.rmtree(folder / "data", ignore_errors=True)  # the links and the cache, which are not needed any more
    return probabilities


def write_results(pool, folds, probabilities, folder):
    """Write the out-of-fold predictions and what is measured on them, and print the accuracies."""
    classes, predictions = pool.classes, probabilities.argmax(1)
    header = ["image", "class", "fold", "predicted", *(f"probability of {name}" for name in classes)]
    names = [classes[number] for number in predictions]
    cells = ([f"{value:.6f}" for value in row] for row in probabilities)
    rows = ([*row, *values] for row, values in zip(pool.rows(folds + 1, names), cells))
    write_csv(folder / "out_of_fold.csv", [header, *rows])

    correct = predictions == pool.labels
    acc1 = [100 * correct[folds == number].mean() for number in range(folds.max() + 1)]
    low, high = accuracy_interval(correct.sum(), len(correct))
    lines = [f"fold {number}: acc1 {value:.2f} %" for number, value in enumerate(acc1, start=1)]
    lines.append(
        f"acc1 {np.mean(acc1):.2f} ± {np.std(acc1, ddof=1):.2f} % (mean and standard deviation of {len(acc1)} folds)"
    )
    lines.append(
        f"acc1 {100 * correct.mean():.2f} % of all {len(correct)} images, 95 % confidence interval {low:.2f} to "
        f"{high:.2f} % (Wilson)"
    )
    report = report_classes(pool.labels, predictions, classes)
    write_text(folder / "report.txt", "\n".join([report, *lines, ""]))
    result = dict(acc1=acc1, mean=np.mean(acc1), std=np.std(acc1, ddof=1), pooled=100 * correct.mean())
    write_json(folder / "result.json", result | dict(interval=[low, high], images=len(correct), classes=classes))
    write_csv(folder / "confusion_matrix.csv", tabulate_confusions(pool.labels, predictions, classes))
    plot_confusion_matrix(pool.labels, predictions, classes, folder / "confusion_matrix.png")
    print("", report, *lines, f"files in {folder}", sep="\n")


def write_label_errors(pool, folds, probabilities, shown, folder):
    """Write the images that are probably labelled wrongly; returns what was found and what to do, in words."""
    order, by_rule, suggested, margins = find_label_errors(pool.labels, probabilities)
    path = folder / "label_errors.csv"
    header = ["image", "class", "suggested class", "probability of the class", "probability of the suggested class"]
    header += ["margin", "confident learning", "fold"]
    rows, given = [header], probabilities[np.arange(len(pool.labels)), pool.labels]
    for index in order:
        name, other = pool.classes[pool.labels[index]], pool.classes[suggested[index]]
        values = [f"{v:.4f}" for v in (given[index], probabilities[index, suggested[index]], margins[index])]
        rows.append([pool.sources[index], name, other, *values, "yes" if by_rule[index] else "no", folds[index] + 1])
    write_csv(path, rows)
    path.with_suffix(".png").unlink(missing_ok=True)
    if not len(order):
        return "label errors: none; every image is predicted as it is labelled"
    drawn = order[:shown]
    if len(drawn):
        load = kind_of(pool.manifest).load
        images = [load(pool.paths[index]).resize((192, 192)) for index in drawn]
        captions = [
            f"labelled {label(pool.classes[pool.labels[index]])}\n"
            f"rather {label(pool.classes[suggested[index]])} {probabilities[index, suggested[index]]:.2f}\n"
            f"{label(os.path.basename(pool.sources[index]))}"
            for index in drawn
        ]
        plot_sheet(images, captions, path.with_suffix(".png"))
    accuracy = 100 * (probabilities.argmax(1) == pool.labels).mean()
    doubt = f"; with {accuracy:.0f} % accuracy many of them are the networks' errors" if accuracy < DOUBTFUL else ""
    look = f"look at {path.with_suffix('.png')} and the top of {path}" if len(drawn) else f"look at the top of {path}"
    return (
        f"label errors: {len(order)} of {len(pool.labels)} images are suspicious, {by_rule.sum()} of them by the rule "
        f"of confident learning{doubt}; {look}, move images with a wrong label into the right class folder (or correct "
        "the table of labels), leave the difficult ones where they are, and run makedata.py again"
    )


if __name__ == "__main__":
    run(main, unknown="OPTIONS")
