"""From a name on the command line to a model with random weights and its example inputs."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.environment.extras import named_function, needed_from
from swan_surgery.errors import InputError
from swan_surgery.models import Inputs, as_inputs
from swan_surgery.models.checks import described, infer_inputs


_TORCHVISION, _TIMM = "torchvision:", "timm:"
# They draw every weight with scipy; the values do not matter here.
_SLOW_TO_INITIALISE = ("googlenet", "inception_v3")
# With random weights a detector finds nothing above its thresholds, and what follows never runs.
_FIND_SOMETHING = {
    "box_score_thresh": 0.0,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_test": 20,
}
_FIND_SOMETHING_DENSELY = {"score_thresh": 0.0, "topk_candidates": 50}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is inspected.

    Attributes:
        model: in eval mode, on the meta device where it could be built there.
        inputs: example inputs that come with it, if any.
        takes_images: its one argument is a list of images, as torchvision's detectors want it.
    """

    model: nn.Module
    inputs: Inputs | None = None
    takes_images: bool = False


def build_model(name: str, *, with_data: bool = False, classes: int | None = None) -> Subject:
    """A torchvision model (`torchvision:` in front or not), a timm model, or what a factory returns.

    A factory may return a model, or a model and its example inputs. Weights are never loaded.
    Models are built on the meta device where they can be, so that size does not matter; `with_data`
    builds them with random weights. `classes` is the number of outputs of torchvision's and timm's
    models; by default their own.

    Raises:
        InputError: no such model or factory, the factory fails, or timm is not installed.
    """
    if name.startswith(_TIMM):
        return _timm_model(name.removeprefix(_TIMM), with_data=with_data, classes=classes)
    if ":" in name and not name.startswith(_TORCHVISION):
        return _from_factory(name)
    if name.endswith(".py"):
        return _from_factory(name)  # which says how a file is named
    wanted = name.removeprefix(_TORCHVISION)
    known = _torchvision().models.list_models()
    if wanted in known:
        return _torchvision_model(wanted, with_data=with_data, classes=classes)
    raise InputError(
        f"no model {name!r}; {_nearest(wanted, known, 'torchvision')}; your own: "
        f"package.module:factory"
    )


def _nearest(wanted: str, known: list[str], library: str) -> str:
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    return f"nearest {library} names: {', '.join(near)}" if near else f"see {library}'s models"


def _torchvision() -> Any:
    """Only where one of its models is wanted: importing it takes half as long as torch again."""
    with needed_from("cli"):
        try:
            return import_module("torchvision")
        except RuntimeError as err:  # an operator is missing: its binary is of another torch
            raise InputError(
                f"torchvision cannot be imported beside torch {torch.__version__} ({err}); the two have to be "
                f"of one release and one build (CPU or CUDA): install both in one pip command, from one index"
            ) from err


def _torchvision_model(name: str, *, with_data: bool, classes: int | None) -> Subject:
    models = _torchvision().models
    builder = models.get_model_builder(name)
    known = inspect.signature(builder).parameters
    options: dict[str, Any] = {"weights": None}
    if classes is not None:
        options["num_classes"] = classes
    # A segmentation or detection model would download its backbone by default.
    if "weights_backbone" in known:
        options["weights_backbone"] = None
    if name in _SLOW_TO_INITIALISE:
        options["init_weights"] = False
    if not hasattr(models.detection, name):
        return Subject((_on_cpu if with_data else _on_meta)(lambda: builder(**options)))
    options |= _FIND_SOMETHING if "rcnn" in name else _FIND_SOMETHING_DENSELY
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, 320, 320, generator=generator)
    # Which boxes it finds decides what runs: it needs data, the same every time.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = builder(**options)
    return Subject(model.eval(), Inputs(([image],), {}), takes_images=True)


def _timm_model(name: str, *, with_data: bool, classes: int | None) -> Subject:
    try:
        timm = import_module("timm")
    except ImportError as err:
        raise InputError(f"timm is not installed ({err}); pip install timm") from err
    known: list[str] = timm.list_models()
    if name.partition(".")[0] not in known:
        raise InputError(f"no model {_TIMM + name!r}; {_nearest(name, known, 'timm')}")
    options = {} if classes is None else {"num_classes": classes}
    build = _on_cpu if with_data else _on_meta
    model = build(lambda: timm.create_model(name, pretrained=False, **options))
    shape = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if shape is None:
        return Subject(model)
    return Subject(model, Inputs((_tensor([1, *shape], torch.float32, model),), {}))


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Without data where that is possible: positions to look up are data that the map needs."""
    try:
        with torch.device("meta"):
            model = build()
    except (RuntimeError, NotImplementedError):  # it reads a value while it is built
        return _on_cpu(build)
    return _on_cpu(build) if _looks_up(model) else model.eval()


def _looks_up(model: nn.Module) -> bool:
    return any(t.numel() > 1 and not t.is_floating_point() for t in model.buffers())


def _on_cpu(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        return build().eval()


def _from_factory(name: str) -> Subject:
    factory = named_function(name)
    try:
        made = factory()
    except Exception as err:
        raise InputError(f"{name} failed: {type(err).__name__}: {err}") from err
    model, inputs = made, None
    if isinstance(made, tuple) and len(made) == 2:
        model = made[0]
        try:
            inputs = as_inputs(made[1])
        except InputError as err:
            raise InputError(
                f"{name} returned a model and {type(made[1]).__name__}: example inputs are a tensor, a tuple of "
                f"arguments or a dict of keyword arguments"
            ) from err
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{name} returned {type(made).__name__}, not a torch.nn.Module or (model, example_inputs)"
        )
    return Subject(model, inputs)


def guesses(model: nn.Module, name: str) -> list[Inputs]:
    """Example inputs that the first layer suggests, the best guess first.

    Raises:
        InputError: it suggests none; says what to pass.
    """
    try:
        return infer_inputs(model)
    except InputError as err:
        raise InputError(
            f"no input shape can be guessed for {name}: its first layer is neither a 2-d convolution "
            f"nor linear; pass one, like --input 1,3,224,224, or --input 1,16:int64 for token ids, once per input, "
            f"or name a factory (package.module:function) that returns (model, inputs)"
        ) from err


def misfit(model: nn.Module, guess: Inputs, err: Exception) -> InputError:
    """What is said where the model does not run on inputs that were guessed for it."""
    return InputError(
        f"{type(model).__name__} does not run on the inputs guessed for it, {described(guess)}; pass the shape "
        f"that it takes, like --input 1,3,32,32, or name a factory (package.module:function) that returns (model, "
        f"inputs) ({type(err).__name__}: {err})"
    )


def parse_inputs(texts: list[str], subject: Subject) -> Inputs | None:
    """Tensors of the shapes given as `1,3,224,224`, `1x3x224x224` or, for token ids, `1,16:int64`.

    Without a type they have the model's. Integers are zeros. A model that takes a list of images gets
    one image per shape. None where no text is given: what comes with the model is used then.

    Raises:
        InputError: not a shape, or not a type.
    """
    if not texts:
        return subject.inputs
    reference = next((p for p in subject.model.parameters() if p.is_floating_point()), None)
    own = torch.float32 if reference is None else reference.dtype
    found = []
    for text in texts:
        numbers, _, kind = text.partition(":")
        dtype = getattr(torch, kind, None) if kind else own
        try:
            shape = [int(part) for part in numbers.replace("x", ",").split(",")]
        except ValueError:
            shape = [0]
        if min(shape) < 1 or not isinstance(dtype, torch.dtype):
            raise InputError(
                f"--input {text!r} is not a shape; write it like 1,3,224,224 or 1,16:int64"
            )
        found.append(_tensor(shape, dtype, subject.model))
    return Inputs((found,), {}) if subject.takes_images else Inputs(tuple(found), {})


def _tensor(shape: list[int], dtype: torch.dtype, model: nn.Module) -> Tensor:
    """Without data where the model has none either; integers may be positions to look up."""
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    if any(parameter.is_meta for parameter in model.parameters()):
        return torch.empty(shape, dtype=dtype, device="meta")
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
