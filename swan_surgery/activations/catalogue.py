"""Every activation that can be swapped in, by name: how it is made, and how it starts."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from swan_surgery.activations.learnt import (
    ACON,
    SMU,
    Activated,
    Bounded,
    MetaACON,
    PolyNorm,
    PolyReLU,
    Serf,
    Slopes,
    StarReLU,
)
from swan_surgery.activations.places import Axes
from swan_surgery.activations.pointwise import SAME, Function, is_homogeneous, probe
from swan_surgery.activations.scaling import Blend, FleS, LearntScales
from swan_surgery.errors import InputError, SwanError


Start = Literal["identity", "fresh", "blend"]


class NotHereError(Exception):
    """An activation cannot be put at a place; the message says why."""


@dataclass(frozen=True, slots=True)
class ActivationSite:
    """What an activation is made for.

    Attributes:
        name: of the module that it becomes.
        base: computes the activation that is there now.
        channels: how many there are; 0 where that is not known.
        axes: where channels and samples lie; None where that is not known.
        start: as asked for.
    """

    name: str
    base: nn.Module
    channels: int
    axes: Axes | None
    start: Start


Factory = Callable[[ActivationSite], nn.Module]


@dataclass(frozen=True, slots=True)
class Kind:
    """One activation of the catalogue.

    Attributes:
        make: the module at its start.
        needs_channels: it has parameters or statistics per channel.
        statistics: over "positions" of a sample, over the "batch" too, or "none".
        identity: at which given activations it can start as what is there, in words.
    """

    make: Factory
    needs_channels: bool = False
    statistics: Literal["none", "positions", "batch"] = "none"
    identity: str = ""


def _function(name: str) -> Factory:
    return lambda _site: Function(name, {})


def _scaled(site: ActivationSite) -> tuple[nn.Module, dict[str, Any]]:
    """The f of FleS and ACON: what is there, or SiLU."""
    own: dict[str, Any] = {"channels": site.channels, "axes": site.axes}
    silu = Function("silu", {})
    if site.start == "fresh":
        return silu, own
    if isinstance(site.base, nn.PReLU) or is_homogeneous(site.base):
        return Blend(site.base, silu, **own), own
    return site.base, own


def _fles(statistics: Any) -> Factory:
    def make(site: ActivationSite) -> nn.Module:
        base, own = _scaled(site)
        return FleS(base, statistics=statistics, **own)

    return make


def _learnt_scales(site: ActivationSite) -> nn.Module:
    base, own = _scaled(site)
    return LearntScales(base, **own)


def _acon(site: ActivationSite) -> nn.Module:
    base, own = _scaled(site)
    return ACON(base, is_drawn=site.start == "fresh", **own)


def _meta_acon(site: ActivationSite) -> nn.Module:
    base, own = _scaled(site)
    is_fresh = site.start == "fresh"
    return MetaACON(base, is_drawn=is_fresh, ceiling=1.0 if is_fresh else 2.0, **own)


def _slopes(site: ActivationSite) -> nn.Module:
    slope = 0.25
    if isinstance(site.base, nn.PReLU):
        raise NotHereError("it is PReLU already")
    if site.start != "fresh":
        with torch.no_grad():
            slope = -float(site.base(torch.full((1, 1), -1.0, dtype=torch.float64)))
    return Slopes(channels=site.channels, axes=_axes(site), slope=slope)


def _smu(site: ActivationSite) -> nn.Module:
    return (
        SMU(slope=0.25, steepness=1.0) if site.start == "fresh" else SMU(slope=0.0, steepness=1.0)
    )


def _bounded(site: ActivationSite) -> nn.Module:
    return Bounded(site.base, channels=site.channels, axes=_axes(site))


def _activated(site: ActivationSite) -> nn.Module:
    return Activated(site.base, channels=site.channels, axes=_axes(site))


_SELF_GATED = "at any; at ReLU and its like through a blend with SiLU that starts at 0"


def _per_channel(make: Factory, statistics: Literal["none", "positions", "batch"] = "none") -> Kind:
    return Kind(make, needs_channels=True, statistics=statistics, identity=_SELF_GATED)


KINDS: dict[str, Kind] = {
    "acon-c": _per_channel(_acon),
    "ap": Kind(_activated, needs_channels=True, identity="at any"),
    "bounded": Kind(_bounded, needs_channels=True, identity="at any"),
    "fles": _per_channel(_fles("positive"), "positions"),
    "fles-dg": _per_channel(_learnt_scales),
    "fles-pn": _per_channel(_fles("all"), "positions"),
    "fles-proto": _per_channel(_fles("batch"), "batch"),
    "fles-token": _per_channel(_fles("token")),
    "gelu": Kind(_function("gelu")),
    "meta-acon": _per_channel(_meta_acon, "positions"),
    "mish": Kind(_function("mish")),
    "polynorm": Kind(lambda site: PolyNorm(axes=_axes(site)), needs_channels=True),
    "polyrelu": Kind(lambda _site: PolyReLU(), identity="at ReLU"),
    "prelu": Kind(_slopes, needs_channels=True, identity="at ReLU and leaky ReLU"),
    "relu": Kind(_function("relu")),
    "serf": Kind(lambda _site: Serf()),
    "silu": Kind(_function("silu")),
    "smu": Kind(_smu, identity="at GELU"),
    "starrelu": Kind(lambda _site: StarReLU()),
}


_MADE_BY_USERS: dict[str, Kind] = {}


def build(activation: str, kind: Kind, site: ActivationSite, why_no_axis: str) -> nn.Module:
    """An activation for a site, at its start.

    Raises:
        NotHereError: it needs channels that are not known, cannot start as asked for, or is there already.
    """
    if site.axes is None and (kind.needs_channels or site.start == "blend"):
        raise NotHereError(f"its channels are not known: {why_no_axis}")
    module = kind.make(replace(site, start="fresh") if site.start == "blend" else site)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"the factory {activation!r} returned {type(module).__name__}, not a module"
        )
    far = _far_from(module, site)
    if far <= SAME and next(module.parameters(), None) is None:
        raise NotHereError(f"it computes {activation} already")
    if site.start == "blend":
        return Blend(site.base, module, channels=site.channels, axes=_axes(site))
    if site.start == "identity" and not far <= SAME:
        where = f"it has one {kind.identity}" if kind.identity else "it has none anywhere"
        raise NotHereError(
            f"{activation} has no start at which it computes what is there ({where}; it is off by {far:.1e}): "
            f"start='blend' begins as what is there, start='fresh' anew"
        )
    return module


def _far_from(module: nn.Module, site: ActivationSite) -> float:
    """The largest difference to what is there, relative to the largest value, in float64."""
    x = probe() if site.axes is None else _probe_along(site.axes, site.channels)
    with torch.no_grad():
        given, own = (copy.deepcopy(one).double()(x.clone()) for one in (site.base, module))
        if given.shape != own.shape:
            raise NotHereError(f"it gives shape {tuple(own.shape)} for {tuple(x.shape)}")
        return float((given - own).abs().max() / given.abs().max())


def _probe_along(axes: Axes, channels: int) -> Tensor:
    shape = [2] * max(2, axes.channels + 1, 1 + (axes.samples or 0))
    shape[0 if axes.channels else 1] = 32
    shape[axes.channels] = channels
    generator = torch.Generator().manual_seed(0)
    return 8 * torch.randn(shape, generator=generator, dtype=torch.float64)


def _axes(site: ActivationSite) -> Axes:
    assert site.axes is not None  # noqa: S101 - of a kind that needs channels
    return site.axes


def kind_named(
    activation: str | Factory, *, error: type[SwanError] = InputError
) -> tuple[str, Kind]:
    """An activation by its name, or the one that a factory makes, under the factory's name.

    Raises:
        InputError: (or `error`) there is none; lists all.
    """
    if isinstance(activation, str):
        known = _MADE_BY_USERS.get(activation)
        if known is not None:
            return activation, known
        if activation.lower() not in KINDS:
            raise error(
                f"no activation {activation!r}; there are {', '.join(KINDS)}, and those of "
                f"swan.register_activation"
            )
        return activation.lower(), KINDS[activation.lower()]
    if not callable(activation):
        raise error(f"an activation is a name or a function, not {type(activation).__name__}")
    name = (
        f"{activation.__module__}.{getattr(activation, '__qualname__', type(activation).__name__)}"
    )
    return name, _MADE_BY_USERS.setdefault(name, Kind(activation))


def register_activation(name: str, factory: Factory) -> None:
    """Give an activation of your own a name, so that `swan.load` can make it again.

    Args:
        name: as `swap_activations` and a file will call it.
        factory: makes a module from an `ActivationSite`; called again on load, where parameters may start
            at anything.

    Raises:
        InputError: the name is taken.

    Example:
        >>> swan.register_activation("square", lambda site: nn.Softsign())
    """
    if name in KINDS or name in _MADE_BY_USERS:
        raise InputError(f"there is an activation {name!r} already")
    _MADE_BY_USERS[name] = Kind(factory)
