"""Images: which files are images, and how one is read.

makedata.py, mean_std.py, train.py and test.py all read images by `load_image`, so that training, statistics and
predictions see the same pixels.
"""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.options import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
SYSTEM_FILES = ("thumbs.db", "desktop.ini", ".ds_store")  # what Windows and macOS leave in folders
POWERS_OF_LEVELS = np.arange(256)[:, None] ** [0, 1, 2]  # (256, 3)


class ImageError(UserError):
    """A file that cannot be read as an image or a recording; the message names it and the reason."""


def is_hidden(path):
    """Whether the file or folder is hidden, or one that operating systems leave behind."""
    return Path(path).name.startswith(".") or Path(path).name.lower() in SYSTEM_FILES


def is_image(path):
    """Whether a file is an image by its name: the extension, in any case, and not hidden."""
    return str(path).lower().endswith(EXTENSIONS) and not is_hidden(path)


def load_image(path):
    """Read an image as RGB, 8 bits per channel, upright.

    Takes the first frame of an animation, applies the EXIF orientation, scales 16-bit grey to 8 bits, composites
    transparency onto white, and converts CMYK, palette and grey.

    Args:
        path: the file.

    Returns:
        `PIL.Image.Image` of mode RGB.

    Raises:
        ImageError: if the file is not an image, broken or too large.
    """
    try:
        with warnings.catch_warnings():
            # Between one and two times its limit of pixels Pillow only warns; that is refused, too.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # odd metadata does not matter here
            if not os.path.isfile(path) and os.path.exists(path):  # reading a pipe or a device would never end
                raise ValueError("it is not a regular file")
            with Image.open(path) as image:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{path} has more pixels than Pillow considers safe; scale it down or remove it") from error
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        if Path(path).is_file() and not Path(path).stat().st_size:
            reason = "it is empty"
        elif isinstance(error, UnidentifiedImageError):
            reason = "not an image format that Pillow supports"
        else:
            reason = str(error).strip() or type(error).__name__
        raise ImageError(f"{path} cannot be read as an image ({reason}); replace or remove it") from error


def to_rgb(image):
    """Convert a `PIL.Image.Image` of any mode to RGB; ValueError for floating-point pixels."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion clips at 255
        return image.convert("I").point(lambda value: value / 257).convert("L").convert("RGB")
    if image.mode == "F":
        raise ValueError("it contains floating-point values without a scale: save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def level_sums(image):
    """The sums from which mean and standard deviation of a data set follow exactly.

    Args:
        image: PIL RGB image.

    Returns:
        int64 array (3, 3) of rows: number of pixels, sum, and sum of squares of their levels (0 to 255), per channel.
    """
    # The histogram is one pass in C.
    return (np.array(image.histogram()).reshape(3, 256) @ POWERS_OF_LEVELS).T


def scan_class_folders(root):
    """List the files of `root/<class>/`.

    Args:
        root: folder that contains one folder per class.

    Returns:
        ({class: [file, ...]}, [file beside the class folders, ...]), sorted, without hidden files.

    Raises:
        UserError: if there is no class folder, or one contains another folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; create it and put images into {root}/<class>/")
    entries = sorted(entry for entry in root.iterdir() if not is_hidden(entry))
    classes = {}
    for folder in filter(Path.is_dir, entries):
        try:
            folder.name.encode()
        except UnicodeEncodeError as error:  # as after unpacking a GBK archive under Linux
            raise UserError(f"the name of the folder {str(folder)!a} is not UTF-8; rename it") from error
        files = sorted(file for file in folder.iterdir() if not is_hidden(file))
        nested = next(filter(Path.is_dir, files), None)
        if nested is not None:
            raise UserError(
                f"{nested} is a folder inside a class folder; move its images to {root}/<class>/ directly, "
                "or make it a class of its own"
            )
        classes[folder.name] = files
    lower = {}
    for name in classes:
        twin = lower.setdefault(name.lower(), name)
        if twin != name:
            raise UserError(
                f"{root / twin} and {root / name} differ by case only, which Windows and macOS do not distinguish; "
                "merge them, or rename one"
            )
    if not classes:
        raise UserError(f"{root} contains no class folder; put images into {root}/<class>/, one folder per class")
    return classes, [entry for entry in entries if not entry.is_dir()]
