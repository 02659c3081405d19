"""tools/forecast.py and common/series.py: the protocol, the models, bad files, and a small run from end to end."""

import csv
import json
import math
import shutil
import signal
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoint import load_checkpoint, load_newest
from common.options import UserError, read_constants
from common.schedule import warmup_cosine
from common.series import choose_period, read_series, split_rows, split_windows
from tools import forecast

DEFAULTS = {name: getattr(forecast, name) for name in read_constants(forecast.__file__)}
SMALL = dict(CSV="sine.csv", SPLIT=[0.6, 0.2, 0.2], LOOKBACK=4, HORIZONS=[12], DIMS=[4, 4, 8, 8], EPOCHS=2)
SMALL |= dict(EPOCH_STEPS=15, BATCH_SIZE=16, WARMUP_STEPS=5, DLINEAR_LOOKBACK=48, DEVICE="cpu")
HOUR = timedelta(hours=1)


def write_sine(path, rows=960, first=datetime(2020, 1, 1), interval=HOUR, columns=("north", "south")):
    """Write a CSV file of daily waves with noise."""
    noise = np.random.default_rng(0).normal(0, 0.3, (rows, len(columns)))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["date", *columns])
        for row in range(rows):
            wave = math.sin(2 * math.pi * row / 24)
            values = [(place + 1) * wave + 10 * place + noise[row, place] for place in range(len(columns))]
            writer.writerow([first + row * interval, *(f"{value:.4f}" for value in values)])


@pytest.fixture
def run_forecast(tmp_path, monkeypatch):
    """Call forecast.main() beside sine.csv with some constants changed; returns the run's folder."""
    monkeypatch.chdir(tmp_path)
    write_sine("sine.csv")

    def run(status=None, **constants):
        constants = DEFAULTS | SMALL | constants
        for name, value in constants.items():
            monkeypatch.setattr(forecast, name, value)
        assert forecast.main() == status
        return Path(constants["OUTPUT"], Path(constants["CSV"]).stem)

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with sine.csv and a run on it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_sine("sine.csv")
        for name, value in (DEFAULTS | SMALL).items():
            patch.setattr(forecast, name, value)
        forecast.main()
    return folder


# --- the protocol


def test_borders_and_windows_are_those_of_the_published_tables():
    ends = split_rows(17420, HOUR, [12, 4, 4])
    assert ends == (8640, 11520, 14400)
    values = torch.arange(17420.0)[:, None]
    for horizon, count in ((96, 2785), (192, 2689), (336, 2545), (720, 2161)):
        train, val, test = split_windows(values, ends, 504, horizon)
        assert len(test) == len(val) == count and len(train) == 8640 - 504 - horizon + 1
        assert train[0, 0, 0] == 0 and train[-1, 0, -1] == 8639
        assert val[0, 0, 504] == 8640 and val[-1, 0, -1] == 11519  # what is forecast lies in the part itself
        assert test[0, 0, 504] == 11520 and test[-1, 0, -1] == 14399
    assert split_rows(69680, HOUR / 4, [12, 4, 4]) == (34560, 46080, 57600)
    assert split_rows(1001, HOUR, [0.7, 0.1, 0.2]) == (700, 801, 1001)


def test_nothing_leaks_from_validation_and_test(run_forecast, monkeypatch):
    run_forecast(status=None, EPOCHS=1, EPOCH_STEPS=1, CSV="sine.csv")  # sets the constants
    series, values, about = forecast.open_series()
    train = series.values[: about["ends"][0]]
    np.testing.assert_allclose(about["mean"], train.mean(0))
    np.testing.assert_allclose(about["std"], train.std(0))
    lines = Path("sine.csv").read_text().splitlines()
    lines[about["ends"][0] + 1 :] = [line.split(",")[0] + ",500,-7" for line in lines[about["ends"][0] + 1 :]]
    Path("other.csv").write_text("\n".join(lines))
    monkeypatch.setattr(forecast, "CSV", "other.csv")
    _, others, about_others = forecast.open_series()
    assert about_others["mean"] == about["mean"] and about_others["std"] == about["std"]
    windows = [split_windows(these, about["ends"], 96, 12)[0] for these in (values, others)]
    assert torch.equal(*windows)


def test_errors_are_those_of_a_plain_loop():
    torch.manual_seed(0)
    values = torch.randn(150, 3)
    model = forecast.DLinear(30, 7)
    windows = values.unfold(0, 37, 1)
    squares, absolutes = [], []
    for start in range(150 - 37 + 1):
        answer = model(values[None, start : start + 30].transpose(1, 2))[0].detach()
        for column in (2, 0):
            for step in range(7):
                error = float(answer[column, step] - values[start + 30 + step, column])
                squares.append(error**2)
                absolutes.append(abs(error))
    figures = forecast.evaluate(model, windows, 30, [2, 0])
    assert figures == pytest.approx(dict(mse=np.mean(squares), mae=np.mean(absolutes)), rel=1e-5)


# --- the models


def test_dlinear_is_its_formula():
    torch.manual_seed(0)
    model, x = forecast.DLinear(40, 5), torch.randn(2, 3, 40)
    weights = {name: tensor.detach().double().numpy() for name, tensor in model.named_parameters()}
    for answer, series in zip(model(x).flatten(0, 1), x.flatten(0, 1).double().numpy()):
        padded = np.concatenate([np.repeat(series[0], 12), series, np.repeat(series[-1], 12)])
        trend = np.array([padded[place : place + 25].mean() for place in range(40)])
        expected = weights["trend.weight"] @ trend + weights["trend.bias"]
        expected += weights["rest.weight"] @ (series - trend) + weights["rest.bias"]
        np.testing.assert_allclose(answer.detach(), expected, rtol=1e-4, atol=1e-5)


def test_instance_normalisation_is_undone():
    torch.manual_seed(0)
    x = 5 + 3 * torch.randn(2, 3, 48)
    z, day, std = forecast.normalise(x, 12)
    assert z.shape == (2, 3, 4, 12) and z.mean(2).abs().max() < 1e-5
    torch.testing.assert_close(forecast.restore(z.flatten(-2), day, std), x)
    # Level and size of a window do not reach the network.
    other, *_ = forecast.normalise(100 * x - 7, 12)
    torch.testing.assert_close(other, z, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("period", "channels"), [(24, 1), (7, 1), (32, 1), (96, 3), (144, 6), (288, 9), (37, 37)])
def test_a_picture_is_a_calendar(period, channels):
    assert forecast.count_channels(period) == channels
    z = torch.arange(5.0 * period).view(1, 5, period)
    picture = forecast.fold(z, channels)
    assert picture.shape == (1, channels, 5, period // channels) and picture.shape[3] <= 32
    assert picture[0, 0, 1, 0] == period  # a row down: a period later
    assert picture[0, -1, 0, 0] == channels - 1  # a channel on: the next row of the series


def test_repeating_and_a_silent_network():
    x = torch.randn(2, 3, 72)
    torch.testing.assert_close(forecast.Repeat(24, 1, 60)(x), x[..., -24:].repeat(1, 1, 3)[..., :60])
    mean = x.unflatten(-1, (3, 24)).mean(-2).repeat(1, 1, 3)[..., :60]
    torch.testing.assert_close(forecast.Repeat(24, 3, 60)(x), mean)
    silent = forecast.Forecaster(lambda picture: torch.zeros(len(picture), 60), 1, 24)
    torch.testing.assert_close(silent(x), mean)


def test_any_variant_and_columns_that_do_not_mix(monkeypatch):
    for name in ("DEPTHS", "DIMS", "KERNELS"):
        monkeypatch.setattr(forecast, name, None)
    model = forecast.create_model("unireplknet_a", forecast.network_arguments(6, 24), 24).eval()
    assert [len(stage) for stage in model.network.stages] == [2, 2, 6, 2]
    x = torch.randn(1, 2, 72)
    changed = x.clone()
    changed[:, 1] = 0
    with torch.inference_mode():
        torch.testing.assert_close(model(changed)[:, 0], model(x)[:, 0])


@pytest.mark.parametrize(
    ("interval", "period"),
    [(HOUR, 24), (HOUR / 4, 96), (6 * HOUR, 4), (12 * HOUR, 14), (24 * HOUR, 7), (7 * 24 * HOUR, 52), (HOUR / 60, 60)],
)
def test_the_period_follows_from_the_interval(interval, period):
    assert choose_period(interval) == period


def test_the_period_of_odd_intervals_must_be_told():
    with pytest.raises(UserError, match="set PERIOD"):
        choose_period(timedelta(days=45))


def test_mixup_and_flips_keep_past_and_future_together():
    torch.manual_seed(0)
    line = torch.arange(60.0)[:, None] * torch.tensor([1.0, -2.0])
    windows = line.unfold(0, 20, 1)
    batch = forecast.draw_batch(windows, 1.0, 0.5)
    assert batch.shape == (forecast.BATCH_SIZE, 1, 20)
    slopes = batch.diff(dim=-1)  # of a sum of straight lines: constant
    torch.testing.assert_close(slopes, slopes[..., :1].expand_as(slopes), rtol=1e-3, atol=1e-3)
    assert (slopes[..., 0] > 0).any() and (slopes[..., 0] < 0).any() and slopes.unique().numel() > 100


def test_the_learning_rate_is_a_function_of_the_step():
    rates = [warmup_cosine(step, 100, 10, 1.0, 0.1) for step in range(100)]
    assert rates[9] == rates[10] == 1.0 and rates[-1] == pytest.approx(0.1) and rates[4] == 0.5


# --- files


def change(line, text):
    """A function that replaces a line of sine.csv (2 is the first after the header)."""

    def edit(lines):
        lines[line - 1] = text
        return lines

    return edit


BAD = {
    "empty": (lambda lines: [], "no column 'date'"),
    "only a header": (lambda lines: lines[:1], "holds 0 rows"),
    "no date column": (lambda lines: ["when,north,south", *lines[1:]], "no column 'date' .* when, north, south"),
    "no numbers": (lambda lines: [line.split(",")[0] for line in lines], "no column besides date"),
    "two names alike": (lambda lines: ["date,north,north", *lines[1:]], "several columns 'north'"),
    "empty cell": (change(5, "2020-01-01 03:00:00,1.0,"), "line 5, column south: the cell is empty"),
    "NaN": (change(5, "2020-01-01 03:00:00,nan,1.0"), "line 5, column north: nan is not finite"),
    "infinite": (change(5, "2020-01-01 03:00:00,1,-inf"), "line 5, column south: -inf is not finite"),
    "text": (change(7, "2020-01-01 05:00:00,1.0,off"), "line 7, column south: 'off' is no number"),
    "no date": (change(7, "yesterday,1.0,1.0"), "line 7, column date: 'yesterday' is no date"),
    "a cell too few": (change(7, "2020-01-01 05:00:00,1.0"), "line 7 has 2 cells, but the header 3"),
    "gap": (lambda lines: lines[:9] + lines[11:], "line 10: 2020-01-01 10:00:00 follows on 2020-01-01 07:00:00"),
    "doubled": (lambda lines: lines[:9] + lines[8:], "line 10: the date 2020-01-01 07:00:00 stands twice"),
    "unsorted": (lambda lines: [lines[0], *lines[:0:-1]], "line 3: the date .* comes after .*; sort the rows"),
    "a zone": (change(7, "2020-01-01 05:00:00+00:00,1.0,1.0"), "some dates have a time zone"),
    "short": (lambda lines: lines[:150], "the training part of the series is too short"),
    "constant": (
        lambda lines: [lines[0], *(f"{line.rsplit(',', 1)[0]},3.5" for line in lines[1:])],
        "south is constant",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_get_one_sentence(case, run_forecast):
    edit, words = BAD[case]
    lines = edit(Path("sine.csv").read_text().splitlines())
    Path("sine.csv").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(UserError, match=words) as error:
        run_forecast()
    assert "sine.csv" in str(error.value) or case == "short"


def test_other_bad_input(run_forecast):
    for constants, words in (
        (dict(CSV="absent.csv"), "there is no file absent.csv"),
        (dict(COLUMNS=["west"]), "no number column 'west'"),
        (dict(TARGETS=["west"]), "TARGETS names 'west'"),
        (dict(SPLIT=[12, 4, 4]), "asks for 20 months of 30 days, and the series has 1.3"),
        (dict(SPLIT=[0.5, 0.5]), "three sizes"),
        (dict(LOOKBACK=40), "the training part of the series is too short"),
        (dict(HORIZONS=[300]), "the validation part"),
        (dict(LOSS="mean"), "LOSS must be one of mae, mse, huber"),
        (dict(MODEL="resnet18"), "choose one of unireplknet_a"),
        (dict(KERNELS=[4, 3, 3, 3]), "kernel_size must be one of"),
        (dict(KERNELS=[3]), "KERNELS needs four values"),
        (dict(ENCODING="klingon"), "ENCODING 'klingon' is unknown"),
        (dict(RESUME="always"), 'RESUME must be "" or "auto"'),
        (dict(EPOCHS=0), "EPOCHS must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            run_forecast(**constants)
    Path("sine.csv").write_bytes(Path("sine.csv").read_text().replace("north", "höhe").encode("latin-1"))
    with pytest.raises(UserError, match="is not written in utf-8-sig .* save it as UTF-8, or set ENCODING"):
        run_forecast()
    assert read_series("sine.csv", "date", encoding="latin-1").columns == ["höhe", "south"]


def test_semicolons_a_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "series.csv"
    text = "日期;温度;备注\n2020-01-01;1.5;x\n\n2020-01-02;2.5;y\n2020-01-03;3;z\n"
    path.write_text(text, encoding="utf-8-sig")
    series = read_series(path, "日期", ["温度"])
    assert series.values.tolist() == [[1.5], [2.5], [3.0]] and series.interval == timedelta(days=1)
    path.write_text(text.replace("2.5", "2,5"), encoding="utf-8-sig")
    with pytest.raises(UserError, match="line 4, column 温度: '2,5' is no number"):
        read_series(path, "日期", ["温度"])


# --- a run


def test_a_run_beats_repeating_the_last_day(finished, capsys):
    folder = finished / "checkpoints" / "forecast" / "sine"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
    mse = {row["method"]: row["mse"] for row in results}
    assert mse["unireplknet"] < 0.8 * mse["last period"]
    assert {row["windows"] for row in results} == {960 * 0.2 - 12 + 1}
    assert np.asarray(Image.open(folder / "12.png").convert("L")).std() > 5
    with open(folder / "12.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    series = read_series(finished / "sine.csv", "date")
    assert len(rows) == 16 * 12 and rows[0]["date"] == str(series.dates[768])
    for column, place in (("north", 0), ("south", 1)):
        truth = [float(row[column]) for row in rows]
        np.testing.assert_allclose(truth, series.values[768:, place], rtol=1e-4)
        assert np.abs(np.array([float(row[f"{column} unireplknet"]) for row in rows]) - truth).mean() < 1
    assert len((folder / "12-seed1" / "unireplknet" / "log.csv").read_text(encoding="utf-8").splitlines()) == 3


def test_a_checkpoint_alone_forecasts(finished, run_forecast, capsys):
    best = finished / "checkpoints" / "forecast" / "sine" / "12-seed1" / "unireplknet" / "best.pth"
    write_sine("new.csv", rows=150, first=datetime(2021, 6, 1), columns=("south", "extra", "north"))
    run_forecast(CHECKPOINT=str(best), CSV="new.csv")
    assert "over 43 windows of new.csv" in capsys.readouterr().out
    with open("results/forecast.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["date", "north", "south"] and len(rows) == 12
    assert rows[0]["date"] == "2021-06-07 06:00:00"
    checkpoint = load_checkpoint(best, forecast.REQUIRED)
    model = forecast.open_model(checkpoint, torch.device("cpu"))
    values = read_series("new.csv", "date", ["north", "south"]).values[-96:]
    z = torch.tensor((values - checkpoint["mean"]) / checkpoint["std"], dtype=torch.float32).T[None]
    with torch.inference_mode():
        expected = model(z)[0].T.numpy() * checkpoint["std"] + checkpoint["mean"]
    np.testing.assert_allclose([[float(row["north"]), float(row["south"])] for row in rows], expected, rtol=1e-3)
    assert Path("results/forecast.png").is_file()

    write_sine("new.csv", rows=100, interval=HOUR / 2)
    with pytest.raises(UserError, match="are 0:30:00 apart, and those that .* was trained on 1:00:00"):
        run_forecast(CHECKPOINT=str(best), CSV="new.csv")
    write_sine("new.csv", rows=90)
    with pytest.raises(UserError, match="has 90 rows, and .* looks back on 96"):
        run_forecast(CHECKPOINT=str(best), CSV="new.csv")
    write_sine("new.csv", columns=("north", "west"))
    with pytest.raises(UserError, match="has no number column 'south', only date, north, west"):
        run_forecast(CHECKPOINT=str(best), CSV="new.csv")


def test_an_interrupted_run_ends_as_one_left_alone(finished, run_forecast, monkeypatch):
    original, calls = forecast.draw_batch, []

    def draw_batch(*arguments):
        calls.append(None)
        if len(calls) == 20:  # in the second epoch
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(forecast, "draw_batch", draw_batch)
    folder = run_forecast(status=143)
    stopped = load_newest(folder / "12-seed1" / "unireplknet" / "last.pth", forecast.REQUIRED)[0]
    assert (stopped["epoch"], stopped["step"]) == (1, 5)
    with pytest.raises(UserError, match="LEARNING_RATE was 0.002, is 0.5; set it back"):
        run_forecast(RESUME="auto", LEARNING_RATE=0.5)
    run_forecast(RESUME="auto")
    for name in ("unireplknet", "dlinear"):
        file = Path("12-seed1", name, "last.pth")
        left_alone = load_checkpoint(finished / "checkpoints" / "forecast" / "sine" / file, forecast.REQUIRED)
        resumed = load_checkpoint(folder / file, forecast.REQUIRED)
        for part in ("state_dict", "state_dict_ema"):
            assert all(torch.equal(tensor, resumed[part][key]) for key, tensor in left_alone[part].items())
        assert resumed["best_mse"] == left_alone["best_mse"] and resumed["epoch"] == 2
    assert len(calls) == 2 * 2 * 15


def test_a_new_run_renames_the_old_one(finished, run_forecast):
    folder = Path("checkpoints", "forecast", "sine")
    shutil.copytree(finished / "checkpoints", "checkpoints")
    run_forecast(EPOCHS=1, EPOCH_STEPS=1)
    assert Path(f"{folder}.1", "results.json").is_file() and (folder / "results.json").is_file()


def test_steps_that_are_not_finite_reach_nothing(run_forecast, monkeypatch):
    bad = {3}
    original, calls = forecast.draw_batch, []

    def draw_batch(*arguments):
        calls.append(None)
        return original(*arguments) * (math.nan if len(calls) in bad else 1)

    monkeypatch.setattr(forecast, "draw_batch", draw_batch)
    folder = run_forecast(EPOCHS=1)
    saved = load_checkpoint(folder / "12-seed1" / "unireplknet" / "last.pth", forecast.REQUIRED)
    assert saved["history"][0]["skipped"] == 1 and math.isfinite(saved["history"][0]["train_loss"])
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
    bad.update(range(100))
    with pytest.raises(UserError, match="not finite in 4 steps in a row, .* layer .*; lower LEARNING_RATE"):
        calls.clear()
        run_forecast(EPOCHS=1, MAX_SKIPPED=4)


def test_15_minutes_and_one_target(run_forecast):
    write_sine("quarter.csv", rows=1200, interval=HOUR / 4)
    folder = run_forecast(CSV="quarter.csv", TARGETS=["south"], LOOKBACK=2, EPOCHS=1, EPOCH_STEPS=2)
    about = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert about["period"] == 96 and about["targets"] == ["south"] and about["columns"] == ["north", "south"]
