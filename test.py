"""Classify images or recordings with a checkpoint that train.py saved.

    python test.py                                       images in test/, or in data/val if there is no test/
    python test.py some_photo.jpg more_photos/           files, folders, or patterns such as "photos/*.jpg"
    python test.py --checkpoint checkpoints/unireplknet_t/best.pth some_photo.jpg
    python test.py --checkpoint exports/unireplknet_t/model.onnx      by onnxruntime, from tools/export.py

Prints the top-k classes of each image and writes them to results/predictions.csv. Where the folders have the names of
the classes, it also measures the accuracy and writes report.txt, confusion_matrix.csv, confusion_matrix.png and
mistakes.png. Class names, normalisation, size and how a recording becomes an image come from the checkpoint.

Exit status: 0; 1 an error; 2 a wrong option or constant; 3 done, but some files could not be read.
"""

import csv
import glob
import os
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from sklearn.metrics import classification_report, confusion_matrix
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.audio import input_kind
from common.checkpoint import build_network, find_checkpoint, load_checkpoint
from common.dataset import ImageFiles, eval_transform
from common.device import choose_device, choose_layout, has_bfloat16, keep_freed_memory
from common.onnx_network import OnnxNetwork
from common.options import ConstantError, Name, NonNegativeInt, PositiveInt, UserError, Workers, run
from common.plots import plot_confusion_matrix, plot_sheet

IMAGES: list[Name] = []  # files, folders or patterns; []: test/ if it exists, else data/val
CHECKPOINT: str = ""  # file of train.py, or .onnx; "": the newest checkpoints/*/best.pth, else "seedlings"
TOP_K: PositiveInt = 3  # number of most likely classes to show for each image
TTA: bool = False  # average over the 8 rotated and mirrored copies of each image, in 8 times the time
MERGE: bool = True  # merge the network into its inference structure: the same predictions, faster
AMP: Literal["auto", "bf16", "off"] = "auto"  # autocast; "auto": bf16 if supported and it predicts as float32 does
BATCH_SIZE: PositiveInt = 32  # images per forward pass
WORKERS: Workers | None = None  # processes that read images; 0: none; None: one per core, up to 8, if worth it
DEVICE: Name = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
MISTAKES: NonNegativeInt = 24  # misclassified images in mistakes.png, the most confident first; 0: no such file
OUTPUT: Name = "results"  # output folder; files of an earlier run are replaced

MAX_DIFFERENCE = 0.02  # between probabilities in bf16 and float32, up to which AMP "auto" takes bf16
SECONDS_TO_START = 3.0  # s, roughly what starting processes costs; for less reading it does not pay off


def main():
    path = find_checkpoint(CHECKPOINT)
    if path.suffix == ".onnx":
        network, device = OnnxNetwork(path), torch.device("cpu")
        checkpoint, structure = network.about, "onnxruntime"
        if DEVICE not in ("auto", "cpu") or AMP == "bf16" or not MERGE:
            print(f"onnxruntime runs on the CPU in float32: DEVICE {DEVICE}, AMP {AMP}, MERGE {MERGE} have no effect")
    else:
        checkpoint, device = load_checkpoint(path), choose_device(DEVICE)
        if device.type == "cpu":
            keep_freed_memory()
        network = build_network(checkpoint, MERGE).to(device, memory_format=choose_layout(device))
        structure = "EMA weights" if checkpoint.get("state_dict_ema") else "weights"
        structure += ", merged" if MERGE else ", training structure"
    classes, kind = checkpoint["classes"], input_kind(checkpoint.get("sound"))
    if TTA and kind.name == "recording":
        raise ConstantError("TTA must be False for recordings, since a mirrored spectrogram is another sound, got True")
    structure += ", 8 views of each image" if TTA else ""
    paths = find_files(IMAGES or ["test" if Path("test").is_dir() else "data/val"], kind)
    print(f"{path}: {checkpoint['arch']}, {len(classes)} classes, {structure}, {device}")

    folder = Path(OUTPUT)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    transform = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])
    files = ImageFiles(paths, transform, kind.load)
    workers = choose_readers(files, BATCH_SIZE, device) if WORKERS is None else WORKERS
    loader = DataLoader(files, BATCH_SIZE, num_workers=workers, collate_fn=list)
    probabilities, reasons, dtype = predict(network, loader, device, AMP, TTA)
    seconds = time.perf_counter() - started
    broken = [reason for reason in reasons if reason]
    if len(broken) == len(paths):
        raise UserError(f"none of the {len(paths)} {kind.name}s can be read; the first: {broken[0]}")
    paths = [path for path, reason in zip(paths, reasons) if not reason]

    write_predictions(paths, probabilities, classes, TOP_K, folder)
    evaluate(paths, probabilities, classes, kind, MISTAKES, folder)
    for reason in broken:
        print(f"skipped: {reason}")
    print(
        f"{len(paths)} {kind.name}s in {seconds:.1f} s, {len(paths) / seconds:.1f} {kind.name}s/s, "
        f"{str(dtype).removeprefix('torch.')}; files in {folder}"
    )
    return 3 if broken else 0


def find_files(names, kind):
    """The files of a `common.audio.Kind` that files, folders and patterns name, each once, in order."""
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


def choose_readers(files, batch_size, device):
    """How many processes to read `ImageFiles` with: none if that costs more than it saves."""
    most = min(os.cpu_count() or 1, 8)
    if device.type == "cpu":  # there they compete with the network for the cores, so only for large images
        started = time.perf_counter()
        files[0]
        seconds = (time.perf_counter() - started) * len(files)
        return most if seconds > SECONDS_TO_START else 0
    return min(most, len(files) // batch_size)


@torch.inference_mode()
def predict(network, loader, device, amp, tta):
    """Predict every file.

    Args:
        network: images (N, 3, height, width) -> logits (N, classes).
        loader: yields lists of the items of an `ImageFiles`.
        amp, tta: the constants AMP and TTA.

    Returns:
        (float array (readable files, classes) of probabilities or None, a reason or "" for each file, dtype used).
    """
    reasons, probabilities, dtype = [], [], None
    # Finding out whether bf16 predicts the same takes as long as two batches.
    if amp == "auto" and len(loader.dataset) <= 2 * loader.batch_size:
        dtype = torch.float32
    with tqdm(total=len(loader.dataset), desc="test", unit="img", leave=False) as bar:
        for batch in loader:
            reasons += [reason for _, reason in batch]
            images = [image for image, _ in batch if image is not None]
            if images:
                images = torch.stack(images).to(device, memory_format=choose_layout(device))
                dtype = dtype or choose_dtype(network, images, amp)
                views = symmetries(images) if tta else [images]
                views = torch.stack([compute(network, view, dtype) for view in views])  # (views, N, classes)
                probabilities.append(views.mean(0).cpu().numpy())
            bar.update(len(batch))
    return np.concatenate(probabilities) if probabilities else None, reasons, dtype


def choose_dtype(network, images, amp):
    """The dtype to compute in; for "auto" bf16 if its probabilities of these images are close to those of float32."""
    if isinstance(network, OnnxNetwork) or amp == "off":
        return torch.float32
    if amp == "bf16":
        return torch.bfloat16
    if not has_bfloat16(images.device):
        return torch.float32
    exact, fast = (compute(network, images, dtype) for dtype in (torch.float32, torch.bfloat16))
    return torch.bfloat16 if (exact - fast).abs().max() <= MAX_DIFFERENCE else torch.float32


def symmetries(images):
    """The 8 copies of images (N, 3, H, H) by quarter turns and mirroring."""
    return [mirrored.rot90(quarter, (2, 3)) for mirrored in (images, images.flip(3)) for quarter in range(4)]


def compute(network, images, dtype):
    """Probabilities (N, classes) of images (N, 3, H, W), by autocast in `dtype` except for the head."""
    if isinstance(network, OnnxNetwork):
        return network(images).softmax(1)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        features = network.forward_features(images)
    return network.forward_head(features.float()).softmax(1)


def write_predictions(paths, probabilities, classes, top_k, folder):
    """Print the top-k classes of each file and write them to predictions.csv, with a byte order mark for Excel."""
    top = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    with open(folder / "predictions.csv", "w", newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        writer = csv.writer(file)
        ranks = range(1, top.shape[1] + 1)
        writer.writerow(["image", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))])
        for path, indices, row in zip(paths, top, probabilities):
            print(f"{path}: {', '.join(f'{classes[i]} {row[i]:.4f}' for i in indices)}")
            writer.writerow([path, *(cell for i in indices for cell in (classes[i], f"{row[i]:.6f}"))])


def evaluate(paths, probabilities, classes, kind, mistakes, folder):
    """Compare the predictions with the names of the files' folders: report, confusion matrix and worst mistakes."""
    index = {name: number for number, name in enumerate(classes)}
    known = [number for number, path in enumerate(paths) if folder_name(path) in index]
    for name in ("report.txt", "confusion_matrix.csv", "confusion_matrix.png", "mistakes.png"):
        (folder / name).unlink(missing_ok=True)  # one of an earlier run would be about other images
    if not known:
        return
    labels = np.array([index[folder_name(paths[number])] for number in known])
    probabilities = probabilities[known]
    predictions = probabilities.argmax(1)
    top5 = np.argsort(-probabilities, axis=1)[:, :5]
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

    confidence = probabilities.max(1)
    wrong = sorted(np.flatnonzero(predictions != labels), key=lambda i: -confidence[i])[:mistakes]
    if wrong:
        images = [kind.load(paths[known[i]]).resize((192, 192)) for i in wrong]
        captions = [f"{classes[predictions[i]]} {confidence[i]:.2f}\ntrue: {classes[labels[i]]}" for i in wrong]
        plot_sheet(images, captions, folder / "mistakes.png")


def folder_name(path):
    """Name of the folder that contains `path`; for a symbolic link, that of the link itself."""
    return Path(os.path.abspath(path)).parent.name


if __name__ == "__main__":
    run(main, positional="IMAGES")
