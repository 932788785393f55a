"""Along which axis the channels of an activation lie: the labels of the channel map say it.

What a convolution or a linear layer made carries labels along one axis, wherever later permutations,
windows and reshapes put it. The axis of the samples is the one that grows with the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from swan_surgery.activations.listening import Heard, listen
from swan_surgery.channels.labels.fields import Fields, axes_of
from swan_surgery.channels.labels.labels import Labels
from swan_surgery.channels.labels.recording import Recording
from swan_surgery.channels.runs.tracing import LabelMode, label_tensors, run_labelled
from swan_surgery.channels.solving.mapping import start_labels
from swan_surgery.models.inputs import Inputs


@dataclass(frozen=True, slots=True)
class Given:
    """What an activation was given: its shape, and the axis of its channels, or why there is none."""

    shape: tuple[int, ...]
    channels: int | None
    why: str = ""


def hear_labelled(
    duplicate: Callable[[], nn.Module],
    inputs: Inputs,
    activations: tuple[str, ...],
    *,
    training: bool,
) -> Heard:
    """Run a stand-in of a model under the channel map's labels; what is noted is a `Given`."""
    model = duplicate().train(training)
    labelled = start_labels(model)
    labels = Labels(Recording())
    labels.keeps_draws = not training
    label_tensors(labels, model, labelled.fields)
    waiting: list[tuple[tuple[int, ...], Fields]] = []

    def note(tensor: Tensor) -> int:
        waiting.append((tuple(tensor.shape), labels.fields(tensor)))
        return len(waiting) - 1

    def run(*args: Any, **kwargs: Any) -> Heard:
        return listen(model, lambda: model(*args, **kwargs), activations=activations, note=note)

    heard: Heard = run_labelled(LabelMode(labels), model, run, inputs.args, inputs.kwargs)
    made = torch.zeros(labelled.num_labels + 1, dtype=torch.bool)
    for contraction in labels.recording.contractions:
        if contraction.is_layer and contraction.produced is not None:
            made[contraction.produced[contraction.produced > 0]] = True
    given = [Given(shape, *_axis(shape, fields, made)) for shape, fields in waiting]
    for index, own in enumerate(heard.met):
        heard.met[index] = replace(own, given=given[own.given])
    return heard


def _axis(shape: tuple[int, ...], fields: Fields, made: Tensor) -> tuple[int | None, str]:
    """The axis along which the outputs of layers lie, or None and why."""
    own = [field for field in fields if bool((field > 0).any())]
    from_layers = [field for field in own if bool(made[field[field > 0]].any())]
    axes = {axes_of(field) for field in from_layers or own}
    axes.discard(())
    if not axes:
        return None, "no channels of a layer are known on what it is given"
    if len(axes) > 1 or len(next(iter(axes))) > 1:
        places = sorted({axis for found in axes for axis in found})
        return None, f"channels lie on several of its axes ({', '.join(map(str, places))})"
    axis = next(iter(axes))[0]
    return (axis, "") if shape[axis] > 1 else (None, "it is given one channel")
