"""The exponential moving average against its plain formula."""

import copy

import pytest
import torch
from torch import nn

from ema import ModelEma, unwrap


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 5))


def train_step(model, step):
    """Change every weight and the statistics of batch normalisation, the same way for the same step."""
    generator = torch.Generator().manual_seed(1000 + step)
    device = next(model.parameters()).device
    model.train()
    model(torch.randn(6, 3, 4, 4, generator=generator).to(device))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(device)


def copy_state(module):
    return {name: tensor.double().cpu().clone() for name, tensor in module.state_dict().items()}


def average(states, decays):
    """The plain formula, in float64: the average of the first state and those after each update."""
    result = dict(states[0])
    for state, decay in zip(states[1:], decays, strict=True):
        for name, value in state.items():
            result[name] = decay * result[name] + (1 - decay) * value
    counter = "1.num_batches_tracked"
    result[counter] = states[-1][counter]
    return result


def assert_equal_states(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name].double(), expected[name].double(), rtol=1e-5, atol=1e-6)


def run(ema, model, steps, wrapped=None):
    """Train and update for some steps; returns the states of the network after each."""
    states = []
    for step in steps:
        train_step(model, step)
        ema.update(model if wrapped is None else wrapped)
        states.append(copy_state(model))
    return states


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("power", [2 / 3, 1.0, 0.3, 0])
def test_every_step_is_the_plain_formula_with_the_documented_decay(decay, power):
    model = network()
    states = [copy_state(model)]
    ema = ModelEma(model, decay=decay, warmup_power=power)
    assert_equal_states(ema.ema.state_dict(), states[0])
    decays = []
    for n in range(1, 13):
        decays.append(min(decay, 1 - (1 + n) ** -power) if power else decay)
        assert ema.decay == pytest.approx(decays[-1])
        states += run(ema, model, [n])
        assert ema.updates == n
        assert_equal_states(ema.ema.state_dict(), average(states, decays))


def test_power_one_is_the_plain_average_of_all_steps():
    model = network()
    ema = ModelEma(model, decay=1.0, warmup_power=1)
    states = [copy_state(model), *run(ema, model, range(20))]
    for name, value in ema.ema.named_parameters():
        torch.testing.assert_close(value.double(), torch.stack([s[name] for s in states]).mean(0), rtol=0, atol=1e-5)


def test_default_decay_grows_as_documented():
    ema = ModelEma(network(), decay=0.9998)
    for updates, decay in ((0, 1 - 2 ** (-2 / 3)), (998, 0.99), (353_553, 0.9998), (10**7, 0.9998)):
        ema.updates = updates
        assert ema.decay == pytest.approx(decay, abs=1e-7)


def test_integer_buffers_are_copied():
    model = network()
    ema = ModelEma(model, decay=0.9)
    run(ema, model, range(7))
    counter = ema.ema.state_dict()["1.num_batches_tracked"]
    assert counter == 7 and counter.dtype == torch.int64


def test_the_average_is_a_separate_network_in_eval_mode_without_gradients():
    model = network()
    ema = ModelEma(model)
    before = copy_state(ema.ema)
    train_step(model, 0)
    assert_equal_states(ema.ema.state_dict(), before)
    ema.update(model)
    assert not any(module.training for module in ema.ema.modules())
    assert not any(parameter.requires_grad for parameter in ema.ema.parameters())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert not ema.ema(torch.randn(2, 3, 4, 4)).requires_grad
    changed = copy_state(model)
    ema.update(model)
    assert_equal_states(model.state_dict(), changed)


WRAPPERS = {
    "none": lambda model: model,
    "DataParallel": nn.DataParallel,
    "compile": torch.compile,
    "compile(DataParallel)": lambda model: torch.compile(nn.DataParallel(model)),
    "DataParallel(compile)": lambda model: nn.DataParallel(torch.compile(model)),
}


@pytest.mark.parametrize("at_update", WRAPPERS)
@pytest.mark.parametrize("at_start", WRAPPERS)
def test_wrappers_change_nothing(at_start, at_update):
    """Nothing is compiled here: a wrapper of torch.compile does that at its first call only."""
    expected, plain = ModelEma(network()), network()
    run(expected, plain, range(3))
    model = network()
    ema = ModelEma(WRAPPERS[at_start](model))
    run(ema, model, range(3), WRAPPERS[at_update](model))
    assert type(ema.ema) is nn.Sequential and unwrap(WRAPPERS[at_update](model)) is model
    assert_equal_states(ema.ema.state_dict(), expected.ema.state_dict())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_saved_from_a_wrapped_network_can_be_continued(wrapper):
    saved = WRAPPERS[wrapper](network(1)).state_dict()
    ema = ModelEma(network(2))
    ema.load(saved, 5)
    assert ema.updates == 5
    assert_equal_states(ema.ema.state_dict(), network(1).state_dict())


def test_a_resumed_average_continues_exactly(tmp_path):
    model = network()
    ema = ModelEma(model, decay=0.9)
    run(ema, model, range(5))
    torch.save(dict(state_dict_ema=ema.ema.state_dict(), ema_updates=ema.updates), tmp_path / "last.pth")
    twin = copy.deepcopy(model)
    run(ema, model, range(5, 9))

    resumed = ModelEma(twin, decay=0.9, resume=str(tmp_path / "last.pth"))
    assert resumed.updates == 5 and not resumed.ema.training
    run(resumed, twin, range(5, 9))
    assert resumed.updates == ema.updates == 9 and resumed.decay == ema.decay
    for name, value in resumed.ema.state_dict().items():
        assert torch.equal(value, ema.ema.state_dict()[name]), name


def test_loading_copies_the_weights():
    saved = network(1).state_dict()
    before = {name: tensor.clone() for name, tensor in saved.items()}
    model = network(2)
    ema = ModelEma(model)
    ema.load(saved, 0)
    run(ema, model, range(2))
    assert_equal_states(saved, before)


@pytest.mark.parametrize("checkpoint", [{"state_dict": {}}, {"state_dict_ema": None}])
def test_a_checkpoint_without_average_is_refused(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="plain.pth holds no state_dict_ema"):
        ModelEma(network(), resume=str(tmp_path / "plain.pth"))


def test_the_average_can_be_kept_on_another_device():
    """Without a GPU here, device="cpu" is the same device; the result is the same, too."""
    model = network().to("cuda" if torch.cuda.is_available() else "cpu")
    ema = ModelEma(model, decay=0.9, warmup_power=0, device="cpu")
    states = [copy_state(model), *run(ema, model, range(3))]
    assert all(tensor.device.type == "cpu" for tensor in ema.ema.state_dict().values())
    assert_equal_states(ema.ema.state_dict(), average(states, [0.9] * 3))


@pytest.mark.parametrize("decay", [-0.1, 1.0001, 99, float("nan")])
def test_an_impossible_decay_is_refused(decay):
    with pytest.raises(ValueError, match="decay must lie between 0 and 1"):
        ModelEma(network(), decay=decay)
