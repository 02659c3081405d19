"""The Triton kernels against PyTorch's convolution, in Triton's interpreter, which needs no GPU.

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreter.py

Triton reads the variable when it is imported, so these tests run in a process of their own; test_depthwise_triton.py
starts it. bfloat16 is not tested: the interpreter multiplies it incorrectly, without an error.
"""

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.library import opcheck

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"

from models import UniRepLKNetBlock, depthwise, depthwise_triton  # noqa: E402
from models.depthwise import DepthwiseConv2d  # noqa: E402
from models.depthwise_triton import CHUNK, MAX_PIXELS, MAX_PIXELS_GRADIENT, cut  # noqa: E402

GOLDEN = Path(__file__).resolve().parent / "golden"
MAPS = [(1, 1), (7, 7), (8, 8), (1, 9), (14, 14), (13, 5), (10, 28), (3, 57), (2, 128), (9, 40)]
KERNELS = (3, 5, 7, 9, 11, 13, 15, 17, 23, 31)
# (height, width, kernel size, dilation); the interpreter takes about a second for each
CASES = [
    (1, 1, 3, 1),
    (9, 40, 5, 2),
    (2, 128, 7, 6),
    (7, 7, 9, 1),
    (1, 1, 11, 2),
    (8, 8, 13, 1),
    (14, 14, 13, 1),
    (2, 128, 13, 1),
    (13, 5, 15, 4),
    (7, 7, 17, 2),
    (1, 9, 23, 2),
    (3, 57, 31, 1),
    (56, 56, 3, 1),
    (28, 28, 3, 5),
]


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.delenv("UNIREPLKNET_DEPTHWISE", raising=False)


def branches(height, width, kernel_size, dilation):
    """What distinguishes the computation of a case, for two images: a set of facts."""
    found = {("kernel", kernel_size)}
    for name, plan in (
        ("output", depthwise_triton.plan_convolution(2, height, width, kernel_size, dilation)),
        ("gradient", depthwise_triton.plan_gradient(2, 1, height, width, kernel_size, dilation)),
    ):
        blocks, number, arguments = plan[0], plan[1], plan[-1]
        facts = dict(
            whole_lines=blocks.TILES == 1 and blocks.STEP == 1,
            rows_apart=blocks.STEP > 1,
            dilated=dilation > 1,
            several_tiles=blocks.TILES > 1,
            several_groups=blocks.GROUPS > 1,
            several_chunks=blocks.window > arguments["CHUNK"],
            partial_chunk=blocks.window % arguments["CHUNK"] > 0,
            several_programs=number > arguments["TILE"],
            partial_program=number % arguments["TILE"] > 0,
            partial_block=blocks.pixels < arguments["PIXELS"],
        )
        found |= {(name, *fact) for fact in facts.items()}
    return found


def test_the_cases_take_every_branch():
    covered = set().union(*(branches(*case) for case in CASES))
    for size in MAPS:
        for kernel_size in KERNELS:
            for dilation in range(1, 8):
                assert branches(*size, kernel_size, dilation) <= covered, (size, kernel_size, dilation)


def reference(x, weight, bias, seed, dilation):
    """Output and gradients of `F.conv2d` in float64, for the output's gradient `seed`."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    padding = weight.shape[-1] // 2 * dilation
    out = F.conv2d(*inputs[:2], *inputs[2:], padding=padding, dilation=dilation, groups=x.shape[1])
    return out, *torch.autograd.grad(out, inputs, seed.double())


def compare(x, weight, bias, dilation):
    """Assert that output and all gradients are those of float64 but for rounding.

    Each is a sum of products in float32, whose error is below 2 eps of the sum of the absolute products (in the worst
    order of n terms it could be n / 2 eps, which blocks and random signs keep far away), rounded once to its dtype.
    """
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    seed = torch.randn(x.shape).to(x.dtype)
    out = depthwise_triton.depthwise_conv2d(*inputs, *[None] * (bias is None), dilation)
    assert out.dtype == x.dtype and out.is_contiguous()
    actual = out, *torch.autograd.grad(out, inputs, seed)
    expected = reference(x, weight, bias, seed, dilation)
    absolute = reference(x.abs(), weight.abs(), None if bias is None else bias.abs(), seed.abs(), dilation)
    for ours, theirs, products in zip(actual, expected, absolute):
        kind = torch.finfo(ours.dtype)
        bound = 2 * torch.finfo(torch.float32).eps * products + kind.eps * (theirs.abs() + kind.smallest_normal)
        excess = ((ours.double() - theirs).abs() / bound).max().item()
        assert excess <= 1, f"error is {excess:.2g} times its bound"


@pytest.mark.parametrize(("height", "width", "kernel_size", "dilation"), CASES)
def test_equals_conv2d(height, width, kernel_size, dilation):
    channels = 2 if kernel_size < 9 else 1
    x = torch.randn(2, channels, height, width)
    weight, bias = torch.randn(channels, 1, kernel_size, kernel_size), torch.randn(channels)
    compare(x, weight, bias if dilation % 2 else None, dilation)


@pytest.mark.parametrize(("height", "width", "kernel_size", "dilation"), CASES[1:6:2])
def test_float16_has_its_rounding_only(height, width, kernel_size, dilation):
    """Inputs that float16 holds exactly, so that only the results are rounded; sums are float32."""
    x = torch.randint(-8, 9, (1, 1, height, width)).half()
    weight = torch.randint(-8, 9, (1, 1, kernel_size, kernel_size)) / 8
    compare(x / 8, weight.half(), None, dilation)
    compare(x / 8, weight.float(), torch.randn(1), dilation)


def test_many_images_take_several_tiles_and_splits():
    images, size = 600, 7
    _, number, splits, arguments = depthwise_triton.plan_gradient(images, 1, size, size, 3, 1)
    assert splits > 1 and number > arguments["TILE"] * splits and number % arguments["TILE"]
    assert depthwise_triton.plan_convolution(images, size, size, 3, 1)[1] > depthwise_triton.MAX_TILE
    compare(torch.randn(images, 1, size, size), torch.randn(1, 1, 3, 3), torch.randn(1), 1)


def test_every_layout_is_accepted():
    x, weight = torch.randn(2, 3, 5, 6), torch.randn(3, 1, 3, 3)
    layouts = [x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]
    layouts.append(torch.randn(2, 6, 5, 6).copy_(x.repeat_interleave(2, 1))[:, ::2])
    for layout in layouts:
        assert not layout.is_contiguous()
        compare(layout, weight, None, 1)
    strided = torch.randn(3, 1, 7, 7)
    strided[:, :, 2:5, 2:5] = weight
    compare(x, strided[:, :, 2:5, 2:5], None, 1)
    assert depthwise_triton.depthwise_conv2d(x[:0], weight, None, 1).shape == (0, 3, 5, 6)
    assert not depthwise_triton.depthwise_weight(x[:0], x[:0], 3, 1).any()


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_the_golden_blocks(kernel_size, monkeypatch):
    """Training structure and merged, within 1e-5 of the largest value of the authors' implementation."""
    monkeypatch.setenv("UNIREPLKNET_DEPTHWISE", "triton")
    tensors = load_file(GOLDEN / f"block_k{kernel_size}.safetensors")
    block = UniRepLKNetBlock(8, kernel_size).eval()
    state = {name.removeprefix("state_dict/"): t for name, t in tensors.items() if name.startswith("state_dict/")}
    block.load_state_dict(state)
    with torch.no_grad():
        for network, name in ((block, "eval/output"), (block.fuse(), "deploy/output")):
            expected = tensors[name]
            assert (network(tensors["input"]) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_lies_outside_of_a_block_does_not_leak_in():
    """Neighbouring channels and images are NaN; the kernel's own is finite."""
    for height, width in ((7, 7), (9, 28)):
        x = torch.full((3, 3, height, width), float("nan"))
        x[1, 1] = torch.randn(height, width)
        weight = torch.full((3, 1, 5, 5), float("nan"))
        weight[1] = torch.randn(1, 5, 5)
        out = depthwise_triton.depthwise_conv2d(x, weight, None, 1)
        expected = F.conv2d(x[1:2, 1:2], weight[1:2], padding=2)[0, 0]
        bound = 25 * torch.finfo(torch.float32).eps * x[1, 1].abs().max() * weight[1].abs().sum()  # of 25 products
        assert (out[1, 1] - expected).abs().max() < bound


def test_the_operators_meet_the_rules_of_torch_library():
    x, grad = (torch.randn(1, 2, 4, 5, requires_grad=True) for _ in range(2))
    weight, bias = torch.randn(2, 1, 3, 3, requires_grad=True), torch.randn(2, requires_grad=True)
    basic = ("test_schema", "test_faketensor")
    opcheck(depthwise_triton.convolution_operator, (x, weight, None, 1, False), test_utils=basic)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    opcheck(depthwise_triton.convolution_operator, (x, weight, bias, 2, True))
    opcheck(depthwise_triton.weight_operator, (x, grad, 3, 2))


def network(wish="triton"):
    torch.manual_seed(0)
    return nn.Sequential(
        DepthwiseConv2d(2, 7, bias=True, attempt_use_lk_impl=wish),
        nn.BatchNorm2d(2),
        DepthwiseConv2d(2, 3, 3, attempt_use_lk_impl=wish),
    )


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_a_network_is_the_same_compiled_copied_pickled_and_distributed(tmp_path):
    model, x = network(), torch.randn(2, 2, 6, 5)
    assert depthwise.choose(7, 1, x.device, x.dtype, True, model[0].wish) == "triton"
    expected = gradients(network("pytorch"), x)
    assert list(model.state_dict()) == list(network("pytorch").state_dict())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    twins = [
        model,
        torch.compile(network(), fullgraph=True, backend="aot_eager"),
        pickle.loads(pickle.dumps(copy.deepcopy(model))),
        nn.parallel.DistributedDataParallel(network()),
    ]
    for twin in twins:
        torch.testing.assert_close(gradients(twin, x), expected, rtol=1e-4, atol=1e-6)
    torch.distributed.destroy_process_group()


def test_autocast_gives_its_dtype_and_full_precision_weight_gradients():
    model, x = network(), torch.randn(2, 2, 6, 5)
    with torch.autocast("cpu", torch.float16):
        assert model[0](x).dtype == torch.float16
        actual = gradients(model, x)
    assert {gradient.dtype for gradient in actual} == {torch.float32}
    torch.testing.assert_close(actual[0], gradients(network("pytorch"), x)[0], rtol=0.02, atol=2e-3)


def test_export_falls_back_to_pytorch_s_own_operators():
    model, x = network().eval(), torch.randn(1, 2, 6, 5)
    exported = torch.export.export(model, (x,))
    assert not [node for node in exported.graph.nodes if "unireplknet" in str(node.target)]
    traced = torch.jit.trace(model, x)
    for other in (exported.module(), traced):
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


def test_blocks_cover_the_map_once_and_windows_all_taps():
    grid = [(*size, kernel, dilation) for size in [*MAPS, (56, 56)] for kernel in KERNELS for dilation in range(1, 8)]
    for height, width, kernel_size, dilation in grid:
        for limit in (MAX_PIXELS, MAX_PIXELS_GRADIENT):
            blocks = cut(height, width, kernel_size, dilation, CHUNK, limit)
            assert blocks.pixels <= limit and dilation % blocks.STEP == 0
            assert blocks.ROWS * blocks.STEP * blocks.GROUPS >= height and blocks.COLUMNS * blocks.TILES >= width


def test_the_choice(monkeypatch):
    cpu = torch.device("cpu")
    assert depthwise.choose(13, 1, cpu, torch.float32) == "pytorch"  # the interpreter is never chosen
    assert depthwise.explain(13, 1, cpu, torch.float32)[1]["triton"].startswith("Triton's interpreter runs only")
    monkeypatch.setenv("UNIREPLKNET_DEPTHWISE", "triton")
    assert depthwise.choose(13, 1, cpu, torch.float32, wish="pytorch") == "triton"
    assert depthwise.choose(13, 1, cpu, torch.float64) == "pytorch"
    assert depthwise.choose(33, 1, cpu, torch.float32) == "pytorch"
    assert "float16 and float32" in depthwise.explain(13, 1, cpu, torch.float64)[1]["triton"]
