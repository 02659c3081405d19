"""One script on several GPUs or machines: how the processes that torchrun started work together, and end together.

    torchrun --nproc_per_node=8 train.py

Without torchrun there is one process, and each function here does the obvious thing.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
import warnings

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from common.device import choose_device, prepare_device
from common.faults import Stopped
from common.options import ConstantError, UserError, end_processes
from common.workers import LOOK_SECONDS, StoodStill


# Why a process ends because of another one: true, but never the reason that people should see.
ANOTHER_ENDED = "another process of this run has ended; its message says why"
ANOTHER_STILL = "another process of this run waits for its images for too long; its message says more"


def launched():
    """Whether torchrun started this process."""
    return "LOCAL_RANK" in os.environ


def rank():
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", 0)) if launched() else 0


def local_rank():
    """Number of this process on its machine, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def host_name():
    """Name of this machine in messages."""
    return socket.gethostname()


def node():
    """What tells this machine from the others of the run: its number, since names may be the same."""
    return os.environ.get("GROUP_RANK", host_name())


@contextlib.contextmanager
def processes(device_name, deterministic=False):
    """Join the other processes of the run; yields (`torch.device` of this process, its rank, world size).

    Versions, code and kind of device must be the same for all, or the run ends here; see `Channel.agree`.

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
        from common.agreement import ON_ENVIRONMENT, environment_facts  # with packages that not every script needs

        agree(environment_facts(device), ON_ENVIRONMENT)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        world_size = dist.get_world_size()
        open_channel().connected = True
        # Depthwise gradients have other strides than DistributedDataParallel's buffers: it copies them, no error.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one process reports for all
    try:
        yield device, rank(), world_size
    except (UserError, OSError):  # which common/options.py's `run` shows
        raise
    except Exception as error:
        if world_size > 1 and is_lost_process(error):
            raise UserError(ANOTHER_ENDED) from error
        if launched():  # a mistake of the program
            traceback.print_exc()
            open_channel().fail(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", 1, shown=True)
        raise


class Channel:
    """What the processes tell each other besides tensors, through torchrun's store of keys and values.

    The store works before the processes are connected, with any device, and while one of them waits in an operation
    that another one will never begin. A thread looks there for the failure of another process, and ends this one. It
    also shows that this process lives; that of the first process ends the run when one no longer does.

    Attributes:
        connected: whether all processes have come so far that each one's thread is running.
    """

    SECONDS_BETWEEN_LOOKS = 0.5
    SECONDS_TO_SAVE = 2.0  # after which a save that has begun is awaited all the same
    # How long a process that ends waits until all have seen why. Before they are connected, some may still be importing
    # PyTorch; afterwards, who does not answer is dead.
    PATIENCE = {False: 60.0, True: 5.0}
    SECONDS_FOR_REASON = 5.0  # within which the process that another one ends because of says why, unless it was killed
    SECONDS_TO_COME, SECONDS_OF_SILENCE = 600.0, 180.0  # after which a process is taken for dead

    def __init__(self):
        # A connection for the thread, since one that waits keeps others waiting.
        (self.store, self.rank, self.world_size), (self.watched, *_) = (next(rendezvous("env://")) for _ in range(2))
        self.connected = False
        self.exchanges = 0
        self.heard = {}  # number of a process: (its signs of life, when they changed)
        self.store.set(f"host/{self.rank}", host_name())
        self.store.add(f"signs/{self.rank}", 1)
        self.done = threading.Event()
        self.ending = threading.Lock()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        """End this process when another one has failed."""
        while not self.done.wait(self.SECONDS_BETWEEN_LOOKS):
            try:
                failed = self.watched.check(["failure"]) and json.loads(self.watched.get("failure"))
                self.watched.add(f"signs/{self.rank}", 1)
                if self.rank == 0:
                    self.look_for_silence()
            except RuntimeError:  # the store's machine is gone
                if not self.done.wait(2):  # unless the run is just coming to its end
                    message = f"the connection to {os.environ.get('MASTER_ADDR')}, which leads the run, is lost"
                    self.end(dict(rank=None, node=None, status=1, message=message))
                return
            if failed and failed["rank"] != self.rank:
                # The first process saves; it learns of the failure when it next waits for the others, see `Meeting`.
                if self.rank == 0 and self.connected:
                    self.done.wait(self.SECONDS_TO_SAVE)
                with saving:
                    self.end(failed)

    def look_for_silence(self):
        """End the run when a process shows no sign of life any more."""
        now = time.monotonic()
        for number in range(1, self.world_size):
            signs = self.watched.add(f"signs/{number}", 0)
            before, since = self.heard.get(number, (-1, now))
            if signs != before:
                self.heard[number] = signs, now
            elif now - since > (self.SECONDS_OF_SILENCE if signs else self.SECONDS_TO_COME):
                host = self.watched.get(f"host/{number}").decode() if signs else "another machine"
                text = "no longer answers" if signs else "did not come"
                self.fail(f"process {number} on {host} {text} for {now - since:.0f} s, so the run ends", 1)

    def fail(self, message, status, shown=False):
        """End the run because of this process; of several that fail at once, the first one's message counts.

        Args:
            message: one sentence.
            status: exit status, of all processes.
            shown: whether this process has printed it.
        """
        several = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
        mine = dict(rank=self.rank, node=node(), status=status, shown=shown)
        mine["message"] = f"{host_name()}: {message}" if several else message
        self.end(json.loads(self.store.compare_set("failure", "", json.dumps(mine))))

    def agree(self, facts, remedy):
        """End the run if `facts` are others here than in another process; see `describe_disagreement`."""
        self.exchanges += 1
        keys = [f"facts/{self.exchanges}/{number}" for number in range(self.world_size)]
        verdict = f"verdict/{self.exchanges}"
        self.store.set(keys[self.rank], json.dumps([host_name(), facts]))
        if self.rank == 0:
            from common.agreement import describe_disagreement

            self.wait(keys)
            self.store.set(verdict, describe_disagreement([json.loads(self.store.get(key)) for key in keys], remedy))
        self.wait([verdict])
        message = self.store.get(verdict).decode()
        if message:
            self.end(dict(rank=None, node=None, status=1, message=message))

    def wait(self, keys):
        """Wait until other processes have set `keys`, however long it takes."""
        seconds = 0.001
        while not self.store.check(keys):
            time.sleep(seconds)
            seconds = min(2 * seconds, self.SECONDS_BETWEEN_LOOKS)

    def end(self, failure):
        """End this process; prints the message where it comes from, and once on each other machine."""
        if not self.ending.acquire(blocking=False):
            threading.Event().wait()  # the other thread ends the process
        if failure["rank"] == self.rank or (local_rank() == 0 and failure["node"] != node()):
            if not failure.get("shown") or failure["rank"] != self.rank:
                tqdm.write(f"error: {failure['message']}", file=sys.stderr)
        with contextlib.suppress(RuntimeError):  # the store's machine may be gone
            until = time.monotonic() + self.PATIENCE[self.connected]
            seen = self.store.add("seen", 1)
            while seen < self.world_size and time.monotonic() < until:
                time.sleep(0.1)
                seen = self.store.add("seen", 0)
            if os.environ.get("GROUP_RANK", "0") == "0":
                time.sleep(0.5)  # the store is on this machine, and the others may be reading there
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failure["status"])  # the main thread may be waiting for a process that is gone


_channel = None
saving = threading.Lock()  # held while a checkpoint is written


def open_channel():
    """The `Channel` of this process, opened at the first call."""
    global _channel
    if _channel is None:
        try:
            _channel = Channel()
        except RuntimeError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(f"{host_name()} cannot reach the other processes of the run at {address}") from error
    return _channel


def fail(message, status):
    """End all processes of the run, and show why once on each machine; returns where torchrun started none.

    Args:
        message: one sentence.
        status: exit status.
    """
    if launched():
        with contextlib.suppress(UserError):
            if message in (ANOTHER_ENDED, ANOTHER_STILL):  # the other process may come to its `fail` after this one
                open_channel().done.wait(Channel.SECONDS_FOR_REASON)  # `watch` ends this process when it does
            open_channel().fail(message, status)


def agree(facts, remedy):
    """End the run with one sentence unless all processes have the same `facts`; see `describe_disagreement`."""
    if launched():
        open_channel().agree(facts, remedy)


@contextlib.contextmanager
def first_on_each_machine():
    """The first process of each machine goes through this context before the others, who find on disk what it left."""
    channel = open_channel() if dist.is_initialized() else None
    if channel is not None:
        channel.exchanges += 1
        key = f"machine/{node()}/{channel.exchanges}"
        if local_rank() > 0:
            channel.wait([key])
    yield
    if channel is not None and local_rank() == 0:
        channel.store.set(key, "done")


def from_first(function, *arguments):
    """What `function(*arguments)` returns in the first process, for all; the others do not call it.

    Tensors, in dicts and lists of any depth, are sent one by one and come as they are, on the CPU.
    """
    if not dist.is_initialized():
        return function(*arguments)
    channel = open_channel()
    channel.exchanges += 1
    key = f"first/{channel.exchanges}"
    value = None
    if rank() == 0:
        value = function(*arguments)
        channel.store.set(key, "done")
    channel.wait([key])  # a download may take longer than operations of the process group may
    outline = [map_tensors(lambda tensor: tensor.to("meta"), value)]
    dist.broadcast_object_list(outline, 0)
    if rank() == 0:
        map_tensors(send_tensor, value)
        return value
    return map_tensors(receive_tensor, outline[0])


def map_tensors(function, value):
    """`value` with `function` applied to the tensors in it, in order."""
    if torch.is_tensor(value):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([map_tensors(function, item) for item in value])
    return value


def wire_device():
    """Where a tensor must be to be sent."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def send_tensor(tensor):
    """Send a tensor of the first process to all; see `receive_tensor`."""
    if tensor.numel():
        dist.broadcast(tensor.contiguous().flatten().view(torch.uint8).to(wire_device()), 0)


def receive_tensor(meta):
    """The first process's tensor, of which `meta` is the one without values."""
    tensor = torch.empty_strided(meta.size(), meta.stride(), dtype=meta.dtype)
    if tensor.numel():
        content = torch.empty(meta.numel() * meta.element_size(), dtype=torch.uint8, device=wire_device())
        dist.broadcast(content, 0)
        tensor.copy_(content.cpu().view(meta.dtype).view(meta.size()))
    return tensor


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


class Meeting:
    """A place in the run that all processes reach, or none passes.

    A process that waits for the others inside a collective operation obeys no signal and cannot save. So where one may
    wait long for its images, all wait here until each has them. All must make their meetings in the same order.
    """

    GO, STOP, STILL, LOST = "go", "stop", "still", "lost"
    count = 0

    def __init__(self):
        Meeting.count += 1
        self.store = dist.distributed_c10d._get_default_store()
        self.name = f"meeting {Meeting.count}"
        if rank() == 0 and Meeting.count > 2:  # which all have passed
            self.store.delete_key(f"meeting {Meeting.count - 2}")
            self.store.delete_key(f"present at meeting {Meeting.count - 2}")

    def decide(self, verdict):
        """Propose how the meeting ends; the first proposal holds, and is returned."""
        return self.store.compare_set(self.name, "", verdict).decode()

    def attend(self, look):
        """Wait for the other processes; return if all are here.

        Args:
            look: function that is called now and then during the wait, and may raise `Stopped`.

        Raises:
            Stopped, StoodStill, UserError: if that has kept one of the processes, this or another, from coming.
        """
        verdict, pause = "", 1e-4
        if self.store.add(f"present at {self.name}", 1) == dist.get_world_size():
            verdict = self.decide(self.GO)
        while not verdict:
            try:
                if pause == LOOK_SECONDS:
                    look()
                if self.store.check([self.name]):
                    verdict = self.store.get(self.name).decode()
                else:
                    time.sleep(pause)
            except Stopped:
                verdict = self.decide(self.STOP)
            pause = min(2 * pause, LOOK_SECONDS)
        if verdict == self.STOP:
            raise Stopped
        if verdict == self.STILL:
            raise StoodStill(ANOTHER_STILL)
        if verdict == self.LOST:
            raise UserError(ANOTHER_ENDED)


def keep_step(batches, each, look):
    """The batches of a process, each of them, or else the end of them, only once all processes are as far.

    Args:
        batches: an iterable.
        each: whether all processes have equally many batches, and wait for each other at each of them.
        look: see `Meeting.attend`.
    """
    if not dist.is_initialized():
        yield from batches
        return
    iterator, end = iter(batches), object()
    batch = meeting = None
    while batch is not end:
        meeting = meeting or Meeting()
        try:
            batch = next(iterator, end)
        except BaseException as error:
            meeting.decide({Stopped: Meeting.STOP, StoodStill: Meeting.STILL}.get(type(error), Meeting.LOST))
            raise
        if each or batch is end:
            meeting.attend(look)
            meeting = None
        if batch is not end:
            yield batch


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
    open_channel().done.set()
    if device.type == "cuda":
        dist.destroy_process_group()
        return status
    end_processes()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
