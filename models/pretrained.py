"""Pretrained weights: the table of published checkpoints, and the loading of a state dict into a network.

    model = timm.create_model("unireplknet_t.in1k", pretrained=True)         # timm downloads a row of the table
    print(load_weights(model, torch.load("some.pth", weights_only=True)))    # a checkpoint in any of the usual forms
"""

import contextlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import adapt_input_conv, generate_default_cfgs
from torch import nn

STEM = "downsample_layers.0.0"
IN22K_CLASSES = 21841
WRAPPERS = ("state_dict_ema", "state_dict", "model")  # keys under which checkpoints hold their state dict
# Functions of timm's files that change the names of the authors' or torchvision's weights into timm's.
TIMM_FILTERS = ("checkpoint_filter_fn", "_filter_fn", "pretrained_filter_fn", "_filter_torchvision_pretrained")
HEAD_STD = 0.02  # of a new head's weights
LEAVES = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}  # what PyTorch's layers call theirs
# What follows from the network's structure, or has no effect; some files have it and others do not.
DERIVED = ("num_batches_tracked", "attn_mask", "relative_position_index", "relative_coords_table")


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
        model: a `UniRepLKNet` or another classifier of timm, changed in place.
        state_dict: a checkpoint in any of the forms that `unwrap` reads, with timm's names, names that timm knows how
            to change into its own (torchvision's, the authors'), or others in the same order.
        classes: names of the model's classes. Where the checkpoint names as many others under "classes", the head
            keeps its initial weights: one that is confident of other classes would cost the first epochs.

    Returns:
        One line that says how many tensors were loaded, and which were not and why.

    Raises:
        ValueError: if `state_dict` is no checkpoint, or anything but the head and the stem's input channels differs;
            one sentence that names the first such tensor.
    """
    known = state_dict.get("classes") if isinstance(state_dict, Mapping) else None
    own, heads = model.state_dict(), head_names(model)
    state_dict, notes = rename_tensors(model, unwrap(state_dict), own, heads)
    stem = f"{STEM}.weight"
    if stem in state_dict and state_dict[stem].shape != own[stem].shape and state_dict[stem].shape[1:2] == (3,):
        state_dict[stem] = adapt_input_conv(own[stem].shape[1], state_dict[stem])
        notes.append(f"{stem} adapted from 3 to {own[stem].shape[1]} input channels")

    foreign = find_misfits(state_dict, own, heads)
    if foreign:
        raise ValueError(
            f"these weights are of another network: {len(foreign)} tensors do not fit, the first of them "
            f"{foreign[0]}; build the network that they were trained with"
        )
    fits = {name: tensor for name, tensor in state_dict.items() if name in own and own[name].shape == tensor.shape}
    for name in own:
        if name not in fits and name.startswith(heads):
            theirs = tuple(state_dict[name].shape) if name in state_dict else "absent"
            notes.append(f"skipped {name} ({theirs} there, {tuple(own[name].shape)} here)")
    if classes is not None and other_classes(known, classes):
        fits = {name: tensor for name, tensor in fits.items() if not name.startswith(heads)}
        notes.append("the head starts anew, since its classes differ")
    model.load_state_dict(fits, strict=False)
    for name, parameter in model.named_parameters():
        if name.startswith(heads) and name not in fits and parameter.dim() > 1:
            limit_spread(parameter)
    return "; ".join([f"loaded {len(fits)} of {len(own)} tensors", *notes])


@torch.no_grad()
def limit_spread(weight: torch.Tensor) -> None:
    """Scale a new head's weight (classes, features) down to a standard deviation of `HEAD_STD`, if it has more.

    Some networks draw it so large that the first steps change the pretrained features more than all others.
    """
    spread = weight.std(correction=0)
    if spread > 2 * HEAD_STD:
        weight.mul_(HEAD_STD / spread)


def head_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a timm classifier whose size depends on the classes; networks for distillation have two."""
    heads = model.get_classifier()
    return list(heads) if isinstance(heads, (tuple, list)) else [heads]


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of all tensors in `head_modules`, such as ("head.",)."""
    heads = {id(head) for head in head_modules(model)}
    return tuple(f"{name}." for name, module in model.named_modules() if id(module) in heads)


def rename_tensors(
    model: nn.Module, state_dict: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor], heads: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Bring a state dict into the names and shapes of `model`, as far as somebody knows how.

    Args:
        state_dict: names of any library.
        own: the model's state dict.
        heads: see `head_names`.

    Returns:
        (state dict, notes for a person). The state dict comes back as it is where nothing makes it fit.
    """
    if hasattr(model, "reparameterize_unireplknet"):
        return checkpoint_filter_fn(state_dict, model), []
    if not find_misfits(state_dict, own, heads):
        return state_dict, []
    file = sys.modules[type(model).__module__]  # of timm, which defines the network
    filters = [getattr(file, name) for name in TIMM_FILTERS if hasattr(file, name)]
    for function, arguments in itertools.product(filters, ((model,), ())):
        # They fail in many ways on files that they are not made for.
        with contextlib.suppress(Exception):
            renamed = function(dict(state_dict), *arguments)
            if not find_misfits(renamed, own, heads):
                return renamed, ["names changed into timm's by timm"]
    renamed = match_by_order(state_dict, own, heads)
    if renamed is not None:
        return renamed, ["names of another library, matched by order and shape"]
    return state_dict, []


def find_misfits(
    state_dict: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], heads: tuple[str, ...]
) -> list[str]:
    """Names of the tensors of either side that the other lacks, or has in another shape; those of the head aside."""
    misfits = [name for name in own if name not in state_dict or state_dict[name].shape != own[name].shape]
    misfits += [name for name in state_dict if name not in own]
    return [name for name in misfits if not name.startswith(heads) and name.rsplit(".", 1)[-1] not in DERIVED]


def match_by_order(
    state_dict: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], heads: tuple[str, ...]
) -> dict[str, torch.Tensor] | None:
    """The state dict under the names of `own`, if both list the same tensors in the same order; else None.

    The shapes must be equal up to axes of length 1 (a linear layer may be a convolution of 1 x 1), and the last parts
    of the names where both are PyTorch's, so that no mean is taken for a variance. Of the head only that counts.
    """
    for counted in (True, False):  # files from before PyTorch 0.4.1 lack the batch norms' counts of batches
        theirs, mine = (
            [name for name in names if counted or not name.endswith("num_batches_tracked")]
            for names in (state_dict, own)
        )
        if len(theirs) == len(mine) and all(
            alike(name, state_dict[name], other, own[other], other.startswith(heads))
            for name, other in zip(theirs, mine)
        ):
            return {
                other: state_dict[name].reshape(own[other].shape)
                if state_dict[name].numel() == own[other].numel()
                else state_dict[name]
                for name, other in zip(theirs, mine)
            }
    return None


def alike(name: str, tensor: torch.Tensor, other: str, own: torch.Tensor, head: bool) -> bool:
    """Whether two tensors can be the same one of two libraries; see `match_by_order`."""
    leaves = {name.rsplit(".", 1)[-1], other.rsplit(".", 1)[-1]}
    sizes = ([size for size in shape if size > 1] for shape in (tensor.shape, own.shape))
    same_shape = len(set(map(tuple, sizes))) == 1
    return (same_shape or head and tensor.dim() == own.dim()) and (len(leaves) == 1 or not leaves <= LEAVES)
