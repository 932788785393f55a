"""What a routed model is besides its parts, as plain data: for files."""

import math
from collections.abc import Callable, Mapping
from typing import Any, get_args

from torch import Tensor, nn

from swan_surgery.errors import ArtifactError, InputError
from swan_surgery.gates import GatedModel
from swan_surgery.models.input_records import inputs_of_json, inputs_to_json, plain_inputs
from swan_surgery.routing.certificate import Certificate
from swan_surgery.routing.losses import DISCREPANCIES, Discrepancy
from swan_surgery.routing.parts import Parts
from swan_surgery.routing.routed_model import Decide, RoutedModel


OWN = "own"


def routing_to_json(routed: RoutedModel) -> dict[str, Any]:
    """Everything but the parts.

    Raises:
        InputError: example inputs that no file can hold.
    """
    if not plain_inputs(routed.example_inputs):
        raise InputError(
            "the example inputs of the routed model hold what is no tensor, number or text"
        )
    certificate: Certificate | None = routed.certificate
    return {
        "after": list(routed.after),
        "way": list(routed.way),
        "decide": list(routed.decide),
        # JSON knows no infinity.
        "thresholds": [str(threshold) for threshold in routed.thresholds],
        "discrepancy": routed.discrepancy if isinstance(routed.discrepancy, str) else OWN,
        "positive": routed.positive is not None,
        "frozen": routed.frozen,
        "inputs": inputs_to_json(routed.example_inputs),
        "training": routed.training,
        "certificate": None if certificate is None else _jsoned(certificate),
    }


def _jsoned(certificate: Certificate) -> dict[str, Any]:
    return {**certificate.to_json(), "thresholds": [str(t) for t in certificate.thresholds]}


def own_discrepancy(routed: RoutedModel) -> Discrepancy | None:
    """The function of the user's, if it is one."""
    return None if isinstance(routed.discrepancy, str) else routed.discrepancy


def routed_of_json(
    data: Mapping[str, Any],
    body: nn.Module,
    *,
    discrepancy: Discrepancy | None,
    positive: Callable[[Any], Tensor] | None,
) -> RoutedModel:
    """The routed model of parts and what `routing_to_json` gave.

    Args:
        data: from a file.
        body: the parts, gated or not.
        discrepancy: a function of the user's, where it was saved with one.
        positive: likewise.

    Raises:
        ArtifactError: data that no routed model has.
    """
    parts = body.model if isinstance(body, GatedModel) else body
    if not isinstance(parts, Parts) or len(parts.chain) != len(data["after"]):
        raise ArtifactError("the file describes a routed model, and its parts are not those of one")
    decide = [_decide(way) for way in data["decide"]]
    known: Any = data["discrepancy"]
    _check_given("discrepancy", discrepancy, was_own=known == OWN)
    _check_given("positive", positive, was_own=bool(data.get("positive", False)))
    if known != OWN and known not in DISCREPANCIES:
        raise ArtifactError(f"the file names a discrepancy {known!r}, which there is not")
    modes = [(module, module.training) for module in body.modules()]
    routed = RoutedModel(
        body,  # type: ignore[arg-type]  # told apart above
        after=[str(name) for name in data["after"]],
        decide=decide,
        example_inputs=inputs_of_json(data["inputs"]),
        way=[str(way) for way in data["way"]],
        discrepancy=discrepancy if known == OWN and discrepancy is not None else known,
        positive=positive,
        frozen=bool(data["frozen"]),
    )
    routed.thresholds = [float(threshold) for threshold in data["thresholds"]]
    if len(routed.thresholds) != len(routed.after) or any(map(math.isnan, routed.thresholds)):
        raise ArtifactError("the file holds other thresholds than the routed model has switches")
    if data["certificate"] is not None:
        own = dict(data["certificate"])
        own["thresholds"] = [float(threshold) for threshold in own["thresholds"]]
        routed.certificate = Certificate.from_json(own)
    routed.training = bool(data["training"])
    for module, training in modes:
        module.training = training
    return routed


def _check_given(name: str, given: object, *, was_own: bool) -> None:
    """A function that no file can hold is asked for.

    Raises:
        ArtifactError: it was not given.
    """
    if was_own and given is None:
        raise ArtifactError(
            f"the routed model was saved with a function of your own, {name}=, which no file can hold: pass it, as in "
            f"swan.load(path, model, {name}=...)"
        )


def _decide(way: object) -> Decide:
    for known in get_args(Decide):
        if known == way:
            own: Decide = known
            return own
    raise ArtifactError(f"the file names a way to decide {way!r}, which there is not")


__all__ = ["OWN", "own_discrepancy", "routed_of_json", "routing_to_json"]
