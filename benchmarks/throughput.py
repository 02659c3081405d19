"""Images a second of whole networks, trained and merged, beside the network that one would pick instead.

    python -m benchmarks.throughput                                     unireplknet_t and timm's convnext_tiny
    python -m benchmarks.throughput --models unireplknet_a --img-size 64 --batch-sizes 1,8

For each batch size, in one run: the published structure as its authors run it (eager, PyTorch's convolutions, published
arithmetic), the same compiled, ours as it is, and ours compiled; then the other network, eager and compiled. Training
steps are forward pass, backward pass and AdamW; inference is the merged network. Prints images a second (median) and
the peak of the GPU's memory. On a GPU under bfloat16 autocast; on a CPU in float32 and without compiling, which takes
minutes there. A way that cannot run (memory full, no compiler) is left out with its reason.
"""

import timm
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.device import choose_device
from common.options import UserError, run
from models import VARIANTS, describe_implementation
from models.doctor import forced, milliseconds

MODELS: list[str] = ["unireplknet_t"]  # unireplknet_a f p n t s b l xl
PEER: str = "convnext_tiny"  # timm's network that runs beside them; "": none
IMG_SIZE: int = 224  # edge of the pictures in pixels
BATCH_SIZES: list[int] = []  # pictures at once; []: 1, 32, 128, 256 on a GPU, 1 and 8 on a CPU
REPEATS: int = 0  # timings of which the median is taken; 0: 30 on a GPU, 5 on a CPU
DEVICE: str = "auto"  # "auto": cuda, else cpu; or such as "cuda:1"

CLASSES = 1000


def build(name, published):
    """The network `name`; `published` says whether UniRepLKNet computes as its authors' code does."""
    arguments = dict(published_arithmetic=published) if name in VARIANTS else {}
    return timm.create_model(name, num_classes=CLASSES, **arguments)


def training_step(model, images):
    """A function that trains `model` by one step."""
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


def measure(name, way, task, pictures, repeats, device):
    """(images a second, peak memory in GB or None)."""
    published, compiled = way.startswith("published"), way.endswith("compiled")
    torch.manual_seed(0)
    torch.compiler.reset()
    model = build(name, published).to(device).train(task == "training")
    if task == "merged" and name in VARIANTS:
        model.reparameterize_unireplknet()
    images = torch.randn(pictures, 3, IMG_SIZE, IMG_SIZE, device=device)
    if compiled:
        # Small batches wait for the CPU to launch kernels, which CUDA graphs do at once.
        model = torch.compile(model, mode="reduce-overhead" if task == "merged" and device.type == "cuda" else None)
    step = (training_step if task == "training" else inference)(model, images)
    with forced("pytorch" if published else "auto"):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            step()
            torch.cuda.reset_peak_memory_stats(device)
        [duration] = milliseconds([step], device, repeats)
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return 1e3 * pictures / duration, memory


def main():
    for name in MODELS:
        if name not in VARIANTS:
            raise UserError(f"MODELS must hold names out of {', '.join(VARIANTS)}, got {name!r}")
    if PEER and PEER not in timm.list_models():
        raise UserError(f"PEER must be a network that timm lists, or '', got {PEER!r}")
    if IMG_SIZE < 32 or min(BATCH_SIZES, default=1) < 1 or REPEATS < 0:
        raise UserError("IMG_SIZE must be at least 32, BATCH_SIZES at least 1, REPEATS at least 0")
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
        (task, pictures, name, way)
        for task in ("training", "merged")
        for pictures in BATCH_SIZES or ([1, 32, 128, 256] if cuda else [1, 8])
        for name, way in ways
    ]
    print("| task | batch | network | way | images/s | memory, GB |")
    print("|---|---|---|---|---|---|")
    for task, pictures, name, way in tqdm(jobs, unit="way", leave=False):
        try:
            speed, memory = measure(name, way, task, pictures, repeats, device)
            cells = [f"{speed:.1f}", "-" if memory is None else f"{memory:.1f}"]
        except Exception as error:  # memory full, no C compiler, ...: the others are still worth knowing
            reason = str(error).strip().partition("\n")[0]
            cells = [f"{type(error).__name__}: {reason[:80]}", "-"]
        tqdm.write(f"| {task} | {pictures} | {name} | {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run(main)
