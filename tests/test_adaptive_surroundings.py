"""What models, trainers and threads do around adaptive blocks besides calling them."""

import copy
import sys
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swan_surgery as swan
from tests.random_layers import randomise_


class Block(nn.Module):
    """A residual block with all that has settings."""

    def __init__(self, width: int = 6, inner: int = 12) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.drop, self.scale = nn.Dropout(0.0), 1.0
        self.c2, self.n2 = nn.Conv2d(inner, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.drop(F.relu(self.n1(self.c1(x))))
        return F.relu(x + self.scale * self.n2(self.c2(inner)))


class Net(nn.Module):
    """Two of them."""

    recomputes = False

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.leave = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            if self.recomputes:
                x = checkpoint(block, x, use_reentrant=self.recomputes == "reentrant")
            else:
                x = block(x)
        return self.leave(x.mean((2, 3)))


def images(count: int = 16, seed: int = 1) -> Tensor:
    """Of different contrast."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 7, 7, generator=generator)
    return (x * torch.linspace(0.3, 2, count).view(-1, 1, 1, 1)).double()


def adapted_net(structure: Any = "nested", *, macs: float = 0.6, **fit: Any) -> swan.AdaptiveModel:
    """Calibrated and fitted."""
    torch.manual_seed(0)
    net = Net()
    randomise_(net, torch.Generator().manual_seed(0))
    adapted = swan.adapt(net.double().eval(), images(2), structure=structure)
    swan.calibrate_widths(adapted, [images()])
    swan.fit_widths(adapted, [images()], macs=macs, **fit)
    return adapted


class Linears(nn.Module):
    """A block of linear layers, and whatever else the model does with it."""

    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        self.enter, self.leave, self.told = nn.Linear(5, 8), nn.Linear(8, 3), 1.0
        self.block = block or nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.block(self.enter(x)))


class Scaled(nn.Module):
    """Has a number that others may set."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.factor = nn.Linear(8, 16), nn.Linear(16, 8), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor * self.down(F.relu(self.up(x)))


class Keeping(Scaled):
    """Leaves something behind."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.aux = y[:, 0].square()
        return y


@pytest.mark.parametrize("structure", ["nested", "free"])
def test_threads_compute_what_one_does(structure) -> None:
    """Shells are shared: two threads dressed one at the same time, and outputs were wrong."""
    adapted = adapted_net(structure, macs=0.6 if structure == "nested" else 0.8)
    small = swan.compact(adapted) if structure == "free" else adapted
    batches = [images(8, seed) for seed in (1, 2)]
    with torch.no_grad():
        wanted = [small(x) for x in batches]
    found: list[Any] = []

    def work(which: int) -> None:
        with torch.no_grad():
            for _ in range(60):
                try:
                    found.append(torch.allclose(small(batches[which]), wanted[which]))
                except RuntimeError as err:
                    found.append(err)

    threads = [Thread(target=work, args=(own,)) for own in (0, 1)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for own in threads:
            own.start()
        for own in threads:
            own.join()
    finally:
        sys.setswitchinterval(before)
    assert len(found) == 120
    assert all(own is True for own in found), {repr(own) for own in found}


@pytest.mark.parametrize("execution", ["masked", "group"])
def test_blocks_recomputed_while_they_train_have_the_same_gradients(execution) -> None:
    """They were recomputed in groups, with statistics that had moved, and without looking."""
    plain = adapted_net(efforts="learn")
    again = copy.deepcopy(plain)
    again.model.recomputes = "as torch recommends"
    for own in (plain, again):
        own.train()
        own.execution = execution
        own(images(8, 9)).square().sum().backward()
    looking = 0
    pairs = zip(plain.named_parameters(), again.parameters(), strict=True)
    for (name, one), two in pairs:
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None and two.grad is not None:
            looking += "effort" in name
            torch.testing.assert_close(two.grad, one.grad)
    assert (looking > 0) == (execution == "masked")


def test_efforts_that_cannot_learn_where_a_block_is_recomputed_say_so() -> None:
    adapted = adapted_net(efforts="learn").train()
    adapted.model.recomputes, adapted.execution = "reentrant", "masked"
    output = adapted(images(8).requires_grad_())
    with pytest.raises(swan.ModelError, match="use_reentrant=False"):
        output.sum().backward()


def test_calibrate_names_what_knows_all_widths() -> None:
    """The statistics of narrower widths moved by momentum at each call."""
    adapted = adapted_net()
    before = {name: own.clone() for name, own in adapted.state_dict().items()}
    for own in (adapted, nn.Sequential(adapted)):
        with pytest.raises(swan.ModelError, match="calibrate_widths"):
            swan.calibrate(own, [images()])
    assert all(torch.equal(own, before[name]) for name, own in adapted.state_dict().items())


@pytest.mark.parametrize(
    ("structure", "held", "efforts"),
    [("nested", 1, "keep"), ("nested", 1, "fit"), ("free", -1, "fit")],
)
def test_widths_are_not_fitted_where_they_are_held(structure, held, efforts) -> None:
    adapted = adapted_net(structure, macs=0.8)
    with adapted.holding(held), pytest.raises(swan.ModelError, match="call fit_widths outside"):
        swan.fit_widths(adapted, [images()], macs=0.8, efforts=efforts)


def test_a_model_that_asks_for_the_class_of_its_block_is_refused() -> None:
    class Asking(Linears):
        def forward(self, x: Tensor) -> Tensor:
            y = self.block(self.enter(x))
            return self.leave(y if isinstance(self.block, nn.Sequential) else 2 * y)

    class Counting(Linears):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * len(self.block)

    for kind in (Asking, Counting):
        with pytest.raises(swan.ModelError, match=r"ignore=\[\.\.\.\] \(block\)"):
            swan.adapt(kind().eval(), torch.randn(2, 5))


def test_what_a_model_writes_on_its_block_the_module_has() -> None:
    class Telling(Linears):
        def forward(self, x: Tensor) -> Tensor:
            self.block.factor = self.told
            return super().forward(x)

    model = Telling(Scaled()).double().eval()
    adapted = swan.adapt(model, torch.randn(2, 5).double())
    x = torch.randn(6, 5).double()
    for told in (1.0, 2.0):
        model.told = adapted.model.told = told
        torch.testing.assert_close(adapted(x), model(x))
        with adapted.holding(0):
            torch.testing.assert_close(adapted(x), adapted.at(0.25).eval()(x))


def test_blocks_that_keep_a_tensor_of_each_run_stay_static() -> None:
    with pytest.raises(swan.NoGateableChannelsError, match="keeps a tensor of each run"):
        swan.adapt(Linears(Keeping()).eval(), torch.randn(2, 5))


def test_settings_hold_at_every_width() -> None:
    adapted = adapted_net()
    for block in (adapted.model.blocks[0].full, adapted.model.blocks[1].full):
        block.scale, block.n1.eps, block.drop.p = 3.0, 0.5, 1.0
    adapted.model.blocks[1].full.drop.train()
    for level, width in enumerate(adapted.widths):
        with adapted.holding(level), torch.no_grad():
            grouped = adapted(images())
            adapted.execution = "masked"
            torch.testing.assert_close(adapted(images()), grouped)
            adapted.execution = "group"
        static = adapted.at(width)
        static.blocks[1].drop.train()
        torch.testing.assert_close(static(images()), grouped)


@pytest.mark.parametrize("value", [2.0, -1.0, 0.25])
def test_masks_are_zero_or_one(value) -> None:
    adapted = adapted_net("free", macs=0.8)
    mask = torch.full((24,), value)
    with pytest.raises(swan.InputError, match="0 or 1"), adapted.holding(mask):
        pass
    with pytest.raises(swan.InputError, match="0 or 1"):
        adapted.at(mask)


def test_files_of_a_model_around_an_adaptive_one_are_refused(tmp_path) -> None:
    """What they forgot changed the outputs: ceilings, and how it runs."""
    with pytest.raises(swan.ModelError, match="module '0' is adaptive"):
        swan.save(nn.Sequential(adapted_net()), tmp_path / "x.swan")


def test_exports_ask_the_models_inside(tmp_path) -> None:
    with pytest.raises(swan.ModelError, match=r"\.pt2 cannot hold"):
        swan.export(nn.Sequential(adapted_net().float()), tmp_path / "x.pt2", images(4).float())


@pytest.mark.parametrize("execution", ["masked", "group"])
def test_ceilings_of_nested_widths_are_exported(execution, tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    adapted = adapted_net(macs=0.9, max_macs=0.95).float()
    adapted.max_macs = int(0.6 * adapted.costs.dense)
    small = swan.compact(adapted, execution=execution)
    x = images(9).float()
    assert int(small.taken(x).macs.max()) <= adapted.max_macs
    assert swan.export(small, tmp_path / "x.onnx", x).relative_error < 1e-4


@pytest.mark.parametrize(
    "wrong",
    [
        {"macs_weight": float("nan")},
        {"macs_weight": -1.0},
        {"l0": float("inf")},
        {"epoch": float("nan")},
    ],
)
def test_coefficients_of_the_penalty_are_checked(wrong) -> None:
    adapted = adapted_net()
    with pytest.raises(swan.InputError, match=next(iter(wrong))):
        swan.gate_penalty(adapted, adapted.taken(images()), macs=0.3, **wrong)


def test_a_frozen_model_stays_frozen_with_another_state() -> None:
    torch.manual_seed(0)
    net = Net().double().eval().requires_grad_(requires_grad=False)
    solved, fresh = (swan.adapt(net, images(2)) for _ in range(2))
    swan.calibrate_widths(solved, [images()])
    swan.compensate_widths(solved, [images(64)])
    fresh.load_state_dict(solved.state_dict())
    assert not any(own.requires_grad for own in fresh.blocks()["blocks.0"].statistics.parameters())


@pytest.mark.parametrize("at", [1, 3, 6])
def test_an_interrupted_fit_or_calibration_leaves_all_as_it_was(at) -> None:
    adapted = adapted_net("free", macs=0.8)
    before = {name: own.clone() for name, own in adapted.state_dict().items()}
    runs = 0

    def interrupt(_module: nn.Module, _args: Any) -> None:
        nonlocal runs
        runs += 1
        if runs >= at:
            raise KeyboardInterrupt

    handle = adapted.model.leave.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        swan.calibrate_widths(adapted, [images(), images(), images()], full=True)
    runs = -12 if at == 6 else 0
    with pytest.raises(KeyboardInterrupt):
        swan.fit_widths(adapted, [images()], macs=0.8, statistics=[images()])
    handle.remove()
    assert all(torch.equal(own, before[name]) for name, own in adapted.state_dict().items())


def test_execution_is_one_of_those_there_are() -> None:
    adapted = adapted_net()
    wrong: Any = "whatever"
    with pytest.raises(swan.InputError, match="execution must be one of"):
        adapted.execution = wrong


@pytest.mark.parametrize("step", [None, 1.5, -1])
def test_steps_are_whole_numbers(step) -> None:
    adapted = adapted_net()
    with pytest.raises(swan.InputError, match="step counts from 0"):
        swan.sandwich_loss(adapted, lambda own: own(images()).sum(), step=step)


def test_outputs_that_are_infinite_or_labels_do_not_keep_a_model_from_adapting() -> None:
    class Masked(Linears):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(x)
            closed = torch.tensor([False, True, False])
            return y.masked_fill(closed, -torch.inf), y.argmax(1)

    model = Masked().eval()
    x = torch.randn(6, 5)
    adapted = swan.adapt(model, x[:2])
    torch.testing.assert_close(adapted(x)[0], model(x)[0])


def test_a_model_that_changes_its_inputs_leaves_those_of_the_example_alone() -> None:
    class InPlace(Linears):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x.mul_(2))}

    x = torch.randn(4, 5)
    given = x.clone()
    adapted = swan.adapt(InPlace().eval(), x)
    assert torch.equal(x, given)
    swan.compact(adapted)
    assert torch.equal(adapted.structure.example_inputs.args[0], given)
    assert set(adapted(x.clone())) == {"logits"}


@pytest.mark.parametrize("compact", [False, True])
def test_a_sample_without_its_batch_is_refused(compact: bool) -> None:
    block = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1))
    x = torch.randn(2, 4, 4, 4)
    adapted = swan.adapt(block.eval(), x)
    model = swan.compact(adapted) if compact else adapted
    with pytest.raises(
        swan.InputError, match=r"3 axes, and had 4 with the example inputs.*x\[None\]"
    ):
        model(x[0])
