"""`compress`: score, cut, compensate, train for as long as asked; in stages where little shall stay."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from swan_surgery.compressing.cutter import Budget, Choice, Cutter, Loss
from swan_surgery.compressing.telling import told
from swan_surgery.compressing.training import Finetune, Training
from swan_surgery.cutting.compensation import Compensation
from swan_surgery.environment.kinds_of_numbers import is_whole
from swan_surgery.errors import InputError
from swan_surgery.learning.stages import stages
from swan_surgery.models.batches import batches_in, first_samples
from swan_surgery.models.checks import check_arguments
from swan_surgery.models.inputs import as_inputs
from swan_surgery.reporting import Report, report
from swan_surgery.selection.importance import Score
from swan_surgery.selection.limits import FEWEST
from swan_surgery.timing.clock import LayerRuntime


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Compressed:
    """What `compress` made.

    Attributes:
        model: the smaller model, of the given class; nothing of this library is needed to run it.
        steps: what was done, one sentence each, in order.
        compensations: of every cut.
        seconds: how long it took.
    """

    model: nn.Module
    steps: tuple[str, ...]
    compensations: tuple[Compensation, ...]
    seconds: float
    _given: nn.Module
    _example: Any
    _runtime: LayerRuntime = "eager"

    def __repr__(self) -> str:
        """The steps; models and inputs would fill a screen."""
        return f"Compressed({type(self.model).__name__}: {'; '.join(self.steps)})"

    def _repr_html_(self) -> str:
        """In a notebook: the steps."""
        steps = "".join(f"<li>{escape(step)}</li>" for step in self.steps)
        kind = escape(type(self.model).__name__)
        return f"<p>{kind}, compressed in {self.seconds:.1f} s</p><ol>{steps}</ol>"

    def report(
        self, evaluate: Callable[[nn.Module], float] | None = None, *, unit: str = ""
    ) -> Report:
        """Before and after, as `swan.report` measures them."""
        how: dict[str, Any] = {"evaluate": evaluate, "unit": unit, "runtime": self._runtime}
        return report(self._given, self.model, self._example, **how)

    def __str__(self) -> str:
        """The steps, and how long they took."""
        return "\n".join([*self.steps, f"{self.seconds:.1f} s in all"])


def compress(
    model: nn.Module,
    data: Iterable[Any],
    *,
    macs: float | None = None,
    params: float | None = None,
    latency_ms: float | None = None,
    loss: Loss | Literal["self"] = "self",
    finetune: int | Finetune = 0,
    steps: int | None = None,
    lr: float = 1e-3,
    score: Score = "fisher",
    cuts: int | None = None,
    ignore: str | Iterable[str] = (),
    round_to: int | Literal["auto"] = "auto",
    uniform: bool = False,
    runtime: LayerRuntime | None = None,
    num_batches: int = 16,
    example_inputs: Any = None,
    progress: bool = True,
) -> Compressed:
    """Make a smaller model of a trained one: score the units, cut, solve for what stays, train on.

    Without labels and without training by default: units are scored by how much they move the model's own
    outputs, and after the cut the weights are solved for that give the old outputs best
    (`swan.compensate`). The given model is not changed.

    Args:
        model: a trained model; any that `swan.swanify` takes.
        data: batches: inputs, or tuples whose first element is the input, or dicts of keyword arguments.
            Training goes through them again and again, so it needs a loader or a list, no iterator.
        macs: share of the model's MACs to keep at most, in (0, 1], or a number of MACs: of one sample, or of
            all `example_inputs` where they are given.
        params: the same of its parameters; with several budgets, all are kept.
        latency_ms: milliseconds to take at most for the example inputs, by layers measured here.
        loss: "self", or `loss(model, batch)`, a scalar, by which units are scored and the smaller model
            is trained.
        finetune: steps of training after the first cut, one batch each (AdamW, a cosine from `lr`; with
            loss="self" toward the given model's outputs); or a function `finetune(model, steps)` of your
            own that trains in place, told which of `steps` are its.
        steps: how many steps there are in all, for a function of your own.
        lr: peak learning rate of the built-in training.
        score: as in `swan.importance`.
        cuts: how many there shall be, with training in between; by default as `swan.stages` says where there
            is training, else one.
        ignore: modules that stay whole, names or patterns, as for `swan.swanify`.
        round_to: widths become multiples of this, which most runtimes need to gain by a cut. "auto" measures which
            one is the fastest where there is a `runtime` or `latency_ms`; else it takes 8, or 4, 2, 1 where
            that would leave more than a tenth of the budget unused. 1 loses least per MAC.
        uniform: the same width in all layers of one role, as in `swan.prune`: what a configuration can say.
        runtime: that ships: where `latency_ms`, `round_to="auto"` and the report's latencies are measured;
            "eager" for the latter two by default.
        num_batches: that units are scored and weights are solved for with; 512 to 1,024 samples are
            plenty.
        example_inputs: to map the model with, and to report on; by default the first two samples of the first
            batch, and the first of them.
        progress: show on stderr what is going on and how long it will take.

    Raises:
        ModelError, NoGateableChannelsError: as `swan.swanify` does.
        InputError: no budget, no data, shares out of range, an iterator where it must be read again.
        BudgetError: the budget cannot be reached; before anything is trained.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> data = [torch.randn(64, 8) for _ in range(4)]
        >>> small = swan.compress(net, data, macs=0.5, progress=False).model
        >>> small[0]
        Linear(in_features=8, out_features=16, bias=True)
    """
    if runtime is not None and runtime not in get_args(LayerRuntime):
        raise InputError(f"runtime must be one of {get_args(LayerRuntime)}; got {runtime!r}")
    training = Training(model, data, loss, finetune, steps or 0, lr)
    training.check()
    batches = list(batches_in(data, num_batches))
    if not batches:
        raise InputError("data yields no batch")
    shown = example_inputs
    if example_inputs is None:
        example_inputs, shown = (_example_of(model, batches[0], count) for count in (2, 1))
        macs = _for_all(macs, example_inputs)
    budget = Budget(macs, params, latency_ms)
    started = time.perf_counter()
    with told(progress) as tell:
        choice = Choice(loss, score, ignore, round_to, uniform=uniform, runtime=runtime)
        cutter = Cutter(model, example_inputs, batches, budget, choice, tell)
        is_one = training.total == 0 or latency_ms is not None
        if cuts is not None and not is_whole(cuts):
            raise InputError(f"cuts is a whole number; got {cuts!r}")
        if is_one and cuts not in (None, 1):
            raise InputError(
                f"cuts={cuts} needs training in between (finetune=) and a budget of MACs or parameters"
            )
        number = 1 if is_one else cuts
        plan = stages(cutter.budget.least, steps=training.total, number=number)
        small = model
        for index, stage in enumerate(plan):
            small = cutter.cut(small, (index + 1) / len(plan))
            until = plan[index + 1].step if index + 1 < len(plan) else training.total
            if until > stage.step:
                training.run(small, range(stage.step, until), tell)
                cutter.done.append(f"trained for {until - stage.step} steps")
    return Compressed(
        small,
        tuple(cutter.done),
        tuple(cutter.compensations),
        time.perf_counter() - started,
        model,
        shown,
        runtime or "eager",
    )


def _for_all(macs: Any, example: Any) -> Any:
    """A number of MACs of one sample, for all that the model is mapped with; a share stays one."""
    if not isinstance(macs, (int, float)) or macs < FEWEST:
        return macs
    leaves = tree_leaves(example)
    return macs * next((len(x) for x in leaves if isinstance(x, Tensor) and x.ndim), 1)


def _example_of(model: nn.Module, batch: Any, count: int) -> Any:
    example = first_samples(batch, count)
    if isinstance(batch, (tuple, list)) and isinstance(model, nn.Module):
        try:
            check_arguments(model, as_inputs(example))
        except InputError as err:
            raise InputError(
                f"{err}; of a batch that is a {type(batch).__name__} the model gets the first element alone: "
                f"several inputs are a dict of keyword arguments"
            ) from err
    return example


__all__ = ["Compressed", "compress"]
