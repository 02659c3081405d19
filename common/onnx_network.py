"""An ONNX file written by tools/export.py, run by onnxruntime.

The file's metadata contains, as JSON, what test.py needs besides the network: arch, classes, mean, std, img_size and,
where they matter, sound, value_range, fit, or that its probabilities are calibrated.
"""

import json
from pathlib import Path

import torch

from common.checkpoint_check import check_arch
from common.extras import require
from common.file_checks import brief, check_input, check_kind, naming, side_lengths
from common.options import UserError

METADATA = ("arch", "classes", "mean", "std", "img_size")  # keys of a checkpoint that every exported file contains
OPTIONAL_METADATA = ("sound", "value_range", "fit", "calibrated")  # only some have them


class OnnxNetwork:
    """Function of images (N, 3, height, width) -> logits (N, classes), both float32 tensors on the CPU.

    Where the checkpoint was calibrated, the softmax of the logits is, too, and the file has a second output, "known".

    Args:
        path: .onnx file.

    Attributes:
        about: {key: value} of `METADATA`, and those of `OPTIONAL_METADATA` that it has.
        has_score: whether it has the output "known".

    Raises:
        UserError: if the file does not exist, is damaged, says what cannot be, or was not written by tools/export.py.
    """

    def __init__(self, path):
        [onnxruntime] = require("onnxruntime")
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}; tools/export.py writes one")
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.has_score = [output.name for output in self.session.get_outputs()][1:] == ["known"]
        except Exception as error:  # onnxruntime's errors have no base class of their own
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is damaged or no ONNX file ({reason}); export it again") from error
        missing = [name for name in METADATA if name not in metadata]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)} in its metadata; export it with tools/export.py")
        with naming(path, "export it again"):
            named = [name for name in (*METADATA, *OPTIONAL_METADATA) if name in metadata]
            self.about = {name: read_value(name, metadata[name]) for name in named}
            check_arch(self.about["arch"])
            check_input(self.about)
            check_kind(self.about.get("calibrated", False), bool, "its calibrated")
            self.check_graph()

    def check_graph(self):
        """ValueError unless the network takes the images and has the outputs that its metadata names, all finite."""
        size, count = side_lengths(self.about["img_size"]), len(self.about["classes"])
        try:
            logits, known = self.predict(torch.zeros(2, 3, *size))
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"it does not take images of {size[0]} x {size[1]} pixels ({error})") from error
        if logits.shape != (2, count):
            raise ValueError(f"it has {count} classes, but outputs of the shape {tuple(logits.shape)} for two images")
        if self.has_score and known.shape != (2,):
            raise ValueError(f"its output known has the shape {tuple(known.shape)} for two images")
        if not logits.isfinite().all() or self.has_score and not ((known >= 0) & (known <= 1)).all():
            raise ValueError("its predictions are not finite")

    def __call__(self, images):
        return self.predict(images)[0]

    def predict(self, images):
        """(logits (N, classes), known (N,) or None): what `common.calibration.CalibratedNetwork` returns; RuntimeError
        if it cannot, as for images of another size."""
        try:
            outputs = self.session.run(None, {"images": images.numpy()})
        except Exception as error:  # onnxruntime's errors have no base class of their own
            raise RuntimeError(f"onnxruntime: {' '.join(str(error).split())[:200]}") from error
        logits, *known = map(torch.from_numpy, outputs)
        return logits, known[0] if self.has_score else None


def read_value(name, text):
    """The value of one entry of the metadata; ValueError if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {name} must be JSON, got {brief(text)}") from error
