"""Time training and inference on this CPU: the network as published beside ours, in one run.

    python -m benchmarks.cpu                       the three tables, about 5 minutes on two cores
    python -m benchmarks.cpu --repeats 1 --batch-size 2

"Published" is what any script gets: float32, NCHW, PyTorch's own convolutions, gradients and memory settings, the
training structure. "Ours" is what train.py and test.py choose here. Each has a process of its own, since memory
settings hold for a whole process; they compute in turns, so that a busy moment meets both.

Prints three Markdown tables: the large-kernel convolution, forward and backward; a training step; inference.
"""

import multiprocessing
import statistics
import time

import timm
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import models  # noqa: F401  registers the variants
from common.device import choose_layout, has_bfloat16, keep_freed_memory
from common.options import UserError, run
from models.depthwise import DepthwiseConv2d

BATCH_SIZE: int = 16  # pictures at once
REPEATS: int = 7  # timings of which the median is taken
MODELS: list[str] = ["unireplknet_t", "unireplknet_a"]  # networks to time
SIZES: list[int] = [224, 128]  # edge of the pictures in pixels, for each of MODELS

# channels and edge of the maps that unireplknet_t's kernels of 13 meet at 224 pixels
MAPS = ((160, 28), (320, 14), (640, 7))
CPU = torch.device("cpu")


def convolution(ours, channels, edge, batch_size):
    """A function that takes the large-kernel convolution forward and backward once."""
    conv = DepthwiseConv2d(channels, 13)
    x = torch.randn(batch_size, channels, edge, edge, requires_grad=True)
    grad = torch.randn_like(x)
    return lambda: torch.autograd.grad(conv(x), [x, conv.weight], grad)


def training(ours, name, size, batch_size):
    """A function that takes one training step, without the optimizer's part."""
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


def serve(connection, ours):
    """A process that prepares what it is told, (function, arguments), and runs it once for each "run"."""
    torch.manual_seed(0)
    if ours:
        keep_freed_memory()
    else:
        DepthwiseConv2d.forward = nn.Conv2d.forward
    while (task := connection.recv()) is not None:
        if task != "run":
            make, arguments = task
            step = make(ours, *arguments)
            step()
            connection.send(None)
            continue
        step()  # brings data and threads back that the other process has displaced
        started = time.perf_counter()
        step()
        connection.send(time.perf_counter() - started)


def compare(servers, make, *arguments):
    """Median seconds of `make(ours, *arguments)()`, published and ours."""
    for server in servers:
        server.send((make, arguments))
        server.recv()
    times = [[], []]
    for _ in range(REPEATS):
        for server, results in zip(servers, times):
            server.send("run")
            results.append(server.recv())
    return [statistics.median(results) for results in times]


def print_table(title, unit, rows):
    """Print a Markdown table; `rows` yields (what, published, ours, ratio)."""
    print(f"\n| {title} | published, {unit} | ours, {unit} | ratio |\n|---|---|---|---|")
    for what, published, ours, ratio in rows:
        tqdm.write(f"| {what} | {published:.1f} | {ours:.1f} | {ratio:.2f} |")


def main():
    if min(BATCH_SIZE, REPEATS) < 1 or len(MODELS) != len(SIZES) or min(SIZES, default=0) < 32:
        raise UserError("BATCH_SIZE and REPEATS must be at least 1, and MODELS have one of SIZES each, 32 or more")
    unknown = [name for name in MODELS if name not in models.VARIANTS]
    if unknown:
        raise UserError(f"MODELS {unknown[0]!r} is unknown; choose among {', '.join(models.VARIANTS)}")
    context = multiprocessing.get_context("spawn")
    servers, processes = [], []
    for ours in (False, True):
        here, there = context.Pipe()
        processes.append(context.Process(target=serve, args=(there, ours), daemon=True))
        processes[-1].start()
        servers.append(here)

    dtype = "bfloat16 autocast" if has_bfloat16(CPU) else "float32"
    print(f"batch {BATCH_SIZE}, median of {REPEATS}; ours: {dtype}, {str(choose_layout(CPU)).removeprefix('torch.')}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")

    def convolutions():
        for channels, edge in tqdm(MAPS, unit="shape", leave=False):
            published, ours = compare(servers, convolution, channels, edge, BATCH_SIZE)
            yield f"{channels} x {edge} x {edge}", 1e3 * published, 1e3 * ours, published / ours

    def networks(make, batch_sizes):
        cases = [(name, size, batch) for name, size in zip(MODELS, SIZES) for batch in batch_sizes]
        for name, size, batch in tqdm(cases, unit="network", leave=False):
            published, ours = compare(servers, make, name, size, batch)
            yield f"{name}, {size} pixels, batch {batch}", batch / published, batch / ours, published / ours

    print_table("kernel 13, float32, forward and backward", "ms", convolutions())
    print_table("training step", "images/s", networks(training, [BATCH_SIZE]))
    print_table("inference", "images/s", networks(inference, [BATCH_SIZE, 1]))
    for server, process in zip(servers, processes):
        server.send(None)
        process.join()


if __name__ == "__main__":
    run(main)
