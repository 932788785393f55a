"""Is a traced graph the model? What torch.fx evaluates once or drops is met while tracing, or shows in a run.

torch.fx records what happens to its proxies, and nothing else: arithmetic on buffers alone is done once,
`no_grad` and autocast blocks and custom backward passes leave no trace, random numbers and Python
state are those of the tracing run, and a submodule's own mode is that of the whole. The graph is used
where none of this is met and a run of it gives what the model gives: outputs, gradients and buffers.
"""

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from swan_surgery.environment.random_streams import streams_kept
from swan_surgery.models import Inputs, doubled, sharing_copy_of
from swan_surgery.models.attributes import reads_noted
from swan_surgery.models.outputs import iter_tensors


# Largest difference over the largest value: both run the same operations, in the same order but where
# threads or a GPU add up in another.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_COARSE = 0.05
# Gradients that are zero but for rounding, such as those of a bias in front of a batch-norm, over the largest
# gradient: on a GPU, which adds up in another order every time, they are other ones in every run.
_NOISE = {torch.float64: 1e-12, torch.float32: 1e-5}
# Gradients of larger parameters are not compared: they take most of the time.
_SMALL = 4096
# Code of these modules runs its body in a way that a graph does not keep.
_OPAQUE = {"torch.utils.checkpoint": "activation checkpointing"}


@dataclass(slots=True)
class Watch:
    """What was met while a model was traced that its graph does not hold.

    Attributes:
        reasons: in words, the first first.
        settings: (module, attribute) -> value of whole numbers, texts and flags that the code read.
    """

    reasons: list[str] = field(default_factory=list)
    settings: dict[tuple[str, str], Any] = field(default_factory=dict)

    def met(self, reason: str) -> None:
        """Note a reason once."""
        if reason not in self.reasons:
            self.reasons.append(reason)

    def at_node(self, before: tuple[int, ...]) -> None:
        """A node is being recorded; `before` is the state of autograd and autocast outside the model."""
        frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - the documented way to the stack
        while frame is not None:
            what = _OPAQUE.get(str(frame.f_globals.get("__name__")))
            if what is not None:
                self.met(what)
                return  # these have a state of autograd of their own
            frame = frame.f_back
        if state_of_autograd() != before:
            self.met(
                "a block under no_grad, inference_mode or autocast, or a backward pass of its own"
            )


def state_of_autograd() -> tuple[int, ...]:
    """Whether gradients, inference mode and autocast are on, and inside how many blocks of autocast this runs."""
    # A block that turns off what is off already shows in the depth alone.
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return (
        depth,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


@contextmanager
def watching(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Watch the tracing of a private model inside the block; it may be changed by its own code."""
    before, drawn = _state_of(model), _random_state()
    with _recording_settings(model, watch), _Computing(watch):
        yield
    if _state_of(model) != before:
        watch.met("attributes or buffers that its code sets while it runs")
    if _random_state() != drawn:
        watch.met("random numbers drawn in its code")


class _Computing(TorchDispatchMode):
    """Notes operations on tensors that are no proxies: they are evaluated while tracing alone."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self._watch = watch

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(op.overloadpacket).removeprefix("aten.")
        if name != "detach":  # what torch does to hand a tensor out
            self._watch.met(f"arithmetic on tensors of its own ({name})")
        return op(*args, **(kwargs or {}))


@contextmanager
def _recording_settings(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Note which plain values the code of containers reads off their modules."""
    names = {id(module): name for name, module in model.named_modules()}

    def note(module: nn.Module, key: str, value: Any) -> None:
        if key.startswith("_") or key == "training" or id(module) not in names:
            return
        if isinstance(value, float):
            watch.met(f"a number that is kept in an attribute ({key})")
        elif isinstance(value, (bool, int, str)) and key in vars(module):
            watch.settings[names[id(module)], key] = value

    with reads_noted(model, note):
        yield


def _state_of(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("_buffers", "_parameters", "_modules"):
                found.append([(key, id(entry), _version(entry)) for key, entry in value.items()])
            elif not name.startswith("_"):
                is_plain = isinstance(value, (bool, int, float, str, type(None)))
                size = len(value) if isinstance(value, (list, dict, set)) else 0
                found.append((name, value if is_plain else id(value), size))
    return found


def _version(entry: object) -> int:
    return entry._version if isinstance(entry, Tensor) else 0  # noqa: SLF001 - torch's counter of writes


def _random_state() -> tuple[Any, ...]:
    numpys: Any = np.random.get_state()  # noqa: NPY002 - the state that people's code draws from
    torchs = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), numpys[1].tobytes(), numpys[2:], torchs


def hooks_of(model: nn.Module) -> str | None:
    """The first module with hooks of its own; None without any."""
    for name, module in model.named_modules():
        own = vars(module)
        stores = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(own.get(store) for store in stores):
            return name or "the model itself"
    return None


class _Traced(nn.Module):
    """Runs a graph of a model that may have modules of any name."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        self.model = model
        self._run = type(fx.GraphModule(self, prefixed(copy.deepcopy(graph)))).forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self, *args, **kwargs)


def prefixed(graph: fx.Graph) -> fx.Graph:
    """The graph, changed in place, for a module that holds the traced one as `model`."""
    graph.owning_module = None  # its targets are about to change root
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = f"model.{node.target}"
    return graph


def difference(model: nn.Module, graph: fx.Graph, inputs: Inputs) -> str | None:
    """In what runs of the graph differ from those of the model, in both modes; None if in nothing.

    Args:
        model: a private copy; it is left as it was.
        graph: its trace.
        inputs: example inputs; doubled where train mode wants two samples.
    """
    twin = _in_plain_layout_(sharing_copy_of(model))
    traced = _Traced(twin, graph)
    for training in (True, False):
        wanted = None
        for candidate in (inputs, inputs.map(doubled)):
            try:
                wanted = _run(twin, twin, candidate, training=training)
                break
            except Exception:  # noqa: BLE001, S112 - the model's own code may raise anything
                continue
        mode = "train" if training else "eval"
        if wanted is None:
            return f"a {mode} mode that does not run on the example inputs"
        try:
            got = _run(traced, twin, candidate, training=training)
        except Exception:  # noqa: BLE001 - a trace that took another branch fails anywhere
            return f"another way through its code than its trace, in {mode} mode"
        for what, one, two in zip(("outputs", "gradients", "buffers"), wanted, got, strict=True):
            if not _same(one, two, has_noise=what == "gradients"):
                return f"other {what} than its trace, in {mode} mode"
    return None


def _in_plain_layout_(twin: nn.Module) -> nn.Module:
    """Contiguous parameters in place of channels-last ones, which plays no part in what is compared.

    oneDNN writes past its memory in the backward pass of strided 1x1 convolutions of fewer than 8
    channels-last channels (uxlfoundation/oneDNN#6035): a conversion must not run into that.
    """
    for module in twin.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # By strides: a 1x1 kernel counts as contiguous and is taken for channels-last.
            if parameter.stride() != torch.empty(parameter.shape, device="meta").stride():
                plain = torch.empty_like(parameter.detach(), memory_format=torch.contiguous_format)
                plain = nn.Parameter(plain.copy_(parameter.detach()), parameter.requires_grad)
                module.register_parameter(name, plain)
    return twin


_Found = tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]


def _run(runs: nn.Module, twin: nn.Module, inputs: Inputs, *, training: bool) -> _Found:
    """Outputs, in training gradients of a fixed loss, and buffers after a run; these are put back."""
    before = [(buffer, buffer.clone()) for buffer in twin.buffers()]
    own = inputs.map(lambda t: t.detach().clone(memory_format=torch.contiguous_format))
    runs.train(training)
    try:
        with streams_kept(0), torch.set_grad_enabled(training):
            outputs = list(iter_tensors(runs(*own.args, **own.kwargs)))
            gradients = _gradients(outputs, _small_parameters(twin)) if training else []
        return list(outputs), gradients, [buffer.clone() for buffer, _ in before]
    finally:
        for buffer, kept in before:
            buffer.copy_(kept)


def _gradients(outputs: list[Tensor], parameters: list[nn.Parameter]) -> list[Tensor | None]:
    terms = [t for t in outputs if t.requires_grad and t.is_floating_point()]
    if not terms or not parameters:
        return []
    loss = torch.stack(
        [(t.reshape(-1) * torch.linspace(0.5, 1.5, t.numel()).to(t)).sum().double() for t in terms]
    ).sum()
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def _small_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Biases, norms and the like: a gradient that is lost or changed is so for them, and they are cheap."""
    own = [p for p in model.parameters() if p.requires_grad]
    small = [p for p in own if p.numel() <= _SMALL]
    return small or sorted(own, key=nn.Parameter.numel)[:1]


def _same(one: list[Tensor | None], two: list[Tensor | None], *, has_noise: bool = False) -> bool:
    noise = max(map(_noise, one), default=0.0) if has_noise else 0.0
    return len(one) == len(two) and all(map(partial(_close, noise=noise), one, two))


def _noise(gradient: Tensor | None) -> float:
    if gradient is None or not gradient.numel():
        return 0.0
    return _NOISE.get(gradient.dtype, _COARSE) * _scale(gradient)


def _scale(tensor: Tensor) -> float:
    return float(tensor.detach().abs().nan_to_num(posinf=0.0).amax()) if tensor.numel() else 0.0


def _close(one: Tensor | None, two: Tensor | None, *, noise: float) -> bool:
    if one is None or two is None:
        return one is two
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, two)
    bound = _TOLERANCE.get(one.dtype, _COARSE)
    allowed = bound * _scale(one) + noise + 1e-30
    return torch.allclose(one, two, rtol=0.0, atol=allowed, equal_nan=True)
