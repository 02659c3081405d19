"""One script on several GPUs: what processes that torchrun started must agree on.

    torchrun --nproc_per_node=8 train.py

Without torchrun there is one process, and each function here does the obvious thing.
"""

import os
import sys

import torch.distributed as dist


def launched():
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank():
    """Number of this process on its machine, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def join(device):
    """Meet the other processes.

    Args:
        device: the `torch.device` that this process computes on.

    Returns:
        (number of this process, from 0; how many there are).
    """
    if not launched():
        return 0, 1
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def total(tensor):
    """Sum of `tensor` over the processes, as a new tensor."""
    tensor = tensor.clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """[`value` of process 0, of process 1, ...] for any plain value."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_lost_process(error):
    """Whether `error` of a collective operation says that another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def leave(device, status):
    """End this process's part of the run, once all are done, so that none leaves while another one still needs it.

    Args:
        device: what it computed on.
        status: exit status. On the CPU the process ends here: gloo's threads, which Python's own way out would stop,
            hang at times with PyTorch 2.6 and abort at times with 2.15.
    """
    gather(None)
    if device.type == "cuda":
        dist.destroy_process_group()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
