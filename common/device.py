"""The device that a script computes on, what suits it, and how pictures get there."""

import ctypes
import os
import sys

import torch

from common.options import UserError


def choose_device(name):
    """The `torch.device` called `name`; "auto" takes cuda, else mps, else cpu.

    Raises:
        UserError: if this machine does not have it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'DEVICE {name!r} is not available here ({reason}); set it to "auto" or "cpu"') from error
    return torch.device(name)


def choose_layout(device, channels_last="auto"):
    """The memory format in which pictures and weights are kept on `device`.

    Args:
        device: a `torch.device`.
        channels_last: "on", "off", or "auto": on a CPU, where it is faster.
    """
    if channels_last not in ("auto", "on", "off"):
        raise UserError(f'CHANNELS_LAST must be "auto", "on" or "off", got {channels_last!r}')
    last = channels_last == "on" or channels_last == "auto" and device.type == "cpu"
    return torch.channels_last if last else torch.contiguous_format


def choose_workers(number, device):
    """The number of processes that read pictures: `number`, or for -1 what suits `device`.

    Beside a GPU it is one for each core, up to 8. On a CPU it is none: reading is a small part of the work there, and
    processes beside the network take the cores away from its threads, which wait for each other at every layer.
    """
    if number >= 0:
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
