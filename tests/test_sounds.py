"""Sounds: the log-mel picture, bad recordings, groups, augmentation, and the four scripts on small tones."""

import csv
import importlib.util
import os
import shutil
import sys
import time
import tracemalloc
import wave
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import DEFAULTS, SMALL, draw_picture
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import makedata
import mean_std
import train
from common import sounds
from common.cache import open_cache
from common.checkpoint import build_network, load_checkpoint
from common.dataset import eval_transform, open_image_folder, seed_everything
from common.groups import choose_val_groups, find_groups, is_on_both_sides
from common.images import ImageError
from common.manifest import MANIFEST, read_json
from common.options import UserError
from common.sounds import fit, load_sound, log_mel, picture_size, read_mono
from models.depthwise import DepthwiseConv2d
from tools import export

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("librosa")

SOUND = dict(sample_rate=8000, seconds=0.5, padding="silence", window=32.0, hop=10.0, mels=32, decibels=80.0)
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
        return load_checkpoint("checkpoints/unireplknet_a/best.pth")

    return run


# --- the picture


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
def test_the_log_mel_picture_is_what_its_definition_says(changes, tmp_path):
    sound = SOUND | changes
    rng = np.random.default_rng(1)
    samples = tone(700, 0.5, sound["sample_rate"]) + 0.01 * rng.standard_normal(sound["sample_rate"] // 2)
    expected = reference(samples, sound)
    np.testing.assert_allclose(log_mel(samples, sound), expected, atol=1e-3)
    soundfile.write(tmp_path / "a.wav", 0.5 * samples, sound["sample_rate"], "DOUBLE")
    picture = load_sound(tmp_path / "a.wav", sound)
    assert picture.mode == "RGB" and picture.size[::-1] == picture_size(sound) == expected.shape
    pixels = np.asarray(picture)
    assert (pixels == pixels[..., :1]).all()
    levels = 255 * (1 + expected[::-1] / sound["decibels"])  # high frequencies at the top
    assert np.abs(pixels[..., 0] - levels).max() < 0.51


def test_louder_recordings_give_the_same_picture_but_silence_stays_black():
    quiet, loud = (log_mel(level * tone(700), SOUND) for level in (0.01, 1))
    np.testing.assert_allclose(quiet, loud, atol=1e-3)
    assert (log_mel(np.zeros(4000), SOUND) == -80).all()
    rounding = np.random.default_rng(0).choice([-1, 0, 1], 4000) / 2**16
    assert log_mel(rounding, SOUND).max() < -5


def test_length_and_padding():
    short, long = np.full(1000, 0.5, np.float32), np.arange(5000, dtype=np.float32)
    silent = fit(short, 8000, SOUND)
    assert silent.shape == (4000,) and silent[:1500].max() == silent[2500:].max() == 0
    assert (silent[1500:2500] == 0.5).all()
    assert (fit(short, 8000, SOUND | dict(padding="repeat")) == 0.5).all()
    assert (fit(long, 8000, SOUND) == long[:4000]).all()
    assert abs(fit(tone(400, 0.5, 44100), 44100, SOUND) - tone(400, 0.5, 8000)).max() < 0.01


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
}


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 96000])
def test_every_format_gives_the_same_picture(rate, channels, tmp_path):
    expected = np.asarray(load_sound(write(tmp_path / "plain.wav", tone(700, rate=48000), 48000), SOUND), float)
    loud = expected > 255 * (1 - 30 / 80)  # compression may change what is much fainter
    for name, options in FORMATS.items():
        if rate == 96000 and name.endswith("mp3"):  # which has no such rate
            continue
        samples = np.stack([tone(700, rate=rate)] * channels, 1)
        found = np.asarray(load_sound(write(tmp_path / name, samples, rate, **options), SOUND), float)
        assert np.abs(found - expected)[loud].max() < 12, name


def write(path, samples, rate=8000, **options):
    soundfile.write(path, 0.5 * samples, rate, **options)
    return path


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


BAD = {
    "empty.wav": (lambda path: path.write_bytes(b""), "it is empty"),
    "text.wav": (lambda path: path.write_bytes(b"these are words"), "cannot be read as a sound"),
    "picture.wav": (lambda path: draw_picture("a").save(path, "png"), "cannot be read as a sound"),
    "header only.wav": (lambda path: cut_off(write(path, tone(500)), 44), "it holds no samples"),
    "no samples.wav": (lambda path: write(path, np.zeros(0)), "it holds no samples"),
    "nan.wav": (lambda path: write(path, np.full(800, np.nan), subtype="FLOAT"), "samples that are NaN"),
    "infinite.wav": (lambda path: write(path, np.full(800, np.inf), subtype="FLOAT"), "NaN or infinite"),
    "cut off.flac": (lambda path: cut_off(write(path, tone(500)), 60), "cannot be read as a sound"),
    "10 Hz.wav": (lambda path: write(path, np.ones(10), 10), "its sample rate is 10 Hz"),
    "link to nothing.wav": (lambda path: path.symlink_to("nothing"), "cannot be read as a sound"),
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
    found, why = makedata.check_picture(path, SOUND)
    if reason:
        assert found is None and why.startswith(f"{path} cannot be read as a sound (") and reason in why, why
        assert why.count("\n") == 0 and why.endswith("; replace or remove it")
        with pytest.raises(ImageError):
            load_sound(path, SOUND)
    else:
        assert why == ""
        for padding in sounds.PADDINGS:
            assert load_sound(path, SOUND | dict(padding=padding)).size[::-1] == picture_size(SOUND)


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
        (dict(sample_rate=10), "SAMPLE_RATE must lie between 1000 and"),
        (dict(padding="noise"), 'PADDING must be "silence" or "repeat"'),
        (dict(seconds=0.0), "SECONDS must be above 0"),
        (dict(seconds=0.01), "shorter than WINDOW"),
        (dict(hop=50.0), "32 mel bands x 11 frames"),
        (dict(mels=16), "16 mel bands x 51 frames"),
        (dict(mels=256), "cannot tell 256 mel bands apart; raise it, or lower MELS"),
    ],
)
def test_constants_that_fit_no_recording_are_named(changes, message):
    sounds.check_settings(SOUND)
    with pytest.raises(UserError, match=message):
        sounds.check_settings(SOUND | changes)


def test_an_absent_package_is_named(monkeypatch, tmp_path):
    path = write(tmp_path / "a.wav", tone(500))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(UserError, match="needs the package soundfile .* pip install soundfile"):
        load_sound(path, SOUND)


# --- the split


def test_pictures_and_recordings_are_not_mixed(place):
    draw_picture("a").save("data1/low/a.png")
    with pytest.raises(UserError, match=r"high_anna_0.wav is a recording and .*a.png a picture"):
        makedata.main()
    assert not Path("data").exists()


def test_statistics_of_recordings_may_lie_elsewhere_or_nowhere(place, monkeypatch, capsys):
    makedata.main()
    for output in ("", "elsewhere/statistics.json"):
        monkeypatch.setattr(mean_std, "OUTPUT", output)
        assert mean_std.main() == 0
        assert "recordings" in capsys.readouterr().out
    assert read_json(Path("elsewhere/statistics.json"))["sound"] == SOUND


def test_recordings_need_the_manifest(place, monkeypatch):
    with pytest.raises(UserError, match="holds recordings, but no manifest says so; run makedata.py first"):
        mean_std.main()
    shutil.copytree("data1", "data/train")
    monkeypatch.setattr(train, "DATA", "data")
    with pytest.raises(UserError, match="run makedata.py first"):
        train.open_data([0.5] * 3, [0.2] * 3, torch.device("cpu"), 0, 1)


def test_bad_recordings_are_left_out_and_lengths_told(place, capsys):
    Path("data1/low/empty.wav").touch()
    Path("data1/low/notes.txt").touch()
    write(Path("data1/low/long.wav"), tone(300, 0.7))
    assert makedata.main() == 3
    out = capsys.readouterr().out
    assert "empty.wav cannot be read as a sound (it is empty)" in out
    assert "notes.txt is not named like a recording (.wav, .flac, .ogg, .mp3)" in out
    assert "the recordings last 0.30 to 0.70 s, half of them up to 0.35; of 1 only the first 0.5 s are heard" in out
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
    files = read_json(Path("data", MANIFEST))["files"]
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
    assert f"validation is of 1 groups: {', '.join(found['val'])}" in capsys.readouterr().out
    manifest = read_json(Path("data", MANIFEST))
    assert manifest["group"] == r"_([a-z]+)_" and manifest["val_groups"] == sorted(found["val"])
    for speaker in SPEAKERS:
        monkeypatch.setattr(makedata, "VAL_GROUPS", [speaker])
        makedata.main()
        assert sides() == dict(train=set(SPEAKERS) - {speaker}, val={speaker})


@pytest.mark.parametrize(
    ("group", "val_groups", "message"),
    [
        ("_(anna", [], "is no regular expression"),
        ("nobody", [], "finds nothing in 36 of 36 file names, such as data1"),
        ("anna", [], "finds nothing in 27 of 36 file names"),
        ("x?_", [], "puts all files into one group, '_'"),
        ("anna|(bo)|chen|dora", [], "finds nothing in 27 of 36"),
        ("_([a-z]+)_", ["eve"], "VAL_GROUPS names eve, which GROUP does not find; it finds anna, bo, chen, dora"),
        ("_([a-z]+)_", list(SPEAKERS), "one side would have no file of the class 'high'"),
        ("^[a-z]+", [], "one side would have no file of the class 'high'"),
        ("", ["anna"], "VAL_GROUPS names groups, but GROUP does not say"),
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
    chosen = choose_val_groups(counts, ratio, seed)
    assert chosen == choose_val_groups(dict(reversed(counts.items())), ratio, seed)
    if chosen:
        assert is_on_both_sides(counts, chosen).all() and chosen < set(counts)
        total, val = sum(counts.values()), sum(counts[group] for group in chosen)
        assert np.abs(val - ratio * total).max() <= 3**0.5 * np.max(sizes) + 1  # not off by more than a group


def test_few_groups_are_split_as_near_as_they_can_be():
    counts = {str(size): np.array([size]) for size in (5, 4, 4.5, 7)}
    assert choose_val_groups(counts, 0.2, 0) == {"4"}
    paths = [Path("a", f"plant{plant}-{photo}.jpg") for plant in range(3) for photo in range(2)]
    assert set(find_groups(paths, r"plant\d+").values()) == {"plant0", "plant1", "plant2"}


# --- augmentation


@pytest.fixture
def image(tmp_path):
    """Tensor (3, 32, 51) of a tone."""
    seed_everything(0)
    picture = load_sound(write(tmp_path / "a.wav", tone(700)), SOUND)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255


def test_each_augmentation_changes_what_it_should(image):
    moved = {tuple(sounds.shift_time(image, 0.1).sum((0, 1)).argmax(0, keepdim=True).tolist()) for _ in range(50)}
    middle = int(image.sum((0, 1)).argmax())
    assert 5 < len(moved) <= 11 and all(abs(place - middle) <= 5 for (place,) in moved)
    shifted = sounds.shift_time(image, 0.1)
    assert torch.equal(shifted.flatten().sort().values, image.flatten().sort().values)

    changed = sounds.change_gain(image, 6 / 80)
    inside = (image > 0.1) & (image < 0.9)
    difference = (changed - image)[inside]
    assert difference.std() < 1e-6 and 0 < abs(difference.mean()) <= 6 / 80
    assert (changed[image == 0] == 0).all() and 0 <= changed.min() and changed.max() <= 1

    assert sounds.add_noise(image, 0.0, (30, 30), 80) is image
    noisy = sounds.add_noise(image, 1.0, (30, 30), 80)
    assert (noisy >= image - 1e-6).all()
    quiet = image < 0.2
    assert 10 * float((10 ** (8 * (noisy[quiet] - 1))).mean().log10()) == pytest.approx(-30, abs=1)
    assert (noisy - image)[image > 0.9].max() < 0.05 and torch.equal(noisy[0], noisy[1])

    for dim in (1, 2):
        masks = [sounds.mask(image + 1, 0.2, dim) == 0 for _ in range(50)]
        widths = [int(masked.all(3 - dim)[0].sum()) for masked in masks]
        assert min(widths) == 0 and max(widths) == int(0.2 * image.shape[dim])
        assert all(masked.sum() == width * image.numel() // image.shape[dim] for masked, width in zip(masks, widths))


def test_augmentation_is_that_of_the_kind_of_data(monkeypatch, image):
    mean, std = [0.5] * 3, [0.2] * 3
    picture = draw_picture("a", (51, 32))
    names = [str(step) for step in train.train_transform(mean, std, SOUND).transforms]
    assert not any("Flip" in name or "Jitter" in name or "Cutout" in name for name in names)
    off = dict(TIME_SHIFT=0.0, GAIN=0.0, NOISE=0.0, TIME_MASK=0.0, FREQUENCY_MASK=0.0)
    seen = [train.train_transform(mean, std, SOUND)(picture) for _ in range(2)]
    assert not torch.equal(*seen) and seen[0].shape == (3, 32, 51)
    for name, value in off.items():
        monkeypatch.setattr(train, name, value)
    plain = eval_transform((32, 51), mean, std)(picture)
    assert torch.equal(train.train_transform(mean, std, SOUND)(picture), plain)
    for name in off:
        monkeypatch.setattr(train, name, DEFAULTS[name] or 0.5)
        assert any(not torch.equal(train.train_transform(mean, std, SOUND)(picture), plain) for _ in range(9)), name
        monkeypatch.setattr(train, name, 0.0)
    assert train.create_mixup(3, SOUND).cutmix_alpha == 0 and train.create_mixup(3).cutmix_alpha > 0
    assert train.describe_augmentation(SOUND).startswith("of recordings: ")
    assert "HFLIP" in train.describe_augmentation(None) and "HFLIP" not in train.describe_augmentation(SOUND)


# --- pictures that are not square


@pytest.mark.parametrize("size", [(32, 51), (33, 200), (100, 40)])
def test_the_network_and_its_gradients_are_those_of_plain_convolutions(size, monkeypatch):
    torch.manual_seed(0)
    network = timm.create_model("unireplknet_a", num_classes=3, layer_scale_init_value=0.1).double().train()
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


def test_the_cache_holds_pictures_that_are_not_square(place):
    makedata.main()
    folder = open_image_folder("data/train", np.asarray, SOUND)
    paths = [path for path, _ in folder.samples]
    expected = [picture for picture, _ in folder]
    folder.cache, path = open_cache(paths, picture_size(SOUND), Path("data/cache"), 1e9, sound=SOUND)
    assert path.name.startswith("32x51-") and folder.cache.count == len(paths)
    assert all((picture == other).all() for (picture, _), other in zip(folder, expected, strict=True))
    other = SOUND | dict(decibels=60.0)
    assert open_cache(paths, picture_size(other), Path("data/cache"), 1e9, sound=other)[1] != path
    assert open_cache(paths, picture_size(SOUND), Path("data/cache"), 1e9, sound=SOUND)[1] == path
    makedata.main()  # which takes the cache for what it is
    assert path.is_file()


# --- the four scripts


@pytest.fixture
def run_test(monkeypatch):
    """Call test.py's main() on files or folders with a checkpoint; returns (exit status, rows of predictions.csv)."""
    spec = importlib.util.spec_from_file_location("test_script", Path(train.__file__).with_name("test.py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(image, checkpoint):
        constants = dict(IMAGES=[str(image)], CHECKPOINT=str(checkpoint), DEVICE="cpu", WORKERS=0, AMP="off")
        for name, value in constants.items():
            monkeypatch.setattr(script, name, value)
        status = script.main()
        with open(Path("results", "predictions.csv"), encoding="utf-8-sig", newline="") as file:
            return status, list(csv.DictReader(file))

    return run


def test_the_four_scripts_on_tones(run_train, run_test, tmp_path, capsys, monkeypatch):
    checkpoint = run_train(EPOCHS=12, BATCH_SIZE=8, LEARNING_RATE=2e-3, DROP_PATH=0.0, WARMUP_EPOCHS=1)
    out = capsys.readouterr().out
    assert "32 x 51 pixels" in out and "augmented   of recordings: TIME_SHIFT 0.1, GAIN 6.0" in out
    assert "recordings  24 for training, 12 for validation" in out and "cache       36 of 36" in out
    assert checkpoint["sound"] == SOUND and checkpoint["img_size"] == [32, 51] and checkpoint["best_acc1"] > 90
    statistics = read_json(Path("data/mean_std.json"))
    assert statistics["sound"] == SOUND and checkpoint["mean"] == statistics["mean"]
    pixels = [np.asarray(load_sound(path, SOUND)) / 255 for path in Path("data1").rglob("*.wav")]
    np.testing.assert_allclose(statistics["mean"], np.mean(pixels, (0, 1, 2)))

    path = next(Path("data/val/low").iterdir())
    image = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])(load_sound(path, SOUND))[None]
    with torch.no_grad():
        torch.testing.assert_close(build_network(checkpoint)(image), build_network(checkpoint, merge=False)(image))

    # The checkpoint alone names new recordings, at another rate.
    monkeypatch.setattr(export, "FORMATS", ["onnx", "timm"])
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
    draw_picture("a").save(new / "a.png")
    answers = []
    for name in ("checkpoints/unireplknet_a/best.pth", "exports/unireplknet_a/model.onnx"):
        status, rows = run_test(new, elsewhere / name)
        out = capsys.readouterr().out
        assert status == 3 and [Path(row["image"]).name for row in rows] == ["new.flac"] and rows[0]["class_1"] == "low"
        assert "1 recordings in" in out and "on 1 recordings" in out and "empty.wav cannot be read as a sound" in out
        answers.append(float(rows[0]["probability_1"]))
    assert answers[0] == pytest.approx(answers[1], abs=1e-4)
    with pytest.raises(UserError, match="is no recording, no folder with recordings"):
        run_test(new / "*.png", elsewhere / "checkpoints/unireplknet_a/best.pth")


def test_a_run_is_continued_only_with_the_same_pictures_of_sounds(run_train, monkeypatch, capsys):
    run_train(EPOCHS=1)
    monkeypatch.setattr(makedata, "SECONDS", 0.4)
    makedata.main()
    with pytest.raises(UserError, match="how sounds become pictures there is .*'seconds': 0.5"):
        run_train(EPOCHS=2, RESUME="auto")
    assert "warning: makedata.py makes other pictures of the sounds since" in capsys.readouterr().out
