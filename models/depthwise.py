"""The depthwise convolution of the large-kernel blocks: which implementation runs, and why.

Two implementations compute the same thing from the same parameters:

- `depthwise_conv2d_implicit_gemm`, the CUDA extension that the authors of RepLKNet and UniRepLKNet use, where it
  is installed and fits (float16 or float32, CUDA, NCHW, stride 1, undilated, kernel larger than 5);
- PyTorch's own depthwise convolution everywhere else. When it trains on a CPU, both gradients are computed by
  `models/depthwise_cpu.py`.

    python -m models.depthwise        says which one this machine would run, and why the other does not
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from models import depthwise_cpu

MIN_IMPLICIT_GEMM_KERNEL = 7  # below this the extension has no kernel that is worth it (UniRepLKNet, Section 3.1)


@functools.cache
def import_implicit_gemm():
    """Import the CUDA extension once.

    Returns:
        (class, ""): its convolution class, or (None, error): the import error as Python reported it.
    """
    try:
        from depthwise_conv2d_implicit_gemm import DepthWiseConv2dImplicitGEMM
    except Exception as error:  # a broken build raises OSError or RuntimeError as well as ImportError
        return None, f"{type(error).__name__}: {error}"
    return DepthWiseConv2dImplicitGEMM, ""


def why_not_implicit_gemm(conv, device, dtype, contiguous=True):
    """Tell what keeps `conv` from the CUDA extension for an input of this kind.

    Args:
        conv: a depthwise `nn.Conv2d`.
        device: the input's `torch.device`.
        dtype: the dtype in which the convolution is to run (under autocast, autocast's).
        contiguous: whether the input lies in memory as NCHW.

    Returns:
        The reason in words, or "" when the extension is used.
    """
    if conv.kernel_size[0] < MIN_IMPLICIT_GEMM_KERNEL or conv.kernel_size[0] != conv.kernel_size[1]:
        return f"kernel {conv.kernel_size[0]} x {conv.kernel_size[1]} is not square and larger than 5"
    if conv.stride != (1, 1) or conv.dilation != (1, 1):
        return f"stride {conv.stride} and dilation {conv.dilation} are not 1"
    if torch.device(device).type != "cuda":
        return f"the tensors are on {torch.device(device).type}, it runs on cuda only"
    if dtype not in (torch.float16, torch.float32):
        return f"it computes float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if not contiguous:
        return "the input is not contiguous NCHW"
    return import_implicit_gemm()[1]


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with stride 1 and "same" zero padding: (N, C, H, W) -> (N, C, H, W).

    An `nn.Conv2d` in everything but the choice of the implementation, which is made anew at every call, so the
    `state_dict` (`weight` (C, 1, k, k) and, with `bias=True`, `bias` (C,)) never depends on what is installed.

    Args:
        channels: C.
        kernel_size: k, odd.
        dilation: distance between neighbouring taps in pixels.
        bias: whether a bias is added.
        attempt_use_lk_impl: False keeps to PyTorch's convolution.
    """

    def __init__(self, channels, kernel_size, dilation=1, bias=False, attempt_use_lk_impl=True):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd for 'same' padding, got {kernel_size}")
        padding = dilation * (kernel_size - 1) // 2
        super().__init__(
            channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels, bias=bias
        )
        self.attempt_use_lk_impl = attempt_use_lk_impl

    def forward(self, x):
        if self.attempt_use_lk_impl:
            autocast = x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
            dtype = torch.get_autocast_dtype("cuda") if autocast else x.dtype
            if not why_not_implicit_gemm(self, x.device, dtype, x.is_contiguous()):
                # The extension's class is an nn.Conv2d whose forward reads `weight` and `bias` only.
                return import_implicit_gemm()[0].forward(self, x.to(dtype))
        return self.conv2d(x)

    def conv2d(self, x):
        """PyTorch's convolution, without the taps that meet nothing but padding wherever the kernel stands.

        On a map smaller than the kernel most taps do: of 13 x 13 taps only 7 x 7 can touch a 4 x 4 map. Leaving the
        others out changes no result and saves most of the work on small pictures.
        """
        half = self.kernel_size[0] // 2
        dilation = self.dilation[0]
        reach = [min(half, (edge - 1) // dilation) for edge in x.shape[-2:]]  # taps beside the middle, (rows, columns)
        rows, columns = (slice(half - taps, half + taps + 1) for taps in reach)
        weight, padding = self.weight[:, :, rows, columns], [taps * dilation for taps in reach]
        if x.device.type != "cpu":
            return F.conv2d(x, weight, self.bias, 1, padding, self.dilation, self.groups)

        if max(weight.shape[-2:]) > depthwise_cpu.MAX_CHANNELS_LAST_KERNEL:
            x = x.contiguous()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if self.training and torch.is_grad_enabled() and depthwise_cpu.fast_gradients(x.device, dtype):
            out = depthwise_cpu.depthwise_conv2d(x.to(dtype), weight.to(dtype), dilation)
            return out if self.bias is None else out + self.bias.to(dtype)[:, None, None]
        return depthwise_cpu.conv2d(x, weight, self.bias, 1, padding, dilation)


def describe_implementation(device="cuda", dtype=torch.float16, kernel_size=13):
    """Say in one line which implementation runs a large-kernel convolution, and why the other one does not.

    Args:
        device: where the tensors are.
        dtype: the dtype in which the convolution runs.
        kernel_size: the kernel's edge in pixels.
    """
    reason = why_not_implicit_gemm(DepthwiseConv2d(1, kernel_size), device, dtype)
    if not reason:
        return "depthwise_conv2d_implicit_gemm (PyTorch's depthwise convolution where it does not fit)"
    import_error = import_implicit_gemm()[1]
    if import_error and import_error not in reason:
        reason = f"{reason}; nor can it be imported: {import_error}"
    ours = ", with fast gradients" if depthwise_cpu.fast_gradients(device, dtype) else ""
    return f"PyTorch's depthwise convolution{ours} (not depthwise_conv2d_implicit_gemm: {reason})"


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        print(f"{device} {str(dtype).removeprefix('torch.')}: {describe_implementation(device, dtype)}")
