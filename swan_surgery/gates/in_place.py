"""Gates that act while the base model runs its own Python code.

Closing a unit makes every layer that sums over it read zero. Where that layer's weight is a
parameter W, scaling the columns of W that read the unit does exactly that, wherever and however W
is used: in a module, in a functional call, in code that no tracer can follow. The parameters of the
base model are replaced for the time of one call, and statistics over channels are weighted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from swan_surgery.calls.sites import PathGuard
from swan_surgery.gates.bank import GateBank
from swan_surgery.gates.sites import GateSite
from swan_surgery.gates.weighted_statistics import WeightingMode


class ParameterGate(GateSite):
    """Scales the columns of a parameter that read gated channels: the layer reads x * p (Eq. 1)."""

    def __init__(self, units: Tensor, bank: GateBank, *, names: Sequence[str]) -> None:
        """`names`: the dotted names of the parameter in the base model, several if it is tied."""
        super().__init__(units, bank)
        self.names = tuple(names)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{super().extra_repr()}, folded into what {self.names[0]!r} reads"


class StatisticGate(GateSite):
    """Weighs one statistic over gated channels: the `number`-th `function` in a run of `module`."""

    def __init__(
        self,
        units: Tensor,
        bank: GateBank,
        *,
        module: str,
        call: tuple[str, int],
        training: bool,
        site: str,
    ) -> None:
        """`site`: where in the code the call stands."""
        super().__init__(units, bank)
        self.site = site
        self.module = module
        self.call = call
        self.in_training = training

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{super().extra_repr()}, weighs {self.call[0]} in {self.module!r}"


@contextmanager
def acting(
    model: nn.Module, sites: Mapping[str, nn.Module], values: Sequence[Tensor], *, training: bool
) -> Iterator[nn.Module]:
    """Let gates act on `model`, a copy of the base model, inside the block.

    Args:
        model: runs its own code inside the block, as often as wanted.
        sites: parameter gates and statistic gates, in the order of `values`.
        values: the gate values at each site.
        training: which statistics are in force.
    """
    scaled: dict[str, Tensor] = {}
    weights: dict[str, dict[tuple[str, int], Tensor]] = {}
    places: dict[str, dict[tuple[str, int], str]] = {}
    for site, own in zip(sites.values(), values, strict=True):
        if isinstance(site, ParameterGate):
            for name in site.names:
                before = scaled[name] if name in scaled else model.get_parameter(name)
                scaled[name] = site(own, before)
        elif isinstance(site, StatisticGate) and site.in_training == training:
            weights.setdefault(site.module, {})[site.call] = own
            places.setdefault(site.module, {})[site.call] = site.site
    with ExitStack() as stack:
        for name, tensor in scaled.items():
            stack.enter_context(_parameter(model, name, tensor))
        running: list[WeightingMode] = []
        for name, by_call in weights.items():
            stack.enter_context(_forward(model.get_submodule(name), by_call, places[name], running))
        yield model


@contextmanager
def _parameter(model: nn.Module, name: str, tensor: Tensor) -> Iterator[None]:
    path, _, leaf = name.rpartition(".")
    own: dict[str, Any] = model.get_submodule(path)._parameters  # noqa: SLF001 - nn.Module's store
    before = own[leaf]
    own[leaf] = tensor
    try:
        yield
    finally:
        own[leaf] = before


@contextmanager
def _forward(
    module: nn.Module,
    by_call: Mapping[tuple[str, int], Tensor],
    places: Mapping[tuple[str, int], str],
    running: list[WeightingMode],
) -> Iterator[None]:
    """Run a module's forward under a weighting mode."""
    original: Callable[..., Any] = module.forward
    own = vars(module).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        guard = PathGuard(places)
        mode = WeightingMode(by_call, list(running), guard)
        running.append(mode)
        try:
            with mode:
                result = original(*args, **kwargs)
        finally:
            running.pop()
        guard.finish()
        return result

    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own
