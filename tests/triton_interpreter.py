"""The Triton kernels against PyTorch's convolution, in Triton's interpreter, which needs no GPU.

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreter.py

Triton reads the variable when it is imported, so these tests run in a process of their own; test_depthwise_triton.py
starts it. bfloat16 is left out: the interpreter multiplies it wrongly, and says nothing.
"""

import copy
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"

from models import depthwise, depthwise_triton  # noqa: E402
from models.depthwise import DepthwiseConv2d  # noqa: E402
from models.depthwise_triton import CHUNK, MAX_PIXELS, MAX_PIXELS_GRADIENT, cut  # noqa: E402

MAPS = [(1, 1), (7, 7), (8, 8), (1, 9), (14, 14), (13, 5), (10, 28), (3, 57), (2, 128), (9, 40)]
KERNELS = (3, 5, 7, 9, 11, 13, 15, 17)
GRID = [(kernel, dilation) for place, kernel in enumerate(KERNELS) for dilation in range(1 + place % 3, 8, 3)]
GRID += [(31, 1), (23, 2)]
CASES = [(*MAPS[place * 3 % len(MAPS)], *shape) for place, shape in enumerate(GRID)]
CASES += [(*size, 13, 1) for size in MAPS] + [(28, 28, 13, 1), (28, 28, 3, 5), (56, 56, 3, 1), (17, 33, 7, 2)]


def compare(x, weight, bias, dilation, tolerance):
    """Assert that output and all gradients are those of `F.conv2d` in float64, relative to the largest value."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    padding = weight.shape[-1] // 2 * dilation
    expected = F.conv2d(exact[0], exact[1], *exact[2:], padding=padding, dilation=dilation, groups=x.shape[1])
    actual = depthwise_triton.depthwise_conv2d(*inputs, *[None] * (bias is None), dilation)
    assert actual.dtype == x.dtype and actual.is_contiguous()
    seed = torch.randn_like(expected).to(x.dtype)
    pairs = zip(
        [actual, *torch.autograd.grad(actual, inputs, seed)],
        [expected, *torch.autograd.grad(expected, exact, seed.double())],
    )
    for ours, theirs in pairs:
        scale = max(theirs.abs().max().item(), 1e-3)
        torch.testing.assert_close(ours.double() / scale, theirs / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("height", "width", "kernel_size", "dilation"), CASES)
def test_equals_conv2d(height, width, kernel_size, dilation):
    torch.manual_seed(0)
    x = torch.randn(2, 2, height, width)
    weight, bias = torch.randn(2, 1, kernel_size, kernel_size), torch.randn(2)
    compare(x, weight, bias if dilation % 2 else None, dilation, 1e-5)


@pytest.mark.parametrize(("height", "width", "kernel_size", "dilation"), CASES[::5])
def test_float16_has_its_rounding_only(height, width, kernel_size, dilation):
    """Values that float16 holds exactly, so that only the results are rounded; sums are float32."""
    torch.manual_seed(0)
    x = torch.randint(-8, 9, (1, 2, height, width)).half()
    weight = torch.randint(-8, 9, (2, 1, kernel_size, kernel_size)) / 8
    compare(x / 8, weight.half(), None, dilation, 1e-3)
    compare(x / 8, weight.float(), torch.randn(2), dilation, 1e-3)


def test_many_pictures_take_several_tiles_and_splits():
    pictures, edge = 40, 28
    _, number, splits, arguments = depthwise_triton.plan_gradient(pictures, 1, edge, edge, 5, 1)
    assert splits > 1 and number > arguments["TILE"] * splits and number % arguments["TILE"]
    assert depthwise_triton.plan_convolution(pictures, edge, edge, 5, 1)[1] > depthwise_triton.MAX_TILE
    compare(torch.randn(pictures, 1, edge, edge), torch.randn(1, 1, 5, 5), torch.randn(1), 1, 2e-6)


def test_every_layout_is_taken():
    x = torch.randn(2, 4, 9, 10)
    weight = torch.randn(4, 1, 5, 5)
    expected = F.conv2d(x, weight, padding=2, groups=4)
    layouts = [x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]
    layouts.append(torch.randn(2, 8, 9, 10).copy_(x.repeat_interleave(2, 1))[:, ::2])
    for layout in layouts:
        assert not layout.is_contiguous()
        compare(layout, weight, None, 1, 2e-6)
    strided = torch.randn(4, 1, 9, 9)
    strided[:, :, 2:7, 2:7] = weight
    torch.testing.assert_close(depthwise_triton.depthwise_conv2d(x, strided[:, :, 2:7, 2:7], None, 1), expected)
    assert depthwise_triton.depthwise_conv2d(x[:0], weight, None, 1).shape == (0, 4, 9, 10)
    assert not depthwise_triton.depthwise_weight(x[:0], x[:0], 5, 1).any()


def test_what_lies_outside_of_a_block_does_not_leak_in():
    """Neighbouring channels and pictures are NaN; the kernel's own is finite."""
    for height, width in ((7, 7), (9, 28)):
        x = torch.full((3, 3, height, width), float("nan"))
        x[1, 1] = torch.randn(height, width)
        weight = torch.full((3, 1, 5, 5), float("nan"))
        weight[1] = torch.randn(1, 5, 5)
        out = depthwise_triton.depthwise_conv2d(x, weight, None, 1)
        torch.testing.assert_close(out[1, 1], F.conv2d(x[1:2, 1:2], weight[1:2], padding=2)[0, 0])


@pytest.mark.parametrize("dilation", [1, 2])
def test_the_operators_are_sound_citizens_of_pytorch(dilation):
    x, grad = (torch.randn(2, 3, 8, 6, requires_grad=True) for _ in range(2))
    weight, bias = torch.randn(3, 1, 5, 5, requires_grad=True), torch.randn(3, requires_grad=True)
    opcheck(depthwise_triton.depthwise_conv2d, (x, weight, bias, dilation, False))
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    opcheck(depthwise_triton.depthwise_conv2d, (x, weight, None, dilation, True))
    opcheck(depthwise_triton.depthwise_weight, (x, grad, 5, dilation))


def network(wish="triton"):
    torch.manual_seed(0)
    return nn.Sequential(
        DepthwiseConv2d(4, 13, bias=True, attempt_use_lk_impl=wish),
        nn.BatchNorm2d(4),
        DepthwiseConv2d(4, 3, 3, attempt_use_lk_impl=wish),
    )


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_a_network_is_the_same_compiled_copied_pickled_and_distributed(tmp_path):
    model, x = network(), torch.randn(2, 4, 12, 9)
    assert depthwise.choose(13, 1, x.device, x.dtype, True, model[0].wish) == "triton"
    expected = gradients(network("pytorch"), x)
    assert list(model.state_dict()) == list(network("pytorch").state_dict())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    twins = [
        model,
        torch.compile(network(), fullgraph=True, backend="aot_eager"),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        nn.parallel.DistributedDataParallel(network()),
    ]
    for twin in twins:
        torch.testing.assert_close(gradients(twin, x), expected, rtol=1e-4, atol=1e-6)
    torch.distributed.destroy_process_group()


def test_autocast_gives_its_dtype_and_full_precision_weight_gradients():
    model, x = network(), torch.randn(2, 4, 12, 9)
    with torch.autocast("cpu", torch.float16):
        assert model[0](x).dtype == torch.float16
        actual = gradients(model, x)
    assert {gradient.dtype for gradient in actual} == {torch.float32}
    torch.testing.assert_close(actual[0], gradients(network("pytorch"), x)[0], rtol=0.02, atol=2e-3)


def test_export_falls_back_to_pytorch_s_own_operators():
    model, x = network().eval(), torch.randn(1, 4, 8, 8)
    exported = torch.export.export(model, (x,))
    assert not [node for node in exported.graph.nodes if "unireplknet" in str(node.target)]
    traced = torch.jit.trace(model, x)
    for other in (exported.module(), traced):
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


def test_blocks_cover_the_map_once_and_windows_all_taps():
    for height, width, kernel_size, dilation in CASES:
        for limit in (MAX_PIXELS, MAX_PIXELS_GRADIENT):
            blocks = cut(height, width, kernel_size, dilation, CHUNK, limit)
            assert blocks.pixels <= limit and dilation % blocks.STEP == 0
            assert blocks.ROWS * blocks.STEP * blocks.GROUPS >= height and blocks.COLUMNS * blocks.TILES >= width


def test_the_choice(monkeypatch):
    cpu = torch.device("cpu")
    assert depthwise.choose(13, 1, cpu, torch.float32) == "pytorch"  # the interpreter is no one's choice
    monkeypatch.setattr(depthwise, "FORCED", "triton")
    assert depthwise.choose(13, 1, cpu, torch.float32, wish="pytorch") == "triton"
    assert depthwise.choose(13, 1, cpu, torch.float64) == "pytorch"
    assert depthwise.choose(33, 1, cpu, torch.float32) == "pytorch"
    assert "float16 and float32" in depthwise.explain(13, 1, cpu, torch.float64)[1]["triton"]
