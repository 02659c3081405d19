"""What the processes of one run must have in common, on one machine or several, and what differs, in one sentence.

Paths, numbers of loading processes, sizes of caches and the like may differ. Fingerprints stand for files.
"""

import ast
import hashlib
import platform
from pathlib import Path

import numpy as np
import PIL
import timm
import torch
import torchvision

from common.augment import CUTOUT_ERROR
from common.device import choose_amp
from models.depthwise import INTERPRETED, environment_choice, explain

ROOT = Path(__file__).resolve().parent.parent
# Remedies for what the three functions below find.
ON_ENVIRONMENT = "install the same versions and the same code on all machines"
ON_CONSTANTS = "set the constants, options and environment variables alike on all machines"
ON_DATA = "copy the data folder of one machine to the others"

SHOWN = 3  # differences in a message
HIDDEN = "sha256:"  # what follows it in a value is compared, but not shown


def environment_facts(device):
    """{what: value} of versions, code and kind of device, which decide what is computed."""
    facts = {
        "the device": device.type,
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "PyTorch": str(torch.__version__).partition("+")[0],
        "torchvision": str(torchvision.__version__).partition("+")[0],
        "timm": timm.__version__,
        "NumPy": np.__version__,
        "Pillow": PIL.__version__,
        "Cutout": "torchvision's RandomErasing" if CUTOUT_ERROR else "torchtoolbox's",
    }
    paths = [ROOT / "train.py", ROOT / "ema.py", *sorted((ROOT / "common").glob("*.py"))]
    paths += sorted((ROOT / "models").glob("*.py"))
    return facts | {path.relative_to(ROOT).as_posix(): hash_code(path) for path in paths}


def hash_code(path):
    """Fingerprint of a Python file's code, without comments, formatting, and the values of its constants."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not isinstance(node, ast.AnnAssign)]  # compared by themselves
    return f"{HIDDEN}{hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]}"


def constant_facts(config, may_differ, device):
    """{what: value} of train.py's constants and what follows from them and the machine.

    Args:
        config: {name: value}.
        may_differ: names of constants that need not be the same.
        device: the `torch.device` of this process.
    """
    facts = {name: value for name, value in config.items() if name not in may_differ}
    dtype = choose_amp(config["AMP"], device) or torch.float32
    return facts | {
        "the precision": str(dtype).removeprefix("torch."),
        "UNIREPLKNET_DEPTHWISE": environment_choice(),
        "the large-kernel convolution": explain(13, 1, device, dtype)[0] + ", interpreted" * INTERPRETED,
    }


def data_facts(about):
    """{what: value} of images and statistics.

    Args:
        about: see `common.run_folder.describe_run`.
    """
    facts = {"the mean of the pixels": about["mean"], "their standard deviation": about["std"]}
    facts |= {f"the spectrograms' {name}": value for name, value in (about.get("sound") or {}).items()}
    facts["torch.compile"] = about["versions"]["compiled"]
    for part, images in about["data"].items():
        for name, (count, content) in zip(about["classes"], images["by_class"]):
            facts[f"class {name!r} in {part}"] = f"{count} images{HIDDEN}{content}"
    for part, images in about["data"].items():
        facts[f"the order of the images in {part}"] = f"{HIDDEN}{images['contents']}"
    return facts


def describe_disagreement(reports, remedy):
    """One sentence that says which machine differs from the first one, and in what; "" if none does.

    Args:
        reports: (host, {what: value}) of each process; see `HIDDEN`.
        remedy: what to do about it.
    """
    first, expected = reports[0]
    for number, (host, facts) in enumerate(reports):
        names = [name for name in expected | facts if facts.get(name) != expected.get(name)]
        if names:
            here, there = (host, first) if host != first else (f"process {number}", "process 0")
            texts = [describe_difference(name, facts, expected, there) for name in names[:SHOWN]]
            texts += [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
            return f"{here}: {'; '.join(texts)}; {remedy}"
    return ""


def describe_difference(name, facts, expected, there):
    """How one value differs from that of the process called `there`."""
    if name not in facts or name not in expected:
        return f"{name} is missing" if name not in facts else f"{name} is missing on {there}"
    here, other = (
        value.partition(HIDDEN)[0] if isinstance(value, str) and value else repr(value)
        for value in (facts[name], expected[name])
    )
    if here == other:
        return f"{name} is not the same as on {there}{f' ({here})' if here else ''}"
    return f"{name} is {here}, on {there} it is {other}"
