"""SWAN in a Lightning `Trainer`: the objective in every step, the smaller model at the end.

Example:
    >>> module.net = swan.swanify(module.net, images[:1])  # doctest: +SKIP
    >>> callback = SwanCallback(swan.Objective(module.net, macs=0.5))  # doctest: +SKIP
    >>> lightning.Trainer(max_epochs=10, callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
    >>> small = callback.pruned  # doctest: +SKIP
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from swan_surgery.environment.extras import needed_from
from swan_surgery.integrations.steps import add_penalty, check_inside, finish
from swan_surgery.learning.objective import Objective


with needed_from("lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class SwanCallback(Callback):
    """Drives the gates of a gated network inside a LightningModule, calibrates and prunes it.

    Before every optimizer step it calls the objective, adds the penalty's gradient and logs what the
    objective logs, as `swan/...`. Checkpoints carry its state. Give the optimizer
    `swan.parameter_groups(...)` if the gates shall learn by gradient.

    Attributes:
        objective: what was given.
        pruned: the pruned network once training has ended, a routed model without its mask where the objective is of
            `routed.gated`; None before.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        inputs_of: Callable[[Any], Any] | None = None,
        calibration_batches: int | None = None,
    ) -> None:
        """Make a callback.

        Args:
            objective: of the gated network inside the module that is trained.
            inputs_of: turns a training batch into what `swan.calibrate` takes: an input, a tuple whose
                first element is the input, or a dict of keyword arguments. By default the batch.
            calibration_batches: how many training batches to calibrate on; all by default.
        """
        super().__init__()
        self.objective = objective
        self.pruned: nn.Module | None = None
        self._inputs_of = inputs_of
        self._calibration_batches = calibration_batches
        self._batch_idx = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the objective's model is the one that is trained."""
        check_inside(self.objective, pl_module)
        self.pruned = None

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note how far the epoch is."""
        self._batch_idx = batch_idx

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """The objective's step; gradients are reduced and unscaled by now."""
        if not self._counts(trainer, optimizer):
            return
        epoch = trainer.current_epoch + self._batch_idx / trainer.num_training_batches
        add_penalty(self.objective, epoch)
        pl_module.log_dict({f"swan/{name}": v for name, v in self.objective.log().items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Meet the budgets, calibrate on the training data, prune."""
        self.pruned = finish(
            self.objective,
            trainer.train_dataloader,
            inputs_of=self._inputs_of,
            num_batches=self._calibration_batches,
            trained=pl_module,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the module's weights."""
        return self.objective.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.objective.load_state_dict(state_dict)

    def _counts(self, trainer: Trainer, optimizer: Optimizer) -> bool:
        """With several optimizers, the step of the one that holds the logits, else of the first."""
        logits = self.objective.gated.gates.logits
        owners = [
            own
            for own in trainer.optimizers
            if any(p is logits for group in own.param_groups for p in group["params"])
        ]
        chosen = (owners or trainer.optimizers)[0]
        return optimizer.param_groups is chosen.param_groups


__all__ = ["SwanCallback"]
