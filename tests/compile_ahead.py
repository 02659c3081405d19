"""Compile the Triton kernels ahead of time for several GPUs, and check that registers and shared memory suffice.

    python tests/compile_ahead.py                        every shape of unireplknet_t and _s at 224 and 384 pixels
    python tests/compile_ahead.py --models unireplknet_xl --sizes 224

Prints for each kernel and generation of GPUs (compute capability 8.0 A100, 9.0 H100, 10.0 B200, 12.0 RTX 50), with the
first shape that needs it, the registers of a thread, the bytes that spill out of them, and the shared memory, from the
assembler that comes with Triton, and the products that lack a fence. Exit status 1 if anything spills, a program needs
more shared memory than the GPU has, or a fence is missing.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated
from unittest import mock

import timm
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/, tools/
from common.options import ConstantError, ImageSize, Name, NotEmpty, PositiveInt, run
from models import VARIANTS
from models import depthwise_triton as kernels
from tools.conv_report import find_shapes

MODELS: Annotated[list[Name], NotEmpty()] = ["unireplknet_t", "unireplknet_s"]  # networks whose shapes to compile
SIZES: Annotated[list[ImageSize], NotEmpty()] = [224, 384]  # image sizes in pixels
BATCH_SIZE: PositiveInt = 128  # images per batch

# Bytes that one program can have, for each compute capability.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
ASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def main():
    unknown = [name for name in MODELS if name not in VARIANTS]
    if unknown:
        raise ConstantError(f"MODELS must hold names out of {', '.join(VARIANTS)}, got {unknown[0]!r}")
    shapes = {}  # keys only, in order
    for name in MODELS:
        for size in SIZES:
            with torch.device("meta"):
                shapes |= dict.fromkeys(find_shapes(timm.create_model(name), size))
    misfits = check(shapes, BATCH_SIZE, torch.bfloat16)
    print(f"{len(shapes)} shapes, {len(misfits)} kernels do not fit", *misfits, sep="\n")
    return 1 if misfits else 0


def check(shapes, batch_size, dtype, capabilities=tuple(SHARED_MEMORY)):
    """Compile for every shape (channels, height, width, kernel, dilation) and print a line for each kernel.

    Returns:
        The lines of the kernels that do not fit.
    """
    misfits = []
    seen = set()
    for shape in shapes:
        for capability in capabilities:
            for kernel, arguments, options in launches(batch_size, *shape, dtype, capability):
                key = capability, *specialize(kernel, arguments, options)[0]
                if key in seen:
                    continue
                seen.add(key)
                usage = compile_kernel(kernel, arguments, options, capability)
                line = f"{shape} {kernel.__name__} for {capability}: " + ", ".join(f"{k} {v}" for k, v in usage.items())
                print(line, flush=True)
                if usage["spilled"] or usage["unfenced"] or usage["shared"] > SHARED_MEMORY[capability]:
                    misfits.append(line)
    return misfits


def launches(batch_size, channels, height, width, kernel_size, dilation, dtype, capability=80):
    """What a training step launches for one convolution on a GPU of this compute capability, in order.

    Returns:
        [(kernel, {parameter: a value, or a tensor on the device "meta"}, options of the compiler)].
    """
    found = []

    def record(kernel, *values, grid, warmup, **named):
        arguments = dict(zip((parameter.name for parameter in kernel.params), values))
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        found.append((kernel, arguments | named, options))

    x = torch.empty(batch_size, channels, height, width, dtype=dtype, device="meta")
    weight = torch.empty(channels, 1, kernel_size, kernel_size, device="meta")
    with (
        mock.patch.object(triton.JITFunction, "run", record),
        mock.patch.object(kernels, "find_capability", lambda device: divmod(capability, 10)),
    ):
        kernels.convolve(x, weight, None, dilation, False)
        kernels.convolve(x, weight, None, dilation, True)
        kernels.weight_gradient(x, x, kernel_size, dilation)
    return found


def specialize(kernel, arguments, options):
    """What of a launch goes into the machine code: launches for which that is equal share it.

    Returns:
        (key, signature, constants, attributes), the latter three as `triton.compiler.ASTSource` takes them.
    """
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = DTYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    key = kernel.__name__, *map(str, (signature, constants, attributes, options))
    return key, signature, constants, attributes


def compile_kernel(kernel, arguments, options, capability):
    """Compile `kernel` as a launch of `launches` would for a GPU of this compute capability, such as 80.

    Returns:
        dict: registers per thread, bytes on its stack (spilled), bytes of shared memory per program, number of products
        whose factors are not fenced.
    """
    source = ASTSource(kernel, *specialize(kernel, arguments, options)[1:])
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [ASSEMBLER, "--dump-resource-usage", binary], check=True, capture_output=True, encoding="utf-8"
        ).stdout
    usage = dict(word.split(":")[:2] for word in text.split() if word.count(":") == 1 and word[-1].isdigit())
    return dict(
        registers=int(usage["REG"]),
        spilled=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared=compiled.metadata.shared,
        unfenced=count_unfenced(compiled.asm["ptx"]),
    )


def count_unfenced(ptx):
    """Products on tensor cores that read shared memory which was written since the last proxy fence, in a PTX text.

    Those of compute capability 9 (wgmma) and 10 (tcgen05) see by a proxy of their own what other instructions have
    written; those before (mma.sync) read registers, and need no fence.
    """
    unfenced, count = False, 0
    for line in ptx.splitlines():
        if "fence.proxy.async" in line:
            unfenced = False
        elif re.search(r"\bst\.shared|\bcp\.async\.(c[ag]|wait)", line):
            unfenced = True
        elif re.search(r"\bwgmma\.mma_async|\btcgen05\.mma\b", line):
            count += unfenced
    return count


if __name__ == "__main__":
    run(main)
