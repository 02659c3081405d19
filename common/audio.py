"""Recordings: which files are recordings, and how one becomes the image that a network sees.

A recording becomes its log-mel spectrogram: time from left to right, frequency from bottom to top in mel steps, and
brightness in decibels below the loudest point of the recording. It is a grey 8-bit image of mel bands x frames, so that
everything made for images serves recordings, too.

makedata.py writes these spectrograms into data/ as PNG files, and from there on everything reads images. Only what
reads recordings themselves needs this module: makedata.py, mean_std.py, test.py and tools/web_demo.py. The settings are
a dict called "sound" in data/manifest.json and in checkpoints, with the fields of `Spectrogram`; None means images.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from common import images
from common.extras import require
from common.images import ImageError, is_hidden, is_image, load_image
from common.options import ConstantError

PACKAGES = ("soundfile", "soxr", "librosa")  # what recordings need
# Of libsndfile's formats, without those that it also takes for a file of noise, such as .au and .raw.
EXTENSIONS = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".caf", ".w64")
# Files that hold sound all the same; ffmpeg makes recordings of them that are read.
NOT_READ = {
    "a recording in a format that is not read": (
        ".aac .ac3 .amr .ape .au .m4a .m4b .mka .mp2 .mpc .ra .snd .sph .spx .tta .wave .wma .wv"
    ),
    "a video": ".3gp .avi .flv .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .webm .wmv",
}
# What files begin with that bear a wrong extension: offset and bytes.
SIGNATURES = {
    "a PNG image": [(0, b"\x89PNG")],
    "a JPEG image": [(0, b"\xff\xd8\xff")],
    "a GIF image": [(0, b"GIF8")],
    "a BMP image": [(0, b"BM"), (14, b"\x28\0\0\0")],
    "a TIFF image": [(0, b"II*\0")],
    "a WebP image": [(0, b"RIFF"), (8, b"WEBP")],
    "a PDF document": [(0, b"%PDF")],
    "a ZIP archive": [(0, b"PK\x03\x04")],
    "an M4A recording": [(4, b"ftypM4A")],
    "an MP4 or QuickTime video": [(4, b"ftyp")],
    "a Matroska or WebM video": [(0, b"\x1a\x45\xdf\xa3")],
    "a WMA recording or WMV video": [(0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11")],
    "an AVI video": [(0, b"RIFF"), (8, b"AVI ")],
    "an AMR recording": [(0, b"#!AMR")],
    "an AAC recording": [(0, b"\xff\xf1")],
    "an MPEG-2 AAC recording": [(0, b"\xff\xf9")],
}
# What libsndfile says of any content that it does not know; the second one of that in a file called .mp3.
UNTRUE = ("Format not recognised", "File does not exist or is not a regular file (possibly a pipe?)")
NO_SAMPLES = "it contains no samples"
MAX_HEADER = 4096  # bytes; a file that is larger holds more than a header
TEXT = set(range(32, 127)) | {9, 10, 12, 13} | set(range(128, 256))  # bytes of text, also UTF-8
PAD_MODES = {"silence": "constant", "repeat": "wrap"}  # as NumPy calls them
SAMPLE_RATES = (1_000, 1_000_000)  # Hz; only damaged files claim others
BLOCK = 1 << 20  # samples that are read at once
CANCELLED = 1e-3  # power of the averaged channels, relative to the first one's, below which they cancel each other
SILENCE = 1e-8  # power of a mel band that counts as silence, above the rounding noise of 16-bit samples
SMALLEST = 32  # pixels; the network halves each side five times


@dataclass(frozen=True)
class Kind:
    """What a network takes: the kind's name, its file extensions, and functions of a path.

    Attributes:
        name: "image" or "recording".
        extensions: lower case, with the dot.
        fits: whether a file is of this kind, judged by its name.
        load: reads a file as a PIL RGB image; `ImageError` if it cannot be read.
        table: where it says what is read.
    """

    name: str
    extensions: tuple[str, ...]
    fits: Callable
    load: Callable
    table: str

    def why_not(self, path):
        """Why a file does not fit, and what to do: a sentence that begins with its path."""
        for what, ends in NOT_READ.items():
            if str(path).lower().endswith(tuple(ends.split())) and (self.name == "recording" or what != "a video"):
                return f"{path} is {what}; {converted(path)}"
        return images.why_not(path, self.name, self.extensions, self.table)


def input_kind(sound, value_range=None):
    """The `Kind` of input of a data set: images, or recordings.

    Args:
        sound: the settings of spectrograms in a manifest or checkpoint; None for images. The kind "recording" also
            takes the spectrograms that makedata.py wrote with these settings.
        value_range: likewise of images, see `common.images.load_image`.
    """
    if sound is None:
        load = load_image if value_range is None else partial(load_image, value_range=value_range)
        return Kind("image", images.EXTENSIONS, is_image, load, images.TABLE)
    load = partial(load_sound_or_png, spectrogram=Spectrogram(**sound))
    return Kind("recording", EXTENSIONS, is_sound_or_png, load, "docs/sounds-and-series.md")


def kind_of(checkpoint):
    """The `Kind` of input of the network in a checkpoint, or in what an ONNX file says about itself."""
    return input_kind(checkpoint.get("sound"), checkpoint.get("value_range"))


def is_sound(path):
    """Whether a file is a recording by its name: the extension, in any case, and not hidden."""
    return str(path).lower().endswith(EXTENSIONS) and not is_hidden(path)


def is_sound_or_png(path):
    """Whether a file is a recording, or may be a spectrogram, by its name."""
    return is_sound(path) or str(path).lower().endswith(".png") and not is_hidden(path)


def load_sound_or_png(path, spectrogram):
    """Read a recording, or the PNG of its spectrogram, as PIL RGB.

    Args:
        path: the file.
        spectrogram: the `Spectrogram` of the data set.

    Raises:
        ImageError: if it cannot be read, or is another image than such a spectrogram.
    """
    if not is_image(path):
        return spectrogram.load(path)
    height, width = spectrogram.size
    image = load_image(path) if is_sound_or_png(path) else None
    if image is None or image.size != (width, height):
        raise ImageError(
            f"{path} is neither a recording nor a spectrogram PNG of {width} x {height} pixels as makedata.py writes "
            "it; remove it, or give the recording itself"
        )
    return image


def spectrogram_size(sound):
    """(height, width) in pixels of the spectrograms that the settings `sound` give: mel bands, frames."""
    return Spectrogram(**sound).size


@dataclass(frozen=True)
class Spectrogram:
    """How a recording becomes an image; makedata.py's constants, and the keys of "sound" in manifest and checkpoint."""

    sample_rate: int  # Hz; recordings at another rate are resampled
    seconds: float  # length of the excerpt: the beginning of a longer recording
    padding: str  # around a shorter recording: "silence", or "repeat": itself, repeated
    window: float  # ms, length of one spectrum's window
    hop: float  # ms, from one window to the next
    mels: int  # number of mel bands
    decibels: float  # dynamic range: what is this far below the loudest point, or further, is black

    def in_samples(self, milliseconds):
        """The number of samples, at least 1, that `milliseconds` last."""
        return max(1, round(self.sample_rate * milliseconds / 1000))

    @property
    def size(self):
        """(height, width) in pixels: mel bands, frames."""
        return self.mels, 1 + round(self.seconds * self.sample_rate) // self.in_samples(self.hop)

    def check(self):
        """Check how the settings relate to each other; ConstantError if they give no usable image."""
        if 1000 * self.seconds < self.window:
            raise ConstantError(f"SECONDS must be at least WINDOW ({self.window} ms), got {self.seconds}")
        height, width = self.size
        if min(height, width) < SMALLEST:
            raise ConstantError(
                f"MELS, SECONDS and HOP must give a spectrogram of at least {SMALLEST} mel bands x {SMALLEST} frames, "
                f"got {height} x {width}; raise MELS or SECONDS, or lower HOP"
            )

    def check_filters(self):
        """Check that each mel band contains a frequency; ConstantError if not. Needs librosa."""
        if not mel_filters(self.sample_rate, self.in_samples(self.window), self.mels).any(1).all():
            raise ConstantError(
                f"WINDOW must be long enough to resolve MELS ({self.mels}) mel bands, got {self.window} ms; raise it, "
                "or lower MELS"
            )

    def load(self, path):
        """Read a recording as its spectrogram.

        Args:
            path: the file.

        Returns:
            `PIL.Image.Image` of mode RGB, grey, of `size`, high frequencies at the top.

        Raises:
            ImageError: if it cannot be read.
            UserError: if a package is missing.
        """
        level = self.log_mel(self.fit(*read_mono(path, self.seconds)))[::-1]
        return Image.fromarray(np.uint8(np.round(255 * (1 + level / self.decibels)))).convert("RGB")

    def fit(self, samples, rate):
        """Resample (samples,) at `rate` Hz, and cut it to `seconds`, or pad it on both sides.

        Returns:
            float32 array (seconds * sample_rate,).
        """
        if rate != self.sample_rate:
            [soxr] = require("soxr", task=PACKAGES)
            samples = soxr.resample(samples, rate, self.sample_rate)
            samples = samples if len(samples) else np.zeros(1, np.float32)  # a few samples at a high rate become none
        length = round(self.seconds * self.sample_rate)
        samples = samples[:length]
        before = (length - len(samples)) // 2
        return np.pad(samples, (before, length - len(samples) - before), PAD_MODES[self.padding])

    def log_mel(self, samples):
        """Log-mel spectrogram: Hann windows around each hop, power spectra, mel bands, decibels below the maximum.

        Args:
            samples: float array (n,) at `sample_rate`.

        Returns:
            float array (mel bands, 1 + n // hop) from -decibels to 0, the lowest band first.
        """
        window, hop = self.in_samples(self.window), self.in_samples(self.hop)
        # librosa's melspectrogram gives the same, but compiles functions for half a minute at its first call.
        padded = np.pad(samples, (window // 2, window - window // 2))
        frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]  # (frames, window)
        spectra = np.fft.rfft(frames * np.hanning(window + 1)[:-1])
        power = mel_filters(self.sample_rate, window, self.mels) @ (np.abs(spectra) ** 2).T  # (mels, frames)
        # Relative to the loudest point, since microphones and distances differ; but silence stays silent.
        level = 10 * np.log10(np.maximum(power, 1e-20) / max(power.max(), SILENCE))
        return np.clip(level, -self.decibels, 0)


def read_mono(path, seconds):
    """Read the beginning of a recording: its channels averaged, around 0.

    Args:
        path: the file, in any format, depth, rate and number of channels that libsndfile knows.
        seconds: how much of it to read.

    Returns:
        (float32 array (samples,), sample rate in Hz).

    Raises:
        ImageError: if the file is not a recording, broken, empty, or contains NaN.
    """
    [soundfile] = require("soundfile", task=PACKAGES)
    try:
        if not os.path.isfile(path) and os.path.exists(path):  # reading a pipe or a device would never end
            raise ValueError("it is not a regular file")
        with soundfile.SoundFile(os.fspath(path)) as file:
            rate, left = file.samplerate, int(np.ceil(seconds * file.samplerate))
            if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
                raise ValueError(f"its sample rate is {rate} Hz")
            blocks = []
            while left > 0:
                block = file.read(max(1, min(left, BLOCK // file.channels)), dtype="float32", always_2d=True)
                if not len(block):
                    break
                blocks.append(np.stack([block.mean(1), block[:, 0]]))
                left -= len(block)
        if not blocks:
            raise ValueError(NO_SAMPLES)
        both = np.concatenate(blocks, 1)
        if not np.isfinite(both).all():
            raise ValueError("it contains samples that are NaN or infinite")
        # A constant offset, as of a cheap sound card, would be the loudest tone of the lowest band.
        both -= both.mean(1, dtype=np.float64, keepdims=True).astype(np.float32)
        # Channels of opposite sign, as of a wrongly wired microphone, cancel; then the first one is heard.
        average, first = (np.dot(samples, samples) for samples in both)
        samples = both[0 if average > CANCELLED * first else 1]
    except Exception as error:  # libsndfile's errors, and a broken file may have others
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".") or type(error).__name__
        reason, remedy = explain(path, reason)
        raise ImageError(f"{path} cannot be read as a recording ({reason}); {remedy}") from error
    return samples, rate


def explain(path, reason):
    """Why a file is no recording, and what to do: (reason, remedy), for a sentence.

    Args:
        path: the file.
        reason: libsndfile's, or that of `read_mono`.
    """
    remedy = "replace or remove it"
    if not os.path.isfile(path):  # a pipe must not be opened
        return reason if os.path.exists(path) else "there is no such file", remedy
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        return error.strerror or reason, remedy
    if not head:
        return "it is empty", remedy
    for what, places in SIGNATURES.items():
        if all(head[offset:].startswith(mark) for offset, mark in places):
            has_sound = what.endswith(("recording", "video"))
            return f"it is {what}", f"{converted(path)}, or remove it" if has_sound else remedy
    if reason == NO_SAMPLES and os.path.getsize(path) > MAX_HEADER:
        repaired = Path(path).with_suffix(".repaired.wav")
        remedy = f'repair it, as in: ffmpeg -ignore_length 1 -i "{path}" "{repaired}", and remove it'
        return "its header says that it has no samples, as of a recording that was interrupted", remedy
    if reason in UNTRUE:
        if not head.strip(b"\0"):
            return "it begins with zeros, as after an interrupted copy", remedy
        return "it is text" if set(head) <= TEXT else "it is damaged, or no recording", remedy
    return reason.removeprefix("Error : "), remedy


def converted(path):
    """The remedy for a recording or video in another format."""
    target = Path(path).with_suffix(".flac" if str(path).lower().endswith(".wav") else ".wav")
    return f'convert it, as in: ffmpeg -i "{path}" "{target}"'


@cache
def mel_filters(sample_rate, window, mels):
    """Slaney's mel bands, each of area 1, for spectra of `window` samples: float32 array (bands, 1 + window // 2)."""
    [librosa] = require("librosa", task=PACKAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about bands without a frequency; see `Spectrogram.check_filters`
        return librosa.filters.mel(sr=sample_rate, n_fft=window, n_mels=mels)


def duration(path):
    """Length of a recording in seconds, by its header."""
    [soundfile] = require("soundfile")
    return soundfile.info(os.fspath(path)).duration
