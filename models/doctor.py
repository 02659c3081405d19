"""Examine the depthwise convolutions of a network on this machine: which implementation runs each of them, and why.

    python -m models.doctor
    python -m models.doctor --model unireplknet_s --img-size 384 --batch-size 64 --amp fp16

Prints a Markdown table with one row for each shape: the implementation that runs; its largest error against float64 in
output, input gradient and weight gradient, each relative to the largest value there; and the milliseconds that all
three take together, for every implementation that can compute the shape (median). Below it stands why the others do
not run.
"""

import contextlib
import statistics
import time

import timm
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.device import choose_device
from common.options import UserError, run
from models import VARIANTS, depthwise
from models.depthwise import NAMES, DepthwiseConv2d

MODEL: str = "unireplknet_t"  # whose shapes to examine: unireplknet_a f p n t s b l xl
IMG_SIZE: int = 224  # edge of the pictures in pixels
BATCH_SIZE: int = 0  # pictures at once when time is taken; 0: 128 on a GPU, 4 elsewhere
DEVICE: str = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
AMP: str = "auto"  # dtype of the convolutions: "bf16", "fp16", "off" (float32); "auto": bf16 on cuda, off elsewhere

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def find_shapes(model, img_size):
    """The depthwise convolutions of `model`, each once: [(channels, height, width, kernel size, dilation)].

    Args:
        model: on whatever device, "meta" included.
        img_size: edge of the pictures in pixels.
    """
    shapes = {}  # keys only, in order

    def note(conv, inputs, _):
        shapes[(*inputs[0].shape[1:], conv.kernel_size[0], conv.dilation[0])] = None

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, DepthwiseConv2d)]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, img_size, img_size, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return list(shapes)


@contextlib.contextmanager
def forced(name):
    """Within this context the implementation `name` runs wherever it can compute."""
    before = depthwise.FORCED
    depthwise.FORCED = name
    try:
        yield
    finally:
        depthwise.FORCED = before


def make_inputs(pictures, channels, height, width, kernel_size, dilation, device, dtype):
    """A layer and its input: (DepthwiseConv2d in training mode, x (pictures, channels, height, width) of `dtype`)."""
    torch.manual_seed(0)
    conv = DepthwiseConv2d(channels, kernel_size, dilation).to(device)
    return conv, torch.randn(pictures, channels, height, width, device=device, dtype=dtype, requires_grad=True)


def forward_and_backward(conv, x, seed):
    """Output and gradients of input and weight, in the dtype of x by autocast."""
    low = x.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(x.device.type, x.dtype if low else None, enabled=low):
        out = conv(x)
    return out, *torch.autograd.grad(out, (x, conv.weight), seed)


def largest_error(shape, device, dtype):
    """Largest error of output, input and weight gradient against float64, each relative to the largest value there."""
    conv, x = make_inputs(2, *shape, device, dtype)
    seed = torch.randn_like(x)
    actual = forward_and_backward(conv, x, seed)
    # float64 on the CPU, since not every device has it; the products' factors are those of `dtype`.
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in (x, conv.weight.to(dtype))]
    out = F.conv2d(*exact, None, 1, conv.padding, conv.dilation, conv.groups)
    expected = out, *torch.autograd.grad(out, exact, seed.cpu().double())
    return max(((a.detach().cpu().double() - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected))


def milliseconds(functions, device, repeats=21):
    """Median milliseconds of each function, timed in turns so that a busy moment meets all of them.

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


def examine(shape, pictures, device, dtype):
    """One row of the table, and why implementations do not run: ([cells], {name: reason})."""
    channels, height, width, kernel_size, dilation = shape
    chosen, reasons = depthwise.explain(kernel_size, dilation, device, dtype)
    cells = [f"{channels}, {height} x {width}, {kernel_size}, {dilation}", chosen]
    cells.append(f"{largest_error(shape, device, dtype):.0e}")
    conv, x = make_inputs(pictures, *shape, device, dtype)
    seed = torch.ones_like(x)
    for name in NAMES:
        with forced(name):
            if depthwise.choose(kernel_size, dilation, device, dtype) == name:
                [duration] = milliseconds([lambda: forward_and_backward(conv, x, seed)], device)
                cells.append(f"{duration:.3f}")
            else:
                cells.append("-")
    return cells, reasons


def main():
    if MODEL not in VARIANTS:
        raise UserError(f"MODEL must be one of {', '.join(VARIANTS)}, got {MODEL!r}")
    if IMG_SIZE < 32 or BATCH_SIZE < 0:
        raise UserError("IMG_SIZE must be at least 32, BATCH_SIZE at least 0")
    if AMP not in (*DTYPES, "auto"):
        raise UserError(f'AMP must be "auto", "bf16", "fp16" or "off", got {AMP!r}')
    device = choose_device(DEVICE)
    dtype = DTYPES[("bf16" if device.type == "cuda" else "off") if AMP == "auto" else AMP]
    pictures = BATCH_SIZE or (128 if device.type == "cuda" else 4)
    with torch.device("meta"):
        shapes = find_shapes(timm.create_model(MODEL), IMG_SIZE)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{MODEL}, {IMG_SIZE} pixels, batch {pictures}, {str(dtype).removeprefix('torch.')}")
    print(f"{device}, {hardware}, torch {torch.__version__}\n")
    print(f"| channels, map, kernel, dilation | runs | error | {', ms | '.join(NAMES)}, ms |")
    print("|---|---|---|---|---|---|")
    why = {}  # {"not triton: ...": number of shapes}
    for shape in tqdm(shapes, unit="shape", leave=False):
        cells, reasons = examine(shape, pictures, device, dtype)
        tqdm.write(f"| {' | '.join(cells)} |")
        for name, reason in reasons.items():
            why[f"not {name}: {reason}"] = why.get(f"not {name}: {reason}", 0) + 1
    print()
    for reason, number in why.items():
        print(f"{number} of {len(shapes)} shapes {reason}")


if __name__ == "__main__":
    run(main)
