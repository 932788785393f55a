"""The routed model: easy inputs leave by the light branch, the batch is split and put in order again."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from swan_surgery.environment.notebooks import html_table
from swan_surgery.errors import InputError, ModelError
from swan_surgery.gates import GatedModel, acting_gates
from swan_surgery.models import Inputs
from swan_surgery.routing.arguments import check_kinds, checked_thresholds
from swan_surgery.routing.fronts import Front, fronts_of
from swan_surgery.routing.losses import (
    Discrepancy,
    DiscrepancyName,
    discrepancy_of,
    name_unsynchronised,
    per_sample,
    positives_of,
    switch_loss,
)
from swan_surgery.routing.parts import Ending, Parts
from swan_surgery.routing.rows import (
    arguments_of,
    detached,
    labels_of,
    learning_,
    leaving,
    margin_score,
    merged,
    rows_of,
    run_branch,
)


Decide = Literal["predicted", "margin", "label", "auto"]
MASKED = "the mask's gates act in all parts; cut it first: swan.cut_mask(routed)"
_HEADER = ("switch behind", "decides by", "threshold")


class RoutedModel(nn.Module):
    """A model with one or several short ways; made by `swan.add_switch`, trained by `loss`, set by `calibrate_switch`.

    Until its thresholds are set every input takes the full way, and the outputs are bitwise the given model's.

    Attributes:
        body: the parts, or the gated model of them where a mask is learned.
        after: the modules behind which the switches stand, in order.
        decide: how each switch decides: "predicted" (by the switch, before the light branch runs), "margin" (by the
            light branch's own confidence, after it), "label" (by the switch, trained on labels).
        certificate: what `calibrate_switch` found, with what it was found on.
        discrepancy: how far two outputs are apart, by name or a function of (light, full) -> [B].
        positive: Omega of gated compression: labels -> bool [B], True for what must not be stopped.
        example_inputs: those of `add_switch`.
        way: how the model was cut in parts.
        frozen: trunk and full branch are not trained: no gradients, and always in eval mode.
    """

    comes_last: ClassVar[str] = (
        "has a switch: gate, cut and swap the model first, then add the switch (mask=True gates what crosses, as "
        "routed.gated)"
    )

    def __init__(
        self,
        body: Parts | GatedModel,
        *,
        after: Sequence[str],
        decide: Sequence[Decide],
        example_inputs: Inputs,
        way: Sequence[str],
        discrepancy: DiscrepancyName | Discrepancy,
        positive: Callable[[Any], Tensor] | None = None,
        frozen: bool = True,
    ) -> None:
        super().__init__()
        self.body = body
        self.after, self.way = tuple(after), tuple(way)
        self.decide = list(decide)
        self.thresholds = [float("-inf")] * len(self.after)
        self.certificate: Any = None
        self.example_inputs = example_inputs
        self.discrepancy, self.positive, self.frozen = discrepancy, positive, frozen

    @property
    def parts(self) -> Parts:
        """Trunk, switch and branches as one module that runs them all."""
        body = self.body
        return cast(Parts, body.model if isinstance(body, GatedModel) else body)

    @property
    def gated(self) -> GatedModel:
        """The gated model of all parts, whose gates are the mask: for `swan.Objective`, `swan.importance` and so on.

        Raises:
            ModelError: no mask was asked for.
        """
        if not isinstance(self.body, GatedModel):
            raise ModelError("the routed model has no mask; pass mask=True to swan.add_switch")
        return self.body

    @property
    def num_switches(self) -> int:
        """How many there are; nested ones lie behind each other."""
        return len(self.after)

    @property
    def thresholds(self) -> list[float]:
        """One per switch: an input whose score is at most this leaves by the light branch."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, given: Sequence[float]) -> None:
        self._thresholds = checked_thresholds(given, self.num_switches)

    def train(self, mode: bool = True) -> "RoutedModel":  # noqa: FBT001, FBT002 - as nn.Module has it
        """As `nn.Module.train`, but what is frozen stays in eval mode."""
        super().train(mode)
        if self.frozen:
            for own in self.parts.chain:
                own.trunk.eval()
            self.parts.last.eval()
        return self

    def unfreeze(self) -> "RoutedModel":
        """Let trunk and full branch be trained, too; returns the model."""
        self.frozen = False
        learning_(self.parts)
        return self.train(self.training)

    @contextmanager
    def acting(self) -> Iterator[Parts]:
        """The parts, with the mask acting on them inside the block."""
        own = self.body
        with acting_gates(own) if isinstance(own, GatedModel) else nullcontext(own) as parts:
            yield cast(Parts, parts)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the given model: the batch is split, both parts run densely, the order is restored."""
        with self.acting() as parts:
            check_kinds(parts.trunk, self.example_inputs, args, kwargs)
            return self._from(parts.chain, 0, parts.trunk(*args, **kwargs))

    def _from(self, chain: Sequence[Parts], level: int, crossing: Tensor) -> Any:
        own = chain[level]
        if self.thresholds[level] == float("-inf"):
            return self._behind(chain, level, crossing)
        score, light = self.score(own, level, crossing)
        is_easy = leaving(score, self.thresholds[level])
        easy, hard = is_easy.nonzero()[:, 0], is_easy.logical_not().nonzero()[:, 0]
        if not len(easy):
            return self._behind(chain, level, crossing)
        if not len(hard):
            return run_branch(own.light, crossing) if light is None else light
        behind = self._behind(chain, level, crossing.index_select(0, hard))
        if light is None:
            light = run_branch(own.light, crossing.index_select(0, easy))
        else:
            light = rows_of(light, easy)
        return merged(light, behind, torch.cat([easy, hard]))

    def _behind(self, chain: Sequence[Parts], level: int, crossing: Tensor) -> Any:
        if level + 1 == len(chain):
            return run_branch(chain[level].full, crossing)
        return self._from(chain, level + 1, run_branch(chain[level + 1].trunk, crossing))

    def score(self, own: Parts, level: int, crossing: Tensor) -> tuple[Tensor, Any]:
        """How hard each input is by the decision in force, [B]; and the light branch's output if that ran."""
        if self.decision(level) != "margin":
            return own.switch(crossing), None
        light = run_branch(own.light, crossing)
        return margin_score(light), light

    def decision(self, level: int) -> Decide:
        """How a switch decides; "auto", until `calibrate_switch` chose, is the margin where outputs are class scores."""
        found = self.decide[level]
        if found != "auto":
            return found
        return "margin" if self.discrepancy == "kl" else "predicted"

    def loss(
        self,
        batch: Any,
        *,
        alpha: float = 1.0,
        beta: float = 0.0,
        task: Callable[[Any, Any], Tensor] | None = None,
        run: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Eq. 5: alpha (L_switch + L_light) + beta L_mask, summed over the switches; whole batches, nothing is routed.

        Eq. 3: the switch regresses the discrepancy of the branches; Eq. 4: the light branch comes nearer to the full
        one's output; Eq. 2: the mean probability of the mask's gates. In gated compression Eq. 3 is the binary cross
        entropy of `positive(labels)`.

        Args:
            batch: a tensor, (inputs, labels, ...), or a mapping of keyword arguments.
            alpha: weight of Eq. 3 and 4.
            beta: weight of Eq. 2; needs a mask.
            task: (output, batch) -> a scalar loss of the user's, added for the light branches, and for the full one
                where it is trained.
            run: what runs the parts in place of `routed.body`: that in DistributedDataParallel, or compiled.

        Raises:
            InputError: no labels in gated compression, or beta without a mask.
        """
        if beta and not isinstance(self.body, GatedModel):
            raise InputError(
                "beta weighs the mask, and there is none: pass mask=True to swan.add_switch"
            )
        args, kwargs = arguments_of(batch, self.device)
        check_kinds(self.parts.trunk, self.example_inputs, args, kwargs)
        if run is None:
            name_unsynchronised()
        full, lights, predicted = (run or self.body)(*args, **kwargs)
        target = detached(full)
        terms: list[Tensor] = []
        for own, light, value in zip(self.parts.chain, lights, predicted, strict=True):
            terms.append(alpha * self._switch_terms(own, light, target, value, batch))
            if task is not None and not isinstance(own.light, Ending):
                terms.append(task(light, batch))
        if task is not None and not self.frozen:
            terms.append(task(full, batch))
        if isinstance(self.body, GatedModel):
            terms.append(beta * self.body.gates.probabilities().mean())
        return torch.stack([term.float() for term in terms]).sum()

    def _switch_terms(
        self, own: Parts, light: Any, full: Any, predicted: Tensor, batch: Any
    ) -> Tensor:
        if isinstance(own.light, Ending):
            wanted = self.positives(batch)
            return nn.functional.binary_cross_entropy_with_logits(predicted, wanted.to(predicted))
        apart = self.discrepancies(light, full)
        return switch_loss(own.switch, predicted, apart) + apart.mean()

    def discrepancies(self, light: Any, full: Any) -> Tensor:
        """How far two outputs are apart, per sample, [B]."""
        function = discrepancy_of(self.discrepancy, full)
        batch = next(t.shape[0] for t in tree_flatten(full)[0] if isinstance(t, Tensor))
        return per_sample(function(light, full), batch, "discrepancy")

    def positives(self, batch: Any) -> Tensor:
        """Omega of a batch's labels, bool [B].

        Raises:
            InputError: no labels, or no `positive=`.
        """
        return positives_of(labels_of(batch), self.positive).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the parts lie."""
        return next((t.device for t in self.parts.parameters()), torch.device("cpu"))

    def split(self) -> tuple[Front, ...]:
        """The parts as modules of their own, to lie on different devices, one entry per switch; they share weights.

        The front of a nested switch takes what crosses at the one before, and the full branch of an outer one is
        what the inner entries hold.

        Raises:
            ModelError: the mask's gates are still in: `swan.cut_mask(routed)` first.
        """
        if isinstance(self.body, GatedModel):
            raise ModelError(MASKED)
        return fronts_of(self.parts, self.crossing_bytes())

    def crossing_bytes(self) -> tuple[int, ...]:
        """Bytes that cross at each switch for one sample, at the example inputs' size; a closed mask is not sent."""
        return tuple(t[0].numel() * t.element_size() for t in self.crossings())

    def crossings(self) -> list[Tensor]:
        """What crosses at each switch on the example inputs."""
        return self.parts.crossings(self.own_inputs())

    def own_inputs(self) -> Inputs:
        """The example inputs on the model's device and in its floating-point type."""
        return self.example_inputs.fitting(self.parts)

    def _switches(self) -> list[tuple[str, str, str]]:
        return [
            (name, self.decision(level), f"{self.thresholds[level]:.4g}")
            for level, name in enumerate(self.after)
        ]

    def _repr_html_(self) -> str:
        notes = [] if self.certificate is None else [str(self.certificate)]
        return html_table("RoutedModel", _HEADER, self._switches(), notes=notes)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return ", ".join(f"after {name!r}: {way} <= {at}" for name, way, at in self._switches())


__all__ = ["MASKED", "Decide", "RoutedModel"]
