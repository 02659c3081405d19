"""Memory and time that each of the nine variants needs for training on a CPU, from a few training steps.

    python benchmarks/variants.py                                            all nine; let nothing else run meanwhile
    python benchmarks/variants.py --models unireplknet_a --steps 2

Each variant is trained as by train.py on this machine: autocast, memory format, Muon, EMA. It has a process of its own,
whose peak memory is reported: the largest amount of physical memory that it occupied, Python and PyTorch included (by
getrusage on Linux and macOS, by psutil on Windows). More images in a batch need more.

Forward and backward pass are timed on batches of BATCH_SIZE images, the update of the weights on its own, since its
time does not depend on the batch; both are medians after a first step that is not timed. From them follows the time of
steps of STEP_IMAGES images, and of an epoch of EPOCH_IMAGES. It is extrapolated, without loading and validation.

Prints CPU and versions, and a Markdown table.
"""

import math
import multiprocessing
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # ema.py, common/, models/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import timm
import torch
import torch.nn.functional as F

from common.device import choose_amp, choose_layout, prepare_device
from common.extras import require
from common.optimizer import create_optimizer
from common.options import ConstantError, ImageSize, Name, PositiveInt, run
from ema import ModelEma
from models import VARIANTS

MODELS: list[Name] | None = None  # UniRepLKNet variants to measure; None: all nine
IMG_SIZE: ImageSize = 224  # image size in pixels
BATCH_SIZE: PositiveInt = 2  # images per forward and backward pass
STEPS: PositiveInt = 5  # timed steps
STEP_IMAGES: PositiveInt = 32  # images per update of the weights, train.py's BATCH_SIZE
EPOCH_IMAGES: PositiveInt = 2819  # training images per epoch: the plant seedlings'
CLASSES: PositiveInt = 12  # outputs of the networks that are timed

CPU = torch.device("cpu")


def main():
    names = MODELS or list(VARIANTS)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ConstantError(f"MODELS must hold names out of {', '.join(VARIANTS)}, got {unknown[0]!r}")
    dtype = choose_amp("auto", CPU) or torch.float32
    print(f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    print(f"{platform.system()}, {versions}")
    print(f"{str(dtype).removeprefix('torch.')}, {IMG_SIZE} pixels, batch {BATCH_SIZE}, median of {STEPS} steps\n")
    print("| variant | parameters / million | peak memory / GB | images/s | minutes per epoch, extrapolated |")
    print("|---|---|---|---|---|")
    for name in names:
        # Memory that one network has freed would count for the next.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            job = process.submit(measure, name, IMG_SIZE, BATCH_SIZE, STEPS, CLASSES)
            passes, update, memory = job.result()
        seconds = passes * STEP_IMAGES / BATCH_SIZE + update  # of a step
        minutes = seconds * math.ceil(EPOCH_IMAGES / STEP_IMAGES) / 60
        cells = [f"`{name}`", f"{count_parameters(name) / 1e6:.1f}", f"{memory:.1f}"]
        cells += [f"{STEP_IMAGES / seconds:.1f}", f"{minutes:.1f}"]
        print(f"| {' | '.join(cells)} |")


def cpu_name():
    """The model of the CPU as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(name, img_size, batch_size, steps, classes):
    """Train one variant for some steps.

    Returns:
        (median seconds of a forward and backward pass, median seconds of an update, peak memory of the process in GB).
    """
    prepare_device(CPU)
    model = timm.create_model(name, num_classes=classes, layer_scale_init_value=0.1, drop_path_rate=0.1)
    model.to(memory_format=choose_layout(CPU)).train()
    optimizer = create_optimizer(model, "muon", 2e-3, 0.05, 1.0, CPU)
    ema = ModelEma(model, 0.9998)
    dtype = choose_amp("auto", CPU)
    amp = partial(torch.autocast, "cpu", dtype, enabled=dtype is not None)
    images = torch.randn(batch_size, 3, img_size, img_size).contiguous(memory_format=choose_layout(CPU))
    labels = torch.arange(batch_size) % classes
    passes, updates = [], []
    for _ in range(steps + 1):
        started = time.perf_counter()
        with amp():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        passed = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        ema.update(model)
        optimizer.zero_grad(set_to_none=True)
        passes.append(passed - started)
        updates.append(time.perf_counter() - passed)
    return statistics.median(passes[1:]), statistics.median(updates[1:]), peak_memory()


def peak_memory():
    """The largest amount of physical memory that this process has occupied, in GB."""
    if sys.platform == "win32":
        [psutil] = require("psutil")
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # which Windows does not have

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def count_parameters(name):
    """Number of parameters of a variant with the 1,000 classes of ImageNet."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


if __name__ == "__main__":
    run(main, closed_output="end")
