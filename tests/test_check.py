"""makedata.py --check."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import fill_classes
from hypothesis import given, settings
from hypothesis import strategies as st

import makedata
from common.options import UserError
from prepare.check import find_near

pytest.importorskip("imagehash")


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Call makedata.main() with CHECK in `tmp_path`; returns (exit status, what was printed)."""
    monkeypatch.chdir(tmp_path)

    def run():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(makedata, "CHECK", True)
            return makedata.main(), capsys.readouterr().out

    return run


@pytest.fixture
def smooth(draw_image):
    """Function of a key: an image without sharp edges, like a photograph, whose hash survives JPEG."""
    return lambda key: draw_image(key, 9).resize((300, 200))


def test_nothing_wrong(check, make_data1):
    make_data1("data1", {"Maize": 6, "玉米 苗": 5})
    before = sorted(Path().rglob("*"))
    status, out = check()
    assert status == 0 and "no duplicates, no unusable files" in out
    assert "11 usable images in 2 classes" in out and "width   48 to 48 pixels" in out
    assert set(Path().rglob("*")) - set(before) == {Path("results"), Path("results/report.txt")}


def test_everything_wrong(check, smooth):
    fill_classes("data1", {"Maize": 8, "玉米 苗": 2})
    first, second = Path("data1/Maize"), Path("data1/玉米 苗")
    smooth("a").save(first / "a.png")
    smooth("a").save(second / "a again.jpg", quality=60)  # near, of another class
    smooth("b").save(first / "b.png")
    shutil.copy(first / "b.png", first / "b copy.png")
    (first / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    (first / "notes.txt").write_text("no image")
    smooth("c").resize((400, 100)).save(first / "long.png")
    status, out = check()
    assert status == 3
    assert "玉米 苗: less than a 5th of the largest class" not in out  # 3, and 11 of Maize
    assert "1 have an aspect ratio above 2, such as" in out and "long.png" in out
    assert "2 unusable files" in out and "broken.jpg" in out and "notes.txt has no image extension" in out
    assert "1 pairs of near or exact duplicates in two classes: look at them" in out
    assert "a again.jpg" in out.split("in two classes")[1].split("\n")[1]
    assert "b copy.png = data1/Maize/b.png: identical" in out.replace("\\", "/")
    assert out.index("in two classes") < out.index("in one class, on one side")
    assert (Path("results") / "report.txt").read_text(encoding="utf-8").count("\n") > 10
    assert Path("results/pairs.png").is_file()


def test_relatives_on_both_sides_of_the_split(check, smooth, capsys):
    fill_classes("data1", {"Maize": 4, "Wheat": 4})
    for number in range(12):
        smooth("plant").save(f"data1/Maize/plant {number}.jpg", quality=40 + 4 * number)
    makedata.main()
    capsys.readouterr()
    status, out = check()
    assert status == 3
    sides = {Path(path).name: Path(path).parts[1] for path in map(str, Path("data").rglob("plant*"))}
    count = {side: list(sides.values()).count(side) for side in ("train", "val")}
    assert f"{count['train'] * count['val']} pairs of near or exact duplicates on both sides of the split" in out


def test_a_small_class_is_pointed_out(check, make_data1):
    make_data1("data1", {"Maize": 11, "Wheat": 2})
    assert "Wheat: less than a 5th of the largest class" in check()[1]


def test_an_absent_package_is_named(check, make_data1, monkeypatch):
    make_data1("data1", {"Maize": 2})
    monkeypatch.setitem(__import__("sys").modules, "imagehash", None)
    with pytest.raises(UserError, match="pip install imagehash"):
        check()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_near_pairs_are_those_of_a_plain_comparison(number, limit, seed):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (number, 64), dtype=bool)
    bits[rng.integers(number)] = bits[rng.integers(number)]
    distance = (bits[:, None] != bits).sum(2)
    expected = {(i, j, distance[i, j]) for i in range(number) for j in range(i + 1, number) if distance[i, j] <= limit}
    found = find_near(bits, limit, block=7)
    assert set(map(tuple, found.tolist())) == expected and len(found) == len(expected)
    assert (np.diff(found[:, 2]) >= 0).all()


def test_classes_that_makedata_would_refuse_are_named(check, make_data1):
    make_data1("data1", {"Maize": 4, "Wheat": 1})
    Path("data1/Oat").mkdir()
    status, out = check()
    assert status == 3 and "2 classes with fewer than two different images" in out and "  Wheat: 1\n" in out
    assert "  Oat: 0\n" in out
