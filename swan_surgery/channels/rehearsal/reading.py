"""Which attributes a model's code reads, and when: only what was read can be to blame.

A run at full width in which every module tells what is read of it. It only proposes: if anything in
it differs from the recorded run, the attributes of the module that failed are proposed instead.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from swan_surgery.channels.labels.labels import Labels
from swan_surgery.channels.labels.recording import ModuleRun, OpRecord, Recording
from swan_surgery.channels.runs.tracing import LabelMode, run_labelled
from swan_surgery.channels.solving.mapping import Trace
from swan_surgery.models.attributes import Attribute, repeating, repeating_in
from swan_surgery.models.subclasses import subclass_of


_NOTE = "_swan_note"
_KINDS = (int, tuple, list)


@dataclass(frozen=True, slots=True)
class _Read:
    """After `at` operations, in the runs of modules `within` (outermost first), an attribute was read."""

    at: int
    within: tuple[int, ...]
    module: str
    name: str


@dataclass(slots=True)
class Readings:
    """Proposes attributes, run by run; the one that tells is made when it is first asked for.

    Attributes:
        make_shell: a fresh shell at full width.
        model: a shell at full width, for its values.
    """

    make_shell: Callable[[], nn.Module]
    model: nn.Module
    _known: dict[int, "tuple[Recording, list[_Read]] | None"] = field(default_factory=dict)

    def proposed(self, trace: Trace, module: str, index: int) -> Callable[[int], list[Attribute]]:
        """Attributes of a given value that were read before an operation, the likeliest first.

        Those that the run of `module` read, the latest first; then those of the runs around it.
        """
        known = self._known_of(trace)
        if known is None:
            return partial(repeating, self.model, module)
        names = list(_before(*known, module, index))
        return lambda size: [
            found
            for owner, name in names
            for found in repeating_in(self.model, owner, size, only=name)
        ]

    def of_all(self, traces: Iterable[Trace]) -> set[tuple[str, str]] | None:
        """Module and name of all that any of the runs reads; None where that cannot be told."""
        found: set[tuple[str, str]] = set()
        for trace in traces:
            known = self._known_of(trace)
            if known is None:
                return None
            found |= {(read.module, read.name) for read in known[1]}
        return found

    def _known_of(self, trace: Trace) -> tuple[Recording, list[_Read]] | None:
        if trace.number not in self._known:
            self._known[trace.number] = self._run(trace)
        return self._known[trace.number]

    def _run(self, trace: Trace) -> tuple[Recording, list[_Read]] | None:
        shell = self.make_shell().train(trace.training)
        mode = _ReadingMode()
        listened = list(shell.named_modules())
        for name, module in listened:
            _listen_(module, partial(mode.note, name))
        try:
            run_labelled(mode, shell, shell, trace.inputs.args, trace.inputs.kwargs)
        except Exception:  # noqa: BLE001 - the model's own code may raise anything
            return None
        finally:
            for _, module in listened:
                vars(module).pop(_NOTE, None)  # a cycle, while garbage collection is paused
        recording = mode.labels.recording
        same = [op.name for op in recording.ops] == [op.name for op in trace.recording.ops]
        return (recording, mode.reads) if same else None


class _ReadingMode(LabelMode):
    """Runs without labels, and notes what is read."""

    def __init__(self) -> None:
        super().__init__(Labels(Recording()))
        self.reads: list[_Read] = []
        self._within: list[int] = []

    def enter(self, module: str) -> None:
        """A module starts to run."""
        self._within.append(len(self.labels.recording.runs))
        super().enter(module)

    def leave(self, out: Any) -> None:
        """The innermost module has run."""
        self._within.pop()
        super().leave(out)

    def dispatch(
        self,
        record: OpRecord,  # noqa: ARG002 - as its base calls it
        inputs: tuple[Tensor, ...],
        op: Any,
        args: Any,
        kwargs: Any,
    ) -> Any:
        """Run the operation alone: nothing carries a label here."""
        return self.run(op, inputs, args, kwargs)

    def note(self, module: str, name: str) -> None:
        """An attribute of a module was read."""
        if self._within:
            at = len(self.labels.recording.ops)
            self.reads.append(_Read(at, tuple(self._within), module, name))


def _before(
    recording: Recording, reads: Sequence[_Read], module: str, index: int
) -> Iterable[tuple[str, str]]:
    """Module and name of what was read before an operation, each once, the likeliest first."""
    running = [
        number
        for number, run in enumerate(recording.runs)
        if run.module == module and run.start <= index <= run.end
    ]
    earlier = [read for read in reversed(reads) if read.at <= index]
    found: dict[tuple[str, str], None] = {}
    if running:
        inside = [read for read in earlier if running[-1] in read.within]
        found = dict.fromkeys((read.module, read.name) for read in inside)
    around = _around(recording.runs, running[-1] if running else 0)
    found |= dict.fromkeys((r.module, r.name) for r in earlier if r.within[-1] in around)
    return found


def _around(runs: Sequence[ModuleRun], number: int) -> set[int]:
    """The runs that were under way when one started, and itself."""
    own = runs[number]
    return {
        other
        for other, run in enumerate(runs[: number + 1])
        if run.start <= own.start and run.end >= own.end
    }


def _listen_(module: nn.Module, note: Callable[[str], None]) -> None:
    try:
        module.__class__ = subclass_of(type(module), listening)
    except TypeError:
        return  # of a class that lays out its instances its own way
    vars(module)[_NOTE] = note


def listening(base: type[nn.Module]) -> tuple[tuple[type, ...], dict[str, Any]]:
    """The subclass of a class whose instances tell which of their numbers are read."""

    def read(self: nn.Module, name: str) -> Any:
        value = base.__getattribute__(self, name)
        if type(value) in _KINDS:
            note = object.__getattribute__(self, "__dict__").get(_NOTE)
            if note is not None:
                note(name)
        return value

    return (base,), {"__getattribute__": read}
