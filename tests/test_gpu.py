"""What users of a GPU meet first, on stand-ins for machines: one true sentence with the remedy for each."""

import re
import types

import pytest
import torch

from benchmarks import memory
from common import device, gpu
from common.device import choose_amp, choose_device
from common.faults import split_when_out_of_memory
from common.options import ConstantError, UserError

CUDA = torch.device("cuda")
OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without GPU, driver or container; machine(card=True, ...) adds what is named."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("CUDA_VISIBLE_DEVICES", "KUBERNETES_SERVICE_HOST", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu, "PCI_DEVICES", tmp_path / "pci")
    monkeypatch.setattr(gpu, "DRIVER_FILES", (tmp_path / "driver",))
    monkeypatch.setattr(gpu, "CONTAINER_FILES", (tmp_path / "container",))
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    device.tell_once.cache_clear()
    gpu.describe_gpus.cache_clear()

    def build(card=None, driver=False, container=False, smi=False, says=None):
        if card is not None:
            folder = tmp_path / "pci" / "0000:01:00.0"
            folder.mkdir(parents=True)
            for name, value in zip(("vendor", "class"), card):
                (folder / name).write_text(f"{value}\n", encoding="ascii")
        if driver:
            (tmp_path / "driver").touch()
        if container:
            (tmp_path / "container").touch()
        if smi:
            monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")

        def init():
            if says is not None:
                raise RuntimeError(says)

        monkeypatch.setattr(torch.cuda, "init", init)

    yield build
    device.tell_once.cache_clear()
    gpu.describe_gpus.cache_clear()


CARD = ("0x10de", "0x030000")


@pytest.mark.parametrize(
    ("made", "cuda", "expected"),
    [
        (dict(card=CARD, driver=True), None, "this PyTorch (.*) is for CPUs only; install PyTorch by the command"),
        (dict(smi=True), None, "has an NVIDIA GPU, but this PyTorch .* is for CPUs only"),  # as on Windows
        (dict(card=CARD, driver=True, says=OLD_DRIVER), "13.0", "supports CUDA 11.4, .* 13.0; update the driver"),
        (dict(card=CARD, says=NO_DRIVER), "13.0", "no driver for it; install the driver"),
        (dict(card=CARD, says=NO_DRIVER, container=True), "13.0", "start it with docker run --gpus all"),
        (dict(driver=True, says="No CUDA GPUs are available"), "13.0", "MIG on needs an instance"),
        (dict(driver=True), "13.0", "the NVIDIA driver shows no GPU to this process"),
        (dict(driver=True, says="Error 802: system not yet initialized"), "13.0", "starts nvidia-fabricmanager"),
        (dict(driver=True, says="Error 804: forward compatibility was attempted"), "13.0", "restart the machine"),
        (dict(smi=True, says="CUDA unknown error"), "13.0", "CUDA unknown error.; nvidia-smi says whether the driver"),
        (dict(driver=True, container=True, says="CUDA unknown error"), "13.0", "CAPABILITIES=compute,utility"),
        (dict(driver=True, says="CUDA unknown error"), "13.0", "nvidia-smi is missing, so the driver may not"),
    ],
)  # fmt: skip
def test_a_machine_whose_gpu_pytorch_does_not_find(machine, monkeypatch, capsys, made, cuda, expected):
    machine(**made)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for _ in range(2):
        assert choose_device("auto").type == "cpu"
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("note: this runs without a GPU: "), text
    assert re.search(expected, text), text
    with pytest.raises(ConstantError, match=expected):
        choose_device("cuda")


@pytest.mark.parametrize("made", [{}, dict(card=("0x8086", "0x030000")), dict(card=("0x10de", "0x040300"))])
def test_a_machine_without_an_nvidia_gpu_hears_nothing(machine, capsys, made):
    machine(**made)
    assert choose_device("auto").type == "cpu" and not capsys.readouterr().err


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_are_hidden_on_purpose(machine, monkeypatch, capsys, hidden):
    machine(card=CARD, driver=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert choose_device("auto").type == "cpu" and not capsys.readouterr().err
    with pytest.raises(ConstantError, match="CUDA_VISIBLE_DEVICES is '.*', which hides all GPUs; unset it"):
        choose_device("cuda")


def pretend(monkeypatch, *gpus, archs=("sm_75", "sm_80", "sm_86", "sm_90", "sm_120", "compute_120")):
    """GPUs (name, GiB, compute capability) that PyTorch finds."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(archs))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpus[0][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpus[0][2])
    properties = [types.SimpleNamespace(name=name, total_memory=memory << 30) for name, memory, _ in gpus]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("NVIDIA GeForce GTX 1080", (6, 1), "is older than this PyTorch supports, which is built for 7.5 and above"),
        ("Tesla V100", (7, 0), "older than this PyTorch supports.* for an older CUDA, or set DEVICE to \"cpu\""),
        ("Tesla T4", (7, 5), None),
        ("NVIDIA GeForce RTX 4090", (8, 9), None),  # code for 8.6
        ("NVIDIA H100", (9, 0), None),
        ("NVIDIA GeForce RTX 5090", (12, 0), None),
        ("a later one", (13, 0), None),  # by PTX
    ],
)
def test_a_gpu_for_which_pytorch_has_no_code(machine, monkeypatch, capsys, name, capability, expected):
    pretend(monkeypatch, (name, 8, capability))
    if expected is None:
        assert choose_device("auto").type == "cuda" and not capsys.readouterr().err
    else:
        with pytest.raises(ConstantError, match=expected):
            choose_device("auto")


def test_a_gpu_that_is_too_new(machine, monkeypatch):
    pretend(monkeypatch, ("NVIDIA GeForce RTX 5090", 32, (12, 0)), archs=["sm_80", "sm_90"])
    with pytest.raises(ConstantError, match="RTX 5090 .* is newer than this PyTorch .*; install a newer one"):
        choose_device("auto")


@pytest.mark.parametrize(
    ("launched", "expected"), [(False, "takes cuda:0 unless DEVICE"), (True, "must fit into the smallest")]
)
def test_two_unequal_gpus(machine, monkeypatch, capsys, launched, expected):
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    pretend(monkeypatch, ("RTX 4090", 24, (8, 9)), ("RTX 3060", 12, (8, 6)))
    choose_device("auto")
    text = capsys.readouterr().err
    assert "the GPUs differ (cuda:0 RTX 4090, 24 GiB; cuda:1 RTX 3060, 12 GiB): " in text and expected in text
    gpu.describe_gpus.cache_clear()
    device.tell_once.cache_clear()
    pretend(monkeypatch, ("RTX 4090", 24, (8, 9)), ("RTX 4090", 24, (8, 9)))
    choose_device("auto")
    assert not capsys.readouterr().err


def test_an_instance_of_mig(machine, monkeypatch, capsys):
    pretend(monkeypatch, ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 40, (9, 0)))
    choose_device("auto")
    assert "an instance of MIG" in capsys.readouterr().err
    with pytest.raises(ConstantError, match="the GPUs of this machine are cuda:0 to cuda:0; .* MIG"):
        choose_device("cuda:1")


def test_a_gpu_without_bfloat16(machine, monkeypatch, capsys):
    monkeypatch.setattr(device, "has_bfloat16", lambda device: False)
    assert choose_amp("auto", CUDA) == torch.float16 and not capsys.readouterr().err
    assert choose_amp("bf16", CUDA) == torch.bfloat16
    assert "cuda has no bfloat16 in hardware, so AMP bf16 is slow there; fp16 is faster" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reason", "system", "remedy"),
    [
        ("ModuleNotFoundError: No module named 'triton'", "win32", "pip install triton-windows"),
        ("ModuleNotFoundError: No module named 'triton'", "linux", "pip install triton"),
        ("RuntimeError: Failed to find C compiler. Please specify via CC", "linux", "apt install gcc"),
        ("fatal error: Python.h: No such file or directory", "linux", "apt install python3-dev"),
        ("compute capability 7.5 is below 8.0", "linux", "AMP fp16 .* extension .*, or else PyTorch's"),
        ("it computes bfloat16 and float16, not float32", "linux", "^$"),
    ],
)  # fmt: skip
def test_the_remedy_where_triton_does_not_run(monkeypatch, reason, system, remedy):
    monkeypatch.setattr(gpu.sys, "platform", system)
    assert re.search(remedy, gpu.find_triton_remedy(f"PyTorch's depthwise convolution (not triton: {reason})"))


@pytest.mark.parametrize(("free", "held"), [(1, True), (22, False)])
def test_memory_that_other_programs_hold(monkeypatch, free, held):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 30, 24 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 << 30)
    text = "; other programs hold 21.0 of the 24.0 GiB of this GPU: end them, nvidia-smi lists them" if held else ""
    assert gpu.describe_memory(CUDA) == text and gpu.describe_memory(torch.device("cpu")) == ""


def test_memory_full_at_the_first_step(monkeypatch):
    monkeypatch.setattr("common.faults.describe_memory", lambda device: "; other programs hold it")
    state = types.SimpleNamespace(micro_batches=1, model=torch.nn.Linear(1, 1))
    for batch_size, world_size in ((1, 1), (8, 2)):
        sampler = types.SimpleNamespace(batch_size=batch_size, world_size=world_size)
        with pytest.raises(UserError, match="lower BATCH_SIZE, .* GRAD_CHECKPOINTING; other programs hold it$"):
            with split_when_out_of_memory(state, sampler):
                raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.skipif(torch.__version__ < "2.10", reason="PyTorch 2.9 aborts on tensors that pretend to be on a GPU")
def test_the_batch_that_fits_is_computed(capsys, monkeypatch):
    fixed, saved = memory.measure("unireplknet_test", 64, torch.bfloat16, False, 1)
    assert fixed > 0 and saved > 0
    assert memory.measure("unireplknet_test", 64, torch.float32, False, 1)[1] > 1.3 * saved
    assert memory.measure("unireplknet_test", 64, torch.bfloat16, True, 1)[1] < saved
    assert memory.measure("unireplknet_test", 128, torch.bfloat16, False, 1)[1] == pytest.approx(4 * saved, rel=0.05)
    assert memory.measure("unireplknet_test", 64, torch.bfloat16, False, 2)[0] > fixed
    assert not torch.is_autocast_enabled("cuda")
    assert memory.find_batch(6.4, 0.5, 0.1) == 32 and memory.find_batch(7, 0.5, 0.1) == 64
    assert memory.find_batch(8, 8, 0.1) == 0
    monkeypatch.setattr(memory, "MODELS", ["unireplknet_test"])
    memory.main()
    assert "| `unireplknet_test` | 0.00 | " in capsys.readouterr().out
