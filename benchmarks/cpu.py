"""Time training and inference on this CPU: the network as published beside ours, in one run.

    python benchmarks/cpu.py                                        all tables, about 15 minutes on two cores
    python benchmarks/cpu.py --parts run                            what a run of the recipe takes, before and after
    python benchmarks/cpu.py --parts convolutions,optimizer         some of them
    OMP_NUM_THREADS=1 python benchmarks/cpu.py --clock processor    on a busy machine

"Published" is what any script gets: float32, NCHW, PyTorch's own convolutions, gradients and memory settings, timm's
optimizer, the training structure. "Ours" is what train.py and test.py choose here, convolutions by measurement
included. Each has a process of its own, since memory settings apply to a whole process; they compute in turns, so that
a busy moment affects both, and of each the fastest call counts.

Prints a Markdown table for each part: "convolutions", the large and the dilated ones of unireplknet_t at 224 pixels,
forward and backward; "training", a step without the optimizer; "optimizer", a step of Muon; "recipe", a whole step of
train.py but for loading, at the first and the last image size; "inference", beside onnxruntime where it is installed;
"run", seconds for 1,000 images of each part of a run at the recipe's image sizes: loading (JPEG files, image by image
with Pillow and torchvision; ours from the cache and in batches), network, optimizer, and validation.
"""

import importlib.util
import multiprocessing
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/, common/, models/, prepare/, ema.py
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import models
from benchmarks import data
from common.augment import train_transform
from common.cache import cache_images
from common.dataset import SeededImages, open_image_folder
from common.device import Normalise, choose_layout, has_bfloat16, keep_freed_memory
from common.extras import require
from common.optimizer import create_optimizer, orthogonalise_in_float32
from common.options import ConstantError, ImageSize, Name, NotEmpty, PositiveInt, run
from common.progress import Progress
from ema import ModelEma
from models import depthwise, depthwise_choice
from models.depthwise_choice import Group, Use, choose_convolutions, measure_group, processor_name
from prepare.drawn_data import draw_data_set

Part = Literal["convolutions", "training", "optimizer", "recipe", "inference", "run"]
Parts = Annotated[list[Part], NotEmpty()]

PARTS: Parts = ["convolutions", "training", "optimizer", "recipe", "inference", "run"]  # tables
BATCH_SIZE: PositiveInt = 16  # images per batch
REPEATS: PositiveInt = 5  # timings of which the fastest counts; fewer, but at least two, where they take long
CLOCK: Literal["wall", "processor"] = "wall"  # "processor": that of all threads together, so meant for one thread
MODELS: Annotated[list[Name], NotEmpty()] = ["unireplknet_t", "unireplknet_a"]  # UniRepLKNet variants to time
SIZES: Annotated[list[ImageSize], NotEmpty()] = [224, 128]  # image size in pixels, one for each of MODELS
RECIPE_SIZES: Annotated[list[ImageSize], NotEmpty()] = [64, 160]  # first and last image size of the last of MODELS

RUN_SIZES: Annotated[list[ImageSize], NotEmpty()] = [64, 96, 128, 160]  # image sizes of "run", for the last of MODELS

# channels and size of the maps of unireplknet_t's large kernels at 224 pixels, and kernels with their dilation
MAPS = ((160, 28), (320, 14), (640, 7))
KERNELS = ((13, 1), (7, 2), (3, 5))
CPU = torch.device("cpu")
STEP_IMAGES = 32  # images in a step of the optimizer, as in train.py
ENOUGH = 20.0  # seconds of timings after which no more follow
LONG = 1.0  # seconds from which on a step needs no warm-up before each timing


def main():
    if len(MODELS) != len(SIZES):
        raise ConstantError(f"SIZES must hold one size for each of the {len(MODELS)} MODELS, got {SIZES}")
    unknown = [name for name in MODELS if name not in models.VARIANTS]
    if unknown:
        raise ConstantError(f"MODELS {unknown[0]!r} is unknown; choose among {', '.join(models.VARIANTS)}")
    dtype = "bfloat16 autocast" if has_bfloat16(CPU) else "float32"
    threads = torch.get_num_threads()
    print(f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}, {threads} threads")
    print(f"torch {torch.__version__}, timm {timm.__version__}; ours: {dtype}")
    print(f"batch {BATCH_SIZE}, fastest of {REPEATS} in turns, {CLOCK} time")
    networks = list(zip(MODELS, SIZES))
    recipe = [(MODELS[-1], size) for size in RECIPE_SIZES]
    convolutions = [(*shape, *kernel) for kernel in KERNELS for shape in MAPS]
    onnx = [] if importlib.util.find_spec("onnxruntime") is None else ["onnxruntime"]
    tables = dict(
        convolutions=("forward and gradients, float32", convolution, convolutions, [BATCH_SIZE], []),
        training=("training step", training, networks, [BATCH_SIZE], []),
        optimizer=("step of Muon", optimizer, [(name,) for name in MODELS], [], []),
        recipe=("training step with gradient norm, Muon and EMA", whole_step, recipe, [BATCH_SIZE], []),
        inference=("inference", inference, networks, [BATCH_SIZE, 1], onnx),
    )
    with Servers(["published", "ours", *onnx], CLOCK) as servers:
        for part in PARTS:
            if part == "run":
                print_run(servers, MODELS[-1], RUN_SIZES, BATCH_SIZE, REPEATS)
            else:
                print_table(servers, *tables[part], REPEATS)


class Servers:
    """A process for each way to compute, which run in turns; a context that ends them."""

    def __init__(self, ways, clock):
        self.ways, self.clock = ways, clock

    def __enter__(self):
        context = multiprocessing.get_context("spawn")
        self.processes, self.connections = [], {}
        for way in self.ways:
            self.connections[way], there = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(there, way, self.clock), daemon=True))
            self.processes[-1].start()
        return self

    def __exit__(self, *_):
        for connection, process in zip(self.connections.values(), self.processes):
            connection.send(None)
            process.join()

    def compare(self, ways, repeats, make, *arguments):
        """{way: fewest seconds of `make(way, *arguments)()`}."""
        for way in ways:
            self.connections[way].send((make, arguments))
            self.connections[way].recv()
        times = {way: [] for way in ways}
        started = time.perf_counter()
        for repeat in range(repeats):
            if repeat >= 2 and time.perf_counter() - started > ENOUGH:
                break
            for way, results in times.items():
                self.connections[way].send("run")
                results.append(self.connections[way].recv())
        return {way: min(results) for way, results in times.items()}


def serve(connection, way, clock):
    """Loop of a process: prepare each (function, arguments) that it receives, and time it once for each "run"."""
    torch.manual_seed(0)
    if way == "published":  # this process ends with the benchmark
        models.DepthwiseConv2d.forward = nn.Conv2d.forward
        depthwise.takes_nchw = lambda device: True
    else:
        keep_freed_memory()
    while (task := connection.recv()) is not None:
        if task != "run":
            make, arguments = task
            step = make(way, *arguments)
            duration = seconds(step, clock)
            connection.send(None)
            continue
        if duration < LONG:
            step()  # brings back data and threads that the other process has displaced
        duration = seconds(step, clock)
        connection.send(duration)


def seconds(step, clock):
    read = time.process_time if clock == "processor" else time.perf_counter
    started = read()
    step()
    return read() - started


def print_table(servers, title, make, cases, batch_sizes, others, repeats):
    """Print a Markdown table of milliseconds and of ratios, published to ours and each of the others to ours."""
    ways = ["published", "ours", *others]
    ratios = ["ratio", *(f"{other} / ours" for other in others)]
    print(f"\n| {title} | {' | '.join(f'{way}, ms' for way in ways)} | {' | '.join(ratios)} |")
    print(f"|{'---|' * (1 + len(ways) + len(ratios))}")
    cases = [(*case, *batch) for case in cases for batch in ([(size,) for size in batch_sizes] or [()])]
    for case in Progress(cases, unit="case", leave=False):
        times = servers.compare(ways, repeats, make, *case)
        cells = [f"{1e3 * times[way]:.1f}" for way in ways]
        cells += [f"{times[way] / times['ours']:.2f}" for way in ways if way != "ours"]
        Progress.write(f"| {describe(make, case)} | {' | '.join(cells)} |")


def print_run(servers, name, sizes, batch_size, repeats):
    """Print a Markdown table of the seconds that 1,000 images take in each part of a run of the recipe."""
    ways = ["published", "ours"]
    print("\n| run, seconds for 1,000 images | part | published | ours | ratio |\n|---|---|---|---|---|")

    def measure(images, make, *arguments):
        times = servers.compare(ways, repeats, make, *arguments)
        return [1e3 * times[way] / images for way in ways]

    update = measure(STEP_IMAGES, updating, name)  # whatever the image size
    for size in Progress(sizes, unit="size", leave=False):
        parts = dict(
            loading=measure(batch_size, loading, size, batch_size),
            network=measure(batch_size, training, name, size, batch_size),
            optimizer=update,
        )
        parts["training in all"] = list(map(sum, zip(*parts.values())))
        parts["validation"] = measure(batch_size, validation, name, size, batch_size)
        for part, (published, ours) in parts.items():
            row = f"{published:.2f} | {ours:.2f} | {published / ours:.2f}"
            Progress.write(f"| {name}, {size} pixels, batch {batch_size} | {part} | {row} |")


def describe(make, case):
    """A case in words."""
    if make is convolution:
        channels, size, kernel_size, dilation, batch = case
        return f"{channels} x {size} x {size}, kernel {kernel_size}, dilation {dilation}, batch {batch}"
    name, *rest = case
    return f"{name}, {rest[0]} pixels, batch {rest[1]}" if rest else name


# --- what is timed: functions (way, ...) that return a function of no argument


def convolution(way, channels, size, kernel_size, dilation, batch_size):
    """A depthwise convolution forward and backward."""
    conv = models.DepthwiseConv2d(channels, kernel_size, dilation)
    x = torch.randn(batch_size, channels, size, size)
    if way == "ours":
        group = Group(channels, size, size, ((kernel_size, dilation),), False, "nhwc", True, batch_size)
        plans = measure_group(group, CPU, torch.float32)[1].plans
        depthwise_choice.install(dict(zip(group.keys(CPU, torch.float32), plans)))
        x = x.contiguous(memory_format=torch.channels_last)  # as the network has it
    x.requires_grad_()
    grad = torch.randn_like(x)
    return lambda: torch.autograd.grad(conv(x), [x, conv.weight], grad)


def training(way, name, size, batch_size):
    """A training step without the optimizer."""
    model, images, amp = build(way, name, size, batch_size, True)
    labels = torch.randint(12, (batch_size,))

    def step():
        model.zero_grad(set_to_none=True)
        with amp:
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    return step


def build(way, name, size, batch_size, training, merged=True):
    """(network, images, autocast's context) as `way` has them; `merged`: for inference, but for the published one."""
    ours = way == "ours"
    layout = choose_layout(CPU) if ours else torch.contiguous_format
    model = timm.create_model(name, num_classes=12, layer_scale_init_value=0.1, published_arithmetic=not ours)
    model.train(training)
    if not training and merged and way != "published":
        model.reparameterize_unireplknet()
    model.to(memory_format=layout)
    amp = torch.autocast("cpu", torch.bfloat16, enabled=ours and has_bfloat16(CPU))
    if ours:
        dtype = torch.bfloat16 if has_bfloat16(CPU) else torch.float32
        choose_convolutions(model, [Use((size, size), batch_size, training=training)], dtype=dtype)
    return model, torch.randn(batch_size, 3, size, size).contiguous(memory_format=layout), amp


def optimizer(way, name):
    """A step of Muon on random gradients."""
    model = timm.create_model(name, num_classes=12)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return create_muon(way, model).step


def create_muon(way, model):
    """train.py's optimizer, or timm's in float32, which is many times as fast here as its own bfloat16."""
    if way == "ours":
        return create_optimizer(model, "muon", 2e-3, 0.05, 1.0, CPU)
    muon = timm.optim.create_optimizer_v2(model, "muon", 2e-3, 0.05)
    muon.step = orthogonalise_in_float32(muon.step)
    return muon


def whole_step(way, name, size, batch_size):
    """A training step of train.py, but for loading."""
    model, images, amp = build(way, name, size, batch_size, True)
    labels = torch.randint(12, (batch_size,))
    muon, ema = create_muon(way, model), ModelEma(model)

    def step():
        with amp:
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        muon.step()
        muon.zero_grad(set_to_none=True)
        ema.update(model)

    return step


def loading(way, size, batch_size):
    """A batch of training images, augmented and normalised, of JPEG files of 150 pixels that are read once before."""
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name, "images", "150-jpg")
    list(draw_data_set(Path(folder.name, "drawn"), batch_size // 12 + 1, seed=0))
    data.save_images(Path(folder.name, "drawn"), Path(folder.name, "images"), batch_size, [150])
    if way == "ours":
        images = open_image_folder(root, train_transform((size, size), data.MEAN, **data.RECIPE))
        cache_images(Path(folder.name, "cache"), 1000, (images, (size, size)))
        images, normalise = SeededImages(images, 0), Normalise(data.MEAN, data.STD, CPU)
    else:
        images = data.PlainSeeds(ImageFolder(root, data.plain_transform((size, size), **data.RECIPE)), 0)
        normalise = nn.Identity()
    keys = [[(1, index) for index in range(len(images))]]

    def step():
        for batch, _ in DataLoader(images, batch_sampler=keys):
            normalise(batch)
        return folder  # which lives as long as this function

    return step


def updating(way, name):
    """What follows the backward pass: gradient norm, Muon, EMA."""
    model = timm.create_model(name, num_classes=12).to(
        memory_format=choose_layout(CPU) if way == "ours" else torch.contiguous_format
    )
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    muon, ema = create_muon(way, model), ModelEma(model)

    def step():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        muon.step()
        ema.update(model)

    return step


def validation(way, name, size, batch_size):
    """The logits of one batch by the training structure, as train.py validates it."""
    return no_gradients(*build(way, name, size, batch_size, False, merged=False))


def no_gradients(model, images, amp):
    """The logits of `images`."""

    @torch.inference_mode()
    def step():
        with amp:
            model(images)

    return step


def inference(way, name, size, batch_size):
    """The logits of one batch."""
    model, images, amp = build(way, name, size, batch_size, False)
    if way == "onnxruntime":
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's about itself
            file = Path(folder, "model.onnx")
            torch.onnx.export(model, (images,), file, dynamo=True, external_data=False, verbose=False)
            options = require("onnxruntime")[0].SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            session = require("onnxruntime")[0].InferenceSession(file.read_bytes(), options)
        inputs = {session.get_inputs()[0].name: images.numpy()}
        return lambda: session.run(None, inputs)
    return no_gradients(model, images, amp)


if __name__ == "__main__":
    run(main, closed_output="end")
