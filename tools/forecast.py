"""Time-series forecasting with UniRepLKNet: train on a CSV file, validate, test, and plot the forecasts.

    python tools/forecast.py --csv sales.csv --seeds 1,2,3           train each horizon with three seeds
    python tools/forecast.py --csv sales.csv --resume auto           resume what was interrupted
    python tools/forecast.py --checkpoint checkpoints/forecast/sales/12-seed1/unireplknet/best.pth --csv new.csv
                                                                     forecast the rows that follow the end of new.csv

Series as images. In the paper (arXiv:2311.15599, "Generalizing UniRepLKNet beyond Image") each variable is a node that
is treated as an image of its own: its embedding, one vector per time step, is reshaped into a single-channel map. Here
each column is a node, and its last LOOKBACK periods (days) are laid out like a calendar: one row of pixels per day, one
pixel per hour. The neighbours of a pixel are the hour and the day before, and one large kernel covers both. An image of
21 days x 24 hours shrinks to a single pixel in the last stage, so pooling discards no position, and the classifier has
one output per step of the forecast instead of one per class. Days of more than 32 rows are split over several channels
(see `fold`). The network itself is unchanged. All columns share it, which gives more training data and generalises
better on small data than mixing columns (PatchTST, arXiv:2211.14730).

What the network predicts. Instance normalisation (RevIN, Kim et al., ICLR 2022) removes level and scale of each window
and restores them in the forecast. Here the level is computed per hour of the day: it is the mean day of the window. The
network therefore predicts the deviation from the mean day. No other path bypasses the network.

DLinear (Zeng et al., AAAI 2023), a strong linear baseline, is trained on the same data for the same number of steps.
Repeating the last period is the seasonal naive baseline; repeating the mean of the LOOKBACK periods shows what the
network adds. CLASSIC adds exponential smoothing or ARIMA, both strong on short series.

Uncertainty. The band from the 10 % to the 90 % quantile holds the errors on the validation part (split conformal
prediction, Vovk et al.), for each column and step, in units of the scale of the window; the forecast itself is the 50 %
quantile, for which the MAE trains. The band changes neither network nor training. On the test part, "pinball" is the
mean pinball loss of the three quantiles, and "coverage" the fraction of true values inside the band, 0.8 at best.

The file is read as it is where that is possible, see docs/series.md; what was decided about it is printed. Where SPLIT,
PERIOD, LOOKBACK and HORIZONS are not set, they follow from the length of the series and the step between its rows.

Protocol: three parts given by SPLIT; each column is z-scored with the statistics of the training part; errors are
measured on z-scored values over every window of the test part. The best epoch is selected on the validation part;
benchmarks/forecast.md explains how the constants were chosen.

Outputs in checkpoints/forecast/<name of the CSV file>/:

    results.csv, results.json       errors for each horizon, seed and method; JSON adds constants and versions
    <horizon>.png, <horizon>.csv    forecasts of the first seed with the network's band, and the true values, in the
                                    units of the CSV file
    <horizon>-seed<seed>/<method>/  last.pth, best.pth, log.csv

With --checkpoint: forecast.csv and forecast.png in results/.

Exit status: 0 success; 1 error; 2 wrong option; 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP, saved and resumable.
"""

import math
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # ema.py, common/, models/, tools/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import numpy as np
import timm
import torch
import torch.nn.functional as F
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from torch import nn

import models  # noqa: F401  registers the UniRepLKNet variants with timm
from common.checkpoint import SaveError, check_finite, load_checkpoint, load_newest, save_checkpoint
from common.checkpoint_check import check_both_weights, check_model_args, check_optimizer, check_settings
from common.checkpoint_check import check_weights, outline_network
from common.dataset import seed_everything
from common.device import choose_device, keep_freed_memory
from common.extras import require
from common.faults import Diverged, Interrupt, StepGuard, Stopped, first_non_finite_layer, is_out_of_memory
from common.file_checks import brief, check_fields, check_keys, check_names
from common.files import SideFiles, write_csv, write_json
from common.options import (
    ConstantError,
    Length,
    Limits,
    Name,
    NonNegative,
    NonNegativeInt,
    NotEmpty,
    Positive,
    PositiveInt,
    Probability,
    Rate,
    UserError,
    read_constants,
    run,
)
from common.plots import save_figure
from common.progress import Progress
from common.run_folder import lock, set_aside
from common.schedule import warmup_cosine
from common.text import label
from ema import ModelEma
from tools.dates import describe_interval
from tools.series import check_parts, choose_period, column_statistics, default_windows, drop_flat, open_zone
from tools.series import read_series, split_rows, split_windows

# What the constants below accept, besides the kinds of common/options.py.
Parts = Annotated[list[Positive], Length(3)]
Rows = Annotated[list[PositiveInt], NotEmpty()]
Blocks = Annotated[list[Annotated[int, Limits(1, 100)]], Length(4)]
Widths = Annotated[list[Annotated[int, Limits(4, 10**5)]], Length(4)]  # the network divides them by 4
Sizes = Annotated[list[PositiveInt], Length(4)]
StepSize = Annotated[float, Limits(above=0, high=10)]

# --- data
CSV: Name = "ETTh1.csv"  # file with a header, dates at equal steps and columns of numbers; see docs/series.md
DATE: Name | None = None  # name of the date column; None: the first one that holds dates, or that of CHECKPOINT
DATE_ORDER: Literal["auto", "dmy", "mdy", "ymd"] = "auto"  # day, month and year in dates of numbers; "auto": by column
TIMEZONE: Name | None = None  # of local times with daylight saving, such as Europe/Berlin; None: as the dates are
DECIMAL: Literal["auto", ".", ","] = "auto"  # decimal sign; "auto": the columns decide
GAPS: Literal["refuse", "carry", "interpolate"] = "refuse"  # missing rows, empty cells: last value, or a line
WHERE: list[str] = []  # column=value: read only rows with these, one series of several; []: all rows
MISSING_VALUES: list[str] = []  # cells that mean a missing value, such as -9999; []: the usual texts and empty cells
COLUMNS: list[str] = []  # number columns to train on; []: all that vary
TARGETS: list[str] = []  # columns among COLUMNS to forecast and evaluate; []: all
ENCODING: Name = "utf-8-sig"  # text encoding of the file; utf-8-sig is UTF-8 with or without a byte order mark
SPLIT: Parts | None = None  # the three parts as fractions that sum to 1, or in months of 30 days; None: 0.6,0.2,0.2
PERIOD: PositiveInt | None = None  # rows per seasonal period; None: those of a day, a week or a year, whichever fits
LOOKBACK: Annotated[int, Limits(2)] | None = None  # input window in periods; None: 21, or a third of the training part
HORIZONS: Rows | None = None  # rows to forecast, one network for each; None: 1, 4 and 14 periods where they fit

# --- network
MODEL: Name = "unireplknet_a"  # unireplknet_a f p n t s b l xl
DEPTHS: Blocks | None = [1, 1, 1, 1]  # blocks per stage; None: those of MODEL
DIMS: Widths | None = [8, 16, 32, 64]  # channels per stage; None: those of MODEL
KERNELS: Sizes | None = [13, 5, 3, 3]  # kernel size per stage; None: those of MODEL
LAYER_SCALE: NonNegative = 0.1  # initial value of layer scale; 0: no layer scale
DROPOUT: Rate = 0.5  # dropout rate before the head; 0: off
DROP_PATH: Rate = 0.0  # stochastic depth rate of the last block; 0: off

# --- optimization
LOSS: Literal["mae", "mse", "huber"] = "mae"  # loss function of the network; "mae" is the least sensitive to outliers
MIXUP: Annotated[float, Limits(0, 100)] = 1.0  # alpha of the Beta distribution of Mixup between windows; 0: off
FLIP: Probability = 0.5  # probability of negating a window; 0: off
EPOCHS: PositiveInt = 6  # maximum number of epochs
EPOCH_STEPS: PositiveInt = 100  # optimizer steps per epoch; validation follows each epoch
BATCH_SIZE: Annotated[int, Limits(2, 10**6)] = 256  # windows per step, each of one column, drawn at random
LEARNING_RATE: StepSize = 2e-3  # peak learning rate
MIN_LEARNING_RATE: NonNegative = 1e-6  # final learning rate
WARMUP_STEPS: NonNegativeInt = 50  # steps of linear learning-rate warm-up; 0: off
WEIGHT_DECAY: NonNegative = 0.05  # AdamW's decoupled weight decay, on matrices and kernels only; 0: off
CLIP_GRAD: NonNegative = 1.0  # maximum gradient norm; 0: off
EMA_DECAY: Rate = 0.99  # decay of the weight average, which spans about 1 / (1 - EMA_DECAY) steps; 0: off
PATIENCE: NonNegativeInt = 3  # early stopping: epochs without a lower validation MSE; 0: off
MAX_SKIPPED: PositiveInt = 10  # consecutive steps with a non-finite loss or gradient after which training stops

# --- DLinear, as published for the ETT data
DLINEAR_LOOKBACK: PositiveInt | None = None  # input window in rows; None: 336, or a third of the training part
DLINEAR_LEARNING_RATE: StepSize = 5e-3  # peak learning rate; the loss is the MSE

# --- exponential smoothing or ARIMA; requires statsforecast
CLASSIC: Literal["", "ets", "arima"] = ""  # AutoETS or AutoARIMA of each column, beside the network; "": none

# --- run
CHECKPOINT: str = ""  # "": train; path of a best.pth: forecast the rows that follow the end of CSV
DEVICE: Name = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or a device such as "cuda:1"
SEEDS: Annotated[list[int], NotEmpty()] = [1]  # one run for each: initial weights, order of windows, Mixup and dropout
RESUME: Literal["", "auto"] = ""  # "": new runs; "auto": resume those in OUTPUT
OUTPUT: Name = "checkpoints/forecast"  # folder in which <name of the CSV file>/ is created
RESULTS: Name = "results"  # folder for the forecasts of CHECKPOINT; existing files are replaced

# Constants that have no effect on what is trained, or only through the series, which is compared itself, so that a run
# may be resumed with others.
NO_EFFECT = ("CSV", "CHECKPOINT", "DEVICE", "SEEDS", "HORIZONS", "RESUME", "OUTPUT", "RESULTS")
NO_EFFECT += ("CLASSIC", "DATE_ORDER", "TIMEZONE", "DECIMAL", "GAPS", "WHERE", "MISSING_VALUES")
DEFAULT_SPLIT = [0.6, 0.2, 0.2]
LOSSES = dict(mae=F.l1_loss, mse=F.mse_loss, huber=F.smooth_l1_loss)
QUANTILES = (0.1, 0.9)  # the band around a forecast
MAX_SIDE = 32  # of an image that the five downsamplings of the network reduce to one pixel
REQUIRED = ("arch", "model_args", "state_dict_ema", "lookback", "horizon", "period", "columns", "targets", "date")
REQUIRED += ("interval", "mean", "std", "config")
# What a checkpoint may contain, and of a run that can be resumed.
Number = Annotated[float, Limits(-1e300, 1e300)]
SeriesFields = dict(
    lookback=Annotated[int, Limits(2, 10**6)],
    horizon=Annotated[int, Limits(1, 10**6)],
    period=Annotated[int, Limits(1, 10**6)],
    columns=list,
    targets=list,
    date=Name,
    interval=Annotated[float, Limits(1e-6, 1e10)],
    mean=list[Number],
    std=list[Annotated[float, Limits(high=1e300, above=0)]],
)
ResumedFields = dict(
    state_dict=dict,
    optimizer=dict,
    ema_updates=NonNegativeInt,
    epoch=NonNegativeInt,
    step=NonNegativeInt,
    total=Number,
    seconds=NonNegative,
    skipped=NonNegativeInt,
    skipped_in_a_row=NonNegativeInt,
    best_epoch=NonNegativeInt,
    history=list,
    ends=Annotated[list[NonNegativeInt], Length(3)],
)


def main():
    if MODEL not in timm.list_models("unireplknet*"):
        raise ConstantError(f"MODEL must be one of {', '.join(timm.list_models('unireplknet*'))}, got {MODEL!r}")
    for name, values in dict(COLUMNS=COLUMNS, TARGETS=TARGETS, HORIZONS=HORIZONS or [], SEEDS=SEEDS).items():
        if len(set(values)) < len(values):
            raise ConstantError(f"{name} must not hold the same value twice, got {values}")
    if COLUMNS and not set(TARGETS) <= set(COLUMNS):
        raise ConstantError(f"TARGETS must be columns among COLUMNS {COLUMNS}, got {TARGETS}")
    if DATE in COLUMNS:
        raise ConstantError(f"COLUMNS must be number columns without DATE {DATE!r}, got {COLUMNS}")
    if KERNELS is not None and DEPTHS is None:
        raise ConstantError(f"KERNELS must be None if DEPTHS is None, got {KERNELS}")
    if 0 < MIXUP < 0.01:  # in float32 such a distribution has no spread left
        raise ConstantError(f"MIXUP must be 0 or at least 0.01, got {MIXUP}")
    if MIN_LEARNING_RATE > min(LEARNING_RATE, DLINEAR_LEARNING_RATE):
        raise ConstantError(
            f"MIN_LEARNING_RATE must be at most LEARNING_RATE {LEARNING_RATE} and DLINEAR_LEARNING_RATE "
            f"{DLINEAR_LEARNING_RATE}, got {MIN_LEARNING_RATE}"
        )
    check_encoding(ENCODING)
    open_zone(TIMEZONE)
    network = dict(drop_rate=DROPOUT, drop_path_rate=DROP_PATH, layer_scale_init_value=LAYER_SCALE)
    network |= network_structure(DEPTHS, DIMS, KERNELS)
    count_parameters(MODEL, network)  # refuses values that do not fit together

    config = {name: globals()[name] for name in read_constants(__file__) if name not in NO_EFFECT}
    device = choose_device(DEVICE)
    reading = dict(encoding=ENCODING, order=DATE_ORDER, decimal=DECIMAL, zone=TIMEZONE, gaps=GAPS, where=WHERE)
    reading["missing"] = MISSING_VALUES
    if CHECKPOINT:
        return forecast(CHECKPOINT, CSV, DATE, reading, config | dict(HORIZONS=HORIZONS), device, Path(RESULTS))
    if CLASSIC:
        require("statsforecast")
    if device.type == "cpu":
        keep_freed_memory()

    series = read_series(CSV, DATE, COLUMNS, **reading)
    dates, step = series.dates, series.step
    usual, usual_name = choose_period(step, len(dates))
    period = PERIOD or usual
    ends = split_rows(len(dates), series.interval, SPLIT or DEFAULT_SPLIT)
    if not COLUMNS:
        drop_flat(series, ends[0])
    unknown = [name for name in TARGETS if name not in series.columns]
    if unknown:
        raise UserError(f"TARGETS names {unknown[0]!r}, which is not among the columns {', '.join(series.columns)}")
    periods, horizons, rows = default_windows(ends, period)
    lookback, horizons, dlinear_lookback = LOOKBACK or periods, HORIZONS or horizons, DLINEAR_LOOKBACK or rows
    config |= dict(SPLIT=SPLIT or DEFAULT_SPLIT, LOOKBACK=lookback, DLINEAR_LOOKBACK=dlinear_lookback)
    longest = max(lookback * period, dlinear_lookback)
    for horizon in horizons:
        check_parts(ends, longest, horizon)
    mean, std = column_statistics(series, ends[0], CSV)
    values = torch.tensor((series.values - mean) / std, dtype=torch.float32).to(device)  # (rows, columns), z-scored
    metadata = dict(  # part of each checkpoint
        columns=series.columns,
        targets=list(TARGETS) or series.columns,
        date=series.date,
        interval=series.interval.total_seconds(),
        ends=list(ends),
        period=period,
        mean=mean.tolist(),
        std=std.tolist(),
        config=config,
        versions=dict(python=platform.python_version(), torch=str(torch.__version__), timm=timm.__version__),
    )
    targets = [series.columns.index(name) for name in metadata["targets"]]
    channels = count_channels(period)
    unused = len(dates) - ends[2]
    days = series.at_midnight()
    first, last = (date.date() if days else date for date in (dates[0], dates[-1]))
    print(f"series      {CSV}: {len(dates)} rows, {step} apart, from {first} to {last}")
    for note in series.notes:
        print(f"            {note}")
    print(f"columns     {len(series.columns)}; forecast: {', '.join(metadata['targets'])}")
    origin = "set by PERIOD" if PERIOD else f"{usual_name}, chosen by the step and the length; PERIOD sets another"
    print(f"period      {period} rows ({origin})")
    print(f"parts       {ends[0]} rows to train, {ends[1] - ends[0]} to validate, {ends[2] - ends[1]} to test", end="")
    print(f" ({'set by SPLIT' if SPLIT else 'the default shares 0.6, 0.2, 0.2; SPLIT sets others'})", end="")
    print(f"; the last {unused} rows are not used" if unused else "")
    windows = dict(LOOKBACK=LOOKBACK, HORIZONS=HORIZONS, DLINEAR_LOOKBACK=DLINEAR_LOOKBACK)
    chosen = [f"{name} is unset" for name, value in windows.items() if value is None]
    print(f"windows     look-back {lookback} periods, {lookback * period} rows", end="")
    print(f"; DLinear {dlinear_lookback} rows", end=";")
    print(f" horizons {', '.join(map(str, horizons))} rows", end="")
    print(f" ({', '.join(chosen)}: chosen by length and period)" if chosen else "")
    print(f"image       {lookback} periods x {period // channels} pixels, channels: {channels}")
    parameters = count_parameters(MODEL, network | dict(in_chans=channels, num_classes=horizons[0]))
    print(f"network     {MODEL}, {parameters:,} parameters for horizon {horizons[0]}")
    print(f"device      {device}, torch {torch.__version__}, timm {timm.__version__}\n")

    classic = None
    if CLASSIC:
        classic = fit_classic(CLASSIC, series.values[: ends[0], targets], period)
    settings = Settings(
        epochs=EPOCHS,
        epoch_steps=EPOCH_STEPS,
        batch_size=BATCH_SIZE,
        min_learning_rate=MIN_LEARNING_RATE,
        warmup_steps=WARMUP_STEPS,
        clip_grad=CLIP_GRAD,
        ema_decay=EMA_DECAY,
        patience=PATIENCE,
        max_skipped=MAX_SKIPPED,
    )
    folder, results = Path(OUTPUT, Path(CSV).stem), []
    side_files = SideFiles("the run goes on, and --resume auto writes it")
    with lock(folder), Interrupt() as interrupt:
        if not RESUME:
            set_aside(folder)
        print(format_result(None))
        try:
            for horizon, seed in product(horizons, SEEDS):
                model_args = network | dict(in_chans=channels, num_classes=horizon)
                recipe = dict(loss=LOSS, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, mixup=MIXUP, flip=FLIP)
                methods = dict(unireplknet=Method(MODEL, model_args, lookback * period, **recipe))
                model_args = dict(lookback=dlinear_lookback, horizon=horizon)
                recipe = dict(loss="mse", learning_rate=DLINEAR_LEARNING_RATE)
                methods["dlinear"] = Method("dlinear", model_args, dlinear_lookback, **recipe)
                trained = {}
                for name, method in methods.items():
                    parts = split_windows(values, ends, method.lookback, horizon)
                    run_metadata = metadata | dict(horizon=horizon, seed=seed)
                    run_folder = folder / f"{horizon}-seed{seed}" / name
                    model, best = train(
                        method, settings, parts, run_metadata, run_folder, device, interrupt, side_files
                    )
                    row = dict(horizon=horizon, seed=seed, method=name, windows=len(parts[2]))
                    row |= dict(epoch=best["best_epoch"], seconds=best["seconds"], val_mse=best["best_mse"])
                    band = best["band"].double()
                    results.append(row | evaluate(model, parts[2], method.lookback, targets, interrupt, band))
                    print(format_result(results[-1]))
                    trained[name] = model, method.lookback, band
                if seed == SEEDS[0]:
                    windows = split_windows(values, ends, longest, horizon)[2]
                    path = folder / f"{horizon}.png"
                    side_files.write(path, write_test_forecasts, series, metadata, horizon, windows, trained, path)
                if seed == SEEDS[-1]:
                    for name, periods in (("mean period", lookback), ("last period", 1)):
                        parts = split_windows(values, ends, periods * period, horizon)
                        row = dict(horizon=horizon, seed=None, method=name, windows=len(parts[2]))
                        model = Repeat(period, periods, horizon)
                        row |= evaluate_untrained(model, periods * period, parts, targets, interrupt)
                        results.append(row)
                        print(format_result(row))
                    if CLASSIC:
                        history = lookback * period
                        parts = list(split_windows(values[:, targets], ends, history, horizon))
                        for part, first in ((1, ends[0]), (2, ends[1])):
                            rows = first, len(parts[part]), horizon
                            forecasts = forecast_classic(classic, series.values[:, targets], *rows, interrupt)
                            forecasts = (forecasts - mean[targets, None]) / std[targets, None]
                            past, future = parts[part].split([history, horizon], 2)
                            parts[part] = torch.cat([past, torch.from_numpy(forecasts).to(past), future], 2)
                        row = dict(horizon=horizon, seed=None, method=CLASSIC, windows=len(parts[2]))
                        every = list(range(len(targets)))
                        row |= evaluate_untrained(Last(horizon), history + horizon, parts, every, interrupt)
                        results.append(row)
                        print(format_result(row))
        except Stopped:
            print("stopped and saved; the same command with --resume auto continues")
            return interrupt.exit_status
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"{device} is out of memory; lower BATCH_SIZE, DIMS or DEPTHS, or set DEVICE") from error

        for name, function, content in (
            ("results.csv", write_csv, results), ("results.json", write_json, metadata | dict(results=results))
        ):  # fmt: skip
            side_files.write(folder / name, function, folder / name, content)
    print(f"\n{format_table(results)}\n\nsaved in {folder}")


def check_encoding(encoding):
    """ConstantError if Python does not know the text encoding."""
    try:
        "a".encode(encoding)
    except (LookupError, ValueError) as error:  # UnicodeError is a ValueError
        raise ConstantError(f"ENCODING must be a text encoding of Python, such as utf-8, got {encoding!r}") from error


def network_structure(depths, dims, kernels):
    """timm's arguments for blocks, channels and kernel size per stage; None keeps those of the variant."""
    sizes = None if kernels is None else [[size] * depth for size, depth in zip(kernels, depths)]
    arguments = dict(depths=depths and list(depths), dims=dims and list(dims), kernel_sizes=sizes)
    return {name: value for name, value in arguments.items() if value is not None}


def count_parameters(arch, model_args):
    """Number of parameters of a network, counted without allocating it; ConstantError if the arguments do not fit."""
    try:
        with torch.device("meta"):
            network = timm.create_model(arch, **model_args)
    except ValueError as error:
        given = ", ".join(f"{name} {model_args.get(name)}" for name in ("depths", "dims", "kernel_sizes"))
        raise ConstantError(f"DEPTHS, DIMS and KERNELS must fit together ({error}), got {given}") from error
    return sum(parameter.numel() for parameter in network.parameters())


@torch.inference_mode()
def forecast(path, csv_path, date, reading, constants, device, folder):
    """Forecast the rows that follow the end of a CSV file; if the file is long enough, also evaluate on it.

    Args:
        path: the checkpoint, a best.pth or last.pth.
        csv_path: the CSV file.
        date: name of its date column; None: as in training.
        reading: how the CSV file is read, keyword arguments of `read_series`.
        constants: {name: value} of the constants; reported where the checkpoint overrides them.
        device: `torch.device`.
        folder: in which forecast.csv and forecast.png are written.

    Raises:
        UserError: if the CSV file does not fit the checkpoint.
    """
    checkpoint = load_checkpoint(path, REQUIRED, check_forecaster)
    columns, lookback, horizon = checkpoint["columns"], checkpoint["lookback"], checkpoint["horizon"]
    print(f"model       {checkpoint['arch']} of {path}: input {lookback} rows, horizon {horizon} rows")
    print(f"columns     {len(columns)}; forecast: {', '.join(checkpoint['targets'])}; from the checkpoint")
    print(f"period      {checkpoint['period']} rows, from the checkpoint")
    print(f"dates       in column {date or checkpoint['date']!r}, {'set by DATE' if date else 'from the checkpoint'}")
    overridden = describe_overridden(checkpoint, constants)
    if overridden:
        print(f"constants   {overridden}; from the checkpoint, since these constants apply to training")

    series = read_series(csv_path, date or checkpoint["date"], columns, **reading)
    for note in series.notes:
        print(f"            {note}")
    interval = timedelta(seconds=checkpoint["interval"])
    if series.interval != interval:
        raise UserError(
            f"the rows of {csv_path} are {series.step} apart, but {path} was trained on rows "
            f"{describe_interval(interval)} apart; "
            "resample the series, or train anew"
        )
    if len(series.dates) < lookback:
        raise UserError(f"{csv_path} has {len(series.dates)} rows, but {path} needs {lookback} as input; add more rows")
    model = open_model(checkpoint, device)
    mean, std = (torch.tensor(checkpoint[name], dtype=torch.float64) for name in ("mean", "std"))
    values = ((torch.from_numpy(series.values) - mean) / std).float().to(device)
    targets = [columns.index(name) for name in checkpoint["targets"]]
    past = values[-lookback:].T[None]
    future = model(past)[0].T.cpu().double() * std + mean  # (horizon, columns)
    band = None
    if checkpoint.get("band") is not None:
        offsets = checkpoint["band"].double() * window_scale(past)[0, targets].cpu().double()  # (2, targets, horizon)
        band = (future[:, targets].T + offsets * std[targets, None]).numpy()
    dates = series.following(horizon)

    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for step, date in enumerate(dates):
        rows.append(dict(date=date))
        for place, target in enumerate(targets):
            rows[-1][columns[target]] = f"{future[step, target]:.6g}"
            if band is not None:
                low, high = band[:, place, step]
                rows[-1] |= {f"{columns[target]} 10 %": f"{low:.6g}", f"{columns[target]} 90 %": f"{high:.6g}"}
    write_csv(folder / "forecast.csv", rows)
    shown = min(len(series.dates), max(lookback, horizon) // 2)
    plot_forecasts(
        checkpoint["targets"],
        series.dates[-shown:] + dates,
        series.values[-shown:, targets].T,
        {checkpoint["arch"]: future[:, targets].T.numpy()},
        band,
        folder / "forecast.png",
    )
    if band is None:
        print("band        none: the checkpoint is of an earlier version, which did not measure it")
    print(f"forecast    {horizon} rows from {dates[0]} to {dates[-1]} in {folder / 'forecast.csv'}")
    if len(values) >= lookback + horizon:
        windows = values.unfold(0, lookback + horizon, 1)
        baseline = Repeat(checkpoint["period"], 1, horizon)
        for name, evaluated in ((checkpoint["arch"], model), ("last period", baseline)):
            errors = evaluate(evaluated, windows, lookback, targets)
            text = f"MSE {errors['mse']:.4f}, MAE {errors['mae']:.4f} (z-scored)"
            print(f"{name:11} {text} over {len(windows)} windows of {csv_path}")


def check_forecaster(checkpoint):
    """ValueError unless this can be a checkpoint of this script; its keys are `REQUIRED`."""
    check_fields(checkpoint, SeriesFields)
    columns, targets = checkpoint["columns"], checkpoint["targets"]
    lookback, horizon, period = (checkpoint[name] for name in ("lookback", "horizon", "period"))
    for name in ("columns", "targets"):
        check_names(checkpoint[name], f"its {name}")
    if not set(targets) <= set(columns):
        raise ValueError(f"its targets must be among its columns, got {brief(targets)}")
    if not len(checkpoint["mean"]) == len(checkpoint["std"]) == len(columns):
        raise ValueError(f"its mean and std must have a value for each of {len(columns)} columns")
    check_settings(checkpoint["config"], "its config")
    arch, arguments = checkpoint["arch"], checkpoint["model_args"]
    if arch == "dlinear":
        sizes = {name: SeriesFields[name] for name in ("lookback", "horizon")}
        check_keys(arguments, sizes, "its model_args")
        check_fields(arguments, sizes, "its model_args'")
        outputs = arguments.get("horizon"), arguments.get("lookback")
    elif arch in timm.list_models("unireplknet*"):
        check_model_args(arch, arguments)
        channels = arguments.get("in_chans", 3)
        if lookback % period or period % channels:
            raise ValueError(f"its lookback {lookback}, period {period} and {channels} channels do not fit together")
        outputs = arguments["num_classes"], lookback
    else:
        raise ValueError(f"its arch must be dlinear or the plain name of a UniRepLKNet, got {brief(arch)}")
    if outputs != (horizon, lookback):
        raise ValueError(f"its model_args must give {horizon} outputs for {lookback} rows, got {brief(arguments)}")
    band = checkpoint.get("band")  # missing in earlier versions, and before training ends
    if band is not None:
        shape = (2, len(targets), horizon)
        if not isinstance(band, torch.Tensor) or band.shape != shape or band.dtype != torch.float32:
            raise ValueError(f"its band must be a float32 tensor {shape}, got {brief(band)}")
        if not band.isfinite().all() or (band[0] > band[1]).any():
            raise ValueError("its band must be finite, and its lower quantiles below the upper ones")
    check_weights("state_dict_ema", checkpoint["state_dict_ema"], outline_model(arch, arguments, period))


def outline_model(arch, arguments, period):
    """What `create_model` builds, without memory for its weights; ValueError if it cannot be built."""
    with torch.device("meta"):
        if arch == "dlinear":
            return DLinear(**arguments)
        return Forecaster(outline_network(arch, arguments), arguments.get("in_chans", 3), period)


def describe_overridden(checkpoint, constants):
    """The constants that a checkpoint overrides, such as "LOOKBACK 7 (not 21), MODEL ..."; "" if there are none.

    Constants that are left to automatic choice (None, []) override nothing; of HORIZONS one value suffices.
    """
    trained = read_config(checkpoint["config"])
    names = ["DLINEAR_LOOKBACK"]
    if checkpoint["arch"] != "dlinear":
        names = ["MODEL", "DEPTHS", "DIMS", "KERNELS", "LOOKBACK"]
    used = {name: trained.get(name) for name in names}
    used |= dict(PERIOD=checkpoint["period"], COLUMNS=checkpoint["columns"], TARGETS=checkpoint["targets"])
    automatic = dict(PERIOD=None, LOOKBACK=None, DLINEAR_LOOKBACK=None, COLUMNS=[], TARGETS=[])
    here = read_config(constants)
    texts = [
        f"{name} {value} (not {here[name]})"
        for name, value in used.items()
        if here[name] != value and not (name in automatic and here[name] == automatic[name])
    ]
    if here["HORIZONS"] and checkpoint["horizon"] not in here["HORIZONS"]:
        texts.append(f"HORIZONS {checkpoint['horizon']} (not {here['HORIZONS']})")
    return ", ".join(texts)


def read_config(config):
    """The constants in a checkpoint as the script spells them today: earlier versions wrote 0 and "" for None."""
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    for name, automatic in (("PERIOD", 0), ("DATE", "")):
        if config.get(name) == automatic:
            config[name] = None
    return config


def open_model(checkpoint, device):
    """The model of a checkpoint with its EMA weights, in the inference structure."""
    model = create_model(checkpoint["arch"], checkpoint["model_args"], checkpoint["period"])
    model.load_state_dict(checkpoint["state_dict_ema"])
    return merge(model.to(device))


def create_model(arch, model_args, period):
    """Build the model of a checkpoint: "dlinear", or a network registered with timm inside a `Forecaster`."""
    if arch == "dlinear":
        return DLinear(**model_args)
    return Forecaster(timm.create_model(arch, **model_args), model_args.get("in_chans", 3), period)


class Forecaster(nn.Module):
    """UniRepLKNet on windows folded by their period: (N, C, lookback) -> (N, C, horizon), each column independently.

    Args:
        network: (N, channels, periods, period / channels) -> (N, horizon).
        channels: see `fold`.
        period: rows per period.
    """

    def __init__(self, network, channels, period):
        super().__init__()
        self.network = network
        self.channels = channels
        self.period = period

    def forward(self, x):
        z, day, std = normalise(x, self.period)
        forecast = self.network(fold(z.flatten(0, 1), self.channels))
        return restore(forecast.unflatten(0, x.shape[:2]), day, std)

    def no_weight_decay(self):
        return {f"network.{name}" for name in self.network.no_weight_decay()}


def normalise(x, period):
    """Remove the mean period and the scale of a window (RevIN, with one mean for each position in the period).

    Args:
        x: (..., periods * period).
        period: rows per period.

    Returns:
        (z (..., periods, period) with zero mean over the periods, day (..., 1, period), std (..., 1, 1)).
    """
    std = (x.var(-1, unbiased=False) + 1e-5).sqrt()[..., None, None]
    x = x.unflatten(-1, (-1, period))
    day = x.mean(-2, keepdim=True)
    return (x - day) / std, day, std


def fold(z, channels):
    """Periods of one column as an image: (N, periods, period) -> (N, channels, periods, period / channels).

    Image row: period (day); image column: position in it (hour). With several channels, the rows of the series that
    share a pixel are consecutive.
    """
    return z.unflatten(-1, (-1, channels)).permute(0, 3, 1, 2)


def restore(forecast, day, std):
    """The inverse of `normalise` for the rows that follow the window: (..., horizon) -> (..., horizon)."""
    horizon = forecast.shape[-1]
    periods = math.ceil(horizon / day.shape[-1])
    return forecast * std.squeeze(-1) + day.expand(*day.shape[:-2], periods, -1).flatten(-2)[..., :horizon]


class DLinear(nn.Module):
    """DLinear (Zeng et al., AAAI 2023, Section 4): (N, C, lookback) -> (N, C, horizon).

    One linear layer on the moving average over 25 rows and one on the remainder; all columns share them.
    """

    def __init__(self, lookback, horizon):
        super().__init__()
        self.trend = nn.Linear(lookback, horizon)
        self.rest = nn.Linear(lookback, horizon)

    def forward(self, x):
        trend = F.avg_pool1d(F.pad(x, (12, 12), mode="replicate"), kernel_size=25, stride=1)
        return self.trend(trend) + self.rest(x - trend)


def merge(model):
    """`model` in eval mode, its network reparameterized into the inference structure (a copy)."""
    return reparameterize_model(model.eval())


FORECAST_LINES = (("C0", "--", "o"), ("C1", ":", "^"), ("C2", "-.", "s"))  # distinguishable without colours


def plot_forecasts(columns, dates, known, forecasts, band, path, most=8):
    """Plot known values and forecasts, one panel per column.

    Args:
        columns: names; the first `most` of them are plotted.
        dates: of the known rows and the forecast rows.
        known: array (columns, rows) of true values, starting at the first date; may end before the dates do.
        forecasts: {name: array (columns, horizon)}, ending at the last date.
        band: array (2, columns, horizon), lower and upper quantile of the first forecast, or None.
        path: PNG file to write.
        most: maximum number of panels.
    """
    columns = columns[:most]
    across = min(2, len(columns))
    down = math.ceil(len(columns) / across)
    figure = Figure(figsize=(4.6 * across, 1.5 * down + 0.9), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for number, column in enumerate(columns):
        axes = grid.flat[number]
        if band is not None:
            span = dates[-band.shape[2] :], band[0, number], band[1, number]
            axes.fill_between(*span, color="C0", alpha=0.2, lw=0, label="10 to 90 %")
        axes.plot(dates[: known.shape[1]], known[number], color="black", lw=1.1, label="truth")
        for (name, forecast), (color, line, marker) in zip(forecasts.items(), FORECAST_LINES):
            horizon = forecast.shape[1]
            style = dict(color=color, lw=1.3, marker=marker, ms=3, markevery=max(1, horizon // 12))
            axes.plot(dates[-horizon:], forecast[number], line, label=name, **style)
        axes.axvline(dates[-horizon], color="black", lw=0.8, ls=(0, (2, 3)))  # start of the forecast
        axes.set_ylabel(label(column), fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7, labelbottom=number + across >= len(columns))
        locator = AutoDateLocator(tz=dates[0].tzinfo, minticks=3, maxticks=7)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=dates[0].tzinfo))
    for axes in grid.flat[len(columns) :]:
        axes.remove()
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
    save_figure(figure, path)


class Repeat(nn.Module):
    """Repeat the mean of the last `periods` periods: (N, C, lookback) -> (N, C, horizon)."""

    def __init__(self, period, periods, horizon):
        super().__init__()
        self.period = period
        self.periods = periods
        self.horizon = horizon

    def forward(self, x):
        _, day, std = normalise(x[..., -self.period * self.periods :], self.period)
        return restore(x.new_zeros(*x.shape[:2], self.horizon), day, std)


def fit_classic(name, values, period):
    """Fit exponential smoothing or ARIMA to each column of the training part: a list of models of statsforecast.

    Args:
        name: "ets" or "arima".
        values: float64 array (rows, columns), in the units of the file: some models need positive numbers.
        period: rows per seasonal period; above 24 these models take none.
    """
    [library] = require("statsforecast.models")
    model = dict(ets=library.AutoETS, arima=library.AutoARIMA)[name]
    return [model(season_length=period if period <= 24 else 1).fit(column) for column in values.T]


def forecast_classic(models, values, first, count, horizon, interrupt):
    """Forecasts with the parameters that `fit_classic` has found, each from all rows before it.

    Args:
        models: one for each of C columns.
        values: float64 array (rows, C).
        first: first row of the first of `count` forecasts; each further one begins a row later.
        interrupt: the active `Interrupt`.

    Returns:
        float64 array (count, C, horizon).
    """
    forecasts = np.empty((count, len(models), horizon))
    for number in range(count):
        for column, model in enumerate(models):
            past = np.ascontiguousarray(values[: first + number, column])
            forecasts[number, column] = model.forward(y=past, h=horizon)["mean"]
        if interrupt.signal is not None:
            raise Stopped
    return forecasts


class Last(nn.Module):
    """The last `horizon` rows of its input: (N, C, lookback) -> (N, C, horizon), for forecasts made before."""

    def __init__(self, horizon):
        super().__init__()
        self.horizon = horizon

    def forward(self, x):
        return x[..., -self.horizon :]


def window_scale(past):
    """Standard deviation of each window, as in `normalise`: (..., lookback) -> (..., 1)."""
    return (past.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


@torch.inference_mode()
def evaluate(model, windows, lookback, targets, interrupt=None, band=None):
    """Errors over all `windows`, for the columns with the indices `targets`.

    Args:
        model: (N, C, lookback) -> (N, C, horizon); it is merged first, which only makes it faster.
        windows: (windows, C, lookback + horizon), z-scored.
        lookback: rows of a window that the model receives.
        targets: indices of columns.
        interrupt: an active `Interrupt`, or None.
        band: see `measure_band`, or None.

    Returns:
        dict: mse, mae; with `band` also pinball, the mean loss of its quantiles and the median, and coverage.

    Raises:
        Stopped: after SIGTERM or Ctrl-C.
    """
    model = merge(model)
    windows = windows[:, targets]
    squares, absolutes, pinball, inside = 0.0, 0.0, 0.0, 0
    for batch in windows.split(max(1, 512 // len(targets))):
        error = (model(batch[..., :lookback]) - batch[..., lookback:]).cpu().double()
        squares += error.square().sum().item()
        absolutes += error.abs().sum().item()
        if band is not None:
            limits = band[:, None] * window_scale(batch[..., :lookback]).cpu().double()  # (2, batch, targets, horizon)
            for quantile, limit in zip((*QUANTILES, 0.5), (*limits, torch.zeros(()))):
                pinball += torch.maximum(quantile * (-error - limit), (quantile - 1) * (-error - limit)).sum().item()
            inside += ((limits[0] <= -error) & (-error <= limits[1])).sum().item()
        if interrupt is not None and interrupt.signal is not None:
            raise Stopped
    count = windows.shape[0] * windows.shape[1] * (windows.shape[2] - lookback)
    errors = dict(mse=squares / count, mae=absolutes / count)
    return errors if band is None else errors | dict(pinball=pinball / 3 / count, coverage=inside / count)


def count_channels(period):
    """The fewest channels that keep the image within `MAX_SIDE` pixels in width: 1 for period 24, 3 for 96."""
    return next(n for n in range(1, period + 1) if period % n == 0 and period // n <= MAX_SIDE)


@dataclass(frozen=True)
class Settings:
    """Training settings that all methods share; see the constants of the same names."""

    epochs: int
    epoch_steps: int
    batch_size: int
    min_learning_rate: float
    warmup_steps: int
    clip_grad: float
    ema_decay: float
    patience: int
    max_skipped: int


@dataclass(frozen=True)
class Method:
    """A model and the training settings that differ between methods.

    Attributes:
        arch, model_args: see `create_model`.
        lookback: input window in rows.
        loss: a key of `LOSSES`.
    """

    arch: str
    model_args: dict
    lookback: int
    loss: str
    learning_rate: float
    weight_decay: float = 0.0
    mixup: float = 0.0
    flip: float = 0.0


def format_result(row):
    """One result as a line of text; the header for None."""
    columns = [("horizon", ">7"), ("seed", ">4"), ("method", "<12"), ("epoch", ">5"), ("val_mse", ">8.4f")]
    columns += [("mse", ">8.4f"), ("mae", ">8.4f"), ("pinball", ">8.4f")]
    columns += [("coverage", ">8.3f"), ("seconds", ">7.0f")]
    cells = []
    for name, spec in columns:
        value = name if row is None else row[name]
        width = spec.split(".")[0]
        cells.append(f"{'-' if value is None else value:{width if value is None or row is None else spec}}")
    return "  ".join(cells)


def train(method, settings, parts, metadata, folder, device, interrupt, side_files):
    """Train a model, or resume its training, and write last.pth, best.pth and log.csv to `folder`.

    Args:
        method: `Method`.
        settings: `Settings`.
        parts: training, validation and test windows, see `split_windows`.
        metadata: what checkpoints store about the series and the run: columns, targets, seed, ...
        folder: <horizon>-seed<seed>/<name of the method>.
        device: `torch.device`.
        interrupt: the active `Interrupt`.
        side_files: the run's `SideFiles`.

    Returns:
        (the model of the best epoch in its inference structure, its checkpoint with the band of its forecasts).

    Raises:
        Stopped: after SIGTERM or Ctrl-C; last.pth is up to date.
        UserError: if the run in `folder` has other constants or data, or training diverges.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seed = metadata["seed"]
    seed_everything(seed)
    model = create_model(method.arch, method.model_args, metadata["period"]).to(device)
    optimizer = create_optimizer_v2(model, "adamw", method.learning_rate, method.weight_decay)
    fit = Fit(model, ModelEma(model, settings.ema_decay), optimizer)
    metadata = metadata | dict(arch=method.arch, model_args=method.model_args, lookback=method.lookback)
    checkpoint, path = load_newest(folder / "last.pth", REQUIRED, check_resumed)
    if checkpoint is not None:
        refuse_changes(checkpoint, metadata, path)
        fit.load(checkpoint)

    def save(name, keep=1):
        state = fit.state()
        check_finite(state["state_dict"], state["state_dict_ema"])
        save_checkpoint(metadata | state, folder / name, keep)

    targets = [metadata["columns"].index(name) for name in metadata["targets"]]
    description = f"{folder.parent.name} {folder.name}"
    start = fit.epoch, fit.step
    try:
        while not fit.finished(settings.epochs, settings.patience):
            loss = train_one_epoch(fit, parts[0], method, settings, seed, interrupt, description)
            errors = evaluate(fit.ema.ema, parts[1], method.lookback, targets, interrupt)
            fit.epoch += 1
            row = dict(epoch=fit.epoch, train_loss=loss, val_mse=errors["mse"], val_mae=errors["mae"])
            fit.history.append(row | dict(skipped=fit.skipped, seconds=fit.seconds))
            fit.step, fit.total, fit.skipped = 0, 0.0, 0
            # best.pth before last.pth: a run that is killed in between repeats the epoch and finds it the best again.
            if errors["mse"] < fit.best_mse or not (folder / "best.pth").is_file():
                fit.best_mse, fit.best_epoch = errors["mse"], fit.epoch
                save("best.pth")
            save("last.pth", keep=2)
            start = fit.epoch, fit.step
    except Stopped:
        save("last.pth", keep=2)
        raise
    except (Diverged, SaveError):  # the checkpoint before is the better one, or cannot be replaced
        raise
    except Exception:  # memory full, a mistake of any kind: what was trained before it is kept, if there is any
        if start != (fit.epoch, fit.step):
            try:
                if fit.guard.restore():
                    save("last.pth", keep=2)
                    print(f"{description}: an error ends the run; saved, and resumed by --resume auto")
            except Exception as failure:  # which must not hide the first error
                print(f"{description}: an error ends the run, and it cannot be saved ({failure})")
        raise
    side_files.write(folder / "log.csv", write_csv, folder / "log.csv", fit.history)
    best = load_checkpoint(folder / "best.pth", REQUIRED, check_resumed)
    model = open_model(best, device)
    if best.get("band") is None:
        best["band"] = measure_band(model, parts[1], method.lookback, targets, interrupt)
        save_checkpoint(best, folder / "best.pth")
    return model, best


@torch.inference_mode()
def measure_band(model, windows, lookback, targets, interrupt=None, most=2000, enough=200):
    """`QUANTILES` of the errors on `windows`, for each column and step, in units of `window_scale`.

    Of n windows, the level q of the upper quantile is q (n + 1) / n, and that of the lower one likewise from above, so
    that a further window of the same kind is inside as often as it should be (Angelopoulos and Bates, "A gentle
    introduction to conformal prediction", arXiv:2107.07511, Section 1). With fewer than 9 windows it is their range.

    Args:
        model, windows, lookback, targets, interrupt: see `evaluate`.
        most: number of windows to use, spread over all.
        enough: errors for one quantile; with fewer windows, steps before and after count as well.

    Returns:
        float32 tensor (2, targets, horizon), to be added to a forecast after multiplication by its window's scale.
    """
    model = merge(model)
    windows = windows[:: math.ceil(len(windows) / most), targets]
    errors = []
    for batch in windows.split(max(1, 512 // len(targets))):
        past, future = batch[..., :lookback], batch[..., lookback:]
        errors.append(((future - model(past)) / window_scale(past)).cpu())
        if interrupt is not None and interrupt.signal is not None:
            raise Stopped
    errors = torch.cat(errors).double().numpy()  # (windows, targets, horizon)
    count, _, horizon = errors.shape
    reach = min(horizon, math.ceil((enough / count - 1) / 2) if count < enough else 0)
    # Errors of steps before and after are no further windows: they resemble each other.
    low, high = QUANTILES
    levels = max(0.0, 1 - (1 - low) * (count + 1) / count), min(1.0, high * (count + 1) / count)
    band = []
    for step in range(horizon):
        near = errors[:, :, max(0, step - reach) : step + reach + 1].transpose(1, 0, 2).reshape(len(targets), -1)
        band.append(np.quantile(near, levels, axis=1))
    return torch.from_numpy(np.stack(band, 2)).float()


def check_resumed(checkpoint):
    """`check_forecaster` for a checkpoint of a run that is resumed."""
    check_fields(checkpoint, ResumedFields)
    check_forecaster(checkpoint)
    best = checkpoint.get("best_mse")
    if type(best) is not float or math.isnan(best):
        raise ValueError(f"its best_mse must be a number, got {brief(best)}")
    check_optimizer(checkpoint)
    arch, arguments = checkpoint["arch"], checkpoint["model_args"]
    check_both_weights(checkpoint, outline_model(arch, arguments, checkpoint["period"]))


@dataclass
class Fit:
    """The state of training. A checkpoint holds all of it, and resuming needs nothing else: windows, Mixup and dropout
    depend on the seed and the number of the step only."""

    model: nn.Module
    ema: ModelEma
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # finished epochs
    step: int = 0  # finished steps of the current epoch
    total: float = 0.0  # sum of their losses
    seconds: float = 0.0  # training time so far
    skipped: int = 0  # steps of the current epoch that were skipped because loss or gradient was not finite
    skipped_in_a_row: int = 0
    best_mse: float = math.inf  # on the validation part
    best_epoch: int = 0
    history: list = field(default_factory=list)  # one dict per finished epoch

    COUNTERS = ("epoch", "step", "total", "seconds", "skipped", "skipped_in_a_row", "best_mse", "best_epoch", "history")

    def __post_init__(self):
        self.guard = StepGuard(self, ("skipped", "skipped_in_a_row"))

    def finished(self, epochs, patience):
        return self.epoch >= epochs or bool(patience and self.epoch - self.best_epoch >= patience)

    def state(self):
        """What a checkpoint stores: plain types and tensors."""
        return dict(
            state_dict=self.model.state_dict(),
            state_dict_ema=self.ema.ema.state_dict(),
            ema_updates=self.ema.updates,
            optimizer=self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in self.COUNTERS},
        )

    def load(self, checkpoint):
        self.model.load_state_dict(checkpoint["state_dict"])
        self.ema.load(checkpoint["state_dict_ema"], checkpoint["ema_updates"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for name in self.COUNTERS:
            setattr(self, name, checkpoint[name])


def refuse_changes(checkpoint, metadata, path):
    """UserError if the run of `checkpoint` had other constants or data than this one."""
    before = read_config(checkpoint["config"])
    for name, value in read_config(metadata["config"]).items():
        if before.get(name) != value:
            raise UserError(
                f"cannot resume {path}: {name} was {before.get(name)!r} and is {value!r} now; set it back, or start a "
                "new run without RESUME"
            )
    if any(checkpoint[name] != metadata[name] for name in ("columns", "mean", "std", "interval", "ends")):
        raise UserError(
            f"cannot resume {path}: it was trained on another series than CSV now holds; set CSV to the same data, or "
            "start a new run without RESUME"
        )


def train_one_epoch(fit, windows, method, settings, seed, interrupt, description):
    """Train for one epoch, or for the rest of it after an interruption.

    Args:
        fit: `Fit`, changed in place.
        windows: training windows (windows, C, lookback + horizon).
        method: `Method`.
        settings: `Settings`.
        seed: of the run.
        interrupt: the active `Interrupt`.
        description: of the run, for the progress bar and error messages.

    Returns:
        Mean loss of the steps that were not skipped; None if all were.

    Raises:
        Stopped: after SIGTERM or Ctrl-C; `fit` holds the progress.
        Diverged: after MAX_SKIPPED consecutive steps with a non-finite loss or gradient.
    """
    model = fit.model.train()
    lookback, loss_function = method.lookback, LOSSES[method.loss]
    steps, epochs = settings.epoch_steps, settings.epochs
    started = time.perf_counter() - fit.seconds
    bar = dict(desc=f"{description}, epoch {fit.epoch + 1}/{epochs}", unit="step", total=steps, leave=False)
    for step in Progress(range(fit.step, steps), initial=fit.step, **bar):
        number = fit.epoch * steps + step
        seed_everything(seed, "step", number, device=windows.device)
        peak, final = method.learning_rate, settings.min_learning_rate
        for group in fit.optimizer.param_groups:
            group["lr"] = warmup_cosine(number, epochs * steps, settings.warmup_steps, peak, final)
        batch = draw_batch(windows, settings.batch_size, method.mixup, method.flip)
        past, future = batch[..., :lookback], batch[..., lookback:]
        fit.guard.begin()
        loss = loss_function(model(past), future)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad or math.inf)
        if loss.isfinite() and norm.isfinite():
            fit.guard.change()
            fit.optimizer.step()
            fit.ema.update(model)
            fit.total += loss.item()
            fit.skipped_in_a_row = 0
        else:
            fit.guard.undo()
            fit.skipped += 1
            fit.skipped_in_a_row += 1
            if fit.skipped_in_a_row >= settings.max_skipped:
                layer = first_non_finite_layer(model, past)
                origin = f"the first layer with a non-finite output is {layer}" if layer else "every layer is finite"
                raise Diverged(
                    f"{description}: loss or gradient was not finite in {settings.max_skipped} consecutive steps up to "
                    f"epoch {fit.epoch + 1}, step {step + 1} ({origin}); lower LEARNING_RATE. These steps did not "
                    "change the weights, and the saved checkpoints are intact"
                )
        fit.optimizer.zero_grad(set_to_none=True)
        fit.step = step + 1
        fit.seconds = time.perf_counter() - started
        fit.guard.end()
        if interrupt.signal is not None:
            raise Stopped
    return fit.total / (steps - fit.skipped) if fit.skipped < steps else None


def draw_batch(windows, batch_size, mixup, flip):
    """Draw augmented windows of one column each: (windows, C, length) -> (batch_size, 1, length).

    The sum of two series continues as the sum of their futures, so Mixup (arXiv:1710.09412) keeps past and future
    consistent; so does negating a series. Windows overlap so much that the network soon memorises them without both.
    """
    count, columns = windows.shape[:2]
    index = torch.randint(count * columns, (batch_size,))
    batch = windows[(index // columns).to(windows.device), (index % columns).to(windows.device)]
    weight = torch.ones(batch_size, 1)
    if mixup:
        weight = torch.distributions.Beta(mixup, mixup).sample((batch_size, 1))
    sign = 1 - 2 * (torch.rand(batch_size, 1) < flip).float()
    weight, batch = weight.to(batch), sign.to(batch) * batch
    return (weight * batch + (1 - weight) * batch.roll(1, 0))[:, None]


@torch.inference_mode()
def write_test_forecasts(series, metadata, horizon, windows, trained, path):
    """Write <horizon>.csv and <horizon>.png: consecutive test windows, and the middle one of them as a plot.

    Args:
        series: `Series`.
        metadata: see `train`.
        horizon: rows to forecast.
        windows: of the test part, (windows, C, longest lookback + horizon).
        trained: {name: (model, lookback, band)}, the network first.
        path: the PNG file; the CSV file is written beside it.
    """
    targets = [metadata["columns"].index(name) for name in metadata["targets"]]
    lookback = windows.shape[2] - horizon
    mean, std = (torch.tensor(metadata[name])[targets, None] for name in ("mean", "std"))

    def to_units(z):
        return (z[:, targets].cpu().double() * std + mean).numpy()

    starts = list(range(0, len(windows), horizon))
    if starts[-1] < len(windows) - 1:  # the last window, so that no row is left out
        starts.append(len(windows) - 1)
    tiles = windows[starts]
    truth = to_units(tiles)  # (tiles, targets, lookback + horizon)
    forecasts, bands = {}, {}
    for name, (model, own, band) in trained.items():
        past = tiles[..., lookback - own : lookback]
        forecasts[name] = to_units(model(past))
        offsets = band[:, None] * window_scale(past[:, targets]).cpu().double() * std  # (2, tiles, targets, horizon)
        bands[name] = forecasts[name] + offsets.numpy()
    rows, dates = [], series.dates
    for tile, start in enumerate(starts):
        first = metadata["ends"][1] + start
        for step in range(len(rows) - start, horizon):
            row = dict(date=dates[first + step], seen_until=dates[first - 1])
            for place, target in enumerate(metadata["targets"]):
                row[target] = f"{truth[tile, place, lookback + step]:.6g}"
                for name, forecast in forecasts.items():
                    row[f"{target} {name}"] = f"{forecast[tile, place, step]:.6g}"
                    low, high = bands[name][:, tile, place, step]
                    row |= {f"{target} {name} 10 %": f"{low:.6g}", f"{target} {name} 90 %": f"{high:.6g}"}
            rows.append(row)
    write_csv(path.with_suffix(".csv"), rows)

    middle = len(tiles) // 2
    first = metadata["ends"][1] + starts[middle]
    plot_forecasts(
        metadata["targets"],
        dates[first - min(lookback, horizon) : first + horizon],
        truth[middle, :, -horizon - min(lookback, horizon) :],
        {name: forecast[middle] for name, forecast in forecasts.items()},
        next(iter(bands.values()))[:, middle],
        path,
    )


def evaluate_untrained(model, lookback, parts, targets, interrupt):
    """Validation MSE and test errors of a model that needs no training, as a result's dict."""
    validation = evaluate(model, parts[1], lookback, targets, interrupt)
    band = measure_band(model, parts[1], lookback, targets, interrupt).double()
    test = evaluate(model, parts[2], lookback, targets, interrupt, band)
    return dict(epoch=None, seconds=None, val_mse=validation["mse"], **test)


def format_table(results):
    """Mean and standard deviation over the seeds for each horizon and method, as lines of text."""
    lines = [f"{'horizon':>7}  {'method':12} {'MSE':>8} {'std':>8}  {'MAE':>8} {'std':>8}  pinball  coverage  windows"]
    for horizon, name in dict.fromkeys((row["horizon"], row["method"]) for row in results):
        rows = [row for row in results if row["horizon"] == horizon and row["method"] == name]
        line = f"{horizon:7}  {name:12}"
        for key in ("mse", "mae"):
            values = [row[key] for row in rows]
            spread = f"{statistics.stdev(values):8.4f}" if len(values) > 1 else f"{'-':>8}"
            line += f" {statistics.mean(values):8.4f} {spread} "
        pinball, coverage = (statistics.mean(row[key] for row in rows) for key in ("pinball", "coverage"))
        lines.append(f"{line} {pinball:7.4f}  {coverage:8.3f}  {rows[0]['windows']:7}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, closed_output="ignore")
