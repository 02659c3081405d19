"""Fixed disturbances of images, to measure how much of a network's accuracy is left under each: test.py's STRESS.

They are of the kinds of Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and
perturbations" (ICLR 2019, arXiv:1903.12261), but weaker: what another camera, program or day does to a photograph. Each
acts on the image as the network sees it, after it was resized, so that a severity means the same for every camera;
those that are about resizing take its place.
"""

import io
import zlib
from functools import partial

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from common.dataset import PixelTransform, height_and_width
from common.fit import MARGIN, fit_to

SIZE_STEP = 32  # pixels, of which the image sizes are multiples


def disturbances(img_size, fit):
    """{name: function PIL RGB -> uint8 tensor (3, H, W)} of all disturbances; the first, "clean", is none.

    Args:
        img_size: of the checkpoint.
        fit: how images are resized, see `common.fit`.
    """
    size = height_and_width(img_size)

    def after(change):
        return Disturbed(change, PixelTransform(size), fit_to(size, fit))

    steps = {"clean": after(keep), "padded, not resampled": Disturbed(partial(pad, size=size), PixelTransform(size))}
    steps |= {f"blur {radius}": after(partial(blur, radius=radius)) for radius in (0.6, 1.0)}
    steps |= {"JPEG 50": after(partial(compress, quality=50)), "noise 5/255": after(partial(add_noise, deviation=5.0))}
    steps |= {"10 % closer": Disturbed(partial(zoom, factor=1.1), PixelTransform(size, fit=fit))}
    steps |= {"10 % farther": Disturbed(partial(zoom, factor=1 / 1.1), PixelTransform(size, fit=fit))}
    steps |= {f"light x {factor}": after(partial(change_light, factor=factor)) for factor in (0.67, 1.5)}
    steps |= {name: PixelTransform(other, fit=fit) for name, other in other_sizes(img_size).items()}
    return steps


def other_sizes(img_size):
    """{name: (height, width)}: 4/5 and 6/5 of the image size in multiples of `SIZE_STEP`, at least one step away."""
    size = height_and_width(img_size)
    sizes = {}
    for name, factor, sign in (("smaller", 0.8, -1), ("larger", 1.2, 1)):
        rounded = [SIZE_STEP * round(factor * side / SIZE_STEP) for side in size]
        other = [max(SIZE_STEP, new if new != side else side + sign * SIZE_STEP) for new, side in zip(rounded, size)]
        sizes[f"{name} images"] = tuple(other)
    return sizes


class Disturbed:
    """Function of a PIL RGB image: `before` (if any), then `change`, then `last`. It can be sent to other processes."""

    def __init__(self, change, last, before=None):
        self.change, self.last, self.before = change, last, before

    def __call__(self, image):
        return self.last(self.change(image if self.before is None else self.before(image)))


# The following functions take a PIL RGB image and return one.


def keep(image):
    return image


def pad(image, size):
    """In its own resolution in the middle of `size` (height, width), with margins; shrunk only if it is larger."""
    height, width = size
    if image.width > width or image.height > height:
        image = ImageOps.contain(image, (width, height), Image.Resampling.BILINEAR)
    whole = Image.new("RGB", (width, height), MARGIN)
    whole.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return whole


def blur(image, radius):
    """Gaussian blur of a standard deviation of `radius` pixels."""
    return image.filter(ImageFilter.GaussianBlur(radius))


def compress(image, quality):
    """As a JPEG file of this quality."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def add_noise(image, deviation):
    """Gaussian noise of a standard deviation in grey levels of 255, always the same for the same image."""
    pixels = np.asarray(image)
    noise = np.random.default_rng(zlib.crc32(pixels.tobytes())).normal(0, deviation, pixels.shape)
    return Image.fromarray((pixels + noise).round().clip(0, 255).astype(np.uint8))


def zoom(image, factor):
    """Closer by a factor above 1, which cuts off the borders; farther by one below 1, which mirrors them."""
    pixels = np.asarray(image)
    height, width = (round(side / factor) for side in pixels.shape[:2])
    if factor > 1:
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        pixels = pixels[top : top + height, left : left + width]
    else:
        rows, columns = height - pixels.shape[0], width - pixels.shape[1]
        margins = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
        pixels = np.pad(pixels, margins, mode="symmetric")
    return Image.fromarray(np.ascontiguousarray(pixels))


def change_light(image, factor):
    """All values times `factor`."""
    return image.point([min(255, round(factor * level)) for level in range(256)] * 3)
