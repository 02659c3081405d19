"""Spoken digits by the four scripts: accuracy of a random split, and on each speaker held out from training.

    python benchmarks/sounds.py --source free-spoken-digits
    python benchmarks/sounds.py --source free-spoken-digits --splits theo --options="--spec-mask 0.2" --output mask

The recordings of the Free Spoken Digit Dataset (Jakobovski et al., CC BY-SA 4.0, github.com/Jakobovski/
free-spoken-digit-dataset) in one folder for each digit, <digit>/<digit>_<speaker>_<index>.wav. Each split is made,
trained and measured by makedata.py, mean_std.py and train.py as by a user, in a folder that is kept; after an
interruption, the same command goes on where it was.

Prints a Markdown table, and writes to OUTPUT: table.md, a folder for each split with the run and its log, and
sheet.png, spectrograms with their predictions. The accuracy is that of the last epoch's weights, since the best
validation accuracy is biased upwards; the best epoch's is reported beside it. The settings were chosen on two of
the speakers (CHOSEN_ON), so that the mean of the others is the one that counts.
"""

import csv
import json
import re
import subprocess
import sys
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
HELD_OUT_EPOCHS: PositiveInt = 12  # epochs without one speaker
OPTIONS: str = ""  # further options of train.py for every split, such as "--spec-mask 0.2"; "": none
SHOWN: PositiveInt = 18  # spectrograms on the sheet

ROOT = Path(__file__).resolve().parent.parent
SPEAKER = r"_([a-z]+)_"  # in a file name
CHOSEN_ON = ("jackson", "theo")  # speakers on whose recordings the augmentation was chosen
SOUND = ["--sample-rate", "8000", "--seconds", "0.7", "--hop", "16", "--mels", "40"]  # 40 bands x 44 frames
# What is fainter than this, the background, tells rooms and microphones apart rather than digits.
SOUND += ["--decibels", "45"]
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
        epochs = EPOCHS if name == "random" else HELD_OUT_EPOCHS
        row = run_split(name, SOURCE, Path(OUTPUT, name), options, epochs, OPTIONS.split())
        what = "30 % at random" if name == "random" else f"all of {name}"
        cells = [what, *(row[key] for key in ("train", "val", "epochs"))]
        cells += [f"{row['last']:.2f}", f"{row['best']:.2f}", f"{row['minutes']:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        print(lines[-1])
        held_out += [row] if name != "random" else []
    others = [row for row in held_out if row["split"] not in CHOSEN_ON]
    means = [(f"mean of the {len(held_out)}", held_out), (f"mean without {' and '.join(CHOSEN_ON)}", others)]
    for what, rows in means if 0 < len(others) < len(held_out) else means[:1]:
        if rows:
            last, best = (np.mean([row[key] for row in rows]) for key in ("last", "best"))
            lines.append(f"| {what} | | | | {last:.2f} | {best:.2f} | |")
            print(lines[-1])
    write_text(Path(OUTPUT, "table.md"), "\n".join(lines) + "\n")
    draw_sheet([Path(OUTPUT, name) for name in splits], Path(OUTPUT, "sheet.png"), SHOWN)
    print(f"\nruns, table.md and sheet.png in {OUTPUT}")


def run_split(name, source, folder, options, epochs, training):
    """Split, train and validate in `folder`, or go on with that; returns a dict of metrics.

    Args:
        name: of the split.
        source: folder of the recordings.
        folder: of the split, its run and its log.
        options: of makedata.py, which make the split.
        epochs: length of the training.
        training: further options of train.py.
    """
    result = folder / "figures.json"
    if not result.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "data"
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            call("makedata.py", "--source", source, "--target", data, *SOUND, *options, log=log)
            # Of the training recordings only: the held-out speaker must not influence the statistics, either.
            call("mean_std.py", "--source", data / "train", "--output", data / "mean_std.json", log=log)
            where = ["--data", data, "--output", folder / "checkpoints", "--resume", "auto"]
            call("train.py", *where, "--epochs", str(epochs), *TRAINING, *training, log=log)
        with open(folder / "checkpoints" / "unireplknet_a" / "log.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        accuracies, minutes = [float(row["ema_acc1"]) for row in rows], sum(float(row["seconds"]) for row in rows) / 60
        counts = {part: len(list((data / part).glob("*/*"))) for part in ("train", "val")}
        metrics = dict(split=name, **counts, last=accuracies[-1], best=max(accuracies))
        metrics |= dict(epochs=len(accuracies), minutes=minutes, options=training)
        write_json(result, metrics)
    metrics = json.loads(result.read_text(encoding="utf-8"))
    if (metrics["epochs"], metrics.get("options", [])) != (epochs, training):
        raise UserError(
            f"{result} is of {metrics['epochs']} epochs with the options {metrics.get('options', [])}, not of {epochs} "
            f"with {training}; set OUTPUT to another folder"
        )
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
