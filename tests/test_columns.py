"""What is known of a million files: in columns, a few bytes for each, and the same as before."""

import gc
import pickle
import random
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import manifest
from common.columns import Files, Hashes, Texts, digest_texts, find
from common.dataset import EpochBatches, open_image_folder
from common.evaluation import choose_images
from common.manifest import MANIFEST, TABLE, Table, fingerprint, read_table
from common.options import UserError
from common.run_folder import fingerprint_names

NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=30)


@given(st.lists(NAMES, max_size=30), st.integers(0, 5))
def test_texts_are_those_that_were_put_in(texts, start):
    column = Texts(texts)
    assert list(column) == [column[index] for index in range(len(column))] == texts
    assert list(column[start:]) == texts[start:] and list(column[::-2]) == texts[::-2]
    assert list(Texts.join([column, Texts(), column])) == texts + texts
    assert list(pickle.loads(pickle.dumps(column))) == texts
    with pytest.raises(IndexError):
        column[len(texts)]
    if texts:
        assert column[-1] == texts[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="such names are those of other systems")
def test_names_that_are_not_utf8_are_kept():
    names = ["\udcd3\udcf1.png", "b"]
    assert list(Texts(names)) == names


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=20))
def test_hashes_are_hex_digits_that_sort_and_are_found(digests):
    texts = [digest.hex() for digest in digests]
    hashes = Hashes.from_hex(texts)
    assert list(hashes) == [text if int(text, 16) else "" for text in texts]
    assert fingerprint(hashes) == fingerprint(list(hashes))
    places = find(hashes.keys(), hashes.keys())
    assert [digests[place] for place in places] == digests
    assert (find(Hashes.from_hex(["ab" * 32]).keys(), hashes.keys()) >= 0).all() == ("ab" * 32 in texts)


def test_a_hash_that_is_none_is_refused():
    for text in ("ab", "x" * 64, "ab" * 33):
        with pytest.raises(ValueError, match=r"SHA-256|hexadecimal"):
            Hashes.from_hex([text])


def test_files_are_paths(tmp_path, monkeypatch):
    files = Files("data", ["a", "b c"], Texts(["1", "2", "3"]), np.array([0, 1, 1], np.int32))
    expected = [str(Path("data", *name)) for name in (("a", "1"), ("b c", "2"), ("b c", "3"))]
    assert list(files) == [files[index] for index in range(3)] == expected
    assert list(files[1:]) == expected[1:] and list(files.choose(np.array([2, 0]))) == [expected[2], expected[0]]
    assert [Path(path) for path in Files(".", ["a"], Texts(["1"]), np.zeros(1, int))] == [Path("a/1")]


@given(st.integers(0, 3000), st.integers(0, 99))
def test_the_order_of_an_epoch_is_that_of_a_shuffled_list(length, seed):
    """Bit for bit that of earlier versions, so that a run can be continued."""
    order = list(range(length))
    random.Random(f"{seed}/7").shuffle(order)
    batches = EpochBatches(length, 1, seed)
    batches.epoch = 7
    assert list(batches) == [[(7, index)] for index in order]
    assert all(type(index) is int for batch in batches for _, index in batch)


@pytest.mark.parametrize("sound", [None, {}])
def test_the_fingerprint_of_the_names_is_that_of_earlier_versions(sound):
    """Class names of which one begins another, and recordings whose order is another without ".png"."""
    names = {"a": ["x.wav-2.wav.png", "x.wav.png"], "a b": ["1.png"], "a-": ["ü.png", "z.png"]}
    names["é"] = ["2.png", "玉.png"]
    labels = np.repeat(np.arange(4), [len(some) for some in names.values()])
    files = Files("data/train", list(names), Texts(chain(*names.values())), labels)
    paths = [f"train/{name}/{file}" for name, some in names.items() for file in some]
    assert fingerprint_names(files, sound) == fingerprint(
        path if sound is None else path.removesuffix(".png") for path in paths
    )


def test_images_are_chosen_as_by_earlier_versions(place):
    dataset = open_image_folder("data/train")
    by_class = [[] for _ in dataset.classes]
    for path, label in random.Random(3).sample(list(dataset.samples), len(dataset)):
        by_class[label].append((len(by_class[label]), label, Path(path)))
    expected = sorted(sum(by_class, []))
    for count in (0, 7):
        paths, labels = choose_images("data/train", dataset.classes, count, seed=3)
        assert paths == [path for *_, path in expected][: count or None]
        assert labels == [label for _, label, _ in expected][: count or None]


# --- the manifest


def possible_sums(pixels, generator):
    """Sums of so many pixels, of any levels, for three channels."""
    totals = (255 * pixels[:, None] * generator.random((len(pixels), 3))).astype(np.int64)
    return np.concatenate([pixels[:, None], totals, (255 * totals * generator.random(totals.shape)).astype(int)], 1)


def make_table(count, recordings=False):
    generator = np.random.default_rng(0)
    names = [f"{number % 7}/{number} ü, \"x\".png" for number in range(count)]
    table = Table(
        Texts(f"train/{name}" for name in names),
        Texts(f"data1/{name}" for name in names),
        Hashes(generator.integers(0, 256, (count, 32), dtype=np.uint8)),
        generator.integers(0, 10**12, count),
        possible_sums(generator.integers(1, 10**9, count), generator),
    )
    if recordings:
        table.image_sha256, table.image_bytes, table.seconds = table.sha256, table.bytes + 1, generator.random(count)
    return table


@pytest.mark.parametrize("recordings", [False, True])
def test_the_table_is_read_as_it_was_written(recordings, tmp_path):
    table = make_table(5000, recordings)
    table.write(tmp_path / TABLE)
    (tmp_path / MANIFEST).write_text('{"images": 5000}')
    again = read_table(tmp_path)
    for name in ("path", "source", "sha256", *(["image_sha256"] if recordings else [])):
        assert list(getattr(again, name)) == list(getattr(table, name))
    for name in ("bytes", "sums", *(["image_bytes", "seconds"] if recordings else [])):
        assert np.array_equal(getattr(again, name), getattr(table, name))
    if not recordings:
        assert again.image_sha256 is None and again.seconds is None


DAMAGE = {
    "is not there": lambda text: None,
    "is empty": lambda text: b"",
    "has no header": lambda text: text.split(b"\n", 1)[1],
    "has another header": lambda text: text.replace(b"sha256", b"md5", 1),
    "is cut off": lambda text: text[: len(text) // 2],
    "lacks a line": lambda text: text[: text.rindex(b"\n", 0, -1) + 1],
    "has a line too many": lambda text: text + text[text.rindex(b"\n", 0, -1) + 1 :],
    "has a hash that is none": lambda text: text.replace(b",data1/0/0", b"00,data1/0/0").replace(b"0", b"g", 400),
    "has a path that leads elsewhere": lambda text: text.replace(b"train/0/", b"train/../", 1),
    "has more squares than pixels can have": lambda text: text[: text.rindex(b",") + 1] + b"9" * 18 + b"\r\n",
    "has a text for a number": lambda text: text[: text.rindex(b",") + 1] + b"many\r\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_table_that_is_damaged_is_named(damage, tmp_path):
    make_table(30).write(tmp_path / TABLE)
    (tmp_path / MANIFEST).write_text('{"images": 30}')
    content = DAMAGE[damage]((tmp_path / TABLE).read_bytes())
    (tmp_path / TABLE).unlink()
    if content is not None:
        (tmp_path / TABLE).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest.csv is damaged .* run makedata.py again") as error:
        read_table(tmp_path)
    assert "\n" not in str(error.value)


# --- many images


COUNT = 20_000


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """data/train with many names of one file."""
    root = tmp_path_factory.mktemp("many")
    (root / "file").write_bytes(b"")
    for number in range(COUNT):
        folder = root / "train" / f"n{number % 20:08d}"
        if number < 20:
            folder.mkdir(parents=True)
        (folder / f"n{number % 20:08d}_{number:08d}.png").hardlink_to(root / "file")
    return root


def count_objects():
    gc.collect()
    return len(gc.get_objects()), sys.getallocatedblocks()


def test_an_image_is_a_few_bytes_and_no_object(many):
    before = count_objects()
    dataset = open_image_folder(many / "train")
    after = count_objects()
    assert len(dataset) == COUNT
    assert after[0] - before[0] < 500 and after[1] - before[1] < COUNT / 10
    # What a worker gets that is started and not forked: the name's 22 bytes, where it ends, and the class.
    assert len(pickle.dumps(dataset, pickle.HIGHEST_PROTOCOL)) < 40 * COUNT
    assert dataset.files[COUNT - 1].endswith(f"n00000019_{COUNT - 1:08d}.png") and dataset.targets[-1] == 19


def test_reading_a_table_makes_no_objects(tmp_path):
    make_table(COUNT).write(tmp_path / TABLE)
    (tmp_path / MANIFEST).write_text(f'{{"images": {COUNT}}}')
    before = count_objects()
    table = read_table(tmp_path)
    after = count_objects()
    assert len(table) == COUNT and after[0] - before[0] < 500 and after[1] - before[1] < COUNT / 10


def test_training_does_not_read_the_table(many, monkeypatch):
    """It takes seconds for a million images, and only makedata.py and mean_std.py need it."""
    (many / MANIFEST).write_text(f'{{"images": {COUNT}, "fingerprint": ""}}')
    monkeypatch.setattr(manifest, "read_table", None)
    assert manifest.read_sound(many) is None
    assert manifest.choose_mean_and_std(many, None, None, None)[2].startswith("ImageNet")


def test_digests_of_texts_are_few_bytes():
    digests = digest_texts(Texts(["a", "b", "a"]))
    assert digests.nbytes == 48 and digests[0] == digests[2] != digests[1]
