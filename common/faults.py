"""What can go wrong during a long run: signals, numbers that are not finite, full memory."""

import contextlib
import ctypes
import errno
import os
import re
import signal
import socket
import sys
import threading
import time

import torch

from common.gpu import describe_memory
from common.options import UserError
from common.workers import SIGNALS


class Stopped(Exception):
    """A signal arrived, and the state is that after the last finished step; the text, if any, says in what."""


class Interrupt:
    """Inside `with Interrupt() as interrupt`, the signals that ask a process to end are noted and do not end it.

    The signals are SIGINT (Ctrl-C), SIGTERM (what clusters send before they stop a job) and SIGHUP (the terminal was
    closed; not if nohup had it ignored); under Windows also Ctrl-Break and the closing of the window. Each is answered
    by a line at once. A second SIGINT or SIGTERM ends the process at once.

    Attributes:
        active: the one in whose `with` the process is, or None.
        signal: the `signal.Signals` that arrived; None before.
    """

    active = None

    def __init__(self):
        self.signal = None
        self.answered = False
        self.noted = 0.0  # time of the first SIGINT or SIGTERM
        self.ended = threading.Event()
        self.console_handler = None

    def __enter__(self):
        self.before = {number: signal.getsignal(number) for number in SIGNALS}
        hangup = getattr(signal, "SIGHUP", None)
        if self.before.get(hangup) == signal.SIG_IGN:  # by nohup
            del self.before[hangup]
        for number in self.before:
            signal.signal(number, self.note)
        # Python runs `note` between two of its instructions, which may be a minute later when PyTorch computes; the
        # system writes the number of the signal into this socket at once, whatever the process does.
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.wakeup_before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self.listen, name="signals", daemon=True)
        self.thread.start()
        if sys.platform == "win32":
            self.watch_console()
        Interrupt.active = self
        return self

    def __exit__(self, *_):
        Interrupt.active = None
        self.ended.set()
        signal.set_wakeup_fd(self.wakeup_before)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.writer.send(b"\0")  # which ends the thread; processes that read images may hold the socket open, too
        self.thread.join()
        self.writer.close()
        self.reader.close()
        if self.console_handler is not None:
            ctypes.windll.kernel32.SetConsoleCtrlHandler(self.console_handler, False)

    def note(self, number, frame=None):
        """Note a signal for the run to see."""
        self.signal = self.signal or signal.Signals(number)

    def listen(self):
        """Answer signals, in a thread of its own."""
        while number := self.reader.recv(1)[0]:
            if number in self.before:  # others, such as that of a child's end, are written into the socket, too
                self.answer(signal.Signals(number))

    def answer(self, number):
        """Say what happens now, or end the process if it is asked a second time."""
        self.note(number)
        if number not in (signal.SIGINT, signal.SIGTERM):
            if not self.answered:
                self.say(f"{number.name} received; finishing this step, then saving and stopping")
            self.answered = True
            return
        if not self.noted:
            self.answered, self.noted = True, time.monotonic()
            name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
            self.say(
                f"{name} received; finishing this step, then saving and stopping; another {name} ends the run at once, "
                "without saving"
            )
        elif time.monotonic() - self.noted > 1.0:  # torchrun and Slurm pass on what the processes received themselves
            self.say("ended at once, without saving")
            os._exit(128 + number)

    def say(self, text):
        """Print a line; under torchrun, one process does for all."""
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{text}", file=sys.stderr, flush=True)

    def watch_console(self):
        """Note that the console window is being closed: Windows ends the process when the handler returns."""

        def closing(event):
            if event not in (2, 5, 6):  # CTRL_CLOSE_EVENT, CTRL_LOGOFF_EVENT, CTRL_SHUTDOWN_EVENT
                return False
            self.note(signal.SIGBREAK)
            self.ended.wait()  # until it is saved, or for the few seconds that Windows grants
            return True

        self.console_handler = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)(closing)  # kept as long as it is called
        ctypes.windll.kernel32.SetConsoleCtrlHandler(self.console_handler, True)

    @property
    def exit_status(self):
        """What shells expect of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.

        143 also for a process that stops because another process of the run received the signal.
        """
        return 128 + (self.signal or signal.SIGTERM)


class Diverged(UserError):
    """Loss or gradient is not finite in one step after another."""


class StepGuard:
    """Keeps a run fit to be saved: a step that fails leaves nothing behind, unless it has begun to change the weights.

    Args:
        state: of the run, with its `model`, whose buffers a forward pass changes (those of batch norms).
        names: attributes of `state` that a step changes before the weights.
    """

    def __init__(self, state, names=()):
        self.state = state
        self.names = names
        self.buffers = list(state.model.buffers())
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        self.before = {}
        self.computing = self.changing = False

    def begin(self):
        """A step begins."""
        copy_tensors(self.buffers, self.buffers_before)
        self.before = {name: getattr(self.state, name) for name in self.names}
        self.computing = True

    def undo(self):
        """Restore the buffers as they were before the step's forward passes."""
        copy_tensors(self.buffers_before, self.buffers)

    def change(self):
        """From here on the step changes the weights."""
        self.changing = True

    def end(self):
        """The step is complete."""
        self.computing = self.changing = False

    def restore(self):
        """Restore the state before a step that failed; returns whether that is possible."""
        if self.computing and not self.changing:
            self.undo()
            for name, value in self.before.items():
                setattr(self.state, name, value)
            self.computing = False
        return not self.changing


class _Found(Exception):
    """Carries the name of a layer out of a forward pass."""


def first_non_finite_layer(model, images):
    """Name and type of the first layer of `model` with a non-finite output, such as "stages.0.1.pwconv1 (Linear)".

    Args:
        model: any `nn.Module`; its mode (train or eval) stays, and its buffers are restored.
        images: a batch; must be finite, or the first layer is reported.

    Returns:
        The layer, or None if every layer's output is finite.
    """

    def check(name):
        def hook(module, inputs, output):
            if torch.is_tensor(output) and not output.isfinite().all():
                raise _Found(f"{name} ({type(module).__name__})")

        return hook

    # A layer's hook runs before its parent's, so the innermost layer is the one that is named.
    hooks = [module.register_forward_hook(check(name or "the network")) for name, module in model.named_modules()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        with torch.no_grad():
            model(images)
    except _Found as found:
        return str(found)
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, before in zip(model.buffers(), buffers):
            buffer.copy_(before)
    return None


def copy_tensors(source, target):
    """Copy a list of tensors into another one, all at once."""
    if source:  # a network without batch norms has no buffers
        torch._foreach_copy_(target, source)


# How PyTorch and the libraries below it say that memory is full. Two of these have rare other causes, too: oneDNN's
# "could not create a primitive", and cuBLAS, which is not initialized where its workspace does not fit.
FULL_MEMORY = re.compile(
    r"out of (?:host |device |gpu |cuda )?memory|OutOfMemory|OUT_OF_(?:HOST_|DEVICE_)?MEMORY|not enough memory"
    r"|DefaultCPUAllocator|(?:can't|cannot|could not|failed to|unable to) allocate|bad_?alloc|bad allocation"
    r"|insufficient memory|Alloc_?Failed|allocation_?failed|Invalid buffer size"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling .?cublasCreate|could not create a (?:primitive|memory object)\W*$"
    r"|The paging file is too small",
    re.IGNORECASE | re.MULTILINE,
)


def is_out_of_memory(error):
    """Whether an error says that the memory of the GPU or the computer is full."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return FULL_MEMORY.search(str(error)) is not None


@contextlib.contextmanager
def split_when_out_of_memory(state, sampler):
    """A context that ends quietly when memory runs out, with `state.micro_batches` doubled.

    Args:
        state: of the run, see common/run_folder.py.
        sampler: the `EpochBatches`.

    Raises:
        UserError: where single images do not fit either, or several processes would have to split alike.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if sampler.world_size > 1 or state.micro_batches >= sampler.batch_size:
            raise UserError(
                "memory is full; lower BATCH_SIZE, and raise ACCUMULATE to keep the same step, lower IMG_SIZE, or set "
                f"GRAD_CHECKPOINTING{describe_memory(next(state.model.parameters()).device)}"
            ) from error
        state.micro_batches *= 2


MAX_SKIPPED = 10  # steps in a row without a finite loss and gradient after which a run stops


def skip_step(state, what, step, explain, bar):
    """Count a step whose loss or gradient (`what`) is not finite; Diverged after `MAX_SKIPPED` in a row."""
    state.skipped += 1
    state.skipped_in_a_row += 1
    place = f"epoch {state.epoch + 1}, step {step + 1}"
    if state.skipped == 1:
        bar.write(f"warning: {place}: the {what} is not finite; the step is skipped")
    if state.skipped_in_a_row >= MAX_SKIPPED:
        raise Diverged(
            f"the {what} was not finite in {state.skipped_in_a_row} steps in a row, the last of them {place}: "
            f"{explain()}; none of them reached the weights, and the saved checkpoints are intact"
        )


def explain_not_finite(state, loader, first_batch, batches, numbers, prepare, amp):
    """Where the loss or gradient of a step that was skipped comes from, in words."""
    sampler, dataset = loader.batch_sampler, loader.dataset.dataset
    sampler.start = first_batch
    paths = [[dataset.files[index] for _, index in keys] for keys, _ in zip(sampler, batches)]
    origin = "the output of every layer is finite, but not the loss or the gradient"
    for batch, number, names in zip(batches, numbers, paths):
        broken = [name for name, image in zip(names, batch[0]) if not image.isfinite().all()]
        if broken:
            return f"not finite after the augmentation: {', '.join(broken[:4])}; check MEAN and STD"
        images = prepare(batch, number)[0]
        if not images.isfinite().all():
            return f"the normalised images are not finite ({', '.join(names[:4])}); check MEAN and STD"
        with amp():
            layer = first_non_finite_layer(state.model, images)
        if layer is not None:
            origin = f"the first layer with a non-finite output is {layer}"
            break
    names = [name for batch in paths for name in batch]
    others = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (
        f"{origin}; images {', '.join(names[:4])}{others}. Lower LEARNING_RATE, set CLIP_GRAD above 0, or set AMP to "
        '"off"'
    )
