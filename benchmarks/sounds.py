"""Spoken digits by the four scripts: accuracy of a random split, and on each speaker held out from training.

    python benchmarks/sounds.py --source free-spoken-digits

The recordings of the Free Spoken Digit Dataset (Jakobovski et al., CC BY-SA 4.0, github.com/Jakobovski/
free-spoken-digit-dataset) in one folder for each digit, <digit>/<digit>_<speaker>_<index>.wav. Each split is made,
trained and measured by makedata.py, mean_std.py and train.py as by a user, in a folder that is kept.

Prints a Markdown table, and writes to OUTPUT: table.md, a folder for each split with the run and its log, and
sheet.png, spectrograms with their predictions. The accuracy is that of the last epoch's weights, since the best
validation accuracy is biased upwards; the best epoch's is reported beside it.
"""

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import numpy as np
from PIL import Image

from common.audio import input_kind
from common.checkpoint import build_network, load_checkpoint
from common.dataset import transform_of
from common.evaluation import choose_images, compute_logits
from common.files import write_json, write_text
from common.options import ConstantError, Name, PositiveInt, UserError, run
from common.plots import plot_sheet

SOURCE: Name = "data1"  # folder that holds <digit>/<digit>_<speaker>_<index>.wav
OUTPUT: Name = "results/sounds"  # folder for runs, table and sheet; a split that is finished there is not repeated
SPLITS: list[Name] = []  # "random" and names of speakers to hold out; []: all
EPOCHS: PositiveInt = 16  # epochs on the random split
HELD_OUT_EPOCHS: PositiveInt = 6  # epochs without one speaker
SHOWN: PositiveInt = 18  # spectrograms on the sheet

ROOT = Path(__file__).resolve().parent.parent
SPEAKER = r"_([a-z]+)_"  # in a file name
SOUND = ["--sample-rate", "8000", "--seconds", "0.7", "--hop", "16", "--mels", "40"]  # 40 bands x 44 frames
TRAINING = ["--model", "unireplknet_a", "--warmup-epochs", "1", "--drop-path", "0"]


def main():
    files = sorted(Path(SOURCE).glob("*/*.wav"))
    speakers = sorted({match[1] for match in (re.search(SPEAKER, file.name) for file in files) if match})
    if len(speakers) < 2:
        raise UserError(f"{SOURCE} holds no <digit>/<digit>_<speaker>_<index>.wav of several speakers; set SOURCE")
    splits = {"random": []} | {name: ["--group", SPEAKER, "--val-groups", name] for name in speakers}
    unknown = set(SPLITS) - set(splits)
    if unknown:
        raise ConstantError(f"SPLITS must hold names out of {', '.join(splits)}, got {', '.join(sorted(unknown))}")
    splits = {name: splits[name] for name in SPLITS or splits}
    columns = ("validation on", "training", "validation", "epochs", "accuracy / %", "best epoch / %", "minutes")
    lines = [f"| {' | '.join(columns)} |", f"|{len(columns) * '---|'}"]
    print(*lines, sep="\n")
    held_out = []
    for name, options in splits.items():
        row = run_split(name, SOURCE, Path(OUTPUT, name), options, EPOCHS if name == "random" else HELD_OUT_EPOCHS)
        what = "30 % at random" if name == "random" else f"all of {name}"
        cells = [what, *(row[key] for key in ("train", "val", "epochs"))]
        cells += [f"{row['last']:.2f}", f"{row['best']:.2f}", f"{row['minutes']:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        print(lines[-1])
        held_out += [row] if name != "random" else []
    if held_out:
        mean = {key: np.mean([row[key] for row in held_out]) for key in ("last", "best")}
        lines.append(f"| mean of the {len(held_out)} | | | | {mean['last']:.2f} | {mean['best']:.2f} | |")
        print(lines[-1])
    write_text(Path(OUTPUT, "table.md"), "\n".join(lines) + "\n")
    draw_sheet([Path(OUTPUT, name) for name in splits], Path(OUTPUT, "sheet.png"), SHOWN)
    print(f"\nruns, table.md and sheet.png in {OUTPUT}")


def run_split(name, source, folder, options, epochs):
    """Split, train and validate in `folder`, unless that was done before; returns a dict of metrics."""
    result = folder / "figures.json"
    if not result.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        data, started = folder / "data", time.perf_counter()
        with open(folder / "log.txt", "w", encoding="utf-8") as log:
            call("makedata.py", "--source", source, "--target", data, *SOUND, *options, log=log)
            # Of the training recordings only: the held-out speaker must not influence the statistics, either.
            call("mean_std.py", "--source", data / "train", "--output", data / "mean_std.json", log=log)
            training = ["--data", data, "--output", folder / "checkpoints", "--epochs", str(epochs), *TRAINING]
            call("train.py", *training, log=log)
        minutes = (time.perf_counter() - started) / 60
        with open(folder / "checkpoints" / "unireplknet_a" / "log.csv", encoding="utf-8") as file:
            accuracies = [float(row["ema_acc1"]) for row in csv.DictReader(file)]
        counts = {part: len(list((data / part).glob("*/*"))) for part in ("train", "val")}
        metrics = dict(split=name, **counts, last=accuracies[-1], best=max(accuracies))
        metrics |= dict(epochs=len(accuracies), minutes=minutes)
        write_json(result, metrics)
    metrics = json.loads(result.read_text(encoding="utf-8"))
    if metrics["epochs"] != epochs:
        raise UserError(f"{result} is of {metrics['epochs']} epochs, not {epochs}; set OUTPUT to another folder")
    return metrics


def call(script, *words, log):
    """Run one of the four scripts; its output goes to the file `log`."""
    done = subprocess.run([sys.executable, ROOT / script, *words], stdout=log, stderr=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise UserError(f"{script} failed: {done.stderr.strip().splitlines()[-1]}")


def draw_sheet(folders, path, shown):
    """Draw `shown` spectrograms, a third the most confident misclassified ones of all splits, the rest correct.

    In 16 shades of grey, which keeps the file small.
    """
    misclassified, correct = [], []
    for folder in folders:
        checkpoint = load_checkpoint(folder / "checkpoints" / "unireplknet_a" / "last.pth")
        classes, load = checkpoint["classes"], input_kind(checkpoint["sound"]).load
        paths, labels = choose_images(folder / "data" / "val", classes, 0)
        transform = transform_of(checkpoint)
        logits = compute_logits(build_network(checkpoint), paths, transform, load=load)
        probabilities = np.exp(logits - logits.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        for file, label, row in zip(paths, labels, probabilities):
            speaker = re.search(SPEAKER, file.name)[1]
            caption = f"{speaker} says {classes[label]}\nprediction: {classes[row.argmax()]} {row.max():.2f}"
            predictions = correct if row.argmax() == label else misclassified
            predictions.append((row.max(), caption, file, load))
    misclassified.sort(key=lambda prediction: -prediction[0])
    chosen = misclassified[: shown // 3]
    chosen = correct[: shown - len(chosen)] + chosen
    plot_sheet([load(file) for _, _, file, load in chosen], [caption for _, caption, _, _ in chosen], path)
    Image.open(path).convert("L").quantize(16).save(path, optimize=True)


if __name__ == "__main__":
    run(main)
