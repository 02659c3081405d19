"""benchmarks/gpu.py without a GPU: every step in small, and what becomes of steps that fail or hang."""

import re
import sys
import time

import pytest
import torch

from benchmarks import gpu
from tests.test_readme import known_options

JOB = gpu.Job(torch.device("cpu"), "", **gpu.SMALL | dict(model="unireplknet_test"))
ROWS = re.compile(r"^\| (.*) \| (.*) \|$", re.MULTILINE)


@pytest.fixture(autouse=True)
def in_small(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("UNIREPLKNET_DEPTHWISE", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_step_of_the_first_part_gives_rows(capsys, monkeypatch):
    original = gpu.depthwise_choice.results_file
    monkeypatch.setattr(gpu.depthwise_choice, "results_file", lambda: original().with_name("no such folder") / "x")
    monkeypatch.setattr(gpu.depthwise_choice, "save_results", lambda *args: None)
    for name, (part, _, step) in gpu.STEPS.items():
        if part == 1:
            step(JOB)
            rows = ROWS.findall(capsys.readouterr().out)
            assert rows, name
            if name in ("steps", "merged"):
                assert all("images/s" in result for _, result in rows), rows
            assert not [row for row in rows if re.match(r"\w+Error: (?!No module)", row[1])], rows
    assert not gpu.depthwise.PLANS


def test_the_steps_of_train_py_use_options_that_exist(capsys, monkeypatch, tmp_path):
    calls = []

    def script(name, *options, cwd, **_):
        calls.append(name)
        given = {option.partition("=")[0] for option in map(str, options) if str(option).startswith("--")}
        assert not given - known_options(name), given
        place = cwd if isinstance(cwd, str) else str(cwd)
        if name == "train.py":
            output = next(option.partition("=")[2] for option in options if str(option).startswith("--output"))
            folder = gpu.Path(place, output, gpu.SMALL["model"])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.csv").write_text("train_loss,val_acc1,img_per_s\n1,50,9\n", encoding="utf-8")
        return "kernels     default\nmemory is full: each batch of 8 is now computed in 2 parts; ...\n"

    monkeypatch.setattr(gpu, "script", script)
    job = JOB._replace(folder=str(tmp_path))
    gpu.training(job)
    gpu.report(job)
    rows = ROWS.findall(capsys.readouterr().out)
    assert {"makedata.py", "mean_std.py", "train.py", "test.py", "tools/conv_report.py"} == set(calls)
    assert ("train.py, fp16", "loss 1.000, accuracy 50.0 %, 9 images/s; kernels default") in rows
    assert not [row for row in rows if "Error" in row[1]]


STUB = '''
import sys, time
print("| one | 1 |", flush=True)
print("not a row", flush=True)
if "fails" in sys.argv:
    sys.exit("CUDA error: an illegal memory access was encountered")
if "hangs" in sys.argv:
    time.sleep(60)
'''


@pytest.mark.parametrize(("name", "limit", "last"), [
    ("works", 60, None),
    ("fails", 60, "| fails | failed | exit status 1: CUDA error: an illegal memory access was encountered |"),
    ("hangs", 10, "| hangs | failed | took longer than 10 s |"),
    ("late", 9, "| late | left out | no time is left |"),
])  # fmt: skip
def test_a_step_that_fails_or_hangs_becomes_a_row(name, limit, last, tmp_path, monkeypatch):
    (tmp_path / "stub.py").write_text(STUB, encoding="utf-8")
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "stub.py"))
    monkeypatch.setitem(gpu.STEPS, name, (1, limit, None))
    with open(tmp_path / "gpu.md", "w", encoding="utf-8") as file:
        assert gpu.start_step(name, [], str(tmp_path), file, time.monotonic() + 600) == (last is None)
    lines = (tmp_path / "gpu.md").read_text(encoding="utf-8").splitlines()
    assert "not a row" not in str(lines)
    if name != "late":
        assert lines[0] == f"| {name} | one | 1 |"
    assert last is None or lines[-1] == last


def test_a_row_whose_measurement_fails_does_not_end_the_step(capsys):
    gpu.row("what | else", lambda: 1 / 0)
    assert capsys.readouterr().out == "| what / else | ZeroDivisionError: division by zero |\n"


def test_from_the_command_line(run_script, tmp_path):
    done = run_script("benchmarks/gpu.py", "--cpu", "--only", "versions")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| step | what | result |\n|---|---|---|\n| versions | Python | " in table and "PyTorch" in table
    assert f"| versions | Python | {sys.version.split()[0]}" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_what_to_do():
    with pytest.raises(gpu.UserError, match="this measures a GPU: .*; --cpu tries the script in small on a CPU"):
        gpu.main()
