"""Images: which files are images, and how one is read; docs/images.md is the table of both.

makedata.py, mean_std.py, train.py and test.py all read images by `load_image`, so that training, statistics and
predictions see the same pixels.
"""

import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError

from common.columns import Files, Texts
from common.decoding import ImageError, decode
from common.options import UserError, raise_all

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
EXTENSIONS += (".apng", ".jpe", ".jfif", ".dib", ".avif", ".heic", ".heif", ".hif")
EXTENSIONS += (".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga")
TABLE = "docs/images.md"
# Files that hold images all the same, and what to do with them.
NOT_READ = {
    "a camera's raw file; export it as JPEG or TIFF": ".arw .cr2 .cr3 .crw .dng .nef .nrw .orf .pef .raf .rw2 .srw",
    "a project of an image editor; export it as PNG": ".ai .afphoto .clip .kra .psb .psd .xcf",
    "a drawing of lines, not of pixels; export it as PNG": ".cdr .emf .eps .ps .svg .svgz .wmf",
    "a document; export its pages or images as PNG": ".djvu .doc .docx .pdf .ppt .pptx",
    "an array; save each image in it as PNG, or as TIFF with 16 bits": ".h5 .hdf5 .mat .npy .npz .zarr",
    "a medical image; export it as PNG or TIFF with 16 bits": ".dcm .dicom .mha .mhd .nii .nrrd .nii.gz",
    "a microscope's file; export its images as TIFF": ".czi .lif .lsm .mrxs .nd2 .ndpi .oib .oif .scn .svs .vsi",
    "a video; save frames of it as PNG, such as with ffmpeg": ".avi .m4v .mkv .mov .mp4 .webm .wmv",
    "an archive; unpack it": ".7z .gz .rar .tar .tgz .zip",
    "an image in a format that is not read; convert it to PNG": ".exr .fit .fits .hdr .ico .jxl .jxr .pcx .xbm .xpm",
}
SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store", "icon\r")  # of Windows and macOS
# Folders that systems, network drives and synchronisation make; their other ones begin with a dot.
SYSTEM_FOLDERS = (
    "__macosx", "network trash folder", "temporary items", "thevolumesettingsfolder",  # macOS
    "$recycle.bin", "system volume information", "found.000",  # Windows
    "lost+found", "#recycle", "#snapshot", "@eadir", "@tmp", "@recycle", "@recently-snapshot",  # Linux; Synology, QNAP
    "~snapshot", "_gsdata_", "lost.dir", "__pycache__",  # NetApp, GoodSync, Android, Python
)  # fmt: skip
SYSTEM_NAMES = frozenset(SYSTEM_FILES + SYSTEM_FOLDERS)
LISTED = 3  # names of each kind in the line about what is passed over
POWERS_OF_LEVELS = np.arange(256)[:, None] ** [0, 1, 2]  # (256, 3)


def is_hidden(path):
    """Whether the file or folder is hidden, or one that operating systems leave behind, by its own name.

    One rule for all scripts: what it names is neither read nor refused, wherever it is.
    """
    name = os.path.basename(path)
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_image(path):
    """Whether a file is an image by its name: the extension, in any case, and not hidden."""
    return str(path).lower().endswith(EXTENSIONS) and not is_hidden(path)


def is_another_kind(path):
    """The key of `NOT_READ` for a file by its name; "" if there is none."""
    return next((what for what, ends in NOT_READ.items() if str(path).lower().endswith(tuple(ends.split()))), "")


def why_not(path, name="image", extensions=EXTENSIONS, table=TABLE):
    """Why a file whose name does not fit is not used, and what to do: a sentence that begins with its path.

    Args:
        path: the file.
        name: what is wanted, "image" or "recording".
        extensions: those that are wanted.
        table: where it says what is read.
    """
    known = is_another_kind(path)
    if known:
        return f"{path} is {known}"
    some = ", ".join(extensions if len(extensions) < 6 else [*extensions[:3], f"...: see {table}"])
    return f"{path} has no {name} extension ({some})"


def load_image(path, value_range=None):
    """Read an image as RGB, 8 bits per channel, upright.

    Takes the first frame of an animation and the first page of a TIFF, applies the EXIF orientation, scales values of
    more than 8 bits, composites transparency onto white, and converts CMYK, Lab, palette and grey.

    Args:
        path: the file.
        value_range: [low, high], the stored values of more than 8 bits that become black and white; None: as the file
            states them, else all of its 16 bits.

    Returns:
        `PIL.Image.Image` of mode RGB; for `info` see `common.decoding.decode`.

    Raises:
        ImageError: if the file is not an image, broken or too large.
    """
    try:
        if not os.path.isfile(path) and os.path.exists(path):  # reading a pipe or a device would never end
            raise ValueError("it is not a regular file")
        if is_another_kind(path):  # Pillow would read the preview in a camera's raw file
            raise ImageError(why_not(path))
        return decode(path, value_range)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for broken files
        if Path(path).is_file() and not Path(path).stat().st_size:
            reason = "it is empty"
        elif isinstance(error, UnidentifiedImageError):
            reason = "not an image format that Pillow supports"
        else:
            reason = str(error).strip() or type(error).__name__
        raise ImageError(f"{path} cannot be read as an image ({reason}); replace or remove it") from error


def level_sums(image):
    """The sums from which mean and standard deviation of a data set follow exactly.

    Args:
        image: PIL RGB image.

    Returns:
        int64 array (3, 3) of rows: number of pixels, sum, and sum of squares of their levels (0 to 255), per channel.
    """
    # The histogram is one pass in C.
    return (np.array(image.histogram()).reshape(3, 256) @ POWERS_OF_LEVELS).T


class ClassFolders(Mapping):
    """What stands in root/<class>/: {class: `Files` of it}, both sorted, without what is hidden (see `is_hidden`).

    Attributes:
        files: `Files` of all classes.
        beside: paths of the files beside the class folders.
        hidden_folders, hidden_files: paths; without macOS's files "._<name>", of which there is one for each file.
    """

    def __init__(self, root, names, beside, hidden_folders, hidden_files):
        counts = [len(column) for column in names.values()]
        labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self.files = Files(root, list(names), Texts.join(names.values()), labels)
        self.first = np.cumsum([0, *counts])  # index of each class's first file
        self.beside = beside
        self.hidden_folders = hidden_folders
        self.hidden_files = hidden_files
        self.found = {}

    def __len__(self):
        return len(self.files.classes)

    def __iter__(self):
        return iter(self.files.classes)

    def __getitem__(self, name):
        try:
            label = self.files.classes.index(name)
        except ValueError:
            raise KeyError(name) from None
        return self.files[self.first[label] : self.first[label + 1]]

    def choose(self, fits):
        """The `Files` of which `fits`, a function of a name, is true."""
        fitting = self.fitting(fits)
        return self.files if fitting.all() else self.files.choose(np.flatnonzero(fitting))

    def fitting(self, fits):
        """Whether `fits` is true for each of the files: bool array (files,), found once for a function."""
        if fits not in self.found:
            self.found[fits] = np.fromiter(map(fits, self.files.names), bool, len(self.files))
        return self.found[fits]

    def describe_passed(self, fits, with_files=True):
        """One line about what is passed over; "" if nothing is.

        Args:
            fits: see `choose`.
            with_files: whether to tell of files that do not fit, too, and not only of what is hidden.
        """
        # System files such as Thumbs.db are in nobody's way, but a hidden image may be missed.
        hidden = (path for path in self.hidden_files if fits(os.path.basename(path).lstrip(".")))
        passed = [("folder", "hidden or of the system", self.hidden_folders), ("file", "hidden", hidden)]
        if with_files:
            others = (self.files[index] for index in np.flatnonzero(~self.fitting(fits)))
            passed = [("file", "of another kind", others), ("file", "in no class folder", self.beside), *passed]
        parts = []
        for what, how, paths in passed:
            paths = iter(paths)
            first = list(islice(paths, LISTED))
            count = len(first) + sum(1 for _ in paths)
            if count:
                names = ", ".join(first) + ", ..." * (count > LISTED)
                parts.append(f"{count} {what}{'s' * (count > 1)} {how} ({names})")
        return f"passed over {'; '.join(parts)}" if parts else ""


def scan_class_folders(root):
    """List the files of `root/<class>/`: a `ClassFolders`.

    Raises:
        UserError: if there is no class folder, or for what `find_folder_problems` finds; it names all of that.
    """
    root = str(Path(root))
    if not os.path.isdir(root):
        raise UserError(f"there is no folder {root}; create it and put images into {root}/<class>/")
    hidden_folders, hidden_files, classes = [], [], {}
    folders, beside = scan_folder(root, hidden_folders, hidden_files)
    nested = {}
    for name in folders:
        folder = name if root == os.curdir else os.path.join(root, name)
        nested[name], files = scan_folder(folder, hidden_folders, hidden_files)
        classes[name] = Texts(files)
    raise_all(find_folder_problems(Path(root), nested))
    if not classes:
        raise UserError(f"{root} contains no class folder; put images into {root}/<class>/, one folder per class")
    beside = [str(Path(root, name)) for name in beside]
    return ClassFolders(root, classes, beside, sorted(hidden_folders), sorted(hidden_files))


def find_folder_problems(root, nested):
    """What is wrong with class folders, a sentence each: names that are not UTF-8, folders inside, twins by case.

    Args:
        root: folder that contains them.
        nested: {class: [name of a folder inside its folder, ...]}.
    """
    problems, lower = [], {}
    for name, inside in nested.items():
        try:
            name.encode()
        except UnicodeEncodeError:  # as after unpacking a GBK archive under Linux
            problems.append(f"the name of the folder {str(root / name)!a} is not UTF-8; rename it")
        if inside:
            others = f" (and {len(inside) - 1} more in {root / name})" if len(inside) > 1 else ""
            problems.append(
                f"{root / name / inside[0]}{others} is a folder inside a class folder; move its files to "
                f"{root}/<class>/ directly, or make it a class of its own"
            )
        twin = lower.setdefault(name.lower(), name)
        if twin != name:
            problems.append(
                f"{root / twin} and {root / name} differ by case only, which Windows and macOS do not distinguish; "
                "merge them, or rename one"
            )
    return problems


def scan_folder(folder, hidden_folders, hidden_files):
    """The names in one folder: (sorted folders, sorted files).

    Args:
        folder: its path.
        hidden_folders, hidden_files: lists to which the paths of what is hidden are added.
    """
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            is_folder = is_directory(entry)
            if not is_hidden(entry.name):
                (folders if is_folder else files).append(entry.name)
            elif is_folder or not entry.name.startswith("._"):
                (hidden_folders if is_folder else hidden_files).append(str(Path(folder, entry.name)))
    return sorted(folders), sorted(files)


def is_directory(entry):
    """Whether an `os.DirEntry` is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False
