"""What a run says of its progress: bars in a terminal, lines in a log file, the time left, and classes far apart."""

import io
import re
from types import SimpleNamespace

import pytest

from common import clock, progress
from common.clock import Clock, describe_remedy, in_words
from common.progress import Progress
from common.run_folder import print_imbalance
from common.schedule import ImageSizes

# --- bars and lines


class Stream(io.StringIO):
    terminal = False

    def isatty(self):
        return self.terminal


@pytest.fixture
def replace_stderr(monkeypatch):
    """Call it in the test itself, since pytest replaces sys.stderr, too, before each."""

    def replace(terminal=False):
        stream = Stream()
        stream.terminal = terminal
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.delenv("TQDM_DISABLE", raising=False)
        return stream

    return replace


def test_a_log_file_gets_nothing_of_short_work(replace_stderr):
    stream = replace_stderr()
    for _ in Progress(range(1000), desc="checking", unit="img", leave=False):
        pass
    with Progress(total=3, desc="caching", unit="img", leave=False) as bar:
        bar.set_postfix(loss=1.0)
        bar.update(3)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("leave", [True, False])
def test_a_log_file_gets_whole_lines_of_long_work(replace_stderr, monkeypatch, leave):
    stream = replace_stderr()
    monkeypatch.setattr(progress, "LINE_SECONDS", 1e-9)
    bar = Progress(range(3), desc="epoch 1/2", unit="step", leave=leave)
    for step in bar:
        bar.set_postfix(loss=f"{step}.5")
    text = stream.getvalue()
    assert "\r" not in text and text.endswith("\n")
    lines = text.splitlines()
    assert 2 <= len(lines) <= 4
    pattern = r"epoch 1/2: \d+ %, \d of 3 step, \d\d:\d\d so far, [\d:?]+ left(, loss=\d\.5)?"
    assert all(re.fullmatch(pattern, line) for line in lines), lines


def test_a_terminal_gets_tqdm_s_bar(replace_stderr):
    stream = replace_stderr(terminal=True)
    for _ in Progress(range(3), desc="epoch", unit="step", leave=False, mininterval=0):
        pass
    assert "\r" in stream.getvalue() and "3/3" in stream.getvalue() and "\n" not in stream.getvalue()


def test_a_notebook_gets_it_too(replace_stderr, monkeypatch):
    replace_stderr()
    monkeypatch.setattr("builtins.__IPYTHON__", True, raising=False)
    assert not Progress(total=1).in_lines


def test_lines_of_a_work_of_unknown_length(replace_stderr, monkeypatch):
    stream = replace_stderr()
    monkeypatch.setattr(progress, "LINE_SECONDS", 1e-9)
    for _ in Progress(iter("ab"), desc="reading"):
        pass
    assert "reading" in stream.getvalue() and "\r" not in stream.getvalue()


# --- time left


def run_clock(arch="unireplknet_t", epochs=10, start=None, device="cpu", images=1000):
    sizes = ImageSizes(epochs, (64, 64), start=start)
    return Clock(dict(arch=arch, pictures_train=images), sizes, device)


def after(epoch=0, images=0, seconds=0.0):
    return SimpleNamespace(epoch=epoch, images=images, seconds=seconds)


def test_the_first_estimate_follows_a_minute_and_the_second_the_first_epoch(capsys):
    timer = run_clock()
    timer.begin(after())
    for images, seconds in ((10, 1.0), (190, 59.0), (200, 60.0), (310, 91.0)):
        timer.look(after(0, images, seconds))
    # 60 s for 200 images, 300 s for 1000: 9.8 epochs are left.
    assert capsys.readouterr().out == "time left   about 49 min, by the first 200 images\n"
    timer.finish_epoch(after(1), dict(epoch=1, seconds=330.0))
    assert capsys.readouterr().out == "time left   about 50 min, by the 330 s of epoch 1\n"
    timer.look(after(1, 500, 300.0))
    timer.finish_epoch(after(2), dict(epoch=2, seconds=300.0))
    assert capsys.readouterr().out == ""


def test_larger_images_to_come_count_by_their_area(capsys):
    timer = run_clock(epochs=3, start=32)
    timer.look(after(0, 100, 1.0))
    timer.finish_epoch(after(1), dict(epoch=1, seconds=100.0))
    areas = [side * side for side in (32, 64)]
    sizes = [timer.areas[epoch] for epoch in range(3)]
    assert sizes[0] == areas[0] and sizes[2] == areas[1]
    left = 100 * (sizes[1] + sizes[2]) / sizes[0]
    assert f"about {in_words(left)}, by the 100 s of epoch 1" in capsys.readouterr().out


def test_a_rest_of_an_epoch_tells_nothing_and_the_last_epoch_neither(capsys):
    timer = run_clock()
    timer.begin(after(3, 900, 270.0))  # resumed near the end of an epoch
    timer.look(after(3, 910, 273.0))
    timer.finish_epoch(after(4), dict(epoch=4, seconds=300.0))
    assert capsys.readouterr().out == ""
    timer.finish_epoch(after(5), dict(epoch=5, seconds=300.0))
    assert "by the 300 s of epoch 5" in capsys.readouterr().out
    timer = run_clock(epochs=1)
    timer.look(after(0, 10, 1.0))
    timer.finish_epoch(after(1), dict(epoch=1, seconds=3.0))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arch, device, seconds, hint",
    [
        ("unireplknet_t", "cpu", 9000, "--model unireplknet_a takes about 6.4 h, and half of --img-size"),
        ("unireplknet_a", "cpu", 9000, "on this CPU half of --img-size takes a quarter"),
        ("resnet50", "cpu", 9000, "--model unireplknet_a may take less"),
        ("unireplknet_t", "cuda", 9000, None),
        ("unireplknet_t", "cpu", 900, None),
    ],
)
def test_a_cpu_that_needs_more_than_a_day_hears_what_takes_less(arch, device, seconds, hint, capsys):
    timer = run_clock(arch, device=device, epochs=11)
    timer.look(after(0, 10, 1.0))
    timer.finish_epoch(after(1), dict(epoch=1, seconds=seconds))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("time left   about") and len(lines) == 1 + (hint is not None)
    assert hint is None or hint in lines[1]


def test_the_costs_are_those_of_the_readme_s_table():
    from test_readme import read

    rows = re.findall(r"^\| `unireplknet_(\w+)` \|.*\| (\d+) \|$", read("README.md"), re.MULTILINE)
    assert {name: int(minutes) for name, minutes in rows} == clock.COST
    assert "1 a quarter" not in describe_remedy("unireplknet_xl", 1e6)


def test_durations_in_words():
    assert [in_words(seconds) for seconds in (5, 89, 91, 5399, 7200, 86400, 260000)] == [
        "5 s", "89 s", "2 min", "90 min", "2.0 h", "24.0 h", "3.0 days",
    ]  # fmt: skip


def test_a_run_says_where_and_how_long_it_computes(run_train, capsys):
    run_train(EPOCHS=2)
    out = capsys.readouterr().out
    assert re.search(r"^steps       5 an epoch, of 4 images; 10 in all$", out, re.MULTILINE)
    assert re.search(r"^device      cpu, \d+ threads, float32", out, re.MULTILINE)
    assert re.search(r"^time left   about \d+ s, by the \d+ s of epoch 1$", out, re.MULTILINE)
    assert out.count("time left") == 1
    run_train(EPOCHS=4, RESUME="auto")
    assert capsys.readouterr().out.count("time left") == 1


# --- class imbalance


@pytest.mark.parametrize(
    "counts, balance, line",
    [
        ([100, 10], 0.0, None),
        (
            [101, 10],
            0.0,
            "imbalance   a 101 and b 10 training images; no class weights: --balance 1 compensates (logit ",
        ),
        ([3, 50, 7], 0.5, "imbalance   b 50 and a 3 training images; BALANCE 0.5 compensates (logit adjustment)"),
    ],
)
def test_classes_that_are_far_apart_are_printed(counts, balance, line, capsys):
    print_imbalance([[count, "hash"] for count in counts], ["a", "b", "c"], balance)
    out = capsys.readouterr().out
    assert out.startswith(line) and out.count("\n") == 1 if line else out == ""
