"""An ONNX file written by tools/export.py, run by onnxruntime.

The file's metadata contains, as JSON, what test.py needs besides the network: arch, classes, mean, std, img_size and,
for recordings, sound.
"""

import json
from pathlib import Path

import torch

from common.extras import require
from common.options import UserError

METADATA = ("arch", "classes", "mean", "std", "img_size")  # keys of a checkpoint that every exported file contains
METADATA_OF_SOUNDS = ("sound",)  # and those that only a network for recordings has


class OnnxNetwork:
    """Function of images (N, 3, height, width) -> logits (N, classes), both float32 tensors on the CPU.

    Args:
        path: .onnx file.

    Attributes:
        about: {key: value} of `METADATA`, and of `METADATA_OF_SOUNDS` for recordings.

    Raises:
        UserError: if the file does not exist, is damaged, or was not written by tools/export.py.
    """

    def __init__(self, path):
        onnxruntime = require("onnxruntime")
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}; tools/export.py writes one")
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            metadata = self.session.get_modelmeta().custom_metadata_map
        except Exception as error:  # onnxruntime's errors have no base class of their own
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is damaged or no ONNX file ({reason}); export it again") from error
        missing = [name for name in METADATA if name not in metadata]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)} in its metadata; export it with tools/export.py")
        named = [name for name in (*METADATA, *METADATA_OF_SOUNDS) if name in metadata]
        self.about = {name: json.loads(metadata[name]) for name in named}

    def __call__(self, images):
        return torch.from_numpy(self.session.run(None, {"images": images.numpy()})[0])
