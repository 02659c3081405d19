"""Time the gradients of the large-kernel convolutions on this CPU: PyTorch's own beside ours, in one run.

    python -m benchmarks.depthwise                          unireplknet_t at 224 pixels
    python -m benchmarks.depthwise --model unireplknet_a --img-size 128

Prints a Markdown table, one row for each shape that trains with our gradients: milliseconds (medians), how many times
as fast ours is, and our largest error relative to the largest value, against float64; then the images a second of
whole training steps either way.
"""

import statistics
import time
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input, conv2d_weight
from tqdm import tqdm

from common.options import UserError, run
from models import VARIANTS, depthwise, depthwise_cpu
from models.depthwise import DepthwiseConv2d

MODEL: str = "unireplknet_t"  # whose shapes to time: unireplknet_a f p n t s b l xl
IMG_SIZE: int = 224  # edge of the pictures in pixels
BATCH_SIZE: int = 16  # pictures at once
REPEATS: int = 7  # timings of which the median is taken


def seconds(functions):
    """Median seconds of each function, timed in turns so that a busy moment meets all of them."""
    times = [[] for _ in functions]
    for repeat in range(REPEATS + 1):
        for function, results in zip(functions, times):
            started = time.perf_counter()
            function()
            if repeat:  # the first call is a warm-up
                results.append(time.perf_counter() - started)
    return [statistics.median(results) for results in times]


def find_shapes(model):
    """The depthwise convolutions of `model` that train with our gradients: [(channels, edge, kernel, dilation)]."""
    shapes = {}  # keys only, in order, each once

    def note(conv, inputs, _):
        kernel_size, dilation = conv.kernel_size[0], conv.dilation[0]
        if depthwise_cpu.fast_gradients("cpu", torch.float32, kernel_size, dilation):
            shapes[conv.in_channels, inputs[0].shape[-1], kernel_size, dilation] = None

    for module in model.modules():
        if isinstance(module, DepthwiseConv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(2, 3, IMG_SIZE, IMG_SIZE))
    return list(shapes)


def compare(channels, edge, kernel_size, dilation):
    """One row of the table."""
    x = torch.randn(BATCH_SIZE, channels, edge, edge)
    grad = torch.randn_like(x)
    reach = min(kernel_size // 2, (edge - 1) // dilation)  # what DepthwiseConv2d keeps of the kernel
    kernel_size = 2 * reach + 1
    weight = torch.randn(channels, 1, kernel_size, kernel_size)
    settings = dict(padding=reach * dilation, dilation=dilation, groups=channels)
    inputs = [tensor.requires_grad_() for tensor in (x, weight)]
    out = depthwise_cpu.depthwise_conv2d(x, weight, dilation)
    theirs_x, theirs_w, ours = seconds(
        [
            lambda: conv2d_input(x.shape, weight, grad, **settings),
            lambda: conv2d_weight(x, weight.shape, grad, **settings),
            lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True),
        ]
    )
    doubled = [tensor.detach().double() for tensor in (x, weight, grad)]
    exact = (
        conv2d_input(x.shape, doubled[1], doubled[2], **settings),
        conv2d_weight(doubled[0], weight.shape, doubled[2], **settings),
    )
    errors = [
        ((actual - expected).abs().max() / expected.abs().max()).item()
        for actual, expected in zip(torch.autograd.grad(out, inputs, grad), exact)
    ]
    milliseconds = [f"{1e3 * duration:.1f}" for duration in (theirs_x, theirs_w, ours)]
    return [*milliseconds, f"{(theirs_x + theirs_w) / ours:.1f}", f"{max(errors):.0e}"]


def main():
    if MODEL not in VARIANTS:
        raise UserError(f"MODEL must be one of {', '.join(VARIANTS)}, got {MODEL!r}")
    if IMG_SIZE < 32 or min(BATCH_SIZE, REPEATS) < 1:
        raise UserError("IMG_SIZE must be at least 32; BATCH_SIZE and REPEATS at least 1")
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=12)
    shapes = find_shapes(model)
    print(f"{MODEL}, {IMG_SIZE} pixels, batch {BATCH_SIZE}, float32, median of {REPEATS}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| channels, map, kernel, dilation | PyTorch input | PyTorch weight | ours both, ms | ratio | error |")
    print("|---|---|---|---|---|---|")
    for channels, edge, kernel_size, dilation in tqdm(shapes, unit="shape", leave=False):
        cells = compare(channels, edge, kernel_size, dilation)
        tqdm.write(f"| {channels}, {edge} x {edge}, {kernel_size}, {dilation} | {' | '.join(cells)} |")

    model.train()
    images, labels = torch.randn(BATCH_SIZE, 3, IMG_SIZE, IMG_SIZE), torch.randint(12, (BATCH_SIZE,))

    def step():
        F.cross_entropy(model(images), labels).backward()
        model.zero_grad()

    def step_with_pytorch():
        with mock.patch.object(depthwise, "fast_gradients", return_value=False):
            step()

    theirs, ours = (BATCH_SIZE / duration for duration in seconds([step_with_pytorch, step]))
    print(f"\ntraining steps: PyTorch {theirs:.1f}, ours {ours:.1f} images a second, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    run(main)
