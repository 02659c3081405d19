"""Pretrained weights: the table of published checkpoints, and the loading of a state dict into a `UniRepLKNet`.

    model = timm.create_model("unireplknet_t.in1k", pretrained=True)         # timm downloads a row of the table
    print(load_weights(model, torch.load("some.pth", weights_only=True)))    # a checkpoint in any of the usual forms
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import adapt_input_conv, generate_default_cfgs
from torch import nn

STEM = "downsample_layers.0.0"
IN22K_CLASSES = 21841
WRAPPERS = ("state_dict_ema", "state_dict", "model")  # keys under which checkpoints hold their state dict


def published(filename: str, num_classes: int = 1000, size: int = 224) -> dict[str, Any]:
    """timm's description of one released checkpoint; the file holds the state dict under `model`, or bare."""
    return dict(
        hf_hub_id="DingXiaoH/UniRepLKNet",
        hf_hub_filename=filename,
        num_classes=num_classes,
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        crop_pct=0.875 if size < 384 else 1.0,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv=STEM,
        classifier="head",
        license="apache-2.0",
        paper_ids="arXiv:2311.15599",
        paper_name="UniRepLKNet: A Universal Perception Large-Kernel ConvNet",
        origin_url="https://github.com/AILab-CVC/UniRepLKNet",
    )


default_cfgs = generate_default_cfgs(
    {
        "unireplknet_a.in1k": published("unireplknet_a_in1k_224_acc77.03.pth"),
        "unireplknet_f.in1k": published("unireplknet_f_in1k_224_acc78.58.pth"),
        "unireplknet_p.in1k": published("unireplknet_p_in1k_224_acc80.23.pth"),
        "unireplknet_n.in1k": published("unireplknet_n_in1k_224_acc81.64.pth"),
        "unireplknet_t.in1k": published("unireplknet_t_in1k_224_acc83.21.pth"),
        "unireplknet_s.in1k": published("unireplknet_s_in1k_224_acc83.91.pth"),
        "unireplknet_s.in22k": published("unireplknet_s_in22k_pretrain.pth", IN22K_CLASSES),
        "unireplknet_s.in22k_ft_in1k_384": published("unireplknet_s_in22k_to_in1k_384_acc86.44.pth", size=384),
        "unireplknet_b.in22k_ft_in1k_384": published("unireplknet_b_in22k_to_in1k_384_acc87.40.pth", size=384),
        "unireplknet_b.in22k": published("unireplknet_b_in22k_pretrain.pth", IN22K_CLASSES),
        "unireplknet_l.in22k_ft_in1k_384": published("unireplknet_l_in22k_to_in1k_384_acc87.88.pth", size=384),
        "unireplknet_l.in22k": published("unireplknet_l_in22k_pretrain.pth", IN22K_CLASSES),
        "unireplknet_xl.in22k_ft_in1k_384": published("unireplknet_xl_in22k_to_in1k_384_acc87.96.pth", size=384),
        "unireplknet_xl.in22k": published("unireplknet_xl_in22k_pretrain.pth", IN22K_CLASSES),
    }
)


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict that a checkpoint holds, without the prefixes of DataParallel and torch.compile.

    Args:
        checkpoint: a state dict, or a dictionary that holds one under "state_dict_ema", "state_dict" or "model".

    Raises:
        ValueError: if it is anything else.
    """
    state_dict = checkpoint
    if isinstance(checkpoint, Mapping):
        state_dict = next((checkpoint[key] for key in WRAPPERS if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    if not is_state_dict(state_dict):
        raise ValueError(
            "these are no weights: expected a state dict (names with tensors), alone or under "
            f"{', '.join(map(repr, WRAPPERS))}, got {describe(state_dict)}; save model.state_dict()"
        )
    return {name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()}


def is_state_dict(value: Any) -> bool:
    """Whether `value` maps names to tensors, at least one."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in value.items())


def describe(value: Any) -> str:
    """What stands where a state dict should, in a few words."""
    if not isinstance(value, Mapping):
        return type(value).__name__
    if not value:
        return "an empty dictionary"
    keys = [repr(key) for key in value]
    return f"a dictionary with the keys {', '.join(keys[:3])}{', ...' * (len(keys) > 3)}"


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Bring a checkpoint into the form of `model.state_dict()`; timm calls it for what it downloads.

    Args:
        state_dict: a checkpoint in any of the forms that `unwrap` reads.
        model: a `UniRepLKNet`.

    Raises:
        ValueError: if it is no checkpoint, or holds the other structure (training or merged) than the model.
    """
    state_dict = unwrap(state_dict)
    merged = "stages.0.0.norm.weight" not in state_dict
    if merged != model.deploy and "stages.0.0.se.down.weight" in state_dict:
        raise ValueError(
            "these weights are merged (inference structure): load them into a model built with deploy=True"
            if merged
            else "these weights have the training structure: load them with deploy=False, then call "
            "reparameterize_unireplknet()"
        )
    return state_dict


def other_classes(known: Any, classes: Sequence[str]) -> bool:
    """Whether a checkpoint's "classes" are as many as `classes`, but others or in another order."""
    return isinstance(known, (list, tuple)) and len(known) == len(classes) and list(known) != list(classes)


def load_weights(model: nn.Module, state_dict: Mapping[str, Any], classes: Sequence[str] | None = None) -> str:
    """Load all tensors that fit: the classes and the input channels may differ, the rest of the network may not.

    Args:
        model: a `UniRepLKNet`, changed in place.
        state_dict: a checkpoint in any of the forms that `unwrap` reads.
        classes: names of the model's classes. Where the checkpoint names as many others under "classes", the head
            keeps its initial weights: one that is confident of other classes would cost the first epochs.

    Returns:
        One line that says how many tensors were loaded, and which were not and why.

    Raises:
        ValueError: if `state_dict` is no checkpoint, or anything but the head and the stem's input channels differs;
            one sentence that names the first such tensor.
    """
    known = state_dict.get("classes") if isinstance(state_dict, Mapping) else None
    state_dict = checkpoint_filter_fn(state_dict, model)
    own = model.state_dict()
    stem, notes = f"{STEM}.weight", []
    if stem in state_dict and state_dict[stem].shape != own[stem].shape and state_dict[stem].shape[1:2] == (3,):
        state_dict[stem] = adapt_input_conv(own[stem].shape[1], state_dict[stem])
        notes.append(f"{stem} adapted from 3 to {own[stem].shape[1]} input channels")

    fits = {name: tensor for name, tensor in state_dict.items() if name in own and own[name].shape == tensor.shape}
    missing = [name for name in own if name not in fits]
    unused = [name for name in state_dict if name not in own]
    foreign = [name for name in (*missing, *unused) if not name.startswith("head.")]
    if foreign:
        raise ValueError(
            f"these weights are of another network: {len(foreign)} tensors do not fit, the first of them "
            f"{foreign[0]}; build the network that they were trained with"
        )
    for name in missing:
        theirs = tuple(state_dict[name].shape) if name in state_dict else "absent"
        notes.append(f"skipped {name} ({theirs} there, {tuple(own[name].shape)} here)")
    if classes is not None and other_classes(known, classes):
        fits = {name: tensor for name, tensor in fits.items() if not name.startswith("head.")}
        notes.append("the head starts anew, since its classes differ")
    model.load_state_dict(fits, strict=False)
    return "; ".join([f"loaded {len(fits)} of {len(own)} tensors", *notes])
