"""Sounds: which files are recordings, how one becomes a picture for the network, and how such pictures are varied.

A recording becomes its log-mel spectrogram: from left to right the time, from bottom to top the frequency in equal
steps of what the ear tells apart (mel), and bright what is loud, in decibels below the recording's loudest place. It is
a grey 8-bit picture of mel bands x frames, so that all that is made for pictures serves for sounds, too.

makedata.py, mean_std.py, train.py and test.py all read recordings by `load_sound`. How it does that is a dict, called
`sound` everywhere: makedata.py writes it into data/manifest.json, train.py into its checkpoints; None means pictures.

    sample_rate     Hz
    seconds         of a recording that are heard: the first ones of a longer recording
    padding         what surrounds a shorter one: "silence", or "repeat": itself over and over
    window, hop     milliseconds: what one spectrum looks at, and from one spectrum to the next
    mels            number of mel bands
    decibels        what is so much fainter than the loudest place is black
"""

import os
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import images
from common.extras import require
from common.images import ImageError, is_hidden, is_image, load_image
from common.options import UserError

EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3")
PADDINGS = {"silence": "constant", "repeat": "wrap"}  # as NumPy calls them
SAMPLE_RATES = (1_000, 1_000_000)  # Hz; others stand in damaged files only
BLOCK = 1 << 20  # samples that are read at once
SILENCE = 1e-8  # power of a mel band that counts as silence: the rounding of 16-bit samples has less
SMALLEST = 32  # pixels that either side of a picture must have


def is_sound(path):
    """Whether a file is a recording by its name: the ending, in any case, and not hidden."""
    return str(path).lower().endswith(EXTENSIONS) and not is_hidden(path)


@dataclass(frozen=True)
class Kind:
    """A kind of files: its name and endings, and the functions that tell one by its name and read it as PIL RGB."""

    name: str
    extensions: tuple[str, ...]
    fits: Callable
    load: Callable


def file_kind(sound):
    """The `Kind` of files that a data set holds: pictures where `sound` is None, else recordings."""
    if sound is None:
        return Kind("picture", images.EXTENSIONS, is_image, load_image)
    return Kind("recording", EXTENSIONS, is_sound, partial(load_sound, sound=sound))


def in_samples(sound, name):
    """Samples of the "window" or "hop" of `sound`."""
    return max(1, round(sound["sample_rate"] * sound[name] / 1000))


def picture_size(sound):
    """(height, width) of the pictures: mel bands, frames."""
    return sound["mels"], 1 + round(sound["seconds"] * sound["sample_rate"]) // in_samples(sound, "hop")


def check_settings(sound):
    """Raise UserError, with the constant's name, where a recording cannot be heard so."""
    low, high = SAMPLE_RATES
    if not low <= sound["sample_rate"] <= high:
        raise UserError(f"SAMPLE_RATE must lie between {low} and {high} Hz, got {sound['sample_rate']}")
    if sound["padding"] not in PADDINGS:
        raise UserError(f'PADDING must be "silence" or "repeat", got {sound["padding"]!r}')
    for name in ("seconds", "window", "hop", "decibels"):
        if not 0 < sound[name] < 1e6:
            raise UserError(f"{name.upper()} must be above 0 and below a million, got {sound[name]}")
    if 1000 * sound["seconds"] < sound["window"]:
        raise UserError(f"SECONDS {sound['seconds']} is shorter than WINDOW, {sound['window']} milliseconds; raise it")
    height, width = picture_size(sound)
    if min(height, width) < SMALLEST:
        raise UserError(
            f"a recording would be a picture of {height} mel bands x {width} frames, and the network needs {SMALLEST} "
            "or more of each; raise MELS, or raise SECONDS, or lower HOP"
        )
    if not mel_filters(sound["sample_rate"], in_samples(sound, "window"), sound["mels"]).any(1).all():
        raise UserError(
            f"a WINDOW of {sound['window']} milliseconds cannot tell {sound['mels']} mel bands apart; raise it, or "
            "lower MELS"
        )


def read_mono(path, seconds):
    """Read the beginning of a recording, its channels averaged.

    Args:
        path: the file, in any format, depth, rate and number of channels that libsndfile knows.
        seconds: how much of it to read.

    Returns:
        (float32 array (samples,), sample rate in Hz).

    Raises:
        ImageError: if the file is no recording, broken, empty, or holds NaN.
    """
    soundfile = require("soundfile")
    try:
        if not os.path.isfile(path) and os.path.exists(path):  # reading a pipe or a device would never end
            raise ValueError("it is no file")
        with soundfile.SoundFile(os.fspath(path)) as file:
            rate, left = file.samplerate, int(np.ceil(seconds * file.samplerate))
            if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
                raise ValueError(f"its sample rate is {rate} Hz")
            blocks = []
            while left > 0:
                block = file.read(max(1, min(left, BLOCK // file.channels)), dtype="float32", always_2d=True)
                if not len(block):
                    break
                blocks.append(block.mean(1))
                left -= len(block)
        if not blocks:
            raise ValueError("it holds no samples")
        samples = np.concatenate(blocks)
        if not np.isfinite(samples).all():
            raise ValueError("it holds samples that are NaN or infinite")
    except Exception as error:  # libsndfile's errors, and a broken file may have others
        if Path(path).is_file() and not Path(path).stat().st_size:
            reason = "it is empty"
        else:
            reason = str(getattr(error, "error_string", error)).strip().rstrip(".") or type(error).__name__
        raise ImageError(f"{path} cannot be read as a sound ({reason}); replace or remove it") from error
    return samples, rate


def fit(samples, rate, sound):
    """Resample (samples,) at `rate` Hz and bring it to the length that `sound` asks for, in the middle of its padding.

    Returns:
        float32 array (seconds * sample_rate,).
    """
    if rate != sound["sample_rate"]:
        samples = require("soxr").resample(samples, rate, sound["sample_rate"])
        samples = samples if len(samples) else np.zeros(1, np.float32)  # a few samples at a high rate become none
    length = round(sound["seconds"] * sound["sample_rate"])
    samples = samples[:length]
    before = (length - len(samples)) // 2
    return np.pad(samples, (before, length - len(samples) - before), PADDINGS[sound["padding"]])


@cache
def mel_filters(sample_rate, window, mels):
    """Slaney's mel bands, each of area 1, for spectra of `window` samples: float32 array (bands, 1 + window // 2)."""
    filters = require("librosa").filters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about bands that no frequency falls into; see `check_settings`
        return filters.mel(sr=sample_rate, n_fft=window, n_mels=mels)


def log_mel(samples, sound):
    """Log-mel spectrogram: Hann windows around each hop, power spectra, mel bands, decibels below the loudest place.

    Args:
        samples: float array (n,) at sound["sample_rate"].
        sound: see the top of this file.

    Returns:
        float array (mel bands, 1 + n // hop) from -decibels to 0, the lowest band first.
    """
    window, hop = in_samples(sound, "window"), in_samples(sound, "hop")
    # librosa's melspectrogram gives the same, but compiles functions for half a minute at its first call.
    padded = np.pad(samples, (window // 2, window - window // 2))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]  # (frames, window)
    spectra = np.fft.rfft(frames * np.hanning(window + 1)[:-1])
    power = mel_filters(sound["sample_rate"], window, sound["mels"]) @ (np.abs(spectra) ** 2).T
    # Relative to the loudest place, since microphones and distances differ; but not silence to itself.
    level = 10 * np.log10(np.maximum(power, 1e-20) / max(power.max(), SILENCE))
    return np.clip(level, -sound["decibels"], 0)


def load_sound(path, sound):
    """Read a recording as the picture that the network sees.

    Args:
        path: the file.
        sound: see the top of this file.

    Returns:
        `PIL.Image.Image` of mode RGB, grey, of `picture_size`, high frequencies at the top.

    Raises:
        ImageError: if it cannot be read; UserError: if a package is missing.
    """
    samples = fit(*read_mono(path, sound["seconds"]), sound)
    level = log_mel(samples, sound)[::-1]
    return Image.fromarray(np.uint8(np.round(255 * (1 + level / sound["decibels"])))).convert("RGB")


def duration(path):
    """Seconds that a recording lasts, by its header."""
    return require("soundfile").info(os.fspath(path)).duration


# What follows varies the pictures for training: tensors (3, mel bands, frames) from 0, black, to 1, the loudest place.


def shift_time(image, share):
    """Shift by up to `share` of the width to either side; what leaves on one side comes in on the other."""
    limit = int(share * image.shape[2])
    return image.roll(random.randint(-limit, limit), 2)


def change_gain(image, largest):
    """Make all that is not silent louder or fainter, by up to `largest`: decibels / those from black to white."""
    return torch.where(image > 0, image + random.uniform(-largest, largest), image).clamp(0, 1)


def add_noise(image, probability, levels, decibels):
    """Add white noise with a probability.

    Args:
        image: see above.
        probability: of noise at all.
        levels: smallest and largest distance from the loudest place, in decibels.
        decibels: from black to white.
    """
    if random.random() >= probability:
        return image
    # Powers add up; that of noise in one spectrum is distributed exponentially.
    noise = torch.empty_like(image[:1]).exponential_() * 10 ** (-random.uniform(*levels) / 10)
    power = 10 ** ((image - 1) * decibels / 10) + noise
    return (1 + 10 * power.log10() / decibels).clamp(0, 1)


def mask(image, share, dim):
    """Set a random stretch of up to `share` of the frames (dim 2) or mel bands (dim 1) to 0, the mean of a normalised
    picture (SpecAugment, Park et al., arXiv:1904.08779)."""
    edge = image.shape[dim]
    width = random.randint(0, int(share * edge))
    image = image.clone()
    image.narrow(dim, random.randint(0, edge - width), width).zero_()
    return image
