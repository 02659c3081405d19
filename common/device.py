"""The device that a script computes on, how many processes read pictures for it, and how these get there."""

import os

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


def choose_workers(number, device):
    """The number of processes that read pictures: `number`, or for -1 what suits `device`.

    Beside a GPU it is one for each core, up to 8. On a CPU it is none: reading is a small part of the work there, and
    processes beside the network take the cores away from its threads, which wait for each other at every layer.
    """
    if number >= 0:
        return number
    return 0 if device.type == "cpu" else min(os.cpu_count() or 1, 8)


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
