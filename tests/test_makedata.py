"""makedata.py: which image lands where, what is skipped, what is refused, and that nothing is ever lost."""

import hashlib
import io
import json
import os
import random
import re
import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import fill_classes, read_manifest, write_former_manifest
from handmade import png
from PIL import Image

import makedata
import mean_std
from common.audio import input_kind, kind_of
from common.checkpoint import load_checkpoint
from common.columns import Files
from common.dataset import open_image_folder
from common.images import level_sums, load_image, scan_class_folders
from common.manifest import read_json, read_value_range
from common.options import ConstantError, UserError, set_constants
from common.text import width
from prepare.drawn_data import SPECIES, draw_data_set, draw_seedling

IMAGES = input_kind(None)
CLASSES = {"Common wheat": 10, "玉米 苗": 7, "Moutarde frisée": 2}

pytestmark = pytest.mark.usefixtures("here")


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def tree(folder):
    """{relative path: (SHA-256, time of change)} of all files in `folder`."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): (sha256(path), path.stat().st_mtime_ns) for path in files}


RECORDS = {"manifest.json", "manifest.csv", "cache/contents.npz"}


def contents(folder):
    """Sorted SHA-256 of all files in `folder`."""
    return sorted(content for content, _ in tree(folder).values())


def sides():
    """{(class, SHA-256): side} of all images in `data`; an image on both sides fails."""
    found = {}
    for path in Path("data").glob("*/*/*"):
        assert found.setdefault((path.parent.name, sha256(path)), path.parent.parent.name) == path.parent.parent.name
    return found


def rewrite(path, offset=-1):
    """Change one byte of a file in place, as an editor that keeps the file would; the size stays."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    with open(path, "r+b") as file:
        file.write(content)


def test_every_class_is_split_70_to_30_and_every_image_placed_once(make, make_data1):
    make_data1("data1", CLASSES)
    assert make() == 0
    for name, val in {"Common wheat": 3, "玉米 苗": 2, "Moutarde frisée": 1}.items():
        assert len(list(Path("data/val", name).iterdir())) == val
        assert len(list(Path("data/train", name).iterdir())) == CLASSES[name] - val
        placed = contents(Path("data/train", name)) + contents(Path("data/val", name))
        assert sorted(placed) == contents(Path("data1", name))
    assert len(sides()) == 19


@pytest.mark.parametrize("ratio", [0.3, 0.01, 0.5, 0.99])
def test_number_of_validation_images(ratio):
    for n in range(2, 120):
        val = makedata.choose_val([str(i) for i in range(n)], ratio, seed=1)
        assert 1 <= len(val) <= n - 1
        assert abs(len(val) - ratio * n) <= 0.5 or len(val) in (1, n - 1)


def test_choice_is_the_same_on_every_system():
    contents = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(10)]
    keys = [hashlib.sha256(f"42:{content}".encode()).hexdigest() for content in contents]
    first = {contents[keys.index(key)] for key in sorted(keys)[:3]}
    assert makedata.choose_val(contents, 0.3, 42) == makedata.choose_val(contents[::-1], 0.3, 42) == first
    assert {contents.index(content) for content in first} == {3, 4, 6}


def test_names_and_other_classes_do_not_change_the_split(make, make_data1):
    make_data1("data1", {"a": 20, "b": 20})
    make()
    before = sides()
    for number, path in enumerate(sorted(Path("data1/a").iterdir(), reverse=True)):
        path.rename(path.with_name(f"IMG {number}.png"))
    make_data1("data1", {"0": 5})
    make()
    after = sides()
    assert {key: side for key, side in after.items() if key[0] != "0"} == before


def test_another_seed_gives_another_split(make, make_data1):
    make_data1("data1", {"a": 20})
    make()
    before = sides()
    make(SEED=43)
    after = sides()
    assert after.keys() == before.keys() and after != before


def test_adding_images_moves_at_most_as_many_others():
    """The bound holds always; on average it is far fewer than the 42 of 100 that a new shuffle would move."""
    moved = []
    for seed in range(200):
        generator = random.Random(seed)
        old, new = ([generator.randbytes(32).hex() for _ in range(number)] for number in (100, 10))
        before = makedata.choose_val(old, 0.3, seed)
        after = makedata.choose_val(old + new, 0.3, seed)
        moved.append(len(before ^ (after & set(old))))
    assert max(moved) <= 10 and sum(moved) / len(moved) < 2


def test_extensions_in_any_case(make, draw_image):
    Path("data1/a").mkdir(parents=True)
    names = ["1.JPG", "2.Jpeg", "3.PNG", "4.bmp", "5.WebP", "6.TIF", "7.tiff", "8.GIF"]
    for name in names:
        draw_image(name).save(Path("data1/a", name))
    assert make() == 0
    assert sorted(path.name for path in Path("data").glob("*/a/*")) == names


def test_many_images_are_checked_in_parallel_with_the_same_result(make_data1):
    paths = make_data1("data1", {"a": 40, "b": 30}, size=8)
    paths[50].write_bytes(b"broken")
    files = scan_class_folders("data1").files
    (checked, skipped), (others, _) = (makedata.check_files(files, IMAGES, workers, io.BytesIO()) for workers in (2, 0))
    assert list(checked.files) == list(others.files) and list(checked.sha256) == list(others.sha256)
    assert np.array_equal(checked.sums, others.sums) and np.array_equal(checked.stamps, others.stamps)
    assert len(skipped) == 1 and skipped[0].startswith(str(paths[50]))
    del paths[50]
    for index, path in enumerate(paths):
        assert checked.files[index] == str(path) and checked.sha256[index] == sha256(path)
        assert checked.stamps["size"][index] == path.stat().st_size
        levels = np.asarray(Image.open(path)).reshape(-1, 3).astype(int)
        assert checked.sums[index].tolist() == [64, *levels.sum(0), *(levels**2).sum(0)]


def test_images_are_hard_links(make, make_data1):
    sources = make_data1("data1", {"a": 4})
    make()
    assert {path.stat().st_ino for path in Path("data").glob("*/a/*")} == {path.stat().st_ino for path in sources}


@pytest.mark.parametrize("why", ["not wanted", "not possible"])
def test_images_are_copied_where_links_are(why, make, make_data1, monkeypatch):
    sources = make_data1("data1", {"a": 4})

    def no_link(*args):
        raise OSError(18, "Invalid cross-device link")

    if why == "not possible":
        monkeypatch.setattr(os, "link", no_link)
    assert make(LINK=why == "not possible") == 0
    assert all(path.stat().st_nlink == 1 for path in [*sources, *Path("data").glob("*/a/*")])
    assert sorted(contents("data/train") + contents("data/val")) == contents("data1")


def test_symbolic_links_to_class_folders_and_files(make, make_data1):
    make_data1("photos", {"wheat": 6})
    other = make_data1("elsewhere", {"x": 1, "y": 4})
    make_data1("data1", {"maize": 5})
    os.symlink(Path("photos/wheat").resolve(), "data1/Winter wheat")
    os.symlink(other[0].resolve(), "data1/maize/link.png")
    assert make() == 0
    assert sorted(name for name, _ in sides()) == ["Winter wheat"] * 6 + ["maize"] * 6
    assert not any(path.is_symlink() for path in Path("data").rglob("*"))
    assert sha256(other[0]) in contents("data")


def test_data1_is_never_changed(make, make_data1):
    make_data1("data1", CLASSES)
    Path("data1/Common wheat/notes.txt").write_text("notes")
    before = tree("data1")
    for link in (True, False, True):
        make(LINK=link)
    assert tree("data1") == before


def test_manifest_lists_every_file(make, make_data1):
    make_data1("data1", CLASSES)
    make(SEED=7)
    manifest = read_manifest()
    assert (manifest["source"], manifest["seed"], manifest["val_ratio"]) == ("data1", 7, 0.3)
    files = {file["path"]: file for file in manifest["files"]}
    assert files.keys() == tree("data").keys() - RECORDS and len(files) == len(manifest["files"]) == 19
    for path, file in files.items():
        placed = Path("data", path)
        assert file.pop("sums") == level_sums(load_image(placed)).tolist()
        assert file == dict(path=path, source=file["source"], sha256=sha256(placed), bytes=placed.stat().st_size)
        assert sha256(file["source"]) == file["sha256"]
    joined = "\n".join(contents("data1"))
    assert manifest["fingerprint"] == hashlib.sha256(joined.encode()).hexdigest()


def test_hidden_files_are_ignored_silently(make, make_data1, capsys):
    make_data1("data1", {"a": 4})
    for name in (".DS_Store", "._000.png", "Thumbs.db", "desktop.ini"):
        Path("data1/a", name).write_bytes(b"system")
    Path("data1/.hidden").mkdir()
    Path("data1/.gitkeep").touch()
    assert make() == 0
    assert "skipped" not in capsys.readouterr().out
    assert len(tree("data").keys() - RECORDS) == 4


def test_what_is_no_image_is_listed_and_skipped(make, make_data1, capsys):
    make_data1("data1", {"a": 4, "b": 4})
    photo = Image.effect_noise((64, 64), 60)
    photo.save("data1/a/cut off.jpg")
    whole = Path("data1/a/cut off.jpg").read_bytes()
    Path("data1/a/cut off.jpg").write_bytes(whole[: len(whole) // 2])
    Path("data1/a/empty.png").touch()
    Path("data1/b/renamed.jpg").write_text("not an image at all")
    Path("data1/b/notes.txt").write_text("notes")
    os.symlink("nowhere.png", "data1/b/dangling.png")
    shutil.copy("data1/a/000.png", "data1/beside.png")
    assert make() == 3
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped: ")]
    names = ["a/cut off.jpg", "a/empty.png", "b/dangling.png", "b/notes.txt", "b/renamed.jpg", "beside.png"]
    assert len(listed) == len(names)
    assert all(line.startswith(f"skipped: {Path('data1', name)} ") for line, name in zip(listed, names, strict=True))
    assert len(sides()) == 8 and len(list(Path("data").glob("*/*/*"))) == 8


def test_identical_files_are_listed_and_kept_on_one_side(make, make_data1, capsys):
    paths = make_data1("data1", {"a": 10})
    for path in paths:
        shutil.copy(path, path.with_stem(f"{path.stem} copy"))
    assert make() == 0
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("identical")]
    assert len(listed) == 10
    assert all(str(path) in line and f"{path.stem} copy" in line for path, line in zip(paths, listed, strict=True))
    assert sorted(sides().values()) == ["train"] * 7 + ["val"] * 3
    assert len(list(Path("data").glob("*/a/*"))) == 20


def test_identical_files_count_once(make, make_data1):
    make_data1("data1", {"a": 10})
    make()
    before = sides()
    for path in sorted(Path("data/val/a").iterdir()):
        for number in range(5):
            shutil.copy(path, f"data1/a/{path.stem} copy {number}.png")
    make()
    assert sides() == before


def test_the_same_image_under_two_classes_is_refused(make, make_data1):
    make_data1("data1", {"a": 4, "b": 4})
    shutil.copy("data1/a/002.png", "data1/b/again.png")
    with pytest.raises(UserError, match="in two classes") as error:
        make()
    assert str(Path("data1/a/002.png")) in str(error.value) and str(Path("data1/b/again.png")) in str(error.value)
    assert sorted(os.listdir()) == ["data1"]


@pytest.mark.parametrize("usable", [0, 1])
@pytest.mark.parametrize("others", ["none", "broken", "identical"])
def test_a_class_that_is_too_small_is_named(usable, others, make, make_data1):
    make_data1("data1", {"plenty": 4, "too few": usable})
    if others == "broken":
        Path("data1/too few/broken.jpg").write_bytes(b"broken")
    if others == "identical" and usable:
        shutil.copy("data1/too few/000.png", "data1/too few/again.png")
    with pytest.raises(UserError, match=rf"'too few' is too small to split \(different usable images: {usable}\)"):
        make()
    assert sorted(os.listdir()) == ["data1"]


def test_a_folder_inside_a_class_folder_is_named(make, make_data1):
    make_data1("data1", {"a": 4})
    make_data1("data1/a", {"inner": 4})
    with pytest.raises(UserError, match=r"data1.a.inner is a folder inside a class folder"):
        make()
    assert sorted(os.listdir()) == ["data1"]


@pytest.mark.parametrize("state", ["absent", "empty", "only .gitkeep", "only files", "a file"])
def test_no_class_folder_is_one_sentence(state, make, draw_image, capsys):
    if state == "a file":
        Path("data1").touch()
    elif state != "absent":
        Path("data1").mkdir()
    if state == "only .gitkeep":
        Path("data1/.gitkeep").touch()
    if state == "only files":
        draw_image("1").save("data1/1.png")
    with pytest.raises(UserError, match="data1") as error:
        make()
    assert "\n" not in str(error.value) and capsys.readouterr().out == "" and not Path("data").exists()


REFUSED = {
    "VAL_RATIO": ("0", "1", "-0.3", "30", "nan"),
    "WORKERS": ("-1", "62"),
    "DEMO_IMAGES": ("0", "1"),
    "CHECK_NEAR": ("-1", "65"),
    "SOURCE": ("",),
    "SAMPLE_RATE": ("10", "2000000"),
    "SECONDS": ("0", "inf"),
    "PADDING": ("noise",),
    "WINDOW": ("0",),
    "HOP": ("-1",),
    "MELS": ("16",),
    "DECIBELS": ("0",),
}


@pytest.mark.parametrize("name", REFUSED)
def test_constants_that_make_no_sense_are_refused(name):
    for value in REFUSED[name]:
        with pytest.raises(ConstantError, match=f"^{name} must be .*, got '{value}'"):
            set_constants(dict(vars(makedata)), [f"--{name.lower().replace('_', '-')}={value}"])


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        (dict(TARGET="data1/split"), "TARGET must be outside SOURCE"),
        (dict(DEMO=True, CHECK=True), "DEMO must be False where CHECK"),
        (dict(VAL_GROUPS=["anna"]), "VAL_GROUPS must be empty where GROUP is, got anna"),
        (dict(GROUP="_(anna"), "GROUP must be a regular expression .*, got '_.anna'"),
        (dict(SECONDS=0.01), r"SECONDS must be at least WINDOW \(32.0 ms\), got 0.01"),
        (dict(HOP=50.0), "MELS, SECONDS and HOP must give a spectrogram of at least 32 .* got 64 x 21"),
    ],
)
def test_constants_that_contradict_each_other_are_refused_before_anything_is_read(constants, message, make):
    with pytest.raises(ConstantError, match=message):
        make(**constants)
    assert not os.listdir()


def test_names_that_are_not_utf8(make, draw_image):
    """An archive packed on a Chinese Windows leaves such names on Linux: of files they do no harm."""
    folder = os.fsencode("data1/") + "玉米".encode("gbk")
    try:
        os.makedirs(folder)
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names only")
    for number in range(4):
        name = os.fsdecode(f"图{number}.png".encode("gbk"))
        draw_image(str(number)).save(Path(os.fsdecode(folder), name))
    with pytest.raises(UserError, match="the name of the folder .* is not UTF-8; rename it") as error:
        make()
    str(error.value).encode()
    os.rename(folder, "data1/maize")
    assert make() == 0
    assert make() == 0
    assert len(sides()) == 4


def test_a_rerun_gives_exactly_the_new_state(make, make_data1):
    make_data1("data1", {"a": 10, "b": 10, "c": 4})
    make()
    Path("data/mean_std.json").write_text("{}")
    shutil.rmtree("data1/c")
    for number in range(3):
        Path(f"data1/a/00{number}.png").unlink()
    make_data1("data1", {"b": 12, "d": 3})
    make()
    Path("fresh").mkdir()
    make(TARGET="fresh/data")
    assert tree("data").keys() - {"mean_std.json"} == tree("fresh/data").keys()
    assert contents("data/train") == contents("fresh/data/train") and contents("data/val") == contents("fresh/data/val")
    assert Path("data/mean_std.json").read_text() == "{}"
    assert sorted(os.listdir()) == ["data", "data1", "fresh"]


def test_statistics_may_be_there_first(make, make_data1):
    make_data1("data1", {"a": 4})
    Path("data").mkdir()
    Path("data/mean_std.json").write_text("{}")
    assert make() == 0
    assert Path("data/mean_std.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["photo.png", "train/a/mine.png", "train/a/notes.txt", "val/new/1.png"])
def test_a_foreign_file_in_the_target_is_refused(name, make, make_data1):
    make_data1("data1", {"a": 4})
    make()
    Path("data", name).parent.mkdir(exist_ok=True)
    Path("data", name).write_bytes(b"precious")
    before = tree("data")
    with pytest.raises(UserError, match=f"^{re.escape(str(Path('data', name)))} was not put there"):
        make()
    assert tree("data") == before and sorted(os.listdir()) == ["data", "data1"]


def test_a_target_without_manifest_is_refused(make, make_data1):
    make_data1("data1", {"a": 4})
    make_data1("photos", {"mine": 3})
    before = tree(".")
    with pytest.raises(UserError, match=r"photos.mine.000.png was not put there"):
        make(TARGET="photos")
    assert tree(".") == before


@pytest.mark.parametrize("target", ["data1", "data1/split", "data1/../data1/a"])
def test_a_target_in_the_source_is_refused(target, make, make_data1):
    make_data1("data1", {"a": 4})
    before = tree(".")
    with pytest.raises(ConstantError, match="TARGET must be outside SOURCE"):
        make(TARGET=target)
    assert tree(".") == before


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"files": [{}]}'])
def test_a_damaged_manifest_is_refused_naming_it(text, make, make_data1):
    make_data1("data1", {"a": 4})
    make()
    Path("data/manifest.json").write_text(text)
    before = tree("data")
    with pytest.raises(UserError, match="manifest.json"):
        make()
    assert tree("data") == before


def test_a_folder_with_a_manifest_of_an_earlier_version_is_replaced(make, make_data1):
    make_data1("data1", {"a": 4})
    make(LINK=False)
    before = sides()
    write_former_manifest(read_manifest())
    assert make() == 0 and sides() == before and Path("data/manifest.csv").is_file()
    write_former_manifest(read_manifest())
    make_data1("data/train/a", {"mine": 1})
    with pytest.raises(UserError, match="000.png was not put there"):
        make()


@pytest.mark.parametrize("change", ["another size", "the same size"])
def test_a_placed_file_that_the_user_changed_is_refused(change, make, make_data1):
    make_data1("data1", {"a": 4})
    make(LINK=False)
    changed = sorted(Path("data/train/a").iterdir())[0]
    if change == "the same size":
        rewrite(changed)
    else:
        changed.write_bytes(b"retouched")
    before = tree("data")
    with pytest.raises(UserError, match="was changed since") as error:
        make()
    assert str(changed) in str(error.value) and tree("data") == before


def test_a_hard_linked_source_may_be_changed_in_place(make, make_data1, draw_image):
    source = make_data1("data1", {"a": 4})[1]
    make()
    with open(source, "wb") as file:
        draw_image("another", 64).save(file, "PNG")
    assert make() == 0
    assert sha256(source) in contents("data") and len(sides()) == 4


class Stop(Exception):
    pass


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("placed", [0, 3])
@pytest.mark.parametrize("reason", [Stop, KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_run_that_is_stopped_leaves_the_old_folder(again, placed, reason, make, make_data1, monkeypatch):
    make_data1("data1", {"a": 4, "b": 4})
    if again:
        make()
        Path("data/mean_std.json").write_text("{}")
        make_data1("data1", {"c": 4})
    before = tree(".")
    place, calls = makedata.place, count()

    def place_some(*args):
        if next(calls) == placed:
            raise reason
        place(*args)

    with monkeypatch.context() as patch:
        patch.setattr(makedata, "place", place_some)
        with pytest.raises(reason if isinstance(reason, type) else type(reason)):
            make()
    assert tree(".") == before and Path("data").exists() == again
    assert make() == 0
    assert len(sides()) == (12 if again else 8)


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_leaves_the_old_folder(failing, make, make_data1, monkeypatch):
    make_data1("data1", {"a": 4})
    make()
    Path("data/mean_std.json").write_text("{}")
    before = tree("data")
    make_data1("data1", {"b": 4})
    rename, calls = Path.rename, count(1)

    def rename_some(path, target):
        if next(calls) == failing:
            raise PermissionError(13, "in use")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_some)
        with pytest.raises(PermissionError):
            make()
    assert tree("data") == before and sorted(os.listdir()) == ["data", "data1"]


def test_a_second_makedata_at_the_same_time_is_refused(make, make_data1, monkeypatch):
    make_data1("data1", {"a": 4, "b": 4})
    place, refused = makedata.place, []

    def place_and_try_again(*args):
        if not refused:
            with pytest.raises(UserError, match="another makedata.py is making data; wait") as error:
                make()
            refused.append(error)
        place(*args)

    with monkeypatch.context() as patch:
        patch.setattr(makedata, "place", place_and_try_again)
        assert make() == 0
    assert refused and len(sides()) == 8 and sorted(os.listdir()) == ["data", "data1"]
    assert make() == 0


@pytest.mark.parametrize("state", ["while placing", "between the renames", "before clearing up"])
def test_the_next_run_recovers_from_one_that_was_killed(state, make, make_data1):
    make_data1("data1", {"a": 4})
    make()
    Path("data/mean_std.json").write_text("{}")
    make_data1("data1", {"b": 4})
    make(TARGET="data.makedata-new")
    if state == "while placing":
        Path("data.makedata-new/manifest.json").unlink()
        shutil.rmtree("data.makedata-new/val")
    else:
        shutil.copy("data/mean_std.json", "data.makedata-new")
        Path("data").rename("data.makedata-old")
    if state == "before clearing up":
        Path("data.makedata-new").rename("data")
    assert make() == 0
    assert len(sides()) == 8 and Path("data/mean_std.json").read_text() == "{}"
    assert sorted(os.listdir()) == ["data", "data1"]


def test_a_foreign_file_survives_a_run_that_was_killed_between_the_renames(make, make_data1):
    make_data1("data1", {"a": 4})
    make()
    Path("data/precious.txt").write_text("precious")
    before = tree("data")
    Path("data").rename("data.makedata-old")
    with pytest.raises(UserError, match="precious.txt"):
        make()
    assert tree("data") == before


def test_a_target_that_is_a_symbolic_link_stays_one(make, make_data1):
    make_data1("data1", {"a": 4})
    Path("big disk").mkdir()
    os.symlink("big disk", "data")
    for _ in range(3):
        assert make() == 0
        assert len(sides()) == 4 and Path("data").is_symlink() and len(tree("big disk").keys() - RECORDS) == 4


def test_the_command_line(run_script, make_data1):
    make_data1("data1", CLASSES)
    done = run_script("makedata.py", "--seed", "5", "--no-link")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    rows = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines()]
    expected = (("Common wheat", 7, 3), ("玉米 苗", 5, 2), ("Moutarde frisée", 1, 1), ("total", 13, 6))
    for name, train, val in expected:
        assert [name, str(train), str(val)] in rows
    assert json.loads(Path("data/manifest.json").read_text(encoding="utf-8"))["seed"] == 5
    assert {path.stat().st_nlink for path in Path("data1").rglob("*.png")} == {1}
    wrong = run_script("makedata.py", "--target", "data1/split")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("error: TARGET must be outside SOURCE (data1), got ")


def test_demo_draws_twelve_classes_into_an_empty_folder(make):
    Path("data1").mkdir()
    Path("data1/.gitkeep").touch()
    assert make(DEMO=True, DEMO_IMAGES=2) == 0
    assert sorted(os.listdir("data/train")) == sorted(os.listdir("data/val")) == sorted(SPECIES)
    assert len(SPECIES) == 12 and len(sides()) == 24
    before = tree(".")
    with pytest.raises(UserError, match="^data1 is not empty, and --demo draws into an empty folder only"):
        make(DEMO=True, DEMO_IMAGES=2)
    assert tree(".") == before


def test_drawn_images_depend_on_seed_species_and_number_only():
    drawn = {}
    for folder, (seed, images) in enumerate([(1, 2), (1, 3), (2, 2)], start=1):
        list(draw_data_set(Path(str(folder)), images, size=16, seed=seed))
        drawn[folder] = {path: content for path, (content, _) in tree(str(folder)).items()}
    assert len(drawn[2]) == 36 and len(set(drawn[2].values())) == 36
    assert drawn[1].items() < drawn[2].items()
    assert not drawn[1].items() & drawn[3].items()


def test_drawing_leaves_the_global_random_state_alone():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    first = draw_seedling("Maize", random.Random("1"), size=32)
    assert random.random() == expected
    assert first.mode == "RGB" and first.size == (32, 32)
    assert first.tobytes() == draw_seedling("Maize", random.Random("1"), size=32).tobytes()
    assert first.tobytes() != draw_seedling("Maize", random.Random("2"), size=32).tobytes()


def test_wrong_arguments_of_the_drawing():
    with pytest.raises(ValueError, match="Dandelion"):
        draw_seedling("Dandelion", random.Random(1))
    with pytest.raises(ValueError, match="at least 16"):
        draw_seedling("Maize", random.Random(1), size=15)
    with pytest.raises(ValueError, match="at least 1"):
        list(draw_data_set(Path("x"), 0))


def test_everything_that_is_wrong_with_folders_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill_classes("data1", {"a": 3, "b": 3, "c": 3})
    for nested in ("a/x", "a/y", "b/z"):
        Path("data1", nested).mkdir()
    twins = os.path.normcase("A") != "a" and not Path("data1/A").exists()
    if twins:
        fill_classes("data1", {"C": 3})
    for call in (makedata.main, mean_std.main, lambda: open_image_folder("data1")):
        with pytest.raises(UserError) as error:
            call()
        lines = str(error.value).replace("\\", "/").splitlines()
        assert len(lines) == 2 + twins
        assert sum("is a folder inside a class folder" in line for line in lines) == 2
        assert any("data1/a/x (and 1 more in data1/a) is a folder" in line for line in lines)
        assert sum("differ by case only" in line for line in lines) == twins
        assert all(line.startswith("error: ") for line in lines[1:])
    assert not Path("data").exists()


def test_duplicates_across_classes_and_small_classes_are_named_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill_classes("data1", {"a": 4, "b": 4, "one": 1})
    Path("data1/none").mkdir()
    for number in (0, 1):
        shutil.copy(f"data1/a/00{number}.png", f"data1/b/copy {number}.png")
    with pytest.raises(UserError) as error:
        makedata.main()
    text = str(error.value)
    assert text.count("are the same image in two classes") == 2 and text.count("is too small to split") == 2
    assert text.count("\n") == 3 and not Path("data").exists()


def test_classes_without_an_image_are_named_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill_classes("data1", {"a": 3})
    for name in ("b", "c"):
        Path("data1", name).mkdir()
    for call in (mean_std.main, lambda: open_image_folder("data1")):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value).count("contains no image") == 2


def test_recordings_beside_images_are_counted_and_located(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill_classes("data1", {"a": 3, "b": 3})
    for name in ("a/1.wav", "b/2.mp3", "b/3.WAV"):
        Path("data1", name).write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"is a recording and .* an image.* such as the 3 in data1.a, data1.b"):
        makedata.main()


def test_the_table_of_classes_is_aligned_and_shortens_names(capsys):
    files = Files("data1", ["玉米", "wheat", "n" * 200, "line\nbreak"], [], np.zeros(0, int))
    makedata.report(SimpleNamespace(files=files), np.zeros(0, bool), [])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and len({width(line) for line in lines}) == 1 and width(lines[0]) < 90


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_json_files_that_an_editor_saved_are_read(encoding, tmp_path):
    path = tmp_path / "mean_std.json"
    text = json.dumps({"a": "玉米"}, ensure_ascii=False)
    path.write_bytes((b"\xff\xfe" if encoding == "utf-16-le" else b"") + text.encode(encoding))
    assert read_json(path) == {"a": "玉米"}


# --- images with more than 8 bits


@pytest.fixture
def twelve_bits(make_data1, tmp_path, monkeypatch):
    """data1 with two classes of 12-bit images in 16 bits; returns {path: their 8-bit levels (16, 16)}."""
    monkeypatch.chdir(tmp_path)
    levels = {}
    for name in ("a", "b"):
        Path("data1", name).mkdir(parents=True)
        for number in range(8):
            values = np.random.default_rng([ord(name), number]).integers(0, 4096, (48, 48)).astype(np.uint16)
            values[0, 0] = 4095
            path = Path("data1", name, f"{number}.png")
            path.write_bytes(png(values))
            levels[path] = values.astype(int) * 255 // 4095
    return levels


def test_value_range_holds_for_everything_that_reads_the_data_set(twelve_bits, run_train, monkeypatch, capsys):
    monkeypatch.setattr(makedata, "VALUE_RANGE", [0, 4095])
    for folder in set(Path("data1").iterdir()) - {Path("data1/a"), Path("data1/b")}:
        shutil.rmtree(folder)
    assert makedata.main() == 0 and read_json("data/manifest.json")["value_range"] == [0, 4095]
    assert "sliver" not in capsys.readouterr().out
    mean_std.main()
    statistics = read_json("data/mean_std.json")
    assert statistics["value_range"] == [0, 4095]
    assert statistics["mean"][0] == pytest.approx(np.mean([*twelve_bits.values()]) / 255)
    for path in map(Path, Path("data").glob("*/*/*.png")):
        expected = twelve_bits[Path("data1", path.parent.name, path.name)]
        assert (np.asarray(open_image_folder(path.parent.parent).loader(path))[..., 0] == expected).all()

    folder = run_train(EPOCHS=1, CACHE_GB=1.0)
    assert "warning" not in capsys.readouterr().out
    cached = {path.name for path in Path("data/cache").glob("*.npy")}
    checkpoint = load_checkpoint(folder / "best.pth")
    assert checkpoint["value_range"] == [0, 4095]
    assert (np.asarray(kind_of(checkpoint).load(path))[..., 0] == expected).all()  # as test.py and the tools read it

    monkeypatch.setattr(makedata, "VALUE_RANGE", [0, 2000])
    makedata.main()
    assert "16 images with values outside of VALUE_RANGE, from" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"cannot resume auto: VALUE_RANGE there is \[0, 4095\], here \[0, 2000\]"):
        run_train(EPOCHS=2, CACHE_GB=1.0, RESUME="auto")
    assert "VALUE_RANGE has changed since mean_std.py was run" in capsys.readouterr().out
    assert len(cached) == 2 and len(list(Path("data/cache").glob("*.npy"))) == 4


def test_dark_and_single_coloured_images_are_listed(twelve_bits, capsys):
    Image.new("RGB", (9, 9), "black").save("data1/a/lens cap.png")
    assert makedata.main() == 0
    out = capsys.readouterr().out
    assert "1 image of a single colour: data1/a/lens cap.png" in out.replace("\\", "/")
    assert "16 images with more than 8 bits of which only a sliver is used, values up to 4095 of 65535: data1" in out
    assert "and 11 more; if 4095 is white, set VALUE_RANGE to 0,4095" in out
    assert "value_range" not in read_json("data/manifest.json")


def test_a_value_range_that_is_none_is_refused(twelve_bits, monkeypatch):
    monkeypatch.setattr(makedata, "VALUE_RANGE", [5, 5])
    with pytest.raises(ConstantError, match="VALUE_RANGE must be two different values"):
        makedata.main()
    for damaged in ([0], [5, 1], [0, "x"], "0,5", [0, float("inf")], [True, 5]):
        Path("data").mkdir(exist_ok=True)
        Path("data/manifest.json").write_text(json.dumps(dict(value_range=damaged)))
        with pytest.raises(UserError, match="manifest.json (cannot be used|is damaged)"):
            read_value_range("data")
    Path("data/manifest.json").write_text("{}")
    assert read_value_range("data") is None and read_value_range("nowhere") is None
