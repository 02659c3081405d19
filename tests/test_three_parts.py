"""Training, validation, test: the test part is chosen once, nothing is learned from it, and test.py reports it."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, fill_classes, read_manifest
from hypothesis import given
from hypothesis import strategies as st

import makedata
from common.options import ConstantError, UserError
from prepare.groups import choose_groups, is_in_every_part

CLASSES = {"Common wheat": 20, "Maize": 13, "玉米 苗": 7}

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def make(make):
    """Call makedata's main() with some constants changed; returns {SHA-256: part}."""

    def run(**constants):
        assert make(**constants) == 0
        return {file["sha256"]: file["path"].split("/")[0] for file in read_manifest()["files"]}

    return run


def test_every_class_is_split_into_three(make, capsys):
    fill_classes("data1", CLASSES)
    make(TEST_RATIO=0.2)
    for name, expected in {"Common wheat": (10, 6, 4), "Maize": (6, 4, 3), "玉米 苗": (4, 2, 1)}.items():
        assert tuple(len(list(Path("data", part, name).iterdir())) for part in ("train", "val", "test")) == expected
    assert "train    val   test" in capsys.readouterr().out
    files = [path.read_bytes() for path in Path("data").glob("*/*/*.png")]
    assert len(set(files)) == len(files) == 40


def test_neither_ratio_changes_the_part_of_the_other(make):
    fill_classes("data1", CLASSES)
    two, three = make(), make(TEST_RATIO=0.2)
    assert {key for key in two if two[key] == "val"} == {key for key in three if three[key] == "val"}
    small = make(TEST_RATIO=0.2, VAL_RATIO=0.1)
    assert {key for key in small if small[key] == "test"} == {key for key in three if three[key] == "test"}
    assert make() == two and not Path("data/test").exists()


def test_identical_files_land_in_one_part(make):
    for path in fill_classes("data1", CLASSES):
        (path.parent / f"copy of {path.name}").write_bytes(path.read_bytes())
    make(TEST_RATIO=0.3)
    found = [(hashlib.sha256(path.read_bytes()).hexdigest(), path.parts[1]) for path in Path("data").glob("*/*/*.png")]
    assert len(found) == 80 and len(set(found)) == 40 == len({content for content, _ in found})


@given(st.integers(3, 60), st.floats(0.01, 0.97), st.floats(0.01, 0.97), st.integers(0, 9))
def test_no_part_is_empty_whatever_the_ratios(number, val_ratio, test_ratio, seed):
    contents = [str(index) for index in range(number)]
    val = makedata.choose_val(contents, val_ratio, seed, others=2)
    test = makedata.choose_test(contents, test_ratio, seed, val)
    assert val and test and not val & test and len(val) + len(test) < number


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=3, max_size=20),
    st.floats(0.1, 0.5),
    st.floats(0.1, 0.4),
)
def test_groups_are_split_into_three(sizes, val_ratio, test_ratio):
    counts = {f"group {number}": np.array(row) for number, row in enumerate(sizes)}
    val, test = choose_groups(counts, (val_ratio, test_ratio), 0)
    assert not val & test
    if val or test:
        assert is_in_every_part(counts, val, test).all()
        total = sum(counts.values())
        for chosen, ratio in ((val, val_ratio), (test, test_ratio)):
            share = sum(counts[group] for group in chosen)
            assert (share - ratio * total).max() <= 2**0.5 * np.max(sizes) + 1  # at most a group too large


def test_groups_of_files_stay_in_one_part(make):
    for path in fill_classes("data1", {"a": 24, "b": 24}):
        path.rename(path.with_name(f"plant{int(path.stem) % 8}-{path.name}"))
    make(GROUP="plant[0-9]", TEST_RATIO=0.25)
    parts = {}
    for file in read_manifest()["files"]:
        parts.setdefault(Path(file["path"]).name[:6], set()).add(file["path"].split("/")[0])
    assert all(len(some) == 1 for some in parts.values())
    assert Counter(next(iter(some)) for some in parts.values()) == {"train": 4, "val": 2, "test": 2}
    make(GROUP="plant[0-9]", VAL_GROUPS=["plant1"], TEST_GROUPS=["plant2", "plant5"])
    assert {path.name[:6] for path in Path("data/test").rglob("*.png")} == {"plant2", "plant5"}
    assert json.loads(Path("data/manifest.json").read_text(encoding="utf-8"))["test_groups"] == ["plant2", "plant5"]


@pytest.mark.parametrize(
    "constants, kind, message",
    [
        (dict(VAL_RATIO=0.5, TEST_RATIO=0.5), ConstantError, "must be below 1, got 0.5 [+] 0.5"),
        (dict(TEST_RATIO=0.2), UserError, "'b' is too small to split .*put at least three into"),
        (dict(TEST_GROUPS=["x"]), ConstantError, "TEST_GROUPS must be empty where GROUP is"),
        (dict(GROUP="[0-9]", VAL_GROUPS=["1"], TEST_GROUPS=["1"]), ConstantError, "must differ, but both name 1"),
        (dict(GROUP="[0-9]$", TEST_GROUPS=["x"]), UserError, "GROUP .* finds nothing in"),
        (dict(GROUP="00.", TEST_GROUPS=["x"]), UserError, "TEST_GROUPS names x"),
        (dict(GROUP="00.", VAL_GROUPS=["001"], TEST_GROUPS=["000"]), UserError, "one side would have no file"),
    ],
)
def test_what_cannot_be_split_into_three_gets_a_sentence(constants, kind, message, make):
    fill_classes("data1", {"a": 6, "b": 2})
    with pytest.raises(kind, match=message):
        make(**constants)
    assert not Path("data").exists()


WATCH = """
import os, sys
touched = set()

def note(event, arguments):
    if event in ("open", "os.scandir", "os.listdir", "glob.glob", "os.rename", "os.remove", "os.link"):
        touched.update(os.path.abspath(os.fsdecode(path)) for path in arguments if isinstance(path, (str, bytes)))

sys.addaudithook(note)
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import tiny, train
from common.options import current_values
for name, value in dict({constants!r}).items():
    setattr(train, name, value)
status = train.main()
test = os.path.abspath("data/test")
inside = [path for path in touched if path.endswith(".png") and path.startswith(os.path.abspath("data") + os.sep)]
print("touched", len(inside), status)
print("of test", sorted(path for path in touched if path == test or path.startswith(test + os.sep)))
"""


@pytest.mark.parametrize("cache", [0.0, 8.0])
def test_training_opens_and_lists_nothing_of_the_test_part(cache, make, monkeypatch):
    """Neither directly nor by another way, such as the manifest: every file that the process opens is recorded."""
    from conftest import DEFAULTS, SMALL

    fill_classes("data1", CLASSES)
    make(TEST_RATIO=0.2)
    constants = DEFAULTS | SMALL | dict(EPOCHS=1, CACHE_GB=cache)
    code = WATCH.format(root=str(ROOT), constants=constants)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    touched, of_test = done.stdout.splitlines()[-2:]
    assert touched == "touched 32 0"  # 40 images, 8 of them for the test
    assert of_test == "of test []"
