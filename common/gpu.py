"""What keeps a run from a machine's NVIDIA GPU, or slows it there: one sentence for each, with the remedy."""

import functools
import os
import re
import shutil
import sys
from pathlib import Path

import torch

INSTALL = "install PyTorch by the command that https://pytorch.org/get-started/locally shows"
PCI_DEVICES = Path("/sys/bus/pci/devices")
DRIVER_FILES = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
CONTAINER_FILES = (Path("/.dockerenv"), Path("/run/.containerenv"))

# Why the Triton kernels do not run: (what the reason holds, remedy).
TRITON_REMEDIES = (
    (r"No module named 'triton'", None),  # depends on the system, see `find_triton_remedy`
    (r"Failed to find C compiler", "Triton needs a C compiler: apt install gcc, or set the environment variable CC"),
    (r"Python\.h", "Triton needs Python's header files: apt install python3-dev"),
    (
        r"capability \d\.\d is below 8\.0",
        "the Triton kernels need an RTX 30, an A100 or newer; AMP fp16 is right for this GPU, and with it the CUDA "
        "extension depthwise_conv2d_implicit_gemm, or else PyTorch's convolution",
    ),
)


# --- no GPU at all


def find_reason():
    """Why PyTorch finds no GPU, with the remedy; "" where it does, or where the machine seems to have none."""
    if torch.version.hip is not None or torch.cuda.is_available():
        return ""
    driver = any(path.exists() for path in DRIVER_FILES) or shutil.which("nvidia-smi") is not None
    if not driver and not has_nvidia_card():
        return ""
    if torch.version.cuda is None:
        return f"this machine has an NVIDIA GPU, but this PyTorch ({torch.__version__}) is for CPUs only; {INSTALL}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return f"the environment variable CUDA_VISIBLE_DEVICES is {hidden!r}, which hides all GPUs; unset it"
    return explain_cuda_error(ask_cuda())


def ask_cuda():
    """What CUDA says about its failure, in one line."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())
    return "no CUDA-capable device is detected"


def explain_cuda_error(error):
    """The remedy for what CUDA says when it finds no GPU."""
    old = re.search(r"driver on your system is too old \(found version (\d+)\)", error)
    if old:
        version = int(old[1])
        supported = f"{version // 1000}.{version % 1000 // 10}"
        return (
            f"the NVIDIA driver is too old for this PyTorch: it supports CUDA {supported}, PyTorch {torch.__version__} "
            f"is built for CUDA {torch.version.cuda}; update the driver, or {INSTALL} for an older CUDA"
        )
    if "Found no NVIDIA driver" in error:
        if in_container():
            return (
                "this container does not see the GPU's driver; start it with docker run --gpus all, which needs the "
                "NVIDIA Container Toolkit on the host"
            )
        return "this machine has an NVIDIA GPU, but no driver for it; install the driver, and start the machine anew"
    if re.search(r"No CUDA GPUs are available|no CUDA-capable device", error):
        return (
            "the NVIDIA driver shows no GPU to this process; nvidia-smi -L lists what there is: one with MIG on needs "
            "an instance (nvidia-smi mig -cgi <profile> -C), a container --gpus all, a Slurm job --gpus=1"
        )
    if re.search(r"not yet initialized|error 802", error, re.IGNORECASE):
        return "the GPUs of this server are not initialized; its administrator starts nvidia-fabricmanager"
    if re.search(r"forward compatibility|error 804|driver/library version mismatch|error 803", error, re.IGNORECASE):
        return "driver and CUDA libraries do not fit together, as after an update of the driver; restart the machine"
    return f"CUDA does not start ({error[:200]}); {describe_smi()}"


def describe_smi():
    """Where to look next."""
    if shutil.which("nvidia-smi") is not None:
        return "nvidia-smi says whether the driver works"
    if in_container():
        return (
            "nvidia-smi is missing in this container; start it with --gpus all and "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        )
    return "nvidia-smi is missing, so the driver may not be installed"


def has_nvidia_card():
    """Whether Linux lists an NVIDIA graphics card or accelerator on the PCI bus."""
    for device in PCI_DEVICES.iterdir() if PCI_DEVICES.is_dir() else ():
        try:
            vendor, kind = (Path(device, name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def in_container():
    """Whether this is a container such as Docker's."""
    return any(path.exists() for path in CONTAINER_FILES) or "KUBERNETES_SERVICE_HOST" in os.environ


# --- a GPU with peculiarities


def why_unusable(device):
    """Why PyTorch has no machine code for the GPU `device`, with the remedy; "" where it has."""
    if torch.version.cuda is None:
        return ""
    capability = torch.cuda.get_device_capability(device)
    built = [re.match(r"(sm|compute)_(\d+)(\d)", arch) for arch in torch.cuda.get_arch_list()]
    built = [(match[1], (int(match[2]), int(match[3]))) for match in built if match]
    if not built or any(runs_on(kind, version, capability) for kind, version in built):
        return ""
    name = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
    least = min(version for _, version in built)
    if capability < least:
        return (
            f"{name} is older than this PyTorch supports, which is built for {least[0]}.{least[1]} and above; "
            f"{INSTALL} for an older CUDA"
        )
    return f"{name} is newer than this PyTorch ({torch.__version__}, CUDA {torch.version.cuda}); install a newer one"


def runs_on(kind, version, capability):
    """Whether code for `version` runs: machine code (sm) within a generation, PTX (compute) on all later GPUs."""
    return version <= capability and (kind == "compute" or version[0] == capability[0])


@functools.cache
def describe_gpus(launched=False):
    """What is to be known about the GPUs of this machine, a sentence each; nothing where they are alike.

    Args:
        launched: whether torchrun gave each process a GPU of its own.
    """
    sentences = []
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"cuda:{index} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for index, gpu in enumerate(gpus)]
    if len({(gpu.name, gpu.total_memory >> 30) for gpu in gpus}) > 1:
        if launched:
            advice = (
                "each step takes as long as on the slowest, and a batch must fit into the smallest; "
                "CUDA_VISIBLE_DEVICES selects those that are alike"
            )
        else:
            advice = "one process takes cuda:0 unless DEVICE names another"
        sentences.append(f"the GPUs differ ({'; '.join(names)}): {advice}")
    if any("MIG" in gpu.name for gpu in gpus):
        sentences.append(
            "this GPU is an instance of MIG: CUDA shows one instance to a process, so several of them cannot train "
            "together; a run of its own for each: CUDA_VISIBLE_DEVICES=MIG-<uuid>, as nvidia-smi -L lists them"
        )
    return tuple(sentences)


def find_triton_remedy(reason):
    """The remedy for a reason why the Triton kernels do not run, or ""."""
    for pattern, remedy in TRITON_REMEDIES:
        if re.search(pattern, reason):
            return remedy or f"pip install {'triton-windows' if sys.platform == 'win32' else 'triton'}"
    return ""


def describe_memory(device):
    """What else fills the memory of a GPU, as the end of a sentence; "" where little does, or on other devices."""
    if device.type != "cuda":
        return ""
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return ""
    others = total - free - torch.cuda.memory_reserved(device)
    if others < 0.1 * total:
        return ""
    return (
        f"; other programs hold {others / 2**30:.1f} of the {total / 2**30:.1f} GiB of this GPU: end them, nvidia-smi "
        "lists them"
    )
