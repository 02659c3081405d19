"""The variants behave as timm's own networks: what timm's tests ask of every model, as far as no download is needed."""

import inspect

import pytest
import timm
import torch
from timm.layers import get_spatial_dim
from timm.models import FeatureInfo
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2

import models  # noqa: F401  registers the variants
from models.unireplknet import VARIANTS

NAMES = [name for name in VARIANTS if name != "unireplknet_test"]
SIZE = 64


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def create(**options):
    torch.manual_seed(0)
    return timm.create_model("unireplknet_a", **options).eval()


# --- all nine, without memory for their weights


@pytest.mark.parametrize("name", NAMES)
def test_the_default_configuration_is_true(name):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        headless = timm.create_model(name, num_classes=0, global_pool="").eval()
        about, state_dict = model.pretrained_cfg, model.state_dict()
        pool_size = tuple(about["pool_size"])
        x = torch.zeros(2, *about["input_size"])
        maps = model.forward_features(x)
        assert tuple(maps.shape) == (2, model.num_features, *pool_size)
        assert model.forward_head(maps, pre_logits=True).shape == (2, model.head_hidden_size)
        assert model(x).shape == (2, about["num_classes"]) and model.num_classes == about["num_classes"]
        assert headless(x).shape == maps.shape
    for layer in (about["classifier"], about["first_conv"]):
        assert f"{layer}.weight" in state_dict
    assert about["architecture"] == name and about["tag"] and about["hf_hub_id"] and about["license"]
    assert get_spatial_dim(getattr(model, "output_fmt", "NCHW")) == (2, 3)
    assert timm.is_model(name) and timm.models.is_model_pretrained(name) and name in timm.list_models("unireplknet*")


# --- the smallest one


def test_outputs_and_gradients(images):
    model = create(num_classes=42).train()
    logits = model(images)
    assert logits.shape == (2, 42) and logits.isfinite().all()
    logits.mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        *(dict(out_indices=indices) for indices in ((0, 2), (-1,), [-2, -1], 2, (3,))),
        *(dict(feature_cls=kind, out_indices=(0, 1, 3)) for kind in ("getter", "hook", "fx")),
        {},
    ],
)
def test_feature_maps(options, images):
    model = create(features_only=True, **options)
    maps = model(images)
    reductions, channels = model.feature_info.reduction(), model.feature_info.channels()
    assert len(maps) == len(reductions) == len(channels) > 0
    full = create()
    expected = full.forward_intermediates(images, indices=list(range(4)), intermediates_only=True)
    by_channels = {m.shape[1]: m for m in expected}
    for m, reduction, count in zip(maps, reductions, channels):
        assert m.shape == (2, count, SIZE // reduction, SIZE // reduction)
        torch.testing.assert_close(m, by_channels[count])


def test_intermediates_are_those_of_the_forward_pass(images):
    model = create()
    information = FeatureInfo(model.feature_info, len(model.feature_info))
    last, maps = model.forward_intermediates(images)
    assert [m.shape[1] for m in maps] == information.channels() and torch.equal(last, model.forward_features(images))
    _, two = model.forward_intermediates(images, 2, stop_early=True, norm=True)
    assert len(two) == 2 and torch.equal(two[1], maps[3])
    only = model.forward_intermediates(images, [1], stop_early=True, intermediates_only=True)
    assert len(only) == 1 and torch.equal(only[0], maps[1])
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(images, output_fmt="NLC")
    with pytest.raises(AssertionError):  # timm's own check
        model.forward_intermediates(images, [4])
    reference = inspect.signature(timm.models.ConvNeXt.forward_intermediates).parameters
    assert set(reference) <= set(inspect.signature(type(model).forward_intermediates).parameters)


@pytest.mark.parametrize("indices, stages", [(1, 4), ([0, 2], 3), ([0], 1)])
def test_stages_behind_the_last_map_can_be_dropped(indices, stages, images):
    model = create()
    expected = model.forward_intermediates(images, indices, intermediates_only=True)
    model.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
    assert len(model.stages) == stages and model.num_classes == 0
    found = model.forward_intermediates(images, indices, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_the_head_can_be_replaced_and_pools_as_timm_s(pool, images):
    model = create(global_pool=pool, num_classes=7)
    maps = model.forward_features(images)
    pooled = timm.layers.SelectAdaptivePool2d(pool_type=pool, flatten=True)(maps)
    features = model.norm(pooled)
    torch.testing.assert_close(model.forward_head(maps, pre_logits=True), features)
    torch.testing.assert_close(model(images), model.get_classifier()(features))
    model.reset_classifier(0)
    assert model.num_classes == 0 and isinstance(model.get_classifier(), torch.nn.Identity)
    torch.testing.assert_close(model(images), features)
    model.reset_classifier(5, "avg")
    assert model(images).shape == (2, 5) and model.get_classifier().out_features == 5 == model.num_classes
    model.reset_classifier(0, "")
    assert torch.equal(model(images), maps)
    with pytest.raises(ValueError, match="a head needs pooled features"):
        model.reset_classifier(5)
    assert list(create(global_pool=pool).state_dict()) == list(create().state_dict())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(global_pool="catavgmax"), "global_pool must be 'avg', 'max', 'avgmax' or '', got 'catavgmax'"),
        (dict(output_stride=8), "output_stride must be 32, got 8; for finer maps set features_only=True"),
        (dict(features_only=True, output_stride=16), "output_stride must be 32, got 16"),
        (dict(global_pool=""), "a head needs pooled features"),
    ],
)
def test_what_it_does_not_do_is_refused_with_a_remedy(options, message):
    with pytest.raises(ValueError) as error:
        create(**options)
    assert message in str(error.value)


def test_an_output_stride_of_32_is_what_it_has(images):
    assert torch.equal(create(output_stride=32)(images), create()(images))
    with pytest.raises(TypeError):
        create(no_such_argument=1)


@pytest.mark.parametrize("channels", [1, 2, 4, 8])
def test_any_number_of_input_channels(channels):
    model = create(in_chans=channels, num_classes=3)
    assert model(torch.zeros(1, channels, SIZE, SIZE)).shape == (1, 3)


def test_gradient_checkpointing_changes_nothing(images):
    model, other = create(num_classes=3).train(), create(num_classes=3).train()
    other.set_grad_checkpointing()
    for each in (model, other):
        each(images).square().mean().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters()))
    other.set_grad_checkpointing(enable=False)
    assert not any(block.with_cp for stage in other.stages for block in stage)


@pytest.mark.parametrize("coarse", [False, True])
def test_the_group_matcher_orders_every_parameter(coarse):
    model = create()
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    depth = [groups[f"stages.{stage}.0.pwconv1.1.weight"] for stage in range(4)]
    assert depth == sorted(set(depth)) and groups["downsample_layers.0.0.weight"] == min(groups.values())
    assert groups["head.weight"] == max(groups.values()) > depth[-1]


def test_names_without_weight_decay_are_parameters():
    model = create()
    names = model.no_weight_decay()
    assert names and names <= {name for name, _ in model.named_parameters()}
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert not any(id(parameter) in decayed for name, parameter in model.named_parameters() if name in names)
