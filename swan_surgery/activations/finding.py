"""Finds the activations of a model: modules, and calls of functions, each once per place in the code."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from swan_surgery.activations.axes import Given
from swan_surgery.activations.hearing import hear, raise_for
from swan_surgery.activations.listening import Heard, Met, Run
from swan_surgery.activations.places import Axes, Kept, Place
from swan_surgery.activations.pointwise import (
    SAME,
    Function,
    as_module,
    difference,
    why_not_self_gated,
)
from swan_surgery.models import Inputs, doubled


# (the module that runs it, where the call stands, which time in one run): one place in the code.
Key = tuple[str, str, int]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(slots=True)
class Found:
    """The activations of a model.

    Attributes:
        places: where something else can run.
        kept: what stays, and why.
        shared: activation modules that one run of another module runs several times.
        activations: all activation modules.
    """

    places: list[Place] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    shared: frozenset[str] = frozenset()
    activations: tuple[str, ...] = ()


def unshare_(model: nn.Module) -> nn.Module:
    """Give every path to an activation module a module of its own, on a private copy; returns it."""
    seen: set[int] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name or why_not_activation(module) is not None or isinstance(module, nn.PReLU):
            continue
        if id(module) in seen:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._modules[leaf] = deepcopy(module)  # noqa: SLF001 - as torch's setattr
        seen.add(id(module))
    return model


def why_not_activation(module: nn.Module) -> str | None:
    """None for a module that is an activation; why it stays; "" for one that is something else."""
    if next(module.children(), None) is not None:
        return ""
    if isinstance(module, nn.PReLU):
        return None
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return ""
    if isinstance(module, nn.RReLU):
        return "it draws its slopes at random"
    return why_not_self_gated(as_module(module))


def find_places(model: nn.Module, inputs: Inputs, *, done: Sequence[Place] = ()) -> Found:
    """Every activation that a model runs, in order, in eval mode first.

    Args:
        model: a private copy, unshared, in which no call is replaced; it is not run.
        inputs: example inputs with data.
        done: what earlier swaps replaced.

    Raises:
        TraceError: the model cannot be run.
    """
    whys = {
        name: why_not_activation(module)
        for name, module in model.named_modules()
        if name and not within(name, [place.name for place in done])
    }
    activations = tuple(name for name, why in whys.items() if why != "")
    heard = hear(model, inputs, activations)
    if False not in heard:
        raise_for(model, inputs)
    finder = _Finder(model, frozenset(activations), done, heard)
    found = finder.found(hear(model, inputs.map(doubled), activations, modes=finder.modes()))
    found.shared = frozenset(finder.often)
    found.activations = activations
    return found


def within(name: str, parents: Sequence[str]) -> bool:
    """Whether a module is one of `parents`, or inside one."""
    return any(name == own or name.startswith(own + ".") for own in parents)


def _kind(model: nn.Module, name: str) -> str:
    return type(model.get_submodule(name)).__name__


class _Finder:
    """Sorts what was heard into places."""

    def __init__(
        self,
        model: nn.Module,
        modules: frozenset[str],
        done: Sequence[Place],
        heard: Mapping[bool, Heard],
    ) -> None:
        """`modules`: all that are activations, whether they may be swapped or not."""
        self._model, self._modules = model, modules
        self._done = [place.name for place in done]
        self._done_calls = {(place.owner, place.site, place.time) for place in done}
        # A module that another runs several times in one run: the one that runs it.
        self.often: dict[str, str] = {}
        for own in heard.values():
            runs = (met.runs for met in own.met if not met.function)
            times = Counter((found[-1].module, found[-2]) for found in runs)
            self.often |= {m: caller.module for (m, caller), count in times.items() if count > 1}
        self._met: dict[str | Key, list[Met]] = defaultdict(list)
        self._shapes: dict[str | Key, list[tuple[bool, tuple[int, ...]]]] = defaultdict(list)
        for training, own in heard.items():
            for key, met in self._keyed(own):
                self._met[key].append(met)
                self._shapes[key].append((training, met.given.shape))

    def modes(self) -> tuple[bool, ...]:
        """The modes that are needed to hear all there is; eval mode alone, as a rule."""
        heard = [{mode for mode, _ in shapes} for shapes in self._shapes.values()]
        return tuple(mode for mode in (False, True) if {mode} in heard or (mode is False and heard))

    def found(self, grown: Mapping[bool, Heard]) -> Found:
        """All places, in order."""
        samples = self._samples(grown)
        result = Found()
        taken: Counter[str] = Counter()
        for key, met in self._met.items():
            why = self._why_not(key, met[0])
            name = key if isinstance(key, str) else self._new_name(key, met[0], taken)
            function = _kind(self._model, key) if isinstance(key, str) else met[0].function
            if why is not None:
                result.kept.append(Kept(name, function, why or "it is a straight line"))
                continue
            place = (
                Place(name, met[0].runs[-2].module, function)
                if isinstance(key, str)
                else Place(name, key[0], function, key[1], key[2], dict(met[0].settings))
            )
            result.places.append(_with_axes(place, met, samples.get(key, {"unknown"})))
        made = {met.runs[-1].module for own in self._met.values() for met in own}
        result.kept += [
            Kept(
                name,
                _kind(self._model, name),
                f"{caller or 'the model'} runs it several times, and "
                f"it is no single torch function: give each use a module of its own",
            )
            for name, caller in self.often.items()
            if name not in made
        ]
        return result

    def _keyed(self, heard: Heard) -> Iterator[tuple[str | Key, Met]]:
        """Each activation with its place; the calls that an activation module makes belong to it."""
        times: Counter[tuple[Run, str]] = Counter()
        for met in heard.met:
            innermost = met.runs[-1]
            if within(innermost.module, self._done):
                continue
            is_often = innermost.module in self.often
            if not met.function:
                if not is_often:
                    yield innermost.module, met
                continue
            owner = innermost
            if innermost.module in self._modules:
                if not (is_often and self._is_all_of(met)):
                    continue
                owner = met.runs[-2]
            times[owner, met.site] += 1
            key = (owner.module, met.site, times[owner, met.site])
            if key not in self._done_calls:
                yield key, met

    def _is_all_of(self, met: Met) -> bool:
        """Whether a function does all that the module does that calls it."""
        module = self._model.get_submodule(met.runs[-1].module)
        if not _is_plain(met.settings):
            return False
        return difference(Function(met.function, met.settings), as_module(module)) <= SAME

    def _samples(self, grown: Mapping[bool, Heard]) -> dict[str | Key, set[Any]]:
        found: dict[str | Key, set[Any]] = defaultdict(set)
        for training, heard in grown.items():
            for key, met in self._keyed(heard):
                found[key] |= {
                    _growing(shape, met.given.shape)
                    for mode, shape in self._shapes.get(key, ())
                    if mode == training
                }
        return found

    def _new_name(self, key: Key, met: Met, taken: Counter[str]) -> str:
        """A name for a module that is to stand in for a call: `layer1.0.relu_2`."""
        owner = self._model.get_submodule(key[0])
        innermost = met.runs[-1].module
        leaf = innermost.rpartition(".")[2] if innermost in self._modules else met.function
        name = f"{key[0]}.{leaf.rstrip('_')}".strip(".")
        while True:
            taken[name] += 1
            if not hasattr(owner, f"{leaf.rstrip('_')}_{taken[name]}"):
                return f"{name}_{taken[name]}"

    def _why_not(self, key: str | Key, met: Met) -> str | None:
        if isinstance(key, str):
            return why_not_activation(self._model.get_submodule(key))
        owner = self._model.get_submodule(key[0])
        if isinstance(owner, _CONTAINERS):
            return f"{type(owner).__name__} runs it, and takes all that it holds for its layers"
        if "forward" in vars(owner):
            return f"{type(owner).__name__} has a forward of its own instance"
        if not _is_plain(met.settings):
            return "a setting of it is no plain number or text"
        return why_not_self_gated(Function(met.function, met.settings))


def _is_plain(settings: Mapping[str, Any]) -> bool:
    return all(isinstance(value, (int, float, str)) for value in settings.values())


def _growing(before: tuple[int, ...], after: tuple[int, ...]) -> Any:
    """The axis along which twice the batch is twice as long; None where nothing changed."""
    if len(before) != len(after):
        return "unknown"
    grown = [axis for axis, (one, two) in enumerate(zip(before, after, strict=True)) if one != two]
    if not grown:
        return None
    return grown[0] if len(grown) == 1 and after[grown[0]] == 2 * before[grown[0]] else "unknown"


def _with_axes(place: Place, met: Sequence[Met], samples: set[Any]) -> Place:
    given: list[Given] = [own.given for own in met]
    axes = {own.channels for own in given if own.channels is not None}
    widths = {own.shape[own.channels] for own in given if own.channels is not None}
    why = next((own.why for own in given if own.why), "")
    if not why and (len(axes) > 1 or len(widths) > 1):
        why = f"it is run with {sorted(widths)} channels on axes {sorted(axes)}"
    if not why and (len(samples) > 1 or "unknown" in samples):
        why = "no one axis of what it is given grows with the batch (is the batch axis 0 of the inputs?)"
    if why:
        return replace(place, why_no_axis=why)
    return replace(place, channels=min(widths), axes=Axes(min(axes), next(iter(samples))))
