"""Recordings: the spectrogram, bad recordings, PNGs in data/, groups, and the four scripts on small tones."""

import csv
import importlib.util
import io
import os
import shutil
import sys
import time
import tracemalloc
import wave
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import DEFAULTS, SMALL, read_manifest, write_former_manifest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import makedata
import mean_std
import train
from common import audio, augment
from common.audio import Spectrogram, input_kind, read_mono, spectrogram_size
from common.cache import cache_images
from common.checkpoint import build_network, load_checkpoint
from common.contents import hash_file
from common.dataset import eval_transform, open_image_folder, seed_everything
from common.images import ImageError, load_image, scan_class_folders
from common.manifest import MANIFEST, read_json, read_sound
from common.options import ConstantError, UserError
from models.depthwise import DepthwiseConv2d
from prepare.groups import choose_groups, compile_group, find_groups, is_in_every_part
from tools import export

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("librosa")

SOUND = dict(sample_rate=8000, seconds=0.5, padding="silence", window=32.0, hop=10.0, mels=32, decibels=80.0)
SPECTROGRAM = Spectrogram(**SOUND)
PITCHES = {"high": 2500, "low": 300, "middle": 900}  # Hz
SPEAKERS = ("anna", "bo", "chen", "dora")


def tone(pitch, seconds=0.4, rate=8000, seed=0):
    """A tone that swells and fades, with a little noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    return np.sin(2 * np.pi * pitch * time) * np.hanning(len(time)) + 0.001 * rng.standard_normal(len(time))


def write_tones(root, count=3):
    """Fill `root/<class>/` with <class>_<speaker>_<index>.wav."""
    for number, (name, pitch) in enumerate(PITCHES.items()):
        (Path(root) / name).mkdir(parents=True)
        for place, speaker in enumerate(SPEAKERS):
            for index in range(count):
                seed = 100 * number + 10 * place + index
                samples = 0.5 * tone(pitch * (1 + 0.02 * index + 0.03 * place), 0.3 + 0.05 * index, seed=seed)
                soundfile.write(Path(root, name, f"{name}_{speaker}_{index}.wav"), samples, 8000)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with tones in data1, and makedata.py's constants for them."""
    monkeypatch.chdir(tmp_path)
    write_tones("data1")
    for name, value in SOUND.items():
        monkeypatch.setattr(makedata, name.upper(), value)
    return tmp_path


@pytest.fixture
def run_train(place, monkeypatch):
    """makedata.py, mean_std.py, and train.py with some constants changed; returns best.pth."""

    def run(**constants):
        if not Path("data").is_dir():
            makedata.main()
            mean_std.main()
        for name, value in (DEFAULTS | SMALL | constants).items():
            monkeypatch.setattr(train, name, value)
        assert train.main() == 0
        return load_checkpoint(Path("checkpoints", SMALL["MODEL"], "best.pth"))

    return run


# --- the spectrogram


def mel(hertz):
    """Slaney's mel scale, as in his Auditory Toolbox: linear up to 1000 Hz, then logarithmic."""
    hertz = np.asarray(hertz, float)
    return np.where(hertz < 1000, 3 * hertz / 200, 15 + 27 * np.log(np.maximum(hertz, 1) / 1000) / np.log(6.4))


def hertz(mel):
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


def reference(samples, sound):
    """Log-mel spectrogram frame by frame, band by band."""
    rate, window, hop = sound["sample_rate"], round(sound["sample_rate"] * sound["window"] / 1000), None
    hop = round(rate * sound["hop"] / 1000)
    padded = np.concatenate([np.zeros(window // 2), samples, np.zeros(window)])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    corners = hertz(np.linspace(0, mel(rate / 2), sound["mels"] + 2))
    frequencies = np.arange(window // 2 + 1) * rate / window
    out = np.zeros((sound["mels"], 1 + len(samples) // hop))
    for frame in range(out.shape[1]):
        power = np.abs(np.fft.fft(padded[frame * hop : frame * hop + window] * hann)[: window // 2 + 1]) ** 2
        for band, (low, middle, high) in enumerate(zip(corners, corners[1:], corners[2:])):
            weight = np.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle))
            out[band, frame] = np.maximum(weight, 0) @ power * 2 / (high - low)
    return np.clip(10 * np.log10(np.maximum(out, 1e-30) / out.max()), -sound["decibels"], 0)


@pytest.mark.parametrize(
    "changes",
    [{}, dict(sample_rate=16000, window=25.0, mels=40), dict(window=31.3, hop=7.1, decibels=50.0)],
    ids=["8 kHz", "16 kHz", "odd numbers"],
)
def test_the_log_mel_spectrogram_is_what_its_definition_says(changes, tmp_path):
    sound = SOUND | changes
    rng = np.random.default_rng(1)
    samples = tone(700, 0.5, sound["sample_rate"]) + 0.01 * rng.standard_normal(sound["sample_rate"] // 2)
    samples -= samples.mean()  # as `read_mono` does
    expected = reference(samples, sound)
    np.testing.assert_allclose(Spectrogram(**sound).log_mel(samples), expected, atol=1e-3)
    soundfile.write(tmp_path / "a.wav", 0.5 * samples, sound["sample_rate"], "DOUBLE")
    image = input_kind(sound).load(tmp_path / "a.wav")
    assert image.mode == "RGB" and image.size[::-1] == spectrogram_size(sound) == expected.shape
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    levels = 255 * (1 + expected[::-1] / sound["decibels"])  # high frequencies at the top
    assert np.abs(pixels[..., 0] - levels).max() < 0.51


def test_louder_recordings_give_the_same_spectrogram_but_silence_stays_black():
    quiet, loud = (SPECTROGRAM.log_mel(level * tone(700)) for level in (0.01, 1))
    np.testing.assert_allclose(quiet, loud, atol=1e-3)
    assert (SPECTROGRAM.log_mel(np.zeros(4000)) == -80).all()
    rounding = np.random.default_rng(0).choice([-1, 0, 1], 4000) / 2**16
    assert SPECTROGRAM.log_mel(rounding).max() < -5


CHANNELS = {  # of a recording: factor of the sound, and of a constant offset
    "one": [(1, 1)],
    "two": [(1, 1), (1, 1)],
    "only the second": [(0, 1), (1, 1)],
    "of opposite sign": [(1, 1), (-1, -1)],
    "of opposite sign, the same offset": [(1, 1), (-1, 1)],
    "almost of opposite sign": [(-1, 0), (0.98, 1)],
}


@pytest.mark.parametrize("offset", [0.0, 0.1, -0.5])
@pytest.mark.parametrize("channels", CHANNELS)
def test_an_offset_and_channels_that_cancel_change_nothing(offset, channels, tmp_path):
    """The constant offset of a cheap sound card, and a microphone of whose wires two are exchanged."""
    sound = 0.03 * np.random.default_rng(2).standard_normal(4000) * np.hanning(4000)
    both = np.stack([own * sound + part * offset for own, part in CHANNELS[channels]], 1)
    for name, samples in (("plain.wav", sound), ("a.wav", both)):
        soundfile.write(tmp_path / name, samples, 8000, "FLOAT")
    plain, other = (np.asarray(SPECTROGRAM.load(tmp_path / name), int) for name in ("plain.wav", "a.wav"))
    assert plain.max() == 255 and np.abs(plain - other).max() <= 2


@pytest.mark.parametrize("check", [False, True])
def test_recordings_of_which_only_silence_is_used_are_named(check, place, capsys, monkeypatch):
    """Those of silence, and those that begin with more of it than is used."""
    monkeypatch.setattr(makedata, "CHECK", check)
    for name, samples in {"off": np.zeros(2000), "late": np.r_[np.zeros(9000), tone(500)]}.items():
        write(Path("data1/low") / f"{name}.wav", samples)
    makedata.main()
    said = capsys.readouterr().out
    files = ", ".join(str(Path("data1/low", f"{name}.wav")) for name in ("late", "off"))
    assert f"2 recordings of which only silence is used: {files}; raise SECONDS, or remove what is silent" in said


def test_length_and_padding():
    short, long = np.full(1000, 0.5, np.float32), np.arange(5000, dtype=np.float32)
    silent = SPECTROGRAM.fit(short, 8000)
    assert silent.shape == (4000,) and silent[:1500].max() == silent[2500:].max() == 0
    assert (silent[1500:2500] == 0.5).all()
    assert (replace(SPECTROGRAM, padding="repeat").fit(short, 8000) == 0.5).all()
    assert (SPECTROGRAM.fit(long, 8000) == long[:4000]).all()
    assert abs(SPECTROGRAM.fit(tone(400, 0.5, 44100), 44100) - tone(400, 0.5, 8000)).max() < 0.01


FORMATS = {
    "8 bit.wav": dict(subtype="PCM_U8"),
    "24 bit.wav": dict(subtype="PCM_24"),
    "float.wav": dict(subtype="FLOAT"),
    "double.wav": dict(subtype="DOUBLE"),
    "a-law.wav": dict(subtype="ALAW"),
    "a.flac": {},
    "a.ogg": {},
    "a.mp3": {},
    "LOUD.WAV": {},
    "a.oga": dict(format="OGG"),
    "a.opus": dict(format="OGG", subtype="OPUS"),
    "a.aif": dict(format="AIFF"),
    "a.AIFC": dict(format="AIFF"),
    "a.caf": {},
    "a.w64": {},
}
OPUS_RATES = (8000, 16000, 48000)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 96000])
def test_every_format_gives_the_same_spectrogram(rate, channels, tmp_path):
    expected = np.asarray(SPECTROGRAM.load(write(tmp_path / "plain.wav", tone(700, rate=48000), 48000)), float)
    loud = expected > 255 * (1 - 30 / 80)  # compression may change what is much fainter
    for name, options in FORMATS.items():
        if rate == 96000 and name.endswith("mp3") or rate not in OPUS_RATES and name.endswith("opus"):  # have no such
            continue
        assert audio.is_sound(name)
        samples = np.stack([tone(700, rate=rate)] * channels, 1)
        found = np.asarray(SPECTROGRAM.load(write(tmp_path / name, samples, rate, **options)), float)
        assert np.abs(found - expected)[loud].max() < 12, name


def write(path, samples, rate=8000, **options):
    soundfile.write(path, 0.5 * samples, rate, **options)
    return path


def unfinished(path):
    """The header of a WAV file as it is before the recording ends: without lengths."""
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(4) + content[8:40] + bytes(4) + content[44:])


def cut_off(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def hour(path):
    """An hour of 16-bit stereo at 96 kHz, 1.4 GB that take no space on most disks."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(96_000)
        file.writeframes((1000 * np.repeat(tone(700, 1, 96_000), 2)).astype("<i2").tobytes())
    head = path.read_bytes()
    size = 44 + 3600 * 96_000 * 4
    path.write_bytes(head[:4] + (size - 8).to_bytes(4, "little") + head[8:40] + (size - 44).to_bytes(4, "little"))
    with open(path, "ab") as file:
        file.write(head[44:])
    os.truncate(path, size)


NOISE = np.random.default_rng(0).bytes(4000)
ASF = bytes.fromhex("3026b2758e66cf11")  # which Windows Media files begin with
BAD = {
    "empty.wav": (lambda path: path.write_bytes(b""), "it is empty"),
    "empty.mp3": (lambda path: path.write_bytes(b""), "it is empty"),
    "text.wav": (lambda path: path.write_bytes(b"these are words"), "it is text"),
    "page.mp3": (lambda path: path.write_text("<html>没有</html>", encoding="utf-8"), "it is text"),
    "image.wav": (lambda path: Image.new("RGB", (48, 48)).save(path, "png"), "it is a PNG image"),
    "image.mp3": (lambda path: Image.new("RGB", (48, 48)).save(path, "jpeg"), "it is a JPEG image"),
    "noise.mp3": (lambda path: path.write_bytes(NOISE), "it is damaged, or no recording"),
    "noise.wav": (lambda path: path.write_bytes(NOISE), "it is damaged, or no recording"),
    "zeros.wav": (lambda path: path.write_bytes(bytes(999)), "it begins with zeros"),
    "cut off.mp3": (lambda path: cut_off(write(path, tone(500)), 60), "it is damaged, or no recording"),
    "cut off.ogg": (lambda path: cut_off(write(path, tone(500)), 900), "file is malformed"),
    "video.wav": (lambda path: path.write_bytes(b"\0\0\0\x18ftypmp42" + NOISE), "it is an MP4 or QuickTime video"),
    "phone.mp3": (lambda path: path.write_bytes(b"\0\0\0\x18ftypM4A " + NOISE), "it is an M4A recording"),
    "video.ogg": (lambda path: path.write_bytes(b"\x1a\x45\xdf\xa3" + NOISE), "it is a Matroska or WebM video"),
    "windows.wav": (lambda path: path.write_bytes(ASF + NOISE), "it is a WMA recording or WMV video"),
    "interrupted.wav": (lambda path: unfinished(write(path, np.tile(tone(500), 4))), "its header says that it has no"),
    "header only.wav": (lambda path: cut_off(write(path, tone(500)), 44), "it contains no samples"),
    "no samples.wav": (lambda path: write(path, np.zeros(0)), "it contains no samples"),
    "nan.wav": (lambda path: write(path, np.full(800, np.nan), subtype="FLOAT"), "samples that are NaN"),
    "infinite.wav": (lambda path: write(path, np.full(800, np.inf), subtype="FLOAT"), "NaN or infinite"),
    "cut off.flac": (lambda path: cut_off(write(path, tone(500)), 60), "cannot be read as a recording"),
    "10 Hz.wav": (lambda path: write(path, np.ones(10), 10), "its sample rate is 10 Hz"),
    "link to nothing.wav": (lambda path: path.symlink_to("nothing"), "there is no such file"),
    "cut off.wav": (lambda path: cut_off(write(path, tone(500)), 3000), ""),  # what is left is heard
    "one sample.wav": (lambda path: write(path, np.ones(1), 96_000), ""),
    "silence.wav": (lambda path: write(path, np.zeros(800)), ""),
    "loud.wav": (lambda path: write(path, np.full(800, 1e30), subtype="FLOAT"), ""),
    "8 channels.wav": (lambda path: write(path, np.ones((800, 8))), ""),
    "really a flac.wav": (lambda path: write(path, tone(500), format="FLAC"), ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recordings_are_read_or_named_with_the_reason(name, tmp_path):
    make, reason = BAD[name]
    path = tmp_path / name
    try:
        make(path)
    except OSError:
        pytest.skip("this system makes no symbolic links")
    file = makedata.check_file(path, input_kind(SOUND))
    why = file.reason
    if reason:
        assert file.record is None and why.startswith(f"{path} cannot be read as a recording (") and reason in why, why
        assert why.count("\n") == 0 and "does not exist" not in why
        if reason.endswith(("video", "M4A recording")):
            target = path.with_suffix(".flac" if path.suffix == ".wav" else ".wav")
            assert why.endswith(f'; convert it, as in: ffmpeg -i "{path}" "{target}", or remove it')
        elif name == "interrupted.wav":
            repaired = path.with_name("interrupted.repaired.wav")
            assert why.endswith(f'; repair it, as in: ffmpeg -ignore_length 1 -i "{path}" "{repaired}", and remove it')
        else:
            assert why.endswith("; replace or remove it")
        with pytest.raises(ImageError):
            SPECTROGRAM.load(path)
    else:
        assert why == "" and file.png
        for padding in audio.PAD_MODES:
            assert replace(SPECTROGRAM, padding=padding).load(path).size[::-1] == SPECTROGRAM.size


@pytest.mark.parametrize("name", ["a.m4a", "B.AAC", "c.wma", "d.mp4"])
def test_recordings_that_are_not_read_are_named_with_the_command_that_converts_them(name):
    for sound in (SOUND, None):
        kind = input_kind(sound)
        assert not kind.fits(name)
        if sound or name != "d.mp4":  # of videos, images are frames
            assert kind.why_not(name).endswith(f'; convert it, as in: ffmpeg -i "{name}" "{name[0]}.wav"')
    assert "save frames" in input_kind(None).why_not("d.mp4")


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems would write the hour")
def test_of_an_hour_only_the_beginning_is_read(tmp_path):
    hour(tmp_path / "hour.wav")
    assert soundfile.info(tmp_path / "hour.wav").duration == 3600
    started = time.perf_counter()
    tracemalloc.start()
    samples, rate = read_mono(tmp_path / "hour.wav", 0.5)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    assert len(samples) == 48_000 and rate == 96_000 and time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seconds=0.01), r"SECONDS must be at least WINDOW \(32.0 ms\), got 0.01"),
        (dict(hop=50.0), "at least 32 mel bands x 32 frames, got 32 x 11"),
        (dict(mels=16), "at least 32 mel bands x 32 frames, got 16 x 51"),
        (dict(mels=256), r"WINDOW must be long enough to resolve MELS \(256\) mel bands, got 32.0 ms"),
    ],
)
def test_settings_that_fit_no_recording_are_named(changes, message):
    for settings, expected in ((SPECTROGRAM, None), (replace(SPECTROGRAM, **changes), message)):
        with nullcontext() if expected is None else pytest.raises(ConstantError, match=message):
            settings.check()
            settings.check_filters()


def test_an_absent_package_is_named(monkeypatch, tmp_path):
    path = write(tmp_path / "a.wav", tone(500))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UserError, match="needs the package soundfile .* pip install soundfile"):
        SPECTROGRAM.load(path)


# --- the spectrograms in data/


def test_data_contains_the_spectrogram_of_each_recording_as_a_grey_png(place):
    assert makedata.main() == 0
    manifest = read_manifest()
    assert manifest["sound"] == read_sound("data") == SOUND and len(manifest["files"]) == 36
    placed = {path.relative_to("data").as_posix() for path in Path("data").glob("*/*/*")}
    assert placed == {file["path"] for file in manifest["files"]}
    for file in manifest["files"]:
        path, recording = Path("data", file["path"]), Path(file["source"])
        assert path.name == f"{recording.name}.png" and path.parent.name == recording.parent.name
        assert Image.open(path).mode == "L" and Image.open(path).format == "PNG"
        expected = np.asarray(SPECTROGRAM.load(recording))
        for image in (load_image(path), input_kind(SOUND).load(path), input_kind(SOUND).load(recording)):
            assert image.mode == "RGB" and (np.asarray(image) == expected).all()
        assert (file["sha256"], file["bytes"]) == (hash_file(recording), recording.stat().st_size)
        assert (file["image_sha256"], file["image_bytes"]) == (hash_file(path), path.stat().st_size)
        sums = [expected[..., 0].size, expected[..., 0].sum(), (expected[..., 0].astype(int) ** 2).sum()]
        assert file["sums"] == [[number] * 3 for number in sums] and 0.3 <= file["seconds"] <= 0.4


def test_the_split_and_the_spectrograms_are_those_of_one_process(place):
    kind, files, images = input_kind(SOUND), scan_class_folders("data1").files, (io.BytesIO(), io.BytesIO())
    (several, _), (one, _) = (makedata.check_files(files, kind, workers, images[bool(workers)]) for workers in (2, 0))
    assert images[0].getvalue() == images[1].getvalue() and len(one.files) == 36
    for name in ("files", "sha256", "image_sha256"):
        assert list(getattr(several, name)) == list(getattr(one, name))
    for name in ("stamps", "sums", "seconds", "image_bytes"):
        assert np.array_equal(getattr(several, name), getattr(one, name))
    makedata.main()
    before = {path: path.read_bytes() for path in Path("data").rglob("*.*") if path.suffix != ".npz"}
    makedata.main()
    assert {path: path.read_bytes() for path in Path("data").rglob("*.*") if path.suffix != ".npz"} == before


def test_names_stay_apart_and_may_be_odd(place):
    names = ["x.wav", "x.flac", "x.wav.wav", "小麦 录音.WAV", "a,b;'c' {0}%s.ogg"]
    for number, name in enumerate(names):
        write(Path("data1/low", name), tone(300, seed=1000 + number))
    assert makedata.main() == 0
    placed = {path.name for path in Path("data").glob("*/low/*")}
    assert placed >= {f"{name}.png" for name in names} and len(placed) == 12 + len(names)
    assert makedata.main() == 0


@pytest.mark.skipif(os.name != "posix", reason="other systems count characters")
def test_a_name_that_leaves_no_room_for_the_extension_is_skipped(place, capsys):
    name = f"{'麦' * 82}ab.wav"
    assert len(name.encode()) == 252
    write(Path("data1/low", name), tone(300))
    assert makedata.main() == 3
    assert "is too long to append .png; shorten it" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.png", "low_anna_0.wav.png"])
def test_images_and_recordings_are_not_mixed(name, place):
    Image.new("L", (51, 32)).save(Path("data1/low", name))
    with pytest.raises(UserError, match=rf"high_anna_0.wav is a recording and .*{name} an image"):
        makedata.main()
    assert not Path("data").exists()


def test_a_spectrogram_that_was_changed_or_added_is_kept(place):
    makedata.main()
    path = sorted(Path("data/train/low").iterdir())[0]
    original = path.read_bytes()
    with Image.open(path) as image:
        image.point(lambda level: level // 2).save(path)
    with pytest.raises(UserError, match=f"{path.name} was not put there by makedata.py, or was changed since"):
        makedata.main()
    path.write_bytes(original)
    path.with_name("mine.wav.png").write_bytes(original)
    with pytest.raises(UserError, match="mine.wav.png was not put there"):
        makedata.main()
    path.with_name("mine.wav.png").unlink()
    assert makedata.main() == 0


def make_old_data():
    """data/ as earlier versions made it: the recordings themselves, and a manifest that says so."""
    makedata.main()
    manifest = read_manifest()
    for file in manifest["files"]:
        Path("data", file["path"]).unlink()
        file["path"] = file["path"].removesuffix(".png")
        os.link(file["source"], Path("data", file["path"]))
        del file["image_sha256"], file["image_bytes"]
    write_former_manifest(manifest)


def test_data_of_an_earlier_version_is_named_and_replaced(place):
    make_old_data()
    for read in (lambda: read_sound("data"), mean_std.main):
        with pytest.raises(UserError, match="data contains recordings, where an earlier .* run makedata.py again"):
            read()
    with pytest.raises(UserError, match="high contains recordings; run makedata.py, which writes their spectrograms"):
        open_image_folder("data/train")
    foreign = Path("data/train/low/mine.wav")
    write(foreign, tone(300))
    with pytest.raises(UserError, match="mine.wav was not put there"):
        makedata.main()
    foreign.unlink()
    assert makedata.main() == 0 and mean_std.main() == 0
    assert not list(Path("data").rglob("*.wav")) and len(open_image_folder("data/train")) == 24


def test_a_network_for_recordings_takes_their_spectrograms_and_refuses_other_images(tmp_path):
    kind = input_kind(SOUND)
    assert (kind.name, kind.extensions) == ("recording", audio.EXTENSIONS)
    assert all(kind.fits(tmp_path / name) for name in ("a.wav", "A.FLAC", "a.wav.png", "A.PNG"))
    assert not any(kind.fits(tmp_path / name) for name in ("a.jpg", ".a.png", "._a.wav", "a.txt", "png"))
    for name, size in (("wide.png", (52, 32)), ("high.PNG", (51, 33)), ("photo.jpg", (51, 32))):
        Image.new("RGB", size).save(tmp_path / name)
        with pytest.raises(ImageError, match=f"{name} is neither a recording nor a spectrogram PNG of 51 x 32 pixels"):
            kind.load(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"broken")
    with pytest.raises(ImageError, match="broken.png cannot be read as an image"):
        kind.load(tmp_path / "broken.png")
    assert input_kind(None).name == "image" and input_kind(None).load is load_image


# --- the split


def test_statistics_of_recordings_may_lie_elsewhere_or_nowhere(place, monkeypatch, capsys):
    makedata.main()
    for output in ("", "elsewhere/statistics.json"):
        monkeypatch.setattr(mean_std, "OUTPUT", output)
        assert mean_std.main() == 0
        assert "recordings" in capsys.readouterr().out
    assert read_json(Path("elsewhere/statistics.json"))["sound"] == SOUND


def test_recordings_need_the_manifest(place):
    with pytest.raises(UserError, match="contains recordings, but no manifest says so; run makedata.py first"):
        mean_std.main()


def test_statistics_are_those_of_the_spectrograms_in_data(place, monkeypatch):
    makedata.main()
    reports = []
    for source, known in (("data1", mean_std.read_known_sums), ("data1", lambda path: None), ("data/train", None)):
        monkeypatch.setattr(mean_std, "SOURCE", source)
        monkeypatch.setattr(mean_std, "read_known_sums", known or mean_std.read_known_sums)
        assert mean_std.main() == 0
        reports.append(read_json("data/mean_std.json"))
    assert reports[0] == reports[1] and reports[0]["fingerprint"] == read_json("data/manifest.json")["fingerprint"]
    pixels = [np.asarray(load_image(path)) / 255 for path in Path("data/train").rglob("*.png")]
    np.testing.assert_allclose(reports[2]["mean"], np.mean(pixels, (0, 1, 2)))
    assert reports[2]["pictures"] == 24


def test_bad_recordings_are_skipped_and_lengths_reported(place, capsys):
    Path("data1/low/empty.wav").touch()
    Path("data1/low/notes.txt").touch()
    write(Path("data1/low/long.wav"), tone(300, 0.7))
    assert makedata.main() == 3
    out = capsys.readouterr().out
    assert "empty.wav cannot be read as a recording (it is empty)" in out
    assert "notes.txt has no recording extension (.wav, .flac, .ogg, ...: see docs/sounds-and-series.md)" in out
    assert "the recordings last 0.30 to 0.70 s, median 0.35; of 1 only the first 0.5 s are used" in out
    assert "37 recordings in data, split with seed 42" in out
    assert read_json(Path("data", MANIFEST))["sound"] == SOUND


def test_the_check_finds_identical_recordings_only(place, capsys, monkeypatch):
    shutil.copy("data1/low/low_bo_0.wav", "data1/high/low_bo_0.wav")
    for name, value in dict(CHECK=True, CHECK_OUTPUT="results").items():
        monkeypatch.setattr(makedata, name, value)
    assert makedata.main() == 3
    out = capsys.readouterr().out
    assert "37 usable recordings in 3 classes" in out and "0.30 to 0.40 s, median 0.35" in out
    assert "1 pairs of near or exact duplicates in two classes" in out and "in one class" not in out
    assert Path("results/pairs.png").is_file() and not Path("data").exists()


def sides():
    """{side: {group}} of data, by the names of the files."""
    files = read_manifest()["files"]
    return {
        side: {file["path"].split("_")[-2] for file in files if file["path"].startswith(side)}
        for side in ("train", "val")
    }


def test_groups_land_on_one_side(place, monkeypatch, capsys):
    monkeypatch.setattr(makedata, "GROUP", r"_([a-z]+)_")
    makedata.main()
    found = sides()
    assert not found["train"] & found["val"] and found["train"] | found["val"] == set(SPEAKERS)
    assert len(found["val"]) == 1  # a quarter is nearer to 30 % than a half
    assert f"validation groups (1): {', '.join(found['val'])}" in capsys.readouterr().out
    manifest = read_json(Path("data", MANIFEST))
    assert manifest["group"] == r"_([a-z]+)_" and manifest["val_groups"] == sorted(found["val"])
    for speaker in SPEAKERS[:2]:
        monkeypatch.setattr(makedata, "VAL_GROUPS", [speaker])
        makedata.main()
        assert "by VAL_GROUPS, so that VAL_RATIO 0.3 and SEED 42 have no effect" in capsys.readouterr().out
        assert sides() == dict(train=set(SPEAKERS) - {speaker}, val={speaker})


@pytest.mark.parametrize(
    ("group", "val_groups", "message"),
    [
        ("nobody", [], "finds nothing in 36 of 36 file names, such as data1"),
        ("anna", [], "finds nothing in 27 of 36 file names"),
        ("x?_", [], "puts all files into one group, '_'"),
        ("anna|(bo)|chen|dora", [], "finds nothing in 27 of 36"),
        ("_([a-z]+)_", ["eve"], "VAL_GROUPS names eve, which GROUP does not find; it finds anna, bo, chen, dora"),
        ("_([a-z]+)_", list(SPEAKERS), "one side would have no file of the class 'high'"),
        ("^[a-z]+", [], "one side would have no file of the class 'high'"),
    ],
)
def test_patterns_that_do_not_fit_get_one_sentence(group, val_groups, message, place, monkeypatch):
    monkeypatch.setattr(makedata, "GROUP", group)
    monkeypatch.setattr(makedata, "VAL_GROUPS", val_groups)
    with pytest.raises(UserError) as error:
        makedata.main()
    assert message in str(error.value) and "\n" not in str(error.value) and not Path("data").exists()


def test_a_file_that_stands_in_two_groups_is_named(place, monkeypatch):
    shutil.copy("data1/low/low_bo_0.wav", "data1/low/low_anna_9.wav")
    monkeypatch.setattr(makedata, "GROUP", r"_([a-z]+)_")
    with pytest.raises(UserError, match="identical, but belong to the groups anna and bo; delete"):
        makedata.main()


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=30),
    st.floats(0.1, 0.9),
    st.integers(0, 99),
)
def test_any_groups_are_split_near_the_ratio(sizes, ratio, seed):
    counts = {f"group {number}": np.array(row) for number, row in enumerate(sizes)}
    [chosen] = choose_groups(counts, [ratio], seed)
    assert [chosen] == choose_groups(dict(reversed(counts.items())), [ratio], seed)
    if chosen:
        assert is_in_every_part(counts, chosen).all() and chosen < set(counts)
        total, val = sum(counts.values()), sum(counts[group] for group in chosen)
        assert np.abs(val - ratio * total).max() <= 3**0.5 * np.max(sizes) + 1  # not off by more than a group


def test_few_groups_are_split_as_near_as_they_can_be():
    counts = {str(size): np.array([size]) for size in (5, 4, 4.5, 7)}
    assert choose_groups(counts, [0.2], 0) == [{"4"}]
    paths = [Path("a", f"plant{plant}-{photo}.jpg") for plant in range(3) for photo in range(2)]
    assert set(find_groups(paths, compile_group(r"plant\d+"))) == {"plant0", "plant1", "plant2"}


# --- augmentation


@pytest.fixture
def image(tmp_path):
    """Tensor (3, 32, 51) of a tone."""
    seed_everything(0)
    spectrogram = SPECTROGRAM.load(write(tmp_path / "a.wav", tone(700)))
    return torch.from_numpy(np.asarray(spectrogram).copy()).permute(2, 0, 1) / 255


def test_each_augmentation_changes_what_it_should(image):
    moved = {tuple(augment.shift_time(image, 0.1).sum((0, 1)).argmax(0, keepdim=True).tolist()) for _ in range(50)}
    middle = int(image.sum((0, 1)).argmax())
    assert 5 < len(moved) <= 11 and all(abs(place - middle) <= 5 for (place,) in moved)
    shifted = augment.shift_time(image, 0.1)
    assert torch.equal(shifted.flatten().sort().values, image.flatten().sort().values)

    changed = augment.change_gain(image, 6 / 80)
    inside = (image > 0.1) & (image < 0.9)
    difference = (changed - image)[inside]
    assert difference.std() < 1e-6 and 0 < abs(difference.mean()) <= 6 / 80
    assert (changed[image == 0] == 0).all() and 0 <= changed.min() and changed.max() <= 1

    assert augment.add_noise(image, 0.0, (30, 30), 80) is image
    noisy = augment.add_noise(image, 1.0, (30, 30), 80)
    assert (noisy >= image - 1e-6).all()
    quiet = image < 0.2
    assert 10 * float((10 ** (8 * (noisy[quiet] - 1))).mean().log10()) == pytest.approx(-30, abs=1)
    assert (noisy - image)[image > 0.9].max() < 0.05 and torch.equal(noisy[0], noisy[1])

    for dim in (1, 2):
        masks = [augment.mask(image + 1, 0.2, dim) == 0 for _ in range(50)]
        widths = [int(masked.all(3 - dim)[0].sum()) for masked in masks]
        assert min(widths) == 0 and max(widths) == int(0.2 * image.shape[dim])
        assert all(masked.sum() == width * image.numel() // image.shape[dim] for masked, width in zip(masks, widths))


def test_each_step_of_the_augmentation_can_be_switched_off(image):
    mean, std = [0.5] * 3, [0.2] * 3
    spectrogram = Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy())
    transform = partial(augment.spectrogram_transform, mean, std, decibels=80.0)
    plain = eval_transform((32, 51), mean, std)(spectrogram)
    assert torch.equal(transform()(spectrogram), plain) and plain.shape == (3, 32, 51)
    for step in (dict(time_shift=0.1), dict(gain=6.0), dict(noise=1.0), dict(spec_mask=0.2)):
        assert any(not torch.equal(transform(**step)(spectrogram), plain) for _ in range(9)), step


# --- images that are not square


@pytest.mark.parametrize("size", [(32, 51), (33, 200), (100, 40)])
def test_the_network_and_its_gradients_are_those_of_plain_convolutions(size, monkeypatch):
    torch.manual_seed(0)
    network = timm.create_model(SMALL["MODEL"], num_classes=3, layer_scale_init_value=0.1).double().train()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    results = []
    for forward in (DepthwiseConv2d.forward, nn.Conv2d.forward):
        monkeypatch.setattr(DepthwiseConv2d, "forward", forward)
        logits = network(x)
        gradients = torch.autograd.grad(logits.square().sum(), [x, *network.parameters()])
        results.append((logits, *gradients))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-9, rtol=1e-6)
    torch.manual_seed(0)
    merged = timm.utils.reparameterize_model(network.eval())
    torch.testing.assert_close(merged(x), network(x))


def test_the_cache_contains_images_that_are_not_square(place):
    makedata.main()
    dataset = open_image_folder("data/train", np.asarray)
    expected = [image for image, _ in dataset]
    cache_images(Path("data/cache"), 1.0, (dataset, spectrogram_size(SOUND)))
    [path] = Path("data/cache").glob("*.npy")
    assert path.name.startswith("32x51-") and dataset.cache.count == 24
    assert all((image == other).all() for (image, _), other in zip(dataset, expected, strict=True))
    makedata.main()  # which keeps the cache
    assert path.is_file()


# --- the four scripts


@pytest.fixture
def run_test(monkeypatch):
    """Call test.py's main() on files or folders with a checkpoint; returns (exit status, rows of predictions.csv)."""
    spec = importlib.util.spec_from_file_location("test_script", Path(train.__file__).with_name("test.py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(checkpoint, *images, **constants):
        settings = dict(IMAGES=list(map(str, images)), CHECKPOINT=str(checkpoint), DEVICE="cpu", WORKERS=0, AMP="off")
        for name, value in (settings | constants).items():
            monkeypatch.setattr(script, name, value)
        status = script.main()
        with open(Path("results", "predictions.csv"), encoding="utf-8-sig", newline="") as file:
            return status, list(csv.DictReader(file))

    return run


def test_the_four_scripts_on_tones(run_train, run_test, tmp_path, capsys, monkeypatch):
    checkpoint = run_train(EPOCHS=5, BATCH_SIZE=4, LEARNING_RATE=4e-3, DROP_PATH=0.0, WARMUP_EPOCHS=1, MIX_PROB=0.0)
    out = capsys.readouterr().out
    assert "32 x 51 pixels" in out and "cache       36 of 36" in out
    assert checkpoint["sound"] == SOUND and checkpoint["img_size"] == [32, 51] and checkpoint["best_acc1"] > 90
    statistics = read_json(Path("data/mean_std.json"))
    assert statistics["sound"] == SOUND and checkpoint["mean"] == statistics["mean"]
    pixels = [np.asarray(SPECTROGRAM.load(path)) / 255 for path in Path("data1").rglob("*.wav")]
    np.testing.assert_allclose(statistics["mean"], np.mean(pixels, (0, 1, 2)))

    path = next(Path("data/val/low").iterdir())
    image = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])(load_image(path))[None]
    with torch.no_grad():
        torch.testing.assert_close(build_network(checkpoint)(image), build_network(checkpoint, merge=False)(image))

    # Predictions of the spectrograms in data/val and of the recordings themselves are the same.
    best = Path("checkpoints", SMALL["MODEL"], "best.pth")
    sources = {Path(file["path"]).name: file["source"] for file in read_manifest()["files"]}
    status, of_spectrograms = run_test(best, "data/val")
    assert status == 0 and len(of_spectrograms) == 12 and "on 12 recordings" in capsys.readouterr().out
    _, of_recordings = run_test(best, *(sources[Path(row["image"]).name] for row in of_spectrograms))
    for one, other in zip(of_spectrograms, of_recordings, strict=True):
        assert Path(other["image"]) == Path(sources[Path(one["image"]).name])
        assert one | dict(image="") == other | dict(image="")

    # The checkpoint alone suffices for new recordings, at another rate.
    monkeypatch.setattr(export, "FORMATS", ["onnx"])
    export.main()
    assert "12 recordings of" in capsys.readouterr().out
    elsewhere = tmp_path / "elsewhere"
    for folder in ("checkpoints", "exports"):
        shutil.move(folder, elsewhere / folder)
    for folder in ("data", "data1"):
        shutil.rmtree(folder)
    new = elsewhere / "low"
    new.mkdir()
    write(new / "new.flac", np.stack([tone(310, 0.6, 44100)] * 2, 1), 44100)
    (new / "empty.wav").touch()
    Image.new("RGB", (48, 48)).save(new / "a.png")
    probabilities = []
    for path in (elsewhere / best, elsewhere / "exports" / SMALL["MODEL"] / "model.onnx"):
        status, rows = run_test(path, new, MERGE=False)
        out = capsys.readouterr().out
        assert ("AMP off, MERGE False have no effect" in out) == (path.suffix == ".onnx")
        assert status == 3 and [Path(row["image"]).name for row in rows] == ["new.flac"] and rows[0]["class_1"] == "low"
        assert "1 recordings in" in out and "on 1 recordings" in out
        assert "empty.wav cannot be read as a recording" in out and "a.png is neither a recording nor a" in out
        probabilities.append(float(rows[0]["probability_1"]))
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-4)
    with pytest.raises(UserError, match="no file matches it as a pattern"):
        run_test(elsewhere / best, new / "*.jpg")
    with pytest.raises(ConstantError, match="TTA must be False for recordings"):
        run_test(elsewhere / best, new, TTA=True)


def test_a_run_is_continued_only_with_the_same_spectrograms(run_train, monkeypatch, capsys):
    run_train(EPOCHS=1, BATCH_SIZE=24)
    monkeypatch.setattr(makedata, "SECONDS", 0.4)
    makedata.main()
    with pytest.raises(UserError, match="how spectrograms are made there is .*'seconds': 0.5"):
        run_train(EPOCHS=2, RESUME="auto")
    assert "warning: makedata.py makes other spectrograms since" in capsys.readouterr().out
