"""Time the large-kernel convolutions with every implementation that can compute them, in one run.

    python benchmarks/depthwise.py                          unireplknet_t and _s at 224 and 384 pixels on a GPU; on a
                                                            CPU the gradients of unireplknet_t at 224
    python benchmarks/depthwise.py --models unireplknet_a --img-sizes 128

On a GPU prints Markdown tables, one row for each shape of the training and merged structure: microseconds of output,
input gradient and weight gradient (median, cache emptied before each call) with the Triton kernels, with nn.Conv2d in
its two layouts, with and without cudnn.benchmark, and with the CUDA extension if it is installed; the speedup of the
Triton kernels over the best of the others; and the percentage of the two bounds that they reach, memory and tensor
cores, which are measured first.

On a CPU prints PyTorch's gradients beside ours, one row for each shape that trains with our gradients: milliseconds
(medians), our speedup, and our maximum error relative to the largest value, against float64; then the images/s of whole
training steps either way.
"""

import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/, tools/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import timm
import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from common.device import choose_device
from common.options import ConstantError, ImageSize, Name, PositiveInt, run
from common.progress import Progress
from models import VARIANTS, DepthwiseConv2d, depthwise, depthwise_cpu
from tools.conv_report import find_shapes, forced, milliseconds

MODELS: list[Name] = []  # whose shapes to time: unireplknet_a f p n t s b l xl; []: t and s on a GPU, t on a CPU
IMG_SIZES: list[ImageSize] = []  # image sizes in pixels; []: 224 and 384 on a GPU, 224 on a CPU
BATCH_SIZE: PositiveInt | None = None  # images per batch; None: 128 on a GPU, 16 on a CPU
REPEATS: PositiveInt | None = None  # timings of which the median is taken; None: 101 on a GPU, 7 on a CPU
DEVICE: Name = "auto"  # "auto": cuda, else cpu; or a device such as "cuda:1"


def main():
    for name in MODELS:
        if name not in VARIANTS:
            raise ConstantError(f"MODELS must hold names out of {', '.join(VARIANTS)}, got {name!r}")
    device = choose_device(DEVICE)
    if device.type not in ("cuda", "cpu"):
        if DEVICE != "auto":
            raise ConstantError(f'DEVICE must be "auto", "cpu" or a CUDA device, got {DEVICE!r}')
        device = torch.device("cpu")
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    repeats = REPEATS or (101 if cuda else 7)
    batch_size = BATCH_SIZE or (128 if cuda else 16)
    bounds = measure_bounds(device) if cuda else None
    if cuda:
        print(
            f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
        )
        print(f"copy {bounds[0] / 1e12:.2f} TB/s, bfloat16 product {bounds[1] / 1e12:.0f} TFLOP/s")
    for name in MODELS or (["unireplknet_t", "unireplknet_s"] if cuda else ["unireplknet_t"]):
        for img_size in IMG_SIZES or ([224, 384] if cuda else [224]):
            if cuda:
                run_on_gpu(name, img_size, batch_size, repeats, device, bounds)
            else:
                run_on_cpu(name, img_size, batch_size, repeats)


def measure_bounds(device):
    """What this GPU reaches: (bytes/s of a copy, bfloat16 operations/s of a matrix product)."""
    source = torch.empty(2**29, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    copy, product = milliseconds([lambda: target.copy_(source), lambda: square @ square], device)
    return 2e3 * source.numel() / copy, 2e3 * 8192**3 / product


def run_on_gpu(name, img_size, batch_size, repeats, device, bounds):
    """Every implementation beside each other, in the training and in the merged structure."""
    for structure in ("training", "merged"):
        with torch.device("meta"):
            shapes = find_shapes(timm.create_model(name, deploy=structure == "merged"), img_size)
        print(f"\n{name}, {img_size} pixels, {structure}, batch {batch_size}, bfloat16, median of {repeats}\n")
        header = None
        for shape in Progress(shapes, unit="shape", leave=False):
            columns, cells = compare_on_gpu(shape, batch_size, repeats, device, bounds, structure)
            if columns != header:
                passes = "us" if structure == "merged" else "us: output / input / weight"
                title = ["channels, map, kernel, dilation", *(f"{column}, {passes}" for column in columns)]
                title += ["speedup", "of memory bound", "of arithmetic bound"]
                Progress.write(f"| {' | '.join(title)} |\n|{'---|' * len(title)}")
                header = columns
            channels, height, width, kernel_size, dilation = shape
            Progress.write(f"| {channels}, {height} x {width}, {kernel_size}, {dilation} | {' | '.join(cells)} |")


def compare_on_gpu(shape, batch_size, repeats, device, bounds, structure):
    """One row of the GPU's table."""
    channels, height, width, kernel_size, dilation = shape
    conv = DepthwiseConv2d(channels, kernel_size, dilation, bias=structure == "merged").to(device)
    x = torch.randn(batch_size, channels, height, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    seed = torch.randn_like(x)
    passes = 1 if structure == "merged" else 3
    times = {}
    for name, tensor, benchmark in (
        ("triton", x, True),
        ("pytorch", x, True),
        ("pytorch", last, True),
        ("pytorch", last, False),
        ("implicit_gemm", x.detach().half().requires_grad_(), True),
    ):
        with forced(name), torch.backends.cudnn.flags(enabled=True, benchmark=benchmark):
            layout = "NCHW" if tensor.is_contiguous() else f"NHWC{'' if benchmark else ', no cudnn.benchmark'}"
            if depthwise.choose(kernel_size, dilation, device, tensor.dtype, tensor.is_contiguous()) == name:
                like = seed.to(tensor.dtype).contiguous(memory_format=torch.channels_last) if tensor is last else seed
                functions = three_passes(conv, tensor, like.to(tensor.dtype))[:passes]
                times[f"{name} {layout}"] = milliseconds(functions, device, repeats)
    ours, theirs = times.get("triton NCHW"), [sum(value) for name, value in times.items() if "triton" not in name]
    memory = 2 * 2 * x.numel() / bounds[0] + (4 * 2 * x.numel() / bounds[0] if passes == 3 else 0)
    arithmetic = passes * 2 * x.numel() * kernel_size**2 / bounds[1]
    cells = [" / ".join(f"{1e3 * value:.0f}" for value in values) for values in times.values()]
    if ours is None:
        return list(times), [*cells, "-", "-", "-"]
    reached = [f"{100 * 1e3 * bound / sum(ours):.0f} %" for bound in (memory, arithmetic)]
    return list(times), [*cells, f"{min(theirs) / sum(ours):.1f}", *reached]


def three_passes(conv, x, seed):
    """Functions of no argument that compute output, input gradient and weight gradient.

    Each gradient is computed alone; autograd's overhead is small compared with the kernels.
    """
    with torch.autocast(x.device.type, x.dtype):
        out = conv(x)

    def forward():
        with torch.no_grad(), torch.autocast(x.device.type, x.dtype):
            conv(x)

    return [
        forward,
        lambda: torch.autograd.grad(out, x, seed, retain_graph=True),
        lambda: torch.autograd.grad(out, conv.weight, seed, retain_graph=True),
    ]


def run_on_cpu(name, img_size, batch_size, repeats):
    """PyTorch's gradients beside ours, and whole training steps either way."""
    model = timm.create_model(name, num_classes=12)
    print(f"{name}, {img_size} pixels, batch {batch_size}, float32, median of {repeats}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| channels, map, kernel, dilation | PyTorch input | PyTorch weight | ours both, ms | ratio | error |")
    print("|---|---|---|---|---|---|")
    for shape in Progress(find_shapes(model, img_size), unit="shape", leave=False):
        channels, height, width, kernel_size, dilation = shape
        cells = compare_on_cpu(batch_size, repeats, *shape)
        Progress.write(f"| {channels}, {height} x {width}, {kernel_size}, {dilation} | {' | '.join(cells)} |")

    model.train()
    images, labels = torch.randn(batch_size, 3, img_size, img_size), torch.randint(12, (batch_size,))

    def step():
        F.cross_entropy(model(images), labels).backward()
        model.zero_grad()

    def step_with_pytorch():
        with mock.patch.object(depthwise_cpu, "fast_gradients", return_value=False):
            step()

    durations = milliseconds([step_with_pytorch, step], images.device, repeats)
    theirs, ours = (1e3 * batch_size / duration for duration in durations)
    print(f"\ntraining steps: PyTorch {theirs:.1f}, ours {ours:.1f} images/s, ratio {ours / theirs:.2f}\n")


def compare_on_cpu(batch_size, repeats, channels, height, width, kernel_size, dilation):
    """One row of the CPU's table, without its first cell."""
    x = torch.randn(batch_size, channels, height, width)
    grad = torch.randn_like(x)
    reach = min(kernel_size // 2, (max(height, width) - 1) // dilation)  # what DepthwiseConv2d keeps of the kernel
    kernel_size = 2 * reach + 1
    weight = torch.randn(channels, 1, kernel_size, kernel_size)
    settings = dict(padding=reach * dilation, dilation=dilation, groups=channels)
    inputs = [tensor.requires_grad_() for tensor in (x, weight)]
    out = depthwise_cpu.depthwise_conv2d(x, weight, dilation)
    theirs_x, theirs_w, ours = milliseconds(
        [
            lambda: conv2d_input(x.shape, weight, grad, **settings),
            lambda: conv2d_weight(x, weight.shape, grad, **settings),
            lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True),
        ],
        x.device,
        repeats,
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
    times = [f"{duration:.1f}" for duration in (theirs_x, theirs_w, ours)]
    return [*times, f"{(theirs_x + theirs_w) / ours:.1f}", f"{max(errors):.0e}"]


if __name__ == "__main__":
    run(main, closed_output="end")
