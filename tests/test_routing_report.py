"""What was found of a routed model as text, markdown, HTML and charts: every figure there, no label on an axis."""

import re
from itertools import combinations

import pytest
import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.reporting import charts
from tests.test_notebooks import cells
from tests.test_page import read
from tests.test_routing_places import batches, net


X = torch.cat(batches(8))


def told() -> nn.Module:
    """Scores that are apart, and not all of one class."""
    model = net()
    with torch.no_grad():
        model[-1].bias.sub_(model(X).mean(0))
        model[-1].weight.mul_(100)
        model[-1].bias.mul_(100)
    return model


LABELS = told()(X).argmax(1)


@pytest.fixture(scope="module")
def routed() -> swan.RoutedModel:
    made = swan.add_switch(told(), ["2", "5"], example_inputs=X[:4], light=0.5, decide="margin")
    swan.calibrate_switch(made.eval(), [(X, LABELS)], harm=0.3)
    return made


@pytest.fixture(scope="module")
def stats(routed) -> swan.RouteStats:
    return swan.route_stats(routed, list(zip(X.split(50), LABELS.split(50), strict=True)))


@pytest.fixture(scope="module")
def scan():
    return swan.scan_switches(net(), batches(2), after=["2", "11"], light=0.1, decide="margin")


def test_a_curve_is_of_those_who_reach_the_switch_in_the_order_of_their_scores(routed):
    stats = swan.route_stats(routed, [X])
    with torch.no_grad():
        full, lights, _ = routed.parts(X)
        score = routed.score(routed.parts, 0, routed.parts.trunk(X))[0]
    first, second = stats.curves
    assert (first.reached, second.reached) == (len(X), round(len(X) * (1 - stats.shares[0])))
    assert first.left == pytest.approx(stats.shares[0])
    assert second.left * second.reached == pytest.approx(stats.shares[1] * len(X))
    apart = routed.discrepancies(lights[0], full)[score.argsort(stable=True)]
    assert len(first.bins) == 40
    parts = apart.tensor_split(40)
    assert [middle for _, middle, _ in first.bins] == pytest.approx(
        [float(part.quantile(0.5)) for part in parts]
    )
    assert all(low <= middle <= high for low, middle, high in first.bins)
    assert stats.batch == len(X)


def test_the_report_has_every_figure(stats, scan) -> None:
    html, markdown = stats.to_html(scan=scan), stats.to_markdown(scan=scan)
    reader = read(html)
    assert not any(tag in ("script", "link", "img", "iframe") for tag, _ in reader.tags)
    for text in (reader.text, markdown):
        for wanted in (
            f"{stats.shares[0]:.1%}",
            f"{stats.harm:.2%}",
            f"<= {stats.certificate.bound:.2%} with confidence 0.9",
            f"{stats.p95_ms:.3f}",
            f"{stats.full_p95_ms:.3f}",
            f"{stats.accuracy[1]:.2%}",
            f"{scan[0].apart:.3g}",
            "no switch can stand there",
            "torch threads",
        ):
            assert wanted in text, wanted
    assert len([tag for tag, own in reader.tags if own.get("class") == "plot"]) == 2
    bars = [own["aria-label"] for tag, own in reader.tags if own.get("class") == "bars"]
    assert bars == [f"{scan[0].apart:.3g} apart"]


def test_notebooks_show_the_figures_the_places_and_the_switches(routed, stats, scan) -> None:
    assert ["harm", f"{stats.harm:.2%} (<= {stats.certificate.bound:.2%} with confidence 0.9)"] in [
        row[:2] for row in cells(stats._repr_html_())
    ]
    assert cells(scan._repr_html_())[1][:2] == ["2", f"{scan[0].apart:.3g}"]
    rows = cells(routed._repr_html_())
    assert [row[0] for row in rows[1:]] == ["2", "5"]
    assert rows[1][1] == "margin"
    assert str(scan) == "\n".join(str(place) for place in scan)


def test_a_certificate_of_other_weights_or_thresholds_is_not_shown(routed) -> None:
    kept = routed.thresholds
    try:
        routed.thresholds = [threshold / 2 for threshold in kept]
        found = swan.route_stats(routed, [(X, LABELS)])
    finally:
        routed.thresholds = kept
    assert found.certificate is None
    assert "without a guarantee" in found.to_markdown()
    assert "no certificate is in force" in found.to_html()
    weight = routed.parts.switch.out.weight
    with torch.no_grad():
        weight.mul_(2)
        assert swan.route_stats(routed, [X]).certificate is None
        weight.div_(2)
        assert swan.route_stats(routed, [X]).certificate is not None


def boxes_of(svg: str) -> list[tuple[float, float, float, float]]:
    """Of every text: left, top, right and bottom, at 12 units, a letter at most 7.2 wide."""
    found = []
    for x, y, anchor, text in re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">([^<]*)</text>', svg
    ):
        wide = 7.2 * len(text)
        left = float(x) - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        found.append((left, float(y) - 10, left + wide, float(y) + 3))
    return found


@pytest.mark.parametrize("mark", [0.0, 0.07, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("top", [1.234e-05, 0.5, 123456.0])
def test_no_label_lies_on_an_axis_on_another_or_outside(mark: float, top: float) -> None:
    svg = charts.ordered(
        "behind layer1", [(0.0, top / 3, top), (0.0, top / 2, top)], mark,
        ("samples, lowest score first", "threshold"),
    )  # fmt: skip
    wide, high = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    lines = [
        tuple(map(float, line))
        for line in re.findall(
            r'<line class="\w+" x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)" y2="([\d.]+)"/>', svg
        )
    ]
    boxes = boxes_of(svg)
    assert (len(boxes), len(lines)) == (7, 3)
    for left, above, right, below in boxes:
        assert left >= 0
        assert right <= wide
        assert above >= 0
        assert below <= high
        for x1, x2, y1, y2 in lines:
            assert right <= x1 or left >= x2 or below <= y1 or above >= y2
    for one, two in combinations(boxes, 2):
        assert one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
    assert wide <= 420  # a unit is a pixel on a narrow screen
    place = float(re.search(r'class="mark" x1="([\d.]+)"', svg)[1])
    start, end = lines[0][:2]
    assert place == pytest.approx(start + mark * (end - start), abs=0.1)
