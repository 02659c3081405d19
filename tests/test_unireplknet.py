"""The network against numbers computed with the authors' implementation, and its interfaces for timm."""

import copy
import json
import pickle

import pytest
import timm
import torch
import torch.fx
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from timm.optim import create_optimizer_v2
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from models import depthwise, load_weights
from models.depthwise_methods import methods, parse_plan
from models.grn import GRN, GlobalResponseNorm, PublishedGRN
from models.pretrained import WRAPPERS
from models.unireplknet import DILATED_BRANCHES, KERNEL_SIZES, VARIANTS, UniRepLKNet, UniRepLKNetBlock

KERNELS = (3, 5, 7, 9, 11, 13, 15, 17)
TINY = dict(depths=(2, 2, 6, 2), dims=(8, 16, 24, 32), num_classes=12)
# One variant for each row of KERNEL_SIZES in the merged structure, too; the others differ in width only.
PUBLISHED = [f"unireplknet_{variant}" for variant in ("a", "f", "p", "n", "t", "s", "b", "l", "xl")]
LAYOUTS = [*PUBLISHED, *(f"unireplknet_{variant}_deploy" for variant in "ants")]
FLOAT64_ROUNDING = 512 * torch.finfo(torch.float64).eps  # sums of a few hundred products, merged and not


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def part(tensors, prefix):
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def close(actual, expected, atol, floor=0.0):
    """Assert closeness relative to the largest expected value; `floor` is an absolute lower bound of the tolerance.

    Against golden vectors, `atol` covers what sums in another order change on other CPUs: some ten times what was seen.
    """
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=max(atol * scale, floor))


@pytest.fixture(scope="module")
def tiny(golden):
    tensors = {}
    for name in ("eval", "train", "deploy"):
        tensors |= load_file(golden / f"tiny_network_{name}.safetensors")
    return tensors


@pytest.fixture
def network(tiny):
    model = UniRepLKNet(**TINY)
    model.load_state_dict(part(tiny, "state_dict/"))
    return model.eval()


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_the_published_one(golden, name):
    expected = json.loads((golden / "layout.json").read_text())[name]
    with torch.device("meta"):
        model = timm.create_model(name.removesuffix("_deploy"), deploy=name.endswith("_deploy"))
    layout = [(key, list(tensor.shape)) for key, tensor in model.state_dict().items()]
    assert layout == list(expected["state_dict"].items())
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["parameters"]


def test_golden_outputs_of_every_stage(network, tiny):
    last, stages = network.forward_intermediates(tiny["input"])
    for index, stage in enumerate(stages):
        close(stage, tiny[f"eval/stage{index}"], 1e-5)
    close(network(tiny["input"]), tiny["eval/logits"], 1e-5)
    assert torch.equal(last, stages[-1])


def test_golden_training_step(network, tiny):
    loss = F.cross_entropy(network.train()(tiny["input"]), tiny["train/target"])
    loss.backward()
    close(loss, tiny["train/loss"], 1e-6)
    gradients = part(tiny, "train/grad/")
    assert set(gradients) == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        # Gradients that a batch norm cancels are 0 but for rounding, in the reference, too: below 1e-7.
        close(parameter.grad, gradients[name], 2e-4, floor=2e-7)
    for name, buffer in network.named_buffers():
        close(buffer.double(), tiny[f"train/buffer/{name}"].double(), 1e-5)


def test_golden_gradients_in_float64(network, tiny):
    network.double().train()
    F.cross_entropy(network(tiny["input"].double()), tiny["train/target"]).backward()
    for name, parameter in network.named_parameters():
        close(parameter.grad, tiny[f"train/grad/{name}"].double(), 5e-5, floor=2e-7)


# (plan of undilated kernels, plan of dilated ones): between them every method of models/depthwise_methods.py
FORCED = [
    ("nchw nchw native-nchw native-nchw", "nchw nchw native-nchw native-nchw"),
    ("nhwc nhwc native-nhwc native-nhwc", "nhwc nhwc native-nhwc native-nhwc"),
    ("nhwc nhwc nhwc kernel-nhwc", "nhwc phases-nhwc phases-nhwc phases-kernel-nhwc"),
    ("nchw nchw nchw kernel-nchw", "nchw phases-nchw phases-nchw phases-kernel-nchw"),
    ("nhwc rows rows rows", "nhwc phases-rows phases-rows phases-rows"),
    ("nchw dense dense dense", "nchw phases-dense phases-dense phases-dense"),
    ("nchw fft fft fft", "nhwc filled-nhwc filled-nhwc kernel-nhwc"),
    ("nhwc fft nhwc fft", "nchw filled-nchw filled-nchw kernel-nchw"),
    ("nhwc nchw native-nchw fft", "nchw nhwc nhwc phases-native-nhwc"),
    ("nchw nhwc native-nhwc rows", "nhwc nhwc nchw phases-native-nchw"),
]


def test_every_method_is_among_the_forced_ones():
    for index, dilation in enumerate((1, 2)):
        passes = methods((2, 8, 8, 8), (3, 3), dilation, torch.float32)
        for names, forced in zip(passes, zip(*(parse_plan(plans[index])[1:] for plans in FORCED))):
            assert set(names) == set(forced)


@pytest.fixture(params=[*FORCED, (depthwise.STACKED,) * 2], ids=lambda plans: plans[0])
def forced(request, monkeypatch):
    undilated, dilated = request.param
    find = lambda x, kernel_size, dilation, training, wish: undilated if dilation == 1 else dilated  # noqa: E731
    monkeypatch.setattr(depthwise, "find_plan", find)


def test_golden_numbers_with_every_method_of_the_depthwise_convolution(forced, network, tiny):
    close(network(tiny["input"]), tiny["eval/logits"], 1e-5)
    close(timm.utils.reparameterize_model(network)(tiny["input"]), tiny["deploy/logits"], 1e-5)
    test_golden_training_step(network, tiny)


def test_golden_gradients_in_float64_with_every_method(forced, network, tiny):
    test_golden_gradients_in_float64(network, tiny)


@pytest.mark.parametrize("merge", [UniRepLKNet.reparameterize_unireplknet, timm.utils.reparameterize_model])
def test_golden_merged_network(network, tiny, merge):
    merged = merge(network)
    expected = part(tiny, "deploy/state_dict/")
    assert set(merged.state_dict()) == set(expected)
    for name, tensor in merged.state_dict().items():
        close(tensor, expected[name], 1e-5)
    close(merged(tiny["input"]), tiny["deploy/logits"], 1e-5)


@pytest.mark.parametrize("kernel_size", KERNELS)
def test_golden_block_and_its_merged_form(golden, kernel_size):
    tensors = load_file(golden / f"block_k{kernel_size}.safetensors")
    block = UniRepLKNetBlock(8, kernel_size).eval()
    block.load_state_dict(part(tensors, "state_dict/"))
    before = copy.deepcopy(block.state_dict())
    fused = block.fuse()
    close(block(tensors["input"]), tensors["eval/output"], 1e-5)
    close(fused(tensors["input"]), tensors["deploy/output"], 1e-5)
    expected = part(tensors, "deploy/state_dict/")
    assert set(fused.state_dict()) == set(expected)
    for name, tensor in fused.state_dict().items():
        close(tensor, expected[name], 1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def randomised(block):
    """`block` with weights and statistics far from their initial values, so that merging has something to merge."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in block.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator) / 2)
            if "weight" in name and tensor.ndim > 1:
                tensor.sub_(0.75)
    return block.eval()


@pytest.mark.parametrize("kernel_size", KERNELS)
def test_merging_is_exact_in_float64(kernel_size):
    block = randomised(UniRepLKNetBlock(4, kernel_size)).double()
    x = torch.randn(2, 4, 20, 15, dtype=torch.float64)
    close(block.fuse()(x), block(x), FLOAT64_ROUNDING)


def test_merging_low_precision_weights_rounds_only_once():
    block = randomised(UniRepLKNetBlock(4, 13)).bfloat16()
    exact = copy.deepcopy(block).double().fuse().state_dict()
    fused = block.fuse().state_dict()
    for name, tensor in fused.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, exact[name].bfloat16()), name


def test_merging_without_layer_scale_and_of_merged_blocks():
    block = randomised(UniRepLKNetBlock(4, 7, layer_scale_init_value=0)).double()
    assert block.gamma is None
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    fused = block.fuse()
    close(fused(x), block(x), FLOAT64_ROUNDING)
    assert fused.fuse() is fused


def test_timm_merges_a_copy(network, tiny):
    merged = timm.utils.reparameterize_model(network)
    assert set(network.state_dict()) == set(part(tiny, "state_dict/"))
    assert len(merged.state_dict()) < len(network.state_dict())
    assert merged.deploy and not network.deploy


def test_building_and_running_prints_nothing(capsys):
    model = UniRepLKNet(**TINY).eval()
    model.reparameterize_unireplknet()
    model(torch.zeros(1, 3, 32, 32))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("argument", ["attempt_to_use_lk_impl", "init_cfg", "num_class"])
def test_unknown_arguments_raise(argument):
    with pytest.raises(TypeError, match=argument):
        timm.create_model("unireplknet_a", **{argument: 1})


def test_wrong_sizes_raise_with_the_remedy():
    with pytest.raises(ValueError, match="kernel_size must be one of 3, 5, 7"):
        UniRepLKNetBlock(8, 4)
    with pytest.raises(ValueError, match="set kernel_sizes"):
        UniRepLKNet(depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="one value per block"):
        UniRepLKNet(depths=(2, 2, 6, 2), kernel_sizes=((3, 3), (13, 13), (13,) * 5, (13, 13)))
    with pytest.raises(ValueError, match="global_pool"):
        UniRepLKNet(**TINY, global_pool="median")


def test_custom_kernel_sizes_are_used():
    sizes = ((3,), (17,), (7, 11), (15,))
    model = UniRepLKNet(depths=(1, 1, 2, 1), dims=(8, 8, 8, 8), kernel_sizes=sizes)
    found = tuple(
        tuple(getattr(block.dwconv, "lk_origin", block.dwconv).kernel_size[0] for block in stage)
        for stage in model.stages
    )
    assert found == sizes


@pytest.mark.parametrize("size", [(33, 47), (64, 32), (100, 100), (32, 224)])
def test_images_of_32_pixels_and_more_and_of_any_shape(network, size):
    x = torch.randn(1, 3, *size)
    assert network(x).shape == (1, 12)
    close(timm.utils.reparameterize_model(network)(x), network(x), 1e-4)


def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(network, tiny):
    plain, saving = network.train(), copy.deepcopy(network).train()
    saving.set_grad_checkpointing()
    for model in (plain, saving):
        F.cross_entropy(model(tiny["input"]), tiny["train/target"]).backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        close(b.grad, a.grad, 2e-4, floor=2e-7)
    for (name, a), b in zip(plain.named_buffers(), saving.buffers()):
        assert torch.equal(a, b), name
    assert saving.stages[0][0].fuse().with_cp and not plain.stages[0][0].fuse().with_cp


def test_drop_path_rises_linearly_and_acts_in_training_only():
    model = UniRepLKNet(**TINY, drop_path_rate=0.6)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.6 * i / 11 for i in range(12)])
    x = torch.randn(8, 3, 32, 32)
    model.train()
    torch.manual_seed(0)
    first = model(x)
    assert not torch.equal(first, model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_layer_scale_starts_at_its_value():
    model = UniRepLKNet(**TINY, layer_scale_init_value=0.25)
    assert all((block.gamma == 0.25).all() for stage in model.stages for block in stage)


def test_sync_batch_norm_has_the_same_layout():
    plain, synced = UniRepLKNet(**TINY), UniRepLKNet(**TINY, use_sync_bn=True)
    assert list(plain.state_dict()) == list(synced.state_dict())
    assert sum(isinstance(m, torch.nn.SyncBatchNorm) for m in synced.modules()) == sum(
        isinstance(m, torch.nn.BatchNorm2d) for m in plain.modules()
    )
    synced.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(plain.eval()(x), synced.eval()(x))


def test_deepcopy_and_pickle(network, tiny):
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(tiny["input"]), network(tiny["input"]))


def test_float16_autocast_and_bfloat16_agree_roughly(network, tiny):
    expected = network(tiny["input"])
    with torch.autocast("cpu", torch.bfloat16):
        close(network(tiny["input"]).float(), expected, 0.1)


def test_grn_has_the_gradients_of_its_published_formula():
    grn = PublishedGRN(5).double()
    with torch.no_grad():
        grn.gamma.normal_()
        grn.beta.normal_()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    function = GlobalResponseNorm.apply
    for beta in (grn.beta, None):
        assert torch.autograd.gradcheck(function, (x, grn.gamma, beta))
    torch.testing.assert_close(function(x, grn.gamma, grn.beta), grn(x))
    ours = GRN(5).double()
    ours.load_state_dict(grn.state_dict())
    assert torch.equal(ours(x), function(x, grn.gamma, grn.beta))
    with torch.no_grad():
        x[0, :, :, 0] = 0  # a channel without response
    x.grad = None
    function(x, grn.gamma, grn.beta).square().sum().backward()
    expected = x.grad.clone()
    x.grad = None
    grn(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


class FullPrecisionTensors(TorchDispatchMode):
    """Counts the float32 results of at least `size` numbers that operators make."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            if torch.is_tensor(result) and result.dtype == torch.float32 and result.numel() >= self.size:
                self.found += 1
        return results


@pytest.mark.parametrize("kernel_size", [3, 13])
def test_autocast_makes_no_float32_tensors_of_four_times_the_width(kernel_size):
    found, errors = {}, {}
    exact = randomised(UniRepLKNetBlock(8, kernel_size)).train()
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    expected = torch.autograd.grad(exact(x).square().mean(), [x, *exact.parameters()])
    for published in (False, True):
        block = UniRepLKNetBlock(8, kernel_size, published_arithmetic=published).train()
        block.load_state_dict(exact.state_dict())
        with FullPrecisionTensors(4 * x.numel()) as tensors:
            with torch.autocast("cpu", torch.bfloat16):
                out = block(x)
                assert out.dtype == (torch.float32 if published else torch.bfloat16)
            gradients = torch.autograd.grad(out.float().square().mean(), [x, *block.parameters()])
        found[published] = tensors.found
        scales = [tensor.abs().max().clamp_min(1e-4) for tensor in expected]
        errors[published] = max(
            ((a - b).abs().max() / scale).item() for a, b, scale in zip(gradients, expected, scales)
        )
    assert found[False] == 0 < found[True]
    assert errors[False] < max(3 * errors[True], 0.05)  # rounding only


def test_published_arithmetic_differs_by_rounding_in_float32_and_is_kept_by_merging(network, tiny):
    published = UniRepLKNet(**TINY, published_arithmetic=True)
    published.load_state_dict(network.state_dict())
    torch.testing.assert_close(published.eval()(tiny["input"]), network(tiny["input"]), rtol=1e-5, atol=1e-5)
    fused = [block.fuse() for stage in published.stages for block in stage]
    assert all(type(block.act[1]) is PublishedGRN for block in fused)
    assert type(network.stages[0][0].fuse().act[1]) is GRN


def test_float16_computes_as_published():
    x = 300 * torch.randn(1, 2, 2, 4).half()  # squares overflow
    grn, published = GRN(4), PublishedGRN(4)
    torch.nn.init.ones_(grn.gamma)
    published.load_state_dict(grn.state_dict())
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(grn(x), published(x)) and grn(x).isfinite().all()


# --- timm


def test_all_variants_are_registered_with_the_published_files():
    assert set(PUBLISHED) <= set(VARIANTS)
    assert timm.list_models("unireplknet*") == sorted(VARIANTS)
    files = {}
    for name in timm.list_pretrained("unireplknet*"):
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.hf_hub_id == "DingXiaoH/UniRepLKNet"
        files[cfg.hf_hub_filename] = (name, cfg.input_size[-1], cfg.num_classes)
    expected = {
        f"unireplknet_{v}_in1k_224_acc{a}.pth": (f"unireplknet_{v}.in1k", 224, 1000)
        for v, a in zip("afpnts", ("77.03", "78.58", "80.23", "81.64", "83.21", "83.91"))
    }
    for v, a in zip(("s", "b", "l", "xl"), ("86.44", "87.40", "87.88", "87.96")):
        expected[f"unireplknet_{v}_in22k_to_in1k_384_acc{a}.pth"] = (f"unireplknet_{v}.in22k_ft_in1k_384", 384, 1000)
        expected[f"unireplknet_{v}_in22k_pretrain.pth"] = (f"unireplknet_{v}.in22k", 224, 21841)
    assert files == expected


def test_timm_downloads_the_published_file(monkeypatch, tmp_path):
    """Only the download itself is replaced: timm resolves the Hub id and file name, reads, filters and loads."""
    source = timm.create_model("unireplknet_a", num_classes=1000)
    file = tmp_path / "unireplknet_a_in1k_224_acc77.03.pth"
    torch.save({"model": source.state_dict()}, file)
    asked = []

    def hf_hub_download(repo_id, filename, **_):
        asked.append((repo_id, filename))
        return str(file)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", hf_hub_download)
    model = timm.create_model("unireplknet_a.in1k", pretrained=True, num_classes=12)
    assert ("DingXiaoH/UniRepLKNet", file.name) in asked
    assert model.head.out_features == 12
    state = source.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items() if not n.startswith("head."))


@pytest.mark.parametrize("wrap", [lambda state: {"model": state}, lambda state: state], ids=["model", "bare"])
def test_timm_loads_a_local_file_into_another_network(tmp_path, wrap):
    source = timm.create_model("unireplknet_a", num_classes=1000)
    file = tmp_path / "weights.pth"
    torch.save(wrap(source.state_dict()), file)
    local = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    same = timm.create_model("unireplknet_a", **local)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), source.state_dict().values()))
    other = timm.create_model("unireplknet_a", num_classes=5, in_chans=1, **local)
    assert other.head.out_features == 5
    stem = "downsample_layers.0.0.weight"
    torch.testing.assert_close(other.state_dict()[stem], source.state_dict()[stem].sum(1, keepdim=True))


def test_features_only_gives_four_stages():
    model = timm.create_model("unireplknet_a", features_only=True)
    assert model.feature_info.channels() == [40, 80, 160, 320]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    shapes = [tuple(stage.shape) for stage in model(torch.zeros(2, 3, 64, 96))]
    assert shapes == [(2, 40, 16, 24), (2, 80, 8, 12), (2, 160, 4, 6), (2, 320, 2, 3)]
    two = timm.create_model("unireplknet_a", features_only=True, out_indices=(0, 2))
    assert [stage.shape[1] for stage in two(torch.zeros(1, 3, 32, 32))] == [40, 160]


def test_features_and_heads(network, tiny):
    features = network.forward_features(tiny["input"])
    assert features.shape == (2, 32, 3, 3)
    assert torch.equal(network.forward_head(features), network(tiny["input"]))
    pooled = network.forward_head(features, pre_logits=True)
    assert torch.equal(network.get_classifier()(pooled), network(tiny["input"]))
    network.reset_classifier(5)
    assert network(tiny["input"]).shape == (2, 5) and network.get_classifier().out_features == 5
    network.reset_classifier(0)
    assert torch.equal(network(tiny["input"]), pooled)
    network.reset_classifier(0, "")
    assert torch.equal(network(tiny["input"]), features)


def test_layer_decay_orders_the_parameters_by_depth():
    model = timm.create_model("unireplknet_a", num_classes=12)
    optimizer = create_optimizer_v2(model, "adamw", 1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    order = ["downsample_layers.0.0.weight", "stages.0.1.pwconv1.1.weight", "stages.1.0.gamma"]
    order += ["stages.2.0.gamma", "stages.2.5.gamma", "downsample_layers.3.0.weight", "head.weight"]
    values = [scale[name] for name in order]
    assert values == sorted(values) and len(set(values)) == len(values)
    assert scale["head.weight"] == 1.0
    assert set(scale) == set(names.values())


def test_scales_norms_and_biases_are_not_decayed():
    model = timm.create_model("unireplknet_a", num_classes=12)
    optimizer = create_optimizer_v2(model, "adamw", 1e-3, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {
        name for name, parameter in model.named_parameters() if name.endswith("weight") and parameter.ndim in (2, 4)
    }


# --- pretrained weights


def test_load_weights_reports_what_was_loaded_and_skipped():
    source = UniRepLKNet(**TINY)
    target = UniRepLKNet(**TINY | dict(num_classes=3), in_chans=1)
    report = load_weights(target, {"module." + name: tensor for name, tensor in source.state_dict().items()})
    total = len(source.state_dict())
    assert report.startswith(f"loaded {total - 2} of {total} tensors")
    assert "skipped head.weight ((12, 32) there, (3, 32) here)" in report and "from 3 to 1 input channels" in report
    assert torch.equal(target.stages[3][1].gamma, source.stages[3][1].gamma)


@pytest.mark.parametrize("wrap", [lambda state: state, *(lambda state, key=key: {key: state} for key in WRAPPERS)])
def test_load_weights_reads_all_usual_forms(wrap):
    source, target = UniRepLKNet(**TINY), UniRepLKNet(**TINY)
    checkpoint = wrap(source.state_dict())
    total = len(source.state_dict())
    assert load_weights(target, checkpoint) == f"loaded {total} of {total} tensors"
    assert all(torch.equal(a, b) for a, b in zip(target.state_dict().values(), source.state_dict().values()))


def test_the_head_starts_anew_where_as_many_classes_have_other_names():
    source, target = UniRepLKNet(**TINY | dict(num_classes=2)), UniRepLKNet(**TINY | dict(num_classes=2))
    checkpoint = {"state_dict": source.state_dict(), "classes": ["Maize", "Charlock"]}
    total = len(source.state_dict())
    fresh = target.head.weight.clone()
    report = load_weights(target, checkpoint, classes=("Charlock", "Maize"))
    assert report == f"loaded {total - 2} of {total} tensors; the head starts anew, since its classes differ"
    assert torch.equal(target.head.weight, fresh)
    assert torch.equal(target.stages[3][1].gamma, source.stages[3][1].gamma)
    for known in (("Maize", "Charlock"), None):  # the same classes, and a model whose classes have no names
        assert load_weights(target, checkpoint, classes=known) == f"loaded {total} of {total} tensors"
        assert torch.equal(target.head.weight, source.head.weight)
    bare = load_weights(target, source.state_dict(), classes=["Charlock", "Maize"])  # classes unknown
    assert bare == f"loaded {total} of {total} tensors"
    other = UniRepLKNet(**TINY | dict(num_classes=3))
    assert "starts anew" not in load_weights(other, checkpoint, classes=["a", "b", "c"])


@pytest.mark.parametrize(
    ("checkpoint", "found"),
    [
        (None, "NoneType"),
        ([torch.zeros(1)], "list"),
        ({}, "an empty dictionary"),
        ({"model": {}}, "an empty dictionary"),
        ({"epoch": 3, "optimizer": {}}, "a dictionary with the keys 'epoch', 'optimizer'"),
        ({"state_dict": {"head.weight": "text"}}, "a dictionary with the keys 'head.weight'"),
        ({0: torch.zeros(1)}, "a dictionary with the keys 0"),
    ],
)
def test_load_weights_refuses_what_holds_no_state_dict(checkpoint, found):
    with pytest.raises(ValueError) as raised:
        load_weights(UniRepLKNet(**TINY), checkpoint, classes=["a"])
    assert str(raised.value) == (
        "these are no weights: expected a state dict (names with tensors), alone or under 'state_dict_ema', "
        f"'state_dict', 'model', got {found}; save model.state_dict()"
    )


def test_load_weights_refuses_another_network_and_the_other_structure():
    source = UniRepLKNet(**TINY)
    with pytest.raises(ValueError, match="of another network"):
        load_weights(UniRepLKNet(**TINY | dict(dims=(8, 16, 24, 40))), source.state_dict())
    for name in ("fc.weight", "downsample_layers.0.0.weight"):
        with pytest.raises(ValueError, match="of another network"):
            load_weights(source, {name: torch.zeros(1)})
    with pytest.raises(ValueError, match="call reparameterize_unireplknet"):
        load_weights(UniRepLKNet(**TINY, deploy=True), source.state_dict())
    merged = timm.utils.reparameterize_model(source)
    with pytest.raises(ValueError, match="built with deploy=True"):
        load_weights(UniRepLKNet(**TINY), merged.state_dict())
    for target in (UniRepLKNet(**TINY, deploy=True), merged):
        load_weights(target, merged.state_dict())


def test_tables_fit_together():
    assert set(DILATED_BRANCHES) == set(KERNELS) - {3, 5}
    for depths, sizes in KERNEL_SIZES.items():
        assert tuple(map(len, sizes)) == depths


# --- torch.fx


@pytest.mark.parametrize("options", [dict(), dict(deploy=True), dict(published_arithmetic=True), dict(in_chans=5)])
@pytest.mark.parametrize("training", [False, True])
def test_torch_fx_traces_the_network(options, training):
    model = UniRepLKNet(**TINY | options, drop_path_rate=0.3, layer_scale_init_value=0.1).train(training)
    images = torch.randn(2, options.get("in_chans", 3), 64, 64)
    graph = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model)))
    for dtype in (torch.float32, torch.bfloat16):
        outputs = []
        for network in (model, graph):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                outputs.append(network(images))
        assert torch.equal(*outputs)
    if not training:
        assert torch.equal(model.half()(images.half()), graph.half()(images.half()))


def test_timm_s_tests_of_torch_fx_pass():
    """As timm's tests have it: the graph's last node in both modes, gradients of every parameter, feature maps."""
    model = timm.create_model("unireplknet_a", num_classes=42).eval()
    images = torch.randn(1, 3, 64, 64)
    options = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    nodes = train_nodes, eval_nodes = get_graph_node_names(model, tracer_kwargs=options)
    names = dict(zip(("train_return_nodes", "eval_return_nodes"), (each[-1:] for each in nodes)))
    graph = create_feature_extractor(model, **names, tracer_kwargs=options)
    assert torch.equal(graph.eval()(images)[eval_nodes[-1]], model(images))
    graph.train()(torch.randn(2, 3, 64, 64))[train_nodes[-1]].mean().backward()
    assert all(parameter.grad is not None for parameter in graph.parameters())
    features = timm.create_model("unireplknet_a", features_only=True, feature_cls="fx", out_indices=(1, 3)).eval()
    assert [x.shape for x in features(images)] == [(1, 80, 8, 8), (1, 320, 2, 2)]
