"""Where a number that is not finite (NaN or infinite) comes from, and what keeps it out."""

import torch


class _Found(Exception):
    """Carries the name of a layer out of a forward pass."""


def first_non_finite_layer(model, images):
    """Name and type of the first layer of `model` with a non-finite output, such as "stages.0.1.pwconv1 (Linear)".

    Args:
        model: any `nn.Module`; its mode (train or eval) stays, and its buffers are put back.
        images: a batch; finite ones, or the first layer is the answer.

    Returns:
        The layer, or None if every layer's output is finite.
    """

    def look(name):
        def hook(module, inputs, output):
            if torch.is_tensor(output) and not output.isfinite().all():
                raise _Found(f"{name} ({type(module).__name__})")

        return hook

    # A layer's hook runs before its parent's, so the innermost layer is the one that is named.
    hooks = [module.register_forward_hook(look(name or "the network")) for name, module in model.named_modules()]
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
