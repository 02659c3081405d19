"""Exponential moving average (EMA) of a network's weights, with a warm-up of the decay.

    ema = ModelEma(model, decay=0.9998)
    for ...:
        optimizer.step()
        ema.update(model)
    validate(ema.ema)

A plain EMA with decay 0.9998 remembers thousands of steps, so that on small data it drags the random start along for
most of the run. With the warm-up the decay grows with the number of updates, and the average is useful from the first
epochs on.
"""

import torch
from timm.utils import ModelEmaV3


def unwrap(model):
    """The network inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


class ModelEma:
    """A second copy of the network whose weights and buffers follow the first: ema = d * ema + (1 - d) * model.

    The decay is d = min(decay, 1 - (1 + n) ** -warmup_power) after n updates; integer buffers are copied. The work is
    done by timm's `ModelEmaV3` on whole lists of tensors (foreach).

    Args:
        model: the network, wrapped or not.
        decay: the decay that is reached in the end; 1 / (1 - decay) is about the number of steps remembered.
        device: where the average is kept; '' means where the network is.
        resume: path of a checkpoint whose `state_dict_ema` and `ema_updates` are continued; '' starts from `model`.
        warmup_power: how fast the decay grows; 2/3 reaches 0.99 after 1,000 updates and 0.9998 after 354,000, 1 is the
            plain average of all steps; 0 turns the warm-up off.

    Attributes:
        ema: the averaged network, an `nn.Module` in eval mode that receives no gradients.
        updates: number of updates so far.
    """

    def __init__(self, model, decay=0.9999, device="", resume="", warmup_power=2 / 3):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie between 0 and 1, got {decay}")
        self.updates = 0
        self._average = ModelEmaV3(
            unwrap(model),
            decay=decay,
            use_warmup=warmup_power > 0,
            warmup_power=warmup_power,
            device=torch.device(device) if device else None,
        )
        self.ema.requires_grad_(False)
        if resume:
            checkpoint = torch.load(resume, map_location="cpu", weights_only=True)
            if checkpoint.get("state_dict_ema") is None:
                raise ValueError(f"{resume} holds no state_dict_ema; resume from a checkpoint saved with EMA")
            self.load(checkpoint["state_dict_ema"], checkpoint.get("ema_updates", 0))

    @property
    def ema(self):
        return self._average.module

    @property
    def decay(self):
        """The decay of the next update."""
        return self._average.get_decay(self.updates + 2)

    def load(self, state_dict_ema, updates):
        """Continue from saved weights, with or without the prefix of a wrapper, after `updates` updates."""
        for prefix in ("_orig_mod.", "module.", "_orig_mod."):
            if all(name.startswith(prefix) for name in state_dict_ema):
                state_dict_ema = {name.removeprefix(prefix): tensor for name, tensor in state_dict_ema.items()}
        self.ema.load_state_dict(state_dict_ema)
        self.updates = updates

    def update(self, model):
        """Move the average towards `model` by one step."""
        self.updates += 1
        # timm counts from 2 on: its step 1 copies the network.
        self._average.update(unwrap(model), step=self.updates + 1)
