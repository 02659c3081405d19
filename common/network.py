"""The network that train.py trains: built anew, and started from pretrained weights."""

import re
from pathlib import Path

import safetensors.torch
import timm
import torch
from huggingface_hub import constants

from common.checkpoint import SEEDLINGS, load_file
from common.checkpoint_check import check_tensors
from common.file_checks import brief, check_fields, check_input, naming, side_lengths
from common.hub import download, published_network
from common.options import Channels, ConstantError, ImageSize, PositiveChannels, UserError, accepts
from models import UniRepLKNet, load_weights
from models.depthwise import environment_choice
from models.pretrained import head_modules, unwrap

IMG_SIZE = 224  # pixels, where neither a person nor pretrained weights say otherwise
HUB_NAME = r"hf[-_]hub:[\w.-]+/[\w.-]+(@[\w.-]+)?"
BY_HAND = "download it by hand, put it anywhere and set PRETRAINED to its path"


def check_environment():
    """ConstantError for a wrong environment variable of models/depthwise.py."""
    try:
        environment_choice()
    except ValueError as error:
        raise ConstantError(str(error)) from error


def check_pretrained(arch, tag, pretrained):
    """ConstantError unless `tag` (of MODEL) and PRETRAINED, which may be "", name weights; see `read_weights`."""
    tags = [name.split(".", 1)[1] for name in timm.list_pretrained(f"{arch}.*")]
    published = ", ".join(tags[:12]) + f" and {len(tags) - 12} more" * (len(tags) > 12) or "none"
    if tag and tag not in tags:
        raise ConstantError(f"MODEL must have a published tag of {arch} behind its dot ({published}), got {tag!r}")
    if tag and pretrained in tags and pretrained != tag:
        raise ConstantError(f"MODEL names the weights {tag!r} and PRETRAINED {pretrained!r}; leave one of them out")
    if pretrained in ("", "seedlings", *tags) or re.fullmatch(HUB_NAME, pretrained) or Path(pretrained).is_file():
        return
    raise ConstantError(
        f'PRETRAINED must be "seedlings", an existing file, "hf-hub:owner/name", or a published tag of {arch} '
        f"({published}), got {pretrained!r}"
    )


def read_weights(arch, pretrained, tag=""):
    """Pretrained weights for the network `arch`.

    Args:
        arch: name of a network.
        pretrained: "seedlings"; the path of a file; the tag of published weights or "hf-hub:owner/name", which are
            downloaded.
        tag: of the published weights that a file holds, where it does not say what input these expect; "": unknown.

    Returns:
        dict of state_dict, {name: tensor}; classes, where they are known; expected: {constant of train.py: value} of
        the input that the weights expect, as far as it is known; sound, of spectrograms.

    Raises:
        UserError: if they cannot be read, or are no finite numbers.
    """
    if pretrained == "seedlings" or Path(pretrained).is_file():
        return read_file(arch, SEEDLINGS if pretrained == "seedlings" else Path(pretrained), tag)
    if re.fullmatch(HUB_NAME, pretrained):
        return read_hub(arch, pretrained)
    about = timm.get_pretrained_cfg(f"{arch}.{pretrained}")
    network = published_network(f"{arch}.{pretrained}", BY_HAND)
    return dict(state_dict=network.state_dict(), expected=expected_input(about.mean, about.std, about.input_size[1:]))


def read_file(arch, path, tag):
    """`read_weights` of a file: a checkpoint of train.py, or another state dict of torch.save or safetensors."""
    with naming(path, "set PRETRAINED to another file"):
        if path.suffix == ".safetensors":
            try:
                content = safetensors.torch.load_file(path)
            except Exception as error:  # damaged files fail in many ways
                raise ValueError(f"it is damaged or no safetensors file ({error})") from error
        else:
            content = load_file(path)
        weights = dict(state_dict=unwrap(content))
        # Two names for one tensor, as networks of other libraries have them, do no harm: only what fits is loaded.
        check_tensors("state dict", weights["state_dict"], shared=True)
        if "classes" in content:
            weights["classes"] = content["classes"]
        if content.keys() >= {"classes", "mean", "std", "img_size"}:
            check_input(content)
            expected = expected_input(content["mean"], content["std"], side_lengths(content["img_size"]))
            return weights | dict(expected=expected, sound=content.get("sound"))
    about = timm.get_pretrained_cfg(f"{arch}.{tag}" if tag else arch)
    known = about is not None and about.has_weights
    return weights | dict(expected=expected_input(about.mean, about.std, about.input_size[1:]) if known else {})


def read_hub(arch, name):
    """`read_weights` of a repository of the Hugging Face Hub in timm's form, named by a person: "hf-hub:owner/name"."""
    repository = name.partition(":")[2]
    source = "model.safetensors", f"{constants.ENDPOINT}/{repository}"
    about, theirs, _ = download(source, BY_HAND, timm.models.load_model_config_from_hf, repository)
    if theirs.partition(".")[0] != arch:
        raise UserError(f"{name} has weights of {brief(theirs)}; set MODEL to that network, or PRETRAINED to others")
    content = download(source, BY_HAND, timm.models.load_state_dict_from_hf, repository, weights_only=True)
    with naming(name, "set PRETRAINED to others"):
        state_dict = unwrap(content)
        check_tensors("state dict", state_dict, shared=True)
        about = timm.get_pretrained_cfg(arch).to_dict() | about
        expected = expected_input(about["mean"], about["std"], about["input_size"][1:])
    return dict(state_dict=state_dict, expected=expected)


def expected_input(mean, std, size):
    """{constant of train.py: value} of the input that weights expect: normalisation, and size in pixels of a square."""
    expected = dict(MEAN=[float(value) for value in mean], STD=[float(value) for value in std])
    check_fields(expected, dict(MEAN=Channels, STD=PositiveChannels), "their")
    square = len(set(size)) == 1 and accepts(ImageSize, size[0])
    return expected | (dict(IMG_SIZE=size[0]) if square else {})


def adopt_input(config, weights, checkpoint, sound, statistics):
    """Choose IMG_SIZE, MEAN and STD where they are None: as the resumed run, else as the weights expect; print these.

    Args:
        config: {constant: value}.
        weights: from `read_weights`, or None.
        checkpoint: of the run that is resumed, or None.
        sound: see `common.manifest.read_sound`.
        statistics: path of mean_std.py's file.

    Returns:
        config with IMG_SIZE; MEAN and STD stay None where the data's own statistics are to be taken.

    Raises:
        ConstantError: if START_SIZE is larger than the size that was chosen.
    """
    if checkpoint is not None:
        expected, whose = checkpoint["config"], "as this run began"
    elif weights is not None and bool(weights.get("sound")) == bool(sound):  # colours are no spectrograms
        expected, whose = weights["expected"], "which the weights expect"
    else:
        expected, whose = {}, ""
    names = [name for name in ("IMG_SIZE", "MEAN", "STD") if config[name] is None and expected.get(name) is not None]
    if names:
        instead = f", in place of {statistics}" if "MEAN" in names and Path(statistics).is_file() else ""
        print(f"chosen      {', '.join(f'{name} {expected[name]}' for name in names)}, {whose}{instead}")
    config = config | {name: expected[name] for name in names}
    config["IMG_SIZE"] = config["IMG_SIZE"] or IMG_SIZE
    if config["START_SIZE"] and config["START_SIZE"] > config["IMG_SIZE"]:
        raise ConstantError(f"START_SIZE must be at most IMG_SIZE ({config['IMG_SIZE']}), got {config['START_SIZE']}")
    return config


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
                logits = model.eval()(torch.zeros(1, 3, *size))
            if not torch.is_tensor(logits) or logits.shape != (1, len(classes)):
                raise UserError(f"{name} returns no logits of {len(classes)} classes; set MODEL to a classifier")
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
    if frozen:
        model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(not frozen)
    for head in head_modules(model):
        if frozen:
            head.train()
        head.requires_grad_(True)
