"""test.py as users run it, on a checkpoint that train.py saved."""

import csv
import importlib.util
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, SMALL
from PIL import Image
from torchvision import transforms

import train
from common.checkpoint import SEEDLINGS, load_checkpoint
from common.options import ConstantError, UserError, set_constants


BEST = Path("checkpoints", SMALL["MODEL"], "best.pth")


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "place", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def run_test(place, monkeypatch):
    """Call test.py's main() with some constants changed; returns (exit status, rows of predictions.csv)."""
    spec = importlib.util.spec_from_file_location("test_script", Path(train.__file__).with_name("test.py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*images, draw=False, **constants):
        if not draw:  # matplotlib takes longer than everything else
            monkeypatch.setattr(script, "plot_confusion_matrix", lambda matrix, classes, path: path.touch())
            monkeypatch.setattr(script, "plot_sheet", lambda images, captions, path: path.touch())
        settings = dict(IMAGES=[str(image) for image in images], DEVICE="cpu", WORKERS=0)
        for name, value in {**settings, **constants}.items():
            monkeypatch.setattr(script, name, value)
        status = script.main()
        with open(place / script.OUTPUT / "predictions.csv", encoding="utf-8-sig", newline="") as file:
            return status, list(csv.DictReader(file))

    run.script = script
    return run


@pytest.fixture
def reference(place):
    """Function of a file: its probabilities by a plain forward pass of the unmerged EMA weights."""
    checkpoint = load_checkpoint(place / BEST)
    model = timm.create_model(checkpoint["arch"], num_classes=3, layer_scale_init_value=1.0).eval()
    model.load_state_dict(checkpoint["state_dict_ema"])

    def predict(path):
        pixels = transforms.ToTensor()(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
        x = (pixels - torch.tensor(checkpoint["mean"]).view(3, 1, 1)) / torch.tensor(checkpoint["std"]).view(3, 1, 1)
        with torch.no_grad():
            return dict(zip(checkpoint["classes"], model(x[None]).softmax(1)[0].tolist()))

    return predict


def test_a_photograph_gets_the_prediction_of_the_ema_weights(run_test, reference, place, capsys):
    photo = sorted((place / "data" / "val" / "Maize").iterdir())[0]
    status, rows = run_test(photo, TOP_K=3)
    assert status == 0 and len(rows) == 1 and rows[0]["image"] == str(photo)
    expected = reference(photo)
    predicted = {rows[0][f"class_{k}"]: float(rows[0][f"probability_{k}"]) for k in (1, 2, 3)}
    assert predicted == pytest.approx(expected, abs=1e-4)
    assert list(predicted.values()) == sorted(predicted.values(), reverse=True)
    assert f"{photo}: {rows[0]['class_1']}" in capsys.readouterr().out


def test_merged_and_training_structure_agree(run_test):
    tables = []
    for merge in (True, False):
        _, rows = run_test("data/val", MERGE=merge, TOP_K=3)
        tables.append({(r["image"], r[f"class_{k}"]): float(r[f"probability_{k}"]) for r in rows for k in (1, 2, 3)})
    assert len(tables[0]) == 27
    assert tables[0] == pytest.approx(tables[1], abs=1e-4)


def test_eight_views_are_averaged(run_test, reference, place):
    photo = sorted((place / "data" / "val" / "Maize").iterdir())[0]
    views = []
    for mirrored in (False, True):
        for turn in (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270):
            image = Image.open(photo).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image
            image = image.transpose(turn) if turn is not None else image
            path = place / "views" / f"{mirrored}{turn}.png"
            path.parent.mkdir(exist_ok=True)
            image.save(path)
            views.append(reference(path))
    assert len({tuple(view.values()) for view in views}) == 8
    _, rows = run_test(photo, TTA=True, TOP_K=3)
    predicted = {rows[0][f"class_{k}"]: float(rows[0][f"probability_{k}"]) for k in (1, 2, 3)}
    assert predicted == pytest.approx({name: np.mean([view[name] for view in views]) for name in predicted}, abs=1e-4)


def test_named_folders_give_accuracy_report_and_confusion_matrix(run_test, place, capsys):
    _, rows = run_test(WORKERS=1, BATCH_SIZE=4, draw=True)
    assert len(rows) == 9
    hits = np.mean([Path(row["image"]).parent.name == row["class_1"] for row in rows])
    assert f"acc1 {100 * hits:.2f} %" in capsys.readouterr().out
    with open(place / "results" / "confusion_matrix.csv", encoding="utf-8-sig", newline="") as file:
        header, *table = csv.reader(file)
    assert header[1:] == list(CLASSES) == [row[0] for row in table]
    matrix = np.array([[int(cell) for cell in row[1:]] for row in table])
    assert matrix.sum(1).tolist() == [3, 3, 3] and np.trace(matrix) == round(9 * hits)
    assert "玉米 苗" in (place / "results" / "report.txt").read_text(encoding="utf-8")
    assert Image.open(place / "results" / "confusion_matrix.png").width > 300


def test_the_most_confident_mistakes_are_drawn(run_test, place):
    shutil.copytree(place / "data/val/玉米 苗", place / "shots/Common wheat", dirs_exist_ok=True)
    _, rows = run_test("shots", MISTAKES=2, draw=True)
    wrong = sum(row["class_1"] != "Common wheat" for row in rows)
    assert (place / "results" / "mistakes.png").exists() == (wrong > 0)
    run_test("shots", MISTAKES=0)
    assert not (place / "results" / "mistakes.png").exists()


def test_images_in_unknown_folders_are_predicted_without_a_report(run_test, place):
    shutil.copytree(place / "data/val/Maize", place / "test")
    run_test("data/val")
    _, rows = run_test()
    assert {Path(row["image"]).parent.name for row in rows} == {"test"}
    assert {file.name for file in (place / "results").iterdir()} == {"predictions.csv"}


def test_a_link_belongs_to_the_folder_that_contains_it(run_test, place, capsys):
    folder = place / "test" / "Maize"
    folder.mkdir(parents=True)
    wheat = sorted((place / "data/val/Common wheat").iterdir())[0]
    try:
        (folder / "link.png").symlink_to(wheat)
    except OSError:
        pytest.skip("this system makes no symbolic links")
    run_test()
    support = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert support["Maize"] == "1.0" and "acc1" in support


def test_files_folders_and_patterns(run_test, place):
    maize = sorted((place / "data/val/Maize").iterdir())
    _, rows = run_test("data/val/Maize/*", maize[0], "data/val/Common wheat")
    assert len(rows) == 6
    with pytest.raises(UserError, match="nothing_here"):
        run_test("nothing_here")
    with pytest.raises(UserError, match="no pattern"):
        run_test("*.jpg")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_any_image_mode(run_test, place, mode):
    image = Image.new("L", (40, 30), 100).convert(mode) if mode != "I;16" else Image.new("I;16", (40, 30), 25700)
    name = "odd.tif" if mode in ("CMYK", "I;16") else "odd.png"
    image.save(place / name)
    status, rows = run_test(name)
    assert status == 0 and len(rows) == 1


def test_a_broken_image_is_reported_and_skipped(run_test, place, capsys):
    (place / "shots").mkdir()
    shutil.copy(sorted((place / "data/val/Maize").iterdir())[0], place / "shots" / "good.png")
    (place / "shots" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (place / "shots" / "empty.png").touch()
    status, rows = run_test("shots")
    assert status == 3 and [Path(row["image"]).name for row in rows] == ["good.png"]
    out = capsys.readouterr().out
    assert "broken.jpg" in out and "empty.png cannot be read as an image (it is empty)" in out
    with pytest.raises(UserError, match="none of the 1 images"):
        run_test("shots/empty.png")


def test_the_weights_that_came_along_predict_where_nothing_was_trained(run_test, place, draw_image, capsys):
    shutil.rmtree(place / "checkpoints")
    draw_image("seedling", 150, (90, 140, 60)).save(place / "photo.jpg")
    _, rows = run_test("photo.jpg", TOP_K=12)
    assert "so the weights for seedlings, which came along, are used" in capsys.readouterr().out
    checkpoint = load_checkpoint(SEEDLINGS)
    assert {rows[0][f"class_{k}"] for k in range(1, 13)} == set(checkpoint["classes"]) >= {"Black-grass", "Maize"}
    assert checkpoint["arch"] == "unireplknet_a" and SEEDLINGS.stat().st_size < 10e6


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_foreign_and_dangerous_checkpoints_are_refused(run_test, place, monkeypatch):
    torch.save(torch.nn.Linear(1, 1).state_dict(), "bare.pth")
    with pytest.raises(UserError, match="bare.pth lacks arch.*PRETRAINED"):
        run_test("data/val", CHECKPOINT="bare.pth")
    torch.save(dict(arch=Bomb()), "bomb.pth")
    with pytest.raises(UserError, match="could run code"):
        run_test("data/val", CHECKPOINT="bomb.pth")
    Path("old.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="could run code"):
        run_test("data/val", CHECKPOINT="old.pth")
    assert not Path("exploded").exists()
    Path("cut.pth").write_bytes(BEST.read_bytes()[:100_000])
    with pytest.raises(UserError, match="cut.pth is damaged"):
        run_test("data/val", CHECKPOINT="cut.pth")
    shutil.rmtree("checkpoints")
    monkeypatch.setattr("common.checkpoint.SEEDLINGS", Path("nowhere.pth"))
    with pytest.raises(UserError, match="run train.py first"):
        run_test("data/val", CHECKPOINT="")


def test_from_the_command_line(run_script, draw_image, tmp_path):
    draw_image("seedling", 150, (90, 140, 60)).save(tmp_path / "玉米.png")
    done = run_script("test.py", "玉米.png", "--checkpoint", "seedlings", "--top-k", "2", "--no-merge")
    assert done.returncode == 0, done.stderr
    assert "玉米.png: " in done.stdout and "training structure" in done.stdout


@pytest.mark.parametrize(("difference", "expected"), [(0.0, "bfloat16"), (0.5, "float32")])
def test_bfloat16_is_taken_only_where_it_predicts_the_same(difference, expected, run_test, monkeypatch, capsys):
    """On a CPU that has it; noise stands for a network whose predictions differ in bfloat16."""
    script = run_test.script
    monkeypatch.setattr(script, "has_bfloat16", lambda device: True)
    exact = script.compute

    def compute(model, images, dtype):
        probabilities = exact(model, images, dtype)
        return probabilities - difference * (dtype == torch.bfloat16)

    monkeypatch.setattr(script, "compute", compute)
    _, auto = run_test("data/val", BATCH_SIZE=2)
    assert f", {expected};" in capsys.readouterr().out
    _, rows = run_test("data/val", BATCH_SIZE=2, AMP="off")
    assert ", float32;" in capsys.readouterr().out
    for row, other in zip(rows, auto, strict=True):
        assert row["class_1"] == other["class_1"]
        assert abs(float(row["probability_1"]) - float(other["probability_1"])) < 0.02
    run_test("data/val", BATCH_SIZE=9)  # for so few images it is not worth finding out
    assert ", float32;" in capsys.readouterr().out


def test_large_images_are_read_by_processes_unless_workers_says_otherwise(run_test, place, monkeypatch):
    script, used = run_test.script, []
    loader = script.DataLoader

    def count(*args, num_workers, **options):
        used.append(num_workers)
        return loader(*args, **options)

    monkeypatch.setattr(script, "DataLoader", count)
    monkeypatch.setattr(script, "SECONDS_TO_START", 1e-9)
    files = script.ImageFiles(sorted(Path("data/val").rglob("*.png")), np.asarray)
    assert script.choose_readers(files, 4, torch.device("cpu")) == min(os.cpu_count(), 8)
    run_test("data/val", WORKERS=3)
    monkeypatch.setattr(script, "SECONDS_TO_START", 100.0)
    assert script.choose_readers(files, 4, torch.device("cpu")) == 0
    run_test("data/val", WORKERS=None)
    assert used == [3, 0]


@pytest.mark.parametrize(
    "option", ["--top-k=0", "--amp=fp8", "--batch-size=0", "--workers=-1", "--device=", "--mistakes=-1", "--output="]
)
def test_constants_that_make_no_sense_are_refused(option, run_test):
    name = option[2:].split("=")[0].replace("-", "_").upper()
    with pytest.raises(ConstantError, match=f"^{name} must be "):
        set_constants(dict(vars(run_test.script)), [option], positional="IMAGES")
