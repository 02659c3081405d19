"""The depthwise convolution of the large-kernel blocks: which implementation runs, and why.

Three implementations compute the same thing from the same parameters:

- `triton`: the kernels in `models/depthwise_triton.py`, on NVIDIA GPUs of compute capability 8.0 and above, in bfloat16
  and float16. They need nothing but Triton, which comes with PyTorch for Linux (on Windows: `triton-windows`);
- `implicit_gemm`: `depthwise_conv2d_implicit_gemm`, the CUDA extension that the authors of RepLKNet and UniRepLKNet
  use, where it is installed and fits (float16 or float32, CUDA, NCHW, undilated, kernel larger than 5);
- `pytorch`: PyTorch's own depthwise convolution everywhere else. When it trains on a CPU, both gradients are computed
  by `models/depthwise_cpu.py`.

The choice is made anew at every call. The environment variable UNIREPLKNET_DEPTHWISE, set to one of these names before
Python starts, has it wherever it can compute at all, and PyTorch's elsewhere.

    python -m models.doctor        says for every shape of a network which one runs, why not the others, error and time
"""

import functools
import os
import sys

import torch
import torch.nn.functional as F
from torch import nn

from models import depthwise_cpu

try:
    from models import depthwise_triton

    TRITON_ERROR = ""
except Exception as error:  # not installed, or broken in any way
    TRITON_ERROR = f"{type(error).__name__}: {error}"

NAMES = ("triton", "implicit_gemm", "pytorch")
VARIABLE = "UNIREPLKNET_DEPTHWISE"
FORCED = os.environ.get(VARIABLE, "auto")
if FORCED not in (*NAMES, "auto"):
    sys.exit(f"error: the environment variable {VARIABLE} must be {', '.join(NAMES)} or auto, got {FORCED!r}")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter computes on a CPU, slowly, for tests

MIN_IMPLICIT_GEMM_KERNEL = 7  # below this the extension has no kernel that is worth it (UniRepLKNet, Section 3.1)
MAX_TRITON_KERNEL = 31  # the largest that is tested
MIN_CAPABILITY = (8, 0)  # the first GPUs whose tensor cores compute bfloat16


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


@functools.cache
def why_triton_fails(device):
    """Try Triton once on a GPU, by a tiny convolution: it needs a C compiler and a driver that fits.

    Returns:
        The reason in words, or "" where it computes what it should.
    """
    try:
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        x = torch.arange(64.0, device=device).view(1, 1, 8, 8).sin()
        weight = torch.arange(9.0, device=device).view(1, 1, 3, 3).cos()
        y = depthwise_triton.convolve(x.half(), weight, None, 1, False)
        with torch.autocast("cuda", enabled=False):
            error = (y.float() - F.conv2d(x, weight, padding=1)).abs().max().item()
    except Exception as error:  # no GPU, no C compiler, an old driver: many kinds
        reason = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {reason}"
    return "" if error < 0.05 else f"it computes wrong numbers here: an error of {error:.2g} in a sum of 9 products"


def why_not_triton(kernel_size, device, dtype):
    """Tell what keeps a convolution from the Triton kernels.

    Args:
        kernel_size: its edge in pixels.
        device: the input's `torch.device`.
        dtype: the dtype in which the convolution is to run (under autocast, autocast's).

    Returns:
        The reason in words, or "" where they can compute it.
    """
    device = torch.device(device)
    if TRITON_ERROR:
        return TRITON_ERROR
    if kernel_size > MAX_TRITON_KERNEL:
        return f"kernel {kernel_size} is larger than {MAX_TRITON_KERNEL}"
    if INTERPRETED:
        fits = device.type == "cpu" and dtype in (torch.float16, torch.float32)
        return "" if fits else "its interpreter computes float16 and float32 on cpu only"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, it runs on cuda only"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return why_triton_fails(device)


def why_not_implicit_gemm(kernel_size, dilation, device, dtype, contiguous=True):
    """Tell what keeps a convolution from the CUDA extension.

    Args:
        kernel_size: its edge in pixels.
        dilation: distance between neighbouring taps in pixels.
        device: the input's `torch.device`.
        dtype: the dtype in which the convolution is to run (under autocast, autocast's).
        contiguous: whether the input lies in memory as NCHW.

    Returns:
        The reason in words, or "" where it can compute it.
    """
    if kernel_size < MIN_IMPLICIT_GEMM_KERNEL:
        return f"kernel {kernel_size} is not larger than 5"
    if dilation > 1:
        return f"dilation {dilation} is not 1"
    if torch.device(device).type != "cuda":
        return f"the tensors are on {torch.device(device).type}, it runs on cuda only"
    if dtype not in (torch.float16, torch.float32):
        return f"it computes float16 and float32, not {str(dtype).removeprefix('torch.')}"
    if not contiguous:
        return "the input is not contiguous NCHW"
    return import_implicit_gemm()[1]


def is_exporting():
    """Whether the network is written down for another program, which knows PyTorch's own operators only."""
    exporting = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
    return torch.jit.is_tracing() or (exporting is not None and exporting())


# What torch.compile sees is the answer, not the questions.
@torch.compiler.assume_constant_result
def choose(kernel_size, dilation, device, dtype, contiguous=True, wish="auto"):
    """The implementation that runs a convolution: one of `NAMES`.

    Args:
        kernel_size, dilation, device, dtype, contiguous: see `why_not_implicit_gemm`.
        wish: the one to use where it can compute, or "auto".
    """
    wish = FORCED if FORCED != "auto" else wish
    if wish in ("auto", "triton") and not why_not_triton(kernel_size, device, dtype):
        if wish == "triton" or not INTERPRETED:
            return "triton"
    if wish in ("auto", "implicit_gemm"):
        if not why_not_implicit_gemm(kernel_size, dilation, device, dtype, contiguous):
            return "implicit_gemm"
    return "pytorch"


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with stride 1 and "same" zero padding: (N, C, H, W) -> (N, C, H, W).

    An `nn.Conv2d` in everything but the choice of the implementation, which is made anew at every call, so the
    `state_dict` (`weight` (C, 1, k, k) and, with `bias=True`, `bias` (C,)) never depends on what is installed.

    Args:
        channels: C.
        kernel_size: k, odd.
        dilation: distance between neighbouring taps in pixels.
        bias: whether a bias is added.
        attempt_use_lk_impl: True chooses; False keeps to PyTorch's convolution; "triton", "implicit_gemm" or "pytorch"
            is used wherever it can compute. UNIREPLKNET_DEPTHWISE has the last word.
    """

    def __init__(self, channels, kernel_size, dilation=1, bias=False, attempt_use_lk_impl=True):
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd for 'same' padding, got {kernel_size}")
        padding = dilation * (kernel_size - 1) // 2
        super().__init__(
            channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels, bias=bias
        )
        self.wish = {True: "auto", False: "pytorch"}.get(attempt_use_lk_impl, attempt_use_lk_impl)
        if self.wish not in (*NAMES, "auto"):
            choices = ", ".join(NAMES)
            raise ValueError(f"attempt_use_lk_impl must be True, False, {choices} or auto, got {attempt_use_lk_impl!r}")

    def forward(self, x):
        if not is_exporting():
            device, dtype = x.device, x.dtype
            if device.type in ("cuda", "cpu") and torch.is_autocast_enabled(device.type):
                dtype = torch.get_autocast_dtype(device.type)
            name = choose(self.kernel_size[0], self.dilation[0], device, dtype, x.is_contiguous(), self.wish)
            if name == "triton":
                return depthwise_triton.depthwise_conv2d(x.to(dtype), self.weight, self.bias, self.dilation[0])
            if name == "implicit_gemm":
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
        if x.device.type != "cpu" or is_exporting():
            return F.conv2d(x, weight, self.bias, 1, padding, self.dilation, self.groups)

        if max(weight.shape[-2:]) > depthwise_cpu.MAX_CHANNELS_LAST_KERNEL:
            x = x.contiguous()
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if self.training and torch.is_grad_enabled() and depthwise_cpu.fast_gradients(x.device, dtype):
            out = depthwise_cpu.depthwise_conv2d(x.to(dtype), weight.to(dtype), dilation)
            return out if self.bias is None else out + self.bias.to(dtype)[:, None, None]
        return depthwise_cpu.conv2d(x, weight, self.bias, 1, padding, dilation)


def explain(kernel_size, dilation, device, dtype, contiguous=True):
    """Which implementation runs a convolution, and why not those that would come before it.

    Args:
        kernel_size, dilation, device, dtype, contiguous: see `why_not_implicit_gemm`.

    Returns:
        (one of `NAMES`, {name: reason in words}).
    """
    chosen = choose(kernel_size, dilation, device, dtype, contiguous)
    reasons = {
        "triton": why_not_triton(kernel_size, device, dtype),
        "implicit_gemm": why_not_implicit_gemm(kernel_size, dilation, device, dtype, contiguous),
    }
    import_error = import_implicit_gemm()[1]
    if import_error and import_error not in reasons["implicit_gemm"]:
        reasons["implicit_gemm"] += f"; nor can it be imported: {import_error}"
    before = NAMES[: NAMES.index(chosen)]
    return chosen, {name: reasons[name] or f"{VARIABLE} is {FORCED!r}" for name in before}


def describe_implementation(device="cuda", dtype=torch.float16, kernel_size=13, dilation=1):
    """Say in one line which implementation runs a large-kernel convolution, and why not the others.

    Args:
        device: where the tensors are.
        dtype: the dtype in which the convolution runs.
        kernel_size: the kernel's edge in pixels.
        dilation: distance between neighbouring taps in pixels.
    """
    chosen, reasons = explain(kernel_size, dilation, device, dtype)
    title = {
        "triton": "Triton kernels on tensor cores",
        "implicit_gemm": "depthwise_conv2d_implicit_gemm",
        "pytorch": "PyTorch's depthwise convolution",
    }[chosen]
    if chosen == "pytorch" and depthwise_cpu.fast_gradients(device, dtype):
        title += ", with fast gradients"
    why = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items())
    return f"{title} ({why})" if why else title
