"""Throughput of whole networks in training and inference, beside the network that one would choose instead.

    python benchmarks/throughput.py                                     unireplknet_t and timm's convnext_tiny
    python benchmarks/throughput.py --models unireplknet_a --img-size 64 --batch-sizes 1,8

For each batch size, in one run: the published structure as its authors run it (eager, PyTorch's convolutions, published
arithmetic), the same compiled, ours eager, and ours compiled; then the other network, eager and compiled. A training
step is forward pass, backward pass and AdamW; inference uses the reparameterized network. Prints images/s (median) and
the GPU's peak memory. On a GPU under bfloat16 autocast; on a CPU in float32 and without compiling, which takes minutes
there. A configuration that cannot run (memory full, no compiler) is skipped, with the reason in its row.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/, models/, tools/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds

import timm
import torch
import torch.nn.functional as F

from common.device import choose_device
from common.options import ConstantError, ImageSize, Name, PositiveInt, run
from common.progress import Progress
from models import VARIANTS, describe_implementation
from tools.conv_report import forced, milliseconds

MODELS: list[Name] = ["unireplknet_t"]  # unireplknet_a f p n t s b l xl; []: only PEER
PEER: str = "convnext_tiny"  # timm model to run beside them; "": none
IMG_SIZE: ImageSize = 224  # image size in pixels
BATCH_SIZES: list[PositiveInt] = []  # images per batch; []: 1, 32, 128, 256 on a GPU, 1 and 8 on a CPU
REPEATS: PositiveInt | None = None  # timings of which the median is taken; None: 30 on a GPU, 5 on a CPU
DEVICE: Name = "auto"  # "auto": cuda, else mps, else cpu; or a device such as "cuda:1"

CLASSES = 1000


def main():
    for name in MODELS:
        if name not in VARIANTS:
            raise ConstantError(f"MODELS must hold names out of {', '.join(VARIANTS)}, got {name!r}")
    if PEER and PEER not in timm.list_models():
        raise ConstantError(f"PEER must be a model that timm lists, or '', got {PEER!r}")
    if not MODELS and not PEER:
        raise ConstantError("MODELS must hold a name where PEER is '', got []")
    device = choose_device(DEVICE)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    repeats = REPEATS or (30 if cuda else 5)
    hardware = torch.cuda.get_device_name(device) if cuda else f"{torch.get_num_threads()} threads"
    print(f"{hardware}, torch {torch.__version__}, timm {timm.__version__}, {str(dtype).removeprefix('torch.')}")
    print(f"{IMG_SIZE} pixels, median of {repeats}; ours runs {describe_implementation(device, dtype)}\n")
    ways = [(name, way) for name in MODELS for way in ("published", "published compiled", "ours", "ours compiled")]
    ways += [(PEER, way) for way in ("eager", "compiled") if PEER]
    ways = [(name, way) for name, way in ways if cuda or not way.endswith("compiled")]
    jobs = [
        (task, batch_size, name, way)
        for task in ("training", "merged")
        for batch_size in BATCH_SIZES or ([1, 32, 128, 256] if cuda else [1, 8])
        for name, way in ways
    ]
    print("| task | batch | network | way | images/s | memory, GB |")
    print("|---|---|---|---|---|---|")
    for task, batch_size, name, way in Progress(jobs, unit="way", leave=False):
        try:
            speed, memory = measure(name, way, task, IMG_SIZE, batch_size, repeats, device)
            cells = [f"{speed:.1f}", "-" if memory is None else f"{memory:.1f}"]
        except Exception as error:  # memory full, no C compiler, ...: the other rows are still useful
            reason = str(error).strip().partition("\n")[0]
            cells = [f"{type(error).__name__}: {reason[:80]}", "-"]
        Progress.write(f"| {task} | {batch_size} | {name} | {way} | {' | '.join(cells)} |")


def measure(name, way, task, img_size, batch_size, repeats, device):
    """Measure one configuration: (images/s, peak memory in GB or None on a CPU)."""
    published, compiled = way.startswith("published"), way.endswith("compiled")
    torch.manual_seed(0)
    torch.compiler.reset()
    model = build(name, published).to(device).train(task == "training")
    if task == "merged" and name in VARIANTS:
        model.reparameterize_unireplknet()
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    if compiled:
        # Small batches wait for the CPU to launch kernels; CUDA graphs launch them at once.
        model = torch.compile(model, mode="reduce-overhead" if task == "merged" and device.type == "cuda" else None)
    step = (training_step if task == "training" else inference)(model, images)
    with forced("pytorch" if published else "auto"):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            step()
            torch.cuda.reset_peak_memory_stats(device)
        [duration] = milliseconds([step], device, repeats)
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return 1e3 * batch_size / duration, memory


def build(name, published):
    """Build a network; `published`: whether a UniRepLKNet computes as its authors' code does."""
    arguments = dict(published_arithmetic=published) if name in VARIANTS else {}
    return timm.create_model(name, num_classes=CLASSES, **arguments)


def training_step(model, images):
    """A function that runs one training step of `model`."""
    labels = torch.randint(CLASSES, (len(images),), device=images.device)
    cuda = images.is_cuda
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True if cuda else None)

    def step():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=cuda):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference(model, images):
    """A function that computes the logits of `images`."""

    @torch.inference_mode()
    def step():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            model(images)

    return step


if __name__ == "__main__":
    run(main, closed_output="end")
