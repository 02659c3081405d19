"""tools/compare.py: what differs between runs, which was better, and folders that hold none."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from common.options import UserError
from tools import compare


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_compare(monkeypatch):
    def run(*folders, draw=False):
        if not draw:
            monkeypatch.setattr(compare, "plot_runs", lambda runs, path: path.touch())
        monkeypatch.setattr(compare, "FOLDERS", list(folders))
        status = compare.main()
        with open("results/compare.csv", encoding="utf-8-sig", newline="") as file:
            return status, list(csv.DictReader(file))

    return run


def write_run(name, accuracies, seconds=60.0, images=9, ema=True, **config):
    folder = Path(name)
    folder.mkdir(parents=True)
    with open(folder / "log.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "lr", "train_loss", "val_acc1", *(["ema_acc1"] if ema else []), "seconds"])
        for epoch, value in enumerate(accuracies, start=1):
            writer.writerow([epoch, 1e-3, 2.0 / epoch, value - 1, *([value] if ema else []), seconds])
    config = dict(MODEL="unireplknet_a", EPOCHS=3, DATA=name) | config
    (folder / "result.json").write_text(json.dumps(dict(config=config, val_pictures=images)), encoding="utf-8")


def test_the_table_says_what_differs_and_which_is_better(run_compare, capsys):
    write_run("checkpoints/one", [50.0, 71.5, 70.25], OPTIMIZER="muon", MEAN=None)
    write_run("checkpoints/two", [60.0, 80.0], 90.0, OPTIMIZER="adamw", MEAN=[0.5, 0.5, 0.5])
    write_run("checkpoints/without ema", [70.0], ema=False, OPTIMIZER="muon", MEAN=None)
    Path("checkpoints/one.lock").touch()
    status, rows = run_compare(draw=True)
    assert status == 0 and [row["run"] for row in rows] == [f"checkpoints/{n}" for n in ("two", "one", "without ema")]
    assert list(rows[0])[1:3] == ["OPTIMIZER", "MEAN"] and "DATA" not in rows[0] and "EPOCHS" not in rows[0]
    assert [rows[1][name] for name in list(rows[1])[3:]] == ["71.50", "2", "70.25", "3", "3.0"]
    assert rows[0]["minutes"] == "3.0" and rows[2]["best acc1 / %"] == "69.00"
    assert "checkpoints/two" in capsys.readouterr().out and Image.open("results/compare.png").width > 1000


def test_files_beside_the_folders_that_a_shell_names_are_left_out(run_compare, capsys):
    write_run("checkpoints/one", [50.0])
    for name in ("one.lock", "README.md", "seedlings.pth"):
        Path("checkpoints", name).touch()
    Path("elsewhere.pth").touch()
    status, rows = run_compare(*map(str, sorted(Path("checkpoints").iterdir())))
    assert status == 0 and len(rows) == 1 and "skipped" not in capsys.readouterr().out
    status, rows = run_compare("checkpoints/one", "elsewhere.pth")
    assert status == 3 and len(rows) == 1 and "skipped: elsewhere.pth is a file" in capsys.readouterr().out


def test_broken_and_foreign_folders_get_a_sentence_each(run_compare, capsys):
    write_run("checkpoints/good", [50.0])
    Path("checkpoints/empty").mkdir()
    logs = {"text": "hello\nworld\n", "foreign": "date,value\n3,4\n", "cut": "epoch,val_acc1,seconds\n1,x,3\n"}
    logs |= {"short": "epoch,val_acc1,seconds\n", "long": "epoch,val_acc1,seconds\n1,2,3,4\n", "bytes": "\0\0\0"}
    for name, text in logs.items():
        Path("checkpoints", name).mkdir()
        Path("checkpoints", name, "log.csv").write_text(text, encoding="utf-8")
    write_run("checkpoints/json", [50.0])
    Path("checkpoints/json/result.json").write_text("{", encoding="utf-8")
    write_run("checkpoints/list", [50.0])
    Path("checkpoints/list/result.json").write_text('{"config": [1]}', encoding="utf-8")
    status, rows = run_compare()
    out = capsys.readouterr().out
    assert status == 3 and [row["run"] for row in rows] == ["checkpoints/good"]
    skipped = [line for line in out.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 9 and "checkpoints/empty holds no log.csv" in out
    assert all(any(f"/{name}" in line for line in skipped) for name in (*logs, "json", "list"))


def test_a_run_without_a_result_and_other_validation_images(run_compare, capsys):
    write_run("a", [50.0], images=9)
    write_run("b", [40.0], images=12)
    write_run("c", [30.0])
    Path("c/result.json").unlink()
    status, rows = run_compare("a", "b", "c")
    assert status == 0 and [row["MODEL"] for row in rows] == ["unireplknet_a", "unireplknet_a", "?"]
    assert "different numbers of validation images (9, 12)" in capsys.readouterr().out


@pytest.mark.parametrize("folders, message", [(["nowhere"], "nowhere"), (["x*"], "x[*]"), ([], "checkpoints/")])
def test_nothing_to_compare(folders, message, run_compare):
    with pytest.raises(UserError, match=f"there is no folder .*{message}|{message}"):
        run_compare(*folders)
    write_run("run", [50.0])
    with pytest.raises(UserError, match="no run to compare"):
        run_compare("run/log.csv")


def test_runs_of_train_py_can_be_compared(run_train, run_compare, place):
    run_train(EPOCHS=1)
    run_train(EPOCHS=1, MIXUP=0.0)
    status, rows = run_compare()
    assert status == 0 and len(rows) == 2 and {row["MIXUP"] for row in rows} == {"0.0", "0.8"}
