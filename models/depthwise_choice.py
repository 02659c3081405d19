"""Measure which way to compute the depthwise convolutions of a network is fastest on this machine.

    choice = choose_convolutions(model, [Use((224, 224), batch_size=32, steps=5000)])
    print(choice.line)              convolutions  12 of 13 groups 3.1 times as fast as the default, measured in 14 s
    checkpoint["convolutions"] = choice.record

Convolutions that share an input, those of a `DilatedReparamBlock`, form a group. For each group:

1. Every method of models/depthwise_methods.py is timed for each convolution and pass. In each of the two memory formats
   the fastest ones form a plan.
2. A plan is verified: output and gradients of two images against PyTorch in float64, in memory that was filled with
   NaN before, three times with equal bits. A method that fails is left out.
3. The whole group, forward and backward, is timed by default and as planned, in turns; for small maps on a CPU also as
   one matrix product. The default stays unless another is faster by more than 5 %.

The groups that a run spends most time in come first, and all of it takes at most 30 seconds and 5 % of the run. Results
are kept in a file in PyTorch's cache folder, for this machine and these versions. A run that is resumed goes on with
the choice in its checkpoint, so that it computes the same bits.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from models import depthwise, depthwise_methods
from models.depthwise import DepthwiseConv2d, Key
from models.depthwise_methods import LAYOUTS, STACKED, Plan, layout_of, to_layout
from models.unireplknet import DilatedReparamBlock

MAX_SECONDS = 30.0  # that measuring may take
MAX_FRACTION = 0.05  # of the run that it may take
CLEARLY_FASTER = 0.95  # fraction of the default's time below which another plan replaces it
TURNS = 7  # timings of default and plans in turns
FEW_TURNS = 2  # that are enough where one of them takes less than `OBVIOUS` of the time of the other
OBVIOUS = 0.7
RANKED_IMAGES = 4  # with which methods are timed on a CPU
COMPARED_IMAGES = 8  # with which groups are timed first on a CPU
MAX_STACKED_MAP = 64  # pixels
PRUNE = 3.0  # a method this many times as slow as the best is not timed again
VERIFIED_IMAGES = 2
FLOAT32_ERROR = 1e-5  # largest allowed error relative to the largest value; lower precisions: 2 epsilon


class Use(NamedTuple):
    """Images that a program computes."""

    size: tuple[int, int]  # (height, width) in pixels
    batch_size: int
    steps: int | None = None  # batches in all; None: unknown, so that only `seconds` limits the measurement
    training: bool = True  # with gradients; False: the forward pass only


class Group(NamedTuple):
    """Depthwise convolutions with the same input."""

    channels: int
    height: int
    width: int
    kernels: tuple[tuple[int, int], ...]  # (kernel size, dilation), the large one first
    bias: bool  # whether the structure is the merged one, which has no batch norms
    layout: str  # memory format of the input, a key of `LAYOUTS`
    training: bool
    batch_size: int

    def __str__(self):
        kernels = " ".join(f"{k}/{d}" for k, d in self.kernels)
        structure = f"{'merged ' if self.bias else ''}{'training' if self.training else 'inference'}"
        return f"{self.batch_size} x {self.channels} x {self.height} x {self.width} {self.layout} {structure} {kernels}"

    def keys(self, device: torch.device, dtype: torch.dtype) -> list[Key]:
        """The key in `depthwise.PLANS` of each convolution."""
        name = str(dtype).removeprefix("torch.")
        return [
            Key(device.type, name, self.training, self.channels, self.height, self.width, k, d) for k, d in self.kernels
        ]


class Choice(NamedTuple):
    """What `choose_convolutions` found."""

    record: dict  # for a checkpoint: {"machine": in words, "plans": {a `Key` as text: plan, "" for the default}}
    line: str  # what was chosen and what it cost, in words


def choose_convolutions(
    model: nn.Module,
    uses: Sequence[Use],
    *,
    dtype: torch.dtype = torch.float32,
    seconds: float = MAX_SECONDS,
    measure: bool = True,
    stored: dict | None = None,
) -> Choice:
    """Choose how the depthwise convolutions of `model` are computed, in this process from now on.

    With several processes all must call it; process 0 decides. Call it before torch.compile.

    Args:
        model: on its device; a network without depthwise convolutions of ours is left alone.
        uses: what it will compute.
        dtype: in which convolutions compute: that of autocast where it is on.
        seconds: that measuring may take; also at most 5 % of what `uses` will take.
        measure: False verifies the default and never times anything, so that nothing depends on the moment.
        stored: `record` of the run that is resumed, {} if it has none, or None for a new run.

    Raises:
        ValueError: for a wrong value of UNIREPLKNET_DEPTHWISE.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        return choose(model, uses, dtype, seconds, measure, stored)


def choose(model, uses, dtype, seconds, measure, stored):
    """`choose_convolutions`, which may draw random numbers."""
    started = time.perf_counter()
    device = next(model.parameters()).device
    groups = find_groups(model, uses)
    machine = describe_machine(device)
    depthwise.PLANS.clear()
    keys = [key for group in groups for key in group.keys(device, dtype)]
    if not groups:
        return Choice(dict(machine=machine, plans={}), "")
    before = None if stored is None else stored.get("machine", machine)
    if before == machine:  # a run goes on: the default for all that its checkpoint does not name
        plans = {key: stored.get("plans", {}).get(to_text(key), "") for key in keys}
        line = f"as this run began, {count_plans(plans)}"
    elif device.type not in ("cpu", "cuda"):
        plans, line = dict.fromkeys(keys, ""), "default"
    elif not measure:
        plans = agree(lambda: {key: plan for group in groups for key, plan in verified_default(group, device, dtype)})
        line = f"{count_plans(plans)}, verified and not timed"
    elif depthwise.environment_choice() != "auto":
        plans, line = dict.fromkeys(keys, ""), "default"
    else:
        plans, line = agree(lambda: decide(groups, device, dtype, seconds, started))
        plans, refused = verify_everywhere(groups, plans, device, dtype)
        line += f"; default for {refused} of them, since another process refused them" if refused else ""
    if before not in (None, machine):
        line += f"; this run had other kernels before ({before}), so its results change by rounding"
    forced = depthwise.environment_choice()
    if forced != "auto":
        overridden = describe_stored(groups, dtype, machine) if stored is None else count_plans(plans)
        line = f"{depthwise.VARIABLE} is {forced!r}, which overrides what was measured ({overridden})"
    install(plans)
    return Choice(dict(machine=machine, plans={to_text(key): plan for key, plan in plans.items()}), line)


def install(plans: dict[Key, str]) -> None:
    """Make the plans those of this process, instead of all others."""
    depthwise.PLANS.clear()
    depthwise.PLANS.update({key: plan for key, plan in plans.items() if plan})
    if "torch._dynamo" in sys.modules:  # networks that are compiled have the plans in them
        torch.compiler.reset()


@contextlib.contextmanager
def installed(plans: dict[Key, str]) -> Iterator[None]:
    """Within this context only these plans hold."""
    before = dict(depthwise.PLANS)
    depthwise.PLANS.clear()
    depthwise.PLANS.update({key: plan for key, plan in plans.items() if plan})
    try:
        yield
    finally:
        depthwise.PLANS.clear()
        depthwise.PLANS.update(before)


def to_text(key: Key) -> str:
    """A key as text: "cpu float32 training 160 28 28 13 1"."""
    return " ".join(map(str, key._replace(training="training" if key.training else "inference")))


def count_plans(plans: dict[Key, str]) -> str:
    """How many of the plans are not the default, in words."""
    changed = sum(map(bool, plans.values()))
    return f"{changed} of {len(plans)} not by default" if changed else "default"


# --- what a network computes


def find_groups(model: nn.Module, uses: Sequence[Use]) -> dict[Group, int | None]:
    """The groups of `model`: {group: how often it is computed, as batches of `Use` times blocks; None if unknown}.

    Runs the network on the device "meta", which computes nothing.
    """
    found: dict[Group, int | None] = {}
    blocks = [module for module in model.modules() if isinstance(module, DilatedReparamBlock)]
    inside = {conv for block in blocks for conv in block.modules()}
    single = [m for m in model.modules() if isinstance(m, DepthwiseConv2d) and m not in inside]
    if not blocks and not single:
        return found
    layout = torch.channels_last if next(model.parameters()).device.type == "cpu" else torch.contiguous_format
    tensors = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    modes = {module: module.training for module in model.modules()}

    def record(module, inputs):
        convs = [m for m in module.modules() if isinstance(m, DepthwiseConv2d)]
        if all(conv.wish == "auto" for conv in convs):
            kernels = tuple((conv.kernel_size[0], conv.dilation[0]) for conv in convs)
            x = inputs[0]
            layout = "nchw" if x.is_contiguous() else "nhwc"
            group = Group(*x.shape[1:], kernels, convs[0].bias is not None, layout, use.training, use.batch_size)
            known = use.steps is not None and found.get(group, 0) is not None
            found[group] = found.get(group, 0) + use.steps if known else None

    hooks = [module.register_forward_pre_hook(record) for module in (*blocks, *single)]
    try:
        model.eval()
        for use in uses:
            images = torch.zeros(1, 3, *use.size, device="meta").contiguous(memory_format=layout)
            with torch.no_grad():
                functional_call(model, tensors, (images,))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return found


def make_step(group: Group, device: torch.device, dtype: torch.dtype, images: int) -> Callable[[], None]:
    """A function that computes `group` once, with the batch norms beside the convolutions, forward and backward."""
    kernel_size = group.kernels[0][0]
    if group.height * group.width == 1:
        images = max(images, 2)  # a batch norm cannot learn from a single value
    if len(group.kernels) > 1:
        module = DilatedReparamBlock(group.channels, kernel_size)
    else:
        module = DepthwiseConv2d(group.channels, kernel_size, group.kernels[0][1], bias=group.bias)
    module = module.to(device, memory_format=LAYOUTS[group.layout]).train(group.training)
    x = draw((images, group.channels, group.height, group.width), device, dtype, group.layout)
    x.requires_grad_(group.training)
    grad = to_layout(torch.ones_like(x), "nhwc")
    inputs = [x, *module.parameters()]

    def step():
        with computing_in(device, dtype), torch.set_grad_enabled(group.training):
            out = to_layout(module(x), "nhwc")  # as the linear layer behind it takes it
        if group.training:
            torch.autograd.grad(out, inputs, grad.to(out.dtype))

    return step


def draw(shape, device, dtype, layout):
    """Random numbers (N, C, H, W), always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return to_layout(torch.randn(shape, generator=generator).to(device, dtype), layout)


def computing_in(device, dtype):
    """Autocast to `dtype`, unless it is float32 or float64."""
    low = dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(device.type, dtype if low else None, enabled=low)


# --- deciding


class Budget:
    """Seconds that may still be spent."""

    def __init__(self, seconds: float, started: float):
        self.seconds, self.started = seconds, started

    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.started)


class Result(NamedTuple):
    """What was measured for a group."""

    plans: list[str]  # of each convolution, all "" for the default
    ratio: float  # time of the default divided by that of the plans
    milliseconds: float  # of the default, for one batch of the group


def decide(groups, device, dtype, seconds, started):
    """Take each group's plans from the file, or measure them as far as the budget goes: ({key: plan}, line)."""
    file = results_file()
    machine = describe_machine(device)
    budget = Budget(seconds, started)
    results = load_results(file, machine)
    known = known_results(groups, dtype, results)
    fresh = {}
    durations = {}  # default, for the whole run
    for group, steps in groups.items():
        if group not in known and budget.left() > 0 and steps != 0:
            images = few_images(group, device, 2)
            duration = best_of([make_step(group, device, dtype, images)], device, 1)[0]
            durations[group] = duration * group.batch_size / images * (steps or 1)
    if None not in groups.values():
        # What the groups take by default is the least that the run takes.
        certain = sum(durations.values())
        certain += sum(result.milliseconds / 1e3 * groups[group] for group, result in known.items())
        budget.seconds = min(budget.seconds, MAX_FRACTION * certain)
    for group in sorted(durations, key=durations.get, reverse=True):
        if budget.left() <= 0:
            break
        measured = measure_group(group, device, dtype, budget)
        if measured is not None:
            fresh[group] = measured[1]
    if fresh:
        save_results(file, machine, {to_name(group, dtype): result for group, result in fresh.items()})
    plans = {}
    for group in groups:
        result = known.get(group) or fresh.get(group)
        for key, plan in zip(group.keys(device, dtype), result.plans if result else [""] * len(group.kernels)):
            plans[key] = plans.get(key) or plan
    line = describe_results(groups, known | fresh)
    if fresh:
        line += f", measured in {time.perf_counter() - started:.0f} s"
        if len(known) + len(fresh) < len(groups):
            line += f"; no time for {len(groups) - len(known) - len(fresh)} of {len(groups)} groups of convolutions"
    elif known:
        line += ", as measured before"
    else:
        line += ", since the run is too short to measure"
    return plans, line


def to_name(group, dtype):
    """A group's name in the file of results."""
    return f"{str(dtype).removeprefix('torch.')} {group}"


def describe_results(groups, results):
    """How many groups gain, and how much all of them, in words."""
    changed = [group for group, result in results.items() if any(result.plans)]
    if not changed:
        return "default"
    weights = {group: results[group].milliseconds * (groups[group] or 1) for group in results}
    gained = sum(weights.values()) / sum(weight / results[group].ratio for group, weight in weights.items())
    return f"{len(changed)} of {len(groups)} groups changed, {gained:.1f} times as fast as the default"


def measure_group(group, device, dtype, budget=None) -> tuple[list["Ranking"], Result] | None:
    """Rank methods, verify the best plans, and time them against the default.

    Returns:
        (ranking of each convolution, result), or None where the budget ends before.
    """
    budget = budget or Budget(math.inf, 0.0)
    images = few_images(group, device, RANKED_IMAGES)
    keys = group.keys(device, dtype)
    rankings = []
    for key in keys:
        rankings.append(rank(group, key, images, device, dtype))
        if budget.left() <= 0:
            return None
    totals = {}
    for layout in LAYOUTS:
        totals[layout] = sum(ranking.best(layout)[1] for ranking in rankings)
    limit = 1.5 * min(totals.values())
    ways = []
    for layout in LAYOUTS:
        if totals[layout] > limit:
            continue
        plans = []
        for ranking, key in zip(rankings, keys):
            plans.append(best_that_is_right(ranking, layout, key, device, dtype))
            if budget.left() <= 0:
                return None
        if any(plans):
            ways.append(plans)
    if may_stack(group, device) and not any(verify(key, STACKED, device, dtype) for key in keys):
        ways.append([STACKED] * len(keys))
    if ways:
        result = duel(group, ways, device, dtype, budget)
        return None if result is None else (rankings, result)
    return rankings, Result([""] * len(keys), 1.0, 1e3 * min(totals.values()) * group.batch_size / images)


def may_stack(group, device):
    """Whether the convolutions of a group are worth being tried as one matrix product."""
    small = group.height * group.width <= MAX_STACKED_MAP
    return group.training and len(group.kernels) > 1 and device.type == "cpu" and small


def few_images(group, device, limit):
    """Images with which a group is timed first. A GPU takes the whole batch, which it must compile kernels for."""
    return group.batch_size if device.type == "cuda" else min(group.batch_size, limit)


def best_that_is_right(ranking, layout, key, device, dtype):
    """The fastest plan in a memory format that is verified, "" for the default."""
    plan, _ = ranking.best(layout)
    while plan and (wrong := verify(key, plan, device, dtype)):
        for which, _ in wrong:
            ranking.forbid(plan, which)
        plan, _ = ranking.best(layout)
    return plan


def duel(group, candidates, device, dtype, budget) -> Result | None:
    """Time a whole group by default and by each list of plans, in turns."""
    keys = group.keys(device, dtype)
    ways = [{}, *(dict(zip(keys, plans)) for plans in candidates)]
    images = few_images(group, device, COMPARED_IMAGES)
    while True:
        step = make_step(group, device, dtype, images)
        functions = [functools.partial(run_planned, step, way) for way in ways]
        times = time_in_turns(functions, device, TURNS, budget)
        if times is None:
            return None
        fastest = min(range(1, len(ways)), key=lambda index: min(times[index]))
        default, ours = min(times[0]), min(times[fastest])
        # With few images it may be another, unless the difference is large; is there time to look?
        enough = images == group.batch_size or ours < OBVIOUS * default
        if enough or budget.left() < FEW_TURNS * sum(map(min, times)) * group.batch_size / images:
            break
        images = group.batch_size
    scale = 1e3 * group.batch_size / images
    medians = [statistics.median(results) for results in (times[0], times[fastest])]
    if ours < CLEARLY_FASTER * default and medians[1] < CLEARLY_FASTER * medians[0]:
        return Result(candidates[fastest - 1], default / ours, default * scale)
    return Result([""] * len(keys), 1.0, default * scale)


def run_planned(step, plans):
    with installed(plans):
        step()


def time_in_turns(functions, device, turns, budget):
    """[[seconds of each turn] for each function], the first one's being the default; None if the budget ends early."""
    times = [[] for _ in functions]
    for function in functions:  # a warm-up
        function()
    for turn in range(turns):
        if budget.left() <= 0:
            return times if turn >= FEW_TURNS else None
        for function, results in zip(functions, times):
            results.append(seconds_of(function, device))
        if turn + 1 >= FEW_TURNS:
            others = [min(results) for results in times[1:]]
            default = min(times[0])
            if min(others) < OBVIOUS * default or min(others) * OBVIOUS > default:
                break
    return times


def seconds_of(function, device):
    """Seconds that a function takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def best_of(functions, device, repeats):
    """Shortest seconds of each function, after a first call that is not counted."""
    for function in functions:
        function()
    return [min(seconds_of(function, device) for _ in range(repeats)) for function in functions]


# --- methods of a single convolution


class Ranking:
    """Seconds of each method for one convolution.

    Attributes:
        times: for the forward pass, the input and the weight gradient (without gradients the first only): {method:
            seconds, inf where it was refused or far behind}.
        default: seconds of the three by default.
        conversion: seconds that a change of the memory format takes.
    """

    def __init__(self, times: list[dict[str, float]], default: float, conversion: float):
        self.times, self.default, self.conversion = times, default, conversion

    def in_layout(self, which: int, layout: str) -> dict[str, float]:
        """The times of a pass, with what it takes to convert its inputs and output to a memory format."""
        return {
            method: seconds + 2 * self.conversion * ((layout_of(method) or "nchw") != layout)
            for method, seconds in self.times[which].items()
        }

    def best(self, layout: str) -> tuple[str, float]:
        """The fastest plan in a memory format, or "" for the default, and its seconds."""
        fastest = [min(times.items(), key=lambda item: item[1]) for times in self.all_in(layout)]
        seconds = sum(duration for _, duration in fastest)
        default = self.default + 3 * self.conversion * (layout != "nchw")
        if default <= seconds:
            return "", default
        names = [method for method, _ in fastest]
        if len(names) == 1:  # no gradients
            names += ["native-nchw", "native-nchw"]
        return str(Plan(layout, *names)), seconds

    def all_in(self, layout: str) -> list[dict[str, float]]:
        return [self.in_layout(which, layout) for which in range(len(self.times))]

    def forbid(self, plan: str, which: int) -> None:
        """Leave out the method of a pass."""
        self.times[which][plan.split()[1 + which]] = math.inf


def rank(group: Group, key: Key, images: int, device: torch.device, dtype: torch.dtype) -> Ranking:
    """Time every method for one convolution of a group, with so many images."""
    shape = (images, key.channels, key.height, key.width)
    x = {layout: draw(shape, device, dtype, layout) for layout in LAYOUTS}
    full = draw((key.channels, 1, key.kernel_size, key.kernel_size), device, torch.float32, "nchw")
    weight = depthwise.crop(full.to(dtype), shape[2:], key.dilation)[0]
    passes = depthwise_methods.methods((group.batch_size, *shape[1:]), weight.shape[-2:], key.dilation, dtype)

    def call(which, method):
        mine = x[layout_of(method) or "nchw"]
        if which == 0:
            return lambda: depthwise_methods.forward(method, mine, weight, None, key.dilation)
        if which == 1:
            return lambda: depthwise_methods.input_gradient(method, mine, weight, key.dilation)
        return lambda: depthwise_methods.weight_gradient(method, mine, mine, weight.shape, key.dilation)

    times = []
    with torch.no_grad():
        for which, names in enumerate(passes if key.training else passes[:1]):
            times.append({})
            for method in names:
                times[which][method] = try_method(call(which, method), min(times[which].values(), default=None), device)
        [conversion] = best_of([lambda: to_layout(x["nchw"], "nhwc")], device, 2)
    return Ranking(times, time_default(key, x["nchw"], full, device, dtype), conversion)


def try_method(function, best, device):
    """Seconds of a method; inf where it fails."""
    try:
        if device.type == "cuda":
            function()  # kernels are compiled, and cuDNN tries its algorithms
        first = seconds_of(function, device)
        if best is not None and first > 2 * PRUNE * best:
            return first
        second = seconds_of(function, device)
        return second if best is not None and second > PRUNE * best else min(second, seconds_of(function, device))
    except (RuntimeError, NotImplementedError):  # a dtype that a library does not have, or no memory
        return math.inf


def time_default(key, x, weight, device, dtype):
    """Seconds of forward pass and gradients by default, in NCHW."""
    x, weight = x.detach().requires_grad_(key.training), weight.requires_grad_(key.training)
    grad = torch.ones_like(x)

    def step():
        with installed({}):
            compute(key, x, weight, grad, device, dtype)

    first = seconds_of(step, device)
    return min(first, seconds_of(step, device))


def compute(key, x, weight, grad, device, dtype):
    """What a layer computes: [output, gradient of x, gradient of weight], or only the first without gradients."""
    with computing_in(device, dtype), torch.set_grad_enabled(key.training):
        out = depthwise.convolve(x, weight, None, key.dilation, key.training, "auto")
    return [out, *torch.autograd.grad(out, (x, weight), grad)] if key.training else [out]


# --- verifying


def verify(key: Key, plan: str, device: torch.device, dtype: torch.dtype) -> list[tuple[int, str]]:
    """Compare a plan ("": the default) with PyTorch in float64, on two images.

    Returns:
        [(0 for the output, 1 for the input gradient, 2 for the weight gradient; what is wrong in words)], or [].
    """
    layout = plan.split()[0] if plan and plan not in (*depthwise.NAMES, STACKED) else "nchw"
    x, weight, grad = draw_inputs(key, device, dtype, layout)
    expected = expect(key, device, dtype)
    allowed = FLOAT32_ERROR if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    first, wrong = None, {}
    for _ in range(3):
        poison(x, weight)
        try:
            with installed({key: plan}):
                actual = compute(key, x, weight, grad, device, dtype)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            return [(which, reason) for which in range(len(expected))]
        for which, (mine, exact) in enumerate(zip(actual, expected)):
            exact = exact.to(mine.device)
            error = ((mine.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()
            if not error <= allowed:
                wrong.setdefault(which, f"an error of {error:.1e} where {allowed:.1e} is allowed")
            elif first is not None and not torch.equal(mine, first[which]):
                wrong.setdefault(which, "other bits when repeated")
        first = first or actual
    return sorted(wrong.items())


def draw_inputs(key, device, dtype, layout):
    """x, weight and the gradient of the output with which plans are verified."""
    shape = (VERIFIED_IMAGES, key.channels, key.height, key.width)
    x = draw(shape, device, dtype, layout)
    weight = draw((key.channels, 1, key.kernel_size, key.kernel_size), device, torch.float32, "nchw")
    return x.requires_grad_(key.training), weight.requires_grad_(key.training), x.detach().flip(0, 1)


@functools.lru_cache(maxsize=12)
def expect(key, device, dtype):
    """What `compute` should return for `draw_inputs`, in float64."""
    exact = device if device.type == "cuda" else torch.device("cpu")  # not every device has float64
    x, weight, grad = (tensor.detach() for tensor in draw_inputs(key, device, dtype, "nchw"))
    x, weight, grad = (tensor.to(exact, torch.float64) for tensor in (x, weight.to(dtype), grad))
    weight, padding = depthwise.crop(weight, x.shape[2:], key.dilation)
    x.requires_grad_(key.training), weight.requires_grad_(key.training)
    with torch.backends.cudnn.flags(enabled=False), torch.set_grad_enabled(key.training):
        out = F.conv2d(x, weight, None, 1, padding, key.dilation, key.channels)
        if not key.training:
            return [out]
        grad_x, grad_weight = torch.autograd.grad(out, (x, weight), grad)
    left = [(key.kernel_size - size) // 2 for size in weight.shape[-2:]]  # taps that were cropped have no gradient
    grad_weight = F.pad(grad_weight, (left[1], left[1], left[0], left[0]))
    return [out.detach(), grad_x, grad_weight]


def poison(*like):
    """Fill memory that the next tensors of these sizes are likely to get with NaN."""
    blocks = [torch.full_like(tensor, math.nan) for tensor in like for _ in range(4)]
    blocks += [torch.full((2 * tensor.numel(),), math.nan, device=tensor.device) for tensor in like for _ in range(2)]
    del blocks


def verified_default(group, device, dtype):
    """[(key, "" where the default is right, else "pytorch" or a plan that is)] for each convolution of a group."""
    plain = [str(Plan(layout, layout, f"native-{layout}", f"native-{layout}")) for layout in LAYOUTS]
    for key in group.keys(device, dtype):
        right = (plan for plan in ("", "pytorch", *plain) if not verify(key, plan, device, dtype))
        yield key, next(right, "")


# --- several processes


def agree(function):
    """What `function` returns in process 0, in all processes."""
    if not dist.is_initialized():
        return function()
    values = [function() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values, 0)
    return values[0]


def verify_everywhere(groups, plans, device, dtype):
    """(the plans without those of groups that any other process refuses, number of these groups)."""
    if not dist.is_initialized():
        return plans, 0
    refused = []
    if dist.get_rank() > 0:
        refused = [key for key, plan in plans.items() if plan and verify(key, plan, device, dtype)]
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, refused)
    refused = {key for keys in every for key in keys}
    keys = [keys for group in groups if refused & set(keys := group.keys(device, dtype))]
    return plans | dict.fromkeys(itertools.chain(*keys), ""), len(keys)


# --- what is remembered


@functools.cache
def describe_machine(device: torch.device) -> str:
    """Everything that a measurement depends on besides the shapes, in words."""
    versions = [f"torch {torch.__version__}"]
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        hardware = f"{torch.cuda.get_device_name(device)} ({capability})"
        versions.append(f"cuDNN {torch.backends.cudnn.version()}")
        if not depthwise.TRITON_ERROR:
            versions.append(f"Triton {depthwise.depthwise_triton.triton.__version__}")
    else:
        hardware = f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
        settings = {key: value for key, value in os.environ.items() if key.startswith(("ONEDNN_", "MKL_"))}
        versions += [f"{key}={value}" for key, value in sorted(settings.items())]
    return f"{hardware}, {', '.join(versions)}, kernels {hash_kernels()}"


def processor_name():
    """The CPU's model."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def hash_kernels():
    """Short hash of the files that compute convolutions, this one included."""
    content = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("depthwise*.py")))
    return hashlib.sha256(content).hexdigest()[:12]


def results_file():
    """Where results are kept."""
    return Path(torch.hub.get_dir()).parent / "unireplknet" / "convolutions.json"


def load_results(file, machine) -> dict[str, Result]:
    """The results of this machine; {} where there is no file, or one that cannot be read."""
    try:
        results = json.loads(file.read_text(encoding="utf-8")).get(machine, {})
        results = {name: Result(*values) for name, values in results.items()}
        for result in results.values():
            check_plans(result.plans)
        return results
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def check_plans(plans):
    """ValueError for a plan that names a method which does not exist."""
    for plan in plans:
        if plan and plan not in (*depthwise.NAMES, STACKED):
            depthwise_methods.parse_plan(plan)


def known_results(groups, dtype, results):
    """{group: its `Result`} for those that are among the results of a machine."""
    found = {group: results.get(to_name(group, dtype)) for group in groups}
    return {group: result for group, result in found.items() if result and len(result.plans) == len(group.kernels)}


def save_results(file, machine, results):
    """Add results to the file; without a word where that is impossible, since they can be measured again."""
    from filelock import FileLock, Timeout

    with contextlib.suppress(OSError, Timeout, NotImplementedError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=10):
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                content = {}
            content = content if isinstance(content, dict) else {}
            content.setdefault(machine, {}).update({name: list(result) for name, result in results.items()})
            temporary = file.with_suffix(f".{os.getpid()}")
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
            os.replace(temporary, file)


def describe_stored(groups, dtype, machine):
    """What is kept for these groups, in words."""
    known = known_results(groups, dtype, load_results(results_file(), machine))
    return describe_results(groups, known) if known else "nothing yet"
