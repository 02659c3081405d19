"""Report on the depthwise convolutions of a network on this machine: which implementation runs each of them, and why.

    python tools/conv_report.py
    python tools/conv_report.py --model unireplknet_s --img-size 384 --batch-size 64 --amp fp16

Prints a Markdown table with one row for each shape: the implementation that runs; its largest error against float64 in
output, input gradient and weight gradient, each relative to the largest value there; and for every implementation that
can compute the shape, the milliseconds that all three take together (median). The lines below the table say why the
other implementations do not run.

Then comes what models/depthwise_choice.py measures for a training run: for each convolution and pass the plan's method
and the milliseconds of every method, with the reason where one is refused; for each group of convolutions with one
input the milliseconds of forward and backward pass by default and as planned, and last the choice that holds.
"""

import contextlib
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Literal
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import timm
import torch
import torch.nn.functional as F

from common.device import choose_device, choose_layout, prepare_device
from common.gpu import find_triton_remedy
from common.options import ConstantError, ImageSize, Name, PositiveInt, UserError, run
from common.progress import Progress
from models import VARIANTS, depthwise, depthwise_choice
from models.depthwise import NAMES, DepthwiseConv2d
from models.depthwise_choice import Use
from models.depthwise_methods import Plan

MODEL: Name = "unireplknet_t"  # network to examine: unireplknet_a f p n t s b l xl
IMG_SIZE: ImageSize = 224  # image size in pixels
BATCH_SIZE: PositiveInt | None = None  # batch size of the timings; None: 128 on a GPU, 4 elsewhere
DEVICE: Name = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
AMP: Literal["auto", "bf16", "fp16", "off"] = "auto"  # dtype; "off": float32; "auto": bf16 on cuda, off elsewhere
MEASURE: bool = True  # also time every method; False: the first table only

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def main():
    if MODEL not in VARIANTS:
        raise ConstantError(f"MODEL must be one of {', '.join(VARIANTS)}, got {MODEL!r}")
    try:
        depthwise.environment_choice()
    except ValueError as error:
        raise UserError(str(error)) from None
    device = choose_device(DEVICE)
    cuda = device.type == "cuda"
    dtype = DTYPES[("bf16" if cuda else "off") if AMP == "auto" else AMP]
    batch_size = BATCH_SIZE or (128 if cuda else 4)
    with torch.device("meta"):
        shapes = find_shapes(timm.create_model(MODEL), IMG_SIZE)
    hardware = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
    print(f"{MODEL}, {IMG_SIZE} pixels, batch {batch_size}, {str(dtype).removeprefix('torch.')}")
    print(f"{device}, {hardware}, torch {torch.__version__}\n")
    print(f"| channels, map, kernel, dilation | runs | error | {', ms | '.join(NAMES)}, ms |")
    print("|---|---|---|---|---|---|")
    counts = {}  # {"not triton: ...": number of shapes}
    for shape in Progress(shapes, unit="shape", leave=False):
        cells, reasons = examine(shape, batch_size, device, dtype)
        Progress.write(f"| {' | '.join(cells)} |")
        for name, reason in reasons.items():
            line = f"not {name}: {reason}"
            counts[line] = counts.get(line, 0) + 1
    print()
    for line, count in counts.items():
        remedy = find_triton_remedy(line) if cuda else ""
        print(f"{count} of {len(shapes)} shapes {line}{f'; {remedy}' if remedy else ''}")
    if MEASURE and device.type in ("cuda", "cpu"):
        prepare_device(device)
        model = timm.create_model(MODEL).to(device, memory_format=choose_layout(device)).train()
        report_choice(model, IMG_SIZE, batch_size, device, dtype)


def find_shapes(model, img_size):
    """The depthwise convolutions of `model`, each once: [(channels, height, width, kernel size, dilation)].

    Args:
        model: on any device, "meta" included.
        img_size: image size in pixels.
    """
    shapes = {}  # keys only, in order

    def record(conv, inputs, _):
        shapes[(*inputs[0].shape[1:], conv.kernel_size[0], conv.dilation[0])] = None

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, DepthwiseConv2d)]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, img_size, img_size, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return list(shapes)


def examine(shape, batch_size, device, dtype, repeats=21):
    """One row of the table, and why the other implementations do not run: ([cells], {name: reason})."""
    channels, height, width, kernel_size, dilation = shape
    chosen, reasons = depthwise.explain(kernel_size, dilation, device, dtype)
    cells = [f"{channels}, {height} x {width}, {kernel_size}, {dilation}", chosen]
    cells.append(f"{largest_error(shape, device, dtype):.0e}")
    conv, x = make_inputs(batch_size, *shape, device, dtype)
    grad = torch.ones_like(x)
    for name in NAMES:
        with forced(name):
            if depthwise.choose(kernel_size, dilation, device, dtype) == name:
                [duration] = milliseconds([lambda: forward_and_backward(conv, x, grad)], device, repeats)
                cells.append(f"{duration:.3f}")
            else:
                cells.append("-")
    return cells, reasons


def largest_error(shape, device, dtype):
    """Largest error of output, input and weight gradient against float64, each relative to the largest value there."""
    conv, x = make_inputs(2, *shape, device, dtype)
    grad = torch.randn_like(x)
    actual = forward_and_backward(conv, x, grad)
    # float64 on the CPU, since not every device has it; the factors of the products are those of `dtype`.
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in (x, conv.weight.to(dtype))]
    out = F.conv2d(*exact, None, 1, conv.padding, conv.dilation, conv.groups)
    expected = out, *torch.autograd.grad(out, exact, grad.cpu().double())
    return max(((a.detach().cpu().double() - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected))


def report_choice(model, img_size, batch_size, device, dtype):
    """Print every method of every convolution of `model`, groups by default and as planned, and what is chosen."""
    uses = [Use((img_size, img_size), batch_size)]
    print("\n| channels, map, kernel, dilation | pass | plan | every method, ms |\n|---|---|---|---|")
    totals, results = [], {}
    for group in Progress(depthwise_choice.find_groups(model, uses), unit="group", leave=False):
        rankings, result = depthwise_choice.measure_group(group, device, dtype)
        results[depthwise_choice.to_name(group, dtype)] = result
        for key, ranking, plan in zip(group.keys(device, dtype), rankings, result.plans):
            shape = f"{key.channels}, {key.height} x {key.width}, {key.kernel_size}, {key.dilation}"
            chosen = plan.split()[1:] or [plan or "default"] * 3
            for which, title in enumerate(("output", "input gradient", "weight gradient")):
                methods = describe_methods(key, ranking, which, device, dtype)
                Progress.write(f"| {shape} | {title} | {chosen[which]} | {methods} |")
        planned = result.milliseconds / result.ratio
        totals.append(f"{group}: default {result.milliseconds:.1f} ms, chosen {planned:.1f} ms, {result.ratio:.2f} x")
    print("\n" + "\n".join(totals))
    machine = depthwise_choice.describe_machine(device)
    depthwise_choice.save_results(depthwise_choice.results_file(), machine, results)  # for the runs that follow
    print(f"\nkernels     {depthwise_choice.choose_convolutions(model, uses, dtype=dtype).line}")


def describe_methods(key, ranking, which, device, dtype):
    """The methods of a pass with their milliseconds, the fastest first, and why some are refused."""
    cells = []
    for method, seconds in sorted(ranking.times[which].items(), key=lambda item: item[1]):
        names = [next(iter(times)) for times in ranking.times]
        names[which] = method
        refused = dict(depthwise_choice.verify(key, str(Plan("nchw", *names)), device, dtype)).get(which)
        cells.append(f"{method} {1e3 * seconds:.1f}" if refused is None else f"{method} refused: {refused}")
    return ", ".join(cells)


def make_inputs(batch_size, channels, height, width, kernel_size, dilation, device, dtype):
    """A layer and its input: (DepthwiseConv2d in training mode, x (batch_size, channels, height, width) of `dtype`)."""
    torch.manual_seed(0)
    conv = DepthwiseConv2d(channels, kernel_size, dilation).to(device)
    return conv, torch.randn(batch_size, channels, height, width, device=device, dtype=dtype, requires_grad=True)


def forward_and_backward(conv, x, grad):
    """Output, and for its gradient `grad` the gradients of input and weight; computed in the dtype of x by autocast."""
    low = x.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(x.device.type, x.dtype if low else None, enabled=low):
        out = conv(x)
    return out, *torch.autograd.grad(out, (x, conv.weight), grad)


@contextlib.contextmanager
def forced(name):
    """Within this context the implementation `name` runs wherever it can compute the convolution."""
    with mock.patch.dict(os.environ, {depthwise.VARIABLE: name}):
        yield


def milliseconds(functions, device, repeats=21):
    """Median milliseconds of each function, timed in turns so that a busy moment affects all of them.

    On a GPU its cache is emptied before each call, since a network does not find its data there either.
    """
    cuda = device.type == "cuda"
    cache = torch.empty(256 * 2**20 if cuda else 0, dtype=torch.int8, device=device)
    times = [[] for _ in functions]
    for repeat in range(-2, repeats):  # the first calls are a warm-up
        for function, results in zip(functions, times):
            cache.zero_()
            if cuda:
                started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                started.record()
                function()
                ended.record()
                ended.synchronize()
                duration = started.elapsed_time(ended)
            else:
                before = time.perf_counter()
                function()
                duration = 1e3 * (time.perf_counter() - before)
            if repeat >= 0:
                results.append(duration)
    return [statistics.median(results) for results in times]


if __name__ == "__main__":
    run(main, closed_output="end")
