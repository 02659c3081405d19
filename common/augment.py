"""Augmentation of training images and spectrograms; train.py trains with it, tools/visualize.py draws it.

torchtoolbox's Cutout is used where it can be imported, torchvision's RandomErasing where it cannot (`CUTOUT_ERROR` says
why). Both fill the erased rectangle with the mean colour.
"""

import io
import math
import random
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from timm.data import Mixup
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from common.dataset import PixelTransform
from common.renamed import upgrade_config

# torchtoolbox 0.1.8 still uses np.int, which NumPy removed in 1.24; its Cutout works once the name exists.
np.int = int
try:
    from torchtoolbox.transform import Cutout

    CUTOUT_ERROR = ""
except Exception as error:  # it imports OpenCV, which fails in many ways where a system library is missing
    Cutout = object
    CUTOUT_ERROR = f"{type(error).__name__}: {error}"
del np.int

CUTOUT_SCALE = (0.02, 0.4)  # area of the erased rectangle as a fraction of the image
CUTOUT_RATIO = (0.4, 2.5)  # its aspect ratio
GREY = np.float32([19595 / 65536, 38470 / 65536, 7471 / 65536, 0.5])  # Pillow's weights of red, green and blue, and 1/2
BLUR = (0.3, 1.2)  # radius in pixels of a random Gaussian blur
SHARPEN = (50, 200)  # strength of a random sharpening in percent
RESAMPLE = (0.6, 1.0)  # size at which an image is resampled on the way, as a fraction of its own
FILTERS = ("NEAREST", "BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")  # Pillow's, one of which resamples
COMPRESSION = (30, 95)  # JPEG quality of a random compression
PIXEL_NOISE = (1.0, 10.0)  # standard deviation of random noise in grey levels of 255
NOISE_LEVELS = (40.0, 80.0)  # decibels below the loudest place at which white noise is added


def train_transform(
    size,
    mean,
    *,
    fit="squeeze",
    crop=1.0,
    cutout=0.0,
    hflip=0.0,
    vflip=0.0,
    rotation=0.0,
    color_jitter=0.0,
    quality=0.0,
):
    """Augmentation of images: PIL RGB -> uint8 tensor (3, height, width), not normalised.

    Args:
        size: (height, width) in pixels.
        mean: three values for pixels from 0 to 1, the colour of erased rectangles.
        fit: how images of another shape are resized, see `common.fit`.
        crop: minimum area fraction of RandomResizedCrop; 1: whole images.
        cutout: probability of erasing a rectangle (DeVries and Taylor, arXiv:1708.04552).
        hflip, vflip: probabilities of a horizontal and a vertical flip.
        rotation: maximum in degrees, see `rotate`; "quarter": random multiples of 90 degrees, which blur nothing.
        color_jitter: maximum relative change of brightness, contrast and saturation.
        quality: probability of a blur, sharpening, resampling, JPEG compression or noise, see `change_quality`.
    """
    steps = []
    if crop < 1:
        steps += [to_pil_image, transforms.RandomResizedCrop(size, (crop, 1.0)), pil_to_tensor]
    if hflip:
        steps.append(transforms.RandomHorizontalFlip(hflip))
    if vflip:
        steps.append(transforms.RandomVerticalFlip(vflip))
    if rotation == "quarter":
        steps.append(quarter_turn)
    elif rotation:
        steps.append(partial(rotate, largest=rotation))
    if color_jitter:
        steps.append(ColorJitter(color_jitter))
    if quality:
        steps.append(partial(change_quality, probability=quality))
    # Cutout comes after whatever changes colours, so that the rectangle keeps the mean colour.
    if cutout:
        color = [round(255 * value) for value in mean]
        if CUTOUT_ERROR:
            steps.append(transforms.RandomErasing(cutout, CUTOUT_SCALE, CUTOUT_RATIO, color))
        else:
            steps.append(ColorCutout(cutout, color))
    return PixelTransform(size, steps, fit)


def quarter_turn(pixels):
    """Rotate a uint8 tensor (3, H, W) by a random multiple of 90 degrees; if it is no square, what leaves is black."""
    turns = random.randrange(4)
    if pixels.shape[1] != pixels.shape[2]:
        return pil_to_tensor(to_pil_image(pixels).rotate(90 * turns))
    return pixels.rot90(turns, (1, 2))


def rotate(pixels, largest):
    """Rotate a uint8 tensor (3, H, W) by a random angle of up to `largest` degrees; the corners mirror the image."""
    height, width = pixels.shape[1:]
    angle = math.radians(random.uniform(-largest, largest))
    cos, sin = math.cos(angle), math.sin(angle)
    # Coordinates go from -1 to 1 along both sides, however long these are. (F.affine_grid takes as long as the rest.)
    y, x = ((2 * torch.arange(side) + 1) / side - 1 for side in (height, width))
    y = y[:, None]
    grid = torch.stack([cos * x + sin * height / width * y, cos * y - sin * width / height * x], 2)
    image = F.grid_sample(pixels[None].float(), grid[None], padding_mode="reflection", align_corners=False)
    return image[0].round().to(torch.uint8)


def change_quality(pixels, probability):
    """With a probability, blur, sharpen, resample or compress a uint8 tensor (3, H, W), or add noise: what cameras and
    programs do in different ways, so that a network must not rely on it (these are among the corruptions of Hendrycks
    and Dietterich, arXiv:1903.12261)."""
    if random.random() >= probability:
        return pixels
    image = to_pil_image(pixels)
    kind = random.randrange(5)
    if kind == 0:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(*BLUR)))
    elif kind == 1:
        image = image.filter(ImageFilter.UnsharpMask(1, round(random.uniform(*SHARPEN)), 0))
    elif kind == 2:
        scale, method = random.uniform(*RESAMPLE), Image.Resampling[random.choice(FILTERS)]
        small = [max(1, round(scale * side)) for side in image.size]
        image = image.resize(small, method).resize(image.size, Image.Resampling.BILINEAR)
    elif kind == 3:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=random.randint(*COMPRESSION))
        image = Image.open(file)
    else:
        noise = torch.randn(pixels.shape) * random.uniform(*PIXEL_NOISE)
        return (pixels + noise).round().clamp(0, 255).to(torch.uint8)
    return pil_to_tensor(image)


class ColorJitter(transforms.ColorJitter):
    """torchvision's ColorJitter of brightness, contrast and saturation: uint8 tensor (3, H, W) -> likewise.

    It gives the bits that Pillow gives for an image, which torchvision does not for a tensor, in half the time. Pillow
    mixes an image with black, with its mean grey or with its grey values, and rounds down after each step.

    Args:
        largest: maximum relative change of each.
    """

    def __init__(self, largest):
        super().__init__(largest, largest, largest)

    def forward(self, pixels):
        order, *factors = self.get_params(self.brightness, self.contrast, self.saturation, self.hue)
        image = np.empty(pixels.shape, np.float32)
        np.copyto(image, pixels.numpy())
        for step in order.tolist():
            factor = factors[step]
            if factor is None:
                continue
            other = None if step == 0 else grey_values(image)
            if step == 1:
                other = int(other.sum(dtype=np.float64) / other.size + 0.5)
            if other is not None:
                image -= other
            image *= np.float32(factor)
            if other is not None:
                image += other
            if factor > 1:
                np.clip(image, 0, 255, out=image)
            np.floor(image, out=image)
        return torch.from_numpy(image.astype(np.uint8))


def grey_values(image):
    """Grey values (H, W) of an image (3, H, W), whole numbers from 0 to 255 as float32, rounded as Pillow does it."""
    red, green, blue = (plane * weight for plane, weight in zip(image, GREY))
    red += green  # exact, like the products
    red += blue
    red += GREY[3]
    return np.floor(red, out=red)


class ColorCutout(Cutout):
    """torchtoolbox's Cutout filled with one colour: uint8 tensor (3, H, W) -> likewise.

    torchtoolbox itself fills images with a random shade of red.

    Args:
        probability: of erasing a rectangle.
        color: three values from 0 to 255.
    """

    def __init__(self, probability, color):
        super().__init__(probability, CUTOUT_SCALE, CUTOUT_RATIO)
        self.color = torch.tensor(color, dtype=torch.uint8)[:, None, None]

    def __call__(self, pixels):
        if random.random() < self.p:
            left, top, height, width, _ = self.get_params(pixels.permute(1, 2, 0).numpy(), self.scale, self.ratio)
            pixels = pixels.clone()
            pixels[:, top : top + height, left : left + width] = self.color
        return pixels


def spectrogram_transform(mean, std, *, decibels, time_shift=0.0, gain=0.0, noise=0.0, spec_mask=0.0):
    """Augmentation of spectrograms: PIL RGB -> float tensor (3, mel bands, frames).

    Args:
        mean, std: three values each, for pixels from 0 to 1.
        decibels: range of the spectrogram, from black to white.
        time_shift: maximum shift as a fraction of the duration.
        gain: maximum change of loudness in decibels.
        noise: probability of white noise.
        spec_mask: maximum masked fraction of the duration and of the mel bands (SpecAugment), or a list of the two.
    """
    steps = [transforms.ToTensor()]
    if time_shift:
        steps.append(partial(shift_time, fraction=time_shift))
    if gain:
        steps.append(partial(change_gain, largest=gain / decibels))
    if noise:
        steps.append(partial(add_noise, probability=noise, levels=NOISE_LEVELS, decibels=decibels))
    steps.append(transforms.Normalize(mean, std))
    for fraction, dim in zip(spec_mask if isinstance(spec_mask, list) else (spec_mask, spec_mask), (2, 1)):
        if fraction:
            steps.append(partial(mask, fraction=fraction, dim=dim))
    return transforms.Compose(steps)


# The following functions take tensors (3, mel bands, frames) from 0, black, to 1, the loudest place.


def shift_time(image, fraction):
    """Shift by up to `fraction` of the width to either side; what leaves on one side enters on the other."""
    limit = int(fraction * image.shape[2])
    return image.roll(random.randint(-limit, limit), 2)


def change_gain(image, largest):
    """Make all that is not silent louder or quieter, by up to `largest`: decibels / those from black to white."""
    return torch.where(image > 0, image + random.uniform(-largest, largest), image).clamp(0, 1)


def add_noise(image, probability, levels, decibels):
    """Add white noise with a probability, `levels` (smallest, largest) decibels below the loudest place."""
    if random.random() >= probability:
        return image
    # Powers add up; the power of noise in one spectrum is distributed exponentially.
    noise = torch.empty_like(image[:1]).exponential_() * 10 ** (-random.uniform(*levels) / 10)
    power = 10 ** ((image - 1) * decibels / 10) + noise
    return (1 + 10 * power.log10() / decibels).clamp(0, 1)


def mask(image, fraction, dim):
    """Set a random stretch of up to `fraction` of the frames (dim 2) or mel bands (dim 1) to 0, the mean (SpecAugment,
    Park et al., arXiv:1904.08779)."""
    size = image.shape[dim]
    width = random.randint(0, int(fraction * size))
    image = image.clone()
    image.narrow(dim, random.randint(0, size - width), width).zero_()
    return image


class BatchMixup(Mixup):
    """timm's Mixup / CutMix with label smoothing: images (N, 3, H, W), labels (N,) -> images, targets (N, classes).

    timm's takes even batches only; of an odd batch the last image passes unmixed.

    Args:
        num_classes: number of classes.
        mixup: alpha of Mixup's Beta distribution (arXiv:1710.09412); 0: no Mixup.
        cutmix: alpha of CutMix's Beta distribution (arXiv:1905.04899); 0: no CutMix.
        prob: probability that a batch is mixed; the targets of all batches are smoothed.
        smoothing: label smoothing.
        switch_prob: probability of CutMix instead of Mixup where both are on.
    """

    def __init__(self, num_classes, mixup=0.0, cutmix=0.0, prob=0.0, smoothing=0.0, switch_prob=0.5):
        super().__init__(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=prob if mixup or cutmix else 0.0,
            switch_prob=switch_prob,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )

    def __call__(self, images, labels):
        even = len(images) // 2 * 2
        if even == len(images):
            return super().__call__(images, labels)
        smoothing = self.label_smoothing
        smooth = F.one_hot(labels[even:], self.num_classes) * (1 - smoothing) + smoothing / self.num_classes
        if even == 0:
            return images, smooth
        mixed, targets = super().__call__(images[:even].clone(), labels[:even])
        return torch.cat([mixed, images[even:]]), torch.cat([targets, smooth])


def augmentation_from_config(config, num_classes, size, mean, std, sound=None):
    """The augmentation of a run.

    Args:
        config: {constant of train.py: value}, such as a checkpoint's "config", also of earlier versions.
        num_classes: number of classes.
        size: (height, width) in pixels.
        mean, std: three values each, for pixels from 0 to 1.
        sound: how spectrograms are made, see common/audio.py; None for images.

    Returns:
        (transform, `BatchMixup`).
    """

    config = upgrade_config(config)

    def value(name, default=0.0):
        return config.get(name, default)

    mixup = BatchMixup(
        num_classes,
        value("MIXUP"),
        0.0 if sound else value("CUTMIX"),
        value("MIX_PROB"),
        value("SMOOTHING"),
        value("MIX_SWITCH", 0.5),
    )
    if sound is not None:
        transform = spectrogram_transform(
            mean,
            std,
            decibels=sound["decibels"],
            time_shift=value("TIME_SHIFT"),
            gain=value("GAIN"),
            noise=value("NOISE"),
            spec_mask=value("SPEC_MASK"),
        )
    else:
        transform = train_transform(
            size,
            mean,
            fit=value("FIT", "squeeze"),
            crop=value("CROP", 1.0),
            cutout=value("CUTOUT"),
            hflip=value("HFLIP"),
            vflip=value("VFLIP"),
            rotation=value("ROTATION"),
            color_jitter=value("COLOR_JITTER"),
            quality=value("QUALITY"),
        )
    return transform, mixup
