"""tools/export.py: every file predicts as the trained network does, and test.py runs ONNX."""

import contextlib
import csv
import importlib.util
import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, ROOT

import models  # noqa: F401  registers the variants
from common.checkpoint import build_network, load_checkpoint, save_checkpoint
from common.dataset import eval_transform
from common.evaluation import accuracy, choose_images, compute_logits
from common.images import load_image
from common.onnx_network import OnnxNetwork
from common.options import ConstantError, UserError, set_constants
from tools import export

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

# All that the structure has, in small: a 3 x 3 kernel and kernels with dilated branches.
TINY = dict(
    num_classes=len(CLASSES),
    depths=[1, 1, 1, 1],
    dims=[16, 32, 64, 96],
    kernel_sizes=[[3], [13], [13], [13]],
    layer_scale_init_value=0.1,
)


@pytest.fixture(scope="module")
def exported(make_data1, tmp_path_factory):
    """(a folder with data, a checkpoint and all files in exports/unireplknet_a, what was printed)."""
    place = tmp_path_factory.mktemp("exported")
    for part in ("train", "val"):
        make_data1(place / "data" / part, dict.fromkeys(CLASSES, 3))
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(place)
        (place / "checkpoints" / "unireplknet_a").mkdir(parents=True)
        write_checkpoint("checkpoints/unireplknet_a/best.pth")
        patch.setattr(export, "CALIBRATION", 8)
        export.main()
    return place, out.getvalue()


def write_checkpoint(path):
    """A network with random weights, whose batch norms know the statistics of images, as after training."""
    torch.manual_seed(0)
    network = timm.create_model("unireplknet_a", **TINY).train()
    paths, _ = choose_images("data/train", sorted(CLASSES), 0)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    transform = eval_transform(32, mean, std)
    images = torch.stack([transform(load_image(path)) for path in paths])
    with torch.no_grad():
        network.head.weight.normal_()
        for _ in range(20):
            network(images)
    about = dict(arch="unireplknet_a", model_args=TINY, classes=sorted(CLASSES), mean=mean, std=std, img_size=32)
    save_checkpoint(dict(about, state_dict=network.state_dict()), path)


@pytest.fixture
def files(exported, monkeypatch):
    """The folder of the exported files, in the folder where they were made."""
    monkeypatch.chdir(exported[0])
    return exported[0] / "exports" / "unireplknet_a"


@pytest.fixture(scope="module")
def checkpoint(exported):
    return load_checkpoint(exported[0] / "checkpoints" / "unireplknet_a" / "best.pth")


@pytest.fixture(scope="module")
def val(exported, checkpoint):
    """(normalised images of data/val (9, 3, 32, 32), their labels, logits of the network as trained)."""
    paths, labels = choose_images(exported[0] / "data" / "val", checkpoint["classes"], 0)
    transform = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])
    images = torch.stack([transform(load_image(path)) for path in paths])
    return images, labels, compute_logits(build_network(checkpoint, merge=False), paths, transform)


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_onnx_predicts_as_the_trained_network_with_batches_of_any_size(files, val, batch):
    images, _, expected = val
    network = OnnxNetwork(files / "model.onnx")
    logits = torch.cat([network(part) for part in images.split(batch)])
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)


def test_onnx_needs_nothing_but_the_standard_and_is_merged(files):
    model = onnx.load(files / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    operators = [node.op_type for node in model.graph.node]
    # Five of the stem and the downsampling, and one of each of 4 blocks, of which each has two of SE; and the head.
    assert operators.count("Conv") == 5 + 4 and "BatchNormalization" not in operators
    assert operators.count("Gemm") == 4 * 2 + 1
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_metadata_beside_the_weights(files, checkpoint):
    expected = {name: checkpoint[name] for name in ("arch", "classes", "mean", "std", "img_size")}
    assert expected["classes"] == list(CLASSES)
    for name in ("model.onnx", "model.int8.onnx"):
        assert OnnxNetwork(files / name).about == expected
    inside = {"metadata.json": ""}
    torch.export.load(files / "model.pt2", extra_files=inside)
    assert json.loads(inside["metadata.json"]) == expected


def test_the_program_predicts_as_the_trained_network(files, val):
    images, _, expected = val
    program = torch.export.load(files / "model.pt2")
    assert not [node for node in program.graph.nodes if str(node.target).startswith("unireplknet")]
    module = program.module()
    for batch in (1, 9):
        logits = torch.cat([module(part) for part in images.split(batch)]).detach()
        np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)


def test_timm_reads_its_files_by_its_own_means(files, checkpoint, val):
    if tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 16):
        pytest.skip("this version of timm cannot read from a folder")
    network = timm.create_model(f"local-dir:{files / 'timm'}", pretrained=True).eval()
    assert network.pretrained_cfg["label_names"] == list(CLASSES)
    with torch.no_grad():
        np.testing.assert_allclose(network(val[0]).numpy(), val[2], atol=1e-4)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    ours = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])
    photo = load_image(next((files.parent.parent / "data" / "val" / "Maize").iterdir())).resize((70, 45))
    torch.testing.assert_close(theirs(photo), ours(photo))


def test_8_bits_are_8_bits_and_their_accuracy_is_reported(exported, files, val):
    images, labels, expected = val
    tensors = [onnx.load(files / name).graph.initializer for name in ("model.int8.onnx", "model.onnx")]
    kernels = [tensor for tensor in tensors[0] if tensor.data_type == onnx.TensorProto.INT8]
    # The rest are biases and norms, of which a network as small as this has many.
    assert sum(np.prod(tensor.dims) for tensor in kernels) > 0.8 * sum(np.prod(tensor.dims) for tensor in tensors[1])
    logits = OnnxNetwork(files / "model.int8.onnx")(images).numpy()
    assert 1e-4 < abs(logits - expected).max() < 0.3 * abs(expected).max()
    reported = dict(re.findall(r"^(\S.*?)  +acc1 ([\d.]+) %", exported[1], re.MULTILINE))
    assert float(reported["PyTorch, as trained"]) == pytest.approx(accuracy(expected, labels), abs=0.01)
    assert float(reported["model.int8.onnx"]) == pytest.approx(accuracy(logits, labels), abs=0.01)


def test_a_file_that_differs_is_refused_and_the_earlier_one_stays(files, monkeypatch):
    before = (files / "timm" / "model.safetensors").read_bytes()
    monkeypatch.setattr(export, "FORMATS", ["timm"])
    write = export.write_timm

    def write_wrong(checkpoint, folder):
        write(checkpoint, folder)
        tensors = export.safetensors.torch.load_file(folder / "model.safetensors")
        tensors["head.bias"] += 0.001
        export.safetensors.torch.save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(export, "write_timm", write_wrong)
    with pytest.raises(UserError, match="timm differs from the trained network by 1.0e-03, more than TOL.* 1.0e-04"):
        export.main()
    assert (files / "timm" / "model.safetensors").read_bytes() == before
    assert {file.name for file in files.iterdir()} == {"model.onnx", "model.int8.onnx", "model.pt2", "timm"}


def test_test_py_predicts_the_same_by_onnxruntime(exported, files, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("test_script", ROOT / "test.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    tables = []
    for number, name in enumerate(("checkpoints/unireplknet_a/best.pth", "exports/unireplknet_a/model.onnx")):
        output = tmp_path / f"results{number}"
        for constant, value in dict(CHECKPOINT=name, OUTPUT=str(output), DEVICE="cpu", WORKERS=0, AMP="off").items():
            monkeypatch.setattr(script, constant, value)
        assert script.main() == 0
        with open(output / "predictions.csv", encoding="utf-8-sig", newline="") as file:
            rows = [(row["image"], row["class_1"], float(row["probability_1"])) for row in csv.DictReader(file)]
        tables.append(rows)
    assert "onnxruntime" in capsys.readouterr().out
    assert len(tables[0]) == 9
    for left, right in zip(*tables, strict=True):
        assert left[:2] == right[:2] and left[2] == pytest.approx(right[2], abs=1e-4)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--formats", "onxx"], 'FORMATS must be a list of "onnx", "int8", "program" or "timm" that is not empty'),
        (["--formats", ""], "FORMATS must be a list"),
        (["--images", "-1"], "IMAGES must be a whole number of at least 0"),
        (["--calibration", "0"], "CALIBRATION must be a whole number of at least 1"),
    ],
)
def test_a_constant_that_is_refused(words, message):
    with pytest.raises(ConstantError, match=message):
        set_constants(vars(export).copy(), words)


def test_bad_input_gets_one_sentence(files, tmp_path):
    (tmp_path / "val" / "Barley").mkdir(parents=True)
    shutil.copy(next((files.parent.parent / "data" / "val" / "Maize").iterdir()), tmp_path / "val" / "Barley")
    with pytest.raises(UserError, match="only one of them has Barley, Common wheat"):
        choose_images(tmp_path / "val", sorted(CLASSES), 5)
    with pytest.raises(UserError, match="nothing.onnx"):
        OnnxNetwork("nothing.onnx")
    (tmp_path / "cut.onnx").write_bytes((files / "model.onnx").read_bytes()[:10_000])
    with pytest.raises(UserError, match="cut.onnx is damaged or no"):
        OnnxNetwork(tmp_path / "cut.onnx")
    model = onnx.load(files / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(UserError, match="bare.onnx lacks arch, classes"):
        OnnxNetwork(tmp_path / "bare.onnx")


def test_an_absent_package_is_named(files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match="needs the package onnxruntime .* pip install onnxruntime"):
        OnnxNetwork(files / "model.onnx")


def test_images_are_chosen_from_all_classes_alike(files):
    paths, labels = choose_images("data/val", list(CLASSES), 6)
    assert np.bincount(labels).tolist() == [2, 2, 2] and len(set(paths)) == 6
    assert [list(CLASSES)[label] for label in labels] == [path.parent.name for path in paths]
    every = choose_images("data/val", list(CLASSES), 0)[0]
    assert len(every) == 9 and every[:6] == paths  # a smaller number chooses the first of a larger one


def test_all_missing_packages_of_an_export_are_named_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(export, "FORMATS", ["int8"])
    with pytest.raises(UserError, match=r"needs the packages onnx onnxscript \(.*\); pip install onnx onnxscript$"):
        export.main()
