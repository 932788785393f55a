"""What notebooks show of models, reports, explanations, latencies and sensitivities."""

import xml.etree.ElementTree as ET

import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.environment.notebooks import html_table
from tests.closing import learnt_
from tests.test_plan import mlp


def cells(html: str) -> list[list[str]]:
    """The rows of all tables; fails where the HTML is not well formed."""
    root = ET.fromstring(f"<div>{html}</div>")  # noqa: S314 - our own
    return [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]


def test_names_of_the_user_are_text() -> None:
    assert cells(html_table("<b>", ["&"], [["<script>"]], notes=["<i>"]))[1] == ["<script>"]


def test_a_gated_model_and_its_explanation() -> None:
    gated = mlp(3, 8, 2)
    gated.close("0", [1, 2, 3])
    rows = cells(gated._repr_html_())
    assert rows[1:] == [["0", "8", "5 of 8", "5"], ["1", "2", "no gates", "2"]]
    explained = cells(gated.channels.explain()._repr_html_())
    assert explained[1][:2] == ["0", "linear 3 -> 8, 8 gated by 8 units"]


def test_a_report_and_a_latency() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    report = swan.report(net, swan.prune(learnt_(swan.swanify(net)), macs=0.5), torch.zeros(1, 3))
    rows = cells(report._repr_html_())
    assert next(row for row in rows if row[0] == "parameters")[1:] == ["50", "26", "52.0 %"]
    assert ["0", "3", "8 -> 4"] in [row[:3] for row in rows]
    measured = swan.measure_latency(net, torch.zeros(4, 3), seconds=0.01)
    assert cells(measured._repr_html_())[1][:2] == ["eager", "4"]


def test_sensitivity_is_darker_where_it_hurts_more() -> None:
    gated = mlp(3, 8, 8, 2)
    x = torch.randn(16, 3)
    wanted = gated.eval()(x).detach()
    found = swan.sensitivity(gated, [x], loss=lambda m, x: (m(x) - wanted).square().mean())
    html = found._repr_html_()
    assert len(cells(html)) == 1 + len(found.groups)
    assert html.count("rgba(214,84,56,0.70)") == 1  # the worst alone is darkest


def test_an_objective_prints_its_budget_and_state() -> None:
    gated = mlp(3, 8, 2)
    objective = swan.Objective(gated, macs=0.5)
    assert "macs: 100.0% now, 50.0% asked for" in repr(objective)
    objective(1.0)
    assert repr(objective).splitlines()[1:] == [
        "  macs: 50.0% now, 50.0% asked for",
        "  open units: 4 of 8",
    ]
