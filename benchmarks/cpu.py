"""Time training and inference on this CPU: the network as published beside ours, in one run.

    python benchmarks/cpu.py                       the three tables, about 5 minutes on two cores
    python benchmarks/cpu.py --repeats 1 --batch-size 2

"Published" is what any script gets: float32, NCHW, PyTorch's own convolutions, gradients and memory settings, the
training structure. "Ours" is what train.py and test.py choose here. Each has a process of its own, since memory
settings apply to a whole process; they compute in turns, so that a busy moment affects both.

Prints three Markdown tables: the large-kernel convolution, forward and backward; a training step; inference.
"""

import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import timm
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/
import models
from common.device import choose_layout, has_bfloat16, keep_freed_memory
from common.options import ConstantError, ImageSize, Name, NotEmpty, PositiveInt, run
from common.progress import Progress

BATCH_SIZE: PositiveInt = 16  # images per batch
REPEATS: PositiveInt = 7  # timings of which the median is taken
MODELS: Annotated[list[Name], NotEmpty()] = ["unireplknet_t", "unireplknet_a"]  # UniRepLKNet variants to time
SIZES: Annotated[list[ImageSize], NotEmpty()] = [224, 128]  # image size in pixels, one for each of MODELS

# channels and size of the maps of unireplknet_t's kernels of 13 at 224 pixels
MAPS = ((160, 28), (320, 14), (640, 7))
CPU = torch.device("cpu")


def main():
    if len(MODELS) != len(SIZES):
        raise ConstantError(f"SIZES must hold one size for each of the {len(MODELS)} MODELS, got {SIZES}")
    unknown = [name for name in MODELS if name not in models.VARIANTS]
    if unknown:
        raise ConstantError(f"MODELS {unknown[0]!r} is unknown; choose among {', '.join(models.VARIANTS)}")
    servers, processes = start_servers()
    dtype = "bfloat16 autocast" if has_bfloat16(CPU) else "float32"
    print(f"batch {BATCH_SIZE}, median of {REPEATS}; ours: {dtype}, {str(choose_layout(CPU)).removeprefix('torch.')}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    networks = list(zip(MODELS, SIZES))
    print_table("kernel 13, float32, forward and backward", "ms", time_convolutions(servers, BATCH_SIZE, REPEATS))
    print_table("training step", "images/s", time_networks(servers, training, networks, [BATCH_SIZE], REPEATS))
    print_table("inference", "images/s", time_networks(servers, inference, networks, [BATCH_SIZE, 1], REPEATS))
    for server, process in zip(servers, processes):
        server.send(None)
        process.join()


def start_servers():
    """Start a process for the published way and one for ours: (connections, processes)."""
    context = multiprocessing.get_context("spawn")
    servers, processes = [], []
    for ours in (False, True):
        here, there = context.Pipe()
        processes.append(context.Process(target=serve, args=(there, ours), daemon=True))
        processes[-1].start()
        servers.append(here)
    return servers, processes


def serve(connection, ours):
    """Loop of a process: prepare each (function, arguments) that it receives, and time it once for each "run"."""
    torch.manual_seed(0)
    if ours:
        keep_freed_memory()
    else:
        models.DepthwiseConv2d.forward = nn.Conv2d.forward  # this process ends with the benchmark
    while (task := connection.recv()) is not None:
        if task != "run":
            make, arguments = task
            step = make(ours, *arguments)
            step()
            connection.send(None)
            continue
        step()  # brings back data and threads that the other process has displaced
        started = time.perf_counter()
        step()
        connection.send(time.perf_counter() - started)


def time_convolutions(servers, batch_size, repeats):
    """Yield the rows of `print_table` for the convolutions of `MAPS`."""
    for channels, size in Progress(MAPS, unit="shape", leave=False):
        published, ours = compare(servers, repeats, convolution, channels, size, batch_size)
        yield f"{channels} x {size} x {size}", 1e3 * published, 1e3 * ours, published / ours


def compare(servers, repeats, make, *arguments):
    """Median seconds of `make(ours, *arguments)()`, published and ours."""
    for server in servers:
        server.send((make, arguments))
        server.recv()
    times = [[], []]
    for _ in range(repeats):
        for server, results in zip(servers, times):
            server.send("run")
            results.append(server.recv())
    return [statistics.median(results) for results in times]


def convolution(ours, channels, size, batch_size):
    """A function that runs the large-kernel convolution forward and backward once."""
    conv = models.DepthwiseConv2d(channels, 13)
    x = torch.randn(batch_size, channels, size, size, requires_grad=True)
    grad = torch.randn_like(x)
    return lambda: torch.autograd.grad(conv(x), [x, conv.weight], grad)


def time_networks(servers, make, networks, batch_sizes, repeats):
    """Yield the rows of `print_table` for pairs of a network and its image size."""
    cases = [(name, size, batch) for name, size in networks for batch in batch_sizes]
    for name, size, batch in Progress(cases, unit="network", leave=False):
        published, ours = compare(servers, repeats, make, name, size, batch)
        yield f"{name}, {size} pixels, batch {batch}", batch / published, batch / ours, published / ours


def training(ours, name, size, batch_size):
    """A function that runs one training step without the optimizer."""
    layout = choose_layout(CPU) if ours else torch.contiguous_format
    model = timm.create_model(name, num_classes=12, published_arithmetic=not ours).train().to(memory_format=layout)
    images = torch.randn(batch_size, 3, size, size).to(memory_format=layout)
    labels = torch.randint(12, (batch_size,))

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=ours and has_bfloat16(CPU)):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        model.zero_grad()

    return step


def inference(ours, name, size, batch_size):
    """A function that computes one batch."""
    layout = choose_layout(CPU) if ours else torch.contiguous_format
    model = timm.create_model(name, num_classes=12, published_arithmetic=not ours).eval()
    model = (timm.utils.reparameterize_model(model) if ours else model).to(memory_format=layout)
    images = torch.randn(batch_size, 3, size, size).to(memory_format=layout)

    @torch.inference_mode()
    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=ours and has_bfloat16(CPU)):
            model(images)

    return step


def print_table(title, unit, rows):
    """Print a Markdown table; `rows` yields (what, published, ours, ratio)."""
    print(f"\n| {title} | published, {unit} | ours, {unit} | ratio |\n|---|---|---|---|")
    for what, published, ours, ratio in rows:
        Progress.write(f"| {what} | {published:.1f} | {ours:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    run(main, closed_output="end")
