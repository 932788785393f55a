"""An optimizer through the cut: what it goes on with is what it held for the slots that stay."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import swan_surgery as swan
from tests.closing import learnt_
from tests.gated_zoo import closed_zoo, fresh_zoo
from tests.test_plan import mlp


MAKERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.5, centered=True),
}


def stepped(gated: swan.GatedModel, make) -> torch.optim.Optimizer:
    """Hard gates in training: what trains is what is cut."""
    weights = [own for own in gated.model.parameters() if own.requires_grad]
    optimizer = make([{"params": weights, "lr": 1e-3}])
    for step in range(2):
        train_step(gated, optimizer, gated, step)
    return optimizer


def train_step(model: nn.Module, optimizer, gated, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(tensor):
        if not tensor.is_floating_point():
            return tensor
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    inputs = gated.example_inputs.map(drawn)
    out = model.eval()(*inputs.args, **inputs.kwargs)
    optimizer.zero_grad()
    out.square().mean().backward()
    optimizer.step()


def assert_both_move_alike(gated: swan.GatedModel, first, small: nn.Module, second) -> None:
    """Three steps of each, and the slots that stay are those of the cut model."""
    for step in range(3, 6):
        train_step(gated, first, gated, step)
        train_step(small, second, gated, step)
    wanted = dict(swan.prune(gated).named_parameters())
    for key, found in small.named_parameters():
        torch.testing.assert_close(found, wanted[key], rtol=1e-9, atol=1e-12)


class TestLaw:
    @pytest.mark.parametrize("name", ["resnet_projection", "densenet", "shuffle"])
    @pytest.mark.parametrize("method", sorted(MAKERS))
    def test_training_on_is_training_on_the_closed_model(self, name, method) -> None:
        """With the gates closed, a step of the gated model moves the slots that stay as a step of the cut one."""
        gated = closed_zoo(name)
        optimizer = stepped(gated, MAKERS[method])
        small = swan.prune(gated)
        new = swan.optimizer_after(optimizer, gated, small)
        assert type(new) is type(optimizer)
        assert_both_move_alike(gated, optimizer, small, new)


class Sequences(nn.Module):
    """Heads, a recurrent state and norms over channels: gated in place."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.state = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.state(self.encoder(x))[0])


@pytest.mark.slow
def test_the_law_in_place() -> None:
    gated = swan.swanify(Sequences().double().eval(), torch.randn(2, 4, 8, dtype=torch.float64))
    with torch.no_grad():
        gated.gates.logits[::2] = -3.0
    optimizer = stepped(gated, MAKERS["adamw"])
    small = swan.prune(gated)
    new = swan.optimizer_after(optimizer, gated, small)
    train_step(gated, optimizer, gated, 5)
    train_step(small, new, gated, 5)
    wanted = dict(swan.prune(gated).named_parameters())
    for key, found in small.named_parameters():
        torch.testing.assert_close(found, wanted[key], rtol=1e-9, atol=1e-12)


def test_the_optimizer_of_the_given_model_is_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    stale = torch.optim.SGD(net.parameters(), momentum=0.9)
    gated = learnt_(swan.swanify(net, torch.zeros(1, 3)))
    small = swan.prune(gated, params=0.6)
    with pytest.raises(swan.InputError, match="trains no parameter of the gated model"):
        swan.optimizer_after(stale, gated, small)


def closed_half(gated: swan.GatedModel) -> swan.GatedModel:
    with torch.no_grad():
        gated.gates.logits[::2] = -3.0
    return gated


@pytest.mark.parametrize("method", sorted(MAKERS))
def test_one_optimizer_through_cuts_and_gates_again_and_again(method) -> None:
    """Cut, gated anew, trained, cut again: as if the slots that are gone had never been there."""
    gated = closed_half(swan.swanify(Sequences().double(), torch.randn(2, 4, 8).double()))
    optimizer = stepped(gated, MAKERS[method])
    small = swan.prune(gated)
    optimizer = swan.optimizer_after(optimizer, gated, small)
    again = swan.swanify(small, gated.example_inputs.args)
    first = swan.optimizer_after(optimizer, small, again)
    closed_half(again)
    plain = swan.prune(again)
    second = swan.optimizer_after(first, again, plain)
    directly = swan.optimizer_after(optimizer, small, plain)  # no step was made in between
    other = copy.deepcopy(plain)
    assert str(second.state_dict()) == str(directly.state_dict())
    assert_both_move_alike(again, first, plain, second)
    for key, found in plain.named_parameters():
        assert not torch.equal(found, other.get_parameter(key))
    first.add_param_group({"params": [again.gates.logits]})


def test_the_optimizer_of_a_plain_model_that_was_cut() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    small = swan.prune(learnt_(swan.swanify(net, torch.zeros(1, 3))), macs=0.5)
    new = swan.optimizer_after(optimizer, net, small)
    kept = torch.tensor(swan.kept(small)["2.weight"][1])
    moment = optimizer.state[net[2].weight]["exp_avg"]
    assert torch.equal(new.state[small[2].weight]["exp_avg"], moment[:, kept])
    for wrong in (net, nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))):
        with pytest.raises(swan.InputError, match="was not cut from this Sequential"):
            swan.optimizer_after(optimizer, net, wrong)


def test_an_average_is_cut_as_its_model_and_goes_on() -> None:
    gated = swan.swanify(nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Linear(16, 2)))
    average = AveragedModel(gated, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    with torch.no_grad():
        gated.gates.logits.copy_(torch.randn(16))
        gated.model[0].weight.add_(1.0)
    average.update_parameters(gated)
    average.module.gates.load_state_dict(gated.gates.state_dict())
    small, cut = (swan.prune(own, macs=0.5) for own in (gated, average.module))
    assert swan.kept(small) == swan.kept(cut)
    kept = torch.tensor(swan.kept(small)["0.weight"][0])
    assert torch.equal(cut[0].weight, average.module.model[0].weight[kept])
    new = AveragedModel(small, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    new.module.load_state_dict(cut.state_dict())
    new.n_averaged.copy_(average.n_averaged)
    average.update_parameters(gated)
    new.update_parameters(small)
    assert torch.equal(new.module[0].weight, average.module.model[0].weight[kept])


class TestGroups:
    def test_order_settings_and_counters_stay_and_the_gates_go(self) -> None:
        gated = mlp(3, 8, 2)
        groups = swan.parameter_groups(gated, lr=1e-3, weight_decay=0.1)
        optimizer = torch.optim.AdamW([groups[1], groups[0]])
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5)
        gated(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        before = copy.deepcopy(optimizer.state_dict())
        small = swan.prune(gated, params=0.6)
        new = swan.optimizer_after(optimizer, gated, small)
        (group,) = new.param_groups
        assert [id(p) for p in group["params"]] == [id(p) for p in small.parameters()]
        assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (5e-4, 1e-3, 0.1)
        kept = torch.tensor(swan.kept(small)["0.weight"][0])
        own = optimizer.state[gated.model[0].weight]
        assert torch.equal(new.state[small[0].weight]["exp_avg"], own["exp_avg"][kept])
        assert float(new.state[small[0].weight]["step"]) == 1
        small(torch.randn(4, 3)).sum().backward()
        new.step()  # and the old one keeps what it had
        assert str(optimizer.state_dict()) == str(before)
        torch.optim.lr_scheduler.LambdaLR(new, lambda epoch: 0.5, last_epoch=3)

    def test_parameters_beside_the_gated_model_stay(self) -> None:
        gated, head = mlp(3, 8, 2), nn.Linear(2, 2)
        optimizer = torch.optim.SGD([*gated.parameters(), *head.parameters()], 0.1, momentum=0.9)
        head(gated(torch.randn(4, 3))).sum().backward()
        optimizer.step()
        small = swan.prune(gated, macs=0.5)
        new = swan.optimizer_after(optimizer, gated, small)
        assert [id(p) for p in new.param_groups[0]["params"]] == [
            id(p) for p in (*small.parameters(), *head.parameters())
        ]
        found, wanted = (o.state[head.weight]["momentum_buffer"] for o in (new, optimizer))
        assert torch.equal(found, wanted)
        assert found is not wanted

    def test_named_groups_and_an_optimizer_that_made_no_step(self) -> None:
        gated = mlp(3, 8, 2)
        optimizer = torch.optim.Adam(gated.named_parameters())
        small = swan.prune(learnt_(gated), macs=0.5)
        new = swan.optimizer_after(optimizer, gated, small)
        names = [name for name, _ in gated.named_parameters() if name != "gates.logits"]
        assert new.param_groups[0]["param_names"] == names
        assert not new.state

    def test_two_cuts_in_a_row(self) -> None:
        gated = fresh_zoo()
        optimizer = stepped(gated, MAKERS["adamw"])
        once = swan.prune(learnt_(gated), macs=0.7)
        twice = swan.prune(learnt_(swan.swanify(once, gated.example_inputs.args)), macs=0.6)
        at_once = swan.optimizer_after(optimizer, gated, twice)
        for name, axes in swan.kept(twice).items():
            if name in dict(twice.named_parameters()):
                moment = optimizer.state[gated.model.get_parameter(name)]["exp_avg"]
                for axis, positions in axes.items():
                    moment = moment.index_select(axis, torch.tensor(positions))
                assert torch.equal(at_once.state[twice.get_parameter(name)]["exp_avg"], moment)


class TestRefused:
    def test_another_model(self) -> None:
        gated = mlp(3, 8, 2)
        optimizer = torch.optim.SGD(gated.parameters(), 0.1)
        for other in (nn.Linear(2, 2), swan.prune(learnt_(mlp(4, 6, 3)), macs=0.5), gated.model):
            with pytest.raises(swan.InputError, match="was not cut from this gated model"):
                swan.optimizer_after(optimizer, gated, other)
        with pytest.raises(swan.InputError, match=r"expected a torch\.optim\.Optimizer, got list"):
            swan.optimizer_after([], gated, gated.model)

    @pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.LBFGS])
    def test_state_without_slices(self, kind) -> None:
        gated = mlp(3, 8, 2)
        optimizer = kind(gated.model.parameters(), lr=0.1)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = gated(torch.ones(4, 3)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        small = swan.prune(learnt_(gated), macs=0.5)
        with pytest.raises(swan.InputError, match="has no slices; make a new optimizer"):
            swan.optimizer_after(optimizer, gated, small)
