"""Gradients of the depthwise convolution that are fast on a CPU.

PyTorch's forward pass runs near the peak of a CPU there, but its gradients have no fast routines for large or dilated
kernels and take 20 to 35 times as long. `depthwise_conv2d` is the same forward pass as an operator of its own whose
gradients are the same sums in another order (figures: benchmarks/README.md).
"""

import torch
import torch.nn.functional as F


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
    padding = [edge // 2 * dilation for edge in weight.shape[-2:]]
    return F.conv2d(x, weight, None, 1, padding, dilation, x.shape[1])


@depthwise_conv2d.register_fake
def _(x, weight, dilation):
    return torch.empty_like(x)


def save_for_gradients(ctx, inputs, output):
    x, weight, ctx.dilation = inputs
    ctx.save_for_backward(x, weight)


def gradients(ctx, grad):
    """Gradients of `depthwise_conv2d` for x, weight and dilation (none)."""
    x, weight = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        # PyTorch's input gradient has no fast routine; the same sums are a forward pass with the kernel turned by 180
        # degrees, which has.
        grad_x = depthwise_conv2d(grad, weight.flip(2, 3), ctx.dilation)
    if ctx.needs_input_grad[1]:
        grad_weight = weight_gradient(x, grad, weight.shape[-2:], ctx.dilation)
    return grad_x, grad_weight, None


def weight_gradient(x, grad, kernel_size, dilation):
    """Weight gradient of a depthwise convolution by matrix products.

    For one row of taps i, the products of all columns of `grad` with all columns of the rows of `x` that it meets are
    one matrix product over pictures and rows. The taps of the row are sums along that (W, W) matrix's diagonals. This
    does W / kw times the necessary multiplications, at many times the speed.

    Args:
        x: (N, C, H, W) input.
        grad: (N, C, H, W) gradient of the output.
        kernel_size: (kh, kw).
        dilation: distance between neighbouring taps in pixels.

    Returns:
        (C, 1, kh, kw).
    """
    n, channels, height, width = x.shape
    # Picture by picture within each row, so that any range of rows is one block: (C, H * N, W).
    x, grad = (tensor.permute(1, 2, 0, 3).reshape(channels, height * n, width) for tensor in (x, grad))
    products = []
    for i in range(kernel_size[0]):
        shift = (i - kernel_size[0] // 2) * dilation
        first, last = max(0, -shift), min(height, height - shift)  # rows of `grad` whose tap lies on the map
        rows = grad[:, first * n : last * n].transpose(1, 2)
        products.append(torch.bmm(rows, x[:, (first + shift) * n : (last + shift) * n]))
    products = torch.stack(products)  # (kh, C, W, W)
    offsets = [(j - kernel_size[1] // 2) * dilation for j in range(kernel_size[1])]
    taps = [products.diagonal(offset, 2, 3).sum(2) for offset in offsets]  # kw of (kh, C)
    return torch.stack(taps, 2).transpose(0, 1).unsqueeze(1)


depthwise_conv2d.register_autograd(gradients, setup_context=save_for_gradients)


def fast_gradients(device, dtype, kernel_size, dilation):
    """Whether training computes gradients by `depthwise_conv2d`: on a CPU, but for the undilated 3 x 3 kernel."""
    full_precision = dtype in (torch.float32, torch.float64)
    return torch.device(device).type == "cpu" and full_precision and (kernel_size > 3 or dilation > 1)
