"""The optimizer of train.py."""

from functools import partial, wraps

import torch
from timm.optim import Muon, create_optimizer_v2, muon

from common.device import has_bfloat16


def create_optimizer(model, name, learning_rate, weight_decay, layer_decay, device):
    """timm's optimizer `name`.

    Muon (Jordan et al., 2024) takes the momentum of each matrix, and of each dense kernel as a matrix, to the nearest
    orthogonal one, so that all directions learn equally fast; depthwise kernels and vectors are left to AdamW.
    """
    fused = dict(fused=True) if name == "adamw" and device.type in ("cpu", "cuda") else {}
    decay = layer_decay if layer_decay != 1 else None
    optimizer = create_optimizer_v2(model, name, learning_rate, weight_decay, layer_decay=decay, **fused)
    if isinstance(optimizer, Muon) and not has_bfloat16(device):
        optimizer.step = orthogonalise_in_float32(optimizer.step)
    return optimizer


def orthogonalise_in_float32(step):
    """Muon's `step`, orthogonalising in float32: timm's has no option for it, and bfloat16 is many times slower on a
    device without it. timm's function is exchanged only while the step runs."""

    @wraps(step)
    def step_in_float32(closure=None):
        original = muon.zeropower_via_newtonschulz
        muon.zeropower_via_newtonschulz = partial(original, dtype=torch.float32)
        try:
            return step(closure)
        finally:
            muon.zeropower_via_newtonschulz = original

    return step_in_float32
