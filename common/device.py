"""The device that a script computes on, what suits it, and how images get there."""

import ctypes
import functools
import os
import re
import sys
import time

import torch
import torch.distributed as dist

from common import gpu
from common.faults import copy_tensors, is_out_of_memory
from common.options import ConstantError


def choose_device(name):
    """The `torch.device` called `name`; "auto" takes cuda, else mps, else cpu.

    Raises:
        ConstantError: if this machine does not have it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            unusable = gpu.why_unusable(torch.device("cuda"))
            if unusable:
                raise ConstantError(f'DEVICE "auto" takes the GPU, but {unusable}, or set DEVICE to "cpu"')
            tell(gpu.describe_gpus("LOCAL_RANK" in os.environ))
            return torch.device("cuda")
        if os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):  # which are there to hide the GPUs
            tell([f"this runs without a GPU: {reason}" for reason in [gpu.find_reason()] if reason])
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()  # which "meta" refuses
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = find_reason(name) or str(error).splitlines()[0]
        raise ConstantError(f'DEVICE {name!r} is not available here ({reason}); set it to "auto" or "cpu"') from error
    return torch.device(name)


@functools.cache
def tell_once(sentence):
    print(f"note: {sentence}", file=sys.stderr)


def tell(sentences):
    """Print sentences to the user, each of them once; of several processes, one does."""
    for sentence in sentences if os.environ.get("RANK", "0") == "0" else ():
        tell_once(sentence)


def find_reason(name):
    """Why a device is not available, where its name tells; else "".

    Args:
        name: as the user wrote it, such as "cuda:7" or "gpu".
    """
    number = re.fullmatch(r"(?:gpu|cuda|nvidia)?[: ]?(\d+)?", name.strip().lower())
    if number is None:
        return "mps is the GPU of a Mac with Apple silicon" if name.lower() in ("metal", "apple", "mps") else ""
    meant = f"cuda:{number[1]}" if number[1] else "cuda"
    if name != meant:
        return f'PyTorch has no such name; did you mean "{meant}"?'
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if number[1] is None or int(number[1]) < count:
            return gpu.why_unusable(torch.device(meant))
        mig = [sentence for sentence in gpu.describe_gpus() if "MIG" in sentence]
        return "; ".join([f"the GPUs of this machine are cuda:0 to cuda:{count - 1}", *mig])
    reason = gpu.find_reason()
    if reason:
        return reason
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch was built without GPU support; https://pytorch.org says how to install one with it"
    return f"PyTorch finds no GPU here; {gpu.describe_smi()}"


def prepare_device(device, deterministic=False):
    """Process-wide settings for long work on `device`."""
    if deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this setting
        torch.use_deterministic_algorithms(True)
    # Batches have few sizes, so it pays to try cuDNN's algorithms once; which one wins can vary, though.
    torch.backends.cudnn.benchmark = not deterministic
    if device.type == "cpu":
        keep_freed_memory()


def choose_amp(name, device):
    """The dtype of autocast on `device`, or None where mixed precision is off.

    Args:
        name: "bf16", "fp16", "off", or "auto": bf16 where the device has it, else fp16 on cuda.
        device: a `torch.device`.
    """
    choices = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
    if name == "bf16" and device.type == "cuda" and not has_bfloat16(device):
        tell([f"{device} has no bfloat16 in hardware, so AMP bf16 is slow there; fp16 is faster"])
    if name in choices:
        return choices[name]
    if has_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else None


def choose_layout(device):
    """The memory format of images and weights on `device`: NHWC on a CPU, where it is faster."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def choose_workers(number, device):
    """The number of processes that read images: `number`, or for None what suits `device`.

    Beside a GPU it is one for each core, up to 8. On a CPU it is none: reading is a small part of the work there, and
    processes beside the network take the cores away from its threads, which wait for each other at every layer.
    """
    if number is not None:
        return number
    return 0 if device.type == "cpu" else min(os.cpu_count() or 1, 8)


def has_bfloat16(device):
    """Whether `device` multiplies bfloat16 matrices in hardware; CPUs do with AVX-512 BF16, AMX or Arm's BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()  # older PyTorch


def keep_freed_memory():
    """Let this process keep the memory that tensors on the CPU free, for the next ones.

    By default glibc, the C library of most Linux systems, gives large blocks back to the system at once, which fills
    them with zeros again whenever they are asked for.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks up to 1 GiB come from the heap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


class Normalise:
    """Function of the images (N, 3, H, W) of a loader, on `device` -> float32, normalised.

    Loaders hand over uint8, which takes a quarter of the memory and of the copying, and `device` computes with whole
    batches. The result has the same bits as ToTensor and Normalize of torchvision give for each image. Images in
    floating point, such as augmented spectrograms, are normalised already and returned as they are.

    Args:
        mean, std: three values each, for pixels from 0 to 1.
        device: a `torch.device`.
    """

    def __init__(self, mean, std, device):
        # On the device: a GPU would multiply by the reciprocal of a number of the CPU, which is rounded.
        self.white = torch.tensor(255.0, device=device)
        self.mean = torch.tensor(mean, device=device)[:, None, None]
        self.std = torch.tensor(std, device=device)[:, None, None]

    def __call__(self, images):
        if images.dtype != torch.uint8:
            return images
        return (images / self.white).sub_(self.mean).div_(self.std)


def prefetch(batches, device):
    """The batches (lists of tensors) on `device`; a GPU copies each while it computes with the one before.

    Reads one batch ahead. Copies overlap where the tensors are in pinned memory.
    """
    if device.type != "cuda":
        yield from batches
        return

    stream, waiting = torch.cuda.Stream(device), None

    def hand_over(tensors, copied):
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for tensor in tensors:
            tensor.record_stream(current)  # its memory was got by the other stream
        return tensors

    for batch in batches:
        with torch.cuda.stream(stream):
            coming = [tensor.to(device, non_blocking=True) for tensor in batch], stream.record_event()
        if waiting is not None:
            yield hand_over(*waiting)
        waiting = coming
    if waiting is not None:
        yield hand_over(*waiting)


def wants_compile(choice, device, steps, grad_checkpointing):
    """Whether to use torch.compile in a run of `steps` steps; it takes minutes, and saves 0.01 s a step."""
    pays = device.type == "cuda" and sys.platform == "linux" and steps >= 5000 and not grad_checkpointing
    return choice == "on" or (choice == "auto" and pays)


class NetworkForSize:
    """`model`, compiled for each image size by torch.compile where that is wanted and works.

    Args:
        model: the network, on its device.
        compiling: whether to compile.
        batch_size: images at once.
        amp: function that returns the autocast context.
    """

    def __init__(self, model, compiling, batch_size, amp):
        self.model = model
        self.compiling = compiling
        self.batch_size = batch_size
        self.amp = amp
        self.size = self.compiled = None

    def __call__(self, size):
        """The network for training on images of `size` (height, width)."""
        if not self.compiling:
            return self.model
        if size != self.size:
            self.size, self.compiled = size, compile_network(self.model, self.batch_size, size, self.amp)
            self.compiling = self.compiled is not self.model
        return self.compiled


def compile_network(model, batch_size, size, amp):
    """`model` compiled for training on `batch_size` images of `size` (height, width); `model` itself, and one printed
    line, where that fails."""
    started = time.perf_counter()
    device = next(model.parameters()).device
    buffers = [buffer.clone() for buffer in model.buffers()]
    if dist.is_initialized():
        torch._dynamo.config.optimize_ddp = False  # it cuts the graph, and has no support for autograd functions in it
    compiled = torch.compile(model.train().requires_grad_(True), dynamic=False)
    images = torch.zeros(batch_size, 3, *size, device=device).contiguous(memory_format=choose_layout(device))
    try:
        with amp():
            loss = compiled(images).float().mean()
        loss.backward()
        print(f"compile     in {time.perf_counter() - started:.0f} s")
    except Exception as error:  # no C compiler, a kernel that cannot be built: many kinds
        if not is_out_of_memory(error):  # a full memory is dealt with in the first step
            reason = str(error).strip().partition("\n")[0]
            print(f"compile     failed, so it is off: {type(error).__name__}: {reason}")
            compiled = model
    copy_tensors(buffers, list(model.buffers()))
    model.zero_grad(set_to_none=True)
    return compiled
