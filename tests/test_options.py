"""The constants of a script on its command line, and how a script ends."""

import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from common.images import load_image
from common.options import UserError, override_constants, read_constants, run

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
def parse(script):
    """The constants after the words of a command line."""

    def run_parser(*words):
        namespace = runpy.run_path(str(script))
        override_constants(namespace, list(words), positional="FILES")
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
def test_words_become_values(words, changed, parse):
    found, expected = parse(*words.split()), DEFAULTS | changed
    assert found == expected
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in expected.items()
    }


@pytest.mark.parametrize(
    "words, mistake",
    [
        ("--steps three", "'three'"),
        ("--steps 1.5", "'1.5'"),
        ("--steps", "--steps"),
        ("--rate fast", "'fast'"),
        ("--scale 1,b", "'1,b'"),
        ("--scale ,", "','"),
        ("--limit 2.5", "'2.5'"),
        ("--use-ema=3", "--use-ema"),
        ("--step 3", "did you mean --steps?"),
        ("--stpes=3", "did you mean --steps?"),
        ("--use-emma", "did you mean --use-ema?"),
        ("--outdir x", "did you mean --out"),
        ("--no-quite", "did you mean --no-quiet?"),
        ("--nothing-like-it", "--nothing-like-it"),
        ("--not-an-option 4", "--not-an-option"),
    ],
)
def test_a_wrong_word_gets_one_sentence(words, mistake, parse, capsys):
    with pytest.raises(SystemExit) as end:
        parse(*words.split())
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1 and mistake in message
    assert message.endswith("(see python script.py --help)\n")


def test_help_shows_comments_and_defaults(parse, capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert "Do nothing, at 100 % speed. python script.py photo.jpg" in text
    for part in (
        "--out_dir STR where to (default: out)",
        "how many, at most 100 % (default: 5)",
        "--no-use-ema",
        "two shares (default: [0.5, 1.0])",
        "a choice of names (default: None)",
        "files to read",
    ):
        assert part in text, part
    assert "NOT_AN_OPTION" not in text.upper().replace("-", "_")


def test_constants_are_read_with_their_comments(script):
    assert list(read_constants(script)) == list(DEFAULTS)
    assert read_constants(script)["STEPS"] == "how many, at most 100 %"


def test_a_preset_comes_before_the_script_and_after_the_command_line(script):
    namespace = runpy.run_path(str(script))
    override_constants(
        namespace, ["--rate", "2"], preset=lambda: dict(STEPS=7, RATE=9.0, OUT_DIR=str(namespace["RATE"]))
    )
    assert (namespace["STEPS"], namespace["RATE"], namespace["OUT_DIR"]) == (7, 2.0, "2.0")


def test_annotations_may_be_made_when_asked_for(script):
    """Python 3.14 leaves `__annotate__` in a script's globals instead of `__annotations__`."""
    namespace = runpy.run_path(str(script))
    if "__annotations__" in namespace:
        annotations = namespace.pop("__annotations__")
        namespace["__annotate__"] = lambda format: annotations
    override_constants(namespace, ["--steps", "3", "--no-use-ema", "--limit", "none"])
    assert (namespace["STEPS"], namespace["USE_EMA"], namespace["LIMIT"]) == (3, False, None)


@pytest.mark.parametrize("name", ["makedata.py", "mean_std.py", "train.py", "test.py"])
def test_every_constant_of_the_scripts_has_a_comment(name):
    constants = read_constants(ROOT / name)
    assert constants and all(constants.values())
    assert all("#" not in comment for comment in constants.values())


def test_a_script_ends_with_what_main_returns(run_script, script):
    done = run_script(script, "--steps", "3", "--no-use-ema", "玉米 苗.jpg")
    assert done.returncode == 3 and done.stderr == ""
    assert done.stdout == "{'STEPS': 3, 'USE_EMA': False, 'FILES': ['玉米 苗.jpg']}\n"
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
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
        (UserError("a.jpg cannot be read (OSError: cut off); remove it"), 1,
         "error: a.jpg cannot be read (OSError: cut off); remove it\n"),
    ],
    ids=["UserError", "OSError", "KeyboardInterrupt", "UserError that quotes an error"],
)  # fmt: skip
def test_errors_that_the_user_can_mend_are_one_sentence(error, status, message, end_of):
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
def test_a_picture_that_a_worker_cannot_read_is_named(workers, end_of):
    Path("broken.jpg").write_bytes(b"no picture")
    status, text = end_of(lambda: list(DataLoader(Broken(), num_workers=workers)))
    assert status == 1 and text.count("\n") == 1
    assert text.startswith("error: broken.jpg cannot be read as a picture (no format")
