"""Shapes that were worked out once are not worked out again; what shares memory always runs."""

import pytest
import torch
from torch import Tensor, nn

from swan_surgery.channels.rules.remembering import remembered


class Counting:
    """Runs an operation on `meta`, and counts how often."""

    def __init__(self, op, *args, **kwargs) -> None:
        self.op, self.args, self.kwargs, self.runs = op, args, kwargs, 0

    def run(self):
        self.runs += 1
        return self.op(*self.args, **self.kwargs)

    def __call__(self):
        return remembered(self.op, self.args, self.kwargs, self.run)


def empty(*shape: int, last: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, device="meta", dtype=dtype).contiguous(memory_format=layout)


ATEN = torch.ops.aten
NEW = {
    "sizes": lambda: Counting(ATEN.sum.dim_IntList, empty(13, 7, 5), [1], True),
    "layout": lambda: Counting(ATEN.relu.default, empty(2, 13, 7, 5, last=True)),
    "several": lambda: Counting(ATEN.var_mean.correction, empty(13, 7, 5), [0], correction=1),
    "promoted": lambda: Counting(ATEN.add.Tensor, empty(13, 7), empty(7, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", NEW)
def test_new_tensors_are_made_anew_but_worked_out_once(name) -> None:
    call = NEW[name]()
    first, second = call(), call()
    assert call.runs == 1
    assert type(first) is type(second)
    pairs = [(first, second)] if isinstance(first, Tensor) else zip(first, second, strict=True)
    for one, two in pairs:
        assert one is not two
        assert two.is_meta
        assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)


ALWAYS = {
    "view": lambda x: Counting(ATEN.view.default, x, [35]),
    "in place": lambda x: Counting(ATEN.relu_.default, x),
    "out": lambda x: Counting(ATEN.add.out, x, x, out=x),
    "subclass": lambda x: Counting(ATEN.relu.default, nn.Buffer(x).as_subclass(Own)),
    "real": lambda x: Counting(ATEN.relu.default, torch.zeros(5, 7)),
}


class Own(Tensor):
    pass


@pytest.mark.parametrize("name", ALWAYS)
def test_what_shares_memory_or_has_data_runs_every_time(name) -> None:
    call = ALWAYS[name](empty(5, 7))
    call()
    call()
    assert call.runs == 2


def test_whatever_decides_the_result_is_told_apart() -> None:
    x = empty(11, 3)
    calls = [
        Counting(ATEN.sum.dim_IntList, x, [1]),
        Counting(ATEN.sum.dim_IntList, x, [1], True),
        Counting(ATEN.sum.dim_IntList, x, [1], dtype=torch.float64),
        Counting(ATEN.sum.dim_IntList, x.double(), [1]),
        Counting(ATEN.sum.dim_IntList, empty(3, 11).t(), [1]),
        Counting(ATEN.add.Tensor, x, 1),
        Counting(ATEN.add.Tensor, x, 1.0),
    ]
    for call in calls:
        call()
    assert [call.runs for call in calls] == [1] * len(calls)


def test_whole_numbers_divide_to_the_default_type_of_the_moment() -> None:
    whole = torch.ones(3, dtype=torch.int64, device="meta")
    op = torch.ops.aten.div.Tensor
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            assert remembered(op, (whole, whole), {}, lambda: op(whole, whole)).dtype == dtype
    finally:
        torch.set_default_dtype(before)
