"""Which call of a function an activation is, for the mode that replaces it: its number in one run of its owner."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from swan_surgery.activations.hearing import hear
from swan_surgery.activations.listening import Heard, Met, Run
from swan_surgery.activations.places import Place
from swan_surgery.errors import ModelError
from swan_surgery.models import Inputs


# name of a place -> training or not -> number of the call
Numbers = Mapping[str, Mapping[bool, int]]


def number_calls(
    model: nn.Module, inputs: Inputs, places: Sequence[Place], shared: frozenset[str]
) -> Numbers:
    """Number the calls that places stand for, with all other places swapped already.

    Args:
        model: with the modules of all places in it; no call is replaced.
        inputs: example inputs with data.
        places: all of them, those of earlier swaps too.
        shared: activation modules that stay and whose calls are replaced where they are run.

    Raises:
        ModelError: a module does not make the same calls in every run.
    """
    if not any(place.is_call for place in places):
        return {}
    found: dict[str, dict[bool, int]] = defaultdict(dict)
    for training, own in hear(model, inputs, ()).items():
        for name, number in _numbered(own, places, shared):
            if found[name].setdefault(training, number) != number:
                raise ModelError(
                    f"the module that runs {name!r} makes other calls from run to run: leave it out "
                    f"with where="
                )
    return found


def _numbered(
    heard: Heard, places: Sequence[Place], shared: frozenset[str]
) -> Iterator[tuple[str, int]]:
    known = {(place.owner, place.site, place.time): place for place in places if place.is_call}
    times: Counter[tuple[Run, str]] = Counter()
    counts: dict[tuple[Run, str], int] = Counter()
    for met in heard.met:
        if not met.function:
            continue
        depth = _owner(met, shared)
        owner = met.runs[depth]
        times[owner, met.site] += 1
        place = known.get((owner.module, met.site, times[owner, met.site]))
        # Runs around the one that replaces a call do not see it.
        for run in met.runs[depth if place is not None else 0 :]:
            counts[run, met.function] += 1
        if place is not None:
            yield place.name, counts[owner, met.function]


def _owner(met: Met, shared: frozenset[str]) -> int:
    return len(met.runs) - (2 if met.runs[-1].module in shared else 1)
