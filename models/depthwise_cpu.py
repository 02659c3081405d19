"""The depthwise convolution on a CPU, with both gradients computed by the fast forward routine.

oneDNN, which computes PyTorch's convolutions on a CPU, has a depthwise forward routine near the peak of the machine,
but no such routine for the gradients of large or dilated kernels, which take many times as long as the forward pass.
Both gradients are depthwise convolutions themselves, so here they are computed as forward passes: the same sums in
another order (timings: benchmarks/README.md).
"""

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

# Beyond these, oneDNN does not use its fast routine (found by trial with PyTorch 2.14 on a CPU with AVX-512).
MAX_PADDING = 6  # horizontal, in pixels on each side
MAX_STRIDE = 3  # horizontal
# With kernels up to this size the routine is faster on NHWC, above it on NCHW, the conversion included.
MAX_CHANNELS_LAST_KERNEL = 7
# Without AVX-512 the forward pass is many times faster in NHWC, as which a network hands over its maps.
FAST_IN_NHWC = torch.backends.cpu.get_cpu_capability() == "AVX2"


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: tuple[int, int] = (0, 0),
    dilation: int = 1,
) -> torch.Tensor:
    """Depthwise `F.conv2d` that pads x beforehand where the padding is too wide for the fast routine.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, kh, kw).
        bias: (C,) or None.
        stride, padding: (rows, columns).
        dilation: one number.
    """
    rows, columns = padding
    if columns > MAX_PADDING:
        x, columns = F.pad(x, (columns, columns)), 0
    return F.conv2d(x, weight, bias, stride, (rows, columns), dilation, x.shape[1])


def same_padding(kernel_size: tuple[int, int], dilation: int) -> tuple[int, int]:
    """Padding (rows, columns) that keeps the size of the map under a kernel (kh, kw)."""
    return tuple(size // 2 * dilation for size in kernel_size)


def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor, dilation: int) -> torch.Tensor:
    """Depthwise convolution with "same" zero padding whose gradients are fast on a CPU.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, kh, kw), kh and kw odd, and small enough that every tap can touch the map:
            (kh // 2) * dilation < H, and likewise for the width.
        dilation: distance between neighbouring taps in pixels.

    Returns:
        (N, C, H, W).
    """
    if torch.compiler.is_compiling():
        return operator(x, weight, dilation)
    return DepthwiseFunction.apply(x, weight, dilation)


def compute(x, weight, dilation):
    """The output of `depthwise_conv2d`."""
    return conv2d(x, weight, padding=same_padding(weight.shape[-2:], dilation), dilation=dilation)


@torch.library.custom_op("unireplknet::depthwise_conv2d", mutates_args=(), device_types="cpu")
def operator(x: torch.Tensor, weight: torch.Tensor, dilation: int) -> torch.Tensor:
    """`depthwise_conv2d` for torch.compile, which does not look into it; each call takes longer than without."""
    return compute(x, weight, dilation).contiguous(memory_format=output_layout(x, weight))


@operator.register_fake
def _(x, weight, dilation):
    return torch.empty_like(x, memory_format=output_layout(x, weight))


def output_layout(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """The memory format that oneDNN gives the output: NHWC where the input or the weight has it."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last or is_nhwc(weight) else torch.contiguous_format


def is_nhwc(weight: torch.Tensor) -> bool:
    """Whether oneDNN computes in NHWC for the sake of a weight (C, 1, kh, kw).

    It has the same memory in both formats; only this stride distinguishes them.
    """
    return weight.stride(1) == 1 and weight.shape[-2:].numel() > 1


def save_for_gradients(ctx, inputs, output):
    x, weight, ctx.dilation = inputs
    ctx.save_for_backward(x, weight)


def gradients(ctx, grad):
    """Gradients of `depthwise_conv2d` for x, weight and dilation (none)."""
    x, weight = ctx.saved_tensors
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    grad = grad.contiguous(memory_format=layout)
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        # A forward pass with the kernel rotated by 180 degrees.
        grad_x = depthwise_conv2d(grad, weight.flip(2, 3), ctx.dilation)
    if ctx.needs_input_grad[1]:
        grad_weight = weight_gradient(x, grad, weight.shape, ctx.dilation)
    return grad_x, grad_weight, None


def weight_gradient(x: torch.Tensor, grad: torch.Tensor, shape: torch.Size, dilation: int) -> torch.Tensor:
    """Weight gradient of a depthwise convolution with "same" padding, as a depthwise convolution.

    The tap (i, j) of one channel's gradient is the sum over all pixels of `grad` times x shifted to that tap: x
    convolved with `grad` as its kernel. So each channel of each image becomes a channel of one large convolution,
    whose stride is the dilation, since neighbouring taps are that far apart.

    Args:
        x: (N, C, H, W) input.
        grad: (N, C, H, W) gradient of the output.
        shape: (C, 1, kh, kw) of the weight.
        dilation: distance between neighbouring taps in pixels.

    Returns:
        (C, 1, kh, kw).
    """
    if max(shape[-2:]) <= 3 and dilation == 1:  # PyTorch has a fast routine for this one
        return conv2d_weight(x, shape, grad, padding=same_padding(shape[-2:], dilation), groups=shape[0])
    return weight_by_kernel(x, grad, shape, dilation)


def weight_by_kernel(x: torch.Tensor, grad: torch.Tensor, shape: torch.Size, dilation: int) -> torch.Tensor:
    """`weight_gradient` by one convolution for all shapes."""
    padding = same_padding(shape[-2:], dilation)
    n, channels, height, width = x.shape
    x = x.reshape(1, n * channels, height, width)  # (N, C, H, W) -> (1, N * C, H, W)
    kernels = grad.reshape(n * channels, 1, height, width)  # (N, C, H, W) -> (N * C, 1, H, W)
    # Where that stride would be too large for the fast routine, more columns are computed than needed.
    step = max(step for step in range(1, MAX_STRIDE + 1) if dilation % step == 0)
    taps = conv2d(x, kernels, stride=(dilation, step), padding=padding)[..., :: dilation // step]
    return taps.reshape(n, *shape).sum(0)  # (1, N * C, kh, kw) -> (N, C, 1, kh, kw) -> (C, 1, kh, kw)


operator.register_autograd(gradients, setup_context=save_for_gradients)


class DepthwiseFunction(torch.autograd.Function):
    """`depthwise_conv2d` where nothing is compiled."""

    forward = staticmethod(compute)
    setup_context = staticmethod(save_for_gradients)
    backward = staticmethod(gradients)


def fast_gradients(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether training computes the gradients with `depthwise_conv2d`: on a CPU, except in float16."""
    return torch.device(device).type == "cpu" and dtype in (torch.float32, torch.float64, torch.bfloat16)
