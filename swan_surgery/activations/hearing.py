"""What the activations of a model are given, in both modes, on a shell or, where values decide, on data."""

from collections.abc import Sequence

from torch import nn

from swan_surgery.activations.axes import hear_labelled
from swan_surgery.activations.listening import Heard
from swan_surgery.errors import TraceError
from swan_surgery.models import Inputs, copy_of, doubled, shell_of
from swan_surgery.models.slim_attention import write_out_


def hear(
    model: nn.Module,
    inputs: Inputs,
    activations: tuple[str, ...],
    *,
    modes: Sequence[bool] = (False, True),
) -> dict[bool, Heard]:
    """What is heard in each mode (training or not) that runs; training is given twice the batch.

    Batch-norm wants two samples there.
    """
    heard: dict[bool, Heard] = {}
    for training in modes:
        own = inputs.map(doubled) if training else inputs
        try:
            heard[training] = _heard(model, own, activations, training=training)
        except Exception:  # noqa: BLE001, S112 - models refuse a mode or a batch in all sorts of ways
            continue
    return heard


def raise_for(model: nn.Module, inputs: Inputs) -> None:
    """Run a model in eval mode again and say why it cannot be.

    Raises:
        TraceError: always, of what does not run.
    """
    try:
        _heard(model, inputs, (), training=False)
    except Exception as err:
        first = (str(err).splitlines() or [""])[0]
        raise TraceError(
            f"{type(model).__name__} could not be run on the example inputs: {type(err).__name__}: "
            f"{first}"
        ) from err


def _heard(
    model: nn.Module, inputs: Inputs, activations: tuple[str, ...], *, training: bool
) -> Heard:
    try:
        return hear_labelled(
            lambda: write_out_(shell_of(model)), inputs.on_meta(), activations, training=training
        )
    except Exception:  # noqa: BLE001 - values decide the path: it runs on data
        return hear_labelled(
            lambda: write_out_(copy_of(model)), inputs, activations, training=training
        )
