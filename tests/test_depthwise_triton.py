"""The Triton kernels as far as they can be tested without a GPU; see triton_interpreter.py for their numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

pytest.importorskip("triton")

from models import UniRepLKNetBlock, depthwise, depthwise_triton  # noqa: E402
from tools import conv_report  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_the_kernels_in_the_interpreter():
    """In a process of its own, in which Triton interprets its kernels, blocks against the golden vectors among them.

    The golden training step passes, too, but takes minutes in the interpreter:

    UNIREPLKNET_DEPTHWISE=triton TRITON_INTERPRET=1 python -m pytest tests/test_unireplknet.py -k golden
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "tests/triton_interpreter.py"],
        cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 25


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_on_a_gpu(dtype):
    """All shapes of unireplknet_t, extreme maps, and a compiled block; inputs are rounded alike, only sums differ."""
    if depthwise.why_not_triton(13, "cuda", dtype):
        pytest.skip(depthwise.why_not_triton(13, "cuda", dtype))
    with torch.device("meta"):
        shapes = conv_report.find_shapes(timm.create_model("unireplknet_t"), 224)
    shapes += [(3, height, width, 13, 1) for height, width in ((1, 1), (5, 33), (2, 128), (96, 96))]
    for shape in shapes:
        with conv_report.forced("triton"):
            assert conv_report.largest_error(shape, torch.device("cuda"), dtype) < 0.01, shape
    block = UniRepLKNetBlock(32, 13).cuda().train()
    x = torch.randn(4, 32, 14, 14, device="cuda")
    for network in (block, torch.compile(block, fullgraph=True)):
        results = []
        for name in ("triton", "pytorch"):
            with conv_report.forced(name), torch.autocast("cuda", dtype):
                torch.compiler.reset()
                results.append(network(x).float())
        assert (results[0] - results[1]).abs().max() < 0.05 * results[1].abs().max()


def reference(x, weight, bias, dilation, flip):
    """What `depthwise_triton.convolve` computes, by PyTorch, in any dtype."""
    weight = weight.flip(2, 3) if flip else weight
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2 * dilation, dilation=dilation, groups=x.shape[1])


def reference_weight(x, grad, kernel_size, dilation):
    """What `depthwise_triton.weight_gradient` computes, by PyTorch, in any dtype."""
    shape = (x.shape[1], 1, kernel_size, kernel_size)
    padding = kernel_size // 2 * dilation
    return conv2d_weight(x, shape, grad, padding=padding, dilation=dilation, groups=x.shape[1])


@pytest.mark.parametrize(("height", "width", "dilation"), [(6, 5, 1), (5, 8, 2)])
def test_the_formulas_of_all_gradients_in_float64(monkeypatch, height, width, dilation):
    monkeypatch.setattr(depthwise_triton, "convolve", reference)
    monkeypatch.setattr(depthwise_triton, "weight_gradient", reference_weight)
    x, grad = (torch.randn(2, 2, height, width, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    for flip in (False, True):
        operator = lambda x, w, b, flip=flip: depthwise_triton.depthwise_conv2d(x, w, b, dilation, flip)  # noqa: E731
        assert torch.autograd.gradcheck(operator, (x, weight, bias), fast_mode=True)
        assert torch.autograd.gradgradcheck(operator, (x, weight, bias), fast_mode=True)
    operator = lambda x, grad: depthwise_triton.depthwise_weight(x, grad, 5, dilation)  # noqa: E731
    assert torch.autograd.gradcheck(operator, (x, grad), fast_mode=True)


def test_kernels_compiled_ahead_of_time_spill_nothing(tmp_path, monkeypatch):
    """Three shapes of unireplknet_t at 224 pixels; compile_ahead.py compiles all of them."""
    compile_ahead = pytest.importorskip("tests.compile_ahead")
    if not compile_ahead.ASSEMBLER.is_file():
        pytest.skip("this Triton comes without NVIDIA's assembler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for shape, dtype, capability in (
        ((160, 28, 28, 13, 1), torch.bfloat16, 80),
        ((640, 7, 7, 13, 1), torch.bfloat16, 90),
        ((160, 28, 28, 3, 5), torch.float16, 120),
    ):
        assert compile_ahead.check([shape], 128, dtype, capabilities=(capability,)) == []


def test_a_kernel_that_spills_is_reported(tmp_path, monkeypatch):
    compile_ahead = pytest.importorskip("tests.compile_ahead")
    if not compile_ahead.ASSEMBLER.is_file():
        pytest.skip("this Triton comes without NVIDIA's assembler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plan = depthwise_triton.plan_convolution
    monkeypatch.setattr(
        depthwise_triton, "plan_convolution", lambda *shape: (*plan(*shape)[:2], plan(*shape)[2] | dict(num_warps=2))
    )
    misfits = compile_ahead.check([(160, 28, 28, 13, 1)], 128, torch.bfloat16, capabilities=(80,))
    assert [line for line in misfits if "convolve_kernel" in line]
