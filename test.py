"""Tell what is on pictures, or in recordings, with a checkpoint that train.py saved.

    python test.py                                       pictures in test/, or in data/val where there is no test/
    python test.py some_photo.jpg more_photos/           files, folders, or patterns such as "photos/*.jpg"
    python test.py --checkpoint checkpoints/unireplknet_t/best.pth some_photo.jpg
    python test.py --checkpoint exports/unireplknet_t/model.onnx      by onnxruntime, from tools/export.py

Prints the likeliest classes of each picture and writes them to results/predictions.csv. Where the folders carry the
names of the classes, it also measures the accuracy and writes report.txt, confusion_matrix.csv, confusion_matrix.png
and mistakes.png. Class names, normalisation, size and how a recording becomes a picture come from the checkpoint.

Exit status: 0; 1 an error; 2 a wrong option; 3 done, but some pictures could not be read.
"""

import csv
import glob
import os
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import classification_report, confusion_matrix
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.checkpoint import build_network, find_checkpoint, load_checkpoint
from common.dataset import PictureFiles, eval_transform
from common.device import choose_device, choose_layout, choose_workers, has_bfloat16, keep_freed_memory
from common.onnx_network import OnnxNetwork
from common.options import UserError, run
from common.plots import plot_confusion_matrix, plot_sheet
from common.sounds import file_kind

IMAGES: list[str] = []  # files, folders or patterns; []: test/ if it exists, else data/val
CHECKPOINT: str = ""  # file of train.py, or .onnx; "": the newest checkpoints/*/best.pth, else "seedlings"
TOP_K: int = 3  # how many of the likeliest classes to show for each picture
TTA: bool = False  # average over the 8 turned and mirrored copies of each picture, in 8 times the time
MERGE: bool = True  # merge the network into its inference structure: the same answers, faster
AMP: str = "auto"  # "auto": bf16 where the device has it and it gives the answers of float32; "bf16"; "off": float32
BATCH_SIZE: int = 32  # pictures that pass through the network at once
WORKERS: int = -1  # processes that read pictures; -1: one for each core, up to 8, where it pays; 0: none
DEVICE: str = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
MISTAKES: int = 24  # wrong answers in mistakes.png, the surest first
OUTPUT: str = "results"  # folder for the files that are written; those of an earlier call are replaced

MAX_DIFFERENCE = 0.02  # of a probability in bf16 from that in float32, with which AMP "auto" takes bf16
SECONDS_TO_START = 3.0  # what starting processes may cost: for less reading than this it does not pay


def find_pictures(kind):
    """The files of a `Kind` that IMAGES names, each once, in order."""
    names = IMAGES or ["test" if Path("test").is_dir() else "data/val"]
    paths = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if kind.fits(file))
        elif path.is_file():
            found = [path]
        else:
            found = sorted(file for file in map(Path, glob.glob(name, recursive=True)) if kind.fits(file))
        if not found:
            raise UserError(f"{name} is no {kind.name}, no folder with {kind.name}s and no pattern that matches any")
        paths += found
    # Not by Path.resolve, which fails for symbolic links that lead in a circle.
    return list({os.path.realpath(path): path for path in reversed(paths)}.values())[::-1]


def folder_name(path):
    """Name of the folder that holds `path`, which of a symbolic link is the link's own."""
    return Path(os.path.abspath(path)).parent.name


def symmetries(images):
    """The 8 copies of images (N, 3, H, H) that quarter turns and mirroring make."""
    return [mirrored.rot90(quarter, (2, 3)) for mirrored in (images, images.flip(3)) for quarter in range(4)]


@torch.inference_mode()
def compute(model, images, dtype):
    """Probabilities (N, classes) of images (N, 3, H, W), computed by autocast in `dtype`, but for the head."""
    if isinstance(model, OnnxNetwork):
        return model(images).softmax(1)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        features = model.forward_features(images)
    return model.forward_head(features.float()).softmax(1)


def choose_dtype(model, images):
    """The dtype to compute in, by what it answers to the first batch: bf16 if that is close to float32, else that."""
    if isinstance(model, OnnxNetwork) or AMP == "off":
        return torch.float32
    if AMP == "bf16":
        return torch.bfloat16
    if not has_bfloat16(images.device):
        return torch.float32
    exact, fast = (compute(model, images, dtype) for dtype in (torch.float32, torch.bfloat16))
    return torch.bfloat16 if (exact - fast).abs().max() <= MAX_DIFFERENCE else torch.float32


def choose_readers(pictures, device):
    """How many processes read `pictures`: WORKERS, or for -1 as many as pay."""
    if WORKERS < 0 and device.type == "cpu":  # there they take the cores from the network, so only for large pictures
        started = time.perf_counter()
        pictures[0]
        seconds = (time.perf_counter() - started) * len(pictures)
        return min(os.cpu_count() or 1, 8) if seconds > SECONDS_TO_START else 0
    return min(choose_workers(WORKERS, device), len(pictures) // BATCH_SIZE)  # a few pictures are not worth a process


@torch.inference_mode()
def predict(model, paths, transform, device, sound=None):
    """Probabilities for every picture or, with `sound`, recording (see common/sounds.py).

    Returns:
        (paths that could be read, float array (pictures, classes) in their order, [why the others could not],
        dtype that was computed in).
    """
    pictures = PictureFiles(paths, transform, sound)
    loader = DataLoader(pictures, BATCH_SIZE, num_workers=choose_readers(pictures, device), collate_fn=list)
    reasons, probabilities, dtype = [], [], None
    # To find out whether bf16 gives the same answers takes as long as two batches.
    if AMP == "auto" and len(paths) <= 2 * BATCH_SIZE:
        dtype = torch.float32
    with tqdm(total=len(paths), desc="test", unit="img", leave=False) as bar:
        for batch in loader:
            reasons += [reason for _, reason in batch]
            images = [image for image, _ in batch if image is not None]
            if images:
                images = torch.stack(images).to(device, memory_format=choose_layout(device))
                dtype = dtype or choose_dtype(model, images)
                views = symmetries(images) if TTA else [images]
                probabilities.append(torch.stack([compute(model, view, dtype) for view in views]).mean(0).cpu().numpy())
            bar.update(len(batch))
    if not probabilities:
        name = file_kind(sound).name
        raise UserError(f"none of the {len(paths)} {name}s can be read; the first: {reasons[0]}")
    read = [path for path, reason in zip(paths, reasons) if not reason]
    return read, np.concatenate(probabilities), list(filter(None, reasons)), dtype


def write_predictions(paths, probabilities, classes, folder):
    """Print the TOP_K classes of each picture and write them to predictions.csv, with a byte order mark for Excel."""
    top = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP_K]
    with open(folder / "predictions.csv", "w", newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        writer = csv.writer(file)
        ranks = range(1, top.shape[1] + 1)
        writer.writerow(["image", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))])
        for path, indices, row in zip(paths, top, probabilities):
            print(f"{path}: {', '.join(f'{classes[i]} {row[i]:.4f}' for i in indices)}")
            writer.writerow([path, *(cell for i in indices for cell in (classes[i], f"{row[i]:.6f}"))])


def evaluate(paths, probabilities, classes, folder, kind):
    """Compare the answers with the names of the files' folders: report, confusion matrix and worst mistakes."""
    index = {name: number for number, name in enumerate(classes)}
    known = [number for number, path in enumerate(paths) if folder_name(path) in index]
    for name in ("report.txt", "confusion_matrix.csv", "confusion_matrix.png", "mistakes.png"):
        (folder / name).unlink(missing_ok=True)  # one from an earlier call would tell of other pictures
    if not known:
        return
    labels = np.array([index[folder_name(paths[number])] for number in known])
    predictions = probabilities[known].argmax(1)
    top5 = np.argsort(-probabilities[known], axis=1)[:, :5]
    acc1 = 100 * (predictions == labels).mean()
    acc5 = 100 * (top5 == labels[:, None]).any(1).mean()

    numbers = range(len(classes))
    report = classification_report(labels, predictions, labels=numbers, target_names=classes, digits=4, zero_division=0)
    (folder / "report.txt").write_text(report, encoding="utf-8")
    print(f"\n{report}\nacc1 {acc1:.2f} %, acc5 {acc5:.2f} % on {len(known)} {kind.name}s")

    matrix = confusion_matrix(labels, predictions, labels=numbers)
    with open(folder / "confusion_matrix.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["true class \\ predicted class", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, matrix))
    plot_confusion_matrix(matrix, classes, folder / "confusion_matrix.png")

    sureness = probabilities[known].max(1)
    wrong = sorted(np.flatnonzero(predictions != labels), key=lambda i: -sureness[i])[:MISTAKES]
    if wrong:
        pictures = [kind.load(paths[known[i]]).resize((192, 192)) for i in wrong]
        captions = [f"{classes[predictions[i]]} {sureness[i]:.2f}\nis {classes[labels[i]]}" for i in wrong]
        plot_sheet(pictures, captions, folder / "mistakes.png")


def main():
    if TOP_K < 1 or BATCH_SIZE < 1:
        raise UserError(f"TOP_K and BATCH_SIZE must be at least 1, got {TOP_K} and {BATCH_SIZE}")
    if AMP not in ("auto", "bf16", "off"):
        raise UserError(f'AMP must be "auto", "bf16" or "off", got {AMP!r}')
    path = find_checkpoint(CHECKPOINT)
    if path.suffix == ".onnx":
        model, device = OnnxNetwork(path), choose_device("cpu")
        checkpoint, what = model.about, "onnxruntime"
    else:
        checkpoint, device = load_checkpoint(path), choose_device(DEVICE)
        if device.type == "cpu":
            keep_freed_memory()
        model = build_network(checkpoint, MERGE).to(device, memory_format=choose_layout(device))
        what = "EMA weights" if checkpoint.get("state_dict_ema") else "weights"
        what += ", merged" if MERGE else ", training structure"
    classes, sound = checkpoint["classes"], checkpoint.get("sound")
    if TTA and sound is not None:
        raise UserError("TTA turns and mirrors, which makes another sound of a recording; set it to False")
    what += ", 8 views of each picture" if TTA else ""
    kind = file_kind(sound)
    paths = find_pictures(kind)
    transform = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])
    print(f"{path}: {checkpoint['arch']}, {len(classes)} classes, {what}, {device}")

    folder = Path(OUTPUT)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    read, probabilities, broken, dtype = predict(model, paths, transform, device, sound)
    seconds = time.perf_counter() - started
    write_predictions(read, probabilities, classes, folder)
    evaluate(read, probabilities, classes, folder, kind)
    for reason in broken:
        print(f"left out: {reason}")
    print(
        f"{len(read)} {kind.name}s in {seconds:.1f} s, {len(read) / seconds:.1f} a second, "
        f"{str(dtype).removeprefix('torch.')}; files in {folder}"
    )
    return 3 if broken else 0


if __name__ == "__main__":
    run(main, positional="IMAGES")
