"""SWAN in Hugging Face's `Trainer`: the objective in every step, the smaller model at the end.

Example:
    >>> gated = swan.swanify(model, example_inputs)  # doctest: +SKIP
    >>> callback = SwanTrainerCallback(swan.Objective(gated, macs=0.5))  # doctest: +SKIP
    >>> args = TrainingArguments(...)  # doctest: +SKIP
    >>> Trainer(gated, args, train_dataset=data, callbacks=[callback]).train()  # doctest: +SKIP
    >>> small = callback.pruned  # doctest: +SKIP
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from swan_surgery.environment.extras import needed_from
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.integrations.steps import add_penalty, check_inside, finish
from swan_surgery.learning.objective import Objective


with needed_from("transformers"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState


class SwanTrainerCallback(TrainerCallback, ExportableState):
    """Drives the gates of the model that a `Trainer` trains, calibrates and prunes it.

    Before every optimizer step it calls the objective and adds the penalty's gradient; what the
    objective logs stands in the Trainer's log as `swan/...`. Checkpoints carry its state, and a resumed
    run takes it up. Pass `optimizers=(AdamW(swan.parameter_groups(...)), None)` to the Trainer if the
    gates shall learn by gradient.

    Attributes:
        objective: what was given.
        pruned: the pruned model once training has ended, a routed model without its mask where the objective is of
            `routed.gated`; None before.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        inputs_of: Callable[[Any], Any] | None = None,
        calibration_batches: int | None = None,
    ) -> None:
        """Make a callback, before the Trainer.

        Args:
            objective: of the gated model that the Trainer gets, or of one inside it.
            inputs_of: turns a training batch into what `swan.calibrate` takes. By default the batch,
                a dict of the gated model's keyword arguments.
            calibration_batches: how many training batches to calibrate on; all by default.
        """
        self.objective = objective
        self.pruned: nn.Module | None = None
        self._inputs_of = inputs_of
        self._calibration_batches = calibration_batches
        self._saving: RemovableHandle | None = None
        # The Trainer takes **kwargs in `forward` for a sign that the loss wants `num_items_in_batch`.
        vars(objective.gated)["accepts_loss_kwargs"] = _accepts_loss_kwargs(objective.gated)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the objective's model is trained, and that nothing in the arguments forbids it.

        Raises:
            ModelError: the objective's gated model is no part of the Trainer's model.
            InputError: arguments that cannot work; says which to set.
        """
        check_inside(self.objective, kwargs["model"])
        taken = inspect.signature(kwargs["model"].forward).parameters.values()
        is_open = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in taken)
        if args.remove_unused_columns and is_open:
            raise InputError(
                "the Trainer would drop every column, because the model's forward names no argument; "
                "set TrainingArguments(remove_unused_columns=False)"
            )
        if args.restore_callback_states_from_checkpoint:
            raise InputError(
                "restore_callback_states_from_checkpoint=True makes callbacks anew; leave it False, "
                "SwanTrainerCallback restores its own state"
            )
        if args.fp16 and not args.max_grad_norm and self.objective.learning == "gradient":
            raise InputError(
                "with fp16=True and max_grad_norm=0 gradients stay scaled, and the penalty's are not; "
                "set max_grad_norm, or bf16=True"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the state of a checkpoint that training resumes from; let tied weights be saved."""
        self.pruned = None
        self._let_go()
        self._saving = nn.Module.register_state_dict_post_hook(self.objective.gated, _untie)
        stored: Any = state.stateful_callbacks  # by class name, as `state` gave them
        if state.global_step and type(self).__name__ in stored:
            self.objective.load_state_dict(stored[type(self).__name__]["attributes"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The objective's step; gradients are reduced and clipped by now."""
        add_penalty(self.objective, state.epoch or 0.0)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the objective's values to the row of a training step, and to what callbacks after this one see."""
        if "loss" not in kwargs["logs"]:
            return  # an evaluation's, or the summary at the end
        own = {f"swan/{name}": value for name, value in self.objective.log().items()}
        kwargs["logs"].update(own)
        state.log_history[-1].update(own)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Meet the budgets, calibrate on the training data, prune."""
        self._let_go()
        self.pruned = finish(
            self.objective,
            kwargs["train_dataloader"],
            inputs_of=self._inputs_of,
            num_batches=self._calibration_batches,
            trained=kwargs["model"],
        )

    def state(self) -> dict[str, Any]:
        """For the Trainer's checkpoint, as JSON takes it."""
        return {"args": {}, "attributes": _as_json(self.objective.state_dict())}

    def _let_go(self) -> None:
        if self._saving is not None:
            self._saving.remove()
            self._saving = None


def _untie(_module: nn.Module, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
    """Give every tensor of a state dict its own storage: the Trainer's safetensors refuse to share."""
    seen: set[int] = set()
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.numel():
            storage = tensor.untyped_storage().data_ptr()
            state[name] = tensor.clone() if storage in seen else tensor
            seen.add(storage)


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(own) for name, own in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


def _accepts_loss_kwargs(gated: GatedModel) -> bool:
    if not gated.runs_in_place:
        return False  # a traced graph has the arguments of the example inputs
    own = getattr(gated.model, "accepts_loss_kwargs", None)
    if own is not None:
        return bool(own)
    parameters = inspect.signature(gated.model.forward).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


__all__ = ["SwanTrainerCallback"]
