"""Grad-CAM (Selvaraju et al., ICCV 2017, arXiv:1610.02391): which part of an image supports a prediction."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from common.options import UserError

SMALLEST_MAP = 5  # a coarser one, such as the last of 64-pixel images with 2 x 2 positions, locates nothing


def grad_cam(network, images, classes=None):
    """Compute where in each image feature maps support a class.

    The maps are those of the last stage, or for small images of the last one with at least `SMALLEST_MAP` positions a
    side.

    Args:
        network: a timm classifier in eval mode, with feature maps (N, C, H, W).
        images: (N, 3, H, W), normalised.
        classes: (N,), the class to explain for each image; None: the predicted one.

    Returns:
        (logits (N, classes), float tensor (N, H, W) from 0 to 1, the maps in words: "stage 3 of 4, 7 x 7").

    Raises:
        UserError: if the network has no such maps, like most transformers.
    """
    stages, kept = network.feature_info[:], {}

    def keep(number):
        return lambda module, inputs, output: kept.update({number: output})

    hooks = [network.get_submodule(s["module"]).register_forward_hook(keep(n)) for n, s in enumerate(stages)]
    try:
        # The maps need a gradient, whether or not the weights are trained.
        with torch.enable_grad():
            logits = network(images.detach().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    last = kept.get(len(stages) - 1)
    if last is None or last.ndim != 4 or last.shape[1] != stages[-1]["num_chs"]:
        raise UserError("Grad-CAM needs a network with feature maps (N, C, H, W), such as UniRepLKNet or ResNet")
    fine = [n for n, maps in kept.items() if maps.ndim == 4 and min(maps.shape[2:]) >= SMALLEST_MAP]
    stage = max(fine, default=min(kept))
    maps = kept[stage]
    classes = logits.argmax(1) if classes is None else classes
    gradient = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), maps)[0]
    cam = F.relu((gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True))  # (N, 1, h, w)
    cam = F.interpolate(cam, images.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)
    cam = cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)
    where = f"stage {stage + 1} of {len(stages)}, {maps.shape[2]} x {maps.shape[3]}"
    return logits.detach(), cam.detach(), where


def overlay(image, cam):
    """Draw a map over its image: unimportant regions darkened, with a contour at half of the map's maximum.

    Args:
        image: PIL RGB.
        cam: array (H, W) from 0 to 1; it is resized to the image.

    Returns:
        PIL RGB image of the same size.
    """
    values = Image.fromarray(np.asarray(cam, dtype=np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    values = np.asarray(values)
    pixels = np.asarray(image) * (0.25 + 0.75 * values[..., None])
    inside = Image.fromarray(np.uint8(255 * (values >= 0.5)))
    width = max(image.size) // 100 * 2 + 1
    contour = np.asarray(inside) != np.asarray(inside.filter(ImageFilter.MaxFilter(width + 2)))
    pixels[contour] = 255
    return Image.fromarray(np.uint8(pixels))
