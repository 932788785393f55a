"""What a map says at one size of the inputs holds at every other; what cannot is pinned or raises."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops import utils

import swan_surgery as swan
from swan_surgery.channels import PINNED
from swan_surgery.channels.runs.control_flow import _DOOR, control_flow_joined
from swan_surgery.cutting.verification import relative_error
from swan_surgery.gates import GatedModel
from swan_surgery.models import as_inputs
from tests.closing import (
    TOLERANCE,
    assert_closed_equals_cut,
    close_random_,
    image,
    prepared,
)
from tests.small_nets import Net, conv


Middle = Callable[[Tensor], Tensor]
OTHERS = [(2, 3, 12, 12), (1, 3, 8, 8), (3, 3, 5, 9)]


def network(middle: Callable[..., Tensor], **more: nn.Module) -> nn.Module:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(m.second(F.relu(m.first(x))))
        return m.last(middle(m, y) if more else middle(y))

    own = {"first": conv(3, 8, 3), "second": conv(8, 6, 3), "last": conv(6, 2)}
    return prepared(Net(run, **own, **more))


def second_is_gated(gated: GatedModel) -> bool:
    return PINNED not in gated.channels.layer("second").out_units


def assert_right_at(gated: GatedModel, shapes: list[tuple[int, ...]]) -> int:
    """Closed equals cut at other sizes, or both refuse; returns how often neither refused."""
    taken = 0
    for seed in range(2):
        close_random_(gated, 0.5, seed)
        small = swan.prune(gated, verify=False)
        mask = gated.gates.open_mask()
        for shape in shapes:
            inputs = as_inputs(image(*shape))
            try:
                assert relative_error(gated, small, mask, inputs) <= TOLERANCE, shape
                taken += 1
            except swan.PathError:
                continue
    return taken


def by_all(y: Tensor) -> Tensor:
    _, c, h, w = y.shape
    return y * y.sum((1, 2, 3), keepdim=True) / (c * h * w)


NUMBERS: dict[str, Middle] = {
    "c * h * w": by_all,
    "numel": lambda y: y / y[0].numel() ** 0.5,
    "numel with batch": lambda y: y * 10 / y.numel(),
    "pixels alone": lambda y: y * y.sum((2, 3), keepdim=True) / (y.shape[2] * y.shape[3]),
    "width over pixels": lambda y: y * (y.shape[1] / y.shape[2]),
    "variance over rows": lambda y: y + y.var((1, 2), keepdim=True),
    "power": lambda y: y * float(y.shape[1] * y.shape[3]) ** -0.5,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_scale_with_a_width_and_with_the_inputs(name: str) -> None:
    gated = assert_closed_equals_cut(network(NUMBERS[name]), image(2, 3, 8, 8))
    assert gated is not None
    assert second_is_gated(gated)
    assert assert_right_at(gated, OTHERS) == 2 * len(OTHERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_scale_follow_a_second_cut_and_come_back_from_a_file(
    name: str, tmp_path
) -> None:
    once = swan.swanify(network(NUMBERS[name]), image(2, 3, 8, 8))
    close_random_(once, 0.3, 0)
    again = swan.swanify(swan.prune(once), image(2, 3, 8, 8))
    assert second_is_gated(again)
    assert assert_right_at(again, OTHERS) == 2 * len(OTHERS)
    small = swan.prune(again)
    swan.save(small, tmp_path / "x.swan")
    loaded = swan.load(tmp_path / "x.swan", model=network(NUMBERS[name]))
    x = image(3, 3, 12, 9)
    assert torch.equal(loaded(x), small(x))


STATISTICS: dict[str, tuple[Middle, tuple[int, ...]]] = {
    "all of the batch": (lambda y: y * y.flatten(0, 1).mean(), (4, 3, 8, 8)),
    "all of a sample": (lambda y: y * y.flatten(1).mean(1)[:, None, None, None], (2, 3, 7, 9)),
    "spread": (lambda y: y / y.flatten(1).std(1)[:, None, None, None], (2, 3, 8, 8)),
    "norm of a sample": (lambda y: y / y.flatten(1).norm(dim=1)[:, None, None, None], (2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_over_axes_that_were_flattened_pin(name: str) -> None:
    """Which positions of such an axis are one channel's is another answer at every size."""
    middle, shape = STATISTICS[name]
    gated = assert_closed_equals_cut(network(middle), image(*shape))
    assert gated is not None
    assert set(gated.channels.layer("second").out_units) == {PINNED}
    assert "a statistic over other positions at another size" in str(gated.channels.explain())
    assert assert_right_at(gated, [*OTHERS, (3, *shape[1:])]) == 2 * (len(OTHERS) + 1)


def mirrored(y: Tensor) -> Tensor:
    return y + y.flip(1) if y.shape[-1] > 10 else y


def test_channels_that_meet_others_at_another_size_are_pinned() -> None:
    gated = assert_closed_equals_cut(network(mirrored), image(1, 3, 8, 8))
    assert gated is not None
    assert set(gated.channels.layer("second").out_units) == {PINNED}
    assert "at another size" in str(gated.channels.explain())
    assert PINNED not in gated.channels.layer("first").out_units
    assert assert_right_at(gated, OTHERS) == 2 * len(OTHERS)


def large(y: Tensor) -> Tensor:
    if y.shape[-1] >= 10:
        return y * (y.shape[1] * y.shape[2]) ** 0.5
    return y


def windows(y: Tensor) -> Tensor:
    """Padded to whole windows where that is needed."""
    rest = -y.shape[-1] % 4
    if rest:
        y = F.pad(y, (0, rest))
    b, c, h, w = y.shape
    return y.view(b, c, h, w // 4, 4).mean(-1, keepdim=True).expand(-1, -1, -1, -1, 4).flatten(-2)


@pytest.mark.parametrize("middle", [large, windows], ids=lambda f: f.__name__)
def test_another_path_at_another_size_is_right_or_refused(middle: Middle) -> None:
    gated = assert_closed_equals_cut(network(middle), image(2, 3, 8, 8))
    assert gated is not None
    assert assert_right_at(gated, OTHERS) >= 2


@pytest.mark.parametrize("size", [6, 12])
@pytest.mark.parametrize("decides", [False, True])
def test_a_layer_that_runs_at_other_sizes_only_is_cut_along(size: int, decides: bool) -> None:
    def middle(m: nn.Module, y: Tensor) -> Tensor:
        if decides and bool(y.mean() > 1e3):  # values that decide the path: no map on meta
            return y
        return m.narrow(y) if y.shape[-1] < 9 else m.wide(y)

    net = network(middle, narrow=conv(6, 6), wide=conv(6, 6, 3))
    gated = swan.swanify(net, image(2, 3, size, size))
    assert all(PINNED not in gated.channels.layer(name).out_units for name in ("narrow", "wide"))
    assert assert_right_at(gated, OTHERS) == 2 * len(OTHERS)


def test_pixels_that_would_be_taken_for_samples_are_no_other_size() -> None:
    """`view(-1, ...)` runs at any size, but a larger image becomes more samples there."""

    def middle(m: nn.Module, y: Tensor) -> Tensor:
        return m.linear(y.view(-1, 6 * 4 * 4)).view(-1, 6, 4, 4)

    gated = assert_closed_equals_cut(network(middle, linear=nn.Linear(96, 96)), image(2, 3, 4, 4))
    assert gated is not None
    assert second_is_gated(gated)


ELSEWHERE: dict[str, Middle] = {
    "shape as tensor": lambda y: y * torch.as_tensor(y.shape).sum(),
    "numpy": lambda y: y * float(y.detach().numpy().mean()),
    "tolist": lambda y: y * sum(y.detach().sum((0, 2, 3)).tolist()),
    "noise of a width": lambda y: y + torch.randn(y.shape[1], 1, 1),
    "noise like it": lambda y: y + torch.randn_like(y),
    "dropout of whole channels by hand": lambda y: y * (torch.rand(y.shape[1], 1, 1) > 0.5),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_values_that_leave_torch_or_are_drawn_by_channel_pin(name: str) -> None:
    gated = swan.swanify(network(ELSEWHERE[name]), image(2, 3, 8, 8))
    assert set(gated.channels.layer("second").out_units) == {PINNED}
    assert PINNED not in gated.channels.layer("first").out_units
    close_random_(gated, 0.5, 0)
    small = swan.prune(gated)
    results = []
    for model in (gated, small):
        torch.manual_seed(3)
        results.append(model(image(2, 3, 8, 8)))
    torch.testing.assert_close(*results, rtol=TOLERANCE, atol=TOLERANCE)


def branches(_m: nn.Module, y: Tensor) -> Tensor:
    return torch.cond(y.mean() > 0, lambda v: v * 2.0, lambda v: v - 1.0, (y,))


def loop(_m: nn.Module, y: Tensor) -> Tensor:
    start = torch.zeros((), dtype=torch.int64)
    return torch.while_loop(lambda n, v: n < 2, lambda n, v: (n + 1, v * 0.5 + 1.0), (start, y))[1]


def swaps(_m: nn.Module, y: Tensor) -> Tensor:
    return torch.cond(y.mean() > 0, lambda v: v * 1.0, lambda v: v.flip(1), (y,))


@pytest.mark.parametrize("middle", [branches, loop], ids=lambda f: f.__name__)
def test_control_flow_is_mapped_through(middle: Callable[..., Tensor]) -> None:
    gated = assert_closed_equals_cut(network(middle, other=nn.Identity()), image(2, 3, 8, 8))
    assert gated is not None
    assert second_is_gated(gated)
    assert len(set(gated.channels.layer("second").out_units)) == 6
    assert assert_right_at(gated, OTHERS) == 2 * len(OTHERS)


def test_channels_that_meet_in_either_branch_go_together() -> None:
    gated = assert_closed_equals_cut(network(swaps, other=nn.Identity()), image(2, 3, 8, 8))
    assert gated is not None
    units = gated.channels.layer("second").out_units
    assert units == units[::-1]
    assert len(set(units)) == 3


def test_torch_has_the_door_that_control_flow_goes_through() -> None:
    """Private: where a version of torch lacks it, such models are refused and this fails."""
    before = getattr(utils, _DOOR)
    with control_flow_joined():
        assert getattr(utils, _DOOR) is not before
    assert getattr(utils, _DOOR) is before
