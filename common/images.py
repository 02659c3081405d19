"""Pictures: which files are pictures, how one is read, and what is done to it before the network sees it.

makedata.py, mean_std.py, train.py and test.py all read pictures by `load_image`, so that what was trained on, what the
statistics describe and what is predicted are the same pixels.
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
    """A file that cannot be read as a picture, or as a sound; the message names it and says why."""


def is_hidden(path):
    """Whether the file or folder is one that systems leave behind and users do not see."""
    return Path(path).name.startswith(".") or Path(path).name.lower() in SYSTEM_FILES


def is_image(path):
    """Whether a file is a picture by its name: the ending, in any case, and not hidden."""
    return str(path).lower().endswith(EXTENSIONS) and not is_hidden(path)


def load_image(path):
    """Read a picture as RGB, 8 bits a channel, upright.

    The first frame of an animation; turned as its EXIF orientation says; 16-bit grey scaled to 8 bits; transparency
    laid on white; CMYK, palette and grey converted.

    Args:
        path: the file.

    Returns:
        `PIL.Image.Image` of mode RGB.

    Raises:
        ImageError: if the file is no picture, broken or too large.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns between one and two times its limit of pixels; treat that as too large, too.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # odd metadata does not matter here
            if not os.path.isfile(path) and os.path.exists(path):  # reading a pipe or a device would never end
                raise ValueError("it is no file")
            with Image.open(path) as image:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{path} has more pixels than Pillow takes for safe; scale it down or remove it") from error
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        if Path(path).is_file() and not Path(path).stat().st_size:
            reason = "it is empty"
        elif isinstance(error, UnidentifiedImageError):
            reason = "no format that Pillow knows"
        else:
            reason = str(error).strip() or type(error).__name__
        raise ImageError(f"{path} cannot be read as a picture ({reason}); replace or remove it") from error


def to_rgb(image):
    """Convert a `PIL.Image.Image` of any mode to RGB; ValueError for floating-point pixels."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion clips at 255
        return image.convert("I").point(lambda value: value / 257).convert("L").convert("RGB")
    if image.mode == "F":
        raise ValueError("it holds floating-point values without a scale: save it with 8 or 16 bits")
    if "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def level_sums(picture):
    """What the statistics of a set need of one picture, exactly.

    Args:
        picture: PIL RGB picture.

    Returns:
        int64 array (3, 3): number of pixels, sum and sum of squares of their levels (0 to 255), for each channel.
    """
    # The histogram is one pass in C.
    return (np.array(picture.histogram()).reshape(3, 256) @ POWERS_OF_LEVELS).T


def scan_class_folders(root):
    """List the files of `root/<class>/`.

    Args:
        root: folder that holds one folder for each class.

    Returns:
        ({class: [file, ...]}, [file that lies beside the class folders, ...]), sorted, without hidden files.

    Raises:
        UserError: if there is no class folder, or one holds another folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; make it and put pictures into {root}/<class>/")
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
                f"{nested} is a folder inside a class folder; move its pictures to {root}/<class>/ directly, "
                "or make it a class of its own"
            )
        classes[folder.name] = files
    lower = {}
    for name in classes:
        twin = lower.setdefault(name.lower(), name)
        if twin != name:
            raise UserError(
                f"{root / twin} and {root / name} differ by case only, and Windows and macOS take them for one; put "
                "their pictures together, or rename one"
            )
    if not classes:
        raise UserError(f"{root} holds no class folder; put pictures into {root}/<class>/, one folder for each class")
    return classes, [entry for entry in entries if not entry.is_dir()]
