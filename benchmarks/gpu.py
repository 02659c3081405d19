"""Everything that is to be verified and measured on a GPU, in two calls of at most ten minutes.

    python benchmarks/gpu.py --part 1                  kernels: verified, whole steps, peers, shapes, compiled networks
    python benchmarks/gpu.py --part 2                  train.py itself: bf16, fp16, killed and resumed, memory full
    python benchmarks/gpu.py --part 1 --cpu            the same in small on a CPU, to try the script: up to 27 minutes
    python benchmarks/gpu.py --only shapes             one step of either part

Needs a clone, PyTorch and requirements.txt, no network; torchtoolbox may be missing. Appends a Markdown table to
OUTPUT, each row as soon as it is known, so that a call which is killed keeps its rows; the most important come first.
Every step has a process of its own with a time limit: one that fails or hangs becomes a row, and the next one begins.
"""

import contextlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks/, common/, models/, tests/, tools/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import timm
import torch

from benchmarks import throughput
from common.device import find_reason
from common.options import ConstantError, ImageSize, Limits, Name, Positive, PositiveInt, UserError, run
from models import VARIANTS, depthwise, depthwise_choice, depthwise_methods, describe_implementation
from models.depthwise_choice import Key, Use
from tools.conv_report import find_shapes, forced, forward_and_backward, make_inputs, milliseconds

PART: Annotated[int, Limits(1, 2)] = 1  # 1: kernels and whole networks; 2: train.py
CPU: bool = False  # on a CPU, with a small network and few images: only tries the script
OUTPUT: Name = "gpu.md"  # file to which the table is appended
MINUTES: Positive = 9.0  # length of a call; steps that would begin later are left out
ONLY: str = ""  # run this step alone; "": all of PART
MODEL: Name = "unireplknet_t"  # network that is measured: unireplknet_a f p n t s b l xl
PEER: Name = "convnext_tiny"  # timm model beside it
IMG_SIZE: ImageSize = 224  # image size in pixels
BATCH_SIZE: PositiveInt = 128  # images per batch
REPEATS: PositiveInt = 15  # timings of which the median is taken

# With CPU, instead of the constants above.
SMALL = dict(model="unireplknet_a", peer="convnext_atto", img_size=32, batch_size=2, repeats=1)
SLOWER = 3  # factor on all limits of time there
STEP_VARIABLE = "UNIREPLKNET_GPU_FOLDER"  # environment variable by which a step learns the folder of its part
STARTED = time.monotonic()


class Job(NamedTuple):
    """What a step works with."""

    device: torch.device
    folder: str  # for what is trained
    model: str
    peer: str
    img_size: int
    batch_size: int
    repeats: int


def main():
    if MODEL not in VARIANTS:
        raise ConstantError(f"MODEL must be one of {', '.join(VARIANTS)}, got {MODEL!r}")
    if PEER not in timm.list_models():
        raise ConstantError(f"PEER must be a model that timm lists, got {PEER!r}")
    if ONLY and ONLY not in STEPS:
        raise ConstantError(f"ONLY must be one of {', '.join(STEPS)}, got {ONLY!r}")
    if not CPU and not torch.cuda.is_available():
        raise UserError(f"this measures a GPU: {find_reason('cuda')}; --cpu tries the script in small on a CPU")
    settings = dict(model=MODEL, peer=PEER, img_size=IMG_SIZE, batch_size=BATCH_SIZE, repeats=REPEATS)
    if STEP_VARIABLE in os.environ:
        device = torch.device("cpu" if CPU else "cuda")
        return run_step(ONLY, Job(device, os.environ[STEP_VARIABLE], **(SMALL if CPU else settings)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by which the step that runs is ended, too
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    options += ["--cpu"] if CPU else []
    with tempfile.TemporaryDirectory() as folder, open(OUTPUT, "a", encoding="utf-8") as file:
        what = f"step {ONLY}" if ONLY else f"part {PART}"
        title = f"{time.strftime('%Y-%m-%d %H:%M')}, {'a CPU, in small' if CPU else 'GPU'}, {what}"
        write(f"\n{title}\n\n| step | what | result |\n|---|---|---|", file)
        names = [ONLY] if ONLY else [name for name, step in STEPS.items() if step[0] == PART]
        until = STARTED + 60 * MINUTES * (SLOWER if CPU else 1)
        failed = [name for name in names if not start_step(name, options, folder, file, until)]
    print(f"\n{len(names) - len(failed)} of {len(names)} steps came to their end; the table is in {OUTPUT}")
    return 1 if failed else 0


def write(text, file):
    """Print text, and write it to `file` at once."""
    print(text, flush=True)
    file.write(f"{text}\n")
    file.flush()


def start_step(name, options, folder, file, until):
    """Run a step in a process of its own and copy its rows; returns whether it came to its end.

    Args:
        options: of this script, as words.
        folder: for what is trained.
        file: to which rows are written.
        until: moment at which all steps end, by `time.monotonic`.
    """
    now = time.monotonic()
    limit = min(STEPS[name][1] * (SLOWER if "--cpu" in options else 1), until - now)  # seconds
    if limit < 10:
        write(f"| {name} | left out | no time is left |", file)
        return False
    command = [sys.executable, __file__, "--only", name, *options]
    environment = os.environ | {STEP_VARIABLE: folder, "PYTHONIOENCODING": "utf-8"}
    environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for a GPU leaves CUDA as it is, or none could be forked
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", errors="replace"
        )
        late = threading.Timer(limit, end, [process])
        late.start()
        try:
            for line in process.stdout:
                if line.startswith("| "):
                    write(f"| {name} {line.rstrip()}", file)
            status = process.wait()
        finally:
            in_time = late.is_alive()
            late.cancel()
            end(process)
        write(f"| {name} | time | {time.monotonic() - now:.0f} s |", file)
        if status == 0:
            return True
        errors.seek(0)
        lines = [line.strip() for line in errors.read().splitlines() if line.strip()]
        reason = f"exit status {status}: {cell(lines[-1]) if lines else 'no message'}"
        write(f"| {name} | failed | {reason if in_time else f'took longer than {limit:.0f} s'} |", file)
        return False


def end(process):
    """End a step and all that it has started."""
    process.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError, AttributeError):  # AttributeError: Windows
        os.killpg(process.pid, signal.SIGKILL)


def cell(text):
    """The first line of a text as a cell of a Markdown table."""
    return str(text).strip().partition("\n")[0].replace("|", "/")[:240]


def run_step(name, job):
    """This process is a step: print its rows."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()
        threading.Thread(target=end_with, args=[os.getppid()], daemon=True).start()
    torch.manual_seed(0)
    if job.device.type == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other on a busy machine take minutes
        torch.set_num_threads(1)
    STEPS[name][2](job)
    return 0


def end_with(parent):
    """End this step, and all that it has started, when the process that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


# --- part 1


def versions(job):
    """What runs here, and one tiny convolution."""
    row("Python", f"{platform.python_version()}, {platform.system()}, {os.cpu_count()} CPUs")
    row("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    triton = depthwise.TRITON_ERROR or depthwise.depthwise_triton.triton.__version__
    row("Triton, timm", f"{triton}, {timm.__version__}")
    if job.device.type == "cuda":
        properties = torch.cuda.get_device_properties(job.device)
        memory = f"{properties.total_memory / 2**30:.1f} GiB, {properties.multi_processor_count} multiprocessors"
        row("GPU", f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory}")
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        row("driver", lambda: subprocess.run(query, capture_output=True, text=True, timeout=20).stdout)
        row("bounds", lambda: bounds(job.device))
    for dtype in (torch.bfloat16, torch.float16):
        row(f"13 x 13, {name_of(dtype)}", describe_implementation(job.device, dtype))
    row("depthwise_conv2d_implicit_gemm", depthwise.import_implicit_gemm()[1] or "installed")


def row(what, result):
    """Print a row; the result may be a function, whose error becomes the result."""
    if callable(result):
        try:
            result = result()
        except Exception as error:  # memory full, no compiler, a method that does not exist here: the others go on
            result = f"{type(error).__name__}: {error}"
    print(f"| {cell(what)} | {cell(result)} |", flush=True)


def bounds(device):
    from benchmarks.depthwise import measure_bounds

    copied, products = measure_bounds(device)
    return f"copy {copied / 1e12:.2f} TB/s, bfloat16 product {products / 1e12:.0f} TFLOP/s"


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def verify(job):
    """Every shape three times against float64; then the weight gradient of a whole batch, with and without stages."""
    for dtype in (torch.bfloat16, torch.float16) if job.device.type == "cuda" else (torch.float32,):
        wrong = []
        shapes = shapes_of(job)
        for shape in shapes:
            key = Key(job.device.type, name_of(dtype), True, *shape)
            found = depthwise_choice.verify(key, "", job.device, dtype)
            wrong += [f"{shape}: {('output', 'input', 'weight')[which]} {text}" for which, text in found]
        text = f"{len(shapes) - len(wrong)} of {len(shapes)} right and equal to the bit three times"
        row(f"all shapes, {name_of(dtype)}", f"{text}; {'; '.join(wrong)}" if wrong else text)
    if job.device.type == "cuda":
        for title, options in (("as chosen", None), ("pipelined", {}), ("single stage", dict(num_stages=1))):
            row(f"weight gradient of {job.batch_size} images, {title}", lambda: verify_stages(job, options))


def shapes_of(job):
    """The depthwise convolutions of a network at job.img_size: [(channels, height, width, kernel size, dilation)]."""
    with torch.device("meta"):
        return find_shapes(timm.create_model(job.model), job.img_size)


def verify_stages(job, options):
    """Errors and differences of the weight gradient with these options of the compiler; None: the chosen ones."""
    kernels = depthwise.depthwise_triton
    stages = kernels.stages if options is None else lambda capability: options
    worst, other = 0.0, 0
    shapes = [shape for shape in shapes_of(job) if shape[3] > 3]
    with mock.patch.object(kernels, "stages", stages):
        for channels, height, width, kernel_size, dilation in shapes:
            x, grad = (
                torch.randn(job.batch_size, channels, height, width, device=job.device, dtype=torch.bfloat16)
                for _ in range(2)
            )
            results = [kernels.weight_gradient(x, grad, kernel_size, dilation) for _ in range(10)]
            other += any(not torch.equal(result, results[0]) for result in results)
            padding = kernel_size // 2 * dilation
            weight_shape = (channels, 1, kernel_size, kernel_size)
            with torch.backends.cudnn.flags(enabled=False):
                exact = torch.nn.grad.conv2d_weight(
                    x.float(), weight_shape, grad.float(), 1, padding, dilation, channels
                )
            worst = max(worst, ((results[0] - exact).norm() / exact.norm()).item())
    return f"{len(shapes)} shapes, error of the norm at most {worst:.1e}, {other} differ within ten calls"


def steps(job):
    """Whole training steps as they are, and without what is to make them fast."""
    kernels = depthwise.depthwise_triton if not depthwise.TRITON_ERROR else None
    row("published structure, PyTorch's convolutions", lambda: measure(job, job.model, "published", "training"))
    row("ours", lambda: measure(job, job.model, "ours", "training"))
    row("ours, PyTorch's convolutions", lambda: measure(job, job.model, "ours", "training", forced("pytorch")))
    row("ours, convolutions chosen by measurement", lambda: measure_chosen(job))
    for title, layout in (("NHWC", torch.channels_last), ("NCHW", torch.contiguous_format)):
        measured = partial(measure, job, job.model, "ours", "training", layout=layout)
        row(f"ours, maps enter the stages in {title}", measured)
    if kernels is not None:
        for title, name, value in (
            ("convolutions as operators of torch.library", "is_watched", lambda x: True),
            ("weight gradient pipelined", "stages", lambda capability: {}),
            ("weight gradient in a single stage", "stages", lambda capability: dict(num_stages=1)),
        ):
            patch = mock.patch.object(kernels, name, value)
            row(f"ours, {title}", lambda: measure(job, job.model, "ours", "training", patch))


def measure_chosen(job):
    """A step with the convolutions that are fastest here."""
    dtype = torch.bfloat16 if job.device.type == "cuda" else torch.float32
    model = throughput.build(job.model, False).to(job.device).train()
    uses = [Use((job.img_size, job.img_size), job.batch_size)]
    seconds = 1 if job.device.type == "cpu" else 30
    choice = depthwise_choice.choose_convolutions(model, uses, dtype=dtype, seconds=seconds)
    try:
        return f"{measure(job, job.model, 'ours', 'training')}; {choice.line}"
    finally:
        depthwise.PLANS.clear()


def measure(job, name, way, task, patch=None, layout=None):
    """Images/s, the CPU's part of the time, and the peak memory of a network; see `throughput.measure`.

    Args:
        patch: context in which all of it runs.
        layout: memory format in which maps enter the stages; None: as the network has it.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    model = throughput.build(name, way.startswith("published")).to(job.device).train(task == "training")
    if task == "merged" and name in VARIANTS:
        model.reparameterize_unireplknet()
    if layout is not None:
        for stage in model.stages:
            stage.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(memory_format=layout),))
    if job.device.type == "cuda":
        torch.cuda.empty_cache()
    images = torch.randn(job.batch_size, 3, job.img_size, job.img_size, device=job.device)
    if way.endswith("compiled"):
        model = torch.compile(model, mode="reduce-overhead" if task == "merged" and job.device.type == "cuda" else None)
    step = (throughput.training_step if task == "training" else throughput.inference)(model, images)
    implementation = forced("pytorch" if way.startswith("published") else "auto")
    with implementation, patch or contextlib.nullcontext():
        started = time.perf_counter()
        step()
        synchronize(job.device)
        first = time.perf_counter() - started
        if job.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(job.device)
        [duration] = milliseconds([step], job.device, job.repeats)
        started = time.perf_counter()
        step()
        launched = 1e3 * (time.perf_counter() - started)
        synchronize(job.device)
    parts = [f"{1e3 * job.batch_size / duration:.0f} images/s", f"{duration:.1f} ms", f"CPU {launched:.1f} ms"]
    if job.device.type == "cuda":
        parts.append(f"{torch.cuda.max_memory_allocated(job.device) / 1e9:.1f} GB")
    return ", ".join([*parts, f"first step {first:.1f} s"])


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def merged(job):
    """Inference: merged, against the published structure as it is trained; and the peer in both."""
    row("published structure, not merged", lambda: measure(job, job.model, "published", "inference"))
    row("published structure, merged", lambda: measure(job, job.model, "published", "merged"))
    row("ours, merged", lambda: measure(job, job.model, "ours", "merged"))
    row(f"{job.peer}, inference", lambda: measure(job, job.peer, "ours", "merged"))
    row(f"{job.peer}, training", lambda: measure(job, job.peer, "ours", "training"))


def shapes(job):
    """Forward and backward pass of each shape by every implementation, in ms."""
    dtype = torch.bfloat16 if job.device.type == "cuda" else torch.float32
    for shape in shapes_of(job):
        channels, height, width, kernel_size, dilation = shape
        row(f"{channels}, {height} x {width}, {kernel_size}, {dilation}", lambda: time_shape(job, shape, dtype))


def time_shape(job, shape, dtype):
    """The times of one shape, in words."""
    *_, kernel_size, dilation = shape
    times = []
    for title, name, kind, layout in (
        ("Triton", "triton", dtype, torch.contiguous_format),
        ("PyTorch NCHW", "pytorch", dtype, torch.contiguous_format),
        ("PyTorch NHWC (cuDNN)", "pytorch", dtype, torch.channels_last),
        ("extension, float16", "implicit_gemm", torch.float16, torch.contiguous_format),
    ):
        with forced(name), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            if depthwise.choose(kernel_size, dilation, job.device, kind) == name:
                conv, x = make_inputs(job.batch_size, *shape, job.device, kind)
                x = x.detach().contiguous(memory_format=layout).requires_grad_()
                grad = torch.ones_like(x)
                [duration] = milliseconds([lambda: forward_and_backward(conv, x, grad)], job.device, job.repeats)
                times.append(f"{title} {duration:.3f}")
    weight, x = torch.randn(shape[0], 1, kernel_size, kernel_size, device=job.device), x.detach()
    weight = depthwise.crop(weight.to(dtype), shape[1:3], dilation)[0]
    x = x.to(dtype).contiguous()
    for method in ("rows", "dense"):
        method = method if dilation == 1 else f"phases-{method}"
        if all(method in names for names in depthwise_methods.methods(x.shape, weight.shape[-2:], dilation, dtype)):

            def batched():
                depthwise_methods.forward(method, x, weight, None, dilation)
                depthwise_methods.input_gradient(method, x, weight, dilation)
                depthwise_methods.weight_gradient(method, x, x, weight.shape, dilation)

            with torch.no_grad():
                [duration] = milliseconds([batched], job.device, job.repeats)
            times.append(f"batched products ({method}) {duration:.3f}")
    return ", ".join(times)


def compiled(job):
    """torch.compile, whose first step takes minutes."""
    if job.device.type == "cpu":
        row("torch.compile", "not tried on a CPU")
        return
    row("ours", lambda: measure(job, job.model, "ours compiled", "training"))
    row("ours, merged", lambda: measure(job, job.model, "ours compiled", "merged"))
    row(job.peer, lambda: measure(job, job.peer, "ours compiled", "training"))
    row(f"{job.peer}, inference", lambda: measure(job, job.peer, "ours compiled", "merged"))
    row("published structure, PyTorch's kernels", lambda: measure(job, job.model, "published compiled", "training"))


# --- part 2


def training(job):
    """train.py in both precisions, compiled, resumed with its choice of convolutions, and test.py."""
    for amp in ("bf16", "fp16"):

        def precision():
            text, result = train(job, amp, "--amp", amp)
            return f"{result}; kernels {line_of(text, 'kernels')}"

        row(f"train.py, {amp}", precision)

    def resumed():
        text, result = train(job, "bf16", "--amp", "bf16", "--resume", "auto", epochs=3)
        return f"{result}; kernels {line_of(text, 'kernels')}"

    row("resumed for more epochs", resumed)
    checkpoint = Path("bf16", SMALL["model"], "best.pth")
    row("test.py", lambda: script("test.py", "--checkpoint", checkpoint, cwd=folder(job)).strip().splitlines()[-1])
    if job.device.type == "cuda":
        row("train.py, compiled", lambda: train(job, "compiled", "--compile", "on")[1])
        row("default and PyTorch's convolutions", lambda: same_curve(job))


def train(job, output, *options, epochs=2, **more):
    """Run train.py on the demo data and say what came of it."""
    place = folder(job)
    size, batch = (32, 16) if job.device.type == "cpu" else (128, 64)
    epochs = 1 if job.device.type == "cpu" and epochs == 2 else epochs
    command = [f"--model={SMALL['model']}", f"--img-size={size}", f"--batch-size={batch}", f"--epochs={epochs}"]
    command += ["--optimizer=adamw", "--warmup-epochs=0", f"--device={job.device.type}", f"--output={output}", *options]
    text = script("train.py", *command, cwd=place, **more)
    log = (place / output / SMALL["model"] / "log.csv").read_text(encoding="utf-8").splitlines()
    last = dict(zip(log[0].split(","), log[-1].split(",")))
    loss, accuracy, speed = (float(last[name]) for name in ("train_loss", "val_acc1", "img_per_s"))
    return text, f"loss {loss:.3f}, accuracy {accuracy:.1f} %, {speed:.0f} images/s"


def folder(job):
    """The folder of this part, with the demo data in data/."""
    place = Path(job.folder)
    if not (place / "data" / "train").is_dir():
        script("makedata.py", "--demo", "--demo-images", "4" if job.device.type == "cpu" else "80", cwd=place)
        script("mean_std.py", cwd=place)
    return place


def script(name, *options, cwd, status=0, environment=()):
    """Run a script of the repository and return what it printed.

    Raises:
        RuntimeError: with the last line of its errors, if it ends with another exit status than `status`.
    """
    command = [sys.executable, str(ROOT / name), *map(str, options)]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | dict(environment), capture_output=True, encoding="utf-8", errors="replace"
    )
    if done.returncode != status:
        raise RuntimeError(f"{name}: exit status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout + done.stderr


def line_of(text, start):
    """The first line of a text that begins with `start`, without it."""
    return next((line[len(start) :].strip() for line in text.splitlines() if line.startswith(start)), "")


def same_curve(job):
    """The results with and without the kernels, which differ by rounding only."""
    results = []
    for name in ("triton", "pytorch"):
        results.append(train(job, name, "--amp", "bf16", environment={depthwise.VARIABLE: name})[1])
    return " and ".join(results)


def killed(job):
    """A run that is killed twice and resumed, with deterministic algorithms: the same bits?"""
    sys.path.insert(0, str(ROOT / "tests"))
    from kill import kill_and_compare

    cpu = job.device.type == "cpu"
    different, kills = kill_and_compare(folder(job), 1 if cpu else 3, epochs=1 if cpu else 2, device=job.device.type)
    row(f"{kills} kills", f"different from the uninterrupted run: {', '.join(different) or 'nothing'}")


def full(job):
    """Memory that is really full: this process holds all but a little of it while train.py runs."""
    if job.device.type == "cpu":
        row("memory full", "needs a GPU")
        return
    held = []
    free = torch.cuda.mem_get_info(job.device)[0]
    held.append(torch.empty(max(free - 3 * 2**30, 0), dtype=torch.uint8, device=job.device))
    for title, options in (
        ("3 GB left", []),
        ("3 GB left, compiled", ["--compile", "on"]),
    ):

        def halved():
            text, result = train(job, "full", "--batch-size", "256", "--img-size", "192", *options, epochs=1)
            found = re.search("memory is full: .* parts", text)
            return f"{found[0] if found else 'memory did not become full'}; {result}"

        row(title, halved)
    del held


def distributed(job):
    """One process under torchrun, connected by NCCL."""
    place = folder(job)
    options = [f"--model={SMALL['model']}", "--img-size=32", "--batch-size=8", "--epochs=1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += [str(ROOT / "train.py"), *options, f"--device={job.device.type}", "--output=torchrun"]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
    process = subprocess.Popen(command, cwd=place, **options)
    seconds = 120 * (SLOWER if job.device.type == "cpu" else 1)
    late = threading.Timer(seconds, process.terminate)  # torchrun ends its processes
    late.start()
    text, _ = process.communicate()
    late.cancel()
    row("torchrun", f"exit status {process.returncode}: {line_of(text, 'best')}")


def sanitizer(job):
    """compute-sanitizer, which watches every access to memory, on five small shapes."""
    program = shutil.which("compute-sanitizer")
    if program is None or job.device.type == "cpu":
        row("memcheck, racecheck", "compute-sanitizer is not installed" if program is None else "needs a GPU")
        return
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--only", "small"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=80)
        lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line] or done.stderr.splitlines()[-1:]
        row(tool, f"exit status {done.returncode}: {''.join(lines[-1:])}")


def small(job):
    """Five small shapes, for compute-sanitizer."""
    for shape in ((2, 7, 7, 13, 1), (2, 14, 14, 13, 1), (1, 28, 28, 7, 2), (2, 14, 14, 3, 5), (1, 56, 56, 3, 1)):
        conv, x = make_inputs(2, *shape, job.device, torch.bfloat16)
        forward_and_backward(conv, x, torch.ones_like(x))
    synchronize(job.device)
    row("five small shapes", "computed")


def report(job):
    """The methods that a run chooses among, refused ones with the reason."""
    options = ["--model", job.model, "--img-size", job.img_size, "--batch-size", job.batch_size]
    options += ["--device", job.device.type]
    text = script("tools/conv_report.py", *options, cwd=job.folder)
    for line in text.splitlines():
        if re.match(r"\d+ of \d+ shapes|kernels|.*: default .* ms", line):
            row("conv_report.py", line)


# {name: (part, seconds that it may take, function)}, in order.
STEPS = {
    "versions": (1, 60, versions),
    "verify": (1, 120, verify),
    "steps": (1, 150, steps),
    "merged": (1, 80, merged),
    "shapes": (1, 120, shapes),
    "compiled": (1, 400, compiled),
    "training": (2, 300, training),
    "killed": (2, 240, killed),
    "full": (2, 120, full),
    "distributed": (2, 150, distributed),
    "sanitizer": (2, 180, sanitizer),
    "report": (2, 150, report),
    "small": (0, 60, small),
}


if __name__ == "__main__":
    run(main, closed_output="end")
