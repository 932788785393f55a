"""What a run tells while it goes, and what it leaves."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from swan_surgery.gates import GatedModel


Row = dict[str, float | int | str]

# Stage -> how its accuracy is told.
TOLD = {
    "dense": "The dense model gets right",
    "gated": "With hard gates",
    "pruned": "Right after the cut",
    "finetuned": "Fine-tuned",
}

# What is trained, in order -> how its epochs are told.
TRAINING = {"dense": "dense", "gated": "weights and gates", "finetuned": "fine-tuning"}


class Narrator(Protocol):
    """Hears what happens; the command line prints it."""

    def say(self, text: str) -> None:
        """One sentence, before or after a step."""

    def epochs(self, text: str, total: int) -> AbstractContextManager[Callable[[str], None]]:
        """A step of `total` epochs; the function inside is called after each, with a few words."""


@dataclass(slots=True, eq=False)
class Outcome:
    """What a run leaves.

    Attributes:
        dense: the model before gates.
        small: the smaller one, fine-tuned.
        gated: the gated model as it was cut; of a cut by scores the given one, with gates that play no part.
        example: the inputs that it was mapped with, [1, C, H, W].
        scores: per stage, accuracy in percent and mean loss on the test images: dense, gated (hard
            gates), pruned (right after the cut), finetuned.
        macs, params: of the dense and the smaller model, per image.
        history: a row per epoch.
        probabilities: of the gates, at a few epochs, by name.
        seconds: of all of it, resumed parts included.
    """

    dense: nn.Module
    small: nn.Module
    gated: GatedModel
    example: Tensor
    scores: dict[str, dict[str, float]]
    macs: tuple[int, int]
    params: tuple[int, int]
    history: list[Row]
    probabilities: dict[str, Tensor]
    seconds: float
