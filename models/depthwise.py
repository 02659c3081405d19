"""The depthwise convolution of the large-kernel blocks: which implementation runs, and why.

Three implementations compute the same results from the same parameters:

- `triton`: the kernels in `models/depthwise_triton.py`, on NVIDIA GPUs of compute capability 8.0 and above, in bfloat16
  and float16. They need only Triton, which comes with PyTorch for Linux (on Windows: `triton-windows`);
- `implicit_gemm`: `depthwise_conv2d_implicit_gemm`, the CUDA extension that the authors of RepLKNet and UniRepLKNet
  use, where it is installed and supports the convolution (float16 or float32, CUDA, NCHW, undilated, kernel above 5);
- `pytorch`: PyTorch's own depthwise convolution everywhere else. When training on a CPU, `models/depthwise_cpu.py`
  computes both gradients.

The choice is made at every call, and without any measurement: it depends on the device and the dtype only. Which way
is fastest depends on the machine and the shape, so a program that computes for long measures it once, with
`choose_convolutions` of `models/depthwise_choice.py`, and fills `PLANS`.

The environment variable UNIREPLKNET_DEPTHWISE selects one of these names wherever it can compute the convolution, and
PyTorch's elsewhere; "default" selects what runs without a measurement. It overrides both what was measured and the
argument `attempt_use_lk_impl`.

    python tools/conv_report.py        each shape of a network: implementation, why not the others, error and time
"""

import functools
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from models import depthwise_cpu, depthwise_methods
from models.depthwise_methods import STACKED, convolve_stacked

try:
    from models import depthwise_triton

    TRITON_ERROR = ""
except Exception as error:  # not installed, or broken in any way
    TRITON_ERROR = f"{type(error).__name__}: {error}"

NAMES = ("triton", "implicit_gemm", "pytorch")  # in order of preference
CHOICES = f"{', '.join(NAMES)} or auto"  # of the argument
VARIABLE = "UNIREPLKNET_DEPTHWISE"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter computes on a CPU, slowly, for tests

MIN_IMPLICIT_GEMM_KERNEL = 7  # below this the extension has no kernel that is worth it (UniRepLKNet, Section 3.1)
MAX_TRITON_KERNEL = 31  # the largest that is tested
MIN_CAPABILITY = (8, 0)  # the first GPUs whose tensor cores compute bfloat16

# What was measured to be faster than the default in this process: {`Key`: one of `NAMES`, or a plan of
# models/depthwise_methods.py}.
PLANS: dict["Key", str] = {}


class Key(NamedTuple):
    """A convolution for which a plan holds, at any batch size."""

    device: str  # type of the device
    dtype: str  # in which it computes, such as "float32"
    training: bool  # whether gradients follow
    channels: int
    height: int
    width: int
    kernel_size: int
    dilation: int


def environment_choice() -> str:
    """What UNIREPLKNET_DEPTHWISE selects: one of `NAMES`, "default", or "auto", also where it is not set.

    Raises:
        ValueError: for any other value.
    """
    name = os.environ.get(VARIABLE, "auto")
    if name not in (*NAMES, "default", "auto"):
        choices = f"{', '.join(NAMES)}, default or auto"
        raise ValueError(f"the environment variable {VARIABLE} must be {choices}, got {name!r}; correct it or unset it")
    return name


def forced_choice() -> str:
    """The one of `NAMES` that UNIREPLKNET_DEPTHWISE selects, or "auto"."""
    name = environment_choice()
    return "auto" if name == "default" else name


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
def why_triton_fails(device: torch.device) -> str:
    """Try Triton once on a GPU with a tiny convolution: it needs a C compiler and a matching driver.

    Returns:
        The reason in words, or "" where it works.
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
    return "" if error < 0.05 else f"its results are wrong here: an error of {error:.2g} in a sum of 9 products"


def why_not_triton(kernel_size: int, device: torch.device | str, dtype: torch.dtype) -> str:
    """Why the Triton kernels cannot compute a convolution.

    Args:
        kernel_size: size of the kernel in pixels.
        device: the input's `torch.device`.
        dtype: the dtype in which the convolution runs (under autocast, autocast's).

    Returns:
        The reason in words, or "" where they can.
    """
    device = torch.device(device)
    if TRITON_ERROR:
        return TRITON_ERROR
    if kernel_size > MAX_TRITON_KERNEL:
        return f"kernel {kernel_size} is larger than {MAX_TRITON_KERNEL}"
    if INTERPRETED:
        supported = device.type == "cpu" and dtype in (torch.float16, torch.float32)
        return "" if supported else "its interpreter computes float16 and float32 on cpu only"
    if device.type != "cuda":
        return f"the tensors are on {device.type}, it runs on cuda only"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return why_triton_fails(device)


def why_not_implicit_gemm(
    kernel_size: int, dilation: int, device: torch.device | str, dtype: torch.dtype, contiguous: bool = True
) -> str:
    """Why the CUDA extension cannot compute a convolution.

    Args:
        kernel_size: size of the kernel in pixels.
        dilation: distance between neighbouring taps in pixels.
        device: the input's `torch.device`.
        dtype: the dtype in which the convolution runs (under autocast, autocast's).
        contiguous: whether the input is contiguous in memory as NCHW.

    Returns:
        The reason in words, or "" where it can.
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
    """Whether the network is being traced or exported, for programs that know PyTorch's own operators only."""
    exporting = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
    return torch.jit.is_tracing() or (exporting is not None and exporting())


@torch.compiler.assume_constant_result  # torch.compile stores the choice instead of tracing how it is made
def choose(
    kernel_size: int,
    dilation: int,
    device: torch.device | str,
    dtype: torch.dtype,
    contiguous: bool = True,
    wish: str = "auto",
) -> str:
    """The implementation that runs a convolution: one of `NAMES`.

    Args:
        kernel_size, dilation, device, dtype, contiguous: see `why_not_implicit_gemm`.
        wish: the one to use where it can compute the convolution, or "auto"; UNIREPLKNET_DEPTHWISE overrides it.

    Raises:
        ValueError: for an unknown name in UNIREPLKNET_DEPTHWISE.
    """
    forced = forced_choice()
    wish = wish if forced == "auto" else forced
    if wish in ("auto", "triton") and not why_not_triton(kernel_size, device, dtype):
        if wish == "triton" or not INTERPRETED:
            return "triton"
    if wish in ("auto", "implicit_gemm"):
        if not why_not_implicit_gemm(kernel_size, dilation, device, dtype, contiguous):
            return "implicit_gemm"
    return "pytorch"


@torch.compiler.assume_constant_result
def planned(device: str, dtype: torch.dtype, *shape: int) -> str:
    """What was measured for a convolution: one of `NAMES` or a plan, or "" for the default; arguments as in `Key`."""
    key = Key(device, str(dtype).removeprefix("torch."), *shape)
    return PLANS.get(key, "") if environment_choice() == "auto" else ""


@torch.compiler.assume_constant_result
def has_plans() -> bool:
    """Whether anything was measured; where nothing was, torch.compile may leave the sizes of a map open."""
    return bool(PLANS)


def find_plan(x: torch.Tensor, kernel_size: int, dilation: int, training: bool, wish: str) -> str:
    """`planned` for x (N, C, H, W); `training` where the layer is in training mode."""
    if wish != "auto" or not has_plans() or is_exporting():
        return ""
    training = training and torch.is_grad_enabled()
    return planned(x.device.type, computing_dtype(x), training, *x.shape[1:], kernel_size, dilation)


def computing_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a convolution of x computes: that of autocast, where it is on."""
    device = x.device.type
    if device in ("cuda", "cpu") and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def lay_out(x: torch.Tensor, weight: torch.Tensor, dilation: int, training: bool, wish: str) -> torch.Tensor:
    """x (N, C, H, W) in the memory format and the dtype of a convolution, once for several that share it."""
    if is_exporting():
        return x.contiguous()
    plan = find_plan(x, weight.shape[-1], dilation, training, wish)
    x = x.to(computing_dtype(x))
    if plan == STACKED:
        return x
    if plan and plan not in NAMES:
        return depthwise_methods.to_layout(x, plan.split()[0])
    return x if reads_nhwc(x, weight, training) else x.contiguous()


def reads_nhwc(x, weight, training):
    """Whether x stays in NHWC for PyTorch's convolution on a CPU without gradients: where it computes so, or should."""
    if x.device.type != "cpu" or training and torch.is_grad_enabled():
        return False
    return depthwise_cpu.FAST_IN_NHWC or depthwise_cpu.is_nhwc(weight)


def lay_out_stream(x: torch.Tensor) -> torch.Tensor:
    """x (N, C, H, W), the input of a stage, in the memory format in which all its blocks take it.

    LayerNorm leaves NHWC, and each block returns what it is given. On a GPU the depthwise convolutions read NCHW and
    would copy each of their inputs; on a CPU the linear layers read NHWC, and the convolutions are measured.
    """
    return x.contiguous() if takes_nchw(x.device) else x


def takes_nchw(device: torch.device) -> bool:
    """Whether the depthwise convolutions of all blocks read NCHW on a device."""
    return device.type == "cuda"


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dilation: int, training: bool, wish: str
) -> torch.Tensor:
    """The convolution of `DepthwiseConv2d`, by whichever implementation; one node of a torch.fx graph.

    Args:
        x: (N, C, H, W).
        weight: (C, 1, k, k).
        bias: (C,) or None.
        dilation: distance between neighbouring taps in pixels.
        training: whether the layer is in training mode.
        wish: see `choose`.
    """
    if is_exporting():
        return convolve_by_pytorch(x, weight, bias, dilation, training)
    kernel_size, dtype = weight.shape[-1], computing_dtype(x)
    name = find_plan(x, kernel_size, dilation, training, wish)
    if name and name not in NAMES:
        return convolve_by_plan(x.to(dtype), weight, bias, dilation, training, name)
    wish = name or wish
    name = choose(kernel_size, dilation, x.device, dtype, x.is_contiguous(), wish)
    if name == "triton":
        return depthwise_triton.depthwise_conv2d(x.to(dtype), weight, bias, dilation)
    if name == "implicit_gemm":
        # The extension's class is an nn.Conv2d whose forward reads `weight` and `bias` only.
        return import_implicit_gemm()[0].forward(SimpleNamespace(weight=weight, bias=bias), x.to(dtype))
    return convolve_by_pytorch(x, weight, bias, dilation, training)


def convolve_by_pytorch(x, weight, bias, dilation, training):
    """PyTorch's convolution; arguments as in `convolve`."""
    weight, padding = crop(weight, x.shape[-2:], dilation)
    if x.device.type != "cpu" or is_exporting():
        return F.conv2d(x, weight, bias, 1, padding, dilation, x.shape[1])

    if max(weight.shape[-2:]) > depthwise_cpu.MAX_CHANNELS_LAST_KERNEL and not reads_nhwc(x, weight, training):
        x = x.contiguous()
    dtype = computing_dtype(x)
    if training and torch.is_grad_enabled() and depthwise_cpu.fast_gradients(x.device, dtype):
        out = depthwise_cpu.depthwise_conv2d(x.to(dtype), weight.to(dtype), dilation)
        return out if bias is None else out + bias.to(dtype)[:, None, None]
    return depthwise_cpu.conv2d(x, weight, bias, 1, padding, dilation)


def convolve_by_plan(x, weight, bias, dilation, training, plan):
    """The convolution as a plan of models/depthwise_methods.py has it; arguments as in `convolve`."""
    weight = crop(weight, x.shape[-2:], dilation)[0].to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if plan == STACKED:
        out = depthwise_methods.unstack(convolve_stacked(x, [weight], [dilation])[:, 0], x.shape)
        return out if bias is None else out + bias[:, None, None]
    if training and torch.is_grad_enabled():
        out = depthwise_methods.depthwise_planned(x, weight, dilation, plan)
        return out if bias is None else out + bias[:, None, None]
    return depthwise_methods.compute(x, weight, bias, dilation, plan)


def is_stacked(x: torch.Tensor, conv: "DepthwiseConv2d") -> bool:
    """Whether the plan of the large one of several convolutions of x is to compute all of them together."""
    if isinstance(x, torch.fx.Proxy) or torch.compiler.is_compiling():
        return False
    return find_plan(x, conv.kernel_size[0], conv.dilation[0], conv.training, conv.wish) == STACKED


def convolve_together(x: torch.Tensor, convs: Sequence["DepthwiseConv2d"]) -> torch.Tensor:
    """`convolve_stacked` of x (N, C, H, W) by several layers without bias."""
    x = x.to(computing_dtype(x))
    dilations = [conv.dilation[0] for conv in convs]
    weights = [crop(conv.weight, x.shape[-2:], dilation)[0] for conv, dilation in zip(convs, dilations)]
    return convolve_stacked(x, weights, dilations)


def crop(weight, size, dilation):
    """A kernel without the taps that only ever meet padding, and the padding (rows, columns) that remains.

    On a map smaller than the kernel most taps do: of 13 x 13 taps only 7 x 7 can touch a 4 x 4 map. Skipping the
    others changes no result and saves most of the work on small images.

    Args:
        weight: (C, 1, k, k).
        size: (height, width) of the map in pixels.
    """
    half = weight.shape[-1] // 2
    reach = [min(half, (length - 1) // dilation) for length in size]  # taps beside the middle, (rows, columns)
    if reach == [half, half]:
        return weight, [half * dilation] * 2
    rows, columns = (slice(half - taps, half + taps + 1) for taps in reach)
    return weight[:, :, rows, columns], [taps * dilation for taps in reach]


# torch.fx stores calls of these instead of tracing the choice, which depends on the machine.
torch.fx.wrap("convolve")
torch.fx.wrap("lay_out")


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with stride 1 and "same" zero padding: (N, C, H, W) -> (N, C, H, W).

    An `nn.Conv2d` in everything but the choice of the implementation, which is made at every call, so the
    `state_dict` (`weight` (C, 1, k, k) and, with `bias=True`, `bias` (C,)) never depends on what is installed.

    Args:
        channels: C.
        kernel_size: k, odd.
        dilation: distance between neighbouring taps in pixels.
        bias: whether a bias is added.
        attempt_use_lk_impl: True or "auto" chooses; False keeps to PyTorch's convolution; "triton", "implicit_gemm" or
            "pytorch" is used wherever it can compute the convolution. UNIREPLKNET_DEPTHWISE overrides it.

    Raises:
        ValueError: for an even kernel size, or an unknown name in `attempt_use_lk_impl` or UNIREPLKNET_DEPTHWISE.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        dilation: int = 1,
        bias: bool = False,
        attempt_use_lk_impl: bool | str = True,
    ):
        environment_choice()  # a wrong name is refused here, before any computation
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd for 'same' padding, got {kernel_size}")
        padding = dilation * (kernel_size - 1) // 2
        super().__init__(
            channels, channels, kernel_size, padding=padding, dilation=dilation, groups=channels, bias=bias
        )
        self.wish = {True: "auto", False: "pytorch"}.get(attempt_use_lk_impl, attempt_use_lk_impl)
        if self.wish not in (*NAMES, "auto"):
            raise ValueError(f"attempt_use_lk_impl must be True, False, {CHOICES}, got {attempt_use_lk_impl!r}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return convolve(x, self.weight, self.bias, self.dilation[0], self.training, self.wish)

    def lay_out(self, x: torch.Tensor) -> torch.Tensor:
        """x in the memory format that suits this layer, for other layers that take it as well."""
        return lay_out(x, self.weight, self.dilation[0], self.training, self.wish)


def describe_selection(wish: str) -> str:
    """What selected the implementation, in words: UNIREPLKNET_DEPTHWISE, `attempt_use_lk_impl` (`wish`), or nothing."""
    forced = forced_choice()
    if forced == "auto" == wish:
        return "Triton's interpreter runs only where it is selected by name"
    if forced == "auto":
        return f"attempt_use_lk_impl is {wish!r}"
    overridden = f", which overrides attempt_use_lk_impl {wish!r}" if wish not in (forced, "auto") else ""
    return f"{VARIABLE} is {forced!r}{overridden}"


def explain(
    kernel_size: int,
    dilation: int,
    device: torch.device | str,
    dtype: torch.dtype,
    contiguous: bool = True,
    wish: str = "auto",
) -> tuple[str, dict[str, str]]:
    """Which implementation runs a convolution, and why not those that would come before it.

    Args:
        kernel_size, dilation, device, dtype, contiguous, wish: see `choose`.

    Returns:
        (one of `NAMES`, {name: reason in words}), with a reason for each name before it in `NAMES`, and for `wish`
        where that does not run.

    Raises:
        ValueError: for an unknown name in UNIREPLKNET_DEPTHWISE.
    """
    chosen = choose(kernel_size, dilation, device, dtype, contiguous, wish)
    reasons = {
        "triton": why_not_triton(kernel_size, device, dtype),
        "implicit_gemm": why_not_implicit_gemm(kernel_size, dilation, device, dtype, contiguous),
        "pytorch": "",
    }
    import_error = import_implicit_gemm()[1]
    if import_error and import_error not in reasons["implicit_gemm"]:
        reasons["implicit_gemm"] += f"; nor can it be imported: {import_error}"
    before = NAMES[: NAMES.index(chosen)]
    others = [name for name in NAMES if name in before or name == wish != chosen]
    return chosen, {name: reasons[name] or describe_selection(wish) for name in others}


def describe_implementation(
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.float16,
    kernel_size: int = 13,
    dilation: int = 1,
    wish: str = "auto",
) -> str:
    """One line that says which implementation runs a large-kernel convolution, and why not the others.

    Args:
        device: where the tensors are.
        dtype: the dtype in which the convolution runs.
        kernel_size: size of the kernel in pixels.
        dilation: distance between neighbouring taps in pixels.
        wish: the layer's `attempt_use_lk_impl` as a name, or "auto".

    Raises:
        ValueError: for an unknown name in UNIREPLKNET_DEPTHWISE.
    """
    chosen, reasons = explain(kernel_size, dilation, device, dtype, wish=wish)
    title = {
        "triton": "Triton kernels on tensor cores",
        "implicit_gemm": "depthwise_conv2d_implicit_gemm",
        "pytorch": "PyTorch's depthwise convolution",
    }[chosen]
    if chosen == "pytorch" and depthwise_cpu.fast_gradients(device, dtype):
        title += ", with fast gradients"
    notes = [f"not {name}: {reason}" for name, reason in reasons.items()]
    selection = describe_selection(wish)
    if "overrides" in selection and not any(selection in note for note in notes):
        notes.append(selection)
    return f"{title} ({'; '.join(notes)})" if notes else title
