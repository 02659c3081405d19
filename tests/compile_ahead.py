"""Compile the Triton kernels ahead of time for several GPUs, and check that registers and shared memory suffice.

    python tests/compile_ahead.py                        every shape of unireplknet_t and _s at 224 and 384 pixels
    python tests/compile_ahead.py --models unireplknet_xl --sizes 224

Prints for each kernel, shape and generation of GPUs (compute capability 8.0 A100, 9.0 H100, 12.0 RTX 50) the registers
of a thread, the bytes that spill out of them, and the shared memory, from the assembler that comes with Triton. Exit
status 1 if anything spills or a program needs more shared memory than the GPU has.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

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

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # bytes that one program can have, for each capability
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
    for shape in shapes:
        for kernel, arguments in launches(batch_size, *shape, dtype):
            for capability in capabilities:
                usage = compile_kernel(kernel, arguments, capability)
                line = f"{shape} {kernel.__name__} for {capability}: " + ", ".join(f"{k} {v}" for k, v in usage.items())
                print(line, flush=True)
                if usage["spilled"] or usage["shared"] > SHARED_MEMORY[capability]:
                    misfits.append(line)
    return misfits


def launches(batch_size, channels, height, width, kernel_size, dilation, dtype):
    """The kernels that one convolution and its gradients launch: [(kernel, arguments of `compile_kernel`)]."""
    common = dict(C=channels, H=height, W=width, K=kernel_size, DILATION=dilation)
    blocks, number, plan = kernels.plan_convolution(batch_size, height, width, kernel_size, dilation)
    lines, length = blocks.band
    spread = dict(weight=torch.float32, band=dtype, SIZE=lines * length, FLIP=True, LENGTH=length, CHUNK=1024)
    arguments = dict(x=dtype, band=dtype, bias=torch.float32, y=dtype, blocks=number)
    found = [
        (kernels.spread_kernel, common | blocks._asdict() | spread | dict(num_warps=4)),
        (kernels.convolve_kernel, common | blocks._asdict() | arguments | plan),
    ]
    blocks, number, splits, plan = kernels.plan_gradient(batch_size, channels, height, width, kernel_size, dilation)
    arguments = dict(x=dtype, grad=dtype, products=torch.float32, out=torch.float32, blocks=number, SPLITS=splits)
    arguments |= common | blocks._asdict() | plan | dict(TAPS=kernels.power_of_2(kernel_size))
    return [*found, (kernels.product_kernel, arguments), (kernels.gather_kernel, arguments)]


def compile_kernel(kernel, arguments, capability):
    """Compile `kernel` as a launch with these arguments would.

    Args:
        kernel: a function of `models/depthwise_triton.py`.
        arguments: {name: value}, a dtype for a pointer; `num_warps` besides.
        capability: 80, 90 or 120.

    Returns:
        dict: registers per thread, bytes on its stack (spilled), bytes of shared memory per program.
    """
    arguments = dict(arguments)
    options = dict(num_warps=arguments.pop("num_warps"))
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.dtype):
            signature[parameter.name] = DTYPES[value]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or value == 1:
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [ASSEMBLER, "--dump-resource-usage", binary], check=True, capture_output=True, encoding="utf-8"
        ).stdout
    usage = dict(word.split(":")[:2] for word in text.split() if word.count(":") == 1 and word[-1].isdigit())
    spilled = int(usage["STACK"]) + int(usage["LOCAL"])
    return dict(registers=int(usage["REG"]), spilled=spilled, shared=compiled.metadata.shared)


if __name__ == "__main__":
    run(main)
