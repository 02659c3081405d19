"""The large-kernel convolution: which implementation runs, and that it computes what nn.Conv2d computes."""

import os
import re
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import models
from common.options import ConstantError, UserError, set_constants
from models import depthwise, depthwise_choice, depthwise_cpu
from models.depthwise import (
    NAMES,
    DepthwiseConv2d,
    choose,
    describe_implementation,
    explain,
    why_not_implicit_gemm,
    why_not_triton,
)
from models.unireplknet import DilatedReparamBlock, UniRepLKNet
from tools import conv_report

CUDA = torch.device("cuda")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def seeded_and_uncached(monkeypatch):
    torch.manual_seed(0)
    cached = (depthwise.import_implicit_gemm, depthwise.why_triton_fails)
    for function in cached:
        function.cache_clear()
    monkeypatch.delenv("UNIREPLKNET_DEPTHWISE", raising=False)
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setattr(depthwise, "TRITON_ERROR", "ModuleNotFoundError: No module named 'triton'")


@pytest.fixture
def gpu(monkeypatch):
    """As on a machine with a GPU and a working Triton."""
    monkeypatch.setattr(depthwise, "TRITON_ERROR", "")
    monkeypatch.setattr(depthwise, "why_triton_fails", lambda device: "")


class DepthWiseConv2dImplicitGEMM(nn.Conv2d):
    """Stands in for the extension's class, which computes the same on CUDA; marks its results by adding 1000."""

    def forward(self, x):
        return (
            F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2, groups=x.shape[1])
            + 1000
        )


@pytest.fixture
def extension(monkeypatch):
    module = types.ModuleType("depthwise_conv2d_implicit_gemm")
    module.DepthWiseConv2dImplicitGEMM = DepthWiseConv2dImplicitGEMM
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("dilation", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel_size", [3, 5, 13, 17])
def test_equals_conv2d_on_maps_of_every_size(kernel_size, dilation):
    conv = DepthwiseConv2d(2, kernel_size, dilation, bias=True).double()
    plain = nn.Conv2d(2, 2, kernel_size, padding="same", dilation=dilation, groups=2).double()
    plain.load_state_dict(conv.state_dict())
    for height, width in ((1, 1), (1, 9), (2, 3), (7, 4), (8, 8), (13, 30)):
        x = torch.randn(2, 2, height, width, dtype=torch.float64, requires_grad=True)
        expected, actual = plain(x), conv(x)
        torch.testing.assert_close(actual, expected)
        seed = torch.randn_like(expected)
        gradients = torch.autograd.grad(actual, [x, *conv.parameters()], seed)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, [x, *plain.parameters()], seed))


def test_gradients_on_a_map_smaller_than_the_kernel():
    conv = DepthwiseConv2d(2, 13, bias=True).double()
    x = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: conv(x), (x, *conv.parameters()))


@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), (3, 2), (13, 1)])
def test_training_on_a_cpu_uses_the_operator(kernel_size, dilation, monkeypatch):
    operator, calls = depthwise_cpu.depthwise_conv2d, []
    monkeypatch.setattr(depthwise_cpu, "depthwise_conv2d", lambda *inputs: calls.append(inputs) or operator(*inputs))
    conv = DepthwiseConv2d(2, kernel_size, dilation, bias=True)
    x = torch.randn(1, 2, 16, 16)
    conv(x)
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    assert len(calls) == 2
    calls.clear()
    with torch.no_grad():
        conv(x)
    with torch.autocast("cpu", torch.float16):
        assert conv(x).dtype == torch.float16
    conv.eval()(x)
    assert not calls
    assert not depthwise_cpu.fast_gradients("cuda", torch.float32)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel_size", "dilation"), [(3, 1), (3, 4), (3, 5), (3, 7), (5, 1), (7, 2), (9, 2), (13, 1), (17, 1)]
)
def test_gradients_in_bfloat16_are_those_of_float64(kernel_size, dilation, layout):
    """Paddings above 6 and strides above 3 are computed in another way.

    The weight gradient adds three partial sums, each rounded once to bfloat16: less than 2 eps of the largest value.
    """
    x = torch.randn(3, 5, 21, 18).to(memory_format=layout)
    weight, grad = torch.randn(5, 1, kernel_size, kernel_size), torch.randn(3, 5, 21, 18)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        inputs = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in (x, weight)]
        out = depthwise_cpu.depthwise_conv2d(*inputs, dilation)
        results.append([out, *torch.autograd.grad(out, inputs, grad.bfloat16().to(dtype))])
    for expected, actual in zip(*results):
        assert actual.dtype == torch.bfloat16
        assert (actual - expected).abs().max() < 2 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def draw_inputs(height, width, kernel_size):
    x = torch.randn(2, 2, height, width, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(2, 1, kernel_size, kernel_size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("height", "width", "kernel_size", "dilation"),
    [(5, 6, 5, 1), (6, 4, 3, 2), (4, 5, 3, 1), (8, 9, 3, 7), (6, 6, 3, 4)],
)
def test_the_operator_has_first_and_second_derivatives(height, width, kernel_size, dilation):
    inputs = draw_inputs(height, width, kernel_size)
    operator = lambda x, weight: depthwise_cpu.depthwise_conv2d(x, weight, dilation)  # noqa: E731
    assert torch.autograd.gradcheck(operator, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(operator, inputs, fast_mode=True)


def test_the_operator_meets_the_rules_of_torch_library_and_compiles_in_both_layouts():
    x, weight = draw_inputs(6, 6, 3)
    torch.library.opcheck(depthwise_cpu.operator, (x, weight, 2))
    operator = lambda x, weight: depthwise_cpu.depthwise_conv2d(x, weight, 2)  # noqa: E731
    layout = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    for tensor in (x, layout):
        compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
        compiled(tensor, weight).square().sum().backward()
    torch.testing.assert_close(layout.grad, x.grad)


@pytest.mark.parametrize("input_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight_layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_that_torch_compile_expects_is_the_layout_that_comes(input_layout, weight_layout):
    for size, kernel_size, dtype in ((12, 13, torch.float32), (6, 3, torch.bfloat16), (3, 5, torch.bfloat16)):
        x = torch.randn(2, 32, size, size, dtype=dtype).contiguous(memory_format=input_layout)
        weight = torch.randn(32, 1, kernel_size, kernel_size, dtype=dtype).to(memory_format=weight_layout)
        expected = depthwise_cpu.operator(x.to("meta"), weight.to("meta"), 1)
        out = depthwise_cpu.operator(x, weight, 1)
        assert out.shape == expected.shape and out.stride() == expected.stride()


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="odd"):
        DepthwiseConv2d(4, 12)


def test_the_extension_is_used_where_it_can_compute(extension, no_triton):
    for dtype in (torch.float16, torch.float32):
        assert why_not_implicit_gemm(13, 1, "cuda", dtype) == ""
        assert choose(13, 1, CUDA, dtype) == "implicit_gemm"
    assert describe_implementation("cuda", torch.float16).startswith("depthwise_conv2d_implicit_gemm")


@pytest.mark.parametrize(
    ("kernel_size", "dilation", "device", "dtype", "contiguous", "reason"),
    [
        (5, 1, "cuda", torch.float16, True, "larger than 5"),
        (7, 2, "cuda", torch.float16, True, "dilation"),
        (13, 1, "cpu", torch.float16, True, "on cpu"),
        (13, 1, "cuda", torch.bfloat16, True, "not bfloat16"),
        (13, 1, "cuda", torch.float64, True, "not float64"),
        (13, 1, "cuda", torch.float16, False, "contiguous"),
    ],
)
def test_the_extension_is_not_used_where_it_cannot_compute(
    extension, no_triton, kernel_size, dilation, device, dtype, contiguous, reason
):
    assert reason in why_not_implicit_gemm(kernel_size, dilation, device, dtype, contiguous)
    assert choose(kernel_size, dilation, torch.device(device), dtype, contiguous) == "pytorch"


def test_triton_comes_first_on_a_gpu_where_it_works(extension, gpu):
    for dtype in (torch.bfloat16, torch.float16):
        for kernel_size, dilation in ((3, 1), (3, 5), (7, 2), (13, 1), (31, 1)):
            assert choose(kernel_size, dilation, CUDA, dtype, contiguous=False) == "triton"
    assert explain(13, 1, CUDA, torch.float16) == ("triton", {})
    assert describe_implementation("cuda", torch.float16) == "Triton kernels on tensor cores"
    assert choose(13, 1, CUDA, torch.float32) == "implicit_gemm"
    assert choose(33, 1, CUDA, torch.bfloat16) == "pytorch"


@pytest.mark.parametrize(
    ("kernel_size", "device", "dtype", "reason"),
    [
        (33, "cuda", torch.bfloat16, "larger than 31"),
        (13, "cpu", torch.bfloat16, "on cpu"),
        (13, "mps", torch.float16, "on mps"),
        (13, "cuda", torch.float32, "not float32"),
        (13, "cuda", torch.float64, "not float64"),
    ],
)
def test_triton_is_not_used_where_it_cannot_compute(gpu, kernel_size, device, dtype, reason):
    assert reason in why_not_triton(kernel_size, device, dtype)


def test_a_gpu_that_is_too_old_or_has_no_compiler_is_reported(monkeypatch):
    monkeypatch.setattr(depthwise, "TRITON_ERROR", "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert why_not_triton(13, "cuda", torch.float16) == "compute capability 7.5 is below 8.0"
    depthwise.why_triton_fails.cache_clear()

    def fail(device):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    assert why_not_triton(13, "cuda", torch.float16) == "RuntimeError: Failed to find C compiler."
    assert "not triton: RuntimeError: Failed to find C compiler" in describe_implementation("cuda", torch.float16)


def test_the_argument_selects_the_implementation_where_it_can_compute(extension, gpu):
    assert choose(13, 1, CUDA, torch.float16, wish="implicit_gemm") == "implicit_gemm"
    assert choose(13, 1, CUDA, torch.bfloat16, wish="implicit_gemm") == "pytorch"
    assert choose(13, 1, CUDA, torch.bfloat16, wish="pytorch") == "pytorch"
    reasons = explain(13, 1, CUDA, torch.float16, wish="pytorch")[1]
    assert set(reasons.values()) == {"attempt_use_lk_impl is 'pytorch'"}
    values = (True, False, *NAMES, "auto")
    assert [DepthwiseConv2d(1, 3, attempt_use_lk_impl=value).wish for value in values] == [
        "auto",
        "pytorch",
        *NAMES,
        "auto",
    ]
    with pytest.raises(ValueError, match="triton, implicit_gemm, pytorch or auto, got 'cudnn'"):
        DepthwiseConv2d(1, 3, attempt_use_lk_impl="cudnn")


def test_the_environment_variable_overrides_the_argument(extension, gpu, monkeypatch):
    monkeypatch.setenv("UNIREPLKNET_DEPTHWISE", "pytorch")
    assert choose(13, 1, CUDA, torch.bfloat16, wish="triton") == "pytorch"
    assert explain(13, 1, CUDA, torch.float16)[1]["triton"] == "UNIREPLKNET_DEPTHWISE is 'pytorch'"
    overrides = "UNIREPLKNET_DEPTHWISE is 'pytorch', which overrides attempt_use_lk_impl 'triton'"
    assert explain(13, 1, CUDA, torch.float16, wish="triton") == (
        "pytorch",
        {"triton": overrides, "implicit_gemm": overrides},
    )
    assert overrides in describe_implementation("cuda", torch.float16, wish="triton")
    assert "overrides" not in describe_implementation("cuda", torch.float16, wish="pytorch")
    monkeypatch.setenv("UNIREPLKNET_DEPTHWISE", "triton")
    overrides = "UNIREPLKNET_DEPTHWISE is 'triton', which overrides attempt_use_lk_impl 'pytorch'"
    assert explain(13, 1, CUDA, torch.float16, wish="pytorch") == ("triton", {"pytorch": overrides})
    assert overrides in describe_implementation("cuda", torch.float16, wish="pytorch")
    # The named one cannot compute here: the reason stands, and the override is still reported.
    text = describe_implementation("cuda", torch.float64, wish="pytorch")
    assert "not triton: it computes bfloat16 and float16, not float64" in text and overrides in text


@pytest.mark.parametrize("name", NAMES)
def test_every_name_gives_the_same_numbers_on_a_cpu(monkeypatch, name):
    conv, x = DepthwiseConv2d(2, 13), torch.randn(1, 2, 9, 9)
    expected = conv(x)
    monkeypatch.setenv("UNIREPLKNET_DEPTHWISE", name)
    assert torch.equal(conv(x), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda: DepthwiseConv2d(1, 3),
        lambda: models.unireplknet_a(num_classes=2),
        describe_implementation,
        lambda: choose(3, 1, CUDA, torch.float32),
        lambda: explain(3, 1, CUDA, torch.float32),
    ],
    ids=["layer", "network", "describe_implementation", "choose", "explain"],
)
def test_an_unknown_name_in_the_environment_variable_is_refused_in_one_sentence(use, monkeypatch):
    monkeypatch.setenv("UNIREPLKNET_DEPTHWISE", "cudnn")
    with pytest.raises(ValueError) as raised:
        use()
    assert str(raised.value) == (
        "the environment variable UNIREPLKNET_DEPTHWISE must be triton, implicit_gemm, pytorch, default or auto, "
        "got 'cudnn'; correct it or unset it"
    )
    with pytest.raises(UserError, match="got 'cudnn'; correct it"):
        conv_report.main()


def test_the_real_import_error_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "depthwise_conv2d_implicit_gemm", None)
    monkeypatch.setattr(depthwise, "TRITON_ERROR", "OSError: libcuda.so.1: cannot open shared object file")
    text = describe_implementation("cuda", torch.float16)
    assert "not triton: OSError: libcuda.so.1" in text and "not implicit_gemm: ModuleNotFoundError" in text
    assert "ModuleNotFoundError" in describe_implementation("cpu", torch.float32)
    assert "on cpu" in describe_implementation("cpu", torch.float32)


def test_a_broken_build_is_reported_and_skipped(monkeypatch, tmp_path, no_triton):
    broken = "raise OSError('libcudart.so.11.0: cannot open shared object file')"
    (tmp_path / "depthwise_conv2d_implicit_gemm.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    assert "OSError: libcudart.so.11.0" in describe_implementation("cuda", torch.float16)
    DepthwiseConv2d(2, 13)(torch.zeros(1, 2, 8, 8))


def test_the_extension_gets_the_module_s_own_parameters(extension, monkeypatch):
    """Only the device check is replaced, for this CPU; the call itself is the real one."""
    conv = DepthwiseConv2d(3, 13, bias=True)
    x = torch.randn(1, 3, 20, 20)
    expected = conv(x)
    monkeypatch.setattr(depthwise, "why_not_implicit_gemm", lambda *_: "")
    torch.testing.assert_close(conv(x), expected + 1000)
    conv.wish = "pytorch"
    torch.testing.assert_close(conv(x), expected)


# --- a whole network as on a GPU


class TritonStandIn(torch.autograd.Function):
    """Counts its calls, and the operands that the kernels would copy, since they read NCHW."""

    counts = Counter()

    @staticmethod
    def forward(ctx, x, weight, bias, dilation):
        TritonStandIn.counts.update(forward=1, copies=int(not x.is_contiguous()))
        ctx.save_for_backward(x, weight)
        return torch.zeros_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad):
        TritonStandIn.counts.update(backward=1, copies=int(not grad.is_contiguous()))
        return *map(torch.zeros_like, ctx.saved_tensors), None, None


class Copies(TorchDispatchMode):
    """Counts copies of maps (N, C, H, W) within it: changes of the memory format, and of the dtype."""

    def __init__(self):
        super().__init__()
        self.formats = self.dtypes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if torch.is_tensor(out) and out.ndim == 4 and out.shape[0] == 2 and out.shape[2:].numel() > 1:
            self.formats += func._overloadpacket is torch.ops.aten.clone
            self.dtypes += func._overloadpacket is torch.ops.aten._to_copy
        return out


def train_once(compute=lambda model, x: model(x).sum(), **options):
    """(the network, copies in a training step, or in inference with the merged structure)."""
    model = UniRepLKNet(depths=(2, 2, 6, 2), dims=(4, 8, 8, 16), num_classes=3, **options).train()
    with Copies() as copies, torch.set_grad_enabled(not model.deploy):
        out = compute(model, torch.randn(2, 3, 64, 64))
        if not model.deploy:
            out.backward()
    return model, copies


def sum_of_stages(model, x):
    last, stages = model.forward_intermediates(x)
    return sum(stage.sum() for stage in stages)


@pytest.mark.parametrize("compute", [lambda model, x: model(x).sum(), sum_of_stages], ids=["logits", "stages"])
@pytest.mark.parametrize("options", [dict(), dict(deploy=True), dict(with_cp=True)], ids=str)
def test_no_operand_of_a_depthwise_convolution_is_copied_on_a_gpu(compute, options, gpu, monkeypatch):
    monkeypatch.setattr(depthwise, "choose", lambda *_: "triton")
    monkeypatch.setattr(depthwise, "depthwise_triton", types.SimpleNamespace(depthwise_conv2d=TritonStandIn.apply))
    monkeypatch.setattr(depthwise, "takes_nchw", lambda device: True)
    TritonStandIn.counts.clear()
    model, copies = train_once(compute, **options)
    convolutions = sum(isinstance(module, DepthwiseConv2d) for module in model.modules())
    forwards = 2 if "with_cp" in options else 1
    backwards = 0 if "deploy" in options else convolutions
    assert +TritonStandIn.counts == Counter(forward=forwards * convolutions, backward=backwards)
    # What a norm leaves in NHWC once in each of 4 stages, and the linear layers, which read NHWC, in each of 12 blocks.
    assert (copies.formats, copies.dtypes) == (4 + forwards * 12, 0)


def test_without_the_stage_s_memory_format_the_operands_would_be_copied(gpu, monkeypatch):
    monkeypatch.setattr(depthwise, "choose", lambda *_: "triton")
    monkeypatch.setattr(depthwise, "depthwise_triton", types.SimpleNamespace(depthwise_conv2d=TritonStandIn.apply))
    TritonStandIn.counts.clear()
    train_once()
    assert TritonStandIn.counts["copies"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_extension_runs_every_large_convolution_of_a_network(dtype, extension, no_triton, monkeypatch):
    as_on_cuda = lambda size, dilation, device, *rest: why_not_implicit_gemm(size, dilation, CUDA, *rest)  # noqa: E731
    monkeypatch.setattr(depthwise, "why_not_implicit_gemm", as_on_cuda)
    monkeypatch.setattr(depthwise, "takes_nchw", lambda device: True)
    sizes = []
    real = DepthWiseConv2dImplicitGEMM.forward
    monkeypatch.setattr(
        DepthWiseConv2dImplicitGEMM, "forward", lambda self, x: sizes.append(self.weight.shape[-1]) or real(self, x)
    )
    for deploy in (False, True):
        sizes.clear()
        with torch.device("meta"):
            model = timm.create_model("unireplknet_t", num_classes=3, deploy=deploy).to(dtype)
        model(torch.empty(2, 3, 96, 96, device="meta", dtype=dtype))
        assert sizes == [13] * 15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_block_casts_its_input_once(dtype):
    block = DilatedReparamBlock(4, 13)
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    with Copies() as copies, torch.autocast("cpu", dtype):
        block(x)
    assert copies.dtypes == 1


@pytest.mark.parametrize(("fast", "layout"), [(True, torch.contiguous_format), (False, torch.channels_last)])
@pytest.mark.parametrize("deploy", [True, False])
def test_inference_on_a_cpu_copies_no_map(fast, layout, deploy, monkeypatch):
    """Where PyTorch's convolution computes in NHWC, for the sake of the CPU or of the weights."""
    monkeypatch.setattr(depthwise_cpu, "FAST_IN_NHWC", fast)
    model = UniRepLKNet(depths=(2, 2, 6, 2), dims=(4, 8, 8, 16), num_classes=3, deploy=deploy).eval()
    model.to(memory_format=layout)
    with depthwise_choice.installed({}), Copies() as copies, torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    assert (copies.formats, copies.dtypes) == (0, 0)


def test_import_survives_a_missing_triton_and_an_unknown_name_in_the_environment_variable():
    program = """
import os, sys
sys.modules["triton"] = None  # importing it fails
import torch, models
from models import depthwise
assert "triton" in depthwise.TRITON_ERROR
for use in (models.describe_implementation, lambda: models.DepthwiseConv2d(2, 13)):
    try:
        use()
    except ValueError as error:
        print(error)
os.environ["UNIREPLKNET_DEPTHWISE"] = "auto"
print(models.describe_implementation("cuda", torch.bfloat16))
print(models.DepthwiseConv2d(2, 13)(torch.ones(1, 2, 9, 9)).shape)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "UNIREPLKNET_DEPTHWISE": "cudnn"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("got 'cudnn'; correct it or unset it") == 2
    assert "not triton: ModuleNotFoundError" in result.stdout and "[1, 2, 9, 9]" in result.stdout


def test_the_report_examines_every_shape(monkeypatch, capsys, tmp_path):
    for name, value in dict(MODEL="unireplknet_test", IMG_SIZE=32, BATCH_SIZE=1, DEVICE="cpu").items():
        monkeypatch.setattr(conv_report, name, value)
    monkeypatch.setattr(conv_report.examine, "__defaults__", (1,))  # repeats
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with depthwise_choice.installed({}):
        conv_report.main()
    lines, measured = capsys.readouterr().out.split("every method, ms |")
    lines = lines.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and "channels" not in line]
    assert rows[0][0] == "| 8, 8 x 8, 3, 1" and len(rows) == 18
    for row in rows:
        assert row[1] == "pytorch" and float(row[2]) < 1e-5 and row[3:5] == ["-", "-"] and float(row[5].split()[0]) > 0
    assert "18 of 18 shapes not triton: " in "\n".join(lines)
    rows = [line.split(" | ") for line in measured.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 * 18 and rows[0][:2] == ["| 8, 8 x 8, 3, 1", "output"]
    for row in rows:
        methods = [cell.split()[0] for cell in row[3].removesuffix(" |").split(", ")]
        assert len(methods) > 4 and "nhwc" in row[3] and row[2] in ("default", "stacked", *methods)
    assert len(re.findall(r": default [\d.]+ ms, chosen [\d.]+ ms, [\d.]+ x", measured)) == 5
    assert re.search(r"^kernels     .*(as measured before|default)", measured, re.MULTILINE)


def test_the_report_refuses_an_unknown_network(monkeypatch):
    monkeypatch.setattr(conv_report, "MODEL", "resnet18")
    with pytest.raises(ConstantError, match="MODEL must be one of unireplknet_a, .*, got 'resnet18'"):
        conv_report.main()


@pytest.mark.parametrize(("option", "value"), [("--img-size", "16"), ("--amp", "int8"), ("--batch-size", "0")])
def test_the_report_s_constants_declare_what_they_accept(option, value):
    with pytest.raises(ConstantError, match=f"{value}.*set by {option}"):
        set_constants(dict(vars(conv_report)), [option, value])
