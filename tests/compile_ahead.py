"""Compile the Triton kernels ahead of time for several GPUs, and see that what they need fits.

    python -m tests.compile_ahead                        every shape of unireplknet_t and _s at 224 and 384 pixels
    python -m tests.compile_ahead --models unireplknet_xl --sizes 224

For each kernel, shape and generation of GPUs (compute capability 8.0 A100, 9.0 H100, 12.0 RTX 50): registers of a
thread, bytes that spill out of them, and shared memory, from the assembler that comes with Triton. Exit status 1 if
anything spills or a program needs more shared memory than there is.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import models  # noqa: F401  registers the networks with timm
from models import depthwise_triton as kernels
from models.doctor import find_shapes

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # bytes that one program can have, for each capability
DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
ASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_kernel(kernel, arguments, capability):
    """Compile `kernel` as a launch with these arguments does.

    Args:
        kernel: a function of `models/depthwise_triton.py`.
        arguments: {name: value}, a dtype for a pointer; `num_warps` besides.
        capability: 80, 90 or 120.

    Returns:
        dict: registers of a thread, bytes on its stack (spilled), bytes of shared memory of a program.
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


def launches(pictures, channels, height, width, kernel_size, dilation, dtype):
    """The kernels that one convolution and its gradients launch: [(kernel, arguments of `compile_kernel`)]."""
    common = dict(C=channels, H=height, W=width, K=kernel_size, DILATION=dilation)
    blocks, number, plan = kernels.plan_convolution(pictures, height, width, kernel_size, dilation)
    lines, length = blocks.band
    spread = dict(weight=torch.float32, band=dtype, SIZE=lines * length, FLIP=True, LENGTH=length, CHUNK=1024)
    arguments = dict(x=dtype, band=dtype, bias=torch.float32, y=dtype, blocks=number)
    found = [
        (kernels.spread_kernel, common | blocks._asdict() | spread | dict(num_warps=4)),
        (kernels.convolve_kernel, common | blocks._asdict() | arguments | plan),
    ]
    blocks, number, splits, plan = kernels.plan_gradient(pictures, channels, height, width, kernel_size, dilation)
    arguments = dict(x=dtype, grad=dtype, products=torch.float32, out=torch.float32, blocks=number, SPLITS=splits)
    arguments |= common | blocks._asdict() | plan | dict(TAPS=kernels.power_of_2(kernel_size))
    return [*found, (kernels.product_kernel, arguments), (kernels.gather_kernel, arguments)]


def check(shapes, pictures, dtype, capabilities=tuple(SHARED_MEMORY)):
    """Compile for every shape (channels, height, width, kernel, dilation) and print a line for each kernel.

    Returns:
        Lines of those that do not fit.
    """
    misfits = []
    for shape in shapes:
        for kernel, arguments in launches(pictures, *shape, dtype):
            for capability in capabilities:
                usage = compile_kernel(kernel, arguments, capability)
                line = f"{shape} {kernel.__name__} for {capability}: " + ", ".join(f"{k} {v}" for k, v in usage.items())
                print(line, flush=True)
                if usage["spilled"] or usage["shared"] > SHARED_MEMORY[capability]:
                    misfits.append(line)
    return misfits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["unireplknet_t", "unireplknet_s"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 384])
    parser.add_argument("--pictures", type=int, default=128)
    options = parser.parse_args()
    shapes = {}
    for name in options.models:
        for size in options.sizes:
            with torch.device("meta"):
                shapes |= dict.fromkeys(find_shapes(timm.create_model(name), size))
    misfits = check(shapes, options.pictures, torch.bfloat16)
    print(f"{len(shapes)} shapes, {len(misfits)} kernels do not fit", *misfits, sep="\n")
    return 1 if misfits else 0


if __name__ == "__main__":
    sys.exit(main())
