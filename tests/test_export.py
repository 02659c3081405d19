"""tools/export.py: every file answers as the trained network does, and test.py runs ONNX."""

import contextlib
import csv
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES

from common.checkpoint import build_network, load_checkpoint
from common.dataset import eval_transform
from common.evaluation import accuracy, choose_pictures, compute_logits
from common.images import load_image
from common.onnx_network import OnnxNetwork
from common.options import UserError
from tools import export

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """(a copy of `trained` with all files in exports/unireplknet_a, what was printed)."""
    place = tmp_path_factory.mktemp("exported") / "place"
    shutil.copytree(trained, place, copy_function=os.link)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(place)
        patch.setattr(export, "CALIBRATION", 8)
        export.main()
    return place, out.getvalue()


@pytest.fixture
def files(exported, monkeypatch):
    """The folder of the exported files, in the place where they were made."""
    monkeypatch.chdir(exported[0])
    return exported[0] / "exports" / "unireplknet_a"


@pytest.fixture
def checkpoint(files):
    return load_checkpoint("checkpoints/unireplknet_a/best.pth")


@pytest.fixture
def pictures(checkpoint):
    """(normalised pictures of data/val (9, 3, 32, 32), their labels, logits of the network as trained)."""
    paths, labels = choose_pictures("data/val", checkpoint["classes"], 0)
    transform = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])
    images = torch.stack([transform(load_image(path)) for path in paths])
    return images, labels, compute_logits(build_network(checkpoint, merge=False), paths, transform)


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_onnx_answers_as_the_trained_network_with_batches_of_any_size(files, pictures, batch):
    images, _, expected = pictures
    answers = torch.cat([OnnxNetwork(files / "model.onnx")(part) for part in images.split(batch)])
    np.testing.assert_allclose(answers.numpy(), expected, atol=1e-4)


def test_onnx_needs_nothing_but_the_standard_and_is_merged(files):
    model = onnx.load(files / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    operators = [node.op_type for node in model.graph.node]
    # Five of the stem and the downsampling, and for each of 12 blocks one depthwise and two of SE.
    assert operators.count("Conv") == 5 + 12 * 3 and "BatchNormalization" not in operators
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_what_stands_beside_the_weights(files, checkpoint):
    wanted = {name: checkpoint[name] for name in ("arch", "classes", "mean", "std", "img_size")}
    assert wanted["classes"] == list(CLASSES)
    for name in ("model.onnx", "model.int8.onnx"):
        assert OnnxNetwork(files / name).about == wanted
    inside = {"metadata.json": ""}
    torch.export.load(files / "model.pt2", extra_files=inside)
    assert json.loads(inside["metadata.json"]) == wanted


@pytest.mark.parametrize("batch", [1, 9])
def test_the_program_answers_as_the_trained_network(files, pictures, batch):
    images, _, expected = pictures
    program = torch.export.load(files / "model.pt2")
    assert not [node for node in program.graph.nodes if str(node.target).startswith("unireplknet")]
    answers = torch.cat([program.module()(part) for part in images.split(batch)]).detach()
    np.testing.assert_allclose(answers.numpy(), expected, atol=1e-4)


def test_timm_reads_its_files_by_its_own_means(files, checkpoint, pictures):
    if tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 16):
        pytest.skip("this version of timm cannot read from a folder")
    network = timm.create_model(f"local-dir:{files / 'timm'}", pretrained=True).eval()
    assert network.pretrained_cfg["label_names"] == list(CLASSES)
    with torch.no_grad():
        np.testing.assert_allclose(network(pictures[0]).numpy(), pictures[2], atol=1e-4)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    ours = eval_transform(checkpoint["img_size"], checkpoint["mean"], checkpoint["std"])
    photo = load_image(next((files.parent.parent / "data" / "val" / "Maize").iterdir())).resize((70, 45))
    torch.testing.assert_close(theirs(photo), ours(photo))


def test_8_bits_are_8_bits_and_their_accuracy_is_told(exported, files, pictures):
    images, labels, expected = pictures
    weights = {tensor.name: tensor for tensor in onnx.load(files / "model.int8.onnx").graph.initializer}
    kernels = [tensor for tensor in weights.values() if tensor.data_type == onnx.TensorProto.INT8]
    assert sum(np.prod(tensor.dims) for tensor in kernels) > 3.5e6  # of 4.3 million
    assert (files / "model.int8.onnx").stat().st_size < 0.35 * (files / "model.onnx").stat().st_size
    answers = OnnxNetwork(files / "model.int8.onnx")(images).numpy()
    assert 1e-4 < abs(answers - expected).max() < 0.3 * abs(expected).max()
    told = dict(re.findall(r"^(\S.*?)  +acc1 ([\d.]+) %", exported[1], re.MULTILINE))
    assert float(told["PyTorch, as trained"]) == pytest.approx(accuracy(expected, labels), abs=0.01)
    assert float(told["model.int8.onnx"]) == pytest.approx(accuracy(answers, labels), abs=0.01)


def test_a_file_that_differs_is_refused_and_the_one_before_stays(files, monkeypatch):
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


def test_test_py_gives_the_same_answers_by_onnxruntime(run_script, exported, tmp_path):
    tables = []
    for number, name in enumerate(("checkpoints/unireplknet_a/best.pth", "exports/unireplknet_a/model.onnx")):
        options = ("--checkpoint", exported[0] / name, "--output", f"results{number}", "--device", "cpu")
        result = run_script("test.py", exported[0] / "data" / "val", *options)
        assert result.returncode == 0, result.stderr
        assert re.search(r"acc1 .* on 9 pictures\n9 pictures in .* s, .* a second", result.stdout)
        with open(tmp_path / f"results{number}" / "predictions.csv", encoding="utf-8-sig", newline="") as file:
            rows = [(row["image"], row["class_1"], float(row["probability_1"])) for row in csv.DictReader(file)]
        tables.append(rows)
    assert "onnxruntime" in result.stdout
    for left, right in zip(*tables, strict=True):
        assert left[:2] == right[:2] and left[2] == pytest.approx(right[2], abs=1e-4)


def test_bad_input_gets_one_sentence(files, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "FORMATS", ["onxx"])
    with pytest.raises(UserError, match="FORMATS must name some of onnx, int8, program and timm"):
        export.main()
    (tmp_path / "val" / "Barley").mkdir(parents=True)
    shutil.copy(next((files.parent.parent / "data" / "val" / "Maize").iterdir()), tmp_path / "val" / "Barley")
    with pytest.raises(UserError, match="only one of them has Barley, Common wheat"):
        choose_pictures(tmp_path / "val", sorted(CLASSES), 5)
    with pytest.raises(UserError, match="there is no file nothing.onnx"):
        OnnxNetwork("nothing.onnx")
    (tmp_path / "cut.onnx").write_bytes((files / "model.onnx").read_bytes()[:10_000])
    with pytest.raises(UserError, match="cut.onnx is damaged or no ONNX file"):
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


def test_pictures_are_chosen_from_all_classes_alike(files):
    paths, labels = choose_pictures("data/val", list(CLASSES), 6)
    assert np.bincount(labels).tolist() == [2, 2, 2] and len(set(paths)) == 6
    assert [list(CLASSES)[label] for label in labels] == [path.parent.name for path in paths]
    assert len(choose_pictures("data/val", list(CLASSES), 0)[0]) == 9
