"""Models of the zoo: built without pretrained weights, with parameters that hide nothing.

A wrong cut looks right where a parameter is a constant (norms of gamma 1 and beta 0, layer scales of
1e-6, zero-initialised heads), so every such parameter becomes random, and batch-norm statistics are
calibrated on two random samples.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import swan_surgery as swan


BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}
# CPU seconds after which Torch-Pruning hangs; timm's models are the smallest of their families.
PEER_SECONDS = {"torchvision": 120, "timm": 60, "transformers": 120, "libraries": 120}
Draw = Callable[[torch.Generator, int], Any]


@dataclass(frozen=True)
class Case:
    """A model in eval mode and what it is called with.

    Attributes:
        model: with random parameters.
        draw: inputs from a generator and a batch size: a tensor, a tuple of arguments or a dict of
            keyword arguments.
        dtype: of parameters and inputs.
        kind: classification, segmentation, ...
        prompt: name of the input that `model.generate` continues; None where it cannot.
    """

    model: nn.Module
    draw: Draw
    dtype: torch.dtype = torch.float64
    kind: str = "classification"
    prompt: str | None = None

    @cached_property
    def example(self) -> Any:
        """One sample; what the model is mapped with."""
        return self.draw(torch.Generator().manual_seed(0), 1)

    def without_model(self) -> "Case":
        """The inputs and bounds alone, so that the model can go."""
        bare = replace(self, model=nn.Identity())
        vars(bare)["rounds_inside"] = self.rounds_inside
        return bare

    def fresh_inputs(self, generator: torch.Generator) -> Any:
        """Two samples that the map has not seen."""
        return self.draw(generator, 2)

    @cached_property
    def rounds_inside(self) -> bool:
        """The float64 model computes some of its activations in a smaller type.

        Such models are compared with everything widened to float64.
        """
        with torch.no_grad(), _Downcasts() as seen:
            call(self.model, self.example)
        return seen.found

    @property
    def bound(self) -> float:
        """Largest relative error that counts as exact."""
        return BOUNDS[self.dtype]


class Suite(Protocol):
    """A module with models: `zoo_torchvision`, `zoo_timm`, `zoo_transformers`, `zoo_libraries`."""

    def names(self) -> list[str]:
        """Every model of the suite."""

    def raw_case(self, name: str) -> Case:
        """A model as its library initialises it, on the CPU."""


SUITES = ("torchvision", "timm", "transformers", "libraries")


def suite(name: str) -> Suite:
    """Suites are imported when needed: timm and transformers take seconds."""
    module: Any = importlib.import_module(f"zoo_{name}")
    return module


def build(suite_name: str, name: str) -> Case:
    """A model in eval mode with parameters that hide nothing.

    Raises:
        ValueError: its outputs are not finite.
    """
    torch.manual_seed(0)
    case = suite(suite_name).raw_case(name)
    randomise_(case.model)
    case.model.to(case.dtype).eval()
    if any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in case.model.modules()):
        batch = case.draw(torch.Generator().manual_seed(1), 2)
        swan.calibrate(case.model, [as_keywords(case.model, batch)])
    with torch.no_grad():
        outputs = tensors_of(call(case.model, case.example))
    if not outputs or not all(bool(t.isfinite().all()) for t in outputs if t.is_floating_point()):
        raise ValueError(f"{name} gives no finite outputs")
    return case


def image_draw(size: int, *, dtype: torch.dtype = torch.float64, channels: int = 3) -> Draw:
    """One square image."""
    return tensor_draw(channels, size, size, dtype=dtype)


def tensor_draw(*shape: int, dtype: torch.dtype = torch.float64) -> Draw:
    """One normal tensor of a shape behind the batch."""
    return lambda generator, batch: torch.randn(batch, *shape, generator=generator, dtype=dtype)


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on a tensor, a tuple of arguments or a dict of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def as_keywords(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """The same inputs by the names of the model's parameters."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, inputs if isinstance(inputs, tuple) else (inputs,), strict=False))


def copied(inputs: Any) -> Any:
    """Inputs that a model may change in place."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in nested outputs, data classes of transformers included."""
    if isinstance(value, Mapping):
        value = dict(value)
    leaves, _ = tree_flatten(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


class _Downcasts(TorchDispatchMode):
    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.is_floating_point():
            self.found |= args[0].dtype == torch.float64 and out.dtype != torch.float64
        return out


# --- parameters that hide nothing ------------------------------------------------------------


@torch.no_grad()
def randomise_(model: nn.Module) -> None:
    """Norms, and every parameter that is a constant or a vector, become random."""
    done: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in done or not parameter.is_floating_point():
                continue
            done.add(parameter)
            if is_norm(module):
                _randomise_norm_(module, name, parameter)
            elif parameter.ndim < 2 or _is_constant(parameter):
                _randomise_constant_(f"{path}.{name}".lower(), parameter)


def is_norm(module: nn.Module) -> bool:
    """Batch-, layer-, group-, RMS-norm and the like, by class name."""
    return "norm" in type(module).__name__.lower() and not any(module.children())


def _randomise_norm_(module: nn.Module, name: str, parameter: Tensor) -> None:
    if name == "bias":
        parameter.normal_(0, 0.3)
        return
    own = type(module).__module__.startswith("torch.") or isinstance(module, _BatchNorm)
    centre = 0.0 if not own and bool((parameter == 0).all()) else 1.0  # Gemma's is 1 + weight
    parameter.uniform_(centre - 0.5, centre + 0.5)


def _is_constant(parameter: Tensor) -> bool:
    return bool((parameter == parameter.flatten()[0]).all())


SCALES = ("gamma", "scale", "gain", "lambda", "ls1", "ls2", "alpha", "temperature")


def _randomise_constant_(path: str, parameter: Tensor) -> None:
    """Scales around their value, or around one if they start (near) zero; the rest normal."""
    value = float(parameter.flatten()[0]) if _is_constant(parameter) else 0.0
    leaf = path.rpartition(".")[2]
    if abs(value) > 0.01:
        parameter.uniform_(0.5, 1.5).mul_(value)
    elif any(word in leaf for word in SCALES) or (leaf == "weight" and parameter.ndim < 2):
        parameter.uniform_(0.5, 1.5)
    elif parameter.ndim < 2:
        parameter.normal_(0, 0.3)
    else:
        fan_in = parameter[0].numel() if leaf == "weight" else 12
        parameter.normal_(0, max(fan_in, 12) ** -0.5)
