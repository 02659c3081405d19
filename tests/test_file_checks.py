"""What files say about themselves: one field changed at a time, each gets one sentence or changes no prediction."""

import copy
import csv
import json
import math
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import unireplknet_test

from common import checkpoint, checkpoint_check, manifest, network, onnx_network, tables
from common.checkpoint import build_network, load_checkpoint, load_file, save_checkpoint
from common.checkpoint_check import check_classifier
from common.file_checks import brief, naming
from common.files import write_csv
from common.network import read_weights
from common.options import UserError
from tools import forecast
from tools.series import read_series

WRONG = dict(
    none=None, text="x", empty="", path="../../x", number=3.5, zero=0, negative=-1, nan=math.nan, infinite=math.inf,
    huge=10**400, boolean=True, empty_list=[], texts=["x", "y"], nested=[[[1]]], wrong_length=[1.0], empty_dict={},
    dictionary={"x": {"y": 1}}, bytes=b"x", tensor=torch.zeros(3), scalar=torch.tensor(1), nan_list=[math.nan] * 3,
)  # fmt: skip
LONG_NAME = "x" * 100_000


def plain_checkpoint():
    """A checkpoint as train.py saves it, of a network with random weights."""
    torch.manual_seed(0)
    arguments = dict(num_classes=3, layer_scale_init_value=0.1, published_arithmetic=False)
    model = unireplknet_test(**arguments)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return dict(
        arch=SMALL["MODEL"], model_args=arguments, classes=["a", "b", "玉米 苗"], mean=[0.5, 0.4, 0.3], std=[0.2] * 3,
        img_size=32, state_dict=model.state_dict(), state_dict_ema=copy.deepcopy(model.state_dict()), ema_updates=1,
        optimizer=optimizer.state_dict(), scaler={}, epoch=1, pictures=0, totals=[0.0] * 4, seconds=0.0, skipped=0,
        skipped_in_a_row=0, pieces=1, best_acc1=50.0, best_size=32, versions=dict(python="3", processes=1),
        history=[dict(epoch=1, lr=1e-3, train_loss=1.0, train_acc1=None, val_loss=math.nan, val_acc1=50.0)],
        config=dict(IMG_SIZE=32, START_SIZE=None, MIXUP=0.8, OPTIMIZER="adamw", DROP_PATH=0.1, QUARTER_TURNS=True),
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved():
    return plain_checkpoint()


@pytest.fixture(autouse=True)
def built_once(monkeypatch):
    """Of equal arguments a test builds one outline only, which takes most of the time."""
    outlines, original = {}, checkpoint_check.outline_network

    def outline(arch, arguments):
        key = repr((arch, arguments))
        if key not in outlines:
            outlines[key] = original(arch, arguments)
        return outlines[key]

    for module in (checkpoint_check, forecast):
        monkeypatch.setattr(module, "outline_network", outline)


@torch.inference_mode()
def predict(values):
    torch.manual_seed(1)
    return build_network(values)(torch.randn(2, 3, 32, 32))


def put(values, *keys, value=None, drop=False):
    """A copy of nested dicts and lists with one value replaced, or left out."""
    copied = copy.copy(values)
    if len(keys) > 1:
        copied[keys[0]] = put(values[keys[0]], *keys[1:], value=value, drop=drop)
    elif drop:
        del copied[keys[0]]
    else:
        copied[keys[0]] = value
    return copied


def every_change(values, *paths):
    """Yield (name, copy of nested dicts with one value changed) for each of `paths` and each wrong value."""
    for path in paths:
        where = ".".join(map(str, path))
        yield f"{where} removed", put(values, *path, drop=True)
        for name, wrong in WRONG.items():
            yield f"{where} {name}", put(values, *path, value=wrong)


def refused(check, values):
    """The sentence with which values are refused, by a function that raises ValueError; None if they are not."""
    try:
        with naming("some/file.pth", "use another one"):
            check(values)
    except UserError as error:
        sentence = str(error)
        assert sentence.startswith("some/file.pth cannot be used: ") and sentence.endswith("; use another one")
        assert "\n" not in sentence and len(sentence) < 400, sentence
        return sentence
    return None


def check_all(changes, check, harmless=lambda name, values: None):
    """(number of changes, names of those that were not refused, each of which must be harmless)."""
    count, accepted = 0, []
    for name, values in changes:
        count += 1
        if refused(check, values) is None:
            accepted.append(name)
            harmless(name, values)
    return count, accepted


def test_a_checkpoint_as_it_is_saved_can_be_used(saved):
    assert refused(check_classifier, saved) is None


def test_one_changed_field_of_a_checkpoint_is_refused_or_harmless(saved):
    needed = [key for key in checkpoint.REQUIRED if key != "state_dict"]
    paths = [
        (key,) for key in [*needed, "state_dict", "state_dict_ema", *sorted(set(saved) - set(checkpoint.REQUIRED))]
    ]
    paths = [path for path in dict.fromkeys(paths)]
    paths += [("model_args", "num_classes"), ("model_args", "layer_scale_init_value"), ("history", 0, "epoch")]
    paths += [("model_args", "published_arithmetic"), ("optimizer", "state"), ("optimizer", "param_groups")]
    paths += [("optimizer", "state", 0), ("optimizer", "param_groups", 0, "params"), ("config", "MIXUP")]
    expected = predict(saved)

    def same(name, values):  # what is accepted elsewhere has no part in a prediction
        if name.split(" ")[0].split(".")[0] in ("state_dict_ema", "model_args"):
            torch.testing.assert_close(predict(values), expected)

    missing = {f"{key} removed" for key in checkpoint.REQUIRED}  # load_checkpoint names these
    changes = ((name, values) for name, values in every_change(saved, *paths) if name not in missing)
    count, accepted = check_all(changes, check_classifier, same)
    print(f"{count} changed fields: {count - len(accepted)} refused, {len(accepted)} harmless")
    assert count > 600
    # What networks are built of, and what they see, is never accepted with another kind of value.
    core = [name for name in accepted if name.split(" ")[0] in needed]
    assert core == [], core


CORE = {
    "tag": dict(arch="unireplknet_a.in1k"), "hub": dict(arch="hf-hub:timm/resnet18"),
    "old hub": dict(arch="hf_hub:x/y"),
    "local": dict(arch="local-dir:x/../../../victim"), "path": dict(arch="../unireplknet_test"),
    "case": dict(arch="UniRepLKNet_test"), "space": dict(arch=" unireplknet_test"), "long": dict(arch=LONG_NAME),
    "other network": dict(arch="resnet18"), "larger network": dict(arch="unireplknet_xl"),
    "dlinear": dict(arch="dlinear"),
    "twin classes": dict(classes=["a", "b", "a"]), "empty class": dict(classes=["a", "", "c"]),
    "number as class": dict(classes=["a", "b", 3]), "two classes": dict(classes=["a", "b"]),
    "four classes": dict(classes=["a", "b", "c", "d"]), "class as path": dict(classes=["a", "b", "../../victim"]),
    "absolute class": dict(classes=["a", "b", "/tmp/victim"]), "parent": dict(classes=["a", "b", ".."]),
    "this folder": dict(classes=["a", "b", "."]), "NUL": dict(classes=["a", "b", "c\0d"]),
    "long class": dict(classes=["a", "b", LONG_NAME]), "classes as dict": dict(classes={"a": 0, "b": 1, "c": 2}),
    "classes as text": dict(classes="abc"), "std 0": dict(std=[0.2, 0.0, 0.2]),
    "std negative": dict(std=[0.2, -0.2, 0.2]),
    "std tiny": dict(std=[1e-300] * 3), "std huge": dict(std=[1e300] * 3), "std one": dict(std=[0.2]),
    "std four": dict(std=[0.2] * 4), "mean above 1": dict(mean=[127.0] * 3), "mean text": dict(mean=["0.5"] * 3),
    "mean bool": dict(mean=[True] * 3), "mean tensor": dict(mean=torch.full((3,), 0.5)),
    "mean none": dict(mean=[None] * 3),
    "size 31": dict(img_size=31), "size 0": dict(img_size=0), "size huge": dict(img_size=10**6),
    "size float": dict(img_size=32.0), "size bool": dict(img_size=True), "size one": dict(img_size=[32]),
    "size three": dict(img_size=[3, 32, 32]), "size area": dict(img_size=[2**17, 2**17]),
    "size text": dict(img_size="32"),
    "size negative": dict(img_size=[-32, 32]), "sound": dict(sound=dict(sample_rate=16000)),
    "sound text": dict(sound="x"),
}  # fmt: skip
ARGUMENTS = dict(
    checkpoint_path="victim.pth", pretrained=True, pretrained_cfg={"url": "http://localhost/x"}, cache_dir="victim",
    pretrained_cfg_overlay={"file": "victim.pth"}, features_only=True, scriptable=True, exportable=True, no_jit=True,
    drop_path_rate=1.0, drop_rate=-0.1, in_chans=1, num_classes=10**9, depths=[10**6] * 4, dims=[10**8] * 4,
    kernel_sizes=[[10**6]] * 4, global_pool="", deploy=True, with_cp=True, use_sync_bn=True, head_init_scale=math.nan,
    attempt_use_lk_impl="x", colour="red", model_cfg={}, pruned=True, kwargs_filter=("x",), feature_cfg={},
    pretrained_strict=False,
    layer_scale_init_value=0.0, pretrained_filter_fn=print, device="cuda", dtype="float16", img_size=224,
    out_indices=[9], act_layer="x",
)  # fmt: skip


@pytest.mark.parametrize("name", CORE)
def test_a_description_that_no_run_writes_is_refused(name, saved):
    assert refused(check_classifier, saved | CORE[name])


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_no_run_writes_is_refused(name, saved):
    arguments = saved["model_args"] | {name: ARGUMENTS[name]}
    assert refused(check_classifier, saved | dict(model_args=arguments))
    others = dict(arch="resnet18", model_args=dict(num_classes=3) | {name: ARGUMENTS[name]})
    assert refused(check_classifier, saved | others)


def test_arguments_that_runs_write_are_accepted(saved):
    """Of today's and of the first versions, with stochastic depth and dropout as tools may set them."""
    expected = predict(saved)
    for arguments in (dict(drop_path_rate=0.1), dict(drop_rate=0.2), dict(in_chans=3), dict(depths=[1, 1, 2, 1])):
        changed = saved | dict(model_args=saved["model_args"] | arguments)
        assert refused(check_classifier, changed) is None
        torch.testing.assert_close(predict(changed), expected)
    del changed["model_args"]["published_arithmetic"]
    assert refused(check_classifier, changed) is None


HEAD, BUFFER, COUNTER = "head.weight", "stages.0.0.norm.running_var", "stages.0.0.norm.num_batches_tracked"


def changed_weights(weights):
    """Yield (name, {name: tensor}): one tensor changed."""
    for name, value in (("nan", math.nan), ("infinite", math.inf), ("negative infinite", -math.inf)):
        for key in (HEAD, BUFFER, "downsample_layers.0.0.weight"):
            tensor = weights[key].clone()
            tensor.view(-1)[-1] = value
            yield f"{name} in {key}", {key: tensor}
    head = weights[HEAD]
    yield "variance below 0", {BUFFER: -weights[BUFFER] - 1}
    yield "transposed", {HEAD: head.T.contiguous()}
    yield "flat", {HEAD: head.flatten()}
    yield "a row more", {HEAD: torch.cat([head, head[:1]])}
    yield "a row less", {HEAD: head[:2].clone()}
    yield "empty", {HEAD: head[:0].clone()}
    yield "integer", {HEAD: head.long()}
    yield "bool", {HEAD: head > 0}
    yield "byte", {HEAD: head.to(torch.uint8)}
    yield "complex", {HEAD: head.to(torch.complex64)}
    yield "float counter", {COUNTER: weights[COUNTER].float()}
    yield "sparse", {HEAD: head.to_sparse()}
    yield "sparse rows", {HEAD: head.to_sparse_csr()}
    yield "quantized", {HEAD: torch.quantize_per_tensor(head, 0.1, 0, torch.qint8)}
    yield "meta", {HEAD: head.to("meta")}
    yield "expanded", {HEAD: head[:1, :1].clone().expand(head.shape)}
    shared = torch.zeros(40)
    yield "shared", {HEAD: shared[:1].expand(3).unsqueeze(1).expand(3, 32), "head.bias": shared[:3]}
    flat = torch.zeros(4096)
    yield "overlapping", {name: flat[: t.numel()].view(t.shape) for name, t in weights.items() if 9 < t.numel() < 4096}
    for name, value in (("none", None), ("list", [1.0]), ("number", 1.0), ("text", "x"), ("dict", {})):
        yield name, {HEAD: value}
    yield "another name", {"head.weigth": head}
    yield "a number as name", {7: head}
    yield "name with a prefix", {f"module.{HEAD}": head}


@pytest.mark.parametrize("part", ["state_dict", "state_dict_ema"])
def test_weights_that_are_not_those_of_the_network_are_refused(part, saved):
    count, accepted = check_all(
        ((name, saved | {part: saved[part] | change}) for name, change in changed_weights(saved[part])),
        check_classifier,
    )
    assert count > 30 and accepted == []
    less = {name: tensor for name, tensor in saved[part].items() if name != HEAD}
    assert "lacks head.weight" in refused(check_classifier, saved | {part: less})


def test_weights_in_another_precision_are_those_of_the_network(saved):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        weights = {name: t.to(dtype) if t.is_floating_point() else t for name, t in saved["state_dict"].items()}
        changed = saved | dict(state_dict=weights, state_dict_ema=None)
        assert refused(check_classifier, changed) is None
        torch.testing.assert_close(predict(changed), predict(saved), rtol=0.1, atol=0.05)


def test_weights_that_overflow_are_refused(saved):
    weights = {name: t * 1e30 if t.dim() > 1 else t for name, t in saved["state_dict"].items()}
    with pytest.raises(UserError, match="its predictions are not finite"):
        build_network(saved | dict(state_dict=weights, state_dict_ema=None))


# --- through files: nothing else is read, written or called


WATCHED = []  # [list of (event, what)] while a test watches


def watch(event, arguments):
    if WATCHED and event.split(".")[0] in ("open", "socket", "subprocess", "os", "shutil", "ctypes"):
        WATCHED[-1].append((event, arguments))


sys.addaudithook(watch)  # for good: Python cannot take one away


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """In a folder with a victim, which must not be unpickled."""
    monkeypatch.chdir(tmp_path)

    class Victim:
        def __reduce__(self):
            return Path("exploded").touch, ()

    torch.save(dict(state_dict=Victim()), "victim.pth")
    calls, original = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: calls.append(args) or original(*args, **options))
    yield tmp_path
    assert len(calls) <= 1 and not Path("exploded").exists()


def try_file(values):
    """Save values, read them as the scripts do and build the network; returns the sentence, or "" if all went well."""
    torch.save(values, "some.pth")
    before = sorted(Path().rglob("*"))
    WATCHED.append([])
    try:
        build_network(load_checkpoint("some.pth"))
        sentence = ""
    except UserError as error:
        sentence = str(error)
    finally:
        events = WATCHED.pop()
    assert sorted(Path().rglob("*")) == before
    for event, arguments in events:
        assert not event.startswith(("socket", "subprocess")) and event not in ("os.rename", "os.remove", "os.mkdir"), (
            event
        )
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            assert "victim" not in str(arguments[0]) and not str(arguments[1] or "r").startswith(("w", "a", "x")), (
                arguments
            )
    return sentence


@pytest.mark.parametrize(
    "change",
    [
        dict(arch="hf-hub:timm/resnet18"),
        dict(arch="local-dir:x/../../../victim"),
        dict(model_args=dict(num_classes=3, checkpoint_path="victim.pth")),
        dict(model_args=dict(num_classes=3, pretrained=True, pretrained_cfg=dict(url="http://localhost:9/x"))),
        dict(model_args=dict(num_classes=3, pretrained=True, pretrained_cfg=dict(file="victim.pth"))),
        dict(model_args=dict(num_classes=3, pretrained=True, cache_dir="victim")),
        dict(classes=["a", "b", "../victim"]),
        dict(),
    ],
    ids=lambda change: " ".join(map(str, change.values()))[:60],
)
def test_a_checkpoint_reads_writes_and_calls_nothing_else(change, saved, watched):
    sentence = try_file(saved | change)
    assert (sentence == "") == (not change) and (not change or sentence.startswith("some.pth cannot be used: "))


def rewrite(path, change, **options):
    """Write a checkpoint's archive again: change(name, content) -> [(name, content)]."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries:
            for new in change(name, content):
                archive.writestr(*new)


def claim_more(name, content):
    """The numbers of elements in the pickle of torch.zeros(100) raised to a million."""
    if name.endswith("data.pkl"):
        content = content.replace(b"K\x64", b"J\x40\x42\x0f\x00")
    return [(name, content)]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (lambda name, content: [(name, content)], dict(compression=zipfile.ZIP_DEFLATED), "is compressed"),
        (lambda name, content: [(name, content)], dict(compression=zipfile.ZIP_BZIP2), "is compressed"),
        (lambda name, content: [(name, content)] * 2, {}, "overlap"),
        (lambda name, content: [(name, content), (name.upper(), content)], {}, "overlap"),
        (lambda name, content: [] if name.endswith("data/0") else [(name, content)], {}, "it claims a tensor"),
        (
            lambda name, content: [(name, content[:9])] if name.endswith("data/0") else [(name, content)],
            {},
            "it claims",
        ),
        (lambda name, content: [] if name.endswith(".pkl") else [(name, content)], {}, "no data.pkl"),
        (claim_more, {}, "it claims a tensor of 4000000 bytes where it has 400"),
    ],
    ids=["deflated", "bzip2", "twice", "other case", "lost", "cut", "no pickle", "claims"],
)
def test_an_archive_that_torch_save_does_not_write_is_refused_before_it_is_loaded(
    change, options, reason, tmp_path, monkeypatch
):
    path = tmp_path / "x.pth"
    torch.save(dict(weight=torch.zeros(100)), path)
    rewrite(path, change, **options)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(UserError, match=f"x.pth .*{reason}") as error:
        load_file(path)
    assert "\n" not in str(error.value)


class Runs:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "value",
    [
        Runs(print, "x"),
        Runs(bytearray, 10**12),
        Runs(Path.home),
        torch.zeros(3, dtype=torch.complex64),
        torch.eye(3).to_sparse(),
        torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8),
        torch.zeros(3, device="meta"),
        Path("x"),
        {1, 2}.__class__,
        slice(3),
        complex(1, 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_plain_type_or_tensor_is_refused_before_it_is_loaded(value, tmp_path, monkeypatch):
    for zipped in (True, False):
        torch.save(dict(weight=value), tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
        monkeypatch.setattr(torch, "load", None)
        with pytest.raises(UserError, match="x.pth ") as error:
            load_file(tmp_path / "x.pth")
        assert "\n" not in str(error.value)
        monkeypatch.undo()


def test_a_pickle_that_claims_much_memory_is_refused(tmp_path):
    bombs = dict(
        memo=b"\x80\x02}r\xff\xff\xff\x7f.",  # an index of two billion in the memo
        bytes=b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
        text=b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x.",
        long=b"\x80\x02\x8b" + (2**31 - 1).to_bytes(4, "little") + b"x.",
        frame=b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"N.",
        nothing=b"",
    )
    for name, content in bombs.items():
        for zipped in (True, False):
            path = tmp_path / f"{name}.pth"
            if zipped:
                with zipfile.ZipFile(path, "w") as archive:
                    archive.writestr("x/data.pkl", content)
                    archive.writestr("x/version", b"3\n")
            else:
                path.write_bytes(content)
            with pytest.raises(UserError, match=f"{name}.pth"):
                load_checkpoint(path)


def test_files_of_the_time_before_zip_archives_are_read_and_checked(saved, tmp_path):
    path = tmp_path / "old.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    torch.testing.assert_close(predict(load_checkpoint(path)), predict(saved))
    weight = torch.zeros(3)
    torch.save(dict(weight=weight), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"K\x03") >= 2
    path.write_bytes(content.replace(b"K\x03", b"J\xff\xff\xff\x7f"))
    with pytest.raises(UserError, match="old.pth is damaged.*claims tensors of 8589934588 bytes"):
        load_file(path)


def test_checkpoints_of_earlier_versions_are_read(saved, tmp_path):
    old = saved | dict(totals=torch.zeros(4), config=saved["config"] | dict(START_SIZE=0, WORKERS=-1, TIME_MASK=0.1))
    for key in ("best_size", "pieces", "skipped_in_a_row", "state_dict_ema", "ema_updates", "versions"):
        del old[key]
    torch.save(old, tmp_path / "old.pth")
    read = load_checkpoint(tmp_path / "old.pth")
    assert read["totals"] == [0.0] * 4
    torch.testing.assert_close(predict(read), predict(saved))
    assert load_checkpoint(checkpoint.SEEDLINGS)["arch"] == "unireplknet_a"


def test_pretrained_weights_that_are_not_finite_or_no_weights_are_refused(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = {name: tensor * math.nan for name, tensor in saved["state_dict"].items() if tensor.is_floating_point()}
    for number, value in enumerate((broken, dict(model=broken), dict(state_dict={}), [1], 3, dict(model=3), {})):
        torch.save(value, f"{number}.pth")
        with pytest.raises(UserError, match=f"{number}.pth cannot be used: .*; set PRETRAINED to another file"):
            read_weights(SMALL["MODEL"], f"{number}.pth")
    torch.save(dict(model=saved["state_dict"]), "good.pth")
    assert network.load_pretrained(unireplknet_test(num_classes=3), read_weights(SMALL["MODEL"], "good.pth"), ["a"])


# --- runs that are resumed


def damage_state(change):
    def damage(saved):
        change(saved["optimizer"]["state"])

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        damage_state(lambda states: states[0].pop("exp_avg")),
        damage_state(lambda states: states[0].update(exp_avg=torch.zeros(7))),
        damage_state(lambda states: states[0].update(more=torch.zeros(7))),
        damage_state(lambda states: states[0].update(exp_avg=torch.full_like(states[0]["exp_avg"], math.nan))),
        damage_state(lambda states: states.update({10**6: states[0]})),
        lambda saved: saved["optimizer"]["param_groups"].pop(),
        lambda saved: saved.pop("scaler"),
        lambda saved: saved.pop("epoch"),
        lambda saved: saved.update(history=[dict(epoch=1.5)]),
        lambda saved: saved.update(totals=[1.0]),
    ],
    ids="no-key shape unknown nan parameter group scaler epoch history totals".split(),
)
def test_a_damaged_training_state_is_refused_with_one_sentence(damage, run_train):
    folder = run_train(EPOCHS=1)
    saved = load_checkpoint(folder / "last.pth")
    damage(saved)
    save_checkpoint(saved, folder / "other.pth")
    with pytest.raises(UserError, match="cannot") as error:
        run_train(EPOCHS=2, RESUME=str(folder / "other.pth"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [dict(config={}), dict(versions={}), dict(scaler=dict()), dict(history=[])])
def test_a_run_without_its_history_resumes(change, run_train):
    folder = run_train(EPOCHS=1)
    save_checkpoint(load_checkpoint(folder / "last.pth") | change | dict(best_acc1=0.0), folder / "other.pth")
    run_train(EPOCHS=2, RESUME=str(folder / "other.pth"))


# --- exported networks, manifest and statistics


class FakeSession:
    """What onnxruntime gives for a file: its metadata, and a network with `outputs` outputs."""

    def __init__(self, metadata, outputs=3, value=0.0):
        self.metadata, self.outputs, self.value = metadata, outputs, value

    def get_modelmeta(self):
        return types.SimpleNamespace(custom_metadata_map=self.metadata)

    def get_outputs(self):
        return [types.SimpleNamespace(name="logits")]

    def run(self, _, inputs):
        return [torch.full((len(inputs["images"]), self.outputs), self.value).numpy()]


def open_onnx(metadata, monkeypatch, path, **options):
    path.touch()
    session = FakeSession(metadata, **options)
    fake = types.SimpleNamespace(InferenceSession=lambda *_, **__: session)
    monkeypatch.setattr(onnx_network, "require", lambda name: [fake])
    return onnx_network.OnnxNetwork(path)


def test_metadata_of_an_exported_network_is_checked_like_a_checkpoint(saved, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    metadata = {name: json.dumps(saved[name]) for name in onnx_network.METADATA}
    assert open_onnx(metadata, monkeypatch, path).about["classes"] == saved["classes"]
    changes = [(f"{key} {text[:20]}", metadata | {key: text}) for key in metadata for text in WORDS]
    changes += [(f"{key} removed", put(metadata, key, drop=True)) for key in metadata]
    changes += [(name, metadata | {k: json.dumps(v) for k, v in change.items()}) for name, change in CORE.items()
                if "tensor" not in name and name not in ("other network", "larger network")]  # fmt: skip
    changes += [("sound", metadata | dict(sound="{}")), ("sound", metadata | dict(sound="[1]"))]
    for name, changed in changes:
        with pytest.raises(UserError, match="model.onnx ") as error:
            open_onnx(changed, monkeypatch, path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600, name
    assert len(changes) > 100
    for options, reason in (
        (dict(outputs=4), "it has 3 classes"),
        (dict(value=math.nan), "predictions are not finite"),
    ):
        with pytest.raises(UserError, match=f"model.onnx cannot be used: {reason}|.*{reason}.*; export it again"):
            open_onnx(metadata, monkeypatch, path, **options)


WORDS = [
    "null",
    "true",
    "{}",
    "[]",
    '""',
    "-1",
    "1e999",
    "NaN",
    "[NaN, NaN, NaN]",
    "[[1]]",
    '"../../x"',
    "{",
    "",
    "[" * 10**5,
]


def written_manifest():
    record = dict(path="train/a/1.png", source="data1/a/1.png", sha256="0" * 64, bytes=3)
    record |= dict(sums=[[4, 4, 4], [4, 8, 12], [16, 16, 36]])
    return dict(fingerprint="f", seed=42, files=[record, dict(record, path="val/b/ü 1.png", source="/else/x.png")])


def test_one_changed_field_of_a_manifest_is_refused_or_harmless(tmp_path):
    good = written_manifest()
    path = tmp_path / manifest.MANIFEST

    def read(content):
        path.write_text(json.dumps(content, default=str), encoding="utf-8")
        return manifest.read_manifest(tmp_path)

    assert read(good) == good
    fields = [("files", 0, name) for name in good["files"][0]] + [
        ("files", 0),
        ("files",),
        ("fingerprint",),
        ("sound",),
    ]
    changes = [
        (name, put(good | dict(sound=None), *field, value=wrong)) for field in fields for name, wrong in WRONG.items()
    ]
    paths = [
        "../../x",
        "/etc/passwd",
        "train/../x",
        "train/a/..",
        "train//x",
        "train/a",
        "other/a/x",
        "a/b/c",
        "train/a/b/c",
    ]
    paths += ["train/a/.", "", "train/a/\0", "C:/a/b", "train/./x", f"train/a/{LONG_NAME}"]
    changes += [(name, put(good, "files", 0, "path", value=name)) for name in paths]
    changes += [
        (value, put(good, "files", 0, "sha256", value=value)) for value in ("0" * 63, "G" * 64, "0" * 65, "ü" * 64)
    ]
    rows = [[4, 4, 4], [4, 8, 12], [16, 16, 36]]
    for row, number, value in ((0, 0, 0), (0, 1, -1), (1, 2, 10**9), (2, 0, 10**9), (1, 1, True), (2, 2, -3)):
        changes.append((f"sums {row}", put(good, "files", 0, "sums", value=put(rows, row, number, value=value))))
    refused_count = 0
    for name, content in changes:
        try:
            read(content)
        except UserError as error:
            refused_count += 1
            assert (
                str(path) in str(error) and "\n" not in str(error) and "move " in str(error) and len(str(error)) < 500
            )
        else:  # texts that may be the paths of sources, or fingerprints; no sound; an empty list of files
            as_before = content["files"] == [] or content["files"][0] == good["files"][0]
            assert as_before or name in ("text", "path", "bytes", "tensor", "scalar", "huge", "zero", "infinite"), name
    assert len(changes) > 200 and refused_count > 170
    path.write_text("[" * 10**5)
    with pytest.raises(UserError, match="is damaged"):
        manifest.read_manifest(tmp_path)


def test_one_changed_field_of_the_statistics_is_refused(tmp_path):
    good = dict(mean=[0.5] * 3, std=[0.2] * 3, pixel_std=[0.2] * 3, pictures=4, fingerprint="f")
    path = tmp_path / manifest.STATISTICS

    def read(content):
        path.write_text(json.dumps(content, default=str), encoding="utf-8")
        return manifest.choose_mean_and_std(tmp_path, None, None, None)[:2]

    assert read(good) == ([0.5] * 3, [0.2] * 3)
    changes = list(every_change(good, ("mean",), ("std",), ("pictures",)))
    changes += [("std 0", good | dict(std=[0.2, 0.0, 0.2])), ("std tiny", good | dict(std=[1e-9] * 3))]
    changes += [("fingerprint", good | dict(fingerprint=3)), ("mean 127", good | dict(mean=[127] * 3))]
    for name, content in changes:
        if name.split() == ["pictures", "zero"]:
            continue
        with pytest.raises(UserError, match="mean_std.json .*delete it") as error:
            read(content)
        assert "\n" not in str(error.value), name
    assert len(changes) > 60


# --- forecasts


def forecast_checkpoint(arch):
    arguments = dict(lookback=48, horizon=12)
    if arch != "dlinear":
        structure = forecast.network_structure([1, 1, 1, 1], [8, 8, 16, 16], [3, 3, 3, 3])
        arguments = dict(num_classes=12, in_chans=1, drop_rate=0.1, drop_path_rate=0.0, layer_scale_init_value=0.1)
        arguments |= structure
    model = forecast.create_model(arch, arguments, 24)
    fit = forecast.Fit(model, forecast.ModelEma(model), torch.optim.AdamW(model.parameters()))
    about = dict(columns=["north", "south"], targets=["south"], date="date", interval=3600.0, ends=[100, 150, 200])
    about |= dict(period=24, mean=[0.5, -30.0], std=[0.2, 5.0], config=dict(LOOKBACK=2, PERIOD=None), versions={})
    return about | dict(lookback=48, horizon=12, seed=1, arch=arch, model_args=arguments) | fit.state()


@pytest.mark.parametrize("arch", ["dlinear", "unireplknet_a"])
def test_one_changed_field_of_a_forecast_s_checkpoint_is_refused_or_harmless(arch):
    good = forecast_checkpoint(arch)
    assert refused(forecast.check_resumed, good) is None
    required = [(key,) for key in forecast.REQUIRED]
    resumed = [(key,) for key in [*forecast.ResumedFields, "best_mse"]]
    arguments = [("model_args", key) for key in good["model_args"]]
    changes = every_change(good, *required, *resumed, *arguments)
    changes = ((name, values) for name, values in changes if name not in {f"{key} removed" for (key,) in required})
    count, accepted = check_all(changes, forecast.check_resumed)
    assert count > 500
    # Numbers of other windows, dates and units; what matters for the form of the network is not among them.
    core = {
        "arch",
        "lookback",
        "horizon",
        "period",
        "columns",
        "targets",
        "mean",
        "std",
        "state_dict",
        "state_dict_ema",
    }
    assert [name for name in accepted if name.split(" ")[0] in core] == []
    for change in (dict(mean=[1.0]), dict(std=[0.0, 1.0]), dict(targets=["east"]), dict(columns=["north", "north"]),
                   dict(lookback=47), dict(period=0 if arch == "dlinear" else 5), dict(horizon=13),
                   dict(arch="resnet18"), dict(arch="hf-hub:x/y"),
                   dict(interval=0.0), dict(interval=1e300), dict(best_mse=math.nan), dict(targets=[])):  # fmt: skip
        assert refused(forecast.check_resumed, good | change), change
    for name in ARGUMENTS:
        if name not in ("in_chans", "layer_scale_init_value"):
            extra = dict(model_args=good["model_args"] | {name: ARGUMENTS[name]})
            assert refused(forecast.check_resumed, good | extra), name


def test_values_are_named_in_a_few_characters():
    deep = []
    for _ in range(10**5):
        deep = [deep]
    for value in (
        LONG_NAME,
        10**5000,
        deep,
        torch.zeros(10**4),
        {"x": LONG_NAME, "y": torch.zeros(2)},
        "a\nb",
        b"x" * 999,
    ):
        text = brief(value)
        assert len(text) < 200 and "\n" not in text
    assert brief(10**5) == "100000" and brief(math.nan) == "nan" and brief("x") == "'x'"


# --- tables for people


FORMULAS = [
    "=1+1",
    "+1+1",
    "-rf.png",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "＝1",
    "＋1",
    "－1",
    "＠x",
    "\ufeff=1",
    "--help.png",
]
FORMULAS += [
    "-1_0",
    "-1.5.png",
    "=cmd|' /C calc'!A0",
    "-",
    "=",
    "+49 30 1234",
    "'=x",
    "''-x",
    "-1e",
    "-infinity",
    "-１",
]
TEXTS = ["a", "玉米 苗", "a=b", "", "'", "'abc", "''", "a\n=b", 'a"b', "a,b;c", "#x", "~", "😀", "1-2", "x@y.z", "'1"]
NUMBERS = [-1.5, 3, 0.25, "-1.5", "-1", "-1e-05", "+3", "-inf", "-.5", "1e6"]


def test_no_name_becomes_a_formula_in_a_table_and_every_name_is_read_as_it_was(tmp_path):
    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8-sig") as file:
        tables.TableWriter(file).writerows([[name, -1.5, name] for name in FORMULAS + TEXTS])
    with open(tmp_path / "x.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))
    for name, (first, number, last) in zip(FORMULAS + TEXTS, rows, strict=True):
        assert number == "-1.5" and first == last
        assert first == (f"'{name}" if name in FORMULAS else name)
    assert [row[0] for row in tables.read_table(tmp_path / "x.csv")] == FORMULAS + TEXTS
    for number in NUMBERS:
        assert tables.guard(number) == number and tables.unguard(str(number)) == str(number)


def test_a_table_of_dicts_has_the_keys_of_all_rows(tmp_path):
    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8") as file:
        tables.TableWriter(file).write_dicts([dict(date="d", b=None), {"=c": -0.5, "date": "e"}])
    assert (tmp_path / "x.csv").read_text().splitlines() == ["date,b,'=c", "d,,", "e,,-0.5"]


def test_a_series_whose_columns_could_be_formulas_is_read_as_it_was_written(tmp_path):
    rows = [dict(date=f"2020-01-01 {hour:02}:00:00") | {"=cold": f"{-hour / 2:.6g}", "-x": "1"} for hour in range(12)]
    write_csv(tmp_path / "x.csv", rows)
    series = read_series(tmp_path / "x.csv", "date", ["=cold", "-x"])
    assert series.columns == ["=cold", "-x"] and series.values[3, 0] == -1.5


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_is_read_as_it_was(text):
    assert tables.unguard(tables.guard(text)) == text
