"""How many images fit into the memory of a GPU in training, computed without a GPU.

    python benchmarks/memory.py                                            all nine variants at 224 pixels
    python benchmarks/memory.py --models unireplknet_t --img-size 384 --amp off

Adds up weights, gradients, the state of the optimizer, the moving average and the tensors that autograd saves for the
backward pass, from a forward pass on tensors without data that pretend to be on a GPU. Beside them it leaves RESERVED
for CUDA itself and the working memory of the kernels, and SPARE of all memory for what PyTorch cannot use, since it is
in pieces. The batch is the largest power of 2 up to MAX_BATCH. Nothing is measured: `benchmarks/gpu.py` does that.

Prints a Markdown table.
"""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/, tools/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import timm
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from common.options import ConstantError, ImageSize, Name, NotEmpty, Positive, PositiveInt, UserError, run
from models import VARIANTS
from tools.conv_report import DTYPES, forced

MODELS: list[Name] | None = None  # UniRepLKNet variants; None: all nine
IMG_SIZE: ImageSize = 224  # image size in pixels
AMP: Literal["bf16", "fp16", "off"] = "bf16"  # mixed precision; "off": float32
GRAD_CHECKPOINTING: bool = False  # as in train.py
OPTIMIZER_STATES: PositiveInt = 1  # tensors of the size of the weights that the optimizer keeps: muon 1, adamw 2
MEMORIES: Annotated[list[Positive], NotEmpty()] = [6.0, 8.0, 12.0, 24.0]  # memory of the GPUs in GB
RESERVED: Positive = 0.8  # GB that CUDA and the kernels take
SPARE: Positive = 0.1  # fraction of the memory that stays unused
MAX_BATCH: PositiveInt = 1024  # images

CLASSES = 12


def main():
    names = MODELS or list(VARIANTS)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ConstantError(f"MODELS must hold names out of {', '.join(VARIANTS)}, got {unknown[0]!r}")
    if torch.__version__ < "2.10":
        raise UserError(f"PyTorch {torch.__version__} aborts on tensors that pretend to be on a GPU; 2.10 does not")
    print(f"{IMG_SIZE} pixels, {AMP}, computed, not measured (torch {torch.__version__})\n")
    memories = "".join(f" batch in {memory:g} GB |" for memory in MEMORIES)
    print(f"| variant | weights and optimizer / GB | MB/image |{memories}\n|---|---|---|{'---|' * len(MEMORIES)}")
    for name in names:
        fixed, saved = measure(name, IMG_SIZE, DTYPES[AMP], GRAD_CHECKPOINTING, OPTIMIZER_STATES)
        usable = [(1 - SPARE) * memory - RESERVED for memory in MEMORIES]
        batches = (min(find_batch(memory, fixed / 1e9, saved / 1e9), MAX_BATCH) for memory in usable)
        cells = [f"`{name}`", f"{fixed / 1e9:.2f}", f"{saved / 1e6:.0f}", *(str(batch or "-") for batch in batches)]
        print(f"| {' | '.join(cells)} |")


def find_batch(memory, fixed, saved):
    """The largest power of 2 of images that fits, or 0.

    Args:
        memory: GB that may be used.
        fixed: GB that do not depend on the batch.
        saved: GB of an image.
    """
    images = int((memory - fixed) / saved)
    return 1 << images.bit_length() - 1 if images > 0 else 0


def measure(name, img_size, dtype, grad_checkpointing, optimizer_states):
    """Bytes that do not depend on the batch (weights, gradients, optimizer, moving average, weights in `dtype`), and
    bytes of an image."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.1).train()
    model.set_grad_checkpointing(grad_checkpointing)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    two, four = (saved_bytes(model, images, img_size, dtype) for images in (2, 4))
    return weights * (3 + optimizer_states) + 2 * two - four, (four - two) / 2


def saved_bytes(model, images, img_size, dtype):
    """Bytes of the tensors that a forward pass of so many images saves, weights aside; each memory counts once."""
    saved = {}
    # The Triton kernels save what PyTorch's convolution saves, and cannot be asked for here.
    with FakeTensorMode(), torch.device("cuda"), forced("pytorch"):
        tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        own = {tensor.untyped_storage()._cdata for tensor in tensors.values()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = tensor, storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor), pretended_autocast(dtype):
            functional_call(model, tensors, (torch.empty(images, 3, img_size, img_size),))
    return sum(size for _, size in saved.values())


@contextlib.contextmanager
def pretended_autocast(dtype):
    """`torch.autocast("cuda", dtype)`, which turns itself off where there is no GPU; off for float32."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype != torch.float32)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.clear_autocast_cache()  # of weights without data
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


if __name__ == "__main__":
    run(main, closed_output="end")
