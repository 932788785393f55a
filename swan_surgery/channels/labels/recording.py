"""What one labelled run of a model records: joins, ties, pins, contractions, and every operation."""

from dataclasses import dataclass, field as dataclass_field
from typing import Any

import torch
from torch import Tensor

from swan_surgery.channels.labels.fields import Fields


@dataclass(frozen=True, slots=True)
class Reason:
    """Why channels are pinned: what happened, in which ATen operation, in which module.

    `line` is the line of the model's code that called an operation without a rule.
    """

    text: str
    op: str
    module: str
    line: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """One ATen operation as it ran: what a rule needs to know."""

    index: int
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    module: str

    @property
    def name(self) -> str:
        """The operation without overload, as in `aten.add`."""
        return str(self.op.overloadpacket)

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument by its schema name, however it was passed."""
        return argument(self.op, self.args, self.kwargs, name, default)


def argument(
    op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, default: Any = None
) -> Any:
    """An argument of an ATen operation by its schema name, however it was passed."""
    if name in kwargs:
        return kwargs[name]
    for position, declared in enumerate(op._schema.arguments):  # noqa: SLF001 - torch's only access
        if declared.name == name:
            if position < len(args):
                return args[position]
            return declared.default_value if declared.has_default_value() else default
    return default


@dataclass(frozen=True, slots=True)
class Contraction:
    """A conv, linear or matmul as it ran: its MACs are `factor` times the length of each axis.

    `axes` holds one label vector per axis that may shrink; the rest of the MACs is in `factor`.
    `produced` labels the output channels, `reads` the input channels, `summed` those input channels
    that are summed over (a depthwise convolution sums over none). `gated` labels the axis of a
    bare parameter that is summed over: scaling that parameter gates the input. `is_layer` is false
    where activations meet activations, `of_weights` true where weights meet weights.
    """

    op: str
    module: str
    factor: int
    axes: tuple[Tensor | None, ...]
    produced: Tensor | None
    reads: Tensor | None
    summed: Tensor | None
    num_out: int
    num_in: int
    gated: Tensor | None = None
    is_layer: bool = True
    of_weights: bool = False


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a torch function was called: the `number`-th call of it in one run of a module.

    `leaves` holds the numbers among its arguments (`resizing.numbers_of`), `site` the place in the
    code (`call_sites.call_site`).
    """

    module: str
    function: str
    number: int
    leaves: tuple[Any, ...] = ()
    site: str = ""

    @property
    def call(self) -> tuple[str, str, int]:
        """Which call in the code it is, in whatever run of the module."""
        return self.module, self.function, self.number

    def is_same_call(self, other: "Frame | None") -> bool:
        """Whether this is the same call in another run."""
        return other is not None and self.call == other.call


@dataclass(frozen=True, slots=True)
class Weighting:
    """A statistic over channels that must count each channel with its gate; `field` labels them.

    `index` is the operation that takes it.
    """

    frame: Frame
    field: Tensor
    op: str
    index: int


@dataclass(frozen=True, slots=True)
class Returned:
    """What a torch function or a module returned: its structure, and where its tensors came from.

    `leaves` are outputs of operations, as (operation, number of the output).
    """

    spec: Any
    leaves: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class ModuleRun:
    """One run of a module: the operations from `start` on, before `end`; `returned` if it is known."""

    module: str
    start: int
    end: int = -1
    returned: Returned | None = None


@dataclass(slots=True)
class OpRecord:
    """One operation of the run: its fields before and after, and how to tie what it split.

    `is_pointwise`: it works position by position.
    `numbers` holds the Python numbers of a pointwise operation, which must not follow a width, `values`
    small tensors of numbers for which the same holds.
    `frame` is the torch function that called it, if it is one of those that are tracked; on its last
    operation, `returned` is what it returned.
    `by_value` holds the result of an operation whose shape, or whose use, depends on values.
    `adopted` are the outputs whose fields were found later: constants that met channels somewhere, so
    they must be made as wide as those are.
    `beside_fill` holds labels that met constant padding here: they may go only if the padding
    shrinks with them.
    """

    name: str
    module: str
    inputs: tuple[Fields, ...]
    outputs: tuple[Fields, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    spec: Any = None
    is_single: bool = False
    is_pointwise: bool = False
    frame: Frame | None = None
    returned: Returned | None = None
    numbers: tuple[float, ...] = ()
    values: tuple[Tensor, ...] = ()
    by_value: tuple[Any, ...] = ()
    adopted: set[int] = dataclass_field(default_factory=set)
    beside_fill: list[Tensor] = dataclass_field(default_factory=list)
    ties: list[list[tuple[Tensor, Tensor]]] = dataclass_field(default_factory=list)

    @property
    def packet(self) -> str:
        """The operation without overload, as in `aten.add`."""
        return self.name.rpartition(".")[0]

    def adopt(self, place: int, fields: Fields) -> None:
        """Note the channels that an output was made for."""
        self.outputs = (*self.outputs[:place], fields, *self.outputs[place + 1 :])
        self.adopted.add(place)


@dataclass(slots=True)
class Recording:
    """Everything one run left behind.

    `returned` holds every tensor that the model returned, by name, with its fields if it was given up.
    `selects`: how much some operation returned depends on values that may differ in another run.
    `left` holds values that left torch as plain numbers, `unused` parameters that entered no operation,
    `lengths` how long each output is along its first axis.
    """

    joins: list[tuple[Tensor, Tensor]] = dataclass_field(default_factory=list)
    pins: list[tuple[Tensor, Reason]] = dataclass_field(default_factory=list)
    unknown: list[Reason] = dataclass_field(default_factory=list)
    contractions: list[Contraction] = dataclass_field(default_factory=list)
    weightings: list[Weighting] = dataclass_field(default_factory=list)
    ops: list[OpRecord] = dataclass_field(default_factory=list)
    runs: list[ModuleRun] = dataclass_field(default_factory=list)
    left: list[Any] = dataclass_field(default_factory=list)
    unused: tuple[str, ...] = ()
    selects: bool = False
    returned: list[tuple[str, Fields | None]] = dataclass_field(default_factory=list)
    lengths: tuple[int, ...] = ()
