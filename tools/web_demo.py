"""A web page to try a trained network: upload an image or a recording, see the top-k classes and a Grad-CAM map.

    python tools/web_demo.py                                           the newest checkpoints/*/best.pth
    python tools/web_demo.py --checkpoint some.pth --port 8000

The page is served by this machine and visible to it alone, unless SHARE is set. Ctrl-C stops it.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/, tools/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import torch

from common.audio import kind_of
from common.calibration import CalibratedNetwork
from common.checkpoint import build_network, find_checkpoint, load_checkpoint
from common.dataset import height_and_width, transform_of
from common.device import choose_device
from common.extras import require
from common.fit import visible_part
from common.options import Limits, Name, PositiveInt, Rate, UserError, run
from common.text import label
from tools.grad_cam import grad_cam, overlay

CHECKPOINT: str = ""  # file that train.py saved; "": the newest checkpoints/*/best.pth, else "seedlings"
TOP_K: PositiveInt = 5  # number of most likely classes to show
UNKNOWN: Rate = 0.05  # fraction of known images that are called unknown, as less usual than the others; 0: off
DEVICE: Name = "auto"  # "auto": cuda, else mps, else cpu; or a device such as "cuda:1"
PORT: Annotated[int, Limits(1, 65535)] = 7860  # TCP port, the page is http://127.0.0.1:PORT
SHARE: bool = False  # make the page public at a gradio.live address while it runs

SHOWN_CLASSES = 40  # names in the heading
EXPLANATION = "Bright regions support the top class; the contour is at half of the maximum."


def main():
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    require("gradio")
    checkpoint = load_checkpoint(find_checkpoint(CHECKPOINT))
    device = choose_device(DEVICE)
    (height, width), classes = height_and_width(checkpoint["img_size"]), checkpoint["classes"]
    if TOP_K > len(classes):
        print(f"TOP_K {TOP_K}: the network has {len(classes)} classes, and all are shown")
    names = ", ".join(map(label, classes[:SHOWN_CLASSES])) + (", ..." if len(classes) > SHOWN_CLASSES else "")
    title = f"{checkpoint['arch']}, {height} x {width} pixels, {len(classes)} classes: {names}"
    predictor = Predictor(checkpoint, device, TOP_K, UNKNOWN)
    page = build_page(predictor, title, TOP_K, predictor.kind.name)
    page.launch(server_port=PORT, share=SHARE)


class Predictor:
    """Function on the path of a file -> ({class: probability} of the top-k classes, PIL image of the Grad-CAM map, the
    map in words, whether the image is known in words or "").

    Args:
        checkpoint: what `load_checkpoint` returned.
        device: the `torch.device` to compute on.
        top_k: number of classes.
        unknown: the constant UNKNOWN.
    """

    def __init__(self, checkpoint, device, top_k, unknown=0.0):
        self.classes = checkpoint["classes"]
        self.network = CalibratedNetwork(build_network(checkpoint), checkpoint.get("calibration")).to(device).eval()
        self.unknown = unknown
        self.transform = transform_of(checkpoint)
        self.fit = checkpoint.get("fit", "squeeze")
        self.device = device
        self.top_k = min(top_k, len(self.classes))
        self.kind = kind_of(checkpoint)

    def __call__(self, path):
        image = self.kind.load(path)
        pixels = self.transform(image)[None].to(self.device)
        _, cam, where = grad_cam(self.network.network, pixels)
        with torch.inference_mode():
            logits, known = self.network(pixels)
        top = logits[0].softmax(0).topk(self.top_k)
        probabilities = {self.classes[i]: p for p, i in zip(top.values.tolist(), top.indices.tolist())}
        verdict = describe_known(None if known is None else known.item(), self.unknown)
        return probabilities, overlay(visible_part(image, self.fit), cam[0].cpu()), f"Grad-CAM: {where}", verdict


def describe_known(known, unknown):
    """Whether an image is known, in words; "" if that is off.

    Args:
        known: of a `CalibratedNetwork`, for one image.
        unknown: the constant UNKNOWN.
    """
    if known is None or not unknown:
        return ""
    share = f"{100 * known:.1f} % of the validation images look as unusual or more so"
    return f"unknown: only {share}" if known < unknown else f"known: {share}"


def build_page(predict, title, top_k, kind="image"):
    """Build the gradio page.

    Args:
        predict: a `Predictor`, or a function like it.
        title: text below the heading.
        top_k: number of classes to show.
        kind: name of the kind of files that the network takes: "image" or "recording".

    Returns:
        `gradio.Blocks`.
    """
    [gradio] = require("gradio")

    def predict_file(path):
        if path is None:  # the file was removed from the page
            return None, None, "", ""
        try:
            return predict(path)
        except UserError as error:
            raise gradio.Error(f"{Path(path).name}: {error}") from error

    with gradio.Blocks(title="UniRepLKNet", analytics_enabled=False) as page:
        gradio.Markdown("# UniRepLKNet")
        gradio.Textbox(title, show_label=False, interactive=False, lines=1, max_lines=6)  # names are no Markdown
        with gradio.Row():
            with gradio.Column():
                inputs = []
                if kind == "recording":
                    inputs.append(gradio.Audio(type="filepath", sources=["upload", "microphone"], label="recording"))
                title = "image" if kind == "image" else "or a spectrogram that makedata.py wrote"
                # image_mode None: the file as it is; gradio's own conversion clips 16 bits and blackens transparency.
                sources = ["upload", "clipboard"]
                inputs.append(gradio.Image(type="filepath", image_mode=None, sources=sources, label=title))
            with gradio.Column():
                top = gradio.Label(num_top_classes=top_k, label="most likely classes")
                verdict = gradio.Textbox(label="known or unknown", interactive=False)
                cam = gradio.Image(label="Grad-CAM", interactive=False)
                gradio.Markdown(EXPLANATION)
                where = gradio.Textbox(label="feature maps", interactive=False)
        for file in inputs:
            file.change(predict_file, file, [top, cam, where, verdict])
    return page


if __name__ == "__main__":
    run(main, closed_output="ignore")
