"""`calibrate_switch`: thresholds with a guarantee on the harm, or for a share or a cost.

Learn-then-Test with a fixed sequence of thresholds, from those that route nothing upward (arXiv:2110.01052). The harm
E[1{score <= t} loss] never falls as t rises, and neither does what the sample shows of it: whoever passes the test at t
passes it at every smaller threshold, so the sample's own scores may be the sequence (arXiv:2101.02703, theorem 1).
"""

import warnings
from collections.abc import Iterable
from typing import Any

from swan_surgery.errors import InputError, ModelError, SwanWarning
from swan_surgery.routing.bounds import check_level, least_samples
from swan_surgery.routing.certificate import Certificate
from swan_surgery.routing.finding import Finder, harmed_by, shares_of, ways_of
from swan_surgery.routing.observing import Harm, Observed, observe, weights_digest
from swan_surgery.routing.parts import Ending
from swan_surgery.routing.routed_model import RoutedModel


def calibrate_switch(
    routed: RoutedModel,
    loader: Iterable[Any],
    *,
    harm: float | None = None,
    confidence: float = 0.9,
    share: float | None = None,
    macs: float | None = None,
    loss: Harm | None = None,
) -> Certificate:
    """Set the thresholds of a routed model, in place.

    With `harm=0.01`: P[light wrong where full is right] <= 0.01 over the whole stream of inputs, with probability
    `confidence` over the draw of the loader's samples, for data exchangeable with them: so not the data that the
    switch or the light branch was trained on. Several switches share harm and doubt in equal parts, as do the
    ways of deciding that "auto" chooses from. In gated compression the harm is P[a positive input ends].

    Args:
        routed: the result of `swan.add_switch`, trained or not; it is calibrated in eval mode.
        loader: batches of (inputs, labels), or mappings with "labels"; labels are needed for `harm` without `loss`.
        harm: the most harm, in (0, 1).
        confidence: in (0, 1).
        share: of the inputs that shall leave early; no guarantee.
        macs: mean MACs of an input at most, over the given model's; no guarantee.
        loss: harm of another kind, (light output, full output, labels) -> between 0 and 1 for each sample: bounded
            losses are tested by Hoeffding-Bentkus, zeros and ones by the binomial.

    Returns:
        The certificate, which the routed model keeps (`routed.certificate`, `swan.save`).

    Raises:
        ModelError: not a routed model.
        InputError: not one target, a level out of range, no labels, or fewer samples than the guarantee needs: says how
            many it takes.
        BudgetError: the MACs cannot be met.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> routed = swan.add_switch(net, "1", example_inputs=torch.randn(4, 3), light=0.5)
        >>> x = torch.randn(500, 3)
        >>> found = swan.calibrate_switch(routed, [(x, net(x).argmax(1))], harm=0.05)
        >>> found.bound <= 0.05
        True
    """
    if not isinstance(routed, RoutedModel):
        raise ModelError(
            f"expected a routed model, got {type(routed).__name__}; call swan.add_switch first"
        )
    targets = {"harm": harm, "share": share, "macs": macs}
    asked = {name: value for name, value in targets.items() if value is not None}
    if len(asked) != 1:
        raise InputError(
            f"say what to calibrate for: one of harm=, share=, macs=; got {', '.join(asked) or 'none'}"
        )
    ((target, value),) = asked.items()
    check_level(target, value)
    check_level("confidence", confidence)
    if loss is not None and not callable(loss):
        raise InputError(f"loss must be a function of (light, full, labels); got {loss!r}")
    observed = observe(routed, loader, harm=loss)
    if target == "harm":
        _check_harm(observed, routed, value, confidence)
    finder = Finder(routed, observed)
    if target == "harm":
        best = finder.for_harm(value, 1 - confidence)
    elif target == "share":
        best = finder.for_share(value)
    else:
        best = finder.for_macs(value)
    decide, thresholds, bound = best
    shares = shares_of(observed, decide, thresholds)
    certificate = Certificate(
        target=target,
        asked=value,
        confidence=confidence if target == "harm" else 0.0,
        decide=tuple(decide),
        thresholds=tuple(thresholds),
        samples=observed.num_samples,
        harmed=harmed_by(observed, decide, thresholds),
        bound=bound,
        shares=(*shares, 1 - sum(shares)),
        macs=finder.costs(decide).expected(shares, thresholds) / finder.costs(decide).given,
        data=observed.data,
        model=weights_digest(routed.body),
    )
    if not any(shares):
        warnings.warn(
            f"no sample leaves early: {certificate}; train the light branch and the switch longer, ask for more harm, "
            f"or give more samples",
            SwanWarning,
            stacklevel=2,
        )
    routed.decide = list(decide)
    routed.thresholds = list(thresholds)
    routed.certificate = certificate
    return certificate


def _check_harm(observed: Observed, routed: RoutedModel, harm: float, confidence: float) -> None:
    if observed.harm is None:
        endings = any(isinstance(own.light, Ending) for own in routed.parts.chain)
        if endings and routed.positive is None:
            raise InputError(
                "the harm of gated compression is that a positive input ends, and nothing says which are positive: "
                "pass positive=lambda labels: ... to swan.add_switch, or loss=lambda light, full, labels: ..."
            )
        raise InputError(
            "harm is what the light branch gets wrong where the full one is right, and that needs labels of classes, a "
            "tensor of whole numbers, one for every position of the only output, class scores [B, C, ...] or [B, ..., C]: "
            "give batches of (inputs, labels), or loss=lambda light, full, labels: ... between 0 and 1; share= and macs= "
            "need none"
        )
    ways = len(ways_of(routed, observed, 0))
    each, delta = harm / routed.num_switches, (1 - confidence) / (routed.num_switches * ways)
    least = least_samples(each, delta, counts=observed.counts)
    if observed.num_samples < least:
        raise InputError(
            f"{observed.num_samples} samples cannot show that the harm is at most {harm:g} with confidence "
            f"{confidence:g}: even without a single harmed one it takes {least}"
        )


__all__ = ["calibrate_switch"]
