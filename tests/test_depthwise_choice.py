"""The measured choice of the depthwise convolution: methods are exact, wrong ones are refused, choices are kept."""

import functools
import itertools
import json

import pytest
import timm
import torch
from torch import nn

from models import depthwise, depthwise_choice, depthwise_methods
from models.depthwise import DepthwiseConv2d, Key
from models.depthwise_choice import (
    Group,
    Ranking,
    Result,
    Use,
    choose_convolutions,
    find_groups,
    installed,
    results_file,
    to_text,
    verify,
)
from models.depthwise_methods import (
    FORWARD,
    INPUT,
    LAYOUTS,
    STACKED,
    WEIGHT,
    Plan,
    convolve_stacked,
    depthwise_planned,
    methods,
    parse_plan,
    planned_operator,
)
from models.unireplknet import DILATED_BRANCHES, DilatedReparamBlock

CPU = torch.device("cpu")
SIZES = [Use((32, 32), 4)]
PLAN = "nhwc nhwc nhwc kernel-nhwc"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No plans, no choice by the environment, and a cache folder of its own for each test."""
    torch.manual_seed(0)
    monkeypatch.delenv("UNIREPLKNET_DEPTHWISE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with installed({}):
        yield


@pytest.fixture
def network():
    return timm.create_model("unireplknet_test", num_classes=3).to(memory_format=torch.channels_last)


@pytest.fixture
def measured(monkeypatch):
    """Every group was measured to be twice as fast by `PLAN`; the list of groups that were measured."""
    groups = []

    def measure(group, device, dtype, budget):
        groups.append(group)
        return [], Result([PLAN] * len(group.kernels), 2.0, 100.0)

    monkeypatch.setattr(depthwise_choice, "measure_group", measure)
    return groups


def every_plan(shape, kernel_size, dilation, dtype=torch.float64):
    """Plans that hold every method for a shape at least once."""
    passes = methods(shape, (kernel_size,) * 2, dilation, dtype)
    layouts = itertools.cycle(LAYOUTS)
    for index in range(max(map(len, passes))):
        yield str(Plan(next(layouts), *(names[index % len(names)] for names in passes)))


# --- the methods

CASES = [
    (shape, kernel_size, dilation, plan)
    for shape, kernel_size, dilation in (((2, 2, 5, 7), 5, 1), ((1, 2, 6, 5), 3, 2), ((2, 1, 7, 6), 3, 3))
    for plan in every_plan(shape, kernel_size, dilation)
]


def test_every_method_is_among_the_cases():
    tried = [set(names) for names in zip(*(parse_plan(plan)[1:] for *_, plan in CASES))]
    assert tried[0] >= {*FORWARD} and tried[1] >= {*FORWARD, *INPUT} and tried[2] >= {*WEIGHT}
    assert {"phases-nhwc", "phases-rows", "phases-dense", "filled-nchw"} <= tried[0]
    assert {"phases-kernel-nhwc", "phases-native-nchw", "phases-rows"} <= tried[2]


@pytest.mark.parametrize(("shape", "kernel_size", "dilation", "plan"), CASES)
def test_every_plan_has_first_and_second_derivatives(shape, kernel_size, dilation, plan):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[1], 1, kernel_size, kernel_size, dtype=torch.float64, requires_grad=True)
    operator = lambda x, weight: depthwise_planned(x, weight, dilation, plan)  # noqa: E731
    assert torch.autograd.gradcheck(operator, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(operator, (x, weight), fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dilation", [1, 2, 3, 5])
@pytest.mark.parametrize("kernel_size", [3, 7, 13])
def test_every_plan_computes_what_the_default_computes_on_maps_of_every_size(kernel_size, dilation, layout):
    conv = DepthwiseConv2d(2, kernel_size, dilation, bias=True).double()
    for height, width in ((1, 1), (1, 9), (7, 4), (13, 12)):
        x = depthwise_methods.to_layout(torch.randn(2, 2, height, width, dtype=torch.float64), layout).requires_grad_()
        expected = conv(x)
        seed = torch.randn_like(expected)
        gradients = torch.autograd.grad(expected, [x, *conv.parameters()], seed)
        taps = depthwise.crop(conv.weight, (height, width), dilation)[0].shape[-2:]
        passes = methods(x.shape, taps, dilation, x.dtype)
        for names in itertools.zip_longest(*passes):
            plan = str(Plan(layout, *(name or others[0] for name, others in zip(names, passes))))
            with installed({key_of(conv, x, training): plan for training in (True, False)}):
                actual = conv(x)
                torch.testing.assert_close(actual, expected)
                torch.testing.assert_close(torch.autograd.grad(actual, [x, *conv.parameters()], seed), gradients)
                torch.testing.assert_close(conv.eval()(x), expected)
                conv.train()


def key_of(conv, x, training=True):
    dtype = str(x.dtype).removeprefix("torch.")
    return Key(x.device.type, dtype, training, *x.shape[1:], conv.kernel_size[0], conv.dilation[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (4, 3), (8, 8)])
def test_a_block_whose_convolutions_are_stacked_computes_what_the_default_computes(size):
    block, other = DilatedReparamBlock(4, 13).double(), DilatedReparamBlock(4, 13).double()
    for name, parameter in block.named_parameters():
        if "bn" in name:
            parameter.data.uniform_(0.5, 2)
    other.load_state_dict(block.state_dict())
    x = torch.randn(3, 4, *size, dtype=torch.float64, requires_grad=True)
    kernels = ((13, 1), *DILATED_BRANCHES[13])
    group = Group(4, *size, kernels, False, "nchw", True, 3)
    seed = torch.randn_like(x)
    results = []
    for module, plan in ((block, ""), (other, STACKED)):
        with installed(dict.fromkeys(group.keys(CPU, torch.float64), plan)):
            out = module(x)
        results.append([out, *torch.autograd.grad(out, [x, *module.parameters()], seed), *module.buffers()])
    torch.testing.assert_close(*results)
    assert [name for name, norm in other.named_modules() if "bn" in name and norm.num_batches_tracked != 1] == []


def test_stacked_convolutions_have_second_derivatives_and_keep_bfloat16():
    weights = [torch.randn(2, 1, k, k, dtype=torch.float64, requires_grad=True) for k in (5, 3)]
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    stacked = lambda x, *weights: convolve_stacked(x, weights, (1, 2))  # noqa: E731
    assert torch.autograd.gradcheck(stacked, (x, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(stacked, (x, *weights), fast_mode=True)
    block, x = DilatedReparamBlock(4, 13), torch.randn(2, 4, 4, 4)
    expected = block(x)
    group = Group(4, 4, 4, ((13, 1), *DILATED_BRANCHES[13]), False, "nchw", True, 2)
    with installed(dict.fromkeys(group.keys(CPU, torch.bfloat16), STACKED)), torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.1)


def test_batch_norms_that_do_not_learn_from_the_batch_are_not_stacked():
    block, x = DilatedReparamBlock(4, 7), torch.randn(2, 4, 4, 4)
    block.dil_bn_k3_2.eval()  # as a user may freeze it
    expected = block(x)
    group = Group(4, 4, 4, ((7, 1), *DILATED_BRANCHES[7]), False, "nchw", True, 2)
    with installed(dict.fromkeys(group.keys(CPU, torch.float32), STACKED)):
        torch.testing.assert_close(block(x), expected)
    assert block.dil_bn_k3_2.num_batches_tracked == 0 and block.origin_bn.num_batches_tracked == 2


@pytest.mark.parametrize("fault", ["offset", "nan", "error"])
def test_small_maps_are_tried_stacked_unless_that_is_wrong(fault, monkeypatch):
    monkeypatch.setattr(
        depthwise_choice, "time_in_turns", lambda functions, *_: [[2.0], *([[1.5]] * (len(functions) - 2)), [1.0]]
    )
    group = Group(4, 4, 4, ((7, 1), *DILATED_BRANCHES[7]), False, "nhwc", True, 2)
    measure = functools.partial(depthwise_choice.measure_group, device=CPU, dtype=torch.float32)
    assert measure(group)[1].plans == [STACKED] * 4
    assert STACKED not in measure(group._replace(height=64))[1].plans
    assert STACKED not in measure(group._replace(training=False))[1].plans
    monkeypatch.setattr(depthwise, "convolve_stacked", make_wrong(fault, convolve_stacked))
    assert STACKED not in measure(group)[1].plans


def test_a_plan_meets_the_rules_of_torch_library():
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(planned_operator, (x, weight, 2, "nhwc phases-nchw phases-nhwc phases-rows"))


@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (2, 1, 6, 6), (2, 4, 1, 1), (1, 4, 1, 6)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_outputs_have_the_strides_that_torch_compile_expects(shape, dilation):
    x, weight = torch.randn(shape), torch.randn(shape[1], 1, 1, 1)
    for plan in every_plan(shape, 1, dilation, torch.float32):
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            expected = planned_operator(given.to("meta"), weight.to("meta"), dilation, plan)
            assert planned_operator(given, weight, dilation, plan).stride() == expected.stride(), plan


def test_torch_compile_may_leave_sizes_open_where_nothing_was_measured():
    conv = DepthwiseConv2d(4, 5)
    compiled = torch.compile(conv, backend="eager", fullgraph=True, dynamic=True)
    for size in (8, 9, 12):
        x = torch.randn(2, 4, size, size)
        torch.testing.assert_close(compiled(x), conv(x))


@pytest.mark.parametrize("plan", [PLAN, STACKED])
def test_a_compiled_block_computes_as_planned(plan):
    block, x = DilatedReparamBlock(4, 7), torch.randn(2, 4, 8, 8, requires_grad=True)
    group = Group(4, 8, 8, ((7, 1), (5, 1), (3, 2), (3, 3)), False, "nchw", True, 2)
    with installed(dict.fromkeys(group.keys(CPU, torch.float32), plan)):
        expected = torch.autograd.grad(block(x).square().sum(), x)
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
        out = compiled(x)
        assert block(x).stride(1) == 1  # the plan's memory format, NHWC
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x), expected)


@pytest.mark.parametrize(
    "text", ["", "nhwc", "nhwc nhwc nhwc", "nhcw nhwc nhwc fft", "nhwc nhwc nhwc fast", "nhwc fft nhwc native-fft"]
)
def test_plans_that_name_nothing_are_refused(text):
    with pytest.raises(ValueError, match="plan is a memory format|there is no method"):
        parse_plan(text)


# --- wrong methods


def make_wrong(kind, method):
    """`method` with a fault."""
    calls = itertools.count()

    def wrong(*inputs):
        out = method(*inputs)
        if kind == "offset":
            return out + 1e-3
        if kind == "one pixel":
            out = out.clone()
            out[0, 0, 0, 0] += 1e-3 * out.abs().max()
            return out
        if kind == "not the same twice":
            return out * (1 + 1e-6 * next(calls))
        if kind == "nan":
            return torch.full_like(out, torch.nan)
        if kind == "memory that nobody wrote":
            return torch.empty_like(out)
        raise RuntimeError("could not create a primitive")

    return wrong


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "kind", ["offset", "one pixel", "not the same twice", "nan", "memory that nobody wrote", "error"]
)
def test_a_wrong_method_is_refused(kind, training, monkeypatch):
    key = Key("cpu", "float32", training, 64, 16, 16, 5, 1)
    assert verify(key, PLAN, CPU, torch.float32) == []
    with monkeypatch.context() as patch:
        patch.setitem(FORWARD, "nhwc", make_wrong(kind, FORWARD["nhwc"]))
        assert 0 in dict(verify(key, PLAN, CPU, torch.float32))
    if training:
        monkeypatch.setitem(WEIGHT, "kernel-nhwc", make_wrong(kind, WEIGHT["kernel-nhwc"]))
        assert 2 in dict(verify(key, PLAN, CPU, torch.float32))


def test_a_wrong_method_is_not_chosen_however_fast_it_is(network, monkeypatch):
    """All methods in NHWC seem to take no time; the wrong one among them is left out, another one is taken."""
    monkeypatch.setattr(depthwise_choice, "rank", rank_nhwc_first)
    monkeypatch.setattr(
        depthwise_choice, "time_in_turns", lambda functions, *_: [[2.0], *([[1.0]] * (len(functions) - 1))]
    )
    monkeypatch.setitem(FORWARD, "nhwc", make_wrong("offset", FORWARD["nhwc"]))
    choice = choose_convolutions(network, SIZES, seconds=1e6)
    plans = [plan for plan in choice.record["plans"].values() if plan]
    assert len(plans) == 18 and not any("nhwc" in plan.split()[1:3] for plan in plans)
    assert "2.0 times as fast as the default" in choice.line


def rank_nhwc_first(group, key, images, device, dtype):
    taps = (min(key.kernel_size, 2 * ((key.height - 1) // key.dilation) + 1),) * 2
    passes = methods((images, key.channels, key.height, key.width), taps, key.dilation, dtype)
    times = [{name: index + 100 * ("nhwc" not in name) for index, name in enumerate(names)} for names in passes]
    return Ranking(times, default=1e6, conversion=0.0)


# --- what is chosen


def test_groups_are_the_convolutions_that_share_an_input(network):
    groups = find_groups(network.train(), [Use((32, 32), 4, 10), Use((64, 32), 4, 5), Use((32, 32), 8, 7, False)])
    assert len(groups) == 15 and network.training
    block = Group(16, 4, 4, ((13, 1), (5, 1), (7, 2), (3, 3), (3, 4), (3, 5)), False, "nhwc", True, 4)
    assert groups[block] == 10
    assert groups[block._replace(height=8)] == 5
    assert groups[block._replace(training=False, batch_size=8)] == 7
    assert Group(32, 1, 1, ((7, 1), (5, 1), (3, 2), (3, 3)), False, "nchw", True, 4) in groups
    merged = timm.create_model("unireplknet_test", deploy=True)
    groups = find_groups(merged, [Use((32, 32), 1, training=False)])
    assert Group(16, 4, 4, ((13, 1),), True, "nhwc", False, 1) in groups
    assert find_groups(nn.Conv2d(3, 3, 3), SIZES) == {}
    assert find_groups(timm.create_model("unireplknet_test", attempt_use_lk_impl=False), SIZES) == {}


def test_the_real_measurement_gives_plans_that_compute_the_same(network):
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    expected = network(images)
    choice = choose_convolutions(network, SIZES, seconds=1e6)
    assert len(choice.record["plans"]) == 18
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert results_file().is_file() and "measured in" in choice.line


@pytest.mark.parametrize(
    ("default", "planned", "changed"), [(1.0, 0.94, True), (1.0, 0.96, False), (1.0, 1.5, False), (1.0, 0.1, True)]
)
def test_the_default_stays_unless_another_is_clearly_faster(default, planned, changed, monkeypatch):
    monkeypatch.setattr(
        depthwise_choice, "time_in_turns", lambda functions, *_: [[default], *([[planned]] * (len(functions) - 1))]
    )
    group = Group(2, 6, 6, ((13, 1), (5, 1)), False, "nhwc", True, 2)
    result = depthwise_choice.duel(group, [[PLAN, ""]], CPU, torch.float32, depthwise_choice.Budget(1e6, 0.0))
    assert result.plans == ([PLAN, ""] if changed else ["", ""])


def test_what_was_chosen_is_kept_for_the_next_run(network, measured):
    first = choose_convolutions(network, SIZES)
    assert len(measured) == 5 and set(first.record["plans"].values()) == {PLAN}
    assert first.line.startswith("5 of 5 groups changed, 2.0 times as fast as the default, measured in")
    plans = dict(depthwise.PLANS)
    second = choose_convolutions(network, SIZES)
    assert len(measured) == 5 and depthwise.PLANS == plans and second.record == first.record
    assert "as measured before" in second.line
    choose_convolutions(network, [Use((32, 32), 5)])  # another batch size is another measurement
    assert len(measured) == 10


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', "\0"])
def test_a_damaged_file_is_measured_again(content, network, measured):
    results_file().parent.mkdir(parents=True)
    results_file().write_text(content)
    choose_convolutions(network, SIZES)
    assert len(measured) == 5
    assert list(json.loads(results_file().read_text()).values())[-1]


def test_a_damaged_entry_is_measured_again(network, measured):
    choose_convolutions(network, SIZES)
    content = json.loads(results_file().read_text())
    [machine] = content
    content[machine] = {name: [["nhwc fast fast fast"], 2.0, 1.0] for name in content[machine]}
    results_file().write_text(json.dumps(content))
    choose_convolutions(network, SIZES)
    assert len(measured) == 10


def test_a_folder_that_cannot_be_written_is_no_obstacle(network, measured, tmp_path):
    (tmp_path / "torch").write_text("a file where the folder should be")
    assert choose_convolutions(network, SIZES).record["plans"]
    assert len(measured) == 5


def test_other_kernels_other_threads_and_other_machines_are_measured_again(network, measured, monkeypatch):
    for attribute, value in (("hash_kernels", "0"), ("processor_name", "another CPU")):
        depthwise_choice.describe_machine.cache_clear()
        monkeypatch.setattr(depthwise_choice, attribute, lambda value=value: value)
        choose_convolutions(network, SIZES)
    depthwise_choice.describe_machine.cache_clear()
    assert len(measured) == 10 and len(json.loads(results_file().read_text())) == 2


def test_a_resumed_run_computes_as_its_checkpoint_says(network, measured):
    """Whatever would be measured now, and whatever the file says."""
    record = choose_convolutions(network, SIZES).record
    record["plans"] = dict.fromkeys(record["plans"], "nchw nchw nchw native-nchw")
    some = next(iter(record["plans"]))
    record["plans"][some] = ""
    choice = choose_convolutions(network, SIZES, stored=json.loads(json.dumps(record)))
    assert len(measured) == 5 and choice.record == record
    assert len(depthwise.PLANS) == 17 and some not in map(to_text, depthwise.PLANS)
    assert choice.line == "as this run began, 17 of 18 not by default"


def test_a_resumed_run_of_an_earlier_version_stays_with_the_default(network, measured):
    choice = choose_convolutions(network, SIZES, stored={})
    assert measured == [] and not depthwise.PLANS and set(choice.record["plans"].values()) == {""}


def test_a_run_that_moves_to_another_machine_is_measured_there_and_says_so(network, measured):
    record = choose_convolutions(network, SIZES).record | dict(machine="Another CPU, 96 threads")
    results_file().unlink()
    choice = choose_convolutions(network, SIZES, stored=record)
    assert len(measured) == 10
    assert "had other kernels before (Another CPU, 96 threads), so its results change by rounding" in choice.line


@pytest.mark.parametrize("name", ["pytorch", "default", "triton"])
def test_the_environment_variable_goes_before_what_was_measured(name, network, measured, monkeypatch):
    images = torch.randn(2, 3, 32, 32)
    expected = network(images)
    choose_convolutions(network, SIZES)
    monkeypatch.setenv("UNIREPLKNET_DEPTHWISE", name)
    choice = choose_convolutions(network, SIZES)
    assert len(measured) == 5 and torch.equal(network(images), expected)
    assert choice.line == (
        f"UNIREPLKNET_DEPTHWISE is {name!r}, which overrides what was measured (5 of 5 groups changed, 2.0 times as "
        "fast as the default)"
    )
    with installed({key: PLAN for group in find_groups(network, SIZES) for key in group.keys(CPU, torch.float32)}):
        assert torch.equal(network(images), expected)


def test_nothing_is_timed_where_runs_must_be_repeatable(network, monkeypatch):
    def fail(*_):
        raise AssertionError("timed")

    monkeypatch.setattr(depthwise_choice, "seconds_of", fail)
    choice = choose_convolutions(network, SIZES, measure=False)
    assert choice.line == "default, verified and not timed" and not depthwise.PLANS
    monkeypatch.setattr(depthwise.depthwise_cpu, "depthwise_conv2d", lambda x, weight, dilation: x * 2)  # wrong
    choice = choose_convolutions(network, SIZES, measure=False)
    assert set(choice.record["plans"].values()) == {"nchw nchw native-nchw native-nchw"}
    assert choice.line == "18 of 18 not by default, verified and not timed"


def test_a_short_run_is_not_measured(network, measured):
    choice = choose_convolutions(network, [Use((32, 32), 4, steps=1)])
    assert measured == [] and not depthwise.PLANS
    assert choice.line == "default, since the run is too short to measure"


def test_measuring_ends_with_its_budget(network, monkeypatch):
    group = next(iter(find_groups(network, SIZES)))
    spent = depthwise_choice.Budget(0.0, 0.0)
    assert depthwise_choice.measure_group(group, CPU, torch.float32, spent) is None
    assert choose_convolutions(network, SIZES, seconds=0.0).line == "default, since the run is too short to measure"


def test_networks_without_such_convolutions_are_left_alone():
    choice = choose_convolutions(nn.Sequential(nn.Conv2d(3, 4, 3)), SIZES)
    assert choice.line == "" and choice.record["plans"] == {}


# --- in a run of train.py


def test_a_run_keeps_its_convolutions_when_it_is_resumed(run_train, measured, monkeypatch, capsys):
    """The second half would be measured differently, but computes what the whole run computes."""
    monkeypatch.setattr(depthwise_choice, "MAX_FRACTION", 1e6)
    whole = torch.load(run_train(EPOCHS=2, OUTPUT="whole") / "last.pth")
    assert "kernels     10 of 10 groups changed" in capsys.readouterr().out
    assert set(whole["convolutions"]["plans"].values()) == {PLAN}
    resumed = run_train(EPOCHS=2, OUTPUT="halves", SAVE_MINUTES=1e-9)
    checkpoint = torch.load(resumed / "last.1.pth")  # inside the last epoch
    torch.save(checkpoint, resumed / "last.pth")
    monkeypatch.setattr(depthwise_choice, "decide", lambda *_: 1 / 0)
    again = torch.load(run_train(EPOCHS=2, OUTPUT="halves", RESUME="auto") / "last.pth")
    assert "kernels     as this run began, 36 of 36 not by default" in capsys.readouterr().out
    assert again["convolutions"] == whole["convolutions"]
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(again["state_dict"][name], tensor), name
