"""test.py as users run it, on a checkpoint that train.py saved."""

import csv
import importlib.util
import os
import pickle
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, SMALL
from PIL import Image
from sklearn.metrics import classification_report
from torchvision import transforms

import train
from common.checkpoint import SEEDLINGS, load_checkpoint
from common.evaluation import match_classes, report_classes, tabulate_confusions
from common.options import ConstantError, UserError, set_constants

BEST = Path("checkpoints", SMALL["MODEL"], "best.pth")


@pytest.fixture
def place(trained_copy):
    return trained_copy


@pytest.fixture
def run_test(place, monkeypatch):
    """Call test.py's main() with some constants changed; returns (exit status, rows of predictions.csv)."""
    spec = importlib.util.spec_from_file_location("test_script", Path(train.__file__).with_name("test.py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*images, draw=False, **constants):
        if not draw:  # matplotlib takes longer than everything else
            monkeypatch.setattr(script, "plot_confusion_matrix", lambda *args: args[-1].touch())
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
    """Function of a file: its calibrated probabilities by a plain forward pass of the unmerged EMA weights."""
    checkpoint = load_checkpoint(place / BEST)
    model = timm.create_model(checkpoint["arch"], num_classes=3, layer_scale_init_value=1.0).eval()
    model.load_state_dict(checkpoint["state_dict_ema"])
    temperature = checkpoint["calibration"]["temperature"]

    def predict(path):
        pixels = transforms.ToTensor()(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
        x = (pixels - torch.tensor(checkpoint["mean"]).view(3, 1, 1)) / torch.tensor(checkpoint["std"]).view(3, 1, 1)
        with torch.no_grad():
            return dict(zip(checkpoint["classes"], (model(x[None]) / temperature).softmax(1)[0].tolist()))

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
    with pytest.raises(UserError, match="no file matches it as a pattern"):
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
        probabilities, _ = exact(model, images, dtype)
        return probabilities - difference * (dtype == torch.bfloat16), exact(model, images, torch.float32)[1]

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
    loader = script.Loader

    def count(*args, num_workers, **options):
        used.append(num_workers)
        return loader(*args, **options)

    monkeypatch.setattr(script, "Loader", count)
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


# --- files written whole, links, and classes that do not occur


def test_every_file_is_complete_before_anything_is_printed(run_test, place, monkeypatch):
    seen = []

    def look(*words, **_):
        folder = place / "results"
        if any("acc1" in str(word) or "data/val" in str(word) and " 0." in str(word) for word in words):
            seen.append({file.name for file in folder.iterdir()})

    monkeypatch.setattr("builtins.print", look)
    run_test("data/val")
    assert seen and all({"predictions.csv", "report.txt", "confusion_matrix.csv"} <= names for names in seen)


@pytest.mark.parametrize("name", ["predictions.csv", "report.txt", "confusion_matrix.csv", "confusion_matrix.png"])
def test_a_result_that_cannot_be_written_is_an_error_after_all_others_are_written(name, run_test, place, capsys):
    path = place / "results" / name
    path.mkdir(parents=True)
    (path / "inside").touch()
    with pytest.raises(UserError, match=name) as error:
        run_test("data/val", draw=name.endswith(".png"))
    assert "\n" not in str(error.value) and str(error.value).count(name) >= 1
    others = {"predictions.csv", "report.txt", "confusion_matrix.csv", "confusion_matrix.png"}
    assert all((place / "results" / other).is_file() for other in others - {name})
    assert "acc1" in capsys.readouterr().out


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("this system makes no symbolic links")


def test_linked_class_folders_and_linked_twins_get_a_line_each(run_test, place, capsys):
    val = (place / "data" / "val").resolve()
    link(place / "test" / "Maize", val / "Maize")  # a class folder
    link(place / "test" / "wheat", val / "Common wheat")  # a folder that is no class
    link(place / "test" / "Common wheat" / "one.png", sorted((val / "Maize").iterdir())[0])  # a twin in another class
    link(place / "test" / "Common wheat" / "two.png", sorted((val / "Maize").iterdir())[0])
    link(place / "test" / "circle", place / "test")
    _, rows = run_test()
    names = [Path(row["image"]).relative_to("test").as_posix() for row in rows]
    assert len(names) == len(set(names)) == 8
    assert {name.split("/")[0] for name in names} == {"Maize", "wheat", "Common wheat"}
    assert len({row["probability_1"] for row in rows if "Maize" in row["image"] or "Common" in row["image"]}) == 3
    out = capsys.readouterr().out
    assert "not evaluated: 3 images in folders that no class is called: wheat (3)" in out and "on 5 images" in out
    # Named twice, a path counts once, however it is written; a link to it is another path.
    one = "test/Common wheat/one.png"
    _, rows = run_test(one, f"./{one}", place / one, "test/../test/Common wheat/one.png", "test/Common wheat/*", "test")
    assert len(rows) == 8 and rows[0]["image"] == one
    _, rows = run_test("test/**/*.png", "test/*")
    assert len(rows) == 8


def averages(out):
    """{name of the average: its values} of a printed report."""
    lines = [line.split() for line in out.splitlines() if "avg" in line or line.strip().startswith("accuracy")]
    return {line[0]: [float(cell) for cell in line if cell[0].isdigit()] for line in lines}


def test_averages_are_over_the_classes_that_occur(run_test, place, capsys, monkeypatch):
    script = run_test.script
    files = sorted((place / "data/val/Maize").iterdir())
    predicted = np.zeros((3, 3), np.float32)
    monkeypatch.setattr(script, "predict", lambda *_: (predicted.copy(), None, [""] * 3, torch.float32))
    classes = list(CLASSES)

    predicted[:, classes.index("Maize")] = 1  # all correct
    run_test(*files)
    out = capsys.readouterr().out
    assert averages(out)["macro"][:3] == [1, 1, 1] and averages(out)["accuracy"] == [1, 3]
    assert "1 of 3 classes occur among the images" in out and "Common wheat" not in out.split("precision")[1]

    predicted[0] = [1, 0, 0]  # one of three is taken for a class of which there is no image
    run_test(*files)
    out = capsys.readouterr().out
    assert averages(out)["macro"][:3] == [1, 0.6667, 0.8] and averages(out)["accuracy"] == [0.6667, 3]
    assert "predicted, though there is no image of it: Common wheat (1)" in out and "micro" not in out
    assert "acc1 66.67 %" in out
    with open(place / "results" / "confusion_matrix.csv", encoding="utf-8-sig", newline="") as file:
        assert [row[1:] for row in csv.reader(file)][1:] == [["0"] * 3, ["1", "2", "0"], ["0"] * 3]

    mixed = [files[0], *sorted((place / "data/val/Common wheat").iterdir())[:2]]
    predicted[:] = np.eye(3)[[classes.index("Maize"), 0, 0]]
    run_test(*mixed)
    out = capsys.readouterr().out
    assert averages(out)["macro"][:3] == [1, 1, 1] and "2 of 3 classes occur" in out


@pytest.mark.parametrize(
    ("folders", "evaluated", "said"),
    [
        (["maize", "COMMON WHEAT"], 2, ["maize is taken for the class Maize", "WHEAT is taken for the class Common"]),
        (["Maize", "nothing", "Mais"], 1, ["not evaluated: 2 images in folders that no class is called: Mais (1), n"]),
        (["photos"], 0, ["not evaluated: 1 images in folders that no class is called: photos (1)"]),
    ],
)
def test_folders_that_are_called_otherwise_are_named(folders, evaluated, said, run_test, place, capsys):
    photo = sorted((place / "data/val/Maize").iterdir())[0]
    for name in folders:
        (place / "test" / name).mkdir(parents=True)
        shutil.copy(photo, place / "test" / name / "a.png")
    status, rows = run_test()
    out = capsys.readouterr().out
    assert status == 0 and len(rows) == len(folders) and all(text in out for text in said)
    assert f"on {evaluated} images" in out or not evaluated and not (place / "results" / "report.txt").exists()


def test_names_are_compared_in_one_unicode_form():
    composed, decomposed = (unicodedata.normalize(form, "Blé") for form in ("NFC", "NFD"))
    assert match_classes([decomposed], ["a", composed]) == {decomposed: 1}
    assert match_classes([composed], ["a", decomposed]) == {composed: 1}
    assert match_classes([decomposed, composed], [composed, decomposed]) == {decomposed: 1, composed: 0}
    assert match_classes(["STRASSE", "straße", "b"], ["Straße", "B", "b"]) == {"STRASSE": 0, "straße": 0, "b": 2}
    assert match_classes(["maize"], ["Maize", "MAIZE"]) == {}  # which one is meant is unknown


def test_a_test_set_with_every_class_gets_scikit_learn_s_report():
    labels, predictions = np.array([0, 1, 2, 2]), np.array([0, 2, 2, 1])
    expected = classification_report(labels, predictions, target_names=list("abc"), digits=4, zero_division=0)
    assert report_classes(labels, predictions, ["a", "b", "c"]) == expected
def test_all_missing_files_are_named_at_once_and_nothing_is_predicted(run_test, place):
    with pytest.raises(UserError) as error:
        run_test("gone.jpg", "data/val", "nowhere/", "none*.png")
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and all("there is no file or folder" in line for line in lines)
    assert [name for name in ("gone.jpg", "nowhere", "none*.png", "data/val") if name in str(error.value)][:3]
    assert not (place / "results" / "predictions.csv").exists()


def test_a_fresh_clone_says_what_to_give(run_test, place):
    shutil.rmtree(place / "data")
    with pytest.raises(UserError, match="there is no folder test, data/test or data/val; give images"):
        run_test()


def test_a_mistake_says_what_is_predicted_what_is_true_and_which_file(run_test, place, monkeypatch):
    sheets = []
    shutil.copytree(place / "data/val/玉米 苗", place / "shots/Common wheat", dirs_exist_ok=True)
    run_test("shots", MISTAKES=2)
    monkeypatch.setattr(run_test.script, "plot_sheet", lambda *args: sheets.append(args))
    run_test.script.evaluate(
        sorted(Path("shots/Common wheat").iterdir())[:1], np.array([[0.1, 0.7, 0.2]]),
        ["Common wheat", "Maize", "玉米 苗"], run_test.script.kind_of({}), 2, place / "results",
        run_test.script.SideFiles(None),
    )  # fmt: skip
    [(images, [caption], _)] = sheets
    name = sorted(Path("shots/Common wheat").iterdir())[0].name
    assert caption == f"predicted: Maize 0.70\ntrue: Common wheat\n{name}" and len(images) == 1


def test_files_that_are_not_read_are_named_and_counted(run_test, place, capsys):
    image = next((place / "data/val/Maize").iterdir())
    mixed = place / "mixed"
    (mixed / "deeper").mkdir(parents=True)
    for name in ("a.png", "b.jfif", "c.ppm", "deeper/d.PNG"):
        (mixed / name).write_bytes(image.read_bytes())  # the content decides
    (mixed / "e.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    for name in ("f.dng", "notes.txt", ".DS_Store", "deeper/Thumbs.db"):
        (mixed / name).write_bytes(b"something")
    status, rows = run_test(mixed)
    assert status == 3 and [Path(row["image"]).name for row in rows] == ["a.png", "b.jfif", "c.ppm", "d.PNG"]
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == 3 and "e.heic" in skipped[0]
    assert skipped[1] == f"skipped: {mixed / 'f.dng'} is a camera's raw file; export it as JPEG or TIFF"
    assert skipped[2].startswith(f"skipped: {mixed / 'notes.txt'} has no image extension")
    status, rows = run_test(mixed / "*")  # a pattern
    assert status == 3 and len(rows) == 4 and capsys.readouterr().out.count("skipped: ") == 3
    for number in range(30):
        (mixed / f"{number:02}.csv").touch()
    status, rows = run_test(mixed)
    skipped = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped: ")]
    assert status == 3 and len(skipped) == 1 + 20 + 1
    assert skipped[-1].startswith("skipped: 12 more files that are no images, such as ")
    for name in ("a.png", "b.jfif", "c.ppm", "deeper/d.PNG", "e.heic"):
        (mixed / name).unlink()
    with pytest.raises(UserError, match="no folder with images.*00.csv has no image extension"):
        run_test(mixed)
    with pytest.raises(UserError, match="none of the 1 images can be read.*f.dng is a camera's raw file"):
        run_test(mixed / "f.dng")


# --- the test part, and several checkpoints


def test_the_test_part_of_makedata_is_reported_by_default(run_test, place, capsys):
    shutil.copytree(place / "data/val", place / "data/test")
    shutil.rmtree(place / "data/test/Maize")
    _, rows = run_test()
    assert len(rows) == 6 and all(Path(row["image"]).parts[:2] == ("data", "test") for row in rows)
    shutil.copytree(place / "data/val/Maize", place / "test/Maize")
    _, rows = run_test()
    assert len(rows) == 3 and all(Path(row["image"]).parts[0] == "test" for row in rows)


def test_the_accuracy_comes_with_a_confidence_interval(run_test, place, capsys):
    _, rows = run_test()
    hits = sum(Path(row["image"]).parent.name == row["class_1"] for row in rows)
    n, z, p = len(rows), 1.959964, hits / len(rows)
    centre, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5  # Wilson, 1927
    low, high = (100 * (centre + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    line = f"95 % confidence interval of acc1: {low:.2f} to {high:.2f} % (Wilson)"
    assert line in capsys.readouterr().out
    assert line in (place / "results" / "report.txt").read_text(encoding="utf-8")


@pytest.fixture
def folds(place):
    """Two checkpoints that predict differently and see the images differently."""
    checkpoint = torch.load(place / BEST, weights_only=True)
    paths = []
    for number in range(2):
        changed = dict(checkpoint, mean=[0.3 + 0.2 * number] * 3)
        changed["state_dict_ema"] = {
            name: value + 0.02 * number if name.startswith("head") else value
            for name, value in checkpoint["state_dict_ema"].items()
        }
        paths.append(place / "folds" / f"fold{number}" / "last.pth")
        paths[-1].parent.mkdir(parents=True)
        torch.save(changed, paths[-1])
    return paths


def test_several_checkpoints_are_averaged(run_test, folds, capsys):
    tables = []
    for text in (*map(str, folds), "folds/*/last.pth", ",".join(map(str, folds))):
        _, rows = run_test(CHECKPOINT=text, TOP_K=3)
        tables.append({(r["image"], r[f"class_{k}"]): float(r[f"probability_{k}"]) for r in rows for k in (1, 2, 3)})
    first, second, pattern, listed = tables
    assert max(abs(first[key] - second[key]) for key in first) > 1e-3
    assert pattern == listed
    assert pattern == pytest.approx({key: (first[key] + second[key]) / 2 for key in first}, abs=2e-6)
    assert capsys.readouterr().out.count(f"{folds[1]}: unireplknet_test") == 2


def test_checkpoints_that_do_not_fit_each_other_are_refused(run_test, folds, place):
    checkpoint = torch.load(folds[1], weights_only=True)
    torch.save(dict(checkpoint, classes=["a", "b", "c"], best=None), folds[1])
    with pytest.raises(UserError, match="cannot be averaged, since their classes differ"):
        run_test(CHECKPOINT="folds/*/last.pth")
    with pytest.raises(UserError, match="no file matches folds/[*]/best.pth"):
        run_test(CHECKPOINT="folds/*/best.pth")
    with pytest.raises(UserError, match="there is no checkpoint nowhere.pth"):
        run_test(CHECKPOINT=f"{folds[0]},nowhere.pth")


def test_checkpoints_among_the_images_are_explained(run_test, folds):
    with pytest.raises(ConstantError, match="IMAGES must be images, got .*last.pth; write --checkpoint before it"):
        run_test("data/val", folds[1], CHECKPOINT=str(folds[0]))


@pytest.mark.parametrize("count", [2, 1000, 1001, 30_000])
def test_a_table_of_confusions_stays_small(count):
    classes = [f"class {number}" for number in range(count)]
    labels, predictions = np.array([0, 0, 1, 1, 1, count - 1]), np.array([0, 1, 1, 1, 0, 1])
    rows = tabulate_confusions(labels, predictions, classes)
    if count <= 1000:
        assert rows[0][1:] == classes and [row[0] for row in rows[1:]] == classes
        assert {(i, j): n for i, row in enumerate(rows[1:]) for j, n in enumerate(row[1:]) if n} == {
            (a, b): sum((labels == a) & (predictions == b)) for a, b in zip(labels.tolist(), predictions.tolist())
        }
    else:
        assert rows[0] == ["true class", "predicted class", "images"] and rows[1] == ["class 1", "class 1", 2]
        assert sorted(rows[2:]) == sorted(
            [[classes[a], classes[b], 1] for a, b in ((0, 0), (0, 1), (1, 0), (count - 1, 1))]
        )
