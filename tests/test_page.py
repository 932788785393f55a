"""The report as a page: everything in one file, nothing from the network, every number there."""

import dataclasses
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from torch import nn

import swan_surgery as swan
from swan_surgery.reporting import charts


VOID = ("meta", "rect", "line", "circle", "polyline", "br")


class Reader(HTMLParser):
    """Tags that are closed in order, and all the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data) -> None:
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 1))


@pytest.fixture(scope="module")
def report():
    return swan.report(net(16), net(4), torch.randn(2, 3, 8, 8), evaluate=lambda _: 91.5, unit="%")


@pytest.fixture(scope="module")
def gated():
    return swan.swanify(net(16), torch.randn(2, 3, 8, 8))


def test_nothing_comes_from_the_network_and_nothing_runs(report) -> None:
    html = report.to_html()
    reader = read(html)
    assert not any(tag in ("script", "link", "img", "iframe") for tag, _ in reader.tags)
    assert not any("src" in attrs or "href" in attrs for _, attrs in reader.tags)
    assert not re.search(r"url\(|@import|https?:", html)


def test_it_has_the_figures_and_a_bar_for_every_layer(report) -> None:
    reader = read(report.to_html())
    assert "16 -> 4" in reader.text
    assert "25.0 %" in reader.text
    assert "91.5 %" in reader.text
    assert "+0 points" in reader.text
    bars = [attrs for tag, attrs in reader.tags if attrs.get("class") == "bars"]
    assert [bar["aria-label"] for bar in bars] == ["4 of 16", "4 of 4"]
    assert "torch threads" in reader.text
    assert "agree to" not in reader.text


def test_a_narrow_screen_reads_layers_as_blocks_with_their_columns_named(report) -> None:
    html = report.to_html()
    cells = [attrs["data-of"] for tag, attrs in read(html).tags if "data-of" in attrs]
    assert cells == ["outputs", "MACs", "parameters"] * 2
    assert ".layers td[data-of]::before{content:attr(data-of)" in html


def test_layers_that_share_gates_are_on_one_line() -> None:
    drawn = swan.swanify(Residual(), torch.zeros(1, 4)).channels.explain().to_svg()
    reader = read(drawn)
    lines = [attrs for tag, attrs in reader.tags if tag == "line"]
    dots = [(attrs["cx"], float(attrs["cy"])) for tag, attrs in reader.tags if tag == "circle"]
    assert [(own["x1"], own["y1"], own["y2"]) for own in lines] == [
        ("8", "9.0", "45.0"),  # one, two
        ("22", "27.0", "27.0"),  # inside, beside it
        ("8", "63.0", "63.0"),  # head, where the first line has ended
    ]
    assert dots == [("8", 9.0), ("8", 45.0), ("22", 27.0), ("8", 63.0)]
    assert "head: 3 channels stay" in reader.text


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.inside = nn.Linear(4, 6), nn.Linear(6, 5)
        self.two, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.one(x).relu()
        return self.head(x + self.two(self.inside(x).relu()).relu())


def test_it_follows_the_screen(report) -> None:
    html = report.to_html()
    assert "prefers-color-scheme:dark" in html
    assert "width=device-width" in html
    assert "max-width:600px" in html


def test_gates_coupling_and_error_where_they_are_given(report, gated) -> None:
    p = gated.gates.probabilities()
    html = report.to_html(
        channels=gated.channels, probabilities={"epoch <1>": p}, relative_error=2.5e-7
    )
    reader = read(html)
    assert "epoch <1>: 16 gates" in reader.text
    assert "16 of 20 output channels are gated by 16 units" in reader.text
    assert "4 stay: part of the model's output" in reader.text
    assert "agree to 2.5e-07" in reader.text


def test_runs_are_drawn_and_the_front_is_joined(report) -> None:
    runs = [("a", 0.25, 70.0), ("b", 0.25, 60.0), ("c", 1.0, 90.0), ("d", 0.5, 70.0)]
    reader = read(report.to_html(runs=runs))
    circles = [attrs for tag, attrs in reader.tags if tag == "circle"]
    assert len(circles) == 4
    (line,) = [attrs["points"] for tag, attrs in reader.tags if tag == "polyline"]
    ends = [tuple(map(float, point.split(","))) for point in line.split()]
    places = [(float(c["cx"]), float(c["cy"])) for c in circles]
    assert ends == [places[0], places[2]]  # b and d are beaten
    assert places[0][1] < places[1][1]  # more accurate is higher


def test_labels_of_equal_runs_do_not_lie_on_each_other() -> None:
    names = ("one-shot", "gates", "both", "far away")
    drawn = charts.scatter([*((name, 0.25, 99.6) for name in names[:3]), (names[3], 0.9, 99.6)])
    heights = [float(re.search(rf'y="([0-9.]+)">{name}</text>', drawn)[1]) for name in names]
    assert heights[1] - heights[0] == heights[2] - heights[1] == 15
    assert heights[3] == heights[0]


def test_labels_lie_within_the_axes_and_on_nothing_else() -> None:
    torch.manual_seed(0)
    runs = [(f"run {i} of a long name", *own) for i, own in enumerate(torch.rand(9, 2).tolist())]
    runs += [("lowest", 0.5, 0.0), ("cheapest", 0.0, 0.5), ("given model", 1.0, 1.0)]
    drawn = charts.scatter(runs, quality="accuracy in %")
    reader = read(drawn)
    axes = [attrs for tag, attrs in reader.tags if attrs.get("class") == "axis"]
    left, bottom = float(axes[1]["x1"]), float(axes[0]["y1"])
    wide = float(drawn.partition('viewBox="0 0 ')[2].partition(" ")[0])
    found = re.findall(
        r'<text x="([0-9.]+)" y="([0-9.]+)">((?:run|low|che|giv)[^<]*)</text>', drawn
    )
    boxes = [(float(x), float(y) - 11, float(x) + 7 * len(name), float(y)) for x, y, name in found]
    assert {"lowest", "cheapest", "given model"} <= {name for *_, name in found}
    assert all(x > left and far < wide and y < bottom for x, _, far, y in boxes)
    points = [
        (float(c["cx"]) - 5, float(c["cy"]) - 5, float(c["cx"]) + 5, float(c["cy"]) + 5)
        for tag, c in reader.tags
        if tag == "circle"
    ]
    (front,) = [attrs["points"] for tag, attrs in reader.tags if tag == "polyline"]
    line = [tuple(map(float, point.split(","))) for point in front.split()]
    for (x, y), (to_x, to_y) in pairwise(line):
        along = [(x + (to_x - x) * i / 50, y + (to_y - y) * i / 50) for i in range(51)]
        points += [(px, py, px, py) for px, py in along]
    for index, a in enumerate(boxes):
        for b in [*boxes[:index], *points]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])
    assert "accuracy in %" in reader.text


def test_a_histogram_counts_every_gate() -> None:
    svg = charts.histogram("x", torch.tensor([0.0, 0.01, 0.5, 1.0]).double().numpy())
    counts = [int(n) for n in re.findall(r"<title>(\d+) gates with", svg)]
    assert (len(counts), sum(counts)) == (20, 4)
    assert (counts[0], counts[10], counts[-1]) == (2, 1, 1)


class TestSpeedNotes:
    def slower(self, report, gain: float):
        """The same report, with a pruned model that is `gain` times as fast."""
        latencies = tuple(
            dataclasses.replace(own, median_ms=old.median_ms / gain)
            for own, old in zip(report.after.latencies, report.before.latencies, strict=True)
        )
        return dataclasses.replace(
            report, after=dataclasses.replace(report.after, latencies=latencies)
        )

    def test_a_speed_up_far_below_the_macs_is_explained(self, report) -> None:
        text = str(self.slower(report, 1.5))
        assert "times fewer MACs, but only 1.50 times as fast at batch 2" in text
        slower = self.slower(report, 0.5)
        assert "times fewer MACs, but 2.00 times as slow at batch 2" in str(slower)
        assert "slower" in slower.to_html()
        assert "1 of 2 layers were cut to a width that is no multiple of 8" in text

    def test_one_that_keeps_up_is_not(self, report) -> None:
        assert "times fewer MACs" not in str(self.slower(report, 10.0))
