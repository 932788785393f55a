"""`compensate`: the layers behind a cut are solved for anew, so that they give what they gave before."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isinf, isnan
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from swan_surgery.cutting.compensation.judging import Judge, come_back_, state_of
from swan_surgery.cutting.compensation.kept import kept_between
from swan_surgery.cutting.compensation.layers import Settings
from swan_surgery.cutting.compensation.outcome import LayerCompensation
from swan_surgery.cutting.compensation.walking import in_lockstep
from swan_surgery.environment.precision import in_own_precision
from swan_surgery.environment.process_wide import without_fast_path
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import InputError, ModelError
from swan_surgery.gates import GatedModel
from swan_surgery.models.batches import batches_in, holds_nan, num_samples, run_on_batch
from swan_surgery.models.checks import check_data
from swan_surgery.models.modes import evaluating
from swan_surgery.models.provenance import note_, provenance_of
from swan_surgery.models.slim_attention import put_back_, write_out_
from swan_surgery.models.steps import Step, StepKind, StepMacs, register_step


COMPENSATE = "compensate"
_VERSION = 1
_JUDGED = 5  # the last fifth of the samples judges the whole


@dataclass(frozen=True, slots=True)
class Compensation:
    """What `compensate` did.

    Attributes:
        layers: weight by weight, in the order in which they are read.
        before: squared error of the model's outputs over their variance, as it was given; NaN where
            they have other shapes than the reference's.
        after: the same of what the weights solved for would give.
        kept: whether the model has them; else it is as it was, because it would have become worse.
        seconds: how long it took.
    """

    layers: tuple[LayerCompensation, ...]
    before: float
    after: float
    kept: bool
    seconds: float

    def __str__(self) -> str:
        """One line for the whole, one per weight."""
        lines = [str(layer) for layer in self.layers]
        mended = sum(not layer.reason for layer in self.layers)
        outputs = f"error of the outputs {self.before:.3g} -> {self.after:.3g}"
        verdict = "" if self.kept else "; that is worse, so the model is as it was"
        head = f"{mended} of {len(lines)} weights solved for anew in {self.seconds:.1f} s"
        return "\n".join([f"{head}, {outputs}{verdict}", *lines])


def compensate(
    small: nn.Module,
    reference: nn.Module,
    batches: Iterable[Any],
    *,
    damping: float = 0.01,
    num_batches: int | None = None,
    progress: bool = False,
) -> Compensation:
    """Give back to a cut network what the layers behind the cut can still read out of what stayed.

    In execution order, every weight that multiplies what the cut has changed is solved for anew, in
    closed form (ridge regression toward the old weight): with the small model's inputs it shall give
    what the reference gives at the channels that stayed. What is added to a residual stream also takes
    up what the stream has lost by then. Batch-norm statistics follow the change. A weight stays as it
    was unless its error on held-out rows falls, and so do all where the outputs of the whole model, on
    the last fifth of the samples, came out further from the reference's. No gradients, no labels; one pass of
    each model, and another before and after of the batches that judge.

    Args:
        small: what `prune` returned; weights, biases and statistics are changed in place.
        reference: the plain model that it was cut from, with its weights (`unswanify(gated)`).
        batches: inputs, or tuples whose first element is the input, or dicts of keyword arguments;
            512 to 1,024 samples as in training, augmentation included.
        damping: how strongly weights are held where they are, over the mean square of the inputs; where there are
            few rows for an input, up to 1,000 times that, as held-out rows choose.
        num_batches: how many batches to use at most; all of them by default.
        progress: show a bar with the time that is left on stderr.

    Returns:
        What was done to which weight, and what came of it: relative squared errors before and after.

    Raises:
        ModelError: `small` or `reference` is no plain module with data.
        InputError: no batches, NaN or infinity in them, batches of several kinds, `damping` not positive, or `small`
            was not cut from `reference`.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> gated = swan.swanify(net, torch.zeros(1, 8))
        >>> small = swan.prune_by_score(gated, swan.importance(gated, "magnitude"), macs=0.5)
        >>> done = swan.compensate(small, net, [torch.randn(256, 8)])
        >>> done.layers[-1].after < done.layers[-1].before
        True
    """
    return compensate_only(
        small,
        reference,
        batches,
        only=None,
        damping=damping,
        num_batches=num_batches,
        progress=progress,
    )


def compensate_only(
    small: nn.Module,
    reference: nn.Module,
    batches: Iterable[Any],
    *,
    only: frozenset[str] | None,
    damping: float,
    num_batches: int | None = None,
    progress: bool = False,
) -> Compensation:
    """The same, where no other tensors change than `only` those named; None: all that concern the cut."""
    for model, name in ((small, "small"), (reference, "reference")):
        given: object = model
        if not isinstance(given, nn.Module) or isinstance(given, GatedModel):
            raise ModelError(
                f"{name} must be a plain torch.nn.Module; got {type(model).__name__}"
                f"; swan.unswanify(gated) gives the dense model of a gated one"
            )
        check_data(model, to="compensate")
    if not damping > 0:
        raise InputError(f"damping must be positive; got {damping}")
    kept = kept_between(small, reference)
    held = list(batches_in(batches, num_batches))
    calls = [partial(_run, batch=batch) for batch in held]
    if not calls:
        raise InputError("there is no batch to compensate with; nothing was changed")
    if not all(map(num_samples, held)):
        raise InputError("a batch holds no samples; leave it out; nothing was changed")
    if any(map(holds_nan, held)):
        raise InputError("a batch holds NaN; leave it out; nothing was changed")
    start = time.perf_counter()
    with torch.inference_mode(mode=False), _at_rest(small, reference), _told(progress) as advance:
        judge = Judge(reference, calls[-_num_judging([*map(num_samples, held)]) :])
        was, before = state_of(small), judge.error(small)
        try:
            layers = in_lockstep(
                small, reference, calls, kept, Settings(damping, only=only), advance
            )
            after = _finite(judge.error(small))
        except BaseException:
            come_back_(small, was)
            raise
        is_better = after <= before or isnan(before)
        if not is_better:
            come_back_(small, was)
    if is_better:
        _note(small)
    return Compensation(tuple(layers), before, after, is_better, time.perf_counter() - start)


def _finite(error: float) -> float:
    if isinf(error):
        raise InputError(
            "what was solved for gives NaN or infinity: look for them in the batches; nothing was changed"
        )
    return error


def _num_judging(sizes: Sequence[int]) -> int:
    """How many of the last batches hold a fifth of all samples: a loader's last one may be short."""
    least, seen = sum(sizes) / _JUDGED, 0
    for count, size in enumerate(reversed(sizes), start=1):
        seen += size
        if seen >= least:
            return count
    return len(sizes)


def _run(model: nn.Module, *, batch: Any) -> object:
    return run_on_batch(model, batch)


@contextmanager
def _told(progress: bool) -> Iterator[Callable[[float], None]]:  # noqa: FBT001 - one switch
    if not progress:
        yield lambda _: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("compensating", total=1.0)
        yield lambda share: bar.update(task, completed=share)


@contextmanager
def _at_rest(*models: nn.Module) -> Iterator[None]:
    """Eval mode, no fused attention, which hides its weights, and attention written out in both.

    torch's own goes through the positions of a batch in another order than the one written out, which a
    cut may have put in its place. All is as before afterwards.
    """
    try:
        for model in models:
            write_out_(model)
        with without_fast_path(), evaluating(*models), streams_kept(), in_own_precision(*models):
            yield
    finally:
        for model in models:
            put_back_(model)


def _note(small: nn.Module) -> None:
    """The artefact says that weights were solved for; the file holds them."""
    provenance = provenance_of(small)
    if provenance is not None:
        macs = provenance.macs
        same = None if macs is None else StepMacs(macs.after, macs.after, macs.input_shapes)
        note_(small, provenance.followed_by(Step(COMPENSATE, _VERSION, {}, same)))


def _unchanged(model: nn.Module, _step: Step) -> nn.Module:
    return model


def _same_shapes(shapes: Any, _step: Step) -> Any:
    return shapes


register_step(COMPENSATE, StepKind(_VERSION, _unchanged, _same_shapes))

__all__ = ["Compensation", "LayerCompensation", "compensate"]
