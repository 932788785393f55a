"""Latency as a cost: a table of measured layers, each bilinear in its open widths.

    milliseconds of a layer = constant + per_in * in + per_out * out + per_product * in * out

with `in` and `out` the open channels of its input and output; a depthwise convolution has one width
only, `out`. The rest of the model (norms, activations, what Python costs) is a constant, and a part that
follows the size of the layers' outputs. That is a sum of products of axes, as MACs are, so the same
budgets work on it. `measure_latency_table` makes such a table.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import torch

from swan_surgery.channels import PINNED, CostAxis, CostTerm, Layer
from swan_surgery.costs.freshness import channels_now, kept_table
from swan_surgery.costs.table import CostTable, build_table
from swan_surgery.errors import InputError
from swan_surgery.gates import GatedModel
from swan_surgery.gates.checks import check_gated


_VERSION = 2
# Two multiples this close are the same: medians of a busy machine differ by more.
_SAME = 1.02
# Quartiles further apart than this share of the median: what is compared may as well be the machine.
NOISY = 0.2
_USUAL = 8


@dataclass(frozen=True, slots=True)
class LayerLatency:
    """What one layer takes in milliseconds, by its open input and output channels.

    `rest_per_out_ms` is what the rest of the model does on each output channel. `worst_error` is the
    largest relative difference between a measurement of the layer and this fit.
    """

    module: str
    in_width: int
    out_width: int
    constant_ms: float
    per_in_ms: float
    per_out_ms: float
    per_product_ms: float
    rest_per_out_ms: float = 0.0
    worst_error: float = 0.0

    def milliseconds(self, in_width: float, out_width: float) -> float:
        """The fit of the layer alone at some widths."""
        return (
            self.constant_ms
            + self.per_in_ms * in_width
            + self.per_out_ms * out_width
            + self.per_product_ms * in_width * out_width
        )


@dataclass(frozen=True, slots=True)
class MultipleLatency:
    """What the whole model takes with about half its MACs, all widths multiples of a number.

    `macs_share` is what the cut kept of the MACs, `milliseconds` what it took, `spread_ms` the
    interquartile range.
    """

    multiple: int
    macs_share: float
    milliseconds: float
    spread_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """Measured latencies of a model's layers, and where they were measured; plain data.

    Attributes:
        layers: one fit per convolution and linear layer, in order of execution.
        rest_ms: what the whole model takes beyond its layers, whatever their widths; at least 0.
        device: name of the processor or GPU.
        threads: `torch.get_num_threads()`.
        torch: its version.
        inputs: types and shapes that the model was run on, batch included.
        repeats: the number of runs that each median is taken over.
        multiples: the whole model at widths that are multiples of 1, 2, 4, ...; empty where it has
            no such widths.
        runtime: what ran the layers and models.
    """

    layers: tuple[LayerLatency, ...]
    rest_ms: float
    device: str
    threads: int
    torch: str
    inputs: str
    repeats: int
    multiples: tuple[MultipleLatency, ...] = ()
    runtime: str = "eager"

    @property
    def noise(self) -> float:
        """The largest interquartile range of the multiples' times, as a share of their median."""
        return max((own.spread_ms / own.milliseconds for own in self.multiples), default=0.0)

    @property
    def is_noisy(self) -> bool:
        """Whether that is so much that the multiples cannot be told apart."""
        return self.noise > NOISY

    @property
    def best_multiple(self) -> int:
        """The multiple of channels with the fewest milliseconds per MAC; of equals the smallest.

        Those within 2 % of the best count as equal. 1 where none was measured; 8, which suits most
        hardware, where the machine was too noisy to tell.
        """
        per_mac = {own.multiple: own.milliseconds / own.macs_share for own in self.multiples}
        if self.is_noisy and _USUAL in per_mac:
            return _USUAL
        best = min(per_mac.values(), default=0.0)
        return min((m for m, taken in per_mac.items() if taken <= _SAME * best), default=1)

    @property
    def total_ms(self) -> float:
        """The whole model at full width."""
        return self.rest_ms + sum(
            own.milliseconds(own.in_width, own.out_width) + own.rest_per_out_ms * own.out_width
            for own in self.layers
        )

    def to_json(self) -> str:
        """The table as versioned JSON."""
        return json.dumps({"version": _VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "LatencyTable":
        """Read what `to_json` wrote.

        Raises:
            InputError: not a latency table, or of another version.
        """
        try:
            data = json.loads(text)
            version = data.pop("version")
            if version != _VERSION:
                raise InputError(f"latency table version {version} is not {_VERSION}")
            layers = tuple(LayerLatency(**entry) for entry in data.pop("layers"))
            multiples = tuple(MultipleLatency(**entry) for entry in data.pop("multiples"))
            return cls(layers=layers, multiples=multiples, **data)
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as err:
            raise InputError(f"not a latency table: {err}") from err


def fit_layer(
    module: str, widths: Sequence[tuple[int, int]], milliseconds: Sequence[float]
) -> LayerLatency:
    """Fit a layer by non-negative least squares; the last of `widths` is the full one.

    A width that never changes gets no term of its own.
    """
    into, out = (np.array(column, dtype=np.float64) for column in zip(*widths, strict=True))
    wanted = np.array(milliseconds, dtype=np.float64)
    full_in, full_out = widths[-1]
    has_in, has_out = (bool((column != column[0]).any()) for column in (into, out))
    # Depthwise: both widths are one, and `out` speaks for it.
    has_in &= not (has_out and bool((into * full_out == out * full_in).all()))
    shares = (into / full_in, out / full_out)  # all columns of one size
    columns = np.stack(
        [
            np.ones_like(wanted),
            shares[0] * has_in,
            shares[1] * has_out,
            shares[0] * shares[1] * (has_in and has_out),
        ],
        axis=1,
    )
    found = _least_squares(columns, wanted)
    error = np.abs(columns @ found - wanted) / np.maximum(wanted, np.finfo(np.float64).tiny)
    return LayerLatency(
        module,
        full_in,
        full_out,
        constant_ms=float(found[0]),
        per_in_ms=float(found[1]) / full_in,
        per_out_ms=float(found[2]) / full_out,
        per_product_ms=float(found[3]) / (full_in * full_out),
        worst_error=float(error.max()),
    )


def _least_squares(columns: Any, wanted: Any) -> Any:
    """Coefficients that are not negative."""
    return import_module("scipy.optimize").nnls(columns, wanted)[
        0
    ]  # slow to import, and rarely wanted


def fit_rest(
    layers: Sequence[LayerLatency],
    sizes: Sequence[int],
    widths: Sequence[Sequence[tuple[int, int]]],
    milliseconds: Sequence[float],
) -> tuple[tuple[LayerLatency, ...], float]:
    """What whole models take beyond their layers, as a constant and a part that follows the outputs.

    Args:
        layers: fits of the layers alone.
        sizes: per layer, elements of its output per channel.
        widths: per model measured, per layer: its input and output width.
        milliseconds: per model measured.

    Returns:
        The layers with their part of the rest, and the constant.
    """
    elements = [
        sum(size * out for size, (_, out) in zip(sizes, own, strict=True)) for own in widths
    ]
    rest = [
        max(0.0, taken - sum(f.milliseconds(*pair) for f, pair in zip(layers, own, strict=True)))
        for taken, own in zip(milliseconds, widths, strict=True)
    ]
    most = max(*elements, 1)
    columns = np.stack([np.ones(len(rest)), np.array(elements) / most], axis=1)
    constant, growing = _least_squares(columns, np.array(rest))
    shared = tuple(
        replace(own, rest_per_out_ms=float(growing) * size / most)
        for own, size in zip(layers, sizes, strict=True)
    )
    return shared, float(constant)


def latency_cost(gated: GatedModel, table: LatencyTable) -> CostTable:
    """A latency table as a cost table of a gated model, in milliseconds.

    Raises:
        ModelError: `gated` is not a gated model.
        InputError: the table is none, or was measured on another model, or before it was changed.
        CostError: the model was changed and its gates no longer fit.
    """
    check_gated(gated)
    if not isinstance(table, LatencyTable):
        raise InputError(
            f"latency_table must come from swan.measure_latency_table; got {type(table).__name__}"
        )
    return kept_table(gated, "ms", lambda: _build(gated, table), source=table)


def _build(gated: GatedModel, table: LatencyTable) -> CostTable:
    channels = channels_now(gated)
    known = {layer.name: layer for layer in channels.layers}
    terms = [CostTerm("", "latency", 1, (), 1)]
    factors = [table.rest_ms]
    for own in table.layers:
        layer = known.get(own.module)
        seen = None if layer is None else (len(layer.in_units), len(layer.out_units))
        if layer is None or seen != (own.in_width, own.out_width):
            raise InputError(
                f"the latency table has a layer {own.module!r} of widths {own.in_width} -> "
                f"{own.out_width}, this model has {'none of that name' if seen is None else seen}; "
                f"measure this one: swan.measure_latency_table(gated)"
            )
        for factor, axes in _products(own, layer):
            terms.append(CostTerm(own.module, "latency", 1, axes, 1))
            factors.append(factor)
    built = build_table(terms, channels.num_units, unit="ms")
    exact = torch.tensor(factors, dtype=torch.float64)
    return replace(built, factors=exact, total=table.total_ms)


def _products(own: LayerLatency, layer: Layer) -> list[tuple[float, tuple[CostAxis, ...]]]:
    into, out = _axis(layer.in_units), _axis(layer.out_units)
    found: list[tuple[float, tuple[CostAxis, ...]]] = [
        (own.constant_ms, ()),
        (own.per_in_ms, (into,)),
        (own.per_out_ms + own.rest_per_out_ms, (out,)),
        (own.per_product_ms, (into, out)),
    ]
    return [(factor, axes) for factor, axes in found if factor]


def _axis(units: Sequence[int]) -> CostAxis:
    counts = Counter(unit for unit in units if unit != PINNED)
    return CostAxis(tuple(counts), tuple(counts.values()), len(units) - counts.total())


__all__ = [
    "NOISY",
    "LatencyTable",
    "LayerLatency",
    "MultipleLatency",
    "fit_layer",
    "fit_rest",
    "latency_cost",
]
