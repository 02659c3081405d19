"""An ONNX file that tools/export.py wrote, run by onnxruntime.

All that test.py needs to know beside the network stands in the file's metadata, as JSON: arch, classes, mean, std,
img_size and, for recordings, sound.
"""

import json
from pathlib import Path

import torch

from common.extras import require
from common.options import UserError

METADATA = ("arch", "classes", "mean", "std", "img_size")  # keys of a checkpoint that go into every exported file
METADATA_OF_SOUNDS = ("sound",)  # and those that only a network for recordings has


class OnnxNetwork:
    """Function on images (N, 3, height, width) -> logits (N, classes), both float32 tensors on the CPU.

    Args:
        path: .onnx file.

    Attributes:
        about: what `METADATA` names, and `METADATA_OF_SOUNDS` for recordings.

    Raises:
        UserError: if the file does not exist, is damaged, or was not written by tools/export.py.
    """

    def __init__(self, path):
        onnxruntime = require("onnxruntime")
        if not Path(path).is_file():
            raise UserError(f"there is no file {path}; tools/export.py makes one")
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            metadata = self.session.get_modelmeta().custom_metadata_map
        except Exception as error:  # onnxruntime's errors have no common class of their own
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is damaged or no ONNX file ({reason}); export it again") from error
        missing = [name for name in METADATA if name not in metadata]
        if missing:
            raise UserError(f"{path} lacks {', '.join(missing)} in its metadata; export it with tools/export.py")
        named = [name for name in (*METADATA, *METADATA_OF_SOUNDS) if name in metadata]
        self.about = {name: json.loads(metadata[name]) for name in named}

    def __call__(self, images):
        return torch.from_numpy(self.session.run(None, {"images": images.numpy()})[0])
