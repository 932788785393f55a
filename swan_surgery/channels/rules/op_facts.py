"""One record per ATen operation: its rule, and what else planning, rehearsal and costs must know.

What is known of torch *functions* as a model's code calls them stands in `calls.functions`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swan_surgery.channels.labels.labels import Rule


# MACs by the shapes of the tensors that enter an operation and of those that it returns.
Shapes = Sequence[tuple[int, ...]]
MacsFormula = Callable[[Shapes, Shapes], int]


@dataclass(frozen=True, slots=True)
class OpFacts:
    """Everything the library knows of one operation; in-place variants share the record.

    Attributes:
        rule: what it does to labels. None: torch tags it as pointwise, or it has no channel rule.
        macs: multiply-adds by a formula of the user's. None: built-in ones stand in
            `costs/formulas.py`.
        on_meta: by overload, a form that runs on tensors without data, where torch is slow there or
            needs the data; not for in-place variants.
        counts: of equal values it tells how many there are.
        along_dim: it `counts` along its argument `dim` alone.
        by_place: it returns as many values as it reads, each by where it stands.
        selects: how much it returns depends on values.
        by_value: the shape of a result, or the path that follows, depends on values that are there;
            so it does in all that `selects`.
        by_position: it takes positions beside tensors; a mask among them selects.
        fixes_numbers: Python numbers among its arguments enter the values it returns, so they must
            not follow a width; so they do in all that torch tags as pointwise.
        overwrites: in place, it leaves nothing of what was there before.
        unfilled: it returns memory as it was.
        is_step: the narrower model must do it, too. False: torch does it where it sees fit.
        is_reshape: one of those that torch chooses among for `reshape`.
        spreads: it may lay labels over other axes although there are as many as before.
        shuffles: it interleaves blocks along the channel axis.
        spatial_rank: over how many of the last axes a window slides.
        averages: its windows average, so a border of zeros shows.
    """

    rule: Rule | None = None
    macs: MacsFormula | None = None
    on_meta: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    counts: bool = False
    along_dim: bool = False
    by_place: bool = False
    selects: bool = False
    by_value: bool = False
    by_position: bool = False
    fixes_numbers: bool = False
    overwrites: bool = False
    unfilled: bool = False
    is_step: bool = True
    is_reshape: bool = False
    spreads: bool = False
    shuffles: bool = False
    spatial_rank: int = 0
    averages: bool = False
