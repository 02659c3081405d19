"""Calibrated probabilities, unknown images, and the accuracy on disturbed images, in test.py, the page and ONNX."""

import csv
import importlib.util
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import SMALL, draw_noise
from PIL import Image
from scipy.linalg import inv
from sklearn.covariance import ledoit_wolf

import train
from common import calibration
from common.calibration import SCORE, CalibratedNetwork, NoveltyScore, calibration_error, cross_fit, fit_score
from common.calibration import fit_temperature, summarise
from common.checkpoint import build_network, load_checkpoint, save_checkpoint
from common.dataset import PixelTransform, open_image_folder
from common.device import Normalise
from common.evaluation import coverage_curve
from common.faults import Stopped
from common.options import UserError
from common.stress import disturbances, other_sizes
from tools import export, web_demo

BEST = Path("checkpoints", SMALL["MODEL"], "best.pth")


@pytest.fixture
def place(trained_copy):
    """A copy of the folder of a short run, with images of a kind that the network does not know."""
    Path("others").mkdir()
    for number in range(3):
        image = Image.new("RGB", (48, 48), (255, 0, 255))
        image.paste(draw_noise(f"other {number}", 24), (0, 12))
        image.save(f"others/{number}.png")
    return trained_copy


@pytest.fixture
def run_test(monkeypatch):
    """Call test.py's main() with some constants changed; returns the rows of predictions.csv."""
    spec = importlib.util.spec_from_file_location("test_script", Path(train.__file__).with_name("test.py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name in ("plot_confusion_matrix", "plot_sheet"):
        monkeypatch.setattr(script, name, lambda *arguments: None)

    def run(*images, **constants):
        settings = dict(IMAGES=list(images), DEVICE="cpu", WORKERS=0, AMP="off", TOP_K=3, CHECKPOINT=str(BEST))
        settings |= dict(UNKNOWN=0.05, STRESS=False)
        for name, value in (settings | constants).items():
            monkeypatch.setattr(script, name, value)
        assert script.main() == 0
        with open(Path(script.OUTPUT, "predictions.csv"), encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))

    return run


def read_stress(folder):
    """The rows of stress.csv."""
    with open(Path(folder, "stress.csv"), encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def draw_logits(count, classes=5, seed=0):
    """Logits (N, classes) and labels that follow their softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("true", [0.5, 3.0])
def test_a_temperature_is_found_and_never_changes_which_class_is_first(true):
    logits, labels = draw_logits(4000)
    logits = true * logits
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(true, rel=0.1)
    assert torch.equal((logits / temperature).argmax(1), logits.argmax(1))
    before, after = (calibration_error((logits / t).softmax(1), labels) for t in (1.0, temperature))
    assert after < 0.03 < before


def test_few_images_without_a_mistake_are_no_reason_for_certainty():
    logits = 4 * torch.eye(3)[[0, 1, 2, 0, 1]]
    temperature = fit_temperature(logits, torch.tensor([0, 1, 2, 0, 1]))
    confidence = (logits / temperature).softmax(1).amax()
    assert 0.7 < confidence < 0.95  # the lowest temperature would give 1.0000


@pytest.mark.parametrize(("count", "fifth"), [(60, 12), (9, 2), (5, 1), (3, 1), (2, 1)])
def test_figures_of_an_image_are_by_temperatures_that_did_not_see_its_label(count, fifth):
    logits, labels = draw_logits(count)
    before = cross_fit(logits, labels)
    changed = labels.clone()
    changed[1] = (labels[1] + 1) % 5
    after = cross_fit(logits, changed)
    same = (before == after).all(1)
    assert same[1] and same.sum() <= fifth  # the others' temperature moved
    assert (before.argmax(1) == logits.argmax(1)).all()


def test_calibration_error_and_coverage_by_hand():
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.4, 0.6]])
    labels = np.array([0, 1, 1, 0])
    # Bins of 1/15: 0.9 twice, half of them correct; 0.7, correct; 0.6, wrong.
    assert calibration_error(probabilities, labels) == pytest.approx((2 * 0.4 + 0.3 + 0.6) / 4)
    coverage, accuracy = coverage_curve(probabilities, labels)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1] and accuracy == pytest.approx([1 / 2, 1 / 2, 2 / 3, 1 / 2])
    assert summarise(probabilities, labels)["accuracy_at_coverage"] == {"0.5": 0.5, "0.8": 0.5, "0.9": 0.5, "1": 0.5}


def test_of_images_of_the_same_confidence_none_comes_first():
    labels = np.array([1, 0, 0, 1])
    for order in ([0, 1, 2, 3], [1, 2, 0, 3], [3, 1, 0, 2]):
        probabilities = np.array([[1.0, 0.0]] * 3 + [[0.4, 0.6]])[order]
        _, accuracy = coverage_curve(probabilities, labels[order])
        assert accuracy == pytest.approx([2 / 3, 2 / 3, 2 / 3, 3 / 4])


def draw_features(count, seed):
    """Looks, features and labels of three classes, as `look_at_images` returns them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    mixing = torch.randn(10, 10, generator=torch.Generator().manual_seed(9))
    features = 3 * torch.eye(10)[labels] + torch.randn(count, 10, generator=generator) @ mixing
    return dict(features=features, look=torch.randn(count, 6, generator=generator) @ mixing[:6, :6], labels=labels)


def test_the_score_is_the_relative_mahalanobis_distance_and_its_quantiles_those_of_validation():
    train_part, val = draw_features(400, 1), draw_features(300, 2)
    statistics = fit_score(train_part, val, 3)
    assert set(statistics) == set(SCORE) and statistics["projection"].shape == (10, 2)
    score = NoveltyScore(statistics)
    look, to_class = score.parts(val["look"], val["features"]).T.double()

    # As in the paper, with whole covariance matrices; that of all images is the within-class one plus the between.
    x, y, z = train_part["features"].double().numpy(), train_part["labels"].numpy(), val["features"].double().numpy()
    means = np.stack([x[y == label].mean(0) for label in range(3)])
    within, _ = ledoit_wolf(x - means[y], assume_centered=True)
    total = within + np.cov(means[y], rowvar=False, bias=True)
    distances = [np.einsum("ni,ij,nj->n", z - mean, inv(within), z - mean) for mean in means]
    distance_to_all = np.einsum("ni,ij,nj->n", z - x.mean(0), inv(total), z - x.mean(0))
    np.testing.assert_allclose(to_class, np.min(distances, 0) - distance_to_all, rtol=1e-3, atol=1e-3)

    known = score(val["look"], val["features"])
    for unknown in (0.05, 0.3):
        assert (known < unknown).double().mean() == pytest.approx(unknown, abs=0.01)
    assert (score(val["look"] + 100, val["features"]) == 0).all()
    far = score(val["look"], val["features"] + 100 * torch.randn(10, generator=torch.Generator().manual_seed(3)))
    assert far.median() < 0.01 and look.isfinite().all()


@pytest.mark.parametrize("kinds", [1, 4])
def test_images_that_are_alike_are_known_alike_but_for_rounding(kinds):
    train_part, val = draw_features(100, 1), draw_features(kinds, 2)
    val = {name: tensor.repeat_interleave(5, 0) for name, tensor in val.items()}
    score = NoveltyScore(fit_score(train_part, val, 3))
    known = score(val["look"], val["features"])
    assert known.max() == 1
    for factor in (1 + 1e-6, 1 - 1e-6):
        torch.testing.assert_close(score(val["look"] * factor, val["features"] * factor), known, rtol=0, atol=0.01)


def test_scores_of_many_images_and_classes_need_little_memory(monkeypatch):
    parts, sizes = NoveltyScore.parts, []

    def measure(self, look, features):
        sizes.append(len(look) * self.means.numel())
        return parts(self, look, features)

    monkeypatch.setattr(NoveltyScore, "parts", measure)
    train_part, val = draw_features(400, 1), draw_features(1500, 2)
    statistics = fit_score(train_part | dict(labels=torch.arange(400) % 200), val, 200)
    assert statistics["means"].shape == (200, 10) and max(sizes) < 200 * 10 * 100


def test_features_without_distances_give_no_score():
    part = draw_features(30, 1)
    assert fit_score(part | dict(features=None, look=None), part, 3) is None
    assert fit_score(part | dict(features=torch.zeros(30, 10)), part, 3) is None


def test_script_page_and_onnx_agree_on_probabilities_and_what_is_unknown(place, run_test, monkeypatch, capsys):
    onnx, *_ = map(pytest.importorskip, ("onnx", "onnxscript", "onnxruntime"))
    rows = run_test("data/val", "others")
    text = capsys.readouterr().out
    known = np.array([float(row["known"]) for row in rows])
    assert len(rows) == 12 and (known[9:] < 0.05).all() and (known[:9] >= 0.05).sum() >= 8
    assert f"{(known < 0.05).sum()} of 12 are called unknown: below UNKNOWN 0.05" in text
    assert text.count("; unknown (") == (known < 0.05).sum() and "calibrated" in text

    checkpoint = load_checkpoint(BEST)
    predictor = web_demo.Predictor(checkpoint, torch.device("cpu"), 3, 0.05)
    for row in rows[::4] + rows[-1:]:
        probabilities, _, _, verdict = predictor(row["image"])
        own = {row[f"class_{rank}"]: float(row[f"probability_{rank}"]) for rank in (1, 2, 3)}
        assert probabilities == pytest.approx(own, abs=1e-4)
        assert verdict.startswith("unknown: ") == (float(row["known"]) < 0.05)
    assert web_demo.Predictor(checkpoint, torch.device("cpu"), 3)(rows[-1]["image"])[3] == ""  # off

    monkeypatch.setattr(export, "CHECKPOINT", str(BEST))
    monkeypatch.setattr(export, "FORMATS", ["onnx", "program", "timm"])
    export.main()
    onnx_rows = run_test("data/val", "others", CHECKPOINT=f"exports/{SMALL['MODEL']}/model.onnx", OUTPUT="by_onnx")
    assert "onnxruntime, calibrated" in capsys.readouterr().out
    for row, other in zip(rows, onnx_rows, strict=True):
        assert row["class_1"] == other["class_1"] and row["image"] == other["image"]
        assert float(row["probability_1"]) == pytest.approx(float(other["probability_1"]), abs=1e-4)
        assert float(row["known"]) == pytest.approx(float(other["known"]), abs=0.005)

    # A file for images of one size, and one without the second output, as the 8-bit one.
    run_test("data/val", CHECKPOINT=f"exports/{SMALL['MODEL']}/model.onnx", OUTPUT="by_onnx", STRESS=True)
    table = {row["disturbance"]: row["acc1"] for row in read_stress("by_onnx")}
    assert table["larger images, 64x64"] == "" and float(table["clean"]) >= 0 and float(table["blur 0.6"]) >= 0
    model = onnx.load(f"exports/{SMALL['MODEL']}/model.onnx")
    del model.graph.output[1:]
    onnx.save(model, "no_score.onnx")
    capsys.readouterr()
    assert "known" not in run_test("data/val", CHECKPOINT="no_score.onnx", OUTPUT="results")[0]
    assert "unknown is off, since not all of these checkpoints have a score" in capsys.readouterr().out

    # Turned off, and from a checkpoint of an earlier version.
    assert "known" not in run_test("data/val", UNKNOWN=0.0)[0]
    del checkpoint["calibration"]
    save_checkpoint(checkpoint, "old.pth")
    capsys.readouterr()
    old = run_test("data/val", "others", CHECKPOINT="old.pth")
    assert "known" not in old[0] and "calibrated" not in (text := capsys.readouterr().out) and "unknown" not in text
    assert [row["class_1"] for row in old] == [row["class_1"] for row in rows]
    assert old[0]["probability_1"] != rows[0]["probability_1"]
    assert web_demo.Predictor(checkpoint, torch.device("cpu"), 3, 0.05)(rows[0]["image"])[3] == ""

    # Several: the mean, or not at all.
    mean = run_test("data/val", "others", CHECKPOINT=f"{BEST},{BEST}")
    assert [row["known"] for row in mean] == [row["known"] for row in rows]
    capsys.readouterr()
    assert "known" not in run_test("data/val", CHECKPOINT=f"{BEST},old.pth")[0]
    assert "unknown is off, since not all of these checkpoints have a score" in capsys.readouterr().out


def test_merging_changes_what_is_known_by_rounding_only(place):
    checkpoint = load_checkpoint(BEST)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one, other = (CalibratedNetwork(build_network(checkpoint, merge), checkpoint["calibration"]) for merge in (0, 1))
    with torch.inference_mode():
        parts = [
            n.score.raw(calibration.describe_look(first), n.network.forward_head(maps, pre_logits=True))
            for n in (one, other)
            for maps, first in [n.compute_maps(images)]
        ]
    torch.testing.assert_close(*parts, rtol=1e-3, atol=1e-3)


def test_a_calibration_that_cannot_be_is_refused(place):
    checkpoint = load_checkpoint(BEST)
    good = checkpoint["calibration"]

    def refused(match, **changes):
        score = good["score"] | {name: changes.pop(name) for name in list(changes) if name in SCORE}
        save_checkpoint(checkpoint | dict(calibration=good | dict(score=score) | changes), "bad.pth")
        with pytest.raises(UserError, match=match):
            load_checkpoint("bad.pth")

    refused("calibration's temperature must be a number from 0.01 to 100, got 0.0", temperature=0.0)
    refused("its calibration must not have the key 'more'", more=1)
    refused("its calibration's img_size must be its own, 32, got 64", img_size=64)
    refused("its calibration's img_size must be its own", img_size=[2**18, 2**18])
    refused("means has an impossible shape", means=torch.zeros(3, 7))
    refused("means has an impossible shape", means=torch.zeros(0, 2))
    refused("means has an impossible shape", means=torch.zeros(4, 2))
    refused("quantiles has an impossible shape", quantiles=torch.zeros(0))
    refused("quantiles must be a float32 tensor", quantiles=[1.0, 2.0])
    refused("means must be a float32 tensor", means=good["score"]["means"].half())
    score = good.pop("score")
    for part, reason in ((good, "its calibration's score is missing"), (good | dict(score=0), "score must be a dict")):
        save_checkpoint(checkpoint | dict(calibration=part), "bad.pth")
        with pytest.raises(UserError, match=reason):
            load_checkpoint("bad.pth")
    good["score"] = score
    refused("not finite", center=torch.full((2,), float("nan")))
    refused("variances or quantiles that cannot be", spread=torch.zeros(2))
    other = {name: tensor.clone() for name, tensor in good["score"].items()} | dict(projection=torch.zeros(31, 2))
    with pytest.raises(UserError, match="its calibration is that of another network"):
        CalibratedNetwork(build_network(checkpoint), good | dict(score=other))


def test_other_light_is_nothing_unknown(tmp_path, make_data1):
    make_data1(tmp_path / "images", {"a": 60, "b": 60}, size=(32, 32))
    images = open_image_folder(tmp_path / "images", PixelTransform((32, 32)))
    network = timm.create_model("unireplknet_a", num_classes=2).eval()
    loader = SimpleNamespace(num_workers=0, wait_minutes=0, batch_size=16)
    options = dict(normalise=Normalise([0.5] * 3, [0.25] * 3, torch.device("cpu")), interrupt=SimpleNamespace(signal=0))

    def look(factor=1.0, **more):
        def transform(image):
            return (PixelTransform((32, 32))(image) * factor).round().clamp(max=255).to(torch.uint8)

        transform.resize = PixelTransform((32, 32)).resize
        return calibration.look_at_images(network, images, transform, loader, what="images", **options, **more)

    plain, light = look(), look(light=1.5)
    assert len(light["look"]) == 240 and len(light["features"]) == 120
    without, with_light = (NoveltyScore(fit_score(train, plain, 2)) for train in (plain, light))
    for factor in (0.7, 1.4):
        other = look(factor)
        distances = [s.parts(other["look"], other["features"])[:, 0].median() for s in (without, with_light)]
        assert distances[1] < 0.2 * distances[0], factor


def test_a_network_of_several_branches_has_no_score(tmp_path, make_data1):
    class Branches(torch.nn.Module):
        """Like timm's crossvit: the head takes a list of maps."""

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 2, 4, 4)

        def forward_features(self, images):
            return [self.layer(images)] * 2

        def forward_intermediates(self, images, *_, intermediates_only=False, **__):
            maps = self.forward_features(images)
            return maps[:1] if intermediates_only else (maps, maps[:1])

        def forward_head(self, maps, pre_logits=False):
            return maps[0].mean((2, 3)) + maps[1].mean((2, 3))

    make_data1(tmp_path / "images", {"a": 2, "b": 2}, size=(32, 32))
    transform = PixelTransform((32, 32))
    images = open_image_folder(tmp_path / "images", transform)
    loader = SimpleNamespace(num_workers=0, wait_minutes=0, batch_size=4)
    normalise, interrupt = Normalise([0.5] * 3, [0.25] * 3, torch.device("cpu")), SimpleNamespace(signal=0)
    parts = calibration.look_at_images(Branches(), images, transform, loader, normalise, interrupt, "images")
    assert parts["features"] is None and parts["logits"].shape == (4, 2)


@pytest.mark.parametrize("light", [1.5, 4.0])
def test_light_changes_by_up_to_its_limit_in_both_directions(light):
    pixels = torch.full((400, 3, 2, 2), 100, dtype=torch.uint8)
    pixels[:, 2] = 250
    changed = calibration.change_light(pixels, light, torch.Generator().manual_seed(1))
    low, high = changed[:, 0].min() / 100, changed[:, 0].max() / 100
    assert changed.dtype == torch.uint8 and 1 / light - 0.01 <= low < 1.1 / light
    assert high <= min(light, 2.55) + 0.01 and high > 0.9 * min(light, 2.55)
    assert changed[:, 2].max() == 255
    assert (changed[:, 0, 0, 0] < 100).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_a_run_killed_while_it_is_calibrated_is_complete_when_resumed(calibrated, run_train, monkeypatch, capsys):
    straight = run_train(EPOCHS=1, OUTPUT="straight")
    text = capsys.readouterr().out
    assert "calibration temperature " in text and "cross-fitted: ECE" in text

    save = calibration.save_checkpoint
    monkeypatch.setattr(calibration, "save_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_train(EPOCHS=1)
    monkeypatch.setattr(calibration, "save_checkpoint", save)
    folder = run_train(EPOCHS=1, RESUME="auto")
    for name in ("best.pth", "last.pth"):
        one, other = (load_checkpoint(place / name)["calibration"] for place in (straight, folder))
        assert one["temperature"] == other["temperature"] and one["images"] == 9
        assert all(torch.equal(tensor, other["score"][key]) for key, tensor in one["score"].items())
    before = (folder / "last.pth").read_bytes()
    run_train(EPOCHS=1, RESUME="auto")  # complete: nothing is done again
    assert (folder / "last.pth").read_bytes() == before and (folder / "calibration.json").is_file()


@pytest.mark.parametrize("waiting", [False, True])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_calibration_stops_the_run_and_a_resumed_one_is_complete(
    number, status, waiting, calibrated, run_train, monkeypatch, capsys
):
    describe, looks = calibration.describe_look, []

    def stop(maps):
        looks.append(len(maps))
        signal.raise_signal(number)
        if waiting:  # as the loader does while it waits for images
            raise Stopped
        return describe(maps)

    monkeypatch.setattr(calibration, "describe_look", stop)
    folder = run_train(EPOCHS=1, status=status)
    text = capsys.readouterr().out
    assert "stopped in calibration and saved; resume with --resume auto" in text and "temperature" not in text
    # Of the first batch, as it is and in other light.
    assert len(looks) == (1 if waiting else 2) and "calibration" not in load_checkpoint(folder / "best.pth")
    monkeypatch.setattr(calibration, "describe_look", describe)
    run_train(EPOCHS=1, RESUME="auto")
    assert "calibration temperature " in capsys.readouterr().out
    assert all("calibration" in load_checkpoint(folder / name) for name in ("best.pth", "last.pth"))


def test_each_disturbance_changes_an_image_in_its_own_way():
    image = draw_noise("disturbed", (60, 44))
    pixels = {name: change(image) for name, change in disturbances(64, "squeeze").items()}
    clean = pixels.pop("clean").double()
    assert len(pixels) == 11 and {name for name in pixels if "images" in name} == set(other_sizes(64))
    assert pixels["smaller images"].shape == (3, 32, 32) and pixels["larger images"].shape == (3, 96, 96)
    assert other_sizes(160) == {"smaller images": (128, 128), "larger images": (192, 192)}
    same_size = {name: value.double() for name, value in pixels.items() if "images" not in name}
    assert all(value.shape == clean.shape and (value != clean).any() for value in same_size.values())
    inner = same_size["padded, not resampled"][:, 10:54, 2:62]
    assert torch.equal(inner, torch.from_numpy(np.array(image)).permute(2, 0, 1).double())
    assert same_size["light x 0.67"].mean().item() == pytest.approx(0.67 * clean.mean().item(), rel=0.01)
    deviations = [same_size[name].std() / clean.std() for name in ("blur 0.6", "blur 1.0")]
    assert 1 > deviations[0] > deviations[1] > 0.2
    assert (same_size["noise 5/255"] - clean)[(clean > 20) & (clean < 235)].std().item() == pytest.approx(5, rel=0.05)
    again = disturbances(64, "squeeze")["noise 5/255"](image).double()
    assert torch.equal(again, same_size["noise 5/255"])


def test_stress_measures_the_accuracy_under_each_disturbance(place, run_test, capsys):
    rows = run_test("data/val", STRESS=True)
    hits = np.mean([Path(row["image"]).parent.name == row["class_1"] for row in rows])
    table = read_stress("results")
    assert len(table) == 12 and table[0]["disturbance"] == "clean" and table[0]["change"] == "+0.00"
    assert float(table[0]["acc1"]) == pytest.approx(100 * hits, abs=0.01)
    assert any(float(row["unknown"]) > float(table[0]["unknown"]) for row in table)
    assert "larger images, 64x64" in (text := capsys.readouterr().out) and "noise 5/255" in text
    with Image.open("results/stress.png") as image:
        assert image.width > 500 and np.asarray(image).std() > 5
    run_test("data/val")
    assert not Path("results/stress.csv").exists()  # one of an earlier run would be about other images


def test_the_reliability_diagram_is_drawn_for_any_probabilities(tmp_path):
    from common.plots import plot_calibration

    for count, classes in ((1, 2), (400, 5)):
        logits, labels = draw_logits(count, classes)
        plot_calibration((3 * logits).softmax(1).numpy(), logits.softmax(1).numpy(), labels.numpy(), tmp_path / "c.png")
        with Image.open(tmp_path / "c.png") as image:
            assert image.width > 800 and np.asarray(image).std() > 5
