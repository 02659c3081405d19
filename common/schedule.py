"""The learning rate as a function of the step."""

import math


def warmup_cosine(step, steps, warmup_steps, highest, lowest):
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up to `highest`, then half a cosine to `lowest`."""
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * min(progress, 1))) / 2
