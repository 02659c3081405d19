"""tools/forecast.py and tools/series.py: the protocol, the models, invalid files and constants, and small runs."""

import csv
import json
import math
import re
import shutil
import signal
import sys
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import coverage
from common.checkpoint import load_checkpoint, load_newest, save_checkpoint
from common.options import UserError, read_constants, run
from common.schedule import warmup_cosine
from tools import forecast
from tools.dates import Step
from tools.series import check_parts, choose_period, column_statistics, default_windows, read_series
from tools.series import split_rows, split_windows

COMMENTS = read_constants(forecast.__file__)
DEFAULTS = {name: getattr(forecast, name) for name in COMMENTS}
SMALL = dict(CSV="sine.csv", SPLIT=[0.6, 0.2, 0.2], LOOKBACK=4, HORIZONS=[12], DIMS=[4, 4, 8, 8], KERNELS=[3, 3, 3, 3])
SMALL |= dict(EPOCHS=2, EPOCH_STEPS=5, BATCH_SIZE=8, WARMUP_STEPS=2, DLINEAR_LOOKBACK=48, DEVICE="cpu")
ROWS = 480  # of sine.csv; validation begins at row 288, test at row 384
RUN = Path("checkpoints", "forecast", "sine")
HOUR = timedelta(hours=1)


def write_sine(path, rows=ROWS, first=datetime(2020, 1, 1), interval=HOUR, columns=("north", "south")):
    """Write a CSV file of daily waves with noise."""
    noise = np.random.default_rng(0).normal(0, 0.3, (rows, len(columns)))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["date", *columns])
        for row in range(rows):
            wave = math.sin(2 * math.pi * row / 24)
            values = [(number + 1) * wave + 10 * number + noise[row, number] for number in range(len(columns))]
            writer.writerow([first + row * interval, *(f"{value:.4f}" for value in values)])


@pytest.fixture
def run_forecast(tmp_path, monkeypatch):
    """Call forecast.main() beside sine.csv with some constants changed; returns the folder of the run."""
    monkeypatch.chdir(tmp_path)
    write_sine("sine.csv")

    def run_main(status=None, **constants):
        constants = DEFAULTS | SMALL | constants
        for name, value in constants.items():
            monkeypatch.setattr(forecast, name, value)
        assert forecast.main() == status
        return Path(constants["OUTPUT"], Path(constants["CSV"]).stem)

    return run_main


@pytest.fixture
def no_plots(monkeypatch):
    """Skip the plots, which take longer than the small networks."""
    monkeypatch.setattr(forecast, "plot_forecasts", lambda *arguments: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with sine.csv and a finished run on it."""
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


def test_statistics_use_the_training_part_only(tmp_path):
    path = tmp_path / "sine.csv"
    write_sine(path)
    series = read_series(path, "date")
    mean, std = column_statistics(series, 288, path)
    np.testing.assert_allclose([mean, std], [series.values[:288].mean(0), series.values[:288].std(0)])
    series.values[288:] = 500
    np.testing.assert_array_equal(column_statistics(series, 288, path), [mean, std])


def test_errors_equal_those_of_a_plain_loop():
    torch.manual_seed(0)
    values = torch.randn(150, 3)
    model = forecast.DLinear(30, 7)
    windows = values.unfold(0, 37, 1)
    squares, absolutes = [], []
    for start in range(150 - 37 + 1):
        prediction = model(values[None, start : start + 30].transpose(1, 2))[0].detach()
        for column in (2, 0):
            for step in range(7):
                error = float(prediction[column, step] - values[start + 30 + step, column])
                squares.append(error**2)
                absolutes.append(abs(error))
    expected = dict(mse=np.mean(squares), mae=np.mean(absolutes))
    assert forecast.evaluate(model, windows, 30, [2, 0]) == pytest.approx(expected, rel=1e-5)


def test_scores_of_a_band_equal_those_of_a_plain_loop():
    torch.manual_seed(0)
    model, windows = forecast.DLinear(30, 3), torch.randn(150, 2).unfold(0, 33, 1)
    band = forecast.measure_band(model, windows, 30, [1, 0], enough=1)
    assert band.shape == (2, 2, 3) and band.dtype == torch.float32
    losses, inside = [], []
    for window in windows:
        forecasts = model(window[None, :, :30])[0].detach()
        for place, column in enumerate((1, 0)):
            scale = float((window[column, :30].var(unbiased=False) + 1e-5).sqrt())
            for step in range(3):
                truth, middle = float(window[column, 30 + step]), float(forecasts[column, step])
                low, high = (middle + float(limit) * scale for limit in band[:, place, step])
                inside.append(low <= truth <= high)
                for quantile, value in ((0.1, low), (0.5, middle), (0.9, high)):
                    losses.append(max(quantile * (truth - value), (quantile - 1) * (truth - value)))
    errors = forecast.evaluate(model, windows, 30, [1, 0], band=band.double())
    plain = forecast.evaluate(model, windows, 30, [1, 0])
    assert errors["pinball"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert errors["coverage"] == pytest.approx(np.mean(inside), abs=0.01) == pytest.approx(0.8, abs=0.02)
    assert plain == {key: errors[key] for key in ("mse", "mae")}


@pytest.mark.parametrize("count", [5, 12, 25, 60])
def test_a_band_from_few_windows_is_wide_enough_for_further_ones(count):
    """Windows that do not overlap: 400 bands, each from `count` of them; plain quantiles would hold 0.6 to 0.78."""
    torch.manual_seed(0)
    model, inside = forecast.Repeat(4, 1, 1), []
    for _ in range(400):
        windows = torch.randn(count + 200, 1, 5)
        band = forecast.measure_band(model, windows[:count], 4, [0], enough=1)
        inside.append(forecast.evaluate(model, windows[count:], 4, [0], band=band.double())["coverage"])
    expected = 0.8 if count > 8 else (count - 1) / (count + 1)  # of the range of few windows
    assert np.mean(inside) == pytest.approx(expected, abs=0.03)


def test_few_windows_borrow_errors_from_other_steps_and_many_are_sampled():
    torch.manual_seed(0)
    windows = torch.randn(500, 1).unfold(0, 44, 1)
    model = forecast.Repeat(4, 1, 40)
    wide = forecast.measure_band(model, windows[:13], 4, [0])
    assert wide.shape == (2, 1, 40) and wide.diff(dim=-1).abs().max() < 1  # neighbours share most of their errors
    single = forecast.measure_band(model, windows[:1], 4, [0])
    assert (single[0] < single[1]).all() and single.diff(dim=-1).abs().max() == 0
    sample = forecast.measure_band(model, windows, 4, [0], most=100)
    assert torch.equal(sample, forecast.measure_band(model, windows[::5], 4, [0]))


# --- the models


def test_dlinear_is_its_formula():
    torch.manual_seed(0)
    model, x = forecast.DLinear(40, 5), torch.randn(2, 3, 40)
    weights = {name: tensor.detach().double().numpy() for name, tensor in model.named_parameters()}
    for prediction, series in zip(model(x).flatten(0, 1), x.flatten(0, 1).double().numpy()):
        padded = np.concatenate([np.repeat(series[0], 12), series, np.repeat(series[-1], 12)])
        trend = np.array([padded[row : row + 25].mean() for row in range(40)])
        expected = weights["trend.weight"] @ trend + weights["trend.bias"]
        expected += weights["rest.weight"] @ (series - trend) + weights["rest.bias"]
        np.testing.assert_allclose(prediction.detach(), expected, rtol=1e-4, atol=1e-5)


def test_restore_inverts_instance_normalisation():
    torch.manual_seed(0)
    x = 5 + 3 * torch.randn(2, 3, 48)
    z, day, std = forecast.normalise(x, 12)
    assert z.shape == (2, 3, 4, 12) and z.mean(2).abs().max() < 1e-5
    torch.testing.assert_close(forecast.restore(z.flatten(-2), day, std), x)
    # Level and scale of a window do not reach the network.
    other, *_ = forecast.normalise(100 * x - 7, 12)
    torch.testing.assert_close(other, z, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("period", "channels"), [(24, 1), (7, 1), (32, 1), (96, 3), (144, 6), (288, 9), (37, 37)])
def test_an_image_is_a_calendar(period, channels):
    assert forecast.count_channels(period) == channels
    z = torch.arange(5.0 * period).view(1, 5, period)
    image = forecast.fold(z, channels)
    assert image.shape == (1, channels, 5, period // channels) and image.shape[3] <= 32
    assert image[0, 0, 1, 0] == period  # next image row: one period later
    assert image[0, -1, 0, 0] == channels - 1  # next channel: next row of the series


def test_repeat_and_a_network_that_predicts_zero():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 72)
    torch.testing.assert_close(forecast.Repeat(24, 1, 60)(x), x[..., -24:].repeat(1, 1, 3)[..., :60])
    mean = x.unflatten(-1, (3, 24)).mean(-2).repeat(1, 1, 3)[..., :60]
    torch.testing.assert_close(forecast.Repeat(24, 3, 60)(x), mean)
    zero = forecast.Forecaster(lambda image: torch.zeros(len(image), 60), 1, 24)
    torch.testing.assert_close(zero(x), mean)


def test_published_variants_and_independent_columns():
    assert forecast.network_structure(None, None, None) == {}
    torch.manual_seed(0)
    model = forecast.create_model("unireplknet_a", dict(in_chans=1, num_classes=6), 24).eval()
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
    step = Step("time", interval, datetime(2020, 1, 1))
    assert choose_period(step)[0] == choose_period(step, 6 * period)[0] == period
    assert choose_period(step, 6 * period - 1)[0] < period


@pytest.mark.parametrize(
    ("step", "period"),
    [
        (("month", 1), (12, "a year")),
        (("month", 3), (4, "a year")),
        (("month", 12), (1, "none")),
        (("weekday", 1), (5, "a week")),
        (("time", timedelta(days=45)), (1, "none")),
    ],
)
def test_the_period_of_months_weekdays_and_unusual_steps(step, period):
    assert choose_period(Step(*step, datetime(2020, 1, 1), "1111100")) == period


@pytest.mark.parametrize(
    ("rows", "split", "period", "expected"),
    [
        (17420, [12, 4, 4], 24, (21, [24, 96, 336], 336)),  # look-backs of benchmarks/forecast.md
        (17420, [0.6, 0.2, 0.2], 24, (21, [24, 96, 336], 336)),
        (120, [0.6, 0.2, 0.2], 12, (2, [12], 24)),
        (60, [0.6, 0.2, 0.2], 4, (3, [4], 12)),
        (30, [0.6, 0.2, 0.2], 1, (6, [1], 6)),
        (12, [0.6, 0.2, 0.2], 1, (2, [1], 2)),
    ],
)
def test_windows_follow_from_length_and_period(rows, split, period, expected):
    ends = split_rows(rows, HOUR, split)
    assert default_windows(ends, period) == expected
    lookback, horizons, _ = expected
    for horizon in horizons:
        assert all(len(part) > 0 for part in split_windows(torch.zeros(rows, 1), ends, lookback * period, horizon))


@pytest.mark.parametrize("period", [1, 4, 5, 7, 12, 24, 52, 96])
def test_six_periods_are_enough_for_windows(period):
    for rows in range(max(12, 6 * period), 40 * period, period):
        ends = split_rows(rows, HOUR, [0.6, 0.2, 0.2])
        assert ends[2] == rows
        lookback, horizons, dlinear = default_windows(ends, period)
        for horizon in horizons:
            check_parts(ends, max(lookback * period, dlinear), horizon)


def test_mixup_and_flips_keep_past_and_future_together():
    torch.manual_seed(0)
    line = torch.arange(60.0)[:, None] * torch.tensor([1.0, -2.0])
    windows = line.unfold(0, 20, 1)
    batch = forecast.draw_batch(windows, 256, 1.0, 0.5)
    assert batch.shape == (256, 1, 20)
    slopes = batch.diff(dim=-1)  # the sum of straight lines is one
    torch.testing.assert_close(slopes, slopes[..., :1].expand_as(slopes), rtol=1e-3, atol=1e-3)
    assert (slopes[..., 0] > 0).any() and (slopes[..., 0] < 0).any() and slopes.unique().numel() > 100


def test_the_learning_rate_is_a_function_of_the_step():
    rates = [warmup_cosine(step, 100, 10, 1.0, 0.1) for step in range(100)]
    assert rates[9] == rates[10] == 1.0 and rates[-1] == pytest.approx(0.1) and rates[4] == 0.5


# --- files


def change(line, text):
    """A function that replaces a line of sine.csv (2 is the first below the header)."""

    def edit(lines):
        lines[line - 1] = text
        return lines

    return edit


BAD = {
    "empty": (lambda lines: [], "sine.csv is empty; give a CSV file"),
    "only a header": (lambda lines: lines[:1], "sine.csv has no row below the header date, north, south; add rows"),
    "no date column": (
        lambda lines: [line.partition(",")[2] for line in lines],
        "no date column, only north, south; set DATE",
    ),
    "no numbers": (lambda lines: [line.split(",")[0] for line in lines], "no column besides date"),
    "empty cell": (
        change(5, "2020-01-01 03:00:00,1.0,"),
        "column south: 1 cell is empty .2020-01-01 03:00:00.; set GAPS to",
    ),
    "NaN": (change(5, "2020-01-01 03:00:00,nan,1.0"), "column north: 1 cell is empty .2020-01-01 03:00:00."),
    "infinite": (change(5, "2020-01-01 03:00:00,1,-inf"), "line 5, column south: '-inf' is not finite"),
    "too large": (change(5, "2020-01-01 03:00:00,1,1e999"), "line 5, column south: '1e999' is not finite"),
    "text": (change(7, "2020-01-01 05:00:00,1.0,off"), "line 7, column south: 'off' is not a number"),
    "no date": (change(7, "yesterday,1.0,1.0"), "line 7, column date: 'yesterday' is not a date"),
    "no such date": (change(7, "2020-02-30 05:00:00,1.0,1.0"), "line 7, column date: '2020-02-30 05.* is not a date"),
    "missing field": (change(7, "2020-01-01 05:00:00,1.0"), "line 7: expected 3 fields, got 2; fix this line"),
    "gap": (lambda lines: lines[:9] + lines[11:], "2 rows are missing .2020-01-01 08:00:00 .2 rows..; set GAPS"),
    "duplicate date": (
        lambda lines: [*lines[:9], lines[8].rsplit(",", 1)[0] + ",99", *lines[9:]],
        "1 row has a date that another row has, with other values: line 10 .2020-01-01 07:00:00.; keep each",
    ),
    "between": (change(7, "2020-01-01 05:00:07,1.0,1.0"), "most rows are 1:00:00 apart, but 1 of 480 lie .* line 7"),
    "time zone": (change(7, "2020-01-01 05:00:00+00:00,1.0,1.0"), "some dates have a time zone"),
    "short": (lambda lines: lines[:150], "the training part of the series is too short"),
    "constant": (
        lambda lines: lines[:1] + [line[:19] + 2 * f",{row // 400}" for row, line in enumerate(lines[1:])],
        "north is constant in the training part",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_files_get_one_sentence(case, run_forecast):
    edit, words = BAD[case]
    lines = edit(Path("sine.csv").read_text().splitlines())
    Path("sine.csv").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(UserError, match=words) as error:
        run_forecast()
    assert "sine.csv" in str(error.value) or case == "short"


def test_constants_that_do_not_fit_the_file(run_forecast):
    for constants, words in (
        (dict(CSV="absent.csv"), "there is no file absent.csv"),
        (dict(COLUMNS=["west"]), "no number column 'west'"),
        (dict(TARGETS=["west"]), "TARGETS names 'west', which is not among the columns north, south"),
        (dict(SPLIT=[12, 4, 4]), "asks for 20 months of 30 days, but the series has 0.7"),
        (dict(SPLIT=[1e308, 1e308, 1e308]), "asks for inf months"),
        (dict(SPLIT=[0.0001, 0.4999, 0.5]), "the training part of the series is too short"),
        (dict(LOOKBACK=40), "the training part of the series is too short"),
        (dict(HORIZONS=[12, 150]), "the validation part of the series is too short"),
        (dict(DEVICE="abacus"), "DEVICE 'abacus' is not available"),
    ):
        with pytest.raises(UserError, match=words):
            run_forecast(**constants)
    Path("sine.csv").write_bytes(Path("sine.csv").read_text().replace("north", "höhe").encode("latin-1"))
    for encoding in ("utf-8-sig", "utf-16"):
        with pytest.raises(UserError, match=f"is not encoded in {encoding} .* save it as UTF-8, or set ENCODING"):
            run_forecast(ENCODING=encoding)
    assert read_series("sine.csv", "date", encoding="latin-1").columns == ["höhe", "south"]


REFUSED = (
    ("--csv=", "CSV must be text that is not empty"),
    ("--date=", "DATE must be text that is not empty or None"),
    ("--columns=a,a", "COLUMNS must not hold the same value twice"),
    ("--columns=a,date --date=date", "COLUMNS must be number columns without DATE"),
    ("--targets=a,a", "TARGETS must not hold the same value twice"),
    ("--columns=a --targets=b", "TARGETS must be columns among COLUMNS"),
    ("--encoding=klingon", "ENCODING must be a text encoding"),
    ("--encoding=hex", "ENCODING must be a text encoding"),
    ("--encoding=undefined", "ENCODING must be a text encoding"),
    ("--split=0.5,0.5", "SPLIT must be a list of 3 numbers above 0"),
    ("--timezone=Mars/Base", "TIMEZONE must be an IANA time zone"),
    ("--timezone=../passwd", "TIMEZONE must be an IANA time zone"),
    ("--date-order=ydm", 'DATE_ORDER must be "auto", "dmy", "mdy" or "ymd"'),
    ("--decimal=;", "DECIMAL must be"),
    ("--gaps=zero", 'GAPS must be "refuse", "carry" or "interpolate"'),
    ("--split=1,0,1", "SPLIT must be"),
    ("--period=0", "PERIOD must be a whole number of at least 1 or None"),
    ("--lookback=1", "LOOKBACK must be a whole number of at least 2"),
    ("--horizons=", "HORIZONS must be a list of whole numbers"),
    ("--horizons=0", "HORIZONS must be"),
    ("--horizons=12,12", "HORIZONS must not hold the same value twice"),
    ("--model=resnet18", "MODEL must be one of unireplknet_a, "),
    ("--depths=1,1,1", "DEPTHS must be"),
    ("--depths=1,2,3,4 --kernels=none", "DEPTHS, DIMS and KERNELS must fit together"),
    ("--depths=none", "KERNELS must be None if DEPTHS is None"),
    ("--dims=2,4,8,16", "DIMS must be"),
    ("--kernels=4,3,3,3", "DEPTHS, DIMS and KERNELS must fit together .kernel_size must be one of"),
    ("--kernels=3", "KERNELS must be a list of 4 whole numbers"),
    ("--layer-scale=-1", "LAYER_SCALE must be"),
    ("--dropout=1", "DROPOUT must be"),
    ("--drop-path=1", "DROP_PATH must be"),
    ("--loss=mean", 'LOSS must be "mae", "mse" or "huber"'),
    ("--mixup=-1", "MIXUP must be"),
    ("--mixup=1e-300", "MIXUP must be 0 or at least 0.01"),
    ("--flip=1.5", "FLIP must be"),
    ("--epochs=0", "EPOCHS must be"),
    ("--epoch-steps=0", "EPOCH_STEPS must be"),
    ("--batch-size=1", "BATCH_SIZE must be"),
    ("--learning-rate=0", "LEARNING_RATE must be"),
    ("--learning-rate=nan", "LEARNING_RATE must be"),
    ("--min-learning-rate=0.003", "MIN_LEARNING_RATE must be at most LEARNING_RATE"),
    ("--warmup-steps=-1", "WARMUP_STEPS must be"),
    ("--weight-decay=-1", "WEIGHT_DECAY must be"),
    ("--clip-grad=-1", "CLIP_GRAD must be"),
    ("--ema-decay=1", "EMA_DECAY must be"),
    ("--patience=-1", "PATIENCE must be"),
    ("--max-skipped=0", "MAX_SKIPPED must be"),
    ("--dlinear-lookback=0", "DLINEAR_LOOKBACK must be"),
    ("--dlinear-learning-rate=0", "DLINEAR_LEARNING_RATE must be"),
    ("--device=", "DEVICE must be"),
    ("--seeds=", "SEEDS must be"),
    ("--seeds=1,1", "SEEDS must not hold the same value twice"),
    ("--resume=always", 'RESUME must be "" or "auto"'),
    ("--output=", "OUTPUT must be"),
    ("--results=", "RESULTS must be"),
)


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_invalid_constants_are_refused_before_the_file_is_read(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in (DEFAULTS | dict(CSV="absent.csv")).items():
        monkeypatch.setattr(forecast, name, value)
    monkeypatch.setattr(sys, "argv", ["forecast.py", *options.split()])
    monkeypatch.setattr("common.options.read_constants", lambda path: COMMENTS)  # parsing takes most of the time
    with pytest.raises(SystemExit) as status:
        run(forecast.main)
    output = capsys.readouterr()
    assert status.value.code == 2 and not list(tmp_path.iterdir())
    assert re.match(f"error: {words}.*, got .*", output.err) and output.err.count("\n") == 1


def test_semicolons_a_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "series.csv"
    text = "日期;温度;备注\n2020-01-01;1.5;x\n\n2020-01-02;2.5;y\n2020-01-03;3;z\n"
    path.write_text(text, encoding="utf-8-sig")
    series = read_series(path, "日期", ["温度"])
    assert series.values.tolist() == [[1.5], [2.5], [3.0]] and series.interval == timedelta(days=1)
    path.write_text(text.replace("2.5", "2,5"), encoding="utf-8-sig")
    with pytest.raises(UserError, match="line 4, column 温度: '2,5' is not a number"):
        read_series(path, "日期", ["温度"])


# --- a run


def test_a_run_beats_the_last_day_and_writes_its_forecasts(finished):
    folder = finished / RUN
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
    mse = {row["method"]: row["mse"] for row in results}
    assert mse["unireplknet"] < 0.8 * mse["last period"]
    assert {row["windows"] for row in results} == {96 - 12 + 1}
    assert np.asarray(Image.open(folder / "12.png").convert("L")).std() > 5
    with open(folder / "12.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    series = read_series(finished / "sine.csv", "date")
    assert len(rows) == 96 and rows[0]["date"] == str(series.dates[384])
    for number, column in enumerate(("north", "south")):
        truth = [float(row[column]) for row in rows]
        np.testing.assert_allclose(truth, series.values[384:, number], rtol=1e-4)
        assert np.abs(np.array([float(row[f"{column} unireplknet"]) for row in rows]) - truth).mean() < 1
    assert len((folder / "12-seed1" / "unireplknet" / "log.csv").read_text(encoding="utf-8").splitlines()) == 3


def test_a_checkpoint_alone_forecasts(finished, run_forecast, capsys):
    best = finished / RUN / "12-seed1" / "unireplknet" / "best.pth"
    write_sine("new.csv", rows=150, first=datetime(2021, 6, 1), columns=("south", "extra", "north"))
    run_forecast(CHECKPOINT=str(best), CSV="new.csv")
    printed = capsys.readouterr().out
    assert "over 43 windows of new.csv" in printed and "\nconstants" not in printed
    assert "\nperiod      24 rows, from the checkpoint\ndates       in column 'date', from the checkpoint\n" in printed
    with open("results/forecast.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["date", "north", "north 10 %", "north 90 %", "south", "south 10 %", "south 90 %"]
    assert len(rows) == 12
    assert rows[0]["date"] == "2021-06-07 06:00:00"
    checkpoint = load_checkpoint(best, forecast.REQUIRED, forecast.check_resumed)
    model = forecast.open_model(checkpoint, torch.device("cpu"))
    values = read_series("new.csv", "date", ["north", "south"]).values[-96:]
    z = torch.tensor((values - checkpoint["mean"]) / checkpoint["std"], dtype=torch.float32).T[None]
    with torch.inference_mode():
        expected = model(z)[0].T.numpy() * checkpoint["std"] + checkpoint["mean"]
    np.testing.assert_allclose([[float(row["north"]), float(row["south"])] for row in rows], expected, rtol=1e-3)
    scale = (z.var(-1, unbiased=False) + 1e-5).sqrt()[0].numpy() * checkpoint["std"]
    for number, limit in enumerate(("10 %", "90 %")):
        limits = [[float(row[f"{column} {limit}"]) for column in ("north", "south")] for row in rows]
        np.testing.assert_allclose(limits, expected + checkpoint["band"][number].T.numpy() * scale, rtol=1e-3)
    assert Path("results/forecast.png").is_file()

    checkpoint.pop("band")  # as earlier versions wrote it
    save_checkpoint(checkpoint, Path("old.pth"))
    run_forecast(CHECKPOINT="old.pth", CSV="new.csv")
    assert "\nband        none: the checkpoint is of an earlier version" in capsys.readouterr().out
    with open("results/forecast.csv", newline="", encoding="utf-8-sig") as file:
        assert [[row["north"], row["south"]] for row in csv.DictReader(file)] == [
            [row["north"], row["south"]] for row in rows
        ]
    for band in ([1.0], torch.zeros(2, 2, 11), torch.full((2, 2, 12), math.nan), -torch.arange(48.0).view(2, 2, 12)):
        with pytest.raises(ValueError, match="its band must be"):
            forecast.check_forecaster(checkpoint | dict(band=band))

    write_sine("new.csv", rows=100, interval=HOUR / 2)
    with pytest.raises(UserError, match="are 0:30:00 apart, but .* was trained on rows 1:00:00 apart"):
        run_forecast(CHECKPOINT=str(best), CSV="new.csv")
    write_sine("new.csv", rows=90)
    with pytest.raises(UserError, match="has 90 rows, but .* needs 96 as input"):
        run_forecast(CHECKPOINT=str(best), CSV="new.csv")
    write_sine("new.csv", columns=("north", "west"))
    with pytest.raises(UserError, match="has no number column 'south', only date, north, west"):
        run_forecast(CHECKPOINT=str(best), CSV="new.csv")


def test_constants_that_a_checkpoint_overrides_are_reported(finished, run_forecast, no_plots, capsys):
    best = finished / RUN / "12-seed1" / "unireplknet" / "best.pth"
    run_forecast(CHECKPOINT=str(best), **dict.fromkeys(("SPLIT", "LOOKBACK", "HORIZONS", "DLINEAR_LOOKBACK")))
    assert "\nconstants" not in capsys.readouterr().out
    changed = dict(MODEL="unireplknet_f", LOOKBACK=21, HORIZONS=[96], PERIOD=12, COLUMNS=["north"], EPOCHS=9)
    run_forecast(CHECKPOINT=str(best), **changed, DATE="date")
    printed = capsys.readouterr().out
    [line] = [line for line in printed.splitlines() if line.startswith("constants")]
    for text in ("MODEL unireplknet_a (not unireplknet_f)", "LOOKBACK 4 (not 21)", "HORIZONS 12 (not [96])"):
        assert text in line
    assert "PERIOD 24 (not 12)" in line and "COLUMNS ['north', 'south'] (not ['north'])" in line
    assert "EPOCHS" not in line and "TARGETS" not in line and "in column 'date', set by DATE" in printed
    run_forecast(CHECKPOINT=str(best.parent.with_name("dlinear") / "best.pth"), LOOKBACK=21, DLINEAR_LOOKBACK=9)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("constants")]
    assert line.startswith("constants   DLINEAR_LOOKBACK 48 (not 9); ")  # DLinear has no use for LOOKBACK


def test_an_interrupted_run_ends_like_an_uninterrupted_one(finished, run_forecast, no_plots, monkeypatch):
    original, calls = forecast.draw_batch, []

    def draw_batch(*arguments):
        calls.append(None)
        if len(calls) == 7:  # in the second epoch
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(forecast, "draw_batch", draw_batch)
    folder = run_forecast(status=143)
    last = folder / "12-seed1" / "unireplknet" / "last.pth"
    stopped = load_newest(last, forecast.REQUIRED, forecast.check_resumed)[0]
    assert (stopped["epoch"], stopped["step"]) == (1, 2)
    with pytest.raises(UserError, match="LEARNING_RATE was 0.002 and is 0.5 now; set it back"):
        run_forecast(RESUME="auto", LEARNING_RATE=0.5)
    run_forecast(RESUME="auto")
    for name in ("unireplknet", "dlinear"):
        file = Path("12-seed1", name, "last.pth")
        uninterrupted = load_checkpoint(finished / RUN / file, forecast.REQUIRED, forecast.check_resumed)
        resumed = load_checkpoint(folder / file, forecast.REQUIRED, forecast.check_resumed)
        for part in ("state_dict", "state_dict_ema"):
            assert all(torch.equal(tensor, resumed[part][key]) for key, tensor in uninterrupted[part].items())
        assert resumed["best_mse"] == uninterrupted["best_mse"] and resumed["epoch"] == 2
    assert len(calls) == 2 * 2 * 5


@pytest.mark.parametrize(
    ("module", "name", "number", "saved"),
    [
        (forecast, "draw_batch", 8, (1, 2)),
        (torch.nn.utils, "clip_grad_norm_", 8, (1, 2)),  # after a forward pass, which changes batch norms
        (forecast, "evaluate", 2, (1, 5)),
        (torch.optim.AdamW, "step", 8, (1, 0)),  # the weights may have changed in part
        (torch.optim.AdamW, "step", 3, None),
    ],
)
def test_an_error_saves_what_was_trained_before_it(
    module, name, number, saved, finished, run_forecast, no_plots, monkeypatch
):
    original, calls = getattr(module, name), []

    def fail(*arguments, **options):
        calls.append(None)
        if len(calls) == number:
            raise KeyError("a mistake")
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        with pytest.raises(KeyError, match="a mistake"):
            run_forecast()
    file = RUN / "12-seed1" / "unireplknet" / "last.pth"
    if saved is None:
        assert not file.exists()
        return
    stopped = load_checkpoint(file, forecast.REQUIRED, forecast.check_resumed)
    assert (stopped["epoch"], stopped["step"]) == saved
    run_forecast(RESUME="auto")
    files = file, finished / file
    resumed, straight = (load_checkpoint(path, forecast.REQUIRED, forecast.check_resumed) for path in files)
    for part in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(tensor, resumed[part][key]) for key, tensor in straight[part].items())


def test_results_that_cannot_be_written_end_nothing_and_are_written_later(run_forecast, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("no font")

    monkeypatch.setattr(forecast, "plot_forecasts", fail)
    names = ("12.png", "results.csv", "results.json", "12-seed1/dlinear/log.csv")
    original = forecast.set_aside

    def block(folder):
        original(folder)
        for name in names[1:]:
            (folder / name / "inside").mkdir(parents=True)

    monkeypatch.setattr(forecast, "set_aside", block)
    folder = run_forecast(EPOCHS=1)
    out = capsys.readouterr().out
    assert all(sum(name in line and "warning" in line for line in out.splitlines()) == 1 for name in names)
    for name in names[1:]:
        shutil.rmtree(folder / name)
    monkeypatch.setattr(forecast, "plot_forecasts", lambda *arguments: arguments[-1].touch())
    run_forecast(EPOCHS=1, RESUME="auto")
    assert all((folder / name).is_file() for name in (*names, "12.csv")) and "warning" not in capsys.readouterr().out


def test_runs_of_earlier_versions_resume(finished, run_forecast, no_plots, capsys):
    shutil.copytree(finished / "checkpoints", "checkpoints")
    for path in (RUN / "12-seed1").rglob("*.pth"):
        checkpoint = load_checkpoint(path, forecast.REQUIRED, forecast.check_resumed)
        checkpoint["config"] |= dict(PERIOD=0, DATE="")  # as earlier versions wrote what is None today
        save_checkpoint(checkpoint, path)
    run_forecast(RESUME="auto")
    printed = capsys.readouterr().out
    assert "period      24 rows (a day, chosen by the step" in printed
    assert "            dates in column date: year-month-day" in printed
    write_sine("sine.csv", rows=ROWS + 5)
    with pytest.raises(UserError, match="it was trained on another series than CSV now holds"):
        run_forecast(RESUME="auto")


def test_a_new_run_renames_the_old_one(run_forecast, no_plots):
    RUN.mkdir(parents=True)
    (RUN / "results.json").write_text("{}")
    run_forecast(EPOCHS=1, EPOCH_STEPS=1)
    assert Path(f"{RUN}.1", "results.json").read_text() == "{}" and (RUN / "results.json").stat().st_size > 2


def test_non_finite_steps_are_skipped(run_forecast, no_plots, monkeypatch):
    bad = {3}
    original, calls = forecast.draw_batch, []

    def draw_batch(*arguments):
        calls.append(None)
        return original(*arguments) * (math.nan if len(calls) in bad else 1)

    monkeypatch.setattr(forecast, "draw_batch", draw_batch)
    folder = run_forecast(EPOCHS=1)
    saved = load_checkpoint(folder / "12-seed1" / "unireplknet" / "last.pth", forecast.REQUIRED, forecast.check_resumed)
    assert saved["history"][0]["skipped"] == 1 and math.isfinite(saved["history"][0]["train_loss"])
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
    bad.update(range(100))
    with pytest.raises(UserError, match="not finite in 4 consecutive steps .* layer .*; lower LEARNING_RATE"):
        calls.clear()
        run_forecast(EPOCHS=1, MAX_SKIPPED=4)


def test_full_memory_gets_one_sentence(run_forecast, monkeypatch):
    def draw_batch(*arguments):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(forecast, "draw_batch", draw_batch)
    with pytest.raises(UserError, match="cpu is out of memory; lower BATCH_SIZE"):
        run_forecast()


def test_15_minute_data_and_one_target(run_forecast, no_plots):
    write_sine("quarter.csv", rows=1200, interval=HOUR / 4)
    folder = run_forecast(CSV="quarter.csv", TARGETS=["south"], LOOKBACK=2, EPOCHS=1, EPOCH_STEPS=2)
    metadata = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert metadata["period"] == 96 and metadata["targets"] == ["south"] and metadata["columns"] == ["north", "south"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_csv_file_that_excel_or_powershell_saved_is_read(encoding, end, tmp_path):
    lines = ["date,温度,_b$", *(f"2016-07-0{day},{day}.5,{day}" for day in range(1, 6))]
    (tmp_path / "a.csv").write_bytes((end.join(lines) + end).encode(encoding))
    series = read_series(tmp_path / "a.csv", "date")
    assert series.columns == ["温度", "_b$"] and series.values[:, 0].tolist() == [1.5, 2.5, 3.5, 4.5, 5.5]


# --- exponential smoothing and ARIMA


@pytest.mark.parametrize("name", ["ets", "arima"])
def test_classic_methods_forecast_each_window_from_all_rows_before(name, run_forecast):
    library = pytest.importorskip("statsforecast.models")
    months = [f"{1990 + row // 12}-{row % 12 + 1:02}" for row in range(120)]
    values = [100 + row + 20 * math.sin(row * math.pi / 6) + row * row * 7919 % 13 for row in range(120)]
    Path("months.csv").write_text("month,value\n" + "".join(f"{m},{v}\n" for m, v in zip(months, values)))
    output = run_forecast(CSV="months.csv", CLASSIC=name, HORIZONS=[6], LOOKBACK=2, PERIOD=12, DLINEAR_LOOKBACK=24)
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))["results"]
    row = next(row for row in results if row["method"] == name)
    assert row["windows"] == 24 - 6 + 1 and 0 <= row["coverage"] <= 1
    model = dict(ets=library.AutoETS, arima=library.AutoARIMA)[name](season_length=12).fit(np.array(values[:72]))
    errors = [model.forward(y=np.array(values[:end]), h=6)["mean"] - values[end : end + 6] for end in range(96, 115)]
    assert row["mse"] == pytest.approx(np.mean(np.square(errors)) / np.var(values[:72]), rel=1e-4)


def test_a_missing_package_for_classic_methods_is_named(run_forecast, monkeypatch):
    monkeypatch.setitem(sys.modules, "statsforecast", None)
    with pytest.raises(UserError, match="needs the package statsforecast .*pip install statsforecast"):
        run_forecast(CLASSIC="ets")


def test_the_table_of_coverage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, covered in (("months", 0.7), ("days", 0.9)):
        rows = [dict(horizon=12, method=method, windows=1234, coverage=covered) for method in coverage.METHODS]
        Path("out", name).mkdir(parents=True)
        Path("out", name, "results.json").write_text(json.dumps(dict(results=rows)))
    for constant, value in dict(FILES=["months.csv", "a/days.csv"], OUTPUT="out").items():
        monkeypatch.setattr(coverage, constant, value)
    coverage.main()
    text = capsys.readouterr().out
    assert "| months | 12 | 1,234 | 70.0 | 70.0 | 70.0 |" in text and "mean over the series: 80.0 %" in text
    monkeypatch.setattr(coverage, "FILES", ["days.csv", "a/days.csv"])
    with pytest.raises(UserError, match="two of FILES have the same name"):
        coverage.main()
