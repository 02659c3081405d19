"""One script on several GPUs: what the processes that torchrun started must agree on.

    torchrun --nproc_per_node=8 train.py

Without torchrun there is one process, and each function here does the obvious thing.
"""

import contextlib
import os
import sys
import warnings

import torch
import torch.distributed as dist

from common.device import choose_device, prepare_device
from common.options import ConstantError, UserError


def launched():
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank():
    """Number of this process on its machine, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextlib.contextmanager
def processes(device_name, deterministic=False):
    """Join the other processes of the run; yields (`torch.device` of this process, its rank, world size).

    Args:
        device_name: see `choose_device`; under torchrun each process takes a GPU of its own.
        deterministic: see `prepare_device`.

    Raises:
        UserError: inside the context, if another process of the run has ended.
    """
    device = choose_device(device_name)
    if launched() and device.type == "cuda":
        if device.index is not None:
            raise ConstantError(
                'DEVICE must be "auto" or "cuda" under torchrun, which gives each process its own GPU, got '
                f"{device_name!r}"
            )
        device = choose_device(f"cuda:{local_rank()}")
        torch.cuda.set_device(device)
    prepare_device(device, deterministic)
    world_size = 1
    if launched():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        world_size = dist.get_world_size()
        # Depthwise gradients have other strides than DistributedDataParallel's buffers: it copies them, no error.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one process reports for all
    try:
        yield device, rank(), world_size
    except RuntimeError as error:
        if world_size > 1 and is_lost_process(error):
            raise UserError("another process of this run has ended; its message says why") from error
        raise


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
    """End this process's part of the run once all are done, so that none leaves while another one still needs it.

    Args:
        device: what it computed on.
        status: exit status, which is returned. With several processes on the CPU the process ends here: gloo's threads,
            which Python's own exit would stop, hang at times with PyTorch 2.6 and abort at times with 2.15.
    """
    if not dist.is_initialized():
        return status
    gather(None)
    if device.type == "cuda":
        dist.destroy_process_group()
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
