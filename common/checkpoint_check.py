"""Checkpoints checked before they are used: the file before it is unpickled, and what it says before it is built.

A checkpoint names a network and its arguments, and timm takes more of both than a checkpoint has any use for: paths of
further files, which it unpickles, names of hubs, which it calls, sizes that fill the memory. So a network is known to
timm by its plain name, its arguments are those of the tables below, and its weights are those of the network that they
describe, which is built without memory first.
"""

import collections
import io
import math
import pickle
import re
import zipfile
from typing import Annotated, Literal

import timm
import torch

from common.file_checks import Count, FileImageSize, brief, check_fields, check_input, check_keys, check_kind
from common.file_checks import side_lengths
from common.fit import FITS
from common.options import Channels, Fraction, ImageSize, Length, Limits, NonNegative, PositiveChannels, PositiveInt
from common.options import Probability, Rate, Rotation
from common.renamed import upgrade_config
from models.pretrained import is_state_dict

ZIP_MAGIC = b"PK\x03\x04"  # of the files that PyTorch writes since version 1.6

# --- what a pickle may name: nothing that could run code, and no tensors of kinds that train.py does not save
STORAGES = dict(Bool=1, Byte=1, Char=1, Short=2, Int=4, Long=8, Half=2, BFloat16=2, Float=4, Double=8)  # bytes
DTYPES = "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64".split()
HARMLESS = {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("torch", "Size")}
HARMLESS |= {("torch", f"{name}Storage") for name in STORAGES} | {("torch", name) for name in DTYPES}
HARMLESS |= {("torch", "device"), ("collections", "OrderedDict"), ("_codecs", "encode")}
# In files of other scripts, for PRETRAINED; torch.load decides whether it takes them.
HARMLESS |= {("torch._utils", "_rebuild_parameter_with_state"), ("torch._tensor", "_rebuild_from_type_v2")}
HARMLESS |= {("torch.nn.parameter", "Parameter"), ("collections", "Counter"), ("builtins", "set")}

# --- what a checkpoint may contain, in the terms of a script's constants
Blocks = Annotated[list[Annotated[int, Limits(1, 100)]], Length(4)]
Widths = Annotated[list[Annotated[int, Limits(4, 10**5)]], Length(4)]
Kernel = Annotated[int, Limits(1, 255)]
Kernels = Annotated[list[list[Kernel]], Length(4)]
# Arguments of timm.create_model. Checkpoints for forecasts have all of them, others num_classes and the last two.
MODEL_ARGS = dict(num_classes=Annotated[int, Limits(1, 10**6)], in_chans=Annotated[int, Limits(1, 10**4)])
MODEL_ARGS |= dict(drop_rate=Rate, drop_path_rate=Rate)
UNIREPLKNET_ARGS = dict(depths=Blocks, dims=Widths, kernel_sizes=Kernels)
UNIREPLKNET_ARGS |= dict(layer_scale_init_value=NonNegative, published_arithmetic=bool)
# Of a run that can be resumed; each may be missing, as in best.pth of another script or in files of earlier versions.
COUNTERS = dict(epoch=Count, pictures=Count, skipped=Count, skipped_in_a_row=Count, ema_updates=Count)
COUNTERS |= dict(pieces=Annotated[int, Limits(1, 10**6)], seconds=NonNegative, totals=Annotated[list[float], Length(4)])
COUNTERS |= dict(best_acc1=Annotated[float, Limits(-1, 100.1)], best_size=FileImageSize | Literal[0])
COUNTERS |= dict(pictures_train=Count, pictures_fingerprint=str)
# See `common.fingerprints.fingerprint_part`.
IMAGES = dict(images=Count, hashed=bool, names=str, contents=str, by_class=list)
MAX_IMAGES = 10**8
# Constants of train.py with which tools/visualize.py augments.
CONFIG = dict(CROP=Fraction, CUTOUT=Probability, HFLIP=Probability, VFLIP=Probability, COLOR_JITTER=Probability)
CONFIG |= dict(FIT=Literal[FITS], QUARTER_TURNS=bool, ROTATION=Rotation, IMG_SIZE=ImageSize)
CONFIG |= dict(TIME_SHIFT=Probability, GAIN=NonNegative, NOISE=Probability, QUALITY=Probability)
CONFIG |= dict(MIXUP=NonNegative, CUTMIX=NonNegative, MIX_PROB=Probability, SMOOTHING=Rate, MIX_SWITCH=Probability)
CONFIG |= dict(SPEC_MASK=Probability | Annotated[list[Probability], Length(2)])
# And with which a resumed run normalises. MODEL is the plain name, like arch, and PRETRAINED is compared only.
CONFIG |= dict(MEAN=Channels | None, STD=PositiveChannels | None, PRETRAINED=str)
# See common/calibration.py; the sizes of the score's tensors by name, each the same wherever it stands.
CALIBRATION = dict(temperature=Annotated[float, Limits(0.01, 100)], images=Count, img_size=FileImageSize)
CALIBRATION |= dict(score=dict | None)
SCORE = dict(look_mean=("look",), look_whitening=("look", "look"), projection=("features", "directions"))
SCORE |= dict(means=("present", "directions"), center=("directions",), spread=("directions",), scale=(2, 2))
SCORE |= dict(quantiles=("quantiles",))
SCALER = dict(scale=Annotated[float, Limits(above=0)], growth_factor=Annotated[float, Limits(above=1)])
SCALER |= dict(backoff_factor=Annotated[float, Limits(above=0, below=1)], growth_interval=PositiveInt)
SCALER |= dict(_growth_tracker=Count)


class UnsafeFile(ValueError):
    """A file that names more than plain types and tensors."""


def check_container(path):
    """Check a file of torch.save before anything of it is loaded; returns nothing.

    PyTorch itself checks no checksums, inflates compressed entries, and of files from before version 1.6 allocates what
    they claim to contain.

    Args:
        path: the file.

    Raises:
        UnsafeFile: if it could run code, or contains tensors of a kind that train.py does not save.
        Exception: of many other kinds, if it is damaged.
    """
    with open(path, "rb") as file:
        if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC:  # which is how PyTorch tells the two formats apart
            return check_archive(file)
        file.seek(0)
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        storages = {}
        for _ in range(4):  # magic number, version, system, and the content
            storages = Outline(file).read()
        if sum(storages.values()) > size:
            raise ValueError(f"it claims tensors of {sum(storages.values())} bytes, more than it has")
    return None


def check_archive(file):
    """`check_container` for the zip archives of today."""
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename.lower() for entry in entries]
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise ValueError(f"its entry {brief(entry.filename)} is compressed, which torch.save never does")
        if len(set(names)) < len(names) or sum(entry.file_size for entry in entries) > size:
            raise ValueError("its entries overlap")
        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        content = next((entry.filename for entry in entries if entry.filename.endswith("/data.pkl")), None)
        if content is None:
            raise ValueError("it has no data.pkl")
        sizes = {entry.filename: entry.file_size for entry in entries}
        folder = content.removesuffix("data.pkl")
        for key, claimed in Outline(io.BytesIO(archive.read(content))).read().items():
            there = sizes.get(f"{folder}data/{key}")
            if there != claimed:
                raise ValueError(f"it claims a tensor of {claimed} bytes where it has {there or 0}")


# The one in C would allocate for whatever index the file names in its memo.
class Outline(pickle._Unpickler):
    """Read a pickle without making tensors and without calling anything.

    Args:
        file: binary file, whose next pickle is read.
    """

    def __init__(self, file):
        super().__init__(file, encoding="utf-8")
        self.storages = {}

    def read(self):
        """{key of a storage: its bytes}, as the pickle claims."""
        self.load()
        return self.storages

    def find_class(self, module, name):
        if (module, name) not in HARMLESS:
            raise UnsafeFile(f"{module}.{name}")
        if name == "OrderedDict":
            return collections.OrderedDict
        return type(name, (Stub,), {})

    def persistent_load(self, saved):
        kind, storage, key, _, count = saved[:5]
        width = STORAGES.get(getattr(storage, "__name__", "").removesuffix("Storage"))
        if kind != "storage" or width is None or type(count) is not int or not re.fullmatch(r"\d{1,20}", str(key)):
            raise ValueError("it names a storage that torch.save does not write")
        self.storages[str(key)] = width * count
        return Stub()


class Stub:
    """What stands for a tensor, a storage or a function of PyTorch while a pickle is only looked at."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


def check_arch(arch):
    """ValueError unless `arch` is the plain name of a network of timm's, or of models/."""
    if not isinstance(arch, str) or arch not in timm.list_models():
        raise ValueError(f"its arch must be the plain name of a network that timm lists, got {brief(arch)}")


def check_model_args(arch, arguments):
    """ValueError unless these are arguments that train.py or tools/forecast.py gives a network, of sane sizes."""
    known = MODEL_ARGS | (UNIREPLKNET_ARGS if arch.startswith("unireplknet") else {})
    check_keys(arguments, known, "its model_args")
    check_fields(arguments, dict(num_classes=MODEL_ARGS["num_classes"]), "its model_args'")
    for key, value in arguments.items():
        check_kind(value, known[key], f"its model_args' {key}")


def outline_network(arch, arguments):
    """The network `arch` without memory for its weights, which tells their names, shapes and kinds.

    Raises:
        ValueError: if it cannot be built so.
    """
    try:
        with torch.device("meta"):
            return timm.create_model(arch, **arguments)
    except Exception as error:  # sizes that do not fit together; timm's networks refuse in many ways
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"the network {arch} cannot be built from its model_args ({reason})") from error


def check_weights(name, weights, network):
    """ValueError unless weights are those of a network.

    Args:
        name: of the weights in the checkpoint.
        weights: what should be a state dict.
        network: `nn.Module`, on any device, "meta" included.
    """
    if not is_state_dict(weights):
        raise ValueError(f"its {name} must hold names with tensors, got {brief(weights)}")
    own = network.state_dict(keep_vars=True)
    missing = [key for key in own if key not in weights]
    unknown = [key for key in weights if key not in own]
    if missing or unknown:
        reason = f"lacks {missing[0]}" if missing else f"has {brief(unknown[0])}"
        raise ValueError(f"its {name} is of another network than arch and model_args ({reason})")
    for key, tensor in weights.items():
        if tensor.shape != own[key].shape:
            shapes = f"{tuple(tensor.shape)} there, {tuple(own[key].shape)} here"
            raise ValueError(f"its {name} is of another network than arch and model_args ({key}: {shapes})")
        if kind_of_dtype(tensor) != kind_of_dtype(own[key]):
            raise ValueError(f"its {name} has {key} as {tensor.dtype}, where {own[key].dtype} belongs")
    check_tensors(name, weights, shared=len({id(tensor) for tensor in own.values()}) < len(own))


def kind_of_dtype(tensor):
    """ "float", "complex", "bool" or "int"."""
    dtype = tensor.dtype
    kinds = dict(float=dtype.is_floating_point, complex=dtype.is_complex, bool=dtype == torch.bool)
    return next((kind for kind, fits in kinds.items() if fits), "int")


def check_tensors(name, tensors, shared=False):
    """ValueError unless tensors are plain, finite, and have memory of their own.

    Args:
        name: what they are called.
        tensors: {name: tensor}.
        shared: whether several may be the same.
    """
    storages, claimed = {}, 0
    for key, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not plain or tensor.dtype.is_complex:
            raise ValueError(f"its {name} has {key} as a tensor of a kind that is not saved here")
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = max(storage.nbytes(), storages.get(storage.data_ptr(), 0))
        claimed += tensor.numel() * tensor.element_size()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise ValueError(f"its {name} has {key} of {tensor.numel()} values, but memory for fewer")
        if not tensor.isfinite().all():
            raise ValueError(f"its {name} has {key} with values that are not finite")
        if key.endswith("running_var") and (tensor < 0).any():
            raise ValueError(f"its {name} has {key} with variances below 0")
    if not shared and claimed > sum(storages.values()):
        raise ValueError(f"the tensors of its {name} share memory, so that they claim more than it holds")


def check_classifier(checkpoint):
    """ValueError unless this can be a checkpoint of train.py; what is for resuming a run is checked where it is there.

    Args:
        checkpoint: dict with the keys `common.checkpoint.REQUIRED`, of any version, upgraded.
    """
    check_arch(checkpoint["arch"])
    check_input(checkpoint)
    arguments = checkpoint["model_args"]
    check_model_args(checkpoint["arch"], arguments)
    if arguments["num_classes"] != len(checkpoint["classes"]):
        raise ValueError(f"it has {len(checkpoint['classes'])} classes, but {arguments['num_classes']} outputs")
    check_kind(arguments.get("in_chans", 3), Literal[3], "its model_args' in_chans")
    check_training(checkpoint)
    check_both_weights(checkpoint, outline_network(checkpoint["arch"], arguments))
    check_calibration(checkpoint.get("calibration"), len(checkpoint["classes"]), checkpoint["img_size"])


def check_both_weights(checkpoint, network):
    """ValueError unless "state_dict" and "state_dict_ema", which may be missing or None, are weights of `network`."""
    check_weights("state_dict", checkpoint["state_dict"], network)
    if checkpoint.get("state_dict_ema") is not None:
        check_weights("state_dict_ema", checkpoint["state_dict_ema"], network)


def check_calibration(calibration, classes, img_size):
    """ValueError unless `calibration` is None or can be that of `common.calibration.fit`.

    Args:
        calibration, img_size: what a checkpoint has under these names.
        classes: number of classes.
    """
    if calibration is None:
        return
    check_keys(calibration, CALIBRATION, "its calibration")
    check_fields(calibration, CALIBRATION, "its calibration's")
    if side_lengths(calibration["img_size"]) != side_lengths(img_size):
        raise ValueError(f"its calibration's img_size must be its own, {img_size}, got {calibration['img_size']}")
    score = calibration["score"]
    if score is None:
        return
    check_keys(score, SCORE, "its calibration's score")
    sizes = {}
    for name, shape in SCORE.items():
        tensor = score.get(name)
        if not torch.is_tensor(tensor) or tensor.dtype != torch.float32 or tensor.dim() != len(shape):
            raise ValueError(f"its calibration's {name} must be a float32 tensor of {len(shape)} dimensions")
        for size, expected in zip(tensor.shape, shape):
            most = dict(present=classes, directions=classes - 1).get(expected, size)
            expected = sizes.setdefault(expected, size) if isinstance(expected, str) else expected
            if size != expected or not 0 < size <= most:
                raise ValueError(f"its calibration's {name} has an impossible shape, {tuple(tensor.shape)}")
    check_tensors("calibration's score", score)
    if (score["spread"] <= 0).any() or (score["scale"][1] <= 0).any() or (score["quantiles"].diff() < 0).any():
        raise ValueError("its calibration's score has variances or quantiles that cannot be")


def check_training(checkpoint):
    """ValueError unless what a checkpoint holds for resuming, and of how it was trained, can be used as far as it is
    there."""
    for key, kind in COUNTERS.items():
        if key in checkpoint:
            check_kind(checkpoint[key], kind, f"its {key}")
    check_history(checkpoint.get("history", []))
    check_best(checkpoint.get("best"), checkpoint["classes"])
    check_data(checkpoint.get("data", {}), checkpoint["classes"])
    for name in ("config", "versions"):
        check_settings(checkpoint.get(name, {}), f"its {name}")
    config = upgrade_config(checkpoint.get("config", {}))
    for name, kind in CONFIG.items():
        if name in config:
            check_kind(config[name], kind, f"its config's {name}")
    check_optimizer(checkpoint)


def check_best(best, classes):
    """ValueError unless `best` is None or can be `common.run_folder.TrainingState.best`."""
    if best is None:
        return
    check_keys(best, ("result", "cells"), "its best")
    check_fields(best, dict(result=dict), "its best's")
    if best["result"].get("classes") != classes:
        raise ValueError("its best's classes are not its own")
    check_integers(best.get("cells"), 3, "its best's cells")
    true, predicted, counts = best["cells"].T
    if len(counts) and not (0 <= min(true.min(), predicted.min()) <= max(true.max(), predicted.max()) < len(classes)):
        raise ValueError("its best's cells name classes that it does not have")
    if (counts < 0).any() or counts.sum() > MAX_IMAGES:
        raise ValueError("its best's cells count more images than there can be")


def check_data(data, classes):
    """ValueError unless `data` can be what `common.fingerprints.fingerprint_images` returns."""
    check_keys(data, ("train", "val"), "its data")
    for part, images in data.items():
        check_fields(images if isinstance(images, dict) else {}, IMAGES, f"its data's {part}'s")
        by_class = images["by_class"]
        plain = [isinstance(row, (list, tuple)) and [type(value) for value in row] == [int, str] for row in by_class]
        if len(by_class) != len(classes) or not all(plain):
            raise ValueError(f"its data's {part}'s by_class must have a number and a text for each class")
        if images.get("files") is not None:
            check_integers(images["files"], 2, f"its data's {part}'s files")
            if not len(images["files"]) == images["images"] == sum(count for count, _ in by_class):
                raise ValueError(f"its data's {part} must have as many files as images")


def check_integers(table, columns, name):
    """ValueError unless `table`, which is called `name`, is an int64 tensor of rows of so many columns."""
    if not torch.is_tensor(table) or table.dtype != torch.int64 or table.dim() != 2 or table.shape[1] != columns:
        raise ValueError(f"{name} must be a tensor of rows of {columns} whole numbers, got {brief(table)}")
    check_tensors(name.removeprefix("its "), {"it": table})


def check_history(history):
    """ValueError unless `history` is a list of dicts of numbers, one for each epoch."""
    if not isinstance(history, list):
        raise ValueError(f"its history must be a list, got {brief(history)}")
    for row in history:
        if not isinstance(row, dict) or type(row.get("epoch")) is not int:
            raise ValueError(f"its history must have rows with the number of an epoch, got {brief(row)}")
        for key, value in row.items():
            # A loss may have been NaN or infinite.
            number = type(value) is float or type(value) is int and not is_extreme(value)
            if not isinstance(key, str) or not number and value is not None:
                raise ValueError(f"its history must have names with numbers, got {brief({key: value})}")


def check_settings(settings, name):
    """ValueError unless `settings`, which are called `name`, are a dict of texts, numbers, and lists of these."""
    if not isinstance(settings, dict):
        raise ValueError(f"{name} must be a dictionary, got {brief(settings)}")
    for key, value in settings.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        plain = all(isinstance(item, (str, bool, int, float, type(None))) for item in values)
        if not isinstance(key, str) or not plain or any(is_extreme(item) for item in values):
            raise ValueError(f"{name} must have names with plain values, got {brief({key: value})}")


def is_extreme(value):
    """Whether a value is a number that is not finite, or an integer of more than 64 bits."""
    if isinstance(value, float):
        return not math.isfinite(value)
    return isinstance(value, int) and abs(value) >= 2**64


def check_optimizer(checkpoint):
    """ValueError unless "optimizer" and "scaler" have the form of a state, as far as they are there.

    Whether the optimizer's state is that of this network, is found out when it is loaded.
    """
    if "optimizer" not in checkpoint:
        return
    optimizer = checkpoint["optimizer"]
    check_keys(optimizer, ("state", "param_groups"), "its optimizer")
    check_fields(optimizer, dict(state=dict, param_groups=list), "its optimizer's")
    for group in optimizer["param_groups"]:
        check_fields(group if isinstance(group, dict) else {}, dict(params=list[Count]), "its optimizer's group's")
    numbers = {number for group in optimizer["param_groups"] for number in group["params"]}
    if len(numbers) < sum(len(group["params"]) for group in optimizer["param_groups"]):
        raise ValueError("its optimizer has a parameter twice")
    for number, state in optimizer["state"].items():
        if number not in numbers or not isinstance(state, dict):
            raise ValueError(f"its optimizer has a state for {brief(number)}, which is no parameter")
        tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
        check_tensors(f"optimizer's state {number}", tensors)
        check_settings({key: value for key, value in state.items() if key not in tensors}, "its optimizer's state")
    scaler = checkpoint.get("scaler", {})
    check_keys(scaler, SCALER, "its scaler")
    if scaler:
        check_fields(scaler, SCALER, "its scaler's")
