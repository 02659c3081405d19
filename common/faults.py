"""What can go wrong during a long run: signals, numbers that are not finite, full memory."""

import contextlib
import signal

import torch

from common.options import UserError


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived, and the current step is finished."""


class Interrupt:
    """Inside `with Interrupt() as interrupt`, SIGTERM (what clusters send before they stop a job) and SIGINT (Ctrl-C)
    are noted and do not end the process; the second one ends it at once.

    Attributes:
        signal: the `signal.Signals` that arrived; None before.
    """

    def __init__(self):
        self.signal = None
        self.before = {}

    def __enter__(self):
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        self.signal = signal.Signals(number)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    @property
    def exit_status(self):
        """What shells expect of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM.

        143 also for a process that stops because another process of the run received the signal.
        """
        return 128 + (self.signal or signal.SIGTERM)


def ignore_signals_in_worker(worker):
    """`worker_init_fn` of a DataLoader: a terminal sends Ctrl-C to the workers, too, and the last step needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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


def is_out_of_memory(error):
    """Whether PyTorch's error says that the memory of the GPU or the computer is full."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


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
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if sampler.world_size > 1 or state.micro_batches >= sampler.batch_size:
            raise UserError(
                "memory is full; lower BATCH_SIZE, and raise ACCUMULATE to keep the same step, lower IMG_SIZE, or set "
                "GRAD_CHECKPOINTING"
            ) from error
        state.micro_batches *= 2


MAX_SKIPPED = 10  # steps in a row without a finite loss and gradient after which a run stops


def skip_step(state, what, step, explain, bar):
    """Count a step whose loss or gradient (`what`) is not finite; UserError after `MAX_SKIPPED` in a row."""
    state.skipped += 1
    state.skipped_in_a_row += 1
    place = f"epoch {state.epoch + 1}, step {step + 1}"
    if state.skipped == 1:
        bar.write(f"warning: {place}: the {what} is not finite; the step is skipped")
    if state.skipped_in_a_row >= MAX_SKIPPED:
        raise UserError(
            f"the {what} was not finite in {state.skipped_in_a_row} steps in a row, the last of them {place}: "
            f"{explain()}; none of them reached the weights, and the saved checkpoints are intact"
        )


def explain_not_finite(state, loader, first_batch, batches, numbers, prepare, amp):
    """Where the loss or gradient of a step that was skipped comes from, in words."""
    sampler, dataset = loader.batch_sampler, loader.dataset.dataset
    sampler.start = first_batch
    paths = [[dataset.samples[index][0] for _, index in keys] for keys, _ in zip(sampler, batches)]
    origin = "the output of every layer is finite, but not the loss or the gradient"
    for batch, number, names in zip(batches, numbers, paths):
        broken = [name for name, image in zip(names, batch[0]) if not image.isfinite().all()]
        if broken:
            return f"not finite after the augmentation: {', '.join(broken[:4])}; check MEAN and STD"
        with amp():
            layer = first_non_finite_layer(state.model, prepare(batch, number)[0])
        if layer is not None:
            origin = f"the first layer with a non-finite output is {layer}"
            break
    names = [name for batch in paths for name in batch]
    others = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (
        f"{origin}; images {', '.join(names[:4])}{others}. Lower LEARNING_RATE, set CLIP_GRAD above 0, or set AMP to "
        '"off"'
    )
