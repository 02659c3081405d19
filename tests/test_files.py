"""Files that are written whole, and output that nobody reads."""

import csv
import errno
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from common import files
from common.files import SideFiles, identity, list_files, write_csv, write_json, write_text, written_whole
from common.manifest import read_json
from common.options import UserError
from common.plots import plot_confusion_matrix, plot_curves, plot_sheet
from prepare.drawn_data import draw_data_set

HISTORY = [dict(epoch=1, train_loss=1.0, val_acc1=50.0)]
# Everything that writes a file for people, as a function of its path.
WRITERS = {
    "a.txt": lambda path: write_text(path, "new"),
    "a.json": lambda path: write_json(path, {"new": [1, 2]}),
    "rows.csv": lambda path: write_csv(path, [["a", "b"], [1, 2]]),
    "dicts.csv": lambda path: write_csv(path, [dict(a=1), dict(a=2, b=3)]),
    "matrix.png": lambda path: plot_confusion_matrix([0, 1, 1], [0, 1, 0], ["a", "b"], path),
    "sheet.png": lambda path: plot_sheet([np.zeros((4, 4, 3))], ["a"], path),
    "loss.png": lambda path: plot_curves(HISTORY, path.parent),
}


@pytest.fixture(params=WRITERS)
def writer(request, tmp_path):
    """(function that writes, its path) with an older file in place."""
    path = tmp_path / request.param
    write = partial(WRITERS[request.param], path)
    write()  # so that all packages are imported
    path.write_text("old")
    return write, path


def everything(folder):
    return {file.name for file in folder.iterdir()} - {"acc.png"}  # which plot_curves draws beside loss.png


def test_a_file_is_replaced_in_one_step(writer, monkeypatch):
    write, path = writer
    seen, replace = [], os.replace

    def look(source, target):
        seen.append(path.read_text() if Path(target) == path else "old")
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    write()
    assert set(seen) == {"old"} and path.read_bytes() != b"old"
    assert everything(path.parent) == {path.name}


@pytest.mark.parametrize("place", ["while writing", "while replacing"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(place, code, writer, monkeypatch):
    write, path = writer
    monkeypatch.setattr(files, "PAUSES", ())

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    if place == "while writing":
        monkeypatch.setattr("builtins.open", fail)
        monkeypatch.setattr("io.open", fail)  # what pathlib calls, except for Python 3.10's
        monkeypatch.setattr(Path, "open", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError) as error:
        write()
    monkeypatch.undo()
    assert str(path) in str(error.value) or "acc.png" in str(error.value)
    assert os.strerror(code) in str(error.value) and "\n" not in str(error.value)
    assert path.read_text() == "old" and everything(path.parent) == {path.name}


def test_a_folder_in_the_way_a_missing_folder_and_a_protected_file_are_named(writer, monkeypatch):
    write, path = writer
    path.unlink()
    path.mkdir()
    (path / "inside").touch()
    with pytest.raises(UserError, match=path.name):
        write()
    assert (path / "inside").exists() and everything(path.parent) == {path.name}
    (path / "inside").unlink()
    path.rmdir()
    path.write_text("protected")
    path.with_name("acc.png").unlink(missing_ok=True)
    with monkeypatch.context() as patch:  # root may write to everything
        patch.setattr(os, "access", lambda file, mode: Path(file) != path)
        with pytest.raises(UserError, match=f"{path.name} .it is read-only.; "):
            write()
    assert path.read_text() == "protected"
    with pytest.raises(UserError, match="No such file"):
        write_text(path.parent / "nowhere" / "a.txt", "a")


def test_what_holds_a_file_for_a_moment_is_waited_for(writer, monkeypatch):
    write, path = writer
    replace, attempts = os.replace, []

    def held(source, target):
        attempts.append(target)
        if len(attempts) < 3:
            raise PermissionError(errno.EACCES, "used by another process")
        replace(source, target)

    monkeypatch.setattr(files, "PAUSES", (0, 0))
    monkeypatch.setattr(os, "replace", held)
    write()
    assert path.read_bytes() != b"old" and everything(path.parent) == {path.name}


def test_links_devices_and_long_names(tmp_path):
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("old")
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("this system makes no symbolic links")
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    long = tmp_path / f"{'玉' * 83}.txt"  # 253 bytes of at most 255
    write_text(long, "new")
    assert long.read_text() == "new" and len(list(tmp_path.iterdir())) == 3
    if Path("/dev/null").is_char_device():
        write_text("/dev/null", "new")
        assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, KeyError("a"), SystemExit(1)], ids=repr)
def test_an_error_in_the_middle_leaves_the_old_file_only(error, tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(BaseException) as raised, written_whole(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise error
    assert raised.type is (error if isinstance(error, type) else type(error))
    assert (tmp_path / "a.txt").read_text() == "old" and everything(tmp_path) == {"a.txt"}


def test_what_is_written_can_be_read(tmp_path):
    write_json(tmp_path / "a.json", {"玉米": [1.5, None], "bytes\udcff": True})
    assert read_json(tmp_path / "a.json") == {"玉米": [1.5, None], "bytes\udcff": True}
    write_csv(tmp_path / "a.csv", [dict(a=1), dict(a=2, b="玉米")])
    with open(tmp_path / "a.csv", encoding="utf-8-sig", newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["1", ""], ["2", "玉米"]]
    paths = list(draw_data_set(tmp_path / "drawn", 1))
    assert len(paths) == 12 and all(Image.open(path).format == "JPEG" for path in paths)


@pytest.mark.parametrize(
    "error",
    [PermissionError(13, "Permission denied"), OSError(28, "No space left on device"), RuntimeError("latex\nfailed"),
     MemoryError(), KeyError("DejaVu"), UserError("a.png cannot be drawn"), RecursionError("too deep")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_side_file_that_fails_is_named_once_and_written_later(error, tmp_path, capsys):
    side_files, path = SideFiles("it is written later"), tmp_path / "a.png"

    def fail():
        raise error

    for _ in range(3):
        assert not side_files.write(path, fail) and path in side_files.failed
    assert side_files.write(path, path.touch) and not side_files.failed
    out = capsys.readouterr().out
    assert out.startswith("warning: ") and out.count("\n") == 1 and "a.png" in out and "it is written later" in out
    with pytest.raises(KeyboardInterrupt):  # which a person wants

        def interrupt():
            raise KeyboardInterrupt

        side_files.write(path, interrupt)


# --- paths


def test_linked_folders_are_followed_but_not_in_circles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("real/a/1.png", "real/a/deep/2.png", "other/3.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    try:
        (tmp_path / "real" / "twin").symlink_to("a")
        (tmp_path / "real" / "away").symlink_to(tmp_path / "other")
        (tmp_path / "real" / "circle").symlink_to(".")
        (tmp_path / "real" / "a" / "up").symlink_to("../..")
        (tmp_path / "other" / "back").symlink_to("../real")
        (tmp_path / "real" / "broken").symlink_to("nowhere")
    except OSError:
        pytest.skip("this system makes no symbolic links")
    found = [path.as_posix() for path in list_files("real")]
    assert found == sorted(found, key=lambda path: path.split("/"))
    expected = {"real/a/1.png", "real/a/deep/2.png", "real/away/3.png", "real/twin/1.png", "real/twin/deep/2.png"}
    assert expected <= set(found) and "real/broken" in found
    assert not [path for path in found if "circle" in path or path.count("real/") > 1]
    assert len({identity(path) for path in found}) == len(found)
    assert identity("real/a/1.png") == identity("./real//a/1.png") == identity(tmp_path / "real/a/1.png")
    assert identity("real/a/../a/1.png") == identity("real/a/1.png") != identity("real/twin/1.png")
    assert identity("real/away/../1.png") == identity("1.png")  # as the system reads it


# --- output

SCRIPT = '''"""Print."""
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from common.options import Name, UserError, run
WHAT: Name = "text"  # what happens at the end
def main():
    print("first")
    print("second", file=sys.stderr)
    for number in range(3000):
        print("line", number)
    Path("written").touch()
    print("without an end", end="")
    if WHAT == "error":
        raise UserError("an error")
    if WHAT == "broken pipe":
        raise BrokenPipeError(32, "of a worker")
    return dict(three=3, seven=7).get(WHAT, 0)
if __name__ == "__main__":
    run(main, closed_output={policy!r})
'''


def run_without_reader(command, cwd, streams=("stdout",), **options):
    """Run a command whose stdout or stderr is a pipe that nobody reads; returns (exit status, the other stream)."""
    reader, pipe = os.pipe()
    os.close(reader)
    others = {name: pipe if name in streams else subprocess.PIPE for name in ("stdout", "stderr")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    try:
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=cwd, env=environment, encoding="utf-8", **others, **options
        )
    finally:
        os.close(pipe)
    return done.returncode, (done.stdout or "") + (done.stderr or "")


@pytest.mark.parametrize(
    ("policy", "words", "status", "written"),
    [
        ("finish", [], 141, True),
        ("finish", ["--what", "three"], 141, True),
        ("finish", ["--what", "seven"], 7, True),
        ("finish", ["--what", "error"], 1, True),
        ("finish", ["--what", "broken pipe"], 1, True),
        ("finish", ["--help"], 141, False),
        ("finish", ["--watt"], 2, False),
        ("end", [], 141, False),
        ("ignore", [], 0, True),
        ("ignore", ["--what", "three"], 3, True),
    ],
)
def test_a_closed_pipe_is_a_quiet_end(policy, words, status, written, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), policy=policy))
    for streams in (("stdout",), ("stdout", "stderr")):
        found, text = run_without_reader(["script.py", *words], tmp_path, streams)
        assert found == status and (tmp_path / "written").exists() == written
        assert "Traceback" not in text and "Exception ignored" not in text
        lines = [line for line in text.splitlines() if line != "second"]
        assert len(lines) == (status in (1, 2) and "stderr" not in streams), text
        (tmp_path / "written").unlink(missing_ok=True)
    found, text = run_without_reader(["script.py", *words], tmp_path, ["stderr"])  # what matters is read
    assert found == {141: 3 if "three" in words else 0}.get(status, status) and "Traceback" not in text
    assert text.endswith("without an end") == (words not in (["--help"], ["--watt"]))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
@pytest.mark.parametrize(("policy", "status"), [("finish", 1), ("end", 1), ("ignore", 0)])
def test_output_to_a_full_disk_is_an_error_except_for_training(policy, status, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), policy=policy))
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "script.py"], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, encoding="utf-8"
        )
    assert done.returncode == status and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert ("No space left on device" in done.stderr) == (status == 1)


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the streams")
def test_streams_that_are_closed_from_the_start(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), policy="finish"))
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(f"{sys.executable} script.py {closed}", shell=True, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr


def test_scripts_without_a_reader_write_their_files_and_training_goes_on(place, tmp_path):
    run = partial(run_without_reader, cwd=place, streams=("stdout", "stderr"))
    (place / "data" / "manifest.json").unlink()
    (place / "data").rename(place / "before")
    (place / "data1" / "Maize" / "broken.png").write_text("no image")
    assert run([ROOT / "makedata.py"]) == (141, "")
    assert read_json(place / "data" / "manifest.json")["images"] == 30
    assert run([ROOT / "mean_std.py"]) == (141, "")
    assert len(read_json(place / "data" / "mean_std.json")["mean"]) == 3
    options = "--model unireplknet_test --img-size 32 --batch-size 4 --epochs 2 --workers 0 --device cpu".split()
    assert run([ROOT / "tests" / "tiny.py", *options, "--optimizer", "adamw"]) == (0, "")
    folder = place / "checkpoints" / "unireplknet_test"
    assert (folder / "last.pth").exists() and len((folder / "log.csv").read_text().splitlines()) == 3
    assert run([ROOT / "test.py", "data/val", "--device", "cpu", "--checkpoint", "seedlings"]) == (141, "")
    with open(place / "results" / "predictions.csv", encoding="utf-8-sig", newline="") as file:
        assert len(list(csv.DictReader(file))) == 9
