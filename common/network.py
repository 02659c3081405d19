"""The network that train.py trains: built anew, and started from pretrained weights."""

from pathlib import Path

import timm
import torch

from common.checkpoint import SEEDLINGS, load_file
from common.checkpoint_check import check_tensors
from common.file_checks import naming
from common.options import ConstantError, UserError
from models import UniRepLKNet, load_weights
from models.depthwise import environment_choice
from models.pretrained import unwrap


def check_environment():
    """ConstantError for a wrong environment variable of models/depthwise.py."""
    try:
        environment_choice()
    except ValueError as error:
        raise ConstantError(str(error)) from error


def check_pretrained(arch, pretrained):
    """ConstantError unless `pretrained` names weights for the network `arch`; see `read_weights`."""
    if not arch.startswith("unireplknet"):
        raise ConstantError(f'PRETRAINED works with the UniRepLKNet variants, not with MODEL {arch!r}; set it to ""')
    tags = [name.split(".", 1)[1] for name in timm.list_pretrained(f"{arch}.*")]
    if pretrained not in ("seedlings", *tags) and not Path(pretrained).is_file():
        raise ConstantError(
            f'PRETRAINED must be "seedlings", an existing file, or a published tag of {arch} ({", ".join(tags)}), got '
            f"{pretrained!r}"
        )


def read_weights(arch, pretrained):
    """Pretrained weights for the network `arch`: {name: tensor}, or a checkpoint that holds them.

    Args:
        arch: name of a network.
        pretrained: "seedlings", the path of a file, or the tag of published weights, which are downloaded.

    Raises:
        UserError: if they cannot be read, or are no finite numbers.
    """
    if pretrained == "seedlings" or Path(pretrained).is_file():
        weights = load_file(SEEDLINGS if pretrained == "seedlings" else pretrained)
        with naming(pretrained, "set PRETRAINED to another file"):
            # Two names for one tensor, as networks of other libraries have them, do no harm: only what fits is loaded.
            check_tensors("state dict", unwrap(weights), shared=True)
        return weights
    published = timm.get_pretrained_cfg(f"{arch}.{pretrained}")
    try:
        return timm.models.load_state_dict_from_hf(published.hf_hub_id, published.hf_hub_filename, weights_only=True)
    except Exception as error:  # no network, a proxy, a hub that is down: many kinds
        raise UserError(
            f"cannot download {published.hf_hub_filename} from {published.hf_hub_id} ({type(error).__name__}); "
            "download it by hand and set PRETRAINED to its path"
        ) from error


def create_network(name, classes, size, drop_path, layer_scale, grad_checkpointing, checkpoint):
    """Build a network with an output for each class name.

    Args:
        size: (height, width) in pixels of the smallest images it will see.
        checkpoint: of the run that is resumed, which says how the network is built; None for a new run.

    Returns:
        (network, arguments that build it again without stochastic depth).
    """
    arguments = dict(num_classes=len(classes))
    if name.startswith("unireplknet"):
        arguments["layer_scale_init_value"] = layer_scale
        # A residual stream in bfloat16 would lose what a layer scale as small as the paper's leaves of each block.
        arguments["published_arithmetic"] = 0 < layer_scale < 0.01
    if checkpoint is not None:
        arguments = checkpoint["model_args"]
    try:
        model = timm.create_model(name, drop_path_rate=drop_path or None, **arguments)
    except TypeError as error:
        raise UserError(f"{name} has no stochastic depth; set DROP_PATH to 0 ({error})") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        if grad_checkpointing:
            model.set_grad_checkpointing()
        if not isinstance(model, UniRepLKNet):  # which takes any size
            with torch.inference_mode():
                model.eval()(torch.zeros(1, 3, *size))
    except (AssertionError, RuntimeError, ValueError) as error:  # timm's networks refuse in many ways
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{name} does not work with images of {size[0]} x {size[1]} pixels, or not with GRAD_CHECKPOINTING "
            f"{grad_checkpointing} ({reason}); set IMG_SIZE to the size it was made for and START_SIZE to None, or "
            "GRAD_CHECKPOINTING to False"
        ) from error
    return model, arguments


def load_pretrained(model, weights, classes):
    """Load what `read_weights` returned into `model`, whose classes are named; returns one line on what was loaded."""
    try:
        return load_weights(model, weights, classes)
    except ValueError as error:
        raise UserError(f"PRETRAINED: {error}") from error


def freeze(model, frozen):
    """Train the head only, or everything; frozen batch norms keep their statistics, too."""
    head = model.get_classifier()
    if frozen:
        model.eval()
        head.train()
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen)
    head.requires_grad_(True)
