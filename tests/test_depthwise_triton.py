"""The Triton kernels as far as they can be tested without a GPU; see triton_interpreter.py for their numbers."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.nn.grad import conv2d_weight
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.fixture
def compile_ahead(tmp_path, monkeypatch):
    """tests/compile_ahead.py, which compiles anew."""
    module = pytest.importorskip("tests.compile_ahead")
    if not module.ASSEMBLER.is_file():
        pytest.skip("this Triton comes without NVIDIA's assembler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return module


def test_kernels_compiled_ahead_of_time_spill_nothing(compile_ahead):
    """Three shapes of unireplknet_t at 224 pixels; compile_ahead.py compiles all of them."""
    for shape, dtype, capability in (
        ((160, 28, 28, 13, 1), torch.bfloat16, 80),
        ((640, 7, 7, 13, 1), torch.bfloat16, 90),
        ((160, 28, 28, 3, 5), torch.float16, 120),
    ):
        assert compile_ahead.check([shape], 128, dtype, capabilities=(capability,)) == []


def test_a_kernel_that_spills_is_reported(compile_ahead, monkeypatch):
    plan = depthwise_triton.plan_convolution
    monkeypatch.setattr(
        depthwise_triton, "plan_convolution", lambda *shape: (*plan(*shape)[:2], plan(*shape)[2] | dict(num_warps=2))
    )
    misfits = compile_ahead.check([(160, 28, 28, 13, 1)], 128, torch.bfloat16, capabilities=(80,))
    assert [line for line in misfits if "convolve_kernel" in line]


def product_launch(compile_ahead, capability):
    """The launch of `product_kernel` for a shape of which both factors are copied asynchronously."""
    launches = compile_ahead.launches(128, 160, 28, 28, 13, 1, torch.bfloat16, capability)
    return next(launch for launch in launches if launch[0] is depthwise_triton.product_kernel)


@pytest.mark.parametrize("capability", [90, 100])
def test_tensor_cores_with_a_proxy_of_their_own_read_behind_a_fence(compile_ahead, capability):
    """With the installed Triton, whichever it is."""
    assert compile_ahead.compile_kernel(*product_launch(compile_ahead, capability), capability)["unfenced"] == 0


def test_a_single_stage_has_a_fence_in_every_triton(compile_ahead, monkeypatch):
    """What versions before the first one with a fence get, compiled by this one."""
    monkeypatch.setattr(depthwise_triton, "TRITON", (3, 6, 0))
    kernel, arguments, options = product_launch(compile_ahead, 90)
    assert options["num_stages"] == 1
    assert compile_ahead.compile_kernel(kernel, arguments, options, 90)["unfenced"] == 0


@pytest.mark.parametrize(
    ("version", "capability", "single"),
    [
        ("3.3.0", (9, 0), True),
        ("3.6.0+git9844da95", (9, 0), True),
        ("3.7.0", (10, 0), True),
        ("3.7.0.post26", (10, 3), True),
        ("3.6.0", (11, 0), True),
        ("3.7.1", (9, 0), False),
        ("3.8.0", (10, 0), False),
        ("4.0", (9, 0), False),
        ("3.6.0", (8, 0), False),
        ("3.6.0", (8, 9), False),
        ("3.6.0", (12, 0), False),
        ("3.6.0", None, False),
    ],
)
def test_a_single_stage_only_where_a_fence_would_be_missing(version, capability, single):
    options = depthwise_triton.stages(capability, depthwise_triton.parse_version(version))
    assert options == (dict(num_stages=1) if single else {})


@pytest.mark.parametrize(
    ("version", "capability", "refused"),
    [((3, 3, 1), (10, 0), True), ((3, 3, 0), (11, 0), True), ((3, 3, 1), (9, 0), False), ((3, 4, 0), (10, 0), False)],
)
def test_a_compiler_without_fences_is_refused(monkeypatch, version, capability, refused):
    monkeypatch.setattr(depthwise_triton, "TRITON", version)
    monkeypatch.setattr(depthwise_triton, "find_capability", lambda device: capability)
    depthwise_triton.check_compiler.cache_clear()
    try:
        if refused:
            with pytest.raises(RuntimeError, match="leaves out fences on compute capability 1[01].0; PyTorch 2.8"):
                depthwise_triton.convolve(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3), None, 1, False)
        else:
            depthwise_triton.check_compiler(torch.device("cuda"))
    finally:
        depthwise_triton.check_compiler.cache_clear()


def test_a_missing_fence_would_be_found():
    compile_ahead = pytest.importorskip("tests.compile_ahead")
    copied = "cp.async.cg.shared.global [%r1], [%rd1], 16;\ncp.async.wait_group 0;\nbar.sync 0;\n"
    fence, product = "fence.proxy.async.shared::cta;\n", "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {};\n"
    assert compile_ahead.count_unfenced(copied + product + product) == 2
    assert compile_ahead.count_unfenced("st.shared.b16 [%r1], %rs1;\n" + fence + copied + product) == 1
    assert compile_ahead.count_unfenced(copied + "@%p1 tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1;\n") == 1
    assert compile_ahead.count_unfenced(copied + fence + product + product) == 0
    assert compile_ahead.count_unfenced(copied + "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {};\n") == 0


def count_kernels(compile_ahead, sizes, batch_sizes=(128,)):
    """Kernels that a network of the shapes of unireplknet_t compiles for these image sizes: {name: number}."""
    keys = set()
    for size in sizes:
        with torch.device("meta"):
            shapes = conv_report.find_shapes(timm.create_model("unireplknet_t"), size)
        for shape in shapes:
            for batch_size in batch_sizes:
                launches = compile_ahead.launches(batch_size, *shape, torch.bfloat16)
                keys |= {compile_ahead.specialize(*launch)[0] for launch in launches}
    return Counter(key[0] for key in keys)


def test_a_first_step_compiles_few_kernels():
    """89 with every size a constant, 371 while images grow from 128 to 224 pixels."""
    compile_ahead = pytest.importorskip("tests.compile_ahead")
    counts = count_kernels(compile_ahead, [224])
    assert counts["spread_kernel"] == 2 and counts["gather_kernel"] <= 3 and counts.total() <= 33
    assert count_kernels(compile_ahead, [128, 160, 192, 224]).total() <= 120
    inference = count_kernels(compile_ahead, [224], (128, 77))  # the last batch of a validation set
    assert inference["convolve_kernel"] == counts["convolve_kernel"]


def test_eager_mode_does_without_the_operator(monkeypatch):
    """The operator takes the CPU longer; it is there for what records or replaces operators."""
    ran = []
    monkeypatch.setattr(depthwise_triton, "convolve", lambda *args: ran.append("function") or reference(*args))
    monkeypatch.setattr(depthwise_triton, "weight_gradient", reference_weight)
    x, weight = torch.randn(2, 2, 6, 5, requires_grad=True), torch.randn(2, 1, 5, 5, requires_grad=True)

    def run(x=x, weight=weight):
        return depthwise_triton.depthwise_conv2d(x, weight, None, 1)

    assert type(run().grad_fn).__name__ == "ConvolutionBackward" and ran == ["function"]
    with LoggingMode() as mode:
        assert type(run().grad_fn).__name__ != "ConvolutionBackward"
    assert mode.seen == {"unireplknet::depthwise_triton"}
    with FakeTensorMode() as fake:
        assert run(fake.from_tensor(x), fake.from_tensor(weight)).shape == x.shape
    expected = torch.autograd.grad(run().sum(), x)[0]
    compiled = torch.compile(lambda x: run(x).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)
    with torch.no_grad():
        assert run().grad_fn is None


class LoggingMode(TorchDispatchMode):
    """Notes which operators of this repository run."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "unireplknet":
            self.seen.add(func.name())
        return func(*args, **(kwargs or {}))
