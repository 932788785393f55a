"""Checks a rule on its operation alone: cutting what it calls channels must commute with running it.

The arguments of an example become a model without layers, every axis of which is labelled. What the
rule leaves free is closed in several patterns; shapes, labels and values must be those predicted.
"""

import copy
from collections.abc import Callable
from math import isnan, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from swan_surgery.channels.labels.fields import Fields, axes_of
from swan_surgery.channels.labels.recording import Contraction, OpRecord, Reason, Recording
from swan_surgery.channels.rehearsal.closing_patterns import closing_pattern, turns
from swan_surgery.channels.rehearsal.reading import Readings
from swan_surgery.channels.rehearsal.settling import settle
from swan_surgery.channels.rules.op_facts import MacsFormula
from swan_surgery.channels.solving.arrays import Flags
from swan_surgery.channels.solving.mapping import (
    LabelledTensors,
    Solution,
    Trace,
    record,
    start_labels,
)
from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.errors import RuleError
from swan_surgery.models.inputs import Inputs
from swan_surgery.models.slicing import cut_


_NOTHING = Inputs((), {})


class _Alone(nn.Module):
    """An operation and its arguments; the floating-point tensors among them are buffers."""

    def __init__(self, op: Callable[..., Any], args: Any, kwargs: Any) -> None:
        super().__init__()
        self.op = op
        self._leaves, self._spec = tree_flatten((args, kwargs))
        for place, leaf in enumerate(self._leaves):
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                self.register_buffer(f"argument_{place}", leaf.detach().clone())

    def forward(self) -> None:
        """Run the operation; nothing is returned, since what a model returns keeps its width."""
        leaves = [
            leaf.clone() if isinstance(leaf, Tensor) else leaf
            for leaf in (
                getattr(self, f"argument_{i}", leaf) for i, leaf in enumerate(self._leaves)
            )
        ]
        args, kwargs = tree_unflatten(leaves, self._spec)
        self.returned = self.op(*args, **kwargs)

    def results(self) -> tuple[list[tuple[int, ...]], list[Tensor]]:
        """The shapes of all tensors that enter, and what comes out, from a run without labels."""
        own = [getattr(self, f"argument_{i}", leaf) for i, leaf in enumerate(self._leaves)]
        with torch.no_grad(), streams_kept(0):
            self()
        outputs = [leaf for leaf in tree_leaves(self.returned) if isinstance(leaf, Tensor)]
        return [tuple(t.shape) for t in own if isinstance(t, Tensor)], outputs


def check_rule(
    key: str, op: Callable[..., Any], args: Any, kwargs: Any, macs: MacsFormula | None
) -> None:
    """Check the registered rule of an operation on one example.

    Args:
        key: the operation's name in the table.
        op: the operation itself.
        args: the example's arguments by position.
        kwargs: the example's arguments by name.
        macs: the operation's MAC formula, which must shrink as the rule says.

    Raises:
        RuleError: the example cannot be run, leaves nothing to check, or contradicts the rule.
    """
    alone = _Alone(op, args, kwargs)
    labelled = start_labels(alone)
    if not labelled.num_labels:
        raise RuleError(
            f"{key}: the example leaves nothing to check: no floating-point tensor in it has an "
            "axis longer than one"
        )
    try:
        copy.deepcopy(alone).results()
    except Exception as err:  # the operation may raise anything
        raise RuleError(
            f"{key}: the example cannot be run ({_first_line(err)}); example= must be a function "
            "that returns a tuple of arguments that the operation takes"
        ) from err
    try:
        recording = record(lambda: copy.deepcopy(alone), _NOTHING, labelled, training=False)
    except Exception as err:  # the rule may raise anything
        raise RuleError(f"the rule of {key} does not fit its example: {_first_line(err)}") from err
    own = [step for step in recording.ops if step.packet == key]
    if not own:
        ran = ", ".join(dict.fromkeys(step.packet for step in recording.ops)) or "none"
        raise RuleError(
            f"{key} is not what runs: it is made of other operations ({ran}); only those need rules"
        )
    contractions = list(recording.contractions)
    solution = _settled(key, alone, labelled, recording)
    for turn, least in turns(solution):
        stays = closing_pattern(solution, turn, least)
        _check_values(key, alone, solution, stays, (own[-1], contractions, macs))


def _settled(key: str, alone: _Alone, labelled: LabelledTensors, recording: Recording) -> Solution:
    """Shapes and labels follow, or the rule is wrong; returns what is free to go."""
    every = torch.arange(1, labelled.num_labels + 1)
    # Without layers nothing would count as made or read.
    recording.contractions.append(Contraction(key, "", 0, (), every, None, every, 1, 1))
    # Gates weigh statistics of torch's own functions; alone, the operation counts every channel.
    pins = [
        (weighting.field, Reason("a statistic", weighting.op, ""))
        for weighting in recording.weightings
    ]
    known = len(pins)
    solution = settle(
        [Trace(training=False, recording=recording, inputs=_NOTHING)],
        labelled,
        pins,
        Readings(lambda: copy.deepcopy(alone), alone),
    )
    if len(pins) > known:
        wrong = pins[known][0]
        axes = _named(alone, {labelled.owner(int(one))[:2] for one in wrong if int(one) > 0})
        raise RuleError(
            f"the rule of {key} is wrong: it keeps channels along {axes}, but when some are removed "
            "the result has other shapes or labels than it says"
        )
    return solution


def _check_values(
    key: str,
    alone: _Alone,
    solution: Solution,
    stays: Flags,
    expected: tuple[OpRecord, list[Contraction], MacsFormula | None],
) -> None:
    step, contractions, macs = expected
    remains = torch.from_numpy(stays[solution.component])  # by label
    full, small = copy.deepcopy(alone), copy.deepcopy(alone)
    _close_(full, solution, remains, contractions)
    cuts = _cuts(solution, stays)
    cut_(small, cuts)
    _, wanted = full.results()
    inputs, got = small.results()
    axes = _named(alone, {(name, axis) for name, own in cuts.items() for axis in own})
    for fields, one, two in zip(step.outputs, wanted, got, strict=True):
        error = _difference(_selected(one, fields, remains), two)
        if error > _TOLERANCE.get(two.dtype, 1e-4):
            raise RuleError(
                f"the rule of {key} is wrong: when channels along {axes} are removed, what is left "
                f"of the result differs by {error:.1e} from a run without them"
            )
    if macs is not None:
        said = sum(
            term.factor * prod(int(remains[v].sum()) for v in term.axes if v is not None)
            for term in contractions
        )
        found = macs(inputs, [tuple(tensor.shape) for tensor in got])
        if found != said:
            raise RuleError(
                f"the MACs of {key} do not shrink with the labelled axes of its result: when "
                f"channels along {axes} are removed, macs= says {found:,} and the rule {said:,}; "
                "record a contraction in the rule itself"
            )


_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9}


def _cuts(solution: Solution, stays: Flags) -> dict[str, dict[int, Tensor]]:
    cuts: dict[str, dict[int, Tensor]] = {}
    labelled = solution.labelled
    for (name, axis, size), start in zip(labelled.axes, labelled.starts, strict=True):
        keep = stays[solution.component[start : start + size]]
        if not keep.all():
            cuts.setdefault(name, {})[axis] = torch.from_numpy(np.flatnonzero(keep))
    return cuts


def _close_(
    alone: _Alone, solution: Solution, remains: Tensor, contractions: list[Contraction]
) -> None:
    """What is summed over is closed by zeros; all else that goes may hold anything."""
    summed = np.zeros(len(solution.prunable), bool)
    for contraction in contractions:
        if contraction.summed is not None:
            summed[solution.component[contraction.summed.clamp(min=0).numpy()]] = True
    zero = torch.from_numpy(summed[solution.component]) & ~remains
    for name, fields in solution.labelled.fields.items():
        for field in fields:
            alone.get_buffer(name).masked_fill_(zero[field].to(alone.get_buffer(name).device), 0)


def _selected(tensor: Tensor, fields: Fields, remains: Tensor) -> Tensor:
    for field in fields:
        keep = remains[field.clamp(min=0)].reshape(-1)
        if axes_of(field) and not bool(keep.all()):
            tensor = tensor.index_select(axes_of(field)[0], keep.nonzero()[:, 0].to(tensor.device))
    return tensor


def _difference(wanted: Tensor, got: Tensor) -> float:
    """The largest difference, by the largest value; infinite where shapes or types differ."""
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return float("inf")
    if torch.equal(wanted, got) or not wanted.numel():
        return 0.0
    kind = torch.complex128 if wanted.is_complex() else torch.float64
    one, two = wanted.to(kind), got.to(kind)
    error = float((one - two).abs().max() / one.abs().max().clamp(min=1))
    return float("inf") if isnan(error) else error


def _named(alone: _Alone, axes: set[tuple[str, int]]) -> str:
    """In words: `axis 0, 1 of argument 0 (shape (3, 8))`."""
    by_name: dict[str, list[str]] = {}
    for name, axis in sorted(axes):
        by_name.setdefault(name, []).append(str(axis))
    return " and ".join(
        f"axis {', '.join(own)} of argument {name.removeprefix('argument_')} (shape "
        f"{tuple(alone.get_buffer(name).shape)})"
        for name, own in by_name.items()
    )


def _first_line(err: Exception) -> str:
    return f"{type(err).__name__}: {err}".splitlines()[0]
