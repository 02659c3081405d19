"""Spoken digits by the four scripts: accuracy of a random split, and of each speaker who was left out of the training.

    python -m benchmarks.sounds --source free-spoken-digits

The recordings of the Free Spoken Digit Dataset (Jakobovski et al., CC BY-SA 4.0, github.com/Jakobovski/
free-spoken-digit-dataset) in one folder for each digit, <digit>/<digit>_<speaker>_<index>.wav. Each split is made,
trained and measured by makedata.py, mean_std.py and train.py as a user does, in a folder that is kept.

Prints a Markdown table, and leaves in OUTPUT: table.md, a folder for each split with the run and its log, and
sheet.png, spectrograms with the answers to them. The accuracy is that of the last epoch's weights, since one that is
chosen by the validation recordings looks better than it is; the best epoch's is told beside it.
"""

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from common.checkpoint import build_network, load_checkpoint
from common.dataset import eval_transform
from common.evaluation import choose_pictures, compute_logits
from common.options import UserError, run
from common.plots import plot_sheet
from common.sounds import file_kind

SOURCE: str = "data1"  # folder that holds <digit>/<digit>_<speaker>_<index>.wav
OUTPUT: str = "results/sounds"  # folder for the runs, the table and the sheet; a split that is done there is not redone
SPLITS: list[str] = []  # of them "random" and names of speakers to leave out; []: all
EPOCHS: int = 16  # of the run on a random split
EPOCHS_LEFT_OUT: int = 6  # of each run without one speaker
SHOWN: int = 18  # spectrograms on the sheet

ROOT = Path(__file__).resolve().parent.parent
SPEAKER = r"_([a-z]+)_"  # in the name of a file
SOUND = ["--sample-rate", "8000", "--seconds", "0.7", "--hop", "16", "--mels", "40"]  # 40 bands x 44 frames
TRAINING = ["--model", "unireplknet_a", "--warmup-epochs", "1", "--drop-path", "0"]


def call(script, *words, log):
    """Run one of the four scripts; its output goes to the file `log`."""
    done = subprocess.run([sys.executable, ROOT / script, *words], stdout=log, stderr=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise UserError(f"{script} failed: {done.stderr.strip().splitlines()[-1]}")


def run_split(name, folder, options, epochs):
    """Split, train and validate in `folder`, unless it was done before: dict of figures."""
    result = folder / "figures.json"
    if not result.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        data, started = folder / "data", time.perf_counter()
        with open(folder / "log.txt", "w", encoding="utf-8") as log:
            call("makedata.py", "--source", SOURCE, "--target", data, *SOUND, *options, log=log)
            # Of the training recordings only: the speaker who is left out shall not be in the statistics, either.
            call("mean_std.py", "--source", data / "train", "--output", data / "mean_std.json", log=log)
            training = ["--data", data, "--output", folder / "checkpoints", "--epochs", str(epochs), *TRAINING]
            call("train.py", *training, log=log)
        minutes = (time.perf_counter() - started) / 60
        with open(folder / "checkpoints" / "unireplknet_a" / "log.csv", encoding="utf-8") as file:
            accuracies = [float(row["ema_acc1"]) for row in csv.DictReader(file)]
        counts = re.search(r"recordings +(\d+) for training, (\d+)", (folder / "log.txt").read_text(encoding="utf-8"))
        figures = dict(split=name, train=int(counts[1]), val=int(counts[2]), last=accuracies[-1], best=max(accuracies))
        figures |= dict(epochs=len(accuracies), minutes=minutes)
        result.write_text(json.dumps(figures), encoding="utf-8")
    return json.loads(result.read_text(encoding="utf-8"))


def draw_sheet(folders, path):
    """Draw right answers, and the surest wrong ones of all splits, in 16 shades of grey, which keeps the file small."""
    wrong, right = [], []
    for folder in folders:
        checkpoint = load_checkpoint(folder / "checkpoints" / "unireplknet_a" / "last.pth")
        classes, sound = checkpoint["classes"], checkpoint["sound"]
        paths, labels = choose_pictures(folder / "data" / "val", classes, 0, sound=sound)
        transform = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])
        logits = compute_logits(build_network(checkpoint), paths, transform, sound=sound)
        probabilities = np.exp(logits - logits.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        load = file_kind(sound).load
        for file, label, row in zip(paths, labels, probabilities):
            speaker = re.search(SPEAKER, file.name)[1]
            caption = f"{speaker} says {classes[label]}\nanswer: {classes[row.argmax()]} {row.max():.2f}"
            (right if row.argmax() == label else wrong).append((row.max(), caption, file, load))
    wrong.sort(key=lambda answer: -answer[0])
    chosen = wrong[: SHOWN // 3]
    chosen = right[: SHOWN - len(chosen)] + chosen
    plot_sheet([load(file) for _, _, file, load in chosen], [caption for _, caption, _, _ in chosen], path)
    Image.open(path).convert("L").quantize(16).save(path, optimize=True)


def main():
    files = sorted(Path(SOURCE).glob("*/*.wav"))
    speakers = sorted({match[1] for match in (re.search(SPEAKER, file.name) for file in files) if match})
    if len(speakers) < 2:
        raise UserError(f"{SOURCE} holds no <digit>/<digit>_<speaker>_<index>.wav of several speakers; set it")
    splits = {"random": []} | {name: ["--group", SPEAKER, "--val-groups", name] for name in speakers}
    unknown = set(SPLITS) - set(splits)
    if unknown:
        raise UserError(f"SPLITS names {', '.join(sorted(unknown))}; choose from {', '.join(splits)}")
    splits = {name: splits[name] for name in SPLITS or splits}
    columns = ("validation on", "training", "validation", "epochs", "accuracy / %", "best epoch / %", "minutes")
    lines = [f"| {' | '.join(columns)} |", f"|{len(columns) * '---|'}"]
    print(*lines, sep="\n")
    left_out = []
    for name, options in splits.items():
        row = run_split(name, Path(OUTPUT, name), options, EPOCHS if name == "random" else EPOCHS_LEFT_OUT)
        what = "30 % at random" if name == "random" else f"all of {name}"
        cells = [what, *(row[key] for key in ("train", "val", "epochs"))]
        cells += [f"{row['last']:.2f}", f"{row['best']:.2f}", f"{row['minutes']:.1f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        print(lines[-1])
        left_out += [row] if name != "random" else []
    if left_out:
        mean = {key: np.mean([row[key] for row in left_out]) for key in ("last", "best")}
        lines.append(f"| mean of the {len(left_out)} | | | | {mean['last']:.2f} | {mean['best']:.2f} | |")
        print(lines[-1])
    Path(OUTPUT, "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_sheet([Path(OUTPUT, name) for name in splits], Path(OUTPUT, "sheet.png"))
    print(f"\nruns, table.md and sheet.png in {OUTPUT}")


if __name__ == "__main__":
    run(main)
