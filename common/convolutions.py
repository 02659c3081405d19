"""How a run computes its depthwise convolutions: measured on this machine at its start, kept in its checkpoints."""

from collections import Counter

import torch

from models import depthwise_choice
from models.depthwise_choice import Use


def choose_convolutions(model, sizes, train_loader, val_loader, amp_dtype, deterministic, checkpoint):
    """Choose for all image sizes of a run, and print what was chosen; call it before torch.compile.

    Args:
        model: the network, on its device.
        sizes: the run's `ImageSizes`.
        train_loader, val_loader: of one process.
        amp_dtype: dtype of autocast, or None where it is off.
        deterministic: True times nothing, so that the choice does not depend on the moment.
        checkpoint: of the run that is resumed, which goes on as it began, or None.

    Returns:
        What a checkpoint holds of it, plain types.
    """
    counts = Counter()
    for epoch in range(sizes.epochs):
        counts[sizes.training(epoch), train_loader.batch_sampler.batch_size, True] += len(train_loader)
        counts[sizes.validation(epoch), val_loader.batch_size, False] += len(val_loader)
    uses = [Use(size, batch_size, steps, training) for (size, batch_size, training), steps in counts.items()]
    choice = depthwise_choice.choose_convolutions(
        model,
        uses,
        dtype=amp_dtype or torch.float32,
        measure=not deterministic,
        stored=None if checkpoint is None else checkpoint.get("convolutions", {}),
    )
    if choice.line:
        print(f"kernels     {choice.line}")
    return choice.record
