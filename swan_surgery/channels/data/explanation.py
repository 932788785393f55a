"""What the channel map says about each layer, in words and counts: the answer to "why?"."""

from collections.abc import Sequence
from dataclasses import dataclass

from swan_surgery.channels.data.coupling import Row, coupling_svg
from swan_surgery.channels.data.entries import UnknownOp
from swan_surgery.environment.notebooks import html_table


@dataclass(frozen=True, slots=True)
class Coupled:
    """Another layer, and how many output channels of this one hang on gates of that one."""

    layer: str
    num_channels: int

    def __str__(self) -> str:
        return f"{self.layer} ({self.num_channels})"


@dataclass(frozen=True, slots=True)
class Pinned:
    """How many output channels stay: why, and because of which operation in which module.

    `line` is the line of code that called an operation without a rule, "" for other reasons.
    """

    num_channels: int
    reason: str
    op: str
    module: str
    line: str

    def __str__(self) -> str:
        where = [self.op] if "." in self.op else []
        if self.module:
            where.append(f"in module {self.module!r}")
        if self.line:
            where.append(f"at {self.line}")
        because = f" ({' '.join(where)})" if where else ""
        return f"{self.num_channels} stay: {self.reason}{because}"


@dataclass(frozen=True, slots=True)
class FollowingAttribute:
    """A Python attribute of a module that is set anew when the layer shrinks."""

    module: str
    name: str
    index: int | None

    def __str__(self) -> str:
        item = "" if self.index is None else f"[{self.index}]"
        return f"{self.module}.{self.name}{item}".removeprefix(".")


@dataclass(frozen=True, slots=True)
class FollowingNumber:
    """A number in the code of a module that is rewritten when the layer shrinks.

    Among the leaves of the `call`-th call of the torch function `function` in one run of `module`,
    the one at position `leaf`.
    """

    module: str
    function: str
    call: int
    leaf: int

    def __str__(self) -> str:
        where = f"in module {self.module!r}" if self.module else "in the model's own forward"
        return f"argument {self.leaf} of {self.function}() no. {self.call} {where}"


@dataclass(frozen=True, slots=True)
class WeightedStatistic:
    """A norm, mean or the like over the layer's channels, which counts each with its gate."""

    module: str
    function: str

    def __str__(self) -> str:
        return f"{self.function} in {self.module!r}" if self.module else self.function


@dataclass(frozen=True, slots=True)
class LayerExplanation:
    """What happens to the output channels of one convolution, linear layer or matrix product.

    Attributes:
        name: dotted name of the module, or of the weight where it has none.
        kind: conv, linear, matmul, or the operation.
        in_channels: channels it reads.
        out_channels: channels it makes.
        gated_channels: output channels that have a gate.
        num_units: gates that they hang on; fewer than channels where some share one.
        coupled: layers whose output channels hang on the same gates.
        pinned: the output channels that stay, by reason.
        attributes: Python attributes that are set anew when the layer shrinks.
        numbers: numbers in code that are rewritten when the layer shrinks.
        statistics: norms and reductions that count the layer's channels with their gates.
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    gated_channels: int
    num_units: int
    coupled: tuple[Coupled, ...]
    pinned: tuple[Pinned, ...]
    attributes: tuple[FollowingAttribute, ...]
    numbers: tuple[FollowingNumber, ...]
    statistics: tuple[WeightedStatistic, ...]

    def remarks(self, most: int = 3) -> tuple[str, ...]:
        """One sentence for each thing there is to say; long lists end after `most` in "and 12 more"."""
        said = [
            ("shares gates with ", few(self.coupled, most)),
            ("", few(self.pinned, most)),
            ("sets ", few(self.attributes, most)),
            ("rewrites ", few(self.numbers, most)),
            ("weighs ", few(self.statistics, most)),
        ]
        return tuple(verb + what for verb, what in said if what)

    def headline(self) -> str:
        """Name, kind and widths, and how many output channels have a gate."""
        gated = "no gate"
        if self.gated_channels:
            gated = f"{self.gated_channels} gated by {self.num_units} units"
        return f"{self.name}: {self.kind} {self.in_channels} -> {self.out_channels}, {gated}"

    def __str__(self) -> str:
        return "\n    ".join([self.headline(), *self.remarks()])


@dataclass(frozen=True, slots=True)
class Explanation:
    """A channel map layer by layer; `str()` is the readable form.

    Attributes:
        layers: in order of execution.
        kept_numbers: numbers that the code computes from a width and that must not follow it, like
            the scale of attention; they are rewritten to stay.
        unknown: operations without a channel rule, with module and line of code.
        never_run: modules that no run of the map reached. They keep their widths: an input that
            reaches one does not fit the cut model.
        lookups: embeddings whose columns no layer makes or shares.
        way: how gates were put in, and why in that way; empty in a map alone.
    """

    layers: tuple[LayerExplanation, ...]
    kept_numbers: tuple[FollowingNumber, ...]
    unknown: tuple[UnknownOp, ...]
    never_run: tuple[str, ...] = ()
    lookups: tuple[str, ...] = ()
    way: str = ""

    def layer(self, name: str) -> LayerExplanation:
        """A layer by name."""
        return next(layer for layer in self.layers if layer.name == name)

    def remarks(self, most: int = 3) -> tuple[tuple[str, ...], ...]:
        """Each layer's remarks; what was said of a layer with the very same gates is not repeated."""
        seen: dict[str, LayerExplanation] = {}
        said = []
        for layer in self.layers:
            same = (seen.get(other.layer) for other in layer.coupled if _all(other, layer))
            lead = next((other.name for other in same if other and _as_many(other, layer)), None)
            if lead is None:
                said.append(layer.remarks(most))
            else:
                stays = (few(layer.pinned, most),) if layer.pinned else ()
                said.append((f"gates of {lead}", *stays))
            seen[layer.name] = layer
        return tuple(said)

    def _repr_html_(self) -> str:
        rows = [
            (*layer.headline().split(": ", 1), "; ".join(remarks))
            for layer, remarks in zip(self.layers, self.remarks(), strict=True)
        ]
        notes = [f"no channel rule: {entry}" for entry in self.unknown]
        notes += [*self._never_run(), *([f"gates: {self.way}"] if self.way else [])]
        table = html_table("Channels", ("layer", "widths and gates", ""), rows, notes=notes)
        return (
            f"{table}<details><summary>Which layers share gates</summary>{self.to_svg()}</details>"
        )

    def to_svg(self) -> str:
        """A picture: layers from top to bottom, those whose channels live and die together on one line."""
        return coupling_svg(
            Row(
                layer.name,
                f"{layer.gated_channels} of {layer.out_channels} channels gated"
                if layer.gated_channels
                else f"{layer.out_channels} channels stay",
                bool(layer.gated_channels),
                tuple(own.layer for own in layer.coupled),
            )
            for layer in self.layers
        )

    def __str__(self) -> str:
        lines = [
            "\n    ".join([layer.headline(), *remarks])
            for layer, remarks in zip(self.layers, self.remarks(), strict=True)
        ]
        if self.kept_numbers:
            lines.append(f"rewritten to stay: {few(self.kept_numbers, 3)}")
        if self.unknown:
            lines.append("operations without a channel rule:")
            lines += [f"    {entry}" for entry in self.unknown]
        lines += self._never_run()
        if self.way:
            lines.append(f"gates: {self.way}")
        return "\n".join(lines)

    def _never_run(self) -> list[str]:
        found = []
        if self.never_run:
            found = [f"never run on these inputs, kept as they are: {few(self.never_run, 3)}"]
        if self.lookups:
            found.append(
                f"columns of {few(self.lookups, 3)} stay: gates belong to what convolutions, linear and "
                f"recurrent layers make, and none of them makes or shares these"
            )
        return found


def _all(coupled: Coupled, layer: LayerExplanation) -> bool:
    return coupled.num_channels == layer.gated_channels


def _as_many(one: LayerExplanation, other: LayerExplanation) -> bool:
    return one.num_units == other.num_units


def few(items: Sequence[object], most: int) -> str:
    """The first items, and how many more there are: `a, b and 12 more`."""
    shown = [str(item) for item in items[:most]]
    hidden = len(items) - len(shown)
    return ", ".join(shown) + (f" and {hidden} more" if hidden else "")
