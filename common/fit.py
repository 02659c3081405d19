"""How an image of any shape becomes one of the network's size: train.py's FIT.

    squeeze   resized regardless of its aspect ratio: all of it is seen, distorted
    pad       resized as a whole, with margins of one colour: all of it is seen, undistorted, but smaller
    crop      resized and cut at its longer sides: undistorted and large, but the ends are not seen

Training, cache, validation, test.py, the web page and the tools all resize by `fit_to`, so that they see the same
pixels.
"""

from functools import partial

from PIL import Image, ImageOps

FITS = ("squeeze", "pad", "crop")
MARGIN = (124, 116, 104)  # ImageNet's mean colour, which normalisation turns into about 0


def fit_to(size, fit="squeeze"):
    """The function PIL RGB image -> PIL RGB image of `size`, which leaves images of that size as they are.

    Args:
        size: (height, width) in pixels.
        fit: one of `FITS`.
    """
    return partial(fit_image, size=tuple(size), fit=fit)


def fit_image(image, size, fit):
    """`image` brought to `size`; see `fit_to`."""
    height, width = size
    if image.size == (width, height):
        return image
    if fit == "pad":
        return ImageOps.pad(image, (width, height), Image.Resampling.BILINEAR, color=MARGIN)
    if fit == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def visible_part(image, fit):
    """What a network with square input sees of an image, in the image's own resolution, to draw a map over it.

    Args:
        image: PIL RGB.
        fit: one of `FITS`.
    """
    side = max(image.size) if fit == "pad" else min(image.size)
    return image if fit == "squeeze" else fit_image(image, (side, side), fit)
