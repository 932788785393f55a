"""What a run tells while it goes, and what it leaves."""

import csv
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from swan_surgery.channels import ChannelMap
from swan_surgery.environment.writing import replacing
from swan_surgery.gates import GatedModel


Row = dict[str, float | int | str]

# Stage -> how its accuracy is told.
TOLD = {
    "dense": "The dense model gets right",
    "halfway": "There it gets right",
    "gated": "With hard gates",
    "pruned": "Right after the cut",
    "finetuned": "Fine-tuned",
    "baseline": "The dense model, trained as long",
}

# What is trained, in order -> how its epochs are told.
TRAINING = {
    "dense": "dense",
    "gated": "weights and gates",
    "finetuned": "fine-tuning",
    "baseline": "dense, as long",
}

_COLUMNS = (
    *("stage", "epoch", "lr", "train_loss", "loss", "accuracy", "hard_macs_share", "open_share"),
)


def write_log(history: Sequence[Row], path: Path) -> None:
    """A line per epoch, as CSV.

    Raises:
        WritingError: the file could not be written.
    """
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(history)


class Silent:
    """The narrator of the processes that are not the first."""

    def say(self, text: str) -> None:
        """Nothing."""

    def epochs(
        self,
        text: str,  # noqa: ARG002 - as every narrator has it
        total: int,  # noqa: ARG002
    ) -> AbstractContextManager[Callable[[str], None]]:
        """Nothing either."""
        return nullcontext(lambda _: None)


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
        gated: the gated model as it was cut, of what a first cut left where there was one; of cuts by scores alone
            the given one, with gates that play no part.
        channels: of the dense model.
        example: the inputs that it was mapped with, [1, C, H, W].
        scores: per stage, accuracy in percent and mean loss on the test images: dense, halfway (after a first
            cut, where there was one), gated (hard gates), pruned (right after the cut), finetuned, and baseline where it was asked for.
        macs, params: of the dense and the smaller model, per image.
        history: a row per epoch.
        probabilities: of the gates, at a few epochs, by name.
        seconds: of all of it, resumed parts included.
    """

    dense: nn.Module
    small: nn.Module
    gated: GatedModel
    channels: ChannelMap
    example: Tensor
    scores: dict[str, dict[str, float]]
    macs: tuple[int, int]
    params: tuple[int, int]
    history: list[Row]
    probabilities: dict[str, Tensor]
    seconds: float
