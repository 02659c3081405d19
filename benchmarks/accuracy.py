"""Accuracy of train.py's recipe, and of changes to it, on the images in data1, over several random splits.

    python benchmarks/accuracy.py --jobs 2                          the recipe on three splits, two runs at once
    python benchmarks/accuracy.py --what ablations --splits 0       one change at a time
    python benchmarks/accuracy.py --what fine_tuning                from weights of other classes, and from scratch
    python benchmarks/accuracy.py --what imbalance                  rare classes: logit adjustment, class weights
    python benchmarks/accuracy.py --what fit                        oblong images: squeezed, padded, cropped
    python benchmarks/accuracy.py --what weights                    the recipe, then on all images: weights to ship

Each run is `makedata.py`, `mean_std.py`, `train.py` and `test.py`, with one seed for the split and for the weights.
The last epoch's EMA weights are measured, so that nothing is selected on the images that it is measured on. Finished
runs are not repeated, and interrupted ones are resumed. Prints tables in Markdown, and writes confusion_matrix.png over
all splits.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import numpy as np
import torch
from PIL import Image

from common.calibration import calibration_error, cross_fit, log_likelihood_loss
from common.checkpoint import build_network, load_checkpoint, save_checkpoint
from common.dataset import transform_of
from common.evaluation import choose_images, compute_logits, coverage_curve
from common.files import write_json, written_whole
from common.images import is_image
from common.options import Name, NonNegativeInt, NotEmpty, PositiveInt, UserError, run
from common.plots import plot_confusion_matrix
from common.progress import Progress

WHAT: Literal["recipe", "ablations", "fine_tuning", "imbalance", "fit", "weights"] = "recipe"  # experiment to run
SPLITS: Annotated[list[NonNegativeInt], NotEmpty()] = [0, 1, 2]  # seeds of split and training
# Options of train.py for every run: the smallest network, at image sizes that suit a CPU.
OPTIONS: str = "--model unireplknet_a --img-size 160 --start-size 64 --epochs 90 --drop-path 0"  # of train.py; "": none
JOBS: PositiveInt = 1  # concurrent runs, each with its part of the cores
SOURCE: Name = "data1"  # folder that holds <class>/<image>
OUTPUT: Name = "accuracy"  # folder for splits and runs

COVERAGE = 0.95  # fraction of the images, the most confident ones, whose accuracy is measured
RATIO = 20  # imbalance: training images of the most frequent class for each of the rarest one
CUT = 1 / 3  # fit: share of the height that is cut off each image

ROOT = Path(__file__).resolve().parent.parent

# Name of a run -> options of train.py in addition to the recipe, which is its constants and OPTIONS.
ABLATIONS = {
    "recipe": [],
    "AdamW, learning rate 1e-3": ["--optimizer", "adamw", "--learning-rate", "1e-3"],
    "crops of 70 % and more": ["--crop", "0.7"],
    "no Mixup, no CutMix": ["--mix-prob", "0"],
    "quarter turns only": ["--rotation", "quarter"],
    "quality unchanged": ["--quality", "0"],
    "no Cutout": ["--cutout", "0"],
    "no label smoothing": ["--smoothing", "0"],
    "layer scale from 1e-6": ["--layer-scale", "1e-6"],
    "full size from the start": ["--start-size", "none"],
}


def main():
    plan = Plan(Path(SOURCE), Path(OUTPUT), SPLITS, OPTIONS.split(), JOBS)
    if WHAT == "fine_tuning":
        print_runs(compare_fine_tuning(plan))
    elif WHAT == "imbalance":
        results = compare_imbalance(plan)
        print_runs(results)
        print_recalls(results)
    elif WHAT == "fit":
        print_runs(compare_fit(plan))
    elif WHAT == "weights":
        train_weights(plan)
    else:
        plan = replace(plan, whole=True)
        results = run_all(plan, {"recipe": []} if WHAT == "recipe" else ABLATIONS, plan.prepare)
        print_runs(results)
        print_doubt(results)
        print_stress(results)
        print_classes(results["recipe"], plan.output / "confusion_matrix.png")


@dataclass
class Plan:
    """What all runs have in common: folders, seeds of the splits, options, concurrent runs, the training script, and
    whether calibration and accuracy under disturbances are measured."""

    source: Path
    output: Path
    splits: list
    options: list
    jobs: int
    script: str = "train.py"
    whole: bool = False

    def prepare(self, split):
        """Split `source`; returns the folder."""
        return prepare_split(self.source, self.output / f"data.{split}", split)


def prepare_split(source, target, split, *options):
    """Split `source` into `target`, which is returned, unless that was done before."""
    if not (target / "mean_std.json").is_file():
        python("makedata.py", "--source", source, "--target", target, "--seed", split, *options)
        python("mean_std.py", "--source", source, "--output", target / "mean_std.json")
    return target


def python(*words, threads=None):
    """Run a script of the repository with `words`; UserError with its message if it fails."""
    environment = os.environ | {"TQDM_DISABLE": "1"} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, str(ROOT / words[0]), *map(str, words[1:])]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode not in (0, 3):  # 3: some images cannot be read
        raise UserError(f"{' '.join(map(str, words))} failed: {done.stderr.strip() or done.stdout.strip()}")


def run_all(plan, experiments, data):
    """Run every experiment on every split.

    Args:
        plan: a `Plan`.
        experiments: {name: options of train.py, or function on a split that returns them}.
        data: function on a split that returns its folder.

    Returns:
        {name: [what `run_once` returned, ...]}.
    """
    folders = {split: data(split) for split in plan.splits}
    threads = max((os.cpu_count() or 1) // plan.jobs, 1) if plan.jobs > 1 else None
    runs = [(name, options, split) for split in plan.splits for name, options in experiments.items()]
    with ThreadPoolExecutor(plan.jobs) as pool:  # each thread waits for a process of its own
        jobs = [
            pool.submit(
                run_once, plan, name, options(split) if callable(options) else options, split, folders[split], threads
            )
            for name, options, split in runs
        ]
        done = [job.result() for job in Progress(jobs, desc="runs", unit="run", leave=False)]
    return {name: [result for run, result in zip(runs, done) if run[0] == name] for name in experiments}


def run_once(plan, name, options, split, data, threads):
    """Train and test once, unless that was done before.

    Returns:
        dict of plain types: classes, training images of each, epochs, minutes, images/s, accuracy of the raw weights,
        confusion matrices of the EMA weights without (plain) and with test-time augmentation (tta), what
        `measure_doubt` returns (doubt), accuracies under disturbances (stress), ...

    Raises:
        UserError: if it was done before with other options.
    """
    folder = plan.output / name.replace(" ", "_") / str(split)
    options = [*plan.options, *map(str, options)]
    result = folder / "accuracy.json"
    if result.is_file():
        metrics = json.loads(result.read_text(encoding="utf-8"))
        if metrics.get("options", options) != options:
            raise UserError(
                f"{result} was measured with the options {' '.join(metrics['options'])} of train.py; set OUTPUT to "
                "another folder, or delete it"
            )
        return metrics
    checkpoint = train(data, folder, options, split, threads, plan.script)
    with open(checkpoint.with_name("log.csv"), newline="", encoding="utf-8") as file:
        log = [{name: float(cell or "nan") for name, cell in row.items()} for row in csv.DictReader(file)]
    minutes = np.cumsum([row["seconds"] for row in log]) / 60
    trained = load_checkpoint(checkpoint)
    metrics = dict(
        options=options,
        classes=trained["classes"],
        train_images=[count for count, *_ in trained["data"]["train"]["by_class"]],
        epochs=len(log),
        minutes=minutes[-1],
        minutes_to_95=next((m for m, row in zip(minutes, log) if row["ema_acc1"] >= 95), None),
        images_a_second=float(np.median([row["img_per_s"] for row in log])),
        raw=log[-1]["val_acc1"],
        plain=measure(checkpoint, data, folder / "plain", "--no-tta", *["--stress"] * plan.whole),
        tta=measure(checkpoint, data, folder / "tta", "--tta"),
    )
    if plan.whole:
        metrics["doubt"] = measure_doubt(trained, data / "val")
        with open(folder / "plain" / "stress.csv", newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)  # "-": a network for images of one size only
            metrics["stress"] = {row["disturbance"]: float(row["acc1"] or "nan") for row in rows}
    write_json(result, metrics)
    return metrics


def train(data, folder, options, split, threads, script="train.py"):
    """Train on `data`, or resume; returns last.pth."""
    common = ["--data", data, "--seed", split, "--output", folder, "--resume", "auto"]
    python(script, *common, *options, threads=threads)
    (checkpoint,) = folder.glob("*/last.pth")
    return checkpoint


def measure(checkpoint, data, folder, *options):
    """Confusion matrix (true classes, predicted classes) of a checkpoint on data/val, by test.py with `options`."""
    python("test.py", "--checkpoint", checkpoint, data / "val", "--output", folder, *options)
    with open(folder / "confusion_matrix.csv", newline="", encoding="utf-8-sig") as file:
        return [[int(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]]


def measure_doubt(checkpoint, folder):
    """{measure: [before, after calibration]} on images that took no part in the training nor, for each, in the fit."""
    paths, labels = choose_images(folder, checkpoint["classes"], 0)
    logits = torch.from_numpy(compute_logits(build_network(checkpoint), paths, transform_of(checkpoint)))
    both = [logits.double().softmax(1).numpy(), cross_fit(logits, torch.tensor(labels)).numpy()]
    measures = {"ECE": calibration_error, "NLL": log_likelihood_loss, f"{COVERAGE:.0%}": accuracy_at_coverage}
    return {name: [measure(probabilities, labels) for probabilities in both] for name, measure in measures.items()}


def accuracy_at_coverage(probabilities, labels):
    """Accuracy in percent of the most confident images, `COVERAGE` of all."""
    coverage, accuracies = coverage_curve(probabilities, labels)
    return 100 * float(accuracies[np.searchsorted(coverage, COVERAGE - 1e-9)])


def print_runs(results):
    """Print one row per experiment."""
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


def print_doubt(results):
    """Print one row per experiment: how honest probabilities are, before and after calibration."""
    print("\n| run | ECE | calibrated | NLL | calibrated | accuracy of the most confident", f"{COVERAGE:.0%} |")
    print("|---|---|---|---|---|---|")
    for name, own in results.items():
        doubts = [result["doubt"] for result in own]
        cells = [[doubt[what][step] for doubt in doubts] for what in ("ECE", "NLL") for step in (0, 1)]
        cells = [mean_and_spread(values, 3) for values in cells]
        cells.append(mean_and_spread([doubt[f"{COVERAGE:.0%}"][1] for doubt in doubts]))
        print(f"| {name} | {' | '.join(cells)} |")


def print_stress(results):
    """Print one row per disturbance of test.py's STRESS: accuracy of the first experiment, and what each one loses."""
    first, *_ = results.values()
    print("\n| disturbance | accuracy |", *(f"{name}, change |" for name in results))
    print("|---|---|" + len(results) * "---|")
    for disturbance in first[0]["stress"]:
        losses = [
            mean_and_spread([result["stress"][disturbance] - result["stress"]["clean"] for result in own])
            for own in results.values()
        ]
        accuracies = mean_and_spread([result["stress"][disturbance] for result in first])
        print(f"| {disturbance} | {accuracies} | {' | '.join(losses)} |")


def accuracy(matrix):
    """Top-1 accuracy in percent from a confusion matrix."""
    return 100 * np.trace(matrix) / np.sum(matrix)


def mean_and_spread(values, digits=2):
    """Mean and standard deviation in words."""
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def print_classes(results, path):
    """Print one row per class, over all splits, with test-time augmentation; plot the confusion matrix to `path`."""
    matrix, classes = np.sum([result["tta"] for result in results], 0), results[0]["classes"]
    print("\n| class | images | precision | recall | F1 |\n|---|---|---|---|---|")
    for index, name in enumerate(classes):
        correct, predicted, true = matrix[index, index], matrix[:, index].sum(), matrix[index].sum()
        scores = (correct / max(predicted, 1), correct / true, 2 * correct / (predicted + true))
        print(f"| {name} | {true} | {' | '.join(f'{100 * score:.1f}' for score in scores)} |")
    errors = matrix * (1 - np.eye(len(classes), dtype=int))
    pairs = np.triu(errors + errors.T)
    one, other = np.unravel_index(pairs.argmax(), pairs.shape)
    print(f"\n{pairs.sum()} errors, {pairs.max()} of them between {classes[one]} and {classes[other]}")
    true, predicted = np.nonzero(matrix)
    plot_confusion_matrix(true, predicted, classes, path, matrix[true, predicted])


def compare_fine_tuning(plan):
    """Train on one half of the classes, then on the other half: from these weights, and from scratch for longer.

    Returns:
        {name: [what `run_once` returned, ...]}.
    """
    classes = sorted(folder for folder in plan.source.iterdir() if folder.is_dir())
    for half, own in (("known", classes[::2]), ("new", classes[1::2])):
        for path in (path for folder in own for path in folder.iterdir()):
            link_or_copy(path, plan.output / f"data1.{half}" / path.parent.name / path.name)

    def data(half):
        return lambda split: prepare_split(plan.output / f"data1.{half}", plan.output / f"data.{half}.{split}", split)

    known = run_all(plan, {"known classes": []}, data("known"))

    def fine_tune(split):
        (checkpoint,) = (plan.output / "known_classes" / str(split)).glob("*/last.pth")
        # A network trained at full size would have to adapt to small images; fewer epochs make up for the time.
        return ["--pretrained", checkpoint, "--epochs", 8, "--start-size", "none"]

    new = run_all(plan, {"new classes from scratch": ["--epochs", 12], "fine-tuned": fine_tune}, data("new"))
    return known | new


def compare_imbalance(plan):
    """Train on a long tail: as it is, with logit adjustment, and with class weights.

    Returns:
        {name: [what `run_once` returned, ...]}.
    """

    def data(split):
        return make_long_tail(plan.prepare(split), plan.output / f"data.long_tail.{split}", split)

    results = run_all(plan, {"long tail": [], "logit adjustment": ["--balance", 1]}, data)
    return results | run_all(replace(plan, script="benchmarks/class_weights.py"), {"class weights": []}, data)


def make_long_tail(source, target, seed):
    """A copy of a split whose training classes, in random order, have fewer images each, down to 1 in RATIO.

    The first class has as many as the smallest class of `source`. Returns `target`.
    """
    generator = np.random.default_rng(seed)
    classes = sorted(folder for folder in (source / "train").iterdir() if folder.is_dir())
    files = {folder: sorted(path for path in folder.iterdir() if is_image(path)) for folder in classes}
    most = min(map(len, files.values()))
    for rank, number in enumerate(generator.permutation(len(classes))):
        count = max(round(most * RATIO ** (-rank / (len(classes) - 1))), 1)
        for path in generator.permutation(np.array(files[classes[number]], dtype=object))[:count]:
            link_or_copy(path, target / path.relative_to(source))
    for path in (source / "val").glob("*/*"):
        link_or_copy(path, target / path.relative_to(source))
    shutil.copy2(source / "mean_std.json", target / "mean_std.json")
    return target


def print_recalls(results):
    """Print the mean of the classes' recalls (balanced accuracy), and that of the third of them with fewest images."""
    print("\n| run | mean recall of all classes | of the rarest third | accuracy |\n|---|---|---|---|")
    for name, own in results.items():
        recalls, rare = [], []
        for result in own:
            matrix = np.array(result["plain"])
            recall = 100 * np.diag(matrix) / matrix.sum(1)
            order = np.argsort(result["train_images"])
            recalls.append(recall.mean())
            rare.append(recall[order[: len(order) // 3]].mean())
        cells = (recalls, rare, [accuracy(result["plain"]) for result in own])
        print(f"| {name} | {' | '.join(map(mean_and_spread, cells))} |")


def compare_fit(plan):
    """Train on images of which a part of the height was cut off: squeezed, padded and cropped to squares.

    Returns:
        {name: [what `run_once` returned, ...]}.
    """
    oblong = plan.output / "data1.oblong"
    for path in Progress(sorted(filter(is_image, plan.source.glob("*/*"))), desc="cutting", unit="image", leave=False):
        target = oblong / path.parent.name / f"{path.stem}.png"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            image = Image.open(path).convert("RGB")
            margin = round(image.height * CUT / 2)
            with written_whole(target) as partial:
                image.crop((0, margin, image.width, image.height - margin)).save(partial, "PNG")
    experiments = {fit: ["--fit", fit] for fit in ("squeeze", "pad", "crop")}
    return run_all(plan, experiments, lambda split: prepare_split(oblong, plan.output / f"data.oblong.{split}", split))


def link_or_copy(source, target):
    """Put the file `source` at `target`, unless one is there: as a hard link where that is possible, else as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        try:
            os.link(source.resolve(), target)
        except OSError:  # another drive, a file system without links, or no permission
            shutil.copy2(source, target)


def train_weights(plan):
    """Train on all images of the source and write the EMA weights in half precision, with all that test.py needs.

    No image is left to calibrate these weights on, so that runs of the recipe on `plan.splits` are made first, unless
    they were, and their calibrations are used.
    """
    run_all(plan, {"recipe": []}, plan.prepare)
    runs = [next((plan.output / "recipe" / str(split)).glob("*/last.pth")) for split in plan.splits]
    seed = plan.splits[0]
    data = prepare_split(plan.source, plan.output / "data.all", seed, "--val-ratio", 0.001)
    for path in (data / "val").glob("*/*"):  # makedata.py keeps one of each class, which are to be learned from, too
        link_or_copy(path, data / "train" / path.relative_to(data / "val"))
    checkpoint = load_checkpoint(train(data, plan.output / "weights", plan.options, seed, None))
    state_dict = {
        name: tensor.half() if tensor.is_floating_point() and "running" not in name else tensor
        for name, tensor in checkpoint["state_dict_ema"].items()
    }
    for name in ("DATA", "OUTPUT", "RESUME"):  # where this run lay is nobody's concern
        del checkpoint["config"][name]
    keep = ("arch", "model_args", "classes", "mean", "std", "img_size", "epoch", "pictures_train", "config", "versions")
    shipped = dict(state_dict=state_dict) | {name: checkpoint[name] for name in keep}
    shipped["calibration"] = pool_calibrations(
        checkpoint["calibration"], [load_checkpoint(run)["calibration"] for run in runs]
    )
    path = plan.output / f"seedlings_{checkpoint['arch']}.pth"
    save_checkpoint(shipped, path)
    size = path.stat().st_size / 1e6
    print(f"{path}, {size:.1f} MB, trained on {checkpoint['pictures_train']} images with seed {seed}")


def pool_calibrations(own, others):
    """The calibration of a network by those of other networks of its recipe, whose validation images it was trained on.

    The statistics of training images are its own. The temperature is the geometric mean of the others', and the scores
    by which an image is judged to be unusual are the mean of theirs, rank by rank: distances are measured in spreads of
    the training images, so they compare. Where a network has no score, there is none.

    Args:
        own, others: what checkpoints hold under "calibration", see `common.calibration`; of `others` a list.
    """
    scores, score = [other["score"] for other in others], None
    if None not in (own["score"], *scores):
        mean = {name: torch.stack([other[name] for other in scores]).mean(0) for name in ("scale", "quantiles")}
        score = own["score"] | mean
    temperature = float(np.exp(np.mean([np.log(other["temperature"]) for other in others])))
    images = sum(other["images"] for other in others)
    return own | dict(temperature=temperature, images=images, score=score)


if __name__ == "__main__":
    run(main)
