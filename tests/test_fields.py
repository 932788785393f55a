"""Label fields: shrinking, aligning, merging and grouping them."""

from math import prod

import pytest
import torch
from hypothesis import given, strategies as st

from swan_surgery.channels.labels.fields import (
    FILL,
    PLAIN,
    align,
    axes_of,
    axis_field,
    by_overlap,
    compact,
    has_labels,
    merge,
    reshaped,
    vector_along,
)


def labels(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_axis_field_puts_the_labels_on_one_axis_and_size_one_elsewhere() -> None:
    field = axis_field(labels(5, 6, 7), 1, 4)
    assert field.shape == (1, 3, 1, 1)
    assert field.flatten().tolist() == [5, 6, 7]
    assert axes_of(field) == (1,)


def test_compact_undoes_an_expand_without_looking_at_the_data() -> None:
    field = axis_field(labels(5, 6, 7), 1, 4)
    assert compact(field.expand(2, 3, 4, 4)).equal(field)


def test_compact_undoes_a_materialised_expand() -> None:
    field = axis_field(labels(5, 6, 7), 1, 4)
    assert compact(field.expand(2, 3, 4, 4).contiguous()).equal(field)


def test_compact_keeps_an_axis_on_which_one_label_differs() -> None:
    field = torch.full((2, 3), 4)
    field[1, 2] = 5
    assert compact(field).equal(field)


def test_compact_turns_a_constant_field_into_a_scalar() -> None:
    assert compact(torch.full((2, 3, 4), 9)).equal(torch.full((1, 1, 1), 9))


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), ()])
def test_compact_accepts_empty_and_rank_zero_fields(shape: tuple[int, ...]) -> None:
    assert axes_of(compact(torch.zeros(shape, dtype=torch.int64))) in ((), (1,))


def test_align_prepends_axes_as_broadcasting_does() -> None:
    assert align(labels(1, 2, 3), 4).shape == (1, 1, 1, 3)
    assert align(axis_field(labels(1, 2), 0, 2), 2).shape == (2, 1)


def test_merge_prefers_a_label_then_plain_then_fill() -> None:
    first = labels(3, PLAIN, FILL, FILL, PLAIN, 4)
    second = labels(PLAIN, 5, 6, FILL, FILL, 7)
    assert merge(first, second).tolist() == [3, 5, 6, FILL, PLAIN, 4]


def test_merge_broadcasts() -> None:
    one, two = axis_field(labels(1, 2), 0, 2), axis_field(labels(0, 0, 0), 1, 2)
    assert merge(one, two).tolist() == [[1, 1, 1], [2, 2, 2]]


@pytest.mark.parametrize(
    ("values", "expected"), [((PLAIN, FILL), False), ((PLAIN, 1), True), ((FILL,), False)]
)
def test_has_labels_counts_channels_only(values: tuple[int, ...], expected: bool) -> None:
    assert has_labels(labels(*values)) is expected


def test_by_overlap_groups_fields_that_share_an_axis_directly_or_through_another() -> None:
    rows = axis_field(labels(1, 2), 0, 3)
    columns = axis_field(labels(3, 4), 1, 3)
    both = torch.arange(5, 9).view(2, 2, 1)
    apart = axis_field(labels(9, 10), 2, 3)
    grouped = by_overlap([(0, rows), (0, columns), (0, apart), (1, both)])
    found = [[(operand, id(field)) for operand, field in group] for group in grouped]
    assert sorted(len(group) for group in found) == [1, 3]
    assert [(0, id(apart))] in found
    wide = next(group for group in found if len(group) == 3)
    assert set(wide) == {(0, id(rows)), (0, id(columns)), (1, id(both))}


def test_by_overlap_keeps_the_order_of_operands_on_one_axis() -> None:
    first, second = axis_field(labels(1, 2), 1, 2), axis_field(labels(3, 4), 1, 2)
    ((one, two),) = by_overlap([(0, first), (1, second)])
    assert one[0] == 0
    assert one[1] is first
    assert two[0] == 1
    assert two[1] is second


def test_by_overlap_keeps_different_axes_apart() -> None:
    first, second = axis_field(labels(1, 2), 0, 2), axis_field(labels(3, 4), 1, 2)
    assert len(by_overlap([(0, first), (1, second)])) == 2


def test_vector_along_finds_the_labels_of_one_axis() -> None:
    rows, columns = axis_field(labels(1, 2), 0, 2), axis_field(labels(3, 4, 5), 1, 2)
    vector, tangled = vector_along((rows, columns), 1)
    assert vector is not None
    assert vector.tolist() == [3, 4, 5]
    assert tangled == []


def test_vector_along_reports_fields_that_entangle_the_axis_with_another() -> None:
    both = torch.arange(1, 7).view(2, 3)
    vector, tangled = vector_along((both,), 1)
    assert vector is None
    assert [id(field) for field in tangled] == [id(both)]


def test_vector_along_ignores_fields_of_other_axes() -> None:
    vector, tangled = vector_along((axis_field(labels(1, 2), 0, 3),), 2)
    assert vector is None
    assert tangled == []


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Two shapes of one size, and the axes of the first along which labels change."""
    factors = draw(st.lists(st.sampled_from([1, 1, 2, 2, 3, 5]), max_size=6))
    before, after = (
        [
            prod(factors[start:end])
            for start, end in zip([0, *cuts], [*cuts, len(factors)], strict=True)
        ]
        for cuts in (
            sorted(draw(st.lists(st.integers(0, len(factors)), max_size=4))) for _ in range(2)
        )
    )
    varying = draw(st.lists(st.sampled_from(range(len(before))), unique=True))
    return before, after, varying


@given(reshapes())
def test_a_reshaped_field_is_that_of_the_whole_tensor(
    case: tuple[list[int], list[int], list[int]],
) -> None:
    before, after, varying = case
    sizes = [size if axis in varying else 1 for axis, size in enumerate(before)]
    field = torch.arange(1, prod(sizes) + 1).view(sizes)
    whole = field.expand(before).reshape(after)
    assert compact(reshaped(field, before, after)).equal(compact(whole))


def test_a_reshape_writes_out_no_axis_along_which_labels_stay() -> None:
    field = axis_field(torch.arange(1, 9), 2, 3)
    assert reshaped(field, (2, 197, 8), (394, 4, 2)).shape == (1, 4, 2)


def test_a_field_without_elements_is_reshaped_too() -> None:
    field = torch.ones(1, 3, dtype=torch.int64)
    assert reshaped(field, (0, 3), (3, 0)).numel() == 0
