"""Classify images or recordings with a checkpoint that train.py saved.

    python test.py                                       images in test/, else in data/test, else in data/val
    python test.py some_photo.jpg more_photos/           files, folders, or patterns such as "photos/*.jpg"
    python test.py --checkpoint checkpoints/unireplknet_t/best.pth some_photo.jpg
    python test.py --checkpoint exports/unireplknet_t/model.onnx      by onnxruntime, from tools/export.py
    python test.py --checkpoint "cross_validation/fold*/*/last.pth"   the average of several networks
    python test.py --stress                              also the accuracy on blurred, noisy, brighter, ... images

Prints the top-k classes of each image and writes them to results/predictions.csv, with calibrated probabilities and
what is unlike the training images as "unknown", if the checkpoint was calibrated (train.py does it at the end). Where
the folders have the names of the classes, it also measures the accuracy, with its 95 % confidence interval, and writes
report.txt, confusion_matrix.csv, confusion_matrix.png and mistakes.png; with STRESS stress.csv and stress.png. Class
names, normalisation, size and how a recording becomes an image come from the checkpoint.

Exit status: 0; 1 an error; 2 a wrong option or constant; 3 done, but some files could not be read; 141 done, but nobody
read the output (`| head`).
"""

import glob
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import numpy as np
import torch

from common.audio import kind_of
from common.calibration import CalibratedNetwork, calibration_error, log_likelihood_loss
from common.checkpoint import build_network, find_checkpoints, load_checkpoint
from common.dataset import ImageFiles, PixelTransform
from common.device import Normalise, choose_device, choose_layout, has_bfloat16, keep_freed_memory
from common.evaluation import accuracy_interval, match_classes, report_classes, tabulate_confusions
from common.files import SideFiles, identity, is_circle, list_files, write_csv, write_text
from common.images import is_hidden
from common.loading import Loader
from common.onnx_network import OnnxNetwork
from common.options import ConstantError, Name, NonNegativeInt, PositiveInt, Rate, UserError, Workers, raise_all, run
from common.plots import plot_confusion_matrix, plot_sheet, plot_stress
from common.progress import Progress
from common.stress import disturbances, other_sizes
from common.text import label

IMAGES: list[Name] = []  # files, folders or patterns; []: test/ if it exists, else data/test, else data/val
CHECKPOINT: str = ""  # .pth or .onnx; several, or a pattern: averaged; "": the newest checkpoints/*/best.pth
TOP_K: PositiveInt = 3  # number of most likely classes to show for each image
UNKNOWN: Rate = 0.05  # fraction of known images that are called unknown, as less usual than the others; 0: off
TTA: bool = False  # average over the 8 rotated and mirrored copies of each image, in 8 times the time
MERGE: bool = True  # merge the network into its inference structure: the same predictions, faster
AMP: Literal["auto", "bf16", "off"] = "auto"  # autocast; "auto": bf16 if supported and it predicts as float32 does
BATCH_SIZE: PositiveInt = 32  # images per forward pass
WORKERS: Workers | None = None  # processes that read images; 0: none; None: one per core, up to 8, if worth it
DEVICE: Name = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
MISTAKES: NonNegativeInt = 24  # misclassified images in mistakes.png, the most confident first; 0: no such file
STRESS: bool = False  # also measure the accuracy on disturbed images: blur, noise, JPEG, light, zoom, size
OUTPUT: Name = "results"  # output folder; files of an earlier run are replaced

MAX_DIFFERENCE = 0.02  # between probabilities in bf16 and float32, up to which AMP "auto" takes bf16
MAX_KNOWN_DIFFERENCE = 0.1  # likewise, between what is known, on average
MAX_LISTED = 20  # files of other kinds that are named one by one
WHERE = ("test", "data/test", "data/val")  # folders that are looked for where IMAGES is empty
SECONDS_TO_START = 3.0  # s, roughly what starting processes costs; for less reading it does not pay off


def main():
    members = [open_network(path, DEVICE, AMP, MERGE) for path in find_checkpoints(CHECKPOINT)]
    check_members(members)
    checkpoint = members[0].about
    classes, kind = checkpoint["classes"], kind_of(checkpoint)
    if TTA and kind.name == "recording":
        raise ConstantError("TTA must be False for recordings, since a mirrored spectrogram is another sound, got True")
    if STRESS and kind.name == "recording":
        raise ConstantError("STRESS must be False for recordings, since its disturbances are those of images, got True")
    weights = next((name for name in IMAGES if name.lower().endswith((".pth", ".onnx"))), None)
    if weights is not None:
        raise ConstantError(
            f"IMAGES must be {kind.name}s, got {weights}; write --checkpoint before it, and patterns in quotation marks"
        )
    where = next((folder for folder in WHERE if Path(folder).is_dir()), None)
    if not IMAGES and where is None:
        raise UserError(
            f"there is no folder {', '.join(WHERE[:-1])} or {WHERE[-1]}; give {kind.name}s, as in python test.py "
            "some_file more_files/, or run makedata.py first"
        )
    paths, others, passed = find_files(IMAGES or [where], kind)
    views = ", 8 views of each image" if TTA else ""
    for member in members:
        print(
            f"{member.path}: {member.about['arch']}, {len(classes)} classes, {member.structure}{views}, {member.device}"
        )

    folder = Path(OUTPUT)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    predict_files = partial(predict_by, load=kind.load, batch_size=BATCH_SIZE, workers=WORKERS, amp=AMP, tta=TTA)
    every, every_known, every_reason, (dtype, *_) = zip(*(predict_files(member, paths) for member in members))
    seconds = time.perf_counter() - started
    reasons = every_reason[0]
    broken = [reason for reason in reasons if reason]
    if len(broken) == len(paths):
        raise UserError(f"none of the {len(paths)} {kind.name}s can be read; the first: {broken[0]}")
    if any(list(map(bool, others)) != list(map(bool, reasons)) for others in every_reason):
        raise UserError(f"{kind.name}s were changed while they were read; give the same command again")
    probabilities, known = average(every, every_known, UNKNOWN)
    paths = [path for path, reason in zip(paths, reasons) if not reason]

    # All files before anything is printed, whoever reads it: `| head` reads ten lines only.
    results = SideFiles(remark=None)
    lines = write_predictions(paths, probabilities, known, classes, TOP_K, UNKNOWN, folder, results)
    lines += evaluate(paths, probabilities, classes, kind, MISTAKES, folder, results)
    if STRESS:
        lines += measure_stress(members, paths, classes, predict_files, UNKNOWN, folder, results)
    print(*lines, sep="\n")
    if UNKNOWN and known is None and any("calibrated" in member.structure for member in members):
        print("unknown is off, since not all of these checkpoints have a score for it")
    others = [kind.why_not(path) for path in others]
    if passed:
        print(f"passed over {len(passed)} hidden or system folders ({', '.join(map(str, passed[:3]))})")
    for reason in broken + others[:MAX_LISTED]:
        print(f"skipped: {reason}")
    if others[MAX_LISTED:]:
        print(f"skipped: {len(others) - MAX_LISTED} more files that are no {kind.name}s, such as {others[-1]}")
    print(
        f"{len(paths)} {kind.name}s in {seconds:.1f} s, {len(paths) / seconds:.1f} {kind.name}s/s, "
        f"{str(dtype).removeprefix('torch.')}; files in {folder}"
    )
    if results.failed:
        raise UserError("; ".join(results.failed.values()))
    return 3 if broken or others else 0


@dataclass
class Member:
    """A network whose predictions count, and what its file says about it."""

    path: Path
    network: Callable  # images (N, 3, height, width) -> logits and known, as of `CalibratedNetwork`
    about: dict  # arch, classes, mean, std, img_size, and what else matters
    device: torch.device
    structure: str  # in words


def open_network(path, device, amp, merge):
    """Open a checkpoint or an exported network: a `Member`.

    Args:
        path: .pth or .onnx file.
        device, amp, merge: the constants DEVICE, AMP and MERGE.
    """
    if path.suffix == ".onnx":
        network = OnnxNetwork(path)
        if device not in ("auto", "cpu") or amp == "bf16" or not merge:
            print(f"onnxruntime runs on the CPU in float32: DEVICE {device}, AMP {amp}, MERGE {merge} have no effect")
        structure = "onnxruntime" + ", calibrated" * network.about.get("calibrated", False)
        return Member(path, network.predict, network.about, torch.device("cpu"), structure)
    checkpoint, device = load_checkpoint(path), choose_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    network, calibration = build_network(checkpoint, merge), checkpoint.get("calibration")
    network = CalibratedNetwork(network, calibration).to(device, memory_format=choose_layout(device))
    structure = "EMA weights" if checkpoint.get("state_dict_ema") else "weights"
    structure += (", merged" if merge else ", training structure") + (", calibrated" if calibration else "")
    return Member(path, network, checkpoint, device, structure)


def check_members(members):
    """UserError unless the networks know the same classes and take the same kind of input, so that they can be
    averaged."""
    first, *others = members
    for other in others:
        for key, what in (("classes", "classes"), ("sound", "spectrograms"), ("value_range", "VALUE_RANGE")):
            if first.about.get(key) != other.about.get(key):
                raise UserError(
                    f"{first.path} and {other.path} cannot be averaged, since their {what} differ; give checkpoints "
                    "of the same data"
                )


def find_files(names, kind):
    """Find what files, folders and patterns name, each path once, in order.

    Symbolic links are followed. A file and a link to it, or the same file by two linked folders, are two paths. Hidden
    folders and those of the system are passed over, except where one is named.

    Returns:
        ([files of the `common.audio.Kind`], [other files, except hidden ones], [folders that are passed over]).
    """
    missing = [name for name in names if not Path(name).exists() and not glob.glob(name, recursive=True)]
    raise_all([f"there is no file or folder {name}, and no file matches it as a pattern" for name in missing])
    paths, others, passed = {}, {}, []
    for name in names:
        path, files = Path(name), []
        for match in [path] if path.exists() else sorted(map(Path, glob.glob(name, recursive=True))):
            if match.is_dir() and not is_circle(match):
                files += list_files(match, is_hidden, passed)
            elif match.is_file() and not is_circle(match.parent):
                files.append(match)
        found = [file for file in files if kind.fits(file) or file == path]
        rest = [file for file in files if not kind.fits(file) and file != path and not is_hidden(file)]
        if not found:
            why = f" ({kind.why_not(rest[0])})" if rest else ""
            raise UserError(
                f"{name} is no {kind.name}, no folder with {kind.name}s and no pattern that matches any{why}"
            )
        for file in found:
            paths.setdefault(identity(file), file)
        for file in rest:
            others.setdefault(identity(file), file)
    return list(paths.values()), list(others.values()), sorted(set(passed))


def predict_by(member, paths, transform=None, *, load, batch_size, workers, amp, tta):
    """What `predict` returns for files, by one `Member`.

    Args:
        paths: the files.
        transform: function PIL RGB -> uint8 tensor (3, H, W); None: resizes as the checkpoint says.
        load: function of a path -> PIL RGB image.
        batch_size, workers, amp, tta: the constants.
    """
    about = member.about
    transform = transform or PixelTransform(about["img_size"], fit=about.get("fit", "squeeze"))
    files = ImageFiles(paths, transform, load)
    workers = choose_readers(files, batch_size, member.device) if workers is None else workers
    loader = Loader(files, batch_size, num_workers=workers, collate_fn=list)
    normalise = Normalise(about["mean"], about["std"], member.device)
    return predict(member.network, loader, normalise, member.device, amp, tta)


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
def predict(network, loader, normalise, device, amp, tta):
    """Predict every file.

    Args:
        network: of a `Member`.
        loader: yields lists of the items of an `ImageFiles`.
        normalise: a `common.device.Normalise`.
        amp, tta: the constants AMP and TTA.

    Returns:
        (float array (readable files, classes) of probabilities or None, likewise (readable files,) of what `network`
        gives as known or None, a reason or "" for each file, dtype used).
    """
    reasons, probabilities, known, dtype = [], [], [], None
    # Finding out whether bf16 predicts the same takes as long as two batches.
    if amp == "auto" and len(loader.dataset) <= 2 * loader.batch_size:
        dtype = torch.float32
    with Progress(total=len(loader.dataset), desc="test", unit="img", leave=False) as bar:
        for batch in loader:
            reasons += [reason for _, reason in batch]
            images = [image for image, _ in batch if image is not None]
            if images:
                images = normalise(torch.stack(images).to(device)).contiguous(memory_format=choose_layout(device))
                dtype = dtype or choose_dtype(network, images, amp)
                views = symmetries(images) if tta else [images]
                views, views_known = zip(*(compute(network, view, dtype) for view in views))
                probabilities.append(torch.stack(views).mean(0).cpu().numpy())  # (views, N, classes) -> (N, classes)
                known += [torch.stack(views_known).mean(0).cpu().numpy()] if views_known[0] is not None else []
            bar.update(len(batch))
    probabilities, known = (np.concatenate(parts) if parts else None for parts in (probabilities, known))
    return probabilities, known, reasons, dtype


def choose_dtype(network, images, amp):
    """The dtype to compute in; for "auto" bf16 if its probabilities of these images are close to those of float32, and
    what is known, too, on average."""
    if not isinstance(network, CalibratedNetwork) or amp == "off":
        return torch.float32
    if amp == "bf16":
        return torch.bfloat16
    if not has_bfloat16(images.device):
        return torch.float32
    (exact, known), (fast, fast_known) = (compute(network, images, dtype) for dtype in (torch.float32, torch.bfloat16))
    same = (exact - fast).abs().max() <= MAX_DIFFERENCE
    if known is not None:
        same = same and (known - fast_known).abs().mean() <= MAX_KNOWN_DIFFERENCE
    return torch.bfloat16 if same else torch.float32


def symmetries(images):
    """The 8 copies of images (N, 3, H, H) by quarter turns and mirroring."""
    return [mirrored.rot90(quarter, (2, 3)) for mirrored in (images, images.flip(3)) for quarter in range(4)]


def compute(network, images, dtype):
    """(probabilities (N, classes), known (N,) or None) of images (N, 3, H, W), by autocast in `dtype` except for the
    head."""
    logits, known = network(images) if dtype == torch.float32 else network(images, dtype)
    return logits.softmax(1), known


def average(every, every_known, unknown):
    """(probabilities, known) of all networks; known is None if UNKNOWN is 0, or one of them does not give it."""
    missing = not unknown or any(known is None for known in every_known)
    if len(every) == 1:
        return every[0], None if missing else every_known[0]
    return np.mean(every, 0), None if missing else np.mean(every_known, 0)


def write_predictions(paths, probabilities, known, classes, top_k, unknown, folder, results):
    """Write the top-k classes of each file, and how far it is known, to predictions.csv; returns them as lines."""
    top = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    ranks = range(1, top.shape[1] + 1)
    lines, rows = [], [["image", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))]]
    rows[0] += [] if known is None else ["known"]
    for number, (path, indices, row) in enumerate(zip(paths, top, probabilities)):
        lines.append(f"{path}: {', '.join(f'{classes[i]} {row[i]:.4f}' for i in indices)}")
        rows.append([path, *(cell for i in indices for cell in (classes[i], f"{row[i]:.6f}"))])
        if known is not None:
            rows[-1].append(f"{known[number]:.4f}")
            lines[-1] += f"; unknown ({known[number]:.3f})" if known[number] < unknown else ""
    path = folder / "predictions.csv"
    results.write(path, write_csv, path, rows)
    if known is not None and (known < unknown).any():
        lines.append(f"{(known < unknown).sum()} of {len(known)} are called unknown: below UNKNOWN {unknown:g}")
    return lines


def evaluate(paths, probabilities, classes, kind, mistakes, folder, results):
    """Compare the predictions with the names of the files' folders: report, confusion matrix and worst mistakes.

    Returns:
        Lines of text to print.
    """
    names = list(map(folder_name, paths))
    index = match_classes(set(names), classes)
    known = [number for number, name in enumerate(names) if name in index]
    unknown = Counter(name for name in names if name not in index)
    renamed = {name: classes[number] for name, number in index.items() if name != classes[number]}
    lines = [f"the folder {name} is taken for the class {class_name}" for name, class_name in renamed.items()]
    if unknown:
        others = ", ".join(f"{name} ({count})" for name, count in unknown.most_common(12))
        others += ", ..." if len(unknown) > 12 else ""
        lines.append(f"not evaluated: {unknown.total()} {kind.name}s in folders that no class is called: {others}")
    files = [folder / name for name in ("report.txt", "confusion_matrix.csv", "confusion_matrix.png", "mistakes.png")]
    files += [folder / name for name in ("stress.csv", "stress.png")]
    for path in files:  # one of an earlier run would be about other images
        results.write(path, partial(path.unlink, missing_ok=True))
    if not known:
        return lines
    labels = np.array([index[names[number]] for number in known])
    probabilities = probabilities[known]
    predictions = probabilities.argmax(1)
    top5 = np.argsort(-probabilities, axis=1)[:, :5]
    acc1 = 100 * (predictions == labels).mean()
    acc5 = 100 * (top5 == labels[:, None]).any(1).mean()

    report_path, table_path, matrix_path, mistakes_path, *_ = files
    report = report_classes(labels, predictions, classes)
    low, high = accuracy_interval((predictions == labels).sum(), len(labels))
    interval = f"95 % confidence interval of acc1: {low:.2f} to {high:.2f} % (Wilson)"
    ece, nll = calibration_error(probabilities, labels), log_likelihood_loss(probabilities, labels)
    report += f"{interval}\nexpected calibration error: {ece:.4f}; negative log-likelihood: {nll:.4f}\n"
    results.write(report_path, write_text, report_path, report)
    results.write(table_path, write_csv, table_path, tabulate_confusions(labels, predictions, classes))
    results.write(matrix_path, plot_confusion_matrix, labels, predictions, classes, matrix_path)

    confidence = probabilities.max(1)
    wrong = sorted(np.flatnonzero(predictions != labels), key=lambda i: -confidence[i])[:mistakes]

    def draw_mistakes():
        images = [kind.load(paths[known[i]]).resize((192, 192)) for i in wrong]
        captions = [
            f"predicted: {label(classes[predictions[i]])} {confidence[i]:.2f}\ntrue: {label(classes[labels[i]])}\n"
            f"{label(paths[known[i]].name)}"
            for i in wrong
        ]
        plot_sheet(images, captions, mistakes_path)

    if wrong:
        results.write(mistakes_path, draw_mistakes)
    return [f"\n{report}", *lines, f"acc1 {acc1:.2f} %, acc5 {acc5:.2f} % on {len(known)} {kind.name}s"]


def measure_stress(members, paths, classes, predict_files, unknown, folder, results):
    """Measure the accuracy under each of `common.stress.disturbances`: stress.csv and stress.png.

    Args:
        paths: files that can be read; those in folders named like classes count.
        predict_files: function of a `Member`, files and a transform; see `predict_by`.

    Returns:
        Lines of text to print: a table.
    """
    index = match_classes(set(map(folder_name, paths)), classes)
    paths = [path for path in paths if folder_name(path) in index]
    if not paths:
        return ["STRESS needs images in folders that are named like the classes, so nothing is measured"]
    labels = np.array([index[folder_name(path)] for path in paths])
    steps = [disturbances(member.about["img_size"], member.about.get("fit", "squeeze")) for member in members]
    rows = {}
    for name in steps[0]:
        try:
            outputs = [predict_files(member, paths, step[name]) for member, step in zip(members, steps)]
        except (RuntimeError, AssertionError, ValueError):
            if name not in other_sizes(64):
                raise
            rows[name] = None  # a network, or an exported file, for images of one size only
            continue
        every, every_known, *_ = zip(*outputs)
        probabilities, known = average(every, every_known, unknown)
        acc1 = 100 * (probabilities.argmax(1) == labels).mean()
        rows[name] = acc1, None if known is None else 100 * (known < unknown).mean()
    sizes = other_sizes(members[0].about["img_size"])
    titles = {name: f"{name}, {'x'.join(map(str, sizes[name]))}" if name in sizes else name for name in rows}
    clean = rows["clean"][0]
    table = [["disturbance", "acc1", "change", "unknown"]]
    for name, row in rows.items():
        cells = [""] * 3
        if row is not None:
            cells = [f"{row[0]:.2f}", f"{row[0] - clean:+.2f}", "" if row[1] is None else f"{row[1]:.1f}"]
        table.append([titles[name], *cells])
    path = folder / "stress.csv"
    results.write(path, write_csv, path, table)
    path = folder / "stress.png"
    accuracies = {titles[name]: None if row is None else row[0] for name, row in rows.items()}
    results.write(path, plot_stress, accuracies, len(paths), path)
    wide = max(len(row[0]) for row in table)
    return ["", *(f"{first:<{wide}}  " + "  ".join(f"{cell or '-':>7}" for cell in cells) for first, *cells in table)]


def folder_name(path):
    """Name of the folder that contains `path`; for a symbolic link, that of the link itself."""
    return Path(os.path.abspath(path)).parent.name


if __name__ == "__main__":
    run(main, positional="IMAGES")
