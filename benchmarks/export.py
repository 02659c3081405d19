"""Accuracy and speed of one trained network in each of its exported formats, as a table.

    python tools/export.py && python benchmarks/export.py
    python benchmarks/export.py --checkpoint some.pth --exports exports/unireplknet_a

Images are read once; the network alone is timed, on the CPU: for each format and batch size the fastest of REPEATS
calls, since other programs can only slow them down, in turns.
"""

import platform
import sys
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import torch

from common.audio import kind_of
from common.checkpoint import build_network, find_checkpoint, load_checkpoint
from common.dataset import height_and_width, transform_of
from common.evaluation import accuracy, choose_images, read_batches
from common.extras import require
from common.onnx_network import OnnxNetwork
from common.options import Name, NonNegativeInt, NotEmpty, PositiveInt, UserError, run
from common.progress import Progress

CHECKPOINT: str = ""  # file that train.py saved; "": the newest checkpoints/*/best.pth, else "seedlings"
EXPORTS: str = ""  # folder that tools/export.py wrote; "": exports/<model>
DATA: Name = "data/val"  # folder that holds <class>/<image>
IMAGES: NonNegativeInt = 200  # images, equally many of each class; 0: all
BATCH_SIZES: Annotated[list[PositiveInt], NotEmpty()] = [1, 32]  # images per timed batch
REPEATS: PositiveInt = 8  # calls of which the fastest counts


def main():
    [onnxruntime] = require("onnxruntime")
    checkpoint = load_checkpoint(find_checkpoint(CHECKPOINT))
    folder = Path(EXPORTS or Path("exports", checkpoint["arch"]))
    networks = open_networks(checkpoint, folder)
    paths, labels = choose_images(DATA, checkpoint["classes"], IMAGES)
    transform = transform_of(checkpoint)
    load = kind_of(checkpoint).load
    images = torch.cat(list(read_batches(paths, transform, 32, "reading", load)))
    logits, seconds = measure(networks, images, BATCH_SIZES, REPEATS)

    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    (height, width), threads = height_and_width(checkpoint["img_size"]), torch.get_num_threads()
    print(f"{checkpoint['arch']}, {height} x {width}, {len(paths)} images; {threads} threads, fastest of {REPEATS}")
    print(f"{versions}, Python {platform.python_version()}, {platform.system()}\n")
    speeds = " | ".join(f"images/s, batch {batch}" for batch in BATCH_SIZES)
    print(f"| format | acc1 / % | maximum difference of a logit | file / MB | {speeds} |")
    print("|---|---|---|---|" + "---|" * len(BATCH_SIZES))
    reference = logits["PyTorch, as trained"]
    for name in networks:
        file = folder / name.strip("`")
        megabytes = f"{file.stat().st_size / 1e6:.1f}" if file.is_file() else "-"
        speeds = " | ".join(f"{min(batch, len(images)) / seconds[name, batch]:.0f}" for batch in BATCH_SIZES)
        difference = abs(logits[name] - reference).max()
        print(f"| {name} | {accuracy(logits[name], labels):.1f} | {difference:.0e} | {megabytes} | {speeds} |")


def open_networks(checkpoint, folder):
    """{name of a format: function on images (N, 3, H, W) that returns logits}."""
    for name in ("model.pt2", "model.onnx", "model.int8.onnx"):
        if not (folder / name).is_file():
            raise UserError(f"there is no {folder / name}; run tools/export.py first")
    return {
        "PyTorch, as trained": build_network(checkpoint, merge=False),
        "PyTorch, merged": build_network(checkpoint),
        "`model.pt2`": torch.export.load(folder / "model.pt2").module(),
        "`model.onnx`": OnnxNetwork(folder / "model.onnx"),
        "`model.int8.onnx`": OnnxNetwork(folder / "model.int8.onnx"),
    }


@torch.inference_mode()
def measure(networks, images, batch_sizes, repeats):
    """Run and time every network.

    Returns:
        ({name: logits, array (images, classes)}, {(name, batch size): seconds of the fastest call}).
    """
    logits = {
        name: torch.cat([network(part) for part in images.split(32)]).numpy() for name, network in networks.items()
    }
    seconds = {(name, batch): [] for name in networks for batch in batch_sizes}
    for _ in Progress(range(repeats), desc="timing", leave=False):
        for (name, batch), times in seconds.items():
            part = images[:batch].contiguous()
            started = time.perf_counter()
            networks[name](part)
            times.append(time.perf_counter() - started)
    return logits, {key: min(times) for key, times in seconds.items()}


if __name__ == "__main__":
    run(main, closed_output="end")
