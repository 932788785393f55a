"""SwanCallback in real Lightning fits of a few steps: budget, calibration, pruning, logs, resuming."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import swan_surgery as swan


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl

    from swan_surgery.integrations.lightning import SwanCallback

pytestmark = [
    pytest.mark.slow,
    # Lightning recommends worker processes, loggers and the like.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Module(pl.LightningModule):
    """A small ConvNet with batch-norm; `gate_lr` moves gates by gradient."""

    def __init__(self, seed: int = 0, *, gate_lr: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
            nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 4),
        ).double()  # fmt: skip
        self.net = swan.swanify(net, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
        self.gate_lr = gate_lr
        self.seen: list[dict[str, float]] = []
        self.logits: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.cross_entropy(self.net(x), y)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.logits.append(self.net.gates.logits.detach().clone())
        self.seen.append({k: float(v) for k, v in self.trainer.callback_metrics.items()})

    def configure_optimizers(self):
        groups = swan.parameter_groups(self.net, lr=0.05, gate_lr=self.gate_lr)
        return torch.optim.SGD(groups, momentum=0.9)


def data(num: int = 24) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num, 3, 8, 8, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.arange(num) % 4), batch_size=8)


def fit(module: Module, callback: SwanCallback, folder, *, ckpt_path=None, **options) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[callback], default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return trainer


def make(learning: str, **options) -> tuple[Module, SwanCallback]:
    module = Module()
    objective = swan.Objective(
        module.net, macs=0.5, learning=learning, ramp=swan.CosineRamp(0, 1), **options
    )
    return module, SwanCallback(objective)


@pytest.mark.parametrize("learning", ["curvature", "gradient"])
def test_the_pruned_network_is_what_the_gated_one_became(learning, tmp_path) -> None:
    module, callback = make(learning)
    assert callback.pruned is None
    before = module.net.gates.logits.detach().clone()
    fit(module, callback, tmp_path, max_epochs=2)
    gated, small = module.net, callback.pruned
    assert type(small) is nn.Sequential
    total = swan.count_macs(gated, gated.example_inputs)
    assert swan.count_macs(small, gated.example_inputs) == swan.hard_macs(gated) <= 0.5 * total
    assert not torch.equal(gated.gates.logits.detach(), before)
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(small.eval()(x), gated.eval()(x), rtol=1e-9, atol=1e-12)
    # The statistics are those of all training data under the final gates.
    twin = copy.deepcopy(gated)
    swan.calibrate(twin, data())
    torch.testing.assert_close(twin.model[4].running_var, gated.model[4].running_var)
    budgets = [row["swan/macs_budget"] for row in module.seen]
    assert budgets == pytest.approx([1.0, 0.875, 0.625, 0.5, 0.5, 0.5])
    hard = [row["swan/hard_macs_ratio"] for row in module.seen]
    assert all(h <= b for h, b in zip(hard, budgets, strict=True))


def test_a_step_is_that_of_the_plain_loop(tmp_path) -> None:
    """With penalties: gradient of loss + objective, also where two batches make one step."""
    module, twin = Module(), Module()
    options = {"l0": 0.3, "macs": 0.6, "learning": "gradient"}
    callback = SwanCallback(swan.Objective(module.net, **options))
    fit(module, callback, tmp_path, max_steps=1, max_epochs=1, accumulate_grad_batches=2)
    objective = swan.Objective(twin.net, **options)
    optimizer = twin.configure_optimizers()
    twin.train()
    for x, y in list(data())[:2]:
        (functional.cross_entropy(twin.net(x), y) / 2).backward()
    objective(1 / 3).backward()  # the second of three batches
    optimizer.step()
    assert callback.objective.state_dict() == objective.state_dict()
    # Before the end of training, which may move gates over the threshold to meet the budget.
    torch.testing.assert_close(module.logits[-1], twin.net.gates.logits.detach())
    for name, wanted in twin.net.model.named_parameters():
        found = module.net.model.get_parameter(name)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    wanted = objective.log()["l0_raw"]
    assert module.seen[-1]["swan/l0_raw"] == pytest.approx(wanted, rel=1e-6)  # kept in float32


@pytest.mark.parametrize("learning", ["curvature", "gradient"])
def test_resuming_goes_on_bitwise(learning, tmp_path) -> None:
    straight, callback = make(learning)
    fit(straight, callback, tmp_path, max_epochs=3)

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    first, own = make(learning)
    trainer = pl.Trainer(
        accelerator="cpu", callbacks=[own, Save()], default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        max_epochs=2,
    )  # fmt: skip
    trainer.fit(first, data())
    again, last = make(learning)
    fit(again, last, tmp_path, max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    assert len(again.seen) == 3  # the last epoch's batches only
    assert last.objective.log() == callback.objective.log()
    for key, value in callback.pruned.state_dict().items():
        assert torch.equal(last.pruned.state_dict()[key], value), key


class Counting(swan.Objective):
    """Keeps the epochs that it was called at."""

    def __call__(self, epoch: float) -> torch.Tensor:
        self.epochs = [*getattr(self, "epochs", []), epoch]
        return super().__call__(epoch)


def test_only_the_optimizer_of_the_gates_counts(tmp_path) -> None:
    class Two(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()  # type: ignore[attr-defined]
            for optimizer, loss in (
                (first, self.other(torch.ones(2)).sum()),
                (second, functional.cross_entropy(self.net(batch[0]), batch[1])),
            ):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.other.parameters(), lr=0.1), super().configure_optimizers()

    module = Two()
    objective = Counting(module.net, macs=0.5)
    fit(module, SwanCallback(objective), tmp_path, max_epochs=1)
    assert objective.epochs == pytest.approx([0, 1 / 3, 2 / 3])


def test_another_model_is_refused(tmp_path) -> None:
    _, callback = make("curvature")
    with pytest.raises(swan.ModelError, match="is no part of Module, which is trained"):
        fit(Module(), callback, tmp_path, max_epochs=1)


def test_a_routed_model_is_trained_with_its_mask_and_the_mask_is_cut(tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 4),
    ).double()  # fmt: skip

    class Routed(Module):
        def __init__(self) -> None:
            super().__init__()
            example = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
            self.net = swan.add_switch(net, "2", example_inputs=example, light=0.5, mask=True)

        def training_step(self, batch, batch_idx):
            return self.net.loss(batch)

        def on_train_batch_end(self, *_):
            pass

        def configure_optimizers(self):
            return torch.optim.AdamW(swan.parameter_groups(self.net.gated, lr=0.01))

    module = Routed()
    routed = module.net
    before = {name: own.clone() for name, own in routed.parts.light.named_parameters()}
    callback = SwanCallback(swan.Objective(routed.gated, macs=0.6, ramp=swan.CosineRamp(0, 1)))
    fit(module, callback, tmp_path, max_epochs=2)
    small = callback.pruned
    assert isinstance(small, swan.RoutedModel)
    assert swan.hard_macs(routed.gated) <= 0.6 * swan.count_macs(
        routed.gated, routed.example_inputs
    )
    assert small.crossing_bytes() < routed.crossing_bytes()
    assert not any(
        torch.equal(own, before[name]) for name, own in routed.parts.light.named_parameters()
    )
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    for threshold in (float("inf"), float("-inf")):
        small.thresholds = routed.thresholds = [threshold]
        torch.testing.assert_close(small.eval()(x), routed.eval()(x), rtol=1e-9, atol=1e-12)


def test_a_module_gated_whole_is_told_the_line_that_works() -> None:
    class Whole(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x):
            return self.net(x)

    module = Whole()
    with pytest.warns(
        swan.SwanWarning, match=r"module\.net = swan\.swanify\(module\.net, its_inputs\), and fit"
    ):
        gated = swan.swanify(module, torch.zeros(1, 3))
    assert type(swan.prune(gated, macs=0.5)) is Whole
    module.net = swan.swanify(module.net, torch.zeros(1, 3))
    assert module(torch.zeros(1, 3)).shape == (1, 2)
