"""Export a trained network: ONNX, 8-bit ONNX, a PyTorch program, and safetensors for timm.

    python tools/export.py                               the newest checkpoints/*/best.pth
    python tools/export.py --checkpoint some.pth --formats onnx,int8
    python test.py --checkpoint exports/unireplknet_t/model.onnx some_photo.jpg

Outputs in exports/<model>/:

    model.onnx           float32, any batch size, for onnxruntime and other ONNX runtimes
    model.int8.onnx      8-bit weights and activations, calibrated on images of data/train
    model.pt2            the program of torch.export, which needs no code of this repository
    timm/                model.safetensors and config.json as on the Hugging Face Hub, for further training with timm

The first three hold the reparameterized network. All take images (N, 3, height, width), resized and normalised as by
test.py, and return logits, whose softmax is calibrated if the checkpoint is (but for timm/, which has the weights as
they were trained); model.onnx then returns as a second output how far each image is known, from 0 to 1: call those
below 0.05 unknown, as test.py does. Class names, mean, std and size are stored inside. Each is run on images of
data/val and compared with the trained network: one that differs by more than TOLERANCE is not written. Quantisation to
8 bits does change the logits, so for that file the accuracy before and after is reported instead.
"""

import contextlib
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import numpy as np
import safetensors.torch
import timm
import torch

from common.audio import kind_of
from common.calibration import CalibratedNetwork
from common.checkpoint import build_network, find_checkpoint, load_checkpoint
from common.dataset import height_and_width, transform_of
from common.evaluation import accuracy, choose_images, read_batches
from common.extras import require
from common.onnx_network import METADATA, OPTIONAL_METADATA, OnnxNetwork
from common.options import Name, NonNegative, NonNegativeInt, NotEmpty, PositiveInt, UserError, run

Format = Literal["onnx", "int8", "program", "timm"]

CHECKPOINT: str = ""  # file that train.py saved; "": the newest checkpoints/*/best.pth, else "seedlings"
FORMATS: Annotated[list[Format], NotEmpty()] = ["onnx", "int8", "program", "timm"]  # what to write
DATA: Name = "data"  # folder whose val/ holds the images to compare on, and train/ those to calibrate on
IMAGES: NonNegativeInt = 200  # images of val/ to compare on, equally many of each class; 0: all
TOLERANCE: NonNegative = 1e-4  # maximum accepted absolute difference of a logit, except for int8
CALIBRATION: PositiveInt = 120  # images of train/ that determine the ranges of the 8-bit activations
OUTPUT: Name = "exports"  # folder that holds <model>/; files of an earlier export are replaced

KNOWN_TOLERANCE = 0.02  # of the output "known", which is a step function with steps of 0.001
OPSET = 18  # writes GELU with Erf; from 20 on there is an operator of its own, which fewer runtimes know
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # for the formats onnx and int8
CROP_MODES = dict(squeeze="squash", pad="border", crop="center")  # what timm calls train.py's FIT


def main():
    if {"onnx", "int8"} & set(FORMATS):
        require(*PACKAGES)
    path = find_checkpoint(CHECKPOINT)
    checkpoint = load_checkpoint(path)
    height, width = height_and_width(checkpoint["img_size"])
    print(f"{path}: {checkpoint['arch']}, {len(checkpoint['classes'])} classes, {height} x {width} pixels")
    reference = Reference(checkpoint, Path(DATA, "val"), IMAGES)

    folder = Path(OUTPUT, checkpoint["arch"])
    folder.mkdir(parents=True, exist_ok=True)
    merged = build_network(checkpoint)
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        scratch = Path(scratch)
        if {"onnx", "int8"} & set(FORMATS):
            write_onnx(merged, checkpoint, scratch / "model.onnx")
        if "int8" in FORMATS:
            paths, _ = choose_images(Path(DATA, "train"), checkpoint["classes"], CALIBRATION)
            images = read_batches(paths, reference.transform, 8, "calibration", reference.load)
            write_int8(scratch / "model.onnx", images, scratch / "model.int8.onnx")
            reference.compare("model.int8.onnx", OnnxNetwork(scratch / "model.int8.onnx").predict, np.inf)
            move(scratch / "model.int8.onnx", folder)
        if "onnx" in FORMATS:
            reference.compare("model.onnx", OnnxNetwork(scratch / "model.onnx").predict, TOLERANCE)
            move(scratch / "model.onnx", folder)
        if "program" in FORMATS:
            write_program(merged, checkpoint, scratch / "model.pt2")
            program = torch.export.load(scratch / "model.pt2").module()
            reference.compare("model.pt2", lambda images: (program(images), None), TOLERANCE)
            move(scratch / "model.pt2", folder)
        if "timm" in FORMATS:
            write_timm(checkpoint, scratch / "timm")
            network = read_timm(scratch / "timm")
            reference.compare("timm", lambda images: (network(images) / reference.temperature, None), TOLERANCE)
            move(scratch / "timm", folder)
    print(f"files in {folder}")


class Exported(torch.nn.Module):
    """The reparameterized `network` with its calibration, returning tensors only: logits or, `with_score` where the
    checkpoint has one, (logits, known)."""

    def __init__(self, network, checkpoint, with_score=False):
        super().__init__()
        self.network = CalibratedNetwork(network, checkpoint.get("calibration"))
        self.with_score = with_score and self.network.score is not None
        self.eval()

    def forward(self, images):
        logits, known = self.network(images)
        return (logits, known) if self.with_score else logits


class Reference:
    """The trained network's logits on validation images, which those of each exported file are compared with.

    Args:
        checkpoint: what `load_checkpoint` returned.
        folder: such as data/val.
        count: number of images; 0: all.
    """

    def __init__(self, checkpoint, folder, count):
        kind = kind_of(checkpoint)
        self.load = kind.load
        self.transform = transform_of(checkpoint)
        self.paths, self.labels = choose_images(folder, checkpoint["classes"], count)
        network = CalibratedNetwork(build_network(checkpoint, merge=False), checkpoint.get("calibration"))
        self.temperature = network.temperature
        self.logits, self.known = self.compute("PyTorch", network)
        acc1 = accuracy(self.logits, self.labels)
        print(f"{'PyTorch, as trained':24} acc1 {acc1:.2f} % on {len(self.paths)} {kind.name}s of {folder}")

    @torch.inference_mode()
    def compute(self, name, predict):
        """(logits (N, classes), known (N,) or None) by a function of images (N, 3, H, W) that returns the same."""
        batches = read_batches(self.paths, self.transform, 32, name, self.load)
        logits, known = zip(*map(predict, batches))
        return torch.cat(logits).numpy(), None if known[0] is None else torch.cat(known).numpy()

    def compare(self, name, predict, tolerance):
        """Print how an exported network compares; UserError if a logit differs by more than `tolerance`, or how far an
        image is known by more than `KNOWN_TOLERANCE`."""
        logits, known = self.compute(name, predict)
        difference = float(abs(logits - self.logits).max())
        same = 100 * float((logits.argmax(1) == self.logits.argmax(1)).mean())
        print(
            f"{name:24} acc1 {accuracy(logits, self.labels):.2f} %, {same:.1f} % identical predictions, "
            f"maximum difference of a logit {difference:.1e}"
        )
        if known is not None and not (apart := abs(known - self.known).max()) <= KNOWN_TOLERANCE:
            raise UserError(
                f"{name} differs from the trained network by {apart:.3f} in how far an image is known, so it is not "
                "written; export with another version of PyTorch"
            )
        if not difference <= tolerance:  # NaN is refused, too
            raise UserError(
                f"{name} differs from the trained network by {difference:.1e}, more than TOLERANCE {tolerance:.1e}, "
                "so it is not written; export with another version of PyTorch, or raise TOLERANCE"
            )


def write_onnx(network, checkpoint, path):
    """Write the reparameterized `network` to the ONNX file `path`, calibrated."""
    [onnx] = require("onnx")
    network = Exported(network, checkpoint, with_score=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's about itself
        torch.onnx.export(
            network,
            example_inputs(checkpoint),
            path,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits", "known"] if network.with_score else ["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,  # all in one file
            verbose=False,
        )
    model = onnx.load(path)
    foreign = {f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain not in ("", "ai.onnx")}
    assert not foreign, f"the graph contains operators that only PyTorch has: {foreign}"
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata(checkpoint).items()})
    onnx.save(model, path)


def example_inputs(checkpoint):
    """Images to trace the network with; two, since PyTorch would specialise a batch of one to that size."""
    return (torch.zeros(2, 3, *height_and_width(checkpoint["img_size"])),)


def metadata(checkpoint):
    """The metadata of an exported file."""
    content = {name: checkpoint[name] for name in (*METADATA, *OPTIONAL_METADATA) if name in checkpoint}
    return content | (dict(calibrated=True) if checkpoint.get("calibration") else {})


def write_int8(source, images, path):
    """Quantise an ONNX file to 8 bits: weights per channel, activations by calibration.

    The output "known" is left out, since distances of 8-bit features are others.

    Args:
        source: .onnx file of `write_onnx`.
        images: iterator over batches (N, 3, H, W) to calibrate on.
        path: .onnx file to write.
    """
    quantization, shape_inference = require("onnxruntime.quantization", "onnxruntime.quantization.shape_inference")
    [onnx] = require("onnx")

    class Batches(quantization.CalibrationDataReader):
        def get_next(self):
            batch = next(images, None)
            return None if batch is None else {"images": batch.numpy()}

    prepared = path.with_name(f"{path.name}.prepared")
    try:
        model = onnx.load(source)
        del model.graph.output[1:]
        onnx.save(model, prepared)
        with contextlib.redirect_stdout(None), muted("root"):
            shape_inference.quant_pre_process(prepared, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                path,
                Batches(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                per_channel=True,  # the channels of the merged kernels differ in scale by orders of magnitude
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                # The other methods keep every activation of every image in memory until the end.
                calibrate_method=quantization.CalibrationMethod.MinMax,
            )
    finally:
        prepared.unlink(missing_ok=True)


@contextlib.contextmanager
def muted(name):
    """Within this context the logger `name` reports errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def move(new, folder):
    """Move a file, or the files in a folder of its own, into `folder`, over earlier ones; other files there stay."""
    path = folder / new.name
    if not new.is_dir():
        new.replace(path)
        return
    path.mkdir(exist_ok=True)
    for file in new.iterdir():
        file.replace(path / file.name)


def write_program(network, checkpoint, path):
    """Write the reparameterized `network` as a torch.export program, calibrated, with the metadata as `metadata.json`
    inside."""
    shapes = ({0: torch.export.Dim("batch")},)
    network = Exported(network, checkpoint)
    program = torch.export.export(network, example_inputs(checkpoint), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata(checkpoint))})


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
        crop_mode=CROP_MODES[checkpoint.get("fit", "squeeze")],  # resized to a square as in test.py
        crop_pct=1.0,
        interpolation="bilinear",
        num_classes=len(checkpoint["classes"]),
    )
    model_args = {name: value for name, value in checkpoint["model_args"].items() if name != "num_classes"}
    config = dict(label_names=checkpoint["classes"])
    timm.models.save_for_hf(network, folder, model_config=config, model_args=model_args, safe_serialization=True)


def read_timm(folder):
    """Build the network of a folder that `write_timm` wrote, in eval mode."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    arguments = dict(num_classes=config["num_classes"]) | config.get("model_args", {})
    network = timm.create_model(config["architecture"], **arguments)
    network.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    return network.eval()


if __name__ == "__main__":
    run(main)
