"""Take a trained network elsewhere: ONNX, 8-bit ONNX, a PyTorch program, and safetensors for timm.

    python tools/export.py                               the newest checkpoints/*/best.pth
    python tools/export.py --checkpoint some.pth --formats onnx,int8
    python test.py --checkpoint exports/unireplknet_t/model.onnx some_photo.jpg

Leaves in exports/<model>/:

    model.onnx           float32, batches of any size, for onnxruntime and whatever else reads ONNX
    model.int8.onnx      8-bit weights and activations, calibrated on pictures of data/train
    model.pt2            torch.export's program, which needs none of this repository's code
    timm/                model.safetensors and config.json as on the Hugging Face Hub, to train further with timm

The first three hold the merged network. All take pictures (N, 3, height, width), resized and normalised as by test.py,
and give logits; class names, mean, std and size are inside. Each is run on pictures of data/val and compared with the
network that was trained: one that differs by more than TOLERANCE is not left there. 8 bits do change the logits, so for
them the accuracy before and after is told instead.
"""

import contextlib
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts and common/
from common.checkpoint import build_network, find_checkpoint, load_checkpoint
from common.dataset import eval_transform, height_and_width
from common.evaluation import accuracy, choose_pictures, compute_logits, read_batches
from common.extras import require
from common.onnx_network import METADATA, METADATA_OF_SOUNDS, OnnxNetwork
from common.options import UserError, run
from common.sounds import file_kind

CHECKPOINT: str = ""  # file that train.py saved; "": the newest checkpoints/*/best.pth, else "seedlings"
FORMATS: list[str] = ["onnx", "int8", "program", "timm"]  # what to write
DATA: str = "data"  # folder whose val/ is compared on, and whose train/ calibrates the 8-bit network
PICTURES: int = 200  # pictures of val/ to compare on, as many of each class; 0: all
TOLERANCE: float = 1e-4  # largest difference of a logit from the trained network's that is accepted, 8 bits aside
CALIBRATION: int = 120  # pictures of train/ from which the ranges of the 8-bit activations are taken
OUTPUT: str = "exports"  # folder that holds <model>/ for the files; those of an earlier call are replaced

OPSET = 18  # writes GELU with Erf; from 20 on there is an operator of its own, which fewer runtimes know


def describe(checkpoint):
    """The metadata of an exported file."""
    return {name: checkpoint[name] for name in (*METADATA, *METADATA_OF_SOUNDS) if name in checkpoint}


def example(checkpoint):
    """Images to trace the network with; two, since PyTorch takes a single one for a batch of always one."""
    return (torch.zeros(2, 3, *height_and_width(checkpoint["img_size"])),)


def write_onnx(network, checkpoint, path):
    """Write the merged `network` to the ONNX file `path`."""
    onnx = require("onnx")
    require("onnxscript")  # torch.onnx writes with it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's about itself
        torch.onnx.export(
            network,
            example(checkpoint),
            path,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,  # all in one file
            verbose=False,
        )
    model = onnx.load(path)
    foreign = {f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    assert not foreign, f"operators that only PyTorch has are left in the graph: {foreign}"
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in describe(checkpoint).items()})
    onnx.save(model, path)


def write_program(network, checkpoint, path):
    """Write the merged `network` as torch.export's program, with the metadata as `metadata.json` inside."""
    program = torch.export.export(network, example(checkpoint), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(describe(checkpoint))})


def write_timm(checkpoint, folder):
    """Write the training structure as timm does for the Hugging Face Hub: model.safetensors and config.json."""
    network = build_network(checkpoint, merge=False)
    network.pretrained_cfg = dict(
        network.pretrained_cfg,
        tag="",  # not that of published weights
        pool_size=None,
        input_size=(3, *height_and_width(checkpoint["img_size"])),
        mean=checkpoint["mean"],
        std=checkpoint["std"],
        crop_mode="squash",  # resized to a square as in test.py, nothing cut off
        crop_pct=1.0,
        interpolation="bilinear",
        num_classes=len(checkpoint["classes"]),
    )
    model_args = {name: value for name, value in checkpoint["model_args"].items() if name != "num_classes"}
    config = dict(label_names=checkpoint["classes"])
    timm.models.save_for_hf(network, folder, model_config=config, model_args=model_args, safe_serialization=True)


def read_timm(folder):
    """The network in `folder`, in eval mode."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    arguments = dict(num_classes=config["num_classes"]) | config.get("model_args", {})
    network = timm.create_model(config["architecture"], **arguments)
    network.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return network.eval()


def write_int8(source, paths, transform, path, sound=None):
    """Quantise the ONNX file `source` to 8 bits: weights for each channel, activations by calibration.

    Args:
        source: .onnx of `write_onnx`.
        paths: pictures to calibrate on.
        transform: function on PIL RGB pictures.
        path: .onnx file to write.
        sound: None for pictures; for recordings see common/sounds.py.
    """
    quantization = require("onnxruntime.quantization")
    shape_inference = require("onnxruntime.quantization.shape_inference")

    class Pictures(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = read_batches(paths, transform, 8, "calibration", sound)

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    prepared = path.with_name(f"{path.name}.prepared")
    try:
        with contextlib.redirect_stdout(None), muted("root"):
            shape_inference.quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                path,
                Pictures(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                per_channel=True,  # the merged kernels' channels differ in size by orders of magnitude
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                # The other methods keep every activation of every picture in memory until the end.
                calibrate_method=quantization.CalibrationMethod.MinMax,
            )
    finally:
        prepared.unlink(missing_ok=True)


@contextlib.contextmanager
def muted(name):
    """Within this context the logger `name` tells errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def replace(new, path):
    """Put the file `new`, or the files in the folder `new`, where earlier ones may be; other files there stay."""
    if not new.is_dir():
        new.replace(path)
        return
    path.mkdir(exist_ok=True)
    for file in new.iterdir():
        file.replace(path / file.name)


def main():
    unknown = set(FORMATS) - {"onnx", "int8", "program", "timm"}
    if unknown or not FORMATS:
        raise UserError(f"FORMATS must name some of onnx, int8, program and timm, got {FORMATS}")
    if min(PICTURES, CALIBRATION - 1) < 0:
        raise UserError(f"PICTURES must be 0 or more and CALIBRATION 1 or more, got {PICTURES} and {CALIBRATION}")
    path = find_checkpoint(CHECKPOINT)
    checkpoint = load_checkpoint(path)
    classes, sound = checkpoint["classes"], checkpoint.get("sound")
    height, width = height_and_width(checkpoint["img_size"])
    transform = eval_transform((height, width), checkpoint["mean"], checkpoint["std"])
    paths, labels = choose_pictures(Path(DATA, "val"), classes, PICTURES, sound=sound)
    network = build_network(checkpoint, merge=False)
    trained = compute_logits(network, paths, transform, description="PyTorch", sound=sound)
    before = accuracy(trained, labels)
    print(f"{path}: {checkpoint['arch']}, {len(classes)} classes, {height} x {width} pixels")
    files = f"{len(paths)} {file_kind(sound).name}s of {Path(DATA, 'val')}"
    print(f"{'PyTorch, as trained':24} acc1 {before:.2f} % on {files}")

    folder = Path(OUTPUT, checkpoint["arch"])
    folder.mkdir(parents=True, exist_ok=True)
    merged = build_network(checkpoint)
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        scratch = Path(scratch)

        def check(name, network, accept):
            """Compare with the trained network; move the file into place if `accept` allows the difference."""
            logits = compute_logits(network, paths, transform, description=name, sound=sound)
            difference = float(abs(logits - trained).max())
            same = 100 * float((logits.argmax(1) == trained.argmax(1)).mean())
            print(
                f"{name:24} acc1 {accuracy(logits, labels):.2f} %, {same:.1f} % the same answers, "
                f"largest difference of a logit {difference:.1e}"
            )
            if not difference <= accept:  # NaN is refused, too
                raise UserError(
                    f"{name} differs from the trained network by {difference:.1e}, more than TOLERANCE {accept:.1e}, "
                    "so it is not written; export with another version of PyTorch, or raise TOLERANCE"
                )
            replace(scratch / name, folder / name)

        if {"onnx", "int8"} & set(FORMATS):
            write_onnx(merged, checkpoint, scratch / "model.onnx")
        if "int8" in FORMATS:
            calibration, _ = choose_pictures(Path(DATA, "train"), classes, CALIBRATION, sound=sound)
            write_int8(scratch / "model.onnx", calibration, transform, scratch / "model.int8.onnx", sound)
            check("model.int8.onnx", OnnxNetwork(scratch / "model.int8.onnx"), np.inf)
        if "onnx" in FORMATS:
            check("model.onnx", OnnxNetwork(scratch / "model.onnx"), TOLERANCE)
        if "program" in FORMATS:
            write_program(merged, checkpoint, scratch / "model.pt2")
            check("model.pt2", torch.export.load(scratch / "model.pt2").module(), TOLERANCE)
        if "timm" in FORMATS:
            write_timm(checkpoint, scratch / "timm")
            check("timm", read_timm(scratch / "timm"), TOLERANCE)
    print(f"files in {folder}")


if __name__ == "__main__":
    run(main)
