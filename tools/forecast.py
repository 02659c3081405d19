"""Forecast a time series with UniRepLKNet: train on a CSV file of dates and numbers, validate, test and draw.

    python tools/forecast.py --csv ETTh1.csv --seeds 1,2,3           four horizons, three runs each, and a table
    python tools/forecast.py --csv ETTh1.csv --resume auto           go on with what was interrupted
    python tools/forecast.py --checkpoint checkpoints/forecast/ETTh1/96-seed1/unireplknet/best.pth --csv new.csv
                                                                     what comes after the end of new.csv

How a series becomes a picture. UniRepLKNet's authors cut a series of many variables into nodes, treat each node as an
image of its own, and reshape its embedding, a vector for each point of time, into a map of one channel (paper,
arXiv:2311.15599, "Generalizing UniRepLKNet beyond Image"). Here each column is a node, and its last LOOKBACK periods
(days) are written like a calendar: one row of pixels for each day, one pixel for each hour. The neighbours of a pixel
are the hour and the day before, and one large kernel sees both. The picture of 21 days of 24 hours shrinks to one pixel
in the last stage, so that pooling loses no place of it, and the classifier has one output for each step of the forecast
instead of each class. A day of more than 32 rows fills several channels (see `fold`). The network's structure is not
touched. All columns pass through the same network: this gives it more to learn from, and on little data it generalises
better than mixing columns (PatchTST, arXiv:2211.14730).

What the network has to say. Instance normalisation (RevIN, Kim et al., ICLR 2022) takes level and size of each window
away, and gives them back to its forecast. Here the level is one for each hour of the day: the mean day of the window.
So the network's output is what the future will have besides the mean day. There is no other path around the network.

Beside it, with the same data and steps, DLinear (Zeng et al., AAAI 2023) is trained, which many networks do not beat.
The last period again is the floor; the mean of the LOOKBACK periods shows what the network adds.

Protocol: three parts by SPLIT; each column is z-scored by its training part; errors are those of z-scored values, over
every window of the test part. The best epoch is chosen by the validation part; what the constants rest on stands in
benchmarks/forecast.md.

Leaves in checkpoints/forecast/<name of the CSV file>/:

    results.csv, results.json       MSE and MAE of each horizon, seed and method; with constants and versions
    <horizon>.png, <horizon>.csv    forecasts of the first seed against the truth, in the CSV file's units
    <horizon>-seed<seed>/<method>/  last.pth, best.pth, log.csv

With --checkpoint it leaves forecast.csv and forecast.png in results/.

Exit status: 0; 1 an error; 2 a wrong option; 130 after Ctrl-C and 143 after SIGTERM, saved and ready to be continued.
"""

import csv
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # ema.py, models/ and common/
import models  # noqa: F401  registers the UniRepLKNet variants with timm
from common.checkpoint import check_finite, load_checkpoint, load_newest, save_checkpoint
from common.dataset import seed_everything
from common.device import choose_device, keep_freed_memory
from common.faults import copy_tensors, first_non_finite_layer
from common.faults import Interrupt, Stopped
from common.options import UserError, read_constants, run
from common.plots import plot_forecasts
from common.run_folder import lock, set_aside
from common.schedule import warmup_cosine
from common.series import choose_period, read_series, split_rows, split_windows
from ema import ModelEma

# --- data
CSV: str = "ETTh1.csv"  # file with a column of dates, a header, and numbers at equal intervals
DATE: str = ""  # column of the dates, such as 2016-07-01 13:00:00; "": "date", or what CHECKPOINT says
COLUMNS: list[str] = []  # number columns to learn from; []: all
TARGETS: list[str] = []  # those of COLUMNS that are forecast and measured; []: all
ENCODING: str = "utf-8-sig"  # of the file; utf-8-sig also reads files with a byte order mark
SPLIT: list[float] = [12, 4, 4]  # training, validation, test: months of 30 days; or, with sum 1, shares of the rows
PERIOD: int = 0  # rows after which the series repeats itself; 0: those of a day, or of a week where a day has under 4
LOOKBACK: int = 21  # periods that are seen; up to 32 of them the network's last map is one pixel
HORIZONS: list[int] = [96, 192, 336, 720]  # rows to forecast; a network is trained for each

# --- network
MODEL: str = "unireplknet_a"  # unireplknet_a f p n t s b l xl
DEPTHS: list[int] | None = [1, 1, 1, 1]  # blocks in each stage; None: MODEL's own
DIMS: list[int] | None = [8, 16, 32, 64]  # channels in each stage; None: MODEL's own
KERNELS: list[int] | None = [13, 5, 3, 3]  # kernel size in each stage, here the whole map; None: MODEL's own
LAYER_SCALE: float = 0.1  # first value of each block's layer scale; 0: none
DROPOUT: float = 0.5  # before the head; 0: off
DROP_PATH: float = 0.0  # stochastic depth: probability that the last block is skipped; 0: off

# --- optimisation
LOSS: str = "mae"  # what is minimised: "mae", which outliers move least, "mse", or "huber" between them
MIXUP: float = 1.0  # alpha of the Beta distribution by which two series, of any columns, are averaged; 0: off
FLIP: float = 0.5  # probability that a series is turned upside down; 0: off
EPOCHS: int = 6  # at most
EPOCH_STEPS: int = 100  # steps of an epoch, after which the network is validated
BATCH_SIZE: int = 256  # windows of one column in a step, drawn at random
LEARNING_RATE: float = 2e-3  # highest learning rate
MIN_LEARNING_RATE: float = 1e-6  # learning rate at the end
WARMUP_STEPS: int = 50  # steps in which the learning rate rises to its highest; 0: off
WEIGHT_DECAY: float = 0.05  # AdamW's, on matrices and kernels only; 0: off
CLIP_GRAD: float = 1.0  # largest norm of the gradient of one step; 0: off
EMA_DECAY: float = 0.99  # 1 / (1 - EMA_DECAY) is about the number of steps whose weights are averaged
PATIENCE: int = 3  # epochs without a better validation MSE after which training ends; 0: off
MAX_SKIPPED: int = 10  # steps in a row with a loss or gradient that is not finite, after which the run stops

# --- DLinear, as published for the ETT data
DLINEAR_LOOKBACK: int = 336  # rows that DLinear sees
DLINEAR_LEARNING_RATE: float = 5e-3  # DLinear's highest learning rate; its loss is the MSE

# --- run
CHECKPOINT: str = ""  # "": train; a best.pth: forecast what comes after the end of CSV
DEVICE: str = "auto"  # "auto": cuda, else mps, else cpu; or one of these, or such as "cuda:1"
SEEDS: list[int] = [1]  # a run for each: first weights, order of the windows, Mixup and dropout
RESUME: str = ""  # "": new runs; "auto": go on with those that are in OUTPUT
OUTPUT: str = "checkpoints/forecast"  # folder that holds <name of the CSV file>/
RESULTS: str = "results"  # folder for what CHECKPOINT forecasts; files of an earlier call are replaced

LOSSES = dict(mae=F.l1_loss, mse=F.mse_loss, huber=F.smooth_l1_loss)
LARGEST_EDGE = 32  # of a picture that the network's five halvings turn into one pixel
NO_EFFECT = ("CSV", "CHECKPOINT", "DEVICE", "SEEDS", "HORIZONS", "RESUME", "OUTPUT", "RESULTS")  # on what is trained
REQUIRED = ("arch", "model_args", "state_dict_ema", "lookback", "horizon", "period", "columns", "mean", "std")


def normalise(x, period):
    """Take the mean period and the size of a window away (RevIN, with a mean for each place of the period).

    Args:
        x: (..., periods * period).
        period: rows of one.

    Returns:
        (z (..., periods, period) with mean 0 in each column, day (..., 1, period), std (..., 1, 1)).
    """
    std = (x.var(-1, unbiased=False) + 1e-5).sqrt()[..., None, None]
    x = x.unflatten(-1, (-1, period))
    day = x.mean(-2, keepdim=True)
    return (x - day) / std, day, std


def restore(forecast, day, std):
    """The inverse of `normalise` for what follows on the window: (..., horizon) -> (..., horizon)."""
    horizon = forecast.shape[-1]
    periods = math.ceil(horizon / day.shape[-1])
    return forecast * std.squeeze(-1) + day.expand(*day.shape[:-2], periods, -1).flatten(-2)[..., :horizon]


def fold(z, channels):
    """Periods of one column as a picture: (N, periods, period) -> (N, channels, periods, period / channels).

    Row: period (day); column: place in it (hour); with several channels a column holds as many rows of the series.
    """
    return z.unflatten(-1, (-1, channels)).permute(0, 3, 1, 2)


def count_channels(period):
    """The fewest channels that keep the picture's width at `LARGEST_EDGE`: 1 for 24, 3 for 96."""
    return next(n for n in range(1, period + 1) if period % n == 0 and period // n <= LARGEST_EDGE)


class Forecaster(nn.Module):
    """UniRepLKNet on windows folded by their period: (N, C, lookback) -> (N, C, horizon), each column by itself.

    Args:
        network: (N, channels, periods, period / channels) -> (N, horizon).
        channels: see `fold`.
        period: rows of one.
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


class DLinear(nn.Module):
    """DLinear (Zeng et al., AAAI 2023, Section 4): (N, C, lookback) -> (N, C, horizon).

    A linear layer on the moving average over 25 rows, and one on what is left of it; the same for all columns.
    """

    def __init__(self, lookback, horizon):
        super().__init__()
        self.trend = nn.Linear(lookback, horizon)
        self.rest = nn.Linear(lookback, horizon)

    def forward(self, x):
        trend = F.avg_pool1d(F.pad(x, (12, 12), mode="replicate"), kernel_size=25, stride=1)
        return self.trend(trend) + self.rest(x - trend)


class Repeat(nn.Module):
    """The mean of the last `periods` periods, again and again: (N, C, lookback) -> (N, C, horizon)."""

    def __init__(self, period, periods, horizon):
        super().__init__()
        self.period = period
        self.periods = periods
        self.horizon = horizon

    def forward(self, x):
        _, day, std = normalise(x[..., -self.period * self.periods :], self.period)
        return restore(x.new_zeros(*x.shape[:2], self.horizon), day, std)


def network_arguments(horizon, period):
    """What timm builds MODEL from."""
    arguments = dict(in_chans=count_channels(period), num_classes=horizon, drop_rate=DROPOUT)
    arguments |= dict(drop_path_rate=DROP_PATH, layer_scale_init_value=LAYER_SCALE)
    if DEPTHS is not None:
        arguments["depths"] = list(DEPTHS)
    if DIMS is not None:
        arguments["dims"] = list(DIMS)
    if KERNELS is not None:
        if DEPTHS is None or not len(KERNELS) == len(DEPTHS) == 4:
            raise UserError(
                f"KERNELS needs four values, and four in DEPTHS, got {KERNELS} and {DEPTHS}; or set it to none"
            )
        arguments["kernel_sizes"] = [[size] * depth for size, depth in zip(KERNELS, DEPTHS)]
    return arguments


def create_model(arch, arguments, period):
    """The model of a checkpoint: "dlinear", or a network that timm knows inside a `Forecaster`."""
    if arch == "dlinear":
        return DLinear(**arguments)
    if arch not in timm.list_models("unireplknet*"):
        raise UserError(f"MODEL {arch!r} is unknown; choose one of {', '.join(timm.list_models('unireplknet*'))}")
    try:
        return Forecaster(timm.create_model(arch, **arguments), arguments["in_chans"], period)
    except ValueError as error:
        raise UserError(f"DEPTHS, DIMS and KERNELS do not fit: {error}") from error


def choose_methods(horizon, period):
    """What is trained: {name: what differs between the methods}; `arguments` are those of `create_model`."""
    network = dict(arch=MODEL, arguments=network_arguments(horizon, period), lookback=LOOKBACK * period)
    network |= dict(loss=LOSS, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, mixup=MIXUP, flip=FLIP)
    dlinear = dict(arch="dlinear", arguments=dict(lookback=DLINEAR_LOOKBACK, horizon=horizon))
    dlinear |= dict(lookback=DLINEAR_LOOKBACK, loss="mse", learning_rate=DLINEAR_LEARNING_RATE)
    dlinear |= dict(weight_decay=0.0, mixup=0.0, flip=0.0)
    return dict(unireplknet=network, dlinear=dlinear)


@dataclass
class Fit:
    """All that changes while a model is trained. A checkpoint holds all of it, and nothing else is needed to go on:
    windows, Mixup and dropout follow from the seed and the number of the step."""

    model: nn.Module
    ema: ModelEma
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # epochs that are finished
    step: int = 0  # steps of the next epoch that are done
    total: float = 0.0  # their loss, summed
    seconds: float = 0.0  # of the whole training
    skipped: int = 0  # of these steps, those left out, since loss or gradient was not finite
    skipped_in_a_row: int = 0
    best_mse: float = math.inf  # on the validation part
    best_epoch: int = 0
    history: list = field(default_factory=list)  # one dict for each finished epoch

    COUNTERS = ("epoch", "step", "total", "seconds", "skipped", "skipped_in_a_row", "best_mse", "best_epoch", "history")

    @property
    def finished(self):
        return self.epoch >= EPOCHS or bool(PATIENCE and self.epoch - self.best_epoch >= PATIENCE)

    def state(self):
        """What a checkpoint holds: plain types and tensors."""
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


def draw_batch(windows, mixup, flip):
    """BATCH_SIZE windows of one column each, any of any: (BATCH_SIZE, 1, lookback + horizon), augmented.

    The sum of two series has the sum of their futures, so Mixup (arXiv:1710.09412) invents none; nor does turning a
    series upside down. Windows overlap so much that without both a network soon knows them by heart.
    """
    count, columns = windows.shape[:2]
    index = torch.randint(count * columns, (BATCH_SIZE,))
    batch = windows[(index // columns).to(windows.device), (index % columns).to(windows.device)]
    share = torch.ones(BATCH_SIZE, 1)
    if mixup:
        share = torch.distributions.Beta(mixup, mixup).sample((BATCH_SIZE, 1))
    sign = 1 - 2 * (torch.rand(BATCH_SIZE, 1) < flip).float()
    share, batch = share.to(batch), sign.to(batch) * batch
    return (share * batch + (1 - share) * batch.roll(1, 0))[:, None]


def train_one_epoch(fit, windows, method, seed, interrupt, description):
    """EPOCH_STEPS steps, or what is left of them.

    Returns:
        Mean loss of the steps that were not skipped; None if all were.

    Raises:
        Stopped: after SIGTERM or Ctrl-C; what was trained is in `fit`.
        UserError: if MAX_SKIPPED steps in a row have no finite loss and gradient.
    """
    model = fit.model.train()
    lookback, loss_function = method["lookback"], LOSSES[method["loss"]]
    buffers = list(model.buffers())
    buffers_before = [buffer.clone() for buffer in buffers]  # a forward pass changes those of batch norms
    started = time.perf_counter() - fit.seconds
    bar = dict(desc=f"{description}, epoch {fit.epoch + 1}/{EPOCHS}", unit="step", total=EPOCH_STEPS, leave=False)
    for step in tqdm(range(fit.step, EPOCH_STEPS), initial=fit.step, **bar):
        number = fit.epoch * EPOCH_STEPS + step
        seed_everything(seed, "step", number)
        lr = warmup_cosine(number, EPOCHS * EPOCH_STEPS, WARMUP_STEPS, method["learning_rate"], MIN_LEARNING_RATE)
        for group in fit.optimizer.param_groups:
            group["lr"] = lr
        batch = draw_batch(windows, method["mixup"], method["flip"])
        seen, future = batch[..., :lookback], batch[..., lookback:]
        copy_tensors(buffers, buffers_before)
        loss = loss_function(model(seen), future)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD or math.inf)
        if loss.isfinite() and norm.isfinite():
            fit.optimizer.step()
            fit.ema.update(model)
            fit.total += loss.item()
            fit.skipped_in_a_row = 0
        else:
            copy_tensors(buffers_before, buffers)
            fit.skipped += 1
            fit.skipped_in_a_row += 1
            if fit.skipped_in_a_row >= MAX_SKIPPED:
                layer = first_non_finite_layer(model, seen)
                origin = f"the first layer with a non-finite output is {layer}" if layer else "every layer is finite"
                raise UserError(
                    f"{description}: loss or gradient was not finite in {MAX_SKIPPED} steps in a row, the last of them "
                    f"epoch {fit.epoch + 1}, step {step + 1} ({origin}); lower LEARNING_RATE. None of them reached the "
                    "weights, and what was saved is good"
                )
        fit.optimizer.zero_grad(set_to_none=True)
        fit.step = step + 1
        fit.seconds = time.perf_counter() - started
        if interrupt.signal is not None:
            raise Stopped
    return fit.total / (EPOCH_STEPS - fit.skipped) if fit.skipped < EPOCH_STEPS else None


@torch.inference_mode()
def evaluate(model, windows, lookback, targets, interrupt=None):
    """Errors over all `windows` and over the columns whose numbers are `targets`.

    Args:
        model: (N, C, lookback) -> (N, C, horizon); a network is merged first, which changes nothing but the time.
        windows: (windows, C, lookback + horizon), z-scored.

    Returns:
        dict: mse, mae.

    Raises:
        Stopped: after SIGTERM or Ctrl-C.
    """
    model = merge(model)
    windows = windows[:, targets]
    squares, absolutes = 0.0, 0.0
    for batch in windows.split(max(1, 512 // len(targets))):
        error = (model(batch[..., :lookback]) - batch[..., lookback:]).cpu().double()
        squares += error.square().sum().item()
        absolutes += error.abs().sum().item()
        if interrupt is not None and interrupt.signal is not None:
            raise Stopped
    count = windows.shape[0] * windows.shape[1] * (windows.shape[2] - lookback)
    return dict(mse=squares / count, mae=absolutes / count)


def merge(model):
    """`model` in eval mode, its network in the inference structure (a copy)."""
    return reparameterize_model(model.eval())


def train(method, parts, about, folder, device, interrupt, description):
    """Train a model, or go on, and leave last.pth, best.pth and log.csv in `folder`.

    Args:
        method: a value of `choose_methods`.
        parts: training and validation windows first.
        about: what checkpoints tell of the series and the run, such as its seed.

    Returns:
        (the model of the best epoch, in its inference structure; its checkpoint).
    """
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(about["seed"])
    model = create_model(method["arch"], method["arguments"], about["period"]).to(device)
    optimizer = create_optimizer_v2(model, "adamw", method["learning_rate"], method["weight_decay"])
    fit = Fit(model, ModelEma(model, EMA_DECAY), optimizer)
    about = about | dict(arch=method["arch"], model_args=method["arguments"], lookback=method["lookback"])
    checkpoint, path = load_newest(folder / "last.pth", REQUIRED)
    if checkpoint is not None:
        refuse_changes(checkpoint, about, path)
        fit.load(checkpoint)

    def save(name, keep=1):
        state = fit.state()
        check_finite(state["state_dict"], state["state_dict_ema"])
        save_checkpoint(about | state, folder / name, keep)

    targets = [about["columns"].index(name) for name in about["targets"]]
    try:
        while not fit.finished:
            loss = train_one_epoch(fit, parts[0], method, about["seed"], interrupt, description)
            figures = evaluate(fit.ema.ema, parts[1], method["lookback"], targets, interrupt)
            fit.epoch += 1
            row = dict(epoch=fit.epoch, train_loss=loss, val_mse=figures["mse"], val_mae=figures["mae"])
            fit.history.append(row | dict(skipped=fit.skipped, seconds=fit.seconds))
            fit.step, fit.total, fit.skipped = 0, 0.0, 0
            # best.pth before last.pth: a run that is killed in between repeats this and finds the epoch the best again.
            if figures["mse"] < fit.best_mse or not (folder / "best.pth").is_file():
                fit.best_mse, fit.best_epoch = figures["mse"], fit.epoch
                save("best.pth")
            save("last.pth", keep=2)
    except Stopped:
        save("last.pth", keep=2)
        raise
    write_rows(fit.history, folder / "log.csv")
    best = load_checkpoint(folder / "best.pth", REQUIRED)
    return open_model(best, device), best


def refuse_changes(checkpoint, about, path):
    """UserError if the run of `checkpoint` had other constants or another series than this one."""
    for name, value in about["config"].items():
        if checkpoint["config"].get(name) != value:
            raise UserError(
                f"cannot continue {path}: {name} was {checkpoint['config'].get(name)!r}, is {value!r}; set it back, or "
                "start anew without RESUME"
            )
    if any(checkpoint[name] != about[name] for name in ("columns", "mean", "std", "interval", "ends")):
        raise UserError(f"cannot continue {path}: the series in {CSV} is another one; start anew without RESUME")


def open_model(checkpoint, device):
    """The model of a checkpoint, with its EMA weights and in its inference structure."""
    model = create_model(checkpoint["arch"], checkpoint["model_args"], checkpoint["period"])
    model.load_state_dict(checkpoint["state_dict_ema"])
    return merge(model.to(device))


def write_rows(rows, path):
    """Write a list of dicts as CSV."""
    with open(path, "w", newline="", encoding="utf-8-sig") as file:  # with a byte order mark, for Excel
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@torch.inference_mode()
def write_forecasts(series, about, horizon, windows, forecasters, path):
    """Write <horizon>.csv and <horizon>.png: the test windows that follow on each other, and the middle one of them.

    Args:
        series: the `Series`.
        about: see `train`.
        windows: of the test part, (windows, C, lookback + horizon), with the longest lookback.
        forecasters: {name: (model, lookback)}.
        path: the PNG file; the CSV file lies beside it.
    """
    targets = [about["columns"].index(name) for name in about["targets"]]
    lookback = windows.shape[2] - horizon
    mean, std = (torch.tensor(about[name])[targets, None] for name in ("mean", "std"))

    def to_units(z):
        return (z[:, targets].cpu().double() * std + mean).numpy()

    tiles = windows[::horizon]
    truth = to_units(tiles)  # (tiles, targets, lookback + horizon)
    forecasts = {}
    for name, (model, own) in forecasters.items():
        forecasts[name] = to_units(model(tiles[..., lookback - own : lookback]))
    rows = []
    for tile in range(len(tiles)):
        first = about["ends"][1] + tile * horizon
        for step in range(horizon):
            row = dict(date=series.dates[first + step], seen_until=series.dates[first - 1])
            for place, target in enumerate(about["targets"]):
                row[target] = f"{truth[tile, place, lookback + step]:.6g}"
                row |= {f"{target} {name}": f"{forecasts[name][tile, place, step]:.6g}" for name in forecasts}
            rows.append(row)
    write_rows(rows, path.with_suffix(".csv"))

    middle = len(tiles) // 2
    first = about["ends"][1] + middle * horizon
    plot_forecasts(
        about["targets"],
        series.dates[first - min(lookback, horizon) : first + horizon],
        truth[middle, :, -horizon - min(lookback, horizon) :],
        {name: forecast[middle] for name, forecast in forecasts.items()},
        path,
    )


def format_result(row):
    """One line for one result; the header for None."""
    columns = [("horizon", ">7"), ("seed", ">4"), ("method", "<12"), ("epoch", ">5"), ("val_mse", ">8.4f")]
    columns += [("mse", ">8.4f"), ("mae", ">8.4f"), ("seconds", ">7.0f")]
    cells = []
    for name, spec in columns:
        value = name if row is None else row[name]
        width = spec.split(".")[0]
        cells.append(f"{'-' if value is None else value:{width if value is None or row is None else spec}}")
    return "  ".join(cells)


def format_table(results):
    """Mean over the seeds, and its spread, of each horizon and method, as lines of text."""
    lines = [f"{'horizon':>7}  {'method':12} {'MSE':>8} {'spread':>8}  {'MAE':>8} {'spread':>8}  {'windows':>7}"]
    for horizon in HORIZONS:
        for name in dict.fromkeys(row["method"] for row in results):
            rows = [row for row in results if row["horizon"] == horizon and row["method"] == name]
            line = f"{horizon:7}  {name:12}"
            for key in ("mse", "mae"):
                values = [row[key] for row in rows]
                spread = f"{statistics.stdev(values):8.4f}" if len(values) > 1 else f"{'-':>8}"
                line += f" {statistics.mean(values):8.4f} {spread} "
            lines.append(f"{line} {rows[0]['windows']:7}")
    return "\n".join(lines)


def open_series():
    """Read, check and describe what CSV holds.

    Returns:
        (`Series`; float32 tensor (rows, columns), z-scored by the training part; what checkpoints tell of them).
    """
    series = read_series(CSV, DATE or "date", COLUMNS, ENCODING)
    ends = split_rows(len(series.dates), series.interval, SPLIT)
    mean, std = series.values[: ends[0]].mean(0), series.values[: ends[0]].std(0)
    for name, value in zip(series.columns, std):
        if not 1e-9 < value < 1e150:
            raise UserError(
                f"{CSV}: column {name} is constant in the training part, or its numbers are too large to compute with "
                f"(standard deviation {value:g}); leave it out by COLUMNS"
            )
    unknown = [name for name in TARGETS if name not in series.columns]
    if unknown:
        raise UserError(f"TARGETS names {unknown[0]!r}, which is none of the columns {', '.join(series.columns)}")
    about = dict(
        columns=series.columns,
        targets=TARGETS or series.columns,
        date=DATE or "date",
        interval=series.interval.total_seconds(),
        ends=list(ends),  # rows before which training, validation and test end
        period=PERIOD or choose_period(series.interval),
        mean=mean.tolist(),
        std=std.tolist(),
        config={name: globals()[name] for name in read_constants(__file__) if name not in NO_EFFECT},
        versions=dict(python=platform.python_version(), torch=str(torch.__version__), timm=timm.__version__),
    )
    return series, torch.tensor((series.values - mean) / std, dtype=torch.float32), about


def train_all(interrupt):
    """Train and test every method for every horizon and seed."""
    device = choose_device(DEVICE)
    if device.type == "cpu":
        keep_freed_memory()
    series, values, about = open_series()
    values, ends, period = values.to(device), about["ends"], about["period"]
    targets = [series.columns.index(name) for name in about["targets"]]
    longest = max(LOOKBACK * period, DLINEAR_LOOKBACK)
    for horizon in HORIZONS:  # a part that is too short is to be noticed at the start
        split_windows(values, ends, longest, horizon)
    folder = Path(OUTPUT, Path(CSV).stem)
    lock(folder).__enter__()
    if not RESUME:
        set_aside(folder)
    network = create_model(MODEL, network_arguments(HORIZONS[0], period), period)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    channels = count_channels(period)
    print(f"series      {CSV}: {len(series.dates)} rows, {series.interval} apart, from {series.dates[0]}")
    print(f"columns     {len(series.columns)}; forecast: {', '.join(about['targets'])}")
    print(f"parts       training ends before row {ends[0]}, validation before {ends[1]}, test before {ends[2]}")
    print(f"picture     {LOOKBACK} periods x {period // channels}, {channels} channels")
    print(f"network     {MODEL}, {parameters:,} parameters for horizon {HORIZONS[0]}")
    print(f"device      {device}, torch {torch.__version__}, timm {timm.__version__}\n\n{format_result(None)}")

    results = []
    for horizon in HORIZONS:
        for seed in SEEDS:
            models_of_seed = {}
            for name, method in choose_methods(horizon, period).items():
                parts = split_windows(values, ends, method["lookback"], horizon)
                place = folder / f"{horizon}-seed{seed}" / name
                tells = about | dict(horizon=horizon, seed=seed)
                model, best = train(method, parts, tells, place, device, interrupt, f"{horizon} seed {seed} {name}")
                row = dict(horizon=horizon, seed=seed, method=name, windows=len(parts[2]))
                row |= dict(epoch=best["best_epoch"], seconds=best["seconds"], val_mse=best["best_mse"])
                results.append(row | evaluate(model, parts[2], method["lookback"], targets, interrupt))
                print(format_result(results[-1]))
                models_of_seed[name] = model, method["lookback"]
            if seed == SEEDS[0]:
                parts = split_windows(values, ends, longest, horizon)
                write_forecasts(series, about, horizon, parts[2], models_of_seed, folder / f"{horizon}.png")
        for name, periods in (("mean period", LOOKBACK), ("last period", 1)):
            parts = split_windows(values, ends, periods * period, horizon)
            row = dict(horizon=horizon, seed=None, method=name, windows=len(parts[2]), epoch=None, seconds=None)
            model = Repeat(period, periods, horizon)
            for part, prefix in ((parts[1], "val_"), (parts[2], "")):
                figures = evaluate(model, part, periods * period, targets, interrupt)
                row |= {f"{prefix}mse": figures["mse"]} if prefix else figures
            results.append(row)
            print(format_result(row))

    write_rows(results, folder / "results.csv")
    text = json.dumps(about | dict(results=results), indent=2, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    print(f"\n{format_table(results)}\n\nin {folder}")


@torch.inference_mode()
def forecast():
    """Forecast what comes after the end of CSV by CHECKPOINT; where CSV is long enough, also measure on it."""
    checkpoint = load_checkpoint(CHECKPOINT, REQUIRED)
    device = choose_device(DEVICE)
    columns, lookback, horizon = checkpoint["columns"], checkpoint["lookback"], checkpoint["horizon"]
    series = read_series(CSV, DATE or checkpoint["date"], columns, ENCODING)
    interval = timedelta(seconds=checkpoint["interval"])
    if series.interval != interval:
        raise UserError(
            f"the rows of {CSV} are {series.interval} apart, and those that {CHECKPOINT} was trained on {interval}; "
            "bring them to the same interval, or train anew"
        )
    if len(series.dates) < lookback:
        raise UserError(
            f"{CSV} has {len(series.dates)} rows, and {CHECKPOINT} looks back on {lookback}; give more rows"
        )
    model = open_model(checkpoint, device)
    mean, std = (torch.tensor(checkpoint[name], dtype=torch.float64) for name in ("mean", "std"))
    values = ((torch.from_numpy(series.values) - mean) / std).float().to(device)
    targets = [columns.index(name) for name in checkpoint["targets"]]
    future = model(values[-lookback:].T[None])[0].T.cpu().double() * std + mean  # (horizon, C)
    dates = [series.dates[-1] + interval * (step + 1) for step in range(horizon)]

    folder = Path(RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        dict(date=date) | {columns[target]: f"{row[target]:.6g}" for target in targets}
        for date, row in zip(dates, future.tolist())
    ]
    write_rows(rows, folder / "forecast.csv")
    seen = min(len(series.dates), max(lookback, horizon) // 2)
    plot_forecasts(
        checkpoint["targets"],
        series.dates[-seen:] + dates,
        series.values[-seen:, targets].T,
        {checkpoint["arch"]: future[:, targets].T.numpy()},
        folder / "forecast.png",
    )
    print(f"model       {CHECKPOINT}: {checkpoint['arch']}, looks back on {lookback} rows")
    print(f"forecast    {horizon} rows from {dates[0]} to {dates[-1]} in {folder / 'forecast.csv'}")
    if len(values) >= lookback + horizon:
        windows = values.unfold(0, lookback + horizon, 1)
        period = checkpoint["period"]
        for name, measured in ((checkpoint["arch"], model), ("last period", Repeat(period, 1, horizon))):
            figures = evaluate(measured, windows, lookback, targets)
            errors = f"MSE {figures['mse']:.4f}, MAE {figures['mae']:.4f} (z-scored)"
            print(f"{name:11} {errors} over {len(windows)} windows of {CSV}")


def main():
    least = dict(LOOKBACK=2, DLINEAR_LOOKBACK=1, EPOCHS=1, EPOCH_STEPS=1, BATCH_SIZE=2, MAX_SKIPPED=1, PERIOD=0)
    for name, value in least.items():
        if globals()[name] < value:
            raise UserError(f"{name} must be at least {value}, got {globals()[name]}")
    if LOSS not in LOSSES:
        raise UserError(f"LOSS must be one of {', '.join(LOSSES)}, got {LOSS!r}")
    if not HORIZONS or min(HORIZONS) < 1 or not SEEDS:
        raise UserError(
            f"HORIZONS and SEEDS must hold at least one number, HORIZONS above 0, got {HORIZONS} and {SEEDS}"
        )
    if RESUME not in ("", "auto"):
        raise UserError(f'RESUME must be "" or "auto", got {RESUME!r}')
    if CHECKPOINT:
        return forecast()
    with Interrupt() as interrupt:
        try:
            return train_all(interrupt)
        except Stopped:
            print("stopped and saved; the same command with --resume auto goes on")
            return interrupt.exit_status


if __name__ == "__main__":
    run(main)
