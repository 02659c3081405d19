"""The depthwise convolution on a CPU: kept on the fast routine, and with gradients that run on it, too.

oneDNN, which computes PyTorch's convolutions on a CPU, has a depthwise forward routine near the peak of the machine.
Its gradients have none for large or dilated kernels, and take many times as long as the forward pass. But both
gradients are depthwise convolutions themselves, so here they are computed as forward passes: the same sums in another
order (figures: benchmarks/README.md).
"""

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

# Beyond these, oneDNN leaves its fast routine (found by trial with PyTorch 2.14 on a CPU with AVX-512).
MAX_PADDING = 6  # to the left and to the right, in pixels
MAX_STRIDE = 3  # from left to right
# With kernels up to this edge the routine is faster on NHWC, above it on NCHW, the conversion included.
MAX_CHANNELS_LAST_KERNEL = 7


def conv2d(x, weight, bias=None, stride=1, padding=(0, 0), dilation=1):
    """`F.conv2d` for one group for each channel, with a wide padding written out so that it stays fast.

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


def same_padding(kernel_size, dilation):
    """Padding (rows, columns) that keeps the size of the map under a kernel (kh, kw)."""
    return tuple(edge // 2 * dilation for edge in kernel_size)


@torch.library.custom_op("unireplknet::depthwise_conv2d", mutates_args=(), device_types="cpu")
def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor, dilation: int) -> torch.Tensor:
    """Depthwise convolution with "same" zero padding whose gradients are fast on a CPU.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, kh, kw), kh and kw odd, and small enough that every tap meets the map somewhere:
            (kh // 2) * dilation < H, and likewise for the width.
        dilation: distance between neighbouring taps in pixels.

    Returns:
        (N, C, H, W).
    """
    out = conv2d(x, weight, padding=same_padding(weight.shape[-2:], dilation), dilation=dilation)
    return out.contiguous(memory_format=output_layout(x, weight))


@depthwise_conv2d.register_fake
def _(x, weight, dilation):
    return torch.empty_like(x, memory_format=output_layout(x, weight))


def output_layout(x, weight):
    """The memory format that oneDNN gives the output: NHWC where the input or the weight has it."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    # Of a weight (C, 1, kh, kw) both formats hold the same memory; only this stride tells them apart.
    last = last or (weight.stride(1) == 1 and weight.shape[-2:].numel() > 1)
    return torch.channels_last if last else torch.contiguous_format


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
        # A forward pass with the kernel turned by 180 degrees.
        grad_x = depthwise_conv2d(grad, weight.flip(2, 3), ctx.dilation)
    if ctx.needs_input_grad[1]:
        grad_weight = weight_gradient(x, grad, weight.shape, ctx.dilation)
    return grad_x, grad_weight, None


def weight_gradient(x, grad, shape, dilation):
    """Weight gradient of a depthwise convolution with "same" padding, as a depthwise convolution.

    The tap (i, j) of one channel's gradient is the sum over all pixels of `grad` times x shifted to that tap: x
    convolved with `grad` as its kernel. So each channel of each picture becomes a channel of one large convolution,
    whose stride is the dilation, since neighbouring taps lie that far apart.

    Args:
        x: (N, C, H, W) input.
        grad: (N, C, H, W) gradient of the output.
        shape: (C, 1, kh, kw) of the weight.
        dilation: distance between neighbouring taps in pixels.

    Returns:
        (C, 1, kh, kw).
    """
    padding = same_padding(shape[-2:], dilation)
    if max(shape[-2:]) <= 3 and dilation == 1:  # PyTorch has a fast routine for this one
        return conv2d_weight(x, shape, grad, padding=padding, groups=shape[0])
    n, channels, height, width = x.shape
    x, kernels = x.reshape(1, n * channels, height, width), grad.reshape(n * channels, 1, height, width)
    # Where the stride would be too large, more columns of taps are computed than there are.
    step = max(step for step in range(1, MAX_STRIDE + 1) if dilation % step == 0)
    taps = conv2d(x, kernels, stride=(dilation, step), padding=padding)[..., :: dilation // step]
    return taps.reshape(n, *shape).sum(0)


depthwise_conv2d.register_autograd(gradients, setup_context=save_for_gradients)


def fast_gradients(device, dtype):
    """Whether training computes the gradients by `depthwise_conv2d`: on a CPU, but in float16, which it has not."""
    return torch.device(device).type == "cpu" and dtype in (torch.float32, torch.float64, torch.bfloat16)
