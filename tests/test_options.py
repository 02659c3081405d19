"""The constants of a script: what they accept, in the file and on the command line, and how a script ends."""

import os
import runpy
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch

from common.images import load_image
from common.loading import Loader
from common.options import (
    PACKAGES,
    Ascending,
    ConstantError,
    Fraction,
    ImageSize,
    Length,
    Limits,
    Name,
    NonNegative,
    NotEmpty,
    Positive,
    PositiveInt,
    Probability,
    Rate,
    UserError,
    accepts,
    describe,
    describe_overrides,
    fill_in,
    parse,
    raise_all,
    read_constants,
    run,
    set_constants,
)
from common.renamed import RENAMED

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = '''"""Do nothing, at 100 % speed.

    python script.py photo.jpg
"""

import sys

from common.options import UserError, run

STEPS: int = 5  # how many, at most 100 %
RATE: float = 0.1  # how fast
OUT_DIR: str = "out"  # where to
USE_EMA: bool = True  # whether to average
QUIET: bool = False  # whether to say less
SCALE: list[float] = [0.5, 1.0]  # two shares
NAMES: list[str] | None = None  # a choice of names
LIMIT: int | None = 7  # at most
CUTOFF: float | None = None  # where to stop
FILES: list[str] = []  # files to read
NOT_AN_OPTION = 3  # no annotation


def main():
    if QUIET:
        raise UserError(f"\\u73c9\\u7c73 {FILES[0]} is broken; remove it")
    print(dict(STEPS=STEPS, USE_EMA=USE_EMA, FILES=FILES))
    return STEPS


if __name__ == "__main__":
    run(main, positional="FILES")
'''
DEFAULTS = dict(STEPS=5, RATE=0.1, OUT_DIR="out", USE_EMA=True, QUIET=False, SCALE=[0.5, 1.0], NAMES=None, LIMIT=7)
DEFAULTS |= dict(CUTOFF=None, FILES=[])


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script above as a file, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


@pytest.fixture
def set_words(script):
    """The constants after the words of a command line."""

    def run_parser(*words):
        namespace = runpy.run_path(str(script))
        set_constants(namespace, list(words), positional="FILES")
        return {name: namespace[name] for name in DEFAULTS}

    return run_parser


@pytest.mark.parametrize(
    "words, changed",
    [
        ("", {}),
        ("--steps 3", dict(STEPS=3)),
        ("--steps=3", dict(STEPS=3)),
        ("--steps -1", dict(STEPS=-1)),
        ("--rate 3", dict(RATE=3.0)),
        ("--rate 1e-4", dict(RATE=1e-4)),
        ("--rate=-.5", dict(RATE=-0.5)),
        ("--out-dir a", dict(OUT_DIR="a")),
        ("--out_dir a", dict(OUT_DIR="a")),
        ("--out_dir=a=b", dict(OUT_DIR="a=b")),
        ("--out-dir=", dict(OUT_DIR="")),
        ("--out-dir none", dict(OUT_DIR="none")),
        ("--no-use-ema", dict(USE_EMA=False)),
        ("--no-use_ema", dict(USE_EMA=False)),
        ("--quiet --use-ema", dict(QUIET=True)),
        ("--scale 0.2,3", dict(SCALE=[0.2, 3.0])),
        ("--scale=1", dict(SCALE=[1.0])),
        ("--names a,b", dict(NAMES=["a", "b"])),
        ("--names None", dict(NAMES=None)),
        ("--limit none", dict(LIMIT=None)),
        ("--limit 0", dict(LIMIT=0)),
        ("--cutoff .5", dict(CUTOFF=0.5)),
        ("a.jpg 玉米.jpg", dict(FILES=["a.jpg", "玉米.jpg"])),
        ("a.jpg --steps 2 --no-use-ema", dict(FILES=["a.jpg"], STEPS=2, USE_EMA=False)),
    ],
)
def test_words_become_values(words, changed, set_words):
    found, expected = set_words(*words.split()), DEFAULTS | changed
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in expected.items()
    }


@pytest.mark.parametrize(
    "words, mistake",
    [
        ("--steps three", "STEPS must be a whole number, got 'three' (set by --steps)"),
        ("--steps 1.5", "STEPS must be a whole number, got '1.5'"),
        ("--rate fast", "RATE must be a number, got 'fast'"),
        ("--rate nan", "RATE must be a number, got 'nan'"),
        ("--rate inf", "RATE must be a number, got 'inf'"),
        ("--scale 1,b", "SCALE must be a list of numbers, got '1,b'"),
        ("--scale ,", "got ','"),
        ("--limit 2.5", "LIMIT must be a whole number or None, got '2.5'"),
    ],
)
def test_a_value_that_is_not_accepted_is_named_with_what_is(words, mistake, set_words):
    with pytest.raises(ConstantError) as error:
        set_words(*words.split())
    assert mistake in str(error.value)


@pytest.mark.parametrize(
    "words, mistake",
    [
        ("--steps", "--steps"),
        ("--use-ema=3", "--use-ema"),
        ("--step 3", "did you mean --steps?"),
        ("--stpes=3", "did you mean --steps?"),
        ("--use-emma", "did you mean --use-ema?"),
        ("--od x", "did you mean --out-dir?"),
        ("--outdir x", "did you mean --out"),
        ("--no-quite", "did you mean --no-quiet?"),
        ("--nothing-like-it", "--nothing-like-it"),
        ("--not-an-option 4", "--not-an-option"),
        ("--hlep", "--hlep"),
    ],
)
def test_a_wrong_word_gets_one_sentence(words, mistake, set_words, capsys):
    with pytest.raises(SystemExit) as end:
        set_words(*words.split())
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1 and mistake in message
    assert message.endswith("(see python script.py --help)\n")


def test_help_shows_comments_and_defaults(set_words, capsys):
    with pytest.raises(SystemExit) as end:
        set_words("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "Do nothing, at 100 % speed. python script.py photo.jpg" in text
    for part in (
        "--out_dir VALUE where to (accepts text; default: 'out')",
        "how many, at most 100 % (accepts a whole number; default: 5)",
        "--no-use-ema",
        "two shares (accepts a list of numbers; default: [0.5, 1.0])",
        "a choice of names (accepts a list of texts or None; default: None)",
        "files to read",
    ):
        assert part in text, part
    assert "NOT_AN_OPTION" not in text.upper().replace("-", "_")


def test_constants_are_read_with_their_comments(script):
    assert list(read_constants(script)) == list(DEFAULTS)
    assert read_constants(script)["STEPS"] == "how many, at most 100 %"


KINDS = [
    # kind, in words, accepted, refused
    (PositiveInt, "a whole number of at least 1", [1, 7], [0, -3, 2.0, "3", True, None]),
    (Probability, "a number from 0 to 1", [0, 1, 0.25], [-0.1, 1.1, float("nan"), "0.5", False]),
    (Rate, "a number of at least 0 and below 1", [0, 0.99], [1, -1e-9]),
    (Fraction, "a number above 0 and of at most 1", [1e-9, 1], [0, 1.5]),
    (Positive, "a number above 0", [1e-30, 3], [0, -1, float("inf")]),
    (Annotated[float, Limits(0, below=5)], "a number of at least 0 and below 5", [0, 4.9], [5]),
    (Annotated[int, Limits(32, multiple=32)], "a whole number that is a multiple of 32 and at least 32", [64],
     [16, 33, 0]),
    (Name, "text that is not empty", ["a"], ["", None, 3]),
    (bool, "True or False", [True], [1, "yes", None]),
    (Literal["auto", "off"], '"auto" or "off"', ["off"], ["on", None, 0]),
    (Literal[1, 2, 4], "1, 2 or 4", [4], [3, "4"]),
    (ImageSize | None, "a whole number from 32 to 4096 or None", [None, 32, 4096], [31, 4097, "none"]),
    (list[Probability], "a list of numbers from 0 to 1", [[], [0.5, 1]], [[2], 0.5, "ab", None]),
    (Annotated[list[NonNegative], Length(2), Ascending()], "a list of 2 numbers of at least 0 in ascending order",
     [[0, 1], (1, 1)], [[1], [2, 1], [0, -1]]),
    (Annotated[list[str], NotEmpty()], "a list of texts that is not empty", [["a"]], [[], [3], "a"]),
    (list[Name], "a list of texts that are not empty", [["a"], []], [[""], "a"]),
    (Annotated[int, Limits(1000, 1_000_000)], "a whole number from 1000 to 1000000", [1000], [999]),
    (list[Literal["x", "y"]], 'a list of "x" or "y"', [["x"], []], [["z"]]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "words", "accepted", "refused"), KINDS, ids=[words for _, words, _, _ in KINDS])
def test_what_a_kind_accepts(kind, words, accepted, refused):
    assert describe(kind) == words
    assert [value for value in accepted if not accepts(kind, value)] == []
    assert [value for value in refused if accepts(kind, value)] == []


def test_words_of_the_command_line_are_parsed_by_their_kind():
    assert parse(ImageSize | None, "none") is None and parse(ImageSize | None, "64") == 64
    assert parse(Literal["auto"] | int, "auto") == "auto" and parse(Literal["auto"] | int, "3") == 3
    assert parse(Annotated[list[NonNegative], Length(2)], "0,2") == [0.0, 2.0]
    for kind, word in ((ImageSize | None, "16"), (Name | None, ""), (Literal["a"], "b"), (list[Probability], "0,2")):
        with pytest.raises(ValueError):
            parse(kind, word)


@pytest.mark.parametrize(
    "line", ["STEPS: int = 2.5", 'RATE: float = "fast"', "SCALE: list[float] = [1, None]", "USE_EMA: bool = 1"]
)
def test_a_value_in_the_file_is_checked_too(line, script, run_script):
    name = line.split(":")[0]
    text = script.read_text(encoding="utf-8")
    old = next(row for row in text.splitlines() if row.startswith(f"{name}:"))
    script.write_text(text.replace(old, f"{line}  # a mistake"), encoding="utf-8")
    with pytest.raises(ConstantError, match=rf"^{name} must be .*, got .* \(set in script.py\)$"):
        set_constants(runpy.run_path(str(script)), [])


def test_the_command_line_replaces_a_wrong_value_of_the_file(script):
    namespace = runpy.run_path(str(script)) | dict(STEPS="many")
    assert set_constants(namespace, ["--steps", "3"]) == {"STEPS": (3, "many")} and namespace["STEPS"] == 3


def test_what_the_command_line_replaces_is_printed(run_script, script):
    out = run_script(script, "--steps", "0", "--quiet", "--rate", "0.1", "--names", "a", "--no-quiet").stdout
    assert out.splitlines()[0] == "options     STEPS 0 (script.py: 5)"  # RATE is as it was, NAMES was not set
    assert describe_overrides({}, "script.py") is None


def test_defaults_are_filled_in_where_a_constant_is_none_and_printed(capsys):
    values = dict(A=None, B=2, C=None)
    assert fill_in(values, {"tests": dict(A=1, B=9), "others": dict(A=3)}, "tests") == dict(A=1, B=2, C=None)
    assert capsys.readouterr().out == "chosen      A 1 for tests\n"
    assert values["A"] is None


def test_old_names_say_what_became_of_them(script, monkeypatch, capsys):
    monkeypatch.setitem(RENAMED, "script.py", {"OLD_RATE": "it is RATE now", "GONE": "it is gone"})
    for words in (["--old-rate", "3"], ["--old_rate=3"], ["--no-old-rate"]):
        with pytest.raises(SystemExit) as end:
            set_constants(runpy.run_path(str(script)), words)
        assert end.value.code == 2 and "it is RATE now" in capsys.readouterr().err
    with pytest.raises(ConstantError, match=r"GONE: it is gone \(set in script.py\)"):
        set_constants(runpy.run_path(str(script)) | dict(GONE=3), [])


def test_annotations_may_be_evaluated_on_demand(script):
    """Python 3.14 leaves `__annotate__` in a script's globals instead of `__annotations__`."""
    namespace = runpy.run_path(str(script))
    if "__annotations__" in namespace:
        annotations = namespace.pop("__annotations__")
        namespace["__annotate__"] = lambda format: annotations
    set_constants(namespace, ["--steps", "3", "--no-use-ema", "--limit", "none"])
    assert (namespace["STEPS"], namespace["USE_EMA"], namespace["LIMIT"]) == (3, False, None)


@pytest.mark.parametrize("name", ["makedata.py", "mean_std.py", "train.py", "test.py"])
def test_every_constant_of_the_scripts_has_a_comment(name):
    constants = read_constants(ROOT / name)
    assert constants and all(constants.values())
    assert all("#" not in comment for comment in constants.values())


def test_a_script_ends_with_what_main_returns(run_script, script):
    done = run_script(script, "--steps", "3", "--no-use-ema", "玉米 苗.jpg")
    assert done.returncode == 3 and done.stderr == ""
    assert done.stdout.splitlines()[-1] == "{'STEPS': 3, 'USE_EMA': False, 'FILES': ['玉米 苗.jpg']}"
    assert run_script(script, "--steps", "0").returncode == 0
    assert run_script(script, "--stepz", "0").returncode == 2


def test_characters_that_the_console_lacks_end_no_run(script):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for words, status in ((["玉米.jpg"], 5), (["--quiet", "玉米.jpg"], 1)):
        done = subprocess.run([sys.executable, script, *words], env=environment, capture_output=True)
        assert done.returncode == status and b"Traceback" not in done.stderr
        assert b"??.jpg" in done.stdout + done.stderr


@pytest.fixture
def end_of(script, monkeypatch, capsys):
    """Run `run` on a function; returns (exit status, stderr)."""

    def call(action):
        namespace = {**runpy.run_path(str(script)), "action": action}
        main = types.FunctionType(compile("action()", "main", "eval"), namespace)
        monkeypatch.setattr(sys, "argv", ["script.py"])
        with pytest.raises(SystemExit) as end:
            run(main)
        if isinstance(end.value.code, str):  # the interpreter prints it and returns 1
            return 1, end.value.code + "\n"
        return end.value.code, capsys.readouterr().err

    return call


def throw(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    "error, status, message",
    [
        (UserError("a.jpg is broken; remove it"), 1, "error: a.jpg is broken; remove it\n"),
        (OSError(28, "No space left on device", "a.pth"), 1,
         "No space left on device: 'a.pth'; make room on the disk and give the same command again\n"),
        (ConstantError("STEPS must be 1, got 2"), 2, "error: STEPS must be 1, got 2\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (UserError("a.jpg cannot be read (OSError: cut off); remove it"), 1,
         "error: a.jpg cannot be read (OSError: cut off); remove it\n"),
    ],
    ids=["UserError", "OSError", "ConstantError", "KeyboardInterrupt", "UserError that quotes an error"],
)  # fmt: skip
def test_errors_that_the_user_can_fix_are_one_sentence(error, status, message, end_of):
    found, text = end_of(throw(error))
    assert found == status and text.endswith(message)
    assert status == 130 or text.startswith("error: ") and text.count("\n") == 1


def test_a_bug_is_not_hidden(end_of):
    with pytest.raises(ZeroDivisionError):
        end_of(lambda: 1 / 0)


class Broken:
    """A data set whose only file is broken."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return load_image("broken.jpg")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_a_worker_cannot_read_is_named(workers, end_of):
    Path("broken.jpg").write_bytes(b"no image")
    status, text = end_of(lambda: list(Loader(Broken(), num_workers=workers)))
    assert status == 1 and text.count("\n") == 1
    assert text.startswith("error: broken.jpg cannot be read as an image (not an image format")


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="processes are told apart by waitid")
def test_processes_killed_at_the_end_of_a_pass_are_no_error_of_torch(monkeypatch):
    """torch's handler of SIGCHLD raises an error in the middle of whatever runs, if the signal comes early enough."""

    def kill(process):
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and its status not yet asked for
        torch._C._error_if_any_worker_fails()

    for _ in range(3):  # those of an earlier pass are forgotten, too
        loader = Loader(range(100), num_workers=2)
        batches = iter(loader)
        next(batches)
        processes = loader.processes()
        with monkeypatch.context() as patch:
            patch.setattr(type(processes[0]), "kill", kill)
            batches.close()
        assert len(processes) == 2 and not any(process.is_alive() for process in processes)


# --- slips of people who are new to it


HEADS = ["\ufeff", "# -*- coding: utf-8 -*-\n", "\ufeff# -*- coding: utf-8 -*-\n"]


@pytest.mark.parametrize("before", HEADS, ids=ascii)
def test_a_byte_order_mark_or_a_coding_line_changes_nothing(before, script, run_script):
    script.write_text(before + SCRIPT, encoding="utf-8")
    assert read_constants(script)["OUT_DIR"] == "where to"
    assert run_script(script, "--steps", "3").returncode == 3


def test_a_script_in_another_encoding_is_read_as_python_reads_it(script):
    script.write_bytes(("# coding: gbk\n" + SCRIPT.replace("where to", "写到哪里")).encode("gbk"))
    assert read_constants(script)["OUT_DIR"] == "写到哪里"


def test_all_wrong_constants_are_named_at_once(script, run_script):
    text = SCRIPT.replace("= 0.1  #", '= "fast"  #').replace('= "out"  #', '= "data\\new"  #')
    script.write_text(text.replace("= 7  #", "= [7]  #"), encoding="utf-8")
    done = run_script(script, "--steps", "three", "--scale", "a,b")
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.split()[1] for line in lines] == ["STEPS", "SCALE", "RATE", "OUT_DIR", "LIMIT"]
    assert all(line.startswith("error: ") and " must be " in line for line in lines)


def test_many_problems_are_counted():
    raise_all([])
    with pytest.raises(UserError) as error:
        raise_all([f"problem {number}" for number in range(30)])
    lines = str(error.value).splitlines()
    assert len(lines) == 21 and lines[-1] == "error: ... and 10 more of this kind"
    assert lines[1] == "error: problem 1"


@pytest.mark.parametrize(
    "words, found",
    [
        (["--steps", "３"], dict(STEPS=3)),
        (["--steps", "－３"], dict(STEPS=-3)),
        (["--rate", "０．５"], dict(RATE=0.5)),
        (["--scale", "0.2，3"], dict(SCALE=[0.2, 3.0])),
        (["--names", "ａ"], dict(NAMES=["ａ"])),  # a text is what it is
        (["--out-dir", "~/x y"], dict(OUT_DIR=os.path.expanduser("~/x y"))),
        (["~/a.jpg", "a~b.jpg"], dict(FILES=[os.path.expanduser("~/a.jpg"), "a~b.jpg"])),
        (["--out-dir", "a\\new"], dict(OUT_DIR="a\\new")),
        (["--out-dir", "out/"], dict(OUT_DIR="out/")),
        (["--out-dir", "玉米 苗"], dict(OUT_DIR="玉米 苗")),
        (["two\nlines.png"], dict(FILES=["two\nlines.png"])),
        (["'"], dict(FILES=["'"])),
    ],
)  # fmt: skip
def test_what_is_plainly_meant_is_understood(words, found, set_words):
    assert set_words(*words) == DEFAULTS | found


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--rate", "0,001"], "RATE must be a number, got '0,001' (set by --rate); write 0.001"),
        (["--out-dir", "'data'"], "OUT_DIR must be text without quotation marks around it, got \"'data'\""),
        (["--out-dir", "“data”"], "OUT_DIR must be text without quotation marks around it"),
        (["'a.jpg'"], "FILES must be text without quotation marks around it"),
        (["--names", "a,'b'"], "NAMES must be text without quotation marks around it"),
    ],
)
def test_slips_in_values_get_a_sentence(words, sentence, set_words):
    with pytest.raises(ConstantError) as error:
        set_words(*words)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_file_whose_name_has_quotation_marks_is_taken(set_words, tmp_path):
    (tmp_path / "'a'").touch()
    assert set_words("'a'")["FILES"] == ["'a'"]


@pytest.mark.parametrize("value", ["data\new", "data\tmp", "C:\bin", "~\x07", "a\x00"])
def test_a_backslash_in_a_windows_path_is_pointed_out(value, script):
    namespace = runpy.run_path(str(script)) | dict(OUT_DIR=value)
    with pytest.raises(ConstantError, match=r'^OUT_DIR must be text without control characters, such as "data/new"'):
        set_constants(namespace, [])
    set_constants(runpy.run_path(str(script)) | dict(OUT_DIR=r"data\new"), [])


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--stpes", "3", "--use-emma"], ["did you mean --steps, --use-ema?"]),
        (["--steps", "3", "--use-ema", "--quiet=true"], ["a switch takes no value"]),
        (["--stepz=3"], ["did you mean --steps?"]),
        (["--use-ema=False"], ["a switch takes no value: --name turns it on, --no-name off"]),
    ],
)
def test_wrong_words_are_explained(words, parts, set_words, capsys):
    with pytest.raises(SystemExit):
        set_words(*words)
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(part in message for part in parts)


@pytest.mark.parametrize("dash", "–—－−")
def test_dashes_of_word_processors_are_understood_as_a_slip(dash, tmp_path, monkeypatch, capsys, script):
    namespace = runpy.run_path(str(script))
    with pytest.raises(SystemExit):
        set_constants(namespace, [f"{dash}stepz", "3"])
    assert "did you mean --steps?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, remedy",
    [
        (FileExistsError(17, "File exists", "results"), "a folder is needed there"),
        (NotADirectoryError(20, "Not a directory", "results/x"), "a folder is needed there"),
        (IsADirectoryError(21, "Is a directory", "data"), "a file is needed there"),
        (PermissionError(13, "Permission denied", "x.csv"), "close programs that have it open"),
        (OSError(30, "Read-only file system", "x.csv"), "allow writing there"),
    ],
)
def test_errors_of_the_system_name_a_remedy(error, remedy, end_of):
    status, text = end_of(throw(error))
    assert status == 1 and remedy in text and error.filename in text and text.count("\n") == 1


def test_the_current_folder_is_named_where_it_may_be_the_wrong_one(end_of, monkeypatch):
    missing = throw(UserError("there is no folder data; make it"))
    assert "current folder" not in end_of(missing)[1]
    monkeypatch.chdir(ROOT / "tools")
    assert f"(paths are relative to the current folder, {ROOT / 'tools'}; cd to {ROOT})" in end_of(missing)[1]
    assert "current folder" not in end_of(throw(UserError("a.jpg is broken")))[1]


class Stream:
    """What IDLE and Jupyter have for a standard stream: it writes, and no more."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_streams_of_notebooks_and_none_at_all(script, monkeypatch):
    main = runpy.run_path(str(script))["main"]
    monkeypatch.setattr(sys, "argv", ["script.py", "--steps", "0"])
    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as end:
        run(main)
    assert not end.value.code and "'STEPS': 0" in stream.text
    monkeypatch.setattr(sys, "stdout", None)  # pythonw.exe
    monkeypatch.setattr(sys, "stderr", None)
    with pytest.raises(SystemExit) as end:
        run(main)
    assert not end.value.code


@pytest.mark.parametrize("words", [["--steps", "0"], ["--steps", "3"], ["--steps", "x"], ["--stepz", "1"], ["--help"]])
def test_ipython_gets_its_prompt_back(words, script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", *words])
    monkeypatch.setattr("builtins.__IPYTHON__", True, raising=False)
    run(runpy.run_path(str(script))["main"])


def test_a_script_without_a_file_says_how_to_start_it(script, monkeypatch, capsys):
    namespace = {}
    exec(SCRIPT, namespace)  # as when it is pasted into a console
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    with pytest.raises(SystemExit) as end:
        run(namespace["main"])
    assert end.value.code == 1 and "start the script as a file" in capsys.readouterr().err


SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in (ROOT, ROOT / "tools", ROOT / "examples")
    for path in sorted(folder.glob("*.py"))
    if "    run(main" in path.read_text(encoding="utf-8")
]


@pytest.fixture
def start_without_packages(monkeypatch):
    """Start a script of the repository where no package can be imported."""

    def start(name, *words):
        for module in PACKAGES:
            monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setattr(sys, "argv", [name, *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        return end.value.code

    return start


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_are_answered_before_packages_are_imported(name, start_without_packages, monkeypatch, capsys):
    assert not start_without_packages(name, "--help")
    output = capsys.readouterr().out
    constants = read_constants(ROOT / name)
    assert output.startswith(f"usage: {name}") and constants
    shown = [constant.lower() for constant in constants]  # a list may be words without an option
    assert all(f"--{word.replace('_', '-')}" in output or f"\n  {word} " in output for word in shown)
    if name != "tools/cross_validate.py":  # which hands options that are not its own to train.py
        assert start_without_packages(name, "--surely-unknown=3") == 2
        assert "--surely-unknown" in capsys.readouterr().err
    if "--device" in output:
        assert start_without_packages(name, "--device", "") == 2
        assert capsys.readouterr().err.startswith("error: DEVICE must be text that is not empty, got ''")


@pytest.mark.parametrize("name", SCRIPTS)
def test_all_missing_packages_are_named_at_once(name, start_without_packages, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert start_without_packages(name) == 1
    error = capsys.readouterr().err
    needed = ["numpy", "pillow", "tqdm"] if name == "makedata.py" else ["torch", "timm", "scikit-learn", "matplotlib"]
    assert error.startswith("error: not installed in this Python") and error.count("\n") == 1
    assert all(package in error for package in needed) and "requirements.txt" in error
    assert ("torch" in error) == (name != "makedata.py")


EARLY = """\
from typing import Annotated
from common.options import Limits, PositiveInt, answer_early, run

answer_early(__name__, __file__, packages=())
print("the rest")
Size = Annotated[int, Limits(2, 8)]
NAMES = open
SIZE: Size = 4  # a size
COUNT: PositiveInt = {count}  # a number
def main():
    print(SIZE, COUNT)
if __name__ == "__main__":
    run(main)
"""


@pytest.mark.parametrize(
    "count, words, status, out, error",
    [
        ("3", [], 0, "the rest\n4 3\n", ""),
        ("3", ["--size=8"], 0, "the rest\noptions     SIZE 8 (early.py: 4)\n8 3\n", ""),
        ("3", ["--size=9"], 2, "", "error: SIZE must be a whole number from 2 to 8, got '9' (set by --size)\n"),
        ("0", [], 2, "", "error: COUNT must be a whole number of at least 1, got 0 (set in early.py)\n"),
        ("int('0')", [], 2, "", "error: COUNT must be a whole number of at least 1, got 0 (set in early.py)\n"),
        ("math.inf", [], None, "the rest\n", ""),  # nothing that can be known before the imports
    ],
)
def test_constants_are_checked_before_the_imports(count, words, status, out, error, tmp_path, monkeypatch, capsys):
    path = tmp_path / "early.py"
    path.write_text(EARLY.format(count=count), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["early.py", *words])
    with pytest.raises(NameError if status is None else SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert status is None or (end.value.code or 0) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (out, error)


def test_in_a_notebook_processes_know_the_classes_of_the_script(tmp_path, script):
    """IPython's %run, imitated: the script is the module __main__ while it runs, in a process of another main."""
    code = f"""
import multiprocessing, sys, types
multiprocessing.set_start_method("spawn")
module = sys.modules["__main__"] = types.ModuleType("__main__")
module.__file__ = sys.argv[0] = {str(tmp_path / "work.py")!r}
exec(compile(open(module.__file__).read(), module.__file__, "exec"), vars(module))
"""
    (tmp_path / "work.py").write_text(
        "from concurrent.futures import ProcessPoolExecutor\nfrom common.options import run\n\nN: int = 3  # a number\n"
        "class Item:\n    pass\n\ndef make(n):\n    return Item()\n\ndef main():\n"
        "    with ProcessPoolExecutor(1) as pool:\n        print(len(list(pool.map(make, range(N)))), 'items')\n\n"
        "if __name__ == '__main__':\n    run(main)\n"
    )
    (tmp_path / "console.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "console.py"], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=100
    )
    assert done.returncode == 0 and done.stdout == "3 items\n", done.stderr
