"""Accuracy and speed of one trained network in every form that it can be run in, as a table.

    python tools/export.py && python -m benchmarks.export
    python -m benchmarks.export --checkpoint some.pth --exports exports/unireplknet_a

Pictures are read once; what is timed is the network alone, on the CPU: for each form and each batch size the fastest of
REPEATS calls, since other programs can only slow them down, in an order that takes turns.
"""

import argparse
import platform
import time
from pathlib import Path

import onnxruntime
import torch
from tqdm import tqdm

from common.checkpoint import build_network, find_checkpoint, load_checkpoint
from common.dataset import eval_transform
from common.evaluation import accuracy, choose_pictures, read_batches
from common.onnx_network import OnnxNetwork

BATCHES = (1, 32)
REPEATS = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="", help="default: the newest checkpoints/*/best.pth")
    parser.add_argument("--exports", help="folder of tools/export.py; default: exports/<model>")
    parser.add_argument("--data", default="data/val")
    parser.add_argument("--pictures", type=int, default=200, help="as many of each class; 0: all")
    options = parser.parse_args()
    path = find_checkpoint(options.checkpoint)
    checkpoint = load_checkpoint(path)
    folder = Path(options.exports or Path("exports", checkpoint["arch"]))
    forms = {
        "PyTorch, as trained": build_network(checkpoint, merge=False),
        "PyTorch, merged": build_network(checkpoint),
        "`model.pt2`": torch.export.load(folder / "model.pt2").module(),
        "`model.onnx`": OnnxNetwork(folder / "model.onnx"),
        "`model.int8.onnx`": OnnxNetwork(folder / "model.int8.onnx"),
    }
    sizes = {"`model.pt2`": "model.pt2", "`model.onnx`": "model.onnx", "`model.int8.onnx`": "model.int8.onnx"}
    paths, labels = choose_pictures(options.data, checkpoint["classes"], options.pictures)
    transform = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])
    images = torch.cat(list(read_batches(paths, transform, 32, "reading")))

    with torch.inference_mode():
        logits = {name: torch.cat([form(part) for part in images.split(32)]).numpy() for name, form in forms.items()}
        seconds = {(name, batch): [] for name in forms for batch in BATCHES}
        for _ in tqdm(range(REPEATS), desc="timing", leave=False):
            for (name, batch), times in seconds.items():
                part = images[:batch].contiguous()
                started = time.perf_counter()
                forms[name](part)
                times.append(time.perf_counter() - started)

    reference = logits["PyTorch, as trained"]
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    size, threads = checkpoint["img_size"], torch.get_num_threads()
    print(f"{checkpoint['arch']}, {size} x {size}, {len(paths)} pictures; {threads} threads, fastest of {REPEATS}")
    print(f"{versions}, Python {platform.python_version()}, {platform.system()}\n")
    speeds = " | ".join(f"pictures a second, batch {batch}" for batch in BATCHES)
    print(f"| form | acc1 / % | largest difference of a logit | file / MB | {speeds} |")
    print("|---|---|---|---|" + "---|" * len(BATCHES))
    for name in forms:
        megabytes = f"{(folder / sizes[name]).stat().st_size / 1e6:.1f}" if name in sizes else "-"
        speeds = " | ".join(f"{batch / min(seconds[name, batch]):.0f}" for batch in BATCHES)
        difference = abs(logits[name] - reference).max()
        print(f"| {name} | {accuracy(logits[name], labels):.1f} | {difference:.0e} | {megabytes} | {speeds} |")


if __name__ == "__main__":
    main()
