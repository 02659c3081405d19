"""A web page to try a trained network: drop a photograph, see the likeliest classes and what they rest on (Grad-CAM).

    python tools/demo.py                                           the newest checkpoints/*/best.pth
    python tools/demo.py --checkpoint some.pth --port 8000

The page runs on this machine and is seen by it alone, unless SHARE is set. Ctrl-C ends it.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts and common/
from common.checkpoint import build_network, find_checkpoint, load_checkpoint
from common.dataset import eval_transform, height_and_width
from common.device import choose_device
from common.extras import require
from common.gradcam import grad_cam, overlay
from common.options import UserError, run
from common.sounds import file_kind

CHECKPOINT: str = ""  # file that train.py saved; "": the newest checkpoints/*/best.pth, else "seedlings"
TOP_K: int = 5  # how many of the likeliest classes to show
DEVICE: str = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
PORT: int = 7860  # of http://127.0.0.1:PORT
SHARE: bool = False  # let everybody see the page under an address of gradio.live, as long as it runs

EXPLANATION = (
    "Bright in the picture: what speaks for the first class; the line surrounds what counts at least half as much as "
    "the best place."
)


class Answers:
    """Function on the path of a photograph -> ({class: probability} of the TOP_K likeliest, PIL picture of Grad-CAM).

    Args:
        checkpoint: what `load_checkpoint` returned.
        device: the `torch.device` to compute on.
    """

    def __init__(self, checkpoint, device):
        self.classes = checkpoint["classes"]
        self.network = build_network(checkpoint).to(device)
        self.transform = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])
        self.device = device
        self.kind = file_kind(checkpoint.get("sound"))

    def __call__(self, path):
        photo = self.kind.load(path)
        logits, cam = grad_cam(self.network, self.transform(photo)[None].to(self.device))
        top = logits[0].softmax(0).topk(min(TOP_K, len(self.classes)))
        probabilities = {self.classes[i]: p for p, i in zip(top.values.tolist(), top.indices.tolist())}
        return probabilities, overlay(photo, cam[0].cpu())


def build_page(answers, title, sound=None):
    """The gradio page around `answers`, for photographs or, where `sound` is not None, recordings."""
    gradio = require("gradio")

    def answer(path):
        if path is None:  # the picture was taken away
            return None, None
        try:
            return answers(path)
        except UserError as error:
            raise gradio.Error(f"{Path(path).name}: {error}") from error

    with gradio.Blocks(title="UniRepLKNet", analytics_enabled=False) as page:
        gradio.Markdown(f"# UniRepLKNet\n{title}")
        with gradio.Row():
            if sound is None:
                photo = gradio.Image(type="filepath", sources=["upload", "clipboard"], label="photograph")
            else:
                photo = gradio.Audio(type="filepath", sources=["upload", "microphone"], label="recording")
            with gradio.Column():
                label = gradio.Label(num_top_classes=TOP_K, label="likeliest classes")
                cam = gradio.Image(label="Grad-CAM", interactive=False)
                gradio.Markdown(EXPLANATION)
        photo.change(answer, photo, [label, cam])
    return page


def main():
    if TOP_K < 1:
        raise UserError(f"TOP_K must be at least 1, got {TOP_K}")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    require("gradio")
    path = find_checkpoint(CHECKPOINT)
    checkpoint = load_checkpoint(path)
    device = choose_device(DEVICE)
    (height, width), classes = height_and_width(checkpoint["img_size"]), checkpoint["classes"]
    title = f"{checkpoint['arch']}, {height} x {width} pixels, {len(classes)} classes: {', '.join(classes)}"
    page = build_page(Answers(checkpoint, device), title, checkpoint.get("sound"))
    page.launch(server_port=PORT, share=SHARE)


if __name__ == "__main__":
    run(main)
