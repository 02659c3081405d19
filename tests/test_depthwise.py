"""The large-kernel convolution: which implementation runs, and that it computes what nn.Conv2d computes."""

import sys
import types

import pytest
import torch
from torch import nn

from models import depthwise, depthwise_cpu
from models.depthwise import DepthwiseConv2d, describe_implementation, why_not_implicit_gemm


@pytest.fixture(autouse=True)
def forget_the_import():
    depthwise.import_implicit_gemm.cache_clear()
    yield
    depthwise.import_implicit_gemm.cache_clear()


class DepthWiseConv2dImplicitGEMM(nn.Conv2d):
    """Stands in for the extension's class, which computes the same on CUDA; marks its results by adding 1000."""

    def forward(self, x):
        return (
            nn.functional.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2, groups=x.shape[1])
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
    """Paddings above 6 and strides above 3 take ways of their own."""
    x = torch.randn(3, 5, 21, 18).to(memory_format=layout)
    weight, grad = torch.randn(5, 1, kernel_size, kernel_size), torch.randn(3, 5, 21, 18)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        inputs = [tensor.bfloat16().to(dtype).requires_grad_() for tensor in (x, weight)]
        out = depthwise_cpu.depthwise_conv2d(*inputs, dilation)
        results.append([out, *torch.autograd.grad(out, inputs, grad.bfloat16().to(dtype))])
    for expected, actual in zip(*results):
        assert actual.dtype == torch.bfloat16
        assert (actual - expected).abs().max() < 2e-2 * expected.abs().max()


def test_the_operator_is_a_sound_citizen_of_pytorch():
    for height, width, kernel_size, dilation in ((8, 8, 5, 1), (9, 6, 3, 2), (9, 8, 3, 1), (8, 9, 3, 7), (9, 9, 3, 4)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(3, 1, kernel_size, kernel_size, dtype=torch.float64, requires_grad=True)
        torch.library.opcheck(depthwise_cpu.depthwise_conv2d, (x, weight, dilation))
        operator = lambda x, weight, dilation=dilation: depthwise_cpu.depthwise_conv2d(x, weight, dilation)  # noqa: E731
        assert torch.autograd.gradcheck(operator, (x, weight))
        assert torch.autograd.gradgradcheck(operator, (x, weight))
        layout = x.detach().to(memory_format=torch.channels_last).requires_grad_()
        for tensor in (x, layout):
            compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
            compiled(tensor, weight).square().sum().backward()
        torch.testing.assert_close(layout.grad, x.grad)


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="odd"):
        DepthwiseConv2d(4, 12)


def test_the_extension_is_used_where_it_fits(extension):
    conv = DepthwiseConv2d(1, 13)
    for dtype in (torch.float16, torch.float32):
        assert why_not_implicit_gemm(conv, "cuda", dtype) == ""
    assert describe_implementation("cuda", torch.float16).startswith("depthwise_conv2d_implicit_gemm")


@pytest.mark.parametrize(
    ("conv", "device", "dtype", "contiguous", "reason"),
    [
        (DepthwiseConv2d(1, 5), "cuda", torch.float16, True, "larger than 5"),
        (DepthwiseConv2d(1, 7, dilation=2), "cuda", torch.float16, True, "dilation"),
        (DepthwiseConv2d(1, 13), "cpu", torch.float16, True, "on cpu"),
        (DepthwiseConv2d(1, 13), "cuda", torch.bfloat16, True, "not bfloat16"),
        (DepthwiseConv2d(1, 13), "cuda", torch.float64, True, "not float64"),
        (DepthwiseConv2d(1, 13), "cuda", torch.float16, False, "contiguous"),
    ],
)
def test_the_extension_is_not_used_where_it_does_not_fit(extension, conv, device, dtype, contiguous, reason):
    assert reason in why_not_implicit_gemm(conv, device, dtype, contiguous)


def test_the_real_import_error_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "depthwise_conv2d_implicit_gemm", None)
    assert "ModuleNotFoundError" in describe_implementation("cuda", torch.float16)
    assert "ModuleNotFoundError" in describe_implementation("cpu", torch.float32)
    assert "on cpu" in describe_implementation("cpu", torch.float32)


def test_a_broken_build_is_told_and_passed_over(monkeypatch, tmp_path):
    broken = "raise OSError('libcudart.so.11.0: cannot open shared object file')"
    (tmp_path / "depthwise_conv2d_implicit_gemm.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    assert "OSError: libcudart.so.11.0" in describe_implementation("cuda", torch.float16)
    DepthwiseConv2d(2, 13)(torch.zeros(1, 2, 8, 8))


def test_the_extension_gets_the_module_s_own_parameters(extension, monkeypatch):
    """On the CPU the device check has to be taken out of the way; the call itself is the real one."""
    conv = DepthwiseConv2d(3, 13, bias=True)
    x = torch.randn(1, 3, 20, 20)
    expected = conv(x)
    monkeypatch.setattr(depthwise, "why_not_implicit_gemm", lambda *_: "")
    torch.testing.assert_close(conv(x), expected + 1000)
    conv.attempt_use_lk_impl = False
    torch.testing.assert_close(conv(x), expected)
