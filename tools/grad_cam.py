"""Grad-CAM (Selvaraju et al., ICCV 2017, arXiv:1610.02391): which part of an image supports a prediction."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from common.options import UserError


def grad_cam(network, images, classes=None):
    """Compute where in each image the last stage's feature maps support a class.

    Args:
        network: a timm classifier in eval mode, with feature maps (N, C, H, W).
        images: (N, 3, H, W), normalised.
        classes: (N,), the class to explain for each image; None: the predicted one.

    Returns:
        (logits (N, classes), float tensor (N, H, W) from 0 to 1).

    Raises:
        UserError: if the network has no such maps, like most transformers.
    """
    last = network.feature_info[-1]
    kept = []

    def keep(module, inputs, output):
        kept.append(output)

    hook = network.get_submodule(last["module"]).register_forward_hook(keep)
    try:
        # The maps need a gradient, whether or not the weights are trained.
        with torch.enable_grad():
            logits = network(images.detach().requires_grad_())
    finally:
        hook.remove()
    maps = kept[0]
    if maps.ndim != 4 or maps.shape[1] != last["num_chs"]:
        raise UserError("Grad-CAM needs a network with feature maps (N, C, H, W), such as UniRepLKNet or ResNet")
    classes = logits.argmax(1) if classes is None else classes
    gradient = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), maps)[0]
    cam = F.relu((gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True))  # (N, 1, H / 32, W / 32)
    cam = F.interpolate(cam, images.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)
    cam = cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)
    return logits.detach(), cam.detach()


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
