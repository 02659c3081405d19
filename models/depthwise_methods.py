"""Exact ways to compute the three passes of a depthwise convolution, from which a plan is put together.

Which of them is fastest depends on the machine, the map and the kernel: PyTorch's own forward routine takes ten times
as long in NCHW as in NHWC on one CPU, and the other way round on the next. All compute the same sums in another order:

- `nchw`, `nhwc`: PyTorch's convolution in that memory format. The input gradient is one as well, with the kernel
  turned by 180 degrees, and so is the weight gradient, with the gradient of the output as its kernel (`kernel-nchw`,
  `kernel-nhwc`): each channel of each image becomes a channel of one large convolution;
- `native-nchw`, `native-nhwc`: PyTorch's own gradients;
- `rows`, `dense`: matrix products with a Toeplitz matrix, whose rows hold the kernel's taps at one place after another;
- `fft`: products of Fourier transforms;
- `phases-...`: a dilated kernel sees every d-th pixel only, so each of the d x d grids of such pixels is an image of
  its own under an undilated kernel;
- `filled-...`: a dilated kernel as an undilated one with zeros between its taps.

A plan names a memory format and a method for each pass: "nhwc phases-nhwc phases-nhwc phases-kernel-nhwc". Or it is
`STACKED`: on small maps all convolutions of a block are one batched matrix product, and its batch norms one batch norm.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from models import depthwise_cpu
from models.depthwise_cpu import same_padding

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
MAX_DENSE_MAP = 64  # pixels of a map whose Toeplitz matrix, with the square of that many elements, is small
MAX_WINDOWS = 2**26  # elements of what `rows` and `dense` copy
STACKED = "stacked"  # a plan of its own


class Plan(NamedTuple):
    """How a convolution is computed; `str` and `parse_plan` turn it into text and back."""

    layout: str  # of the output and of the input gradient, a key of `LAYOUTS`
    forward: str
    input: str  # gradient
    weight: str  # gradient

    def __str__(self):
        return " ".join(self)


@functools.lru_cache(maxsize=1024)
def parse_plan(text: str) -> Plan:
    """The `Plan` that `str` made `text` from.

    Raises:
        ValueError: if it names a method that does not exist.
    """
    plan = Plan(*text.split()) if len(text.split()) == 4 else None
    if plan is None or plan.layout not in LAYOUTS:
        raise ValueError(f"a plan is a memory format and three methods, got {text!r}")
    for method, base in ((plan.forward, FORWARD), (plan.input, FORWARD | INPUT), (plan.weight, WEIGHT)):
        if method.removeprefix("phases-").removeprefix("filled-") not in base:
            raise ValueError(f"there is no method {method!r}; there are {', '.join(base)}")
    return plan


def layout_of(method: str) -> str | None:
    """The memory format in which a method reads and writes without a copy, or None where it always copies."""
    return next((name for name in LAYOUTS if method.endswith(name)), None)


def to_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x (N, C, H, W) in a memory format of `LAYOUTS`; itself if it has it already."""
    return x.contiguous(memory_format=LAYOUTS[layout])


# --- forward pass: (x (N, C, H, W), weight (C, 1, kh, kw), bias (C,) or None, dilation) -> (N, C, H, W)


def convolve_nchw(x, weight, bias, dilation):
    padding = same_padding(weight.shape[-2:], dilation)
    return depthwise_cpu.conv2d(x.contiguous(), weight, bias, 1, padding, dilation)


def convolve_nhwc(x, weight, bias, dilation):
    padding = same_padding(weight.shape[-2:], dilation)
    return depthwise_cpu.conv2d(to_layout(x, "nhwc"), weight, bias, 1, padding, dilation)


def convolve_fft(x, weight, bias, dilation):
    size = transform_size(x.shape[-2:], weight.shape[-2:])
    spectrum = torch.fft.rfft2(x, s=size) * torch.fft.rfft2(weight[:, 0], s=size).conj()
    out = torch.fft.irfft2(spectrum, s=size)
    out = out.roll([length // 2 for length in weight.shape[-2:]], (2, 3))[..., : x.shape[2], : x.shape[3]]
    return out if bias is None else out + bias[:, None, None]


def convolve_rows(x, weight, bias, dilation, rows=1):
    """Blocks of `rows` rows of the output, each a product of the rows that it depends on with a Toeplitz matrix."""
    n, channels, height, width = x.shape
    matrix = toeplitz(weight, rows, width)  # (C, rows * W, (rows + kh - 1) * W)
    out = torch.bmm(windows(x, weight.shape[2], rows), matrix.transpose(1, 2))  # (C, N * blocks, rows * W)
    out = out.view(channels, n, -1, width)[:, :, :height].transpose(0, 1)
    return out if bias is None else out + bias[:, None, None]


def convolve_dense(x, weight, bias, dilation):
    return convolve_rows(x, weight, bias, dilation, x.shape[2])


FORWARD = dict(
    nchw=convolve_nchw, nhwc=convolve_nhwc, rows=convolve_rows, dense=convolve_dense, fft=convolve_fft
)  # fmt: skip


# --- input gradient: (grad (N, C, H, W), weight (C, 1, kh, kw), dilation) -> (N, C, H, W)


def native_input(grad, weight, dilation):
    padding = same_padding(weight.shape[-2:], dilation)
    return conv2d_input(grad.shape, weight, grad, 1, padding, dilation, grad.shape[1])


INPUT = {
    "native-nchw": lambda grad, weight, dilation: native_input(grad.contiguous(), weight, dilation),
    "native-nhwc": lambda grad, weight, dilation: native_input(to_layout(grad, "nhwc"), weight, dilation),
}


# --- weight gradient: (x (N, C, H, W), grad (N, C, H, W), shape (C, 1, kh, kw), dilation) -> (C, 1, kh, kw)


def native_weight(x, grad, shape, dilation):
    return conv2d_weight(x, shape, grad, 1, same_padding(shape[-2:], dilation), dilation, shape[0])


def weight_by_kernel_nhwc(x, grad, shape, dilation):
    n, channels, height, width = x.shape
    # (N, C, H, W) -> (1, N * C, H, W), whose channels are last in memory
    x = x.permute(2, 3, 0, 1).reshape(1, height, width, n * channels).permute(0, 3, 1, 2)
    kernels = grad.reshape(n * channels, 1, height, width)
    padding = same_padding(shape[-2:], dilation)
    taps = depthwise_cpu.conv2d(x, kernels, None, dilation, padding)  # (1, N * C, kh, kw)
    taps = taps.permute(2, 3, 0, 1).reshape(*shape[-2:], n, channels).sum(2)  # (kh, kw, C)
    return taps.permute(2, 0, 1)[:, None].contiguous()


def weight_by_fft(x, grad, shape, dilation):
    size = transform_size(x.shape[-2:], shape[-2:])
    spectrum = (torch.fft.rfft2(x, s=size) * torch.fft.rfft2(grad, s=size).conj()).sum(0)
    taps = torch.fft.irfft2(spectrum, s=size).roll([length // 2 for length in shape[-2:]], (1, 2))
    return taps[:, None, : shape[2], : shape[3]].contiguous()


def weight_by_rows(x, grad, shape, dilation, rows=1):
    channels, _, kernel_rows, kernel_columns = shape
    height, width = x.shape[-2:]
    grad = F.pad(grad.transpose(0, 1), (0, 0, 0, -height % rows)).reshape(channels, -1, rows * width)
    products = torch.bmm(grad.transpose(1, 2), windows(x, kernel_rows, rows))
    # The gradient of `toeplitz`: what each tap was copied to is added up.
    spare = width - 1 - kernel_columns // 2
    lines = rows + kernel_rows - 1
    products = products.view(channels, rows, width, lines, width).flip(1, 2)
    size = [channels, rows, kernel_columns + 2 * spare, lines]
    taps = torch.ops.aten.unfold_backward(products, size, 2, width, 1)
    size = [channels, kernel_rows + 2 * (rows - 1), size[2]]
    taps = torch.ops.aten.unfold_backward(taps, size, 1, lines, 1)
    taps = taps[:, None, rows - 1 : rows - 1 + kernel_rows, spare : spare + kernel_columns]
    return taps.contiguous()


def weight_by_dense(x, grad, shape, dilation):
    return weight_by_rows(x, grad, shape, dilation, x.shape[2])


WEIGHT = {
    "native-nchw": lambda x, grad, *rest: native_weight(x.contiguous(), grad.contiguous(), *rest),
    "native-nhwc": lambda x, grad, *rest: native_weight(to_layout(x, "nhwc"), to_layout(grad, "nhwc"), *rest),
    "kernel-nchw": lambda x, grad, *rest: depthwise_cpu.weight_by_kernel(x.contiguous(), grad.contiguous(), *rest),
    "kernel-nhwc": weight_by_kernel_nhwc,
    "rows": weight_by_rows,
    "dense": weight_by_dense,
    "fft": weight_by_fft,
}
UNDILATED = ("rows", "dense", "fft")  # methods that know no dilation of their own


# --- what the methods are made of


def transform_size(size, kernel_size):
    """Size of Fourier transforms (rows, columns) that hold a map and its padding on one side, a multiple of 4."""
    return [-(-(length + kernel // 2) // 4) * 4 for length, kernel in zip(size, kernel_size)]


def toeplitz(weight, rows, width):
    """The matrix that turns rows of the input into `rows` rows of the output.

    Args:
        weight: (C, 1, kh, kw).
        width: of the map in pixels.

    Returns:
        (C, rows * width, (rows + kh - 1) * width): the tap between an output and an input pixel, or 0.
    """
    channels, _, kernel_rows, kernel_columns = weight.shape
    spare = width - 1 - kernel_columns // 2  # columns of zeros beside the taps
    taps = F.pad(weight[:, 0], (spare, spare, rows - 1, rows - 1))
    # Sections of the taps, each one place further than the next: (C, rows, width, rows + kh - 1, width)
    sections = taps.unfold(1, rows + kernel_rows - 1, 1).unfold(2, width, 1).flip(1, 2)
    return sections.reshape(channels, rows * width, -1)


def windows(x, kernel_rows, rows):
    """The rows of x (N, C, H, W) that each block of `rows` rows depends on: (C, N * blocks, (rows + kh - 1) * W)."""
    _, channels, height, width = x.shape
    above = kernel_rows // 2
    x = F.pad(x.transpose(0, 1), (0, 0, above, above + -height % rows))
    lines = rows + kernel_rows - 1
    return x.unfold(2, lines, rows).transpose(3, 4).reshape(channels, -1, lines * width)


def split_phases(x, dilation, layout):
    """(N, C, H, W) -> (N * d * d, C, ceil(H / d), ceil(W / d)) in memory format `layout`: every d-th pixel an image."""
    height, width = x.shape[-2:]
    if height % dilation or width % dilation:
        x = F.pad(x, (0, -width % dilation, 0, -height % dilation))
    x = x.unflatten(3, (-1, dilation)).unflatten(2, (-1, dilation))  # (N, C, h, d, w, d)
    if layout == "nhwc":
        return x.permute(0, 3, 5, 2, 4, 1).flatten(0, 2).permute(0, 3, 1, 2)
    return x.permute(0, 3, 5, 1, 2, 4).flatten(0, 2)


def join_phases(x, dilation, shape):
    """The opposite of `split_phases`: -> `shape` (N, C, H, W)."""
    n, _, height, width = shape
    x = x.unflatten(0, (n, dilation, dilation))  # (N, d, d, C, h, w)
    if x.stride(3) == 1:  # channels are last in memory
        x = x.permute(0, 4, 1, 5, 2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    else:
        x = x.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
    return x[..., :height, :width]


def fill(weight, dilation):
    """A dilated kernel as an undilated one: (C, 1, kh, kw) -> (C, 1, (kh - 1) d + 1, (kw - 1) d + 1)."""
    rows, columns = ((length - 1) * dilation + 1 for length in weight.shape[-2:])
    filled = F.pad(weight[..., None, :, None], (0, dilation - 1, 0, 0, 0, dilation - 1))  # (C, 1, kh, d, kw, d)
    return filled.flatten(4, 5).flatten(2, 3)[..., :rows, :columns]


# --- the three passes by name


def forward(method, x, weight, bias, dilation):
    """The convolution by `method`, in any memory format."""
    if method.startswith("phases-"):
        method = method.removeprefix("phases-")
        phases = split_phases(x, dilation, layout_of(method))
        return join_phases(FORWARD[method](phases, weight, bias, 1), dilation, x.shape)
    if method.startswith("filled-"):
        return FORWARD[method.removeprefix("filled-")](x, fill(weight, dilation), bias, 1)
    return FORWARD[method](x, weight, bias, dilation)


def input_gradient(method, grad, weight, dilation):
    """The gradient of x for that of the output, `grad` (N, C, H, W)."""
    if method in INPUT:
        return INPUT[method](grad, weight, dilation)
    return forward(method, grad, weight.flip(2, 3), None, dilation)


def weight_gradient(method, x, grad, shape, dilation):
    """The gradient (C, 1, kh, kw) of a weight of that shape."""
    if method.startswith("phases-"):
        method = method.removeprefix("phases-")
        layout = layout_of(method)
        return WEIGHT[method](split_phases(x, dilation, layout), split_phases(grad, dilation, layout), shape, 1)
    return WEIGHT[method](x, grad, shape, dilation)


def methods(shape, kernel_size, dilation, dtype):
    """The methods that can compute a convolution: (for the forward pass, input gradient, weight gradient).

    Args:
        shape: (N, C, H, W) of the input.
        kernel_size: (kh, kw) of the taps that can touch the map.
        dilation: distance between neighbouring taps in pixels.
        dtype: in which it computes.
    """
    n, channels, height, width = shape
    height, width = -(-height // dilation), -(-width // dilation)
    undilated = ["nchw", "nhwc"]
    products = []
    images = n * dilation**2
    if images * channels * height * width * kernel_size[0] <= MAX_WINDOWS:
        products.append("rows")
    if height * width <= MAX_DENSE_MAP:
        products.append("dense")
    if dtype in (torch.float32, torch.float64):  # in which PyTorch has Fourier transforms everywhere
        products.append("fft")
    weight = [f"{kind}-{layout}" for kind in ("kernel", "native") for layout in LAYOUTS]
    if dilation == 1:
        return [*undilated, *products], [*undilated, *products, *INPUT], [*weight, *products]
    phases, filled = ([f"{kind}-{name}" for name in undilated] for kind in ("phases", "filled"))
    phases += [f"phases-{name}" for name in products if name != "fft"]
    forward = [*undilated, *phases, *filled]
    weight += [f"phases-{name}" for name in (*weight, *products) if name != "fft"]
    return forward, [*forward, *INPUT], weight


# --- the plan `STACKED`


def convolve_stacked(x: torch.Tensor, weights: Sequence[torch.Tensor], dilations: Sequence[int]) -> torch.Tensor:
    """Convolutions of one input, each channel of which meets the matrix of all its kernels.

    Args:
        x: (N, C, H, W).
        weights: (C, 1, kh, kw) each, kh and kw odd, so small that every tap can touch the map.
        dilations: of each.

    Returns:
        (C, number of weights, H * W * N), the image being the last index in memory.
    """
    n, channels, height, width = x.shape
    kernels = [
        weight.flatten(1).to(x.dtype) @ place_taps(weight.shape[-2:], dilation, (height, width)).to(x)
        for weight, dilation in zip(weights, dilations)
    ]  # (C, output pixels * input pixels)
    matrix = torch.cat(kernels, 1).view(channels, -1, height * width)
    pixels = x.permute(1, 2, 3, 0).reshape(channels, height * width, n).contiguous()
    return torch.bmm(matrix, pixels).view(channels, len(weights), -1)


def unstack(out: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """One convolution (C, H * W * N) of what `convolve_stacked` returns -> `shape` (N, C, H, W) in NHWC."""
    n, channels, height, width = shape
    out = out.view(channels, -1, n).permute(2, 1, 0).contiguous()  # (N, H * W, C)
    return out.view(n, height, width, channels).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def place_taps(kernel_size: tuple[int, int], dilation: int, size: tuple[int, int]) -> torch.Tensor:
    """(kh * kw, output pixels * input pixels): 1 where a tap lies between two pixels of a map of `size`, else 0."""
    sides = []
    for taps, length in zip(kernel_size, size):
        places = torch.arange(length)
        apart = (torch.arange(taps) - taps // 2)[:, None, None] * dilation
        sides.append((places[None, None, :] - places[None, :, None] == apart).float())  # (taps, output, input)
    rows, columns = sides
    return torch.einsum("iyp,jxq->ijyxpq", rows, columns).reshape(len(rows) * len(columns), -1)


# --- the three passes of a plan


def compute(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, plan: str):
    """The convolution as `plan` has it, for inference; arguments as in `depthwise_planned`, bias (C,) or None."""
    layout, method, *_ = plan.split()
    return to_layout(forward(method, x, weight, bias, dilation), layout)


def depthwise_planned(x: torch.Tensor, weight: torch.Tensor, dilation: int, plan: str) -> torch.Tensor:
    """Depthwise convolution with "same" zero padding whose three passes are computed as `plan` has it.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, kh, kw), kh and kw odd, and small enough that every tap can touch the map:
            (kh // 2) * dilation < H, and likewise for the width.
        dilation: distance between neighbouring taps in pixels.
        plan: a `Plan` as text.

    Returns:
        (N, C, H, W) in the plan's memory format.
    """
    if torch.compiler.is_compiling():
        return planned_operator(x, weight, dilation, plan)
    return DepthwisePlanned.apply(x, weight, dilation, plan)


@torch.library.custom_op("unireplknet::depthwise_planned", mutates_args=())
def planned_operator(x: torch.Tensor, weight: torch.Tensor, dilation: int, plan: str) -> torch.Tensor:
    """`depthwise_planned` for torch.compile, which does not look into it; each call takes longer than without."""
    return restride(compute(x, weight, None, dilation, plan), parse_plan(plan).layout)


def restride(x, layout):
    """x with the strides that `torch.empty_like` gives that memory format, also where a size of 1 allows others."""
    expected = torch.empty_like(x, device="meta", memory_format=LAYOUTS[layout]).stride()
    return x if x.stride() == expected else x.as_strided(x.shape, expected)


@planned_operator.register_fake
def _(x, weight, dilation, plan):
    return torch.empty_like(x, memory_format=LAYOUTS[parse_plan(plan).layout])


def save_for_gradients(ctx, inputs, output):
    x, weight, ctx.dilation, ctx.plan = inputs
    ctx.save_for_backward(x, weight)


def gradients(ctx, grad):
    """Gradients of `depthwise_planned` for x and weight."""
    x, weight = ctx.saved_tensors
    layout, _, for_input, for_weight = parse_plan(ctx.plan)
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = to_layout(input_gradient(for_input, grad, weight, ctx.dilation), layout)
    if ctx.needs_input_grad[1]:
        grad_weight = weight_gradient(for_weight, x, grad, weight.shape, ctx.dilation)
    return grad_x, grad_weight, None, None


planned_operator.register_autograd(gradients, setup_context=save_for_gradients)


class DepthwisePlanned(torch.autograd.Function):
    """`depthwise_planned` where nothing is compiled."""

    @staticmethod
    def forward(x, weight, dilation, plan):
        return compute(x, weight, None, dilation, plan)

    setup_context = staticmethod(save_for_gradients)
    backward = staticmethod(gradients)
