"""Numbers in a module's code are replaced where they were counted, and nowhere else."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swan_surgery as swan
from swan_surgery.calls.arguments import numbers_of, replaced
from swan_surgery.calls.mode import counted_name
from swan_surgery.calls.resizing import Resized, resize_
from tests.closing import assert_closed_equals_cut, close_, close_random_, image, prepared
from tests.small_nets import Net, conv


class Rows(nn.Module):
    """[B, 12] -> [B, 3, 4] and [B, 6, 2], its numbers in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (self.scale * x).view(-1, 3, 4), x.view(-1, 6, 2)


class Spelled(nn.Module):
    def __init__(self, rows: int = 3) -> None:
        super().__init__()
        self.rows = rows

    def __getstate__(self) -> dict[str, int]:
        return {"rows": self.rows}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), self.rows, -1)


def resized(training: bool = False) -> Rows:
    """The second view makes three rows of four."""
    module = Rows().train(training)
    resize_(module, ("view", 2), 2, 3, training=training)
    resize_(module, ("view", 2), 3, 4, training=training)
    return module


X = torch.arange(24.0).view(2, 12)


class TestArguments:
    def test_numbers_stand_by_position_and_all_else_is_none(self) -> None:
        found = numbers_of((X, (-1, 3), [4]), {"dim": 1, "scale": 0.5, "keepdim": True})
        assert found == (None, -1, 3, 4, 1, 0.5, None)

    def test_replacing_keeps_the_form(self) -> None:
        args, kwargs = replaced(((X, (2, 3), [4]), {"dim": 1}), {2: 7, 4: 0})
        assert args[0] is X
        assert args[1:] == ((2, 7), [4])
        assert kwargs == {"dim": 0}

    def test_replacing_nothing_is_the_identity(self) -> None:
        value = ((1, [2, (3,)]), {"a": 4})
        assert replaced(value, {}) == value
        assert replaced(value, {9: 1}) == value

    def test_positions_are_those_of_numbers_of(self) -> None:
        call = ((X, (2, 3), [4]), {"dim": 1})
        numbers = numbers_of(*call)
        for position, number in enumerate(numbers):
            if number is not None:
                changed = numbers_of(*replaced(call, {position: 99}))
                assert [i for i, n in enumerate(changed) if n != numbers[i]] == [position]

    def test_sizes_that_jit_makes_scalars_are_not_counted(self) -> None:
        """torch.jit.trace turns `x.shape[1] * 2` into a multiplication of tensors."""
        assert counted_name(torch.mul, (torch.tensor(3), 2)) is None
        assert counted_name(torch.mul, (torch.tensor(3.0), 2)) == "mul"
        assert counted_name(torch.mul, (torch.ones(2, dtype=torch.int64), 2)) == "mul"
        assert counted_name(Tensor.view, (torch.tensor(3), 2)) == "view"


class TestResized:
    def test_the_numbered_call_is_changed_and_the_other_is_not(self) -> None:
        one, two = resized()(X)
        assert torch.equal(one, X.view(2, 3, 4))
        assert torch.equal(two, X.view(2, 3, 4))
        assert Rows()(X)[1].shape == (2, 6, 2)

    def test_it_stays_an_instance_with_its_parameters(self) -> None:
        module = Rows()
        parameter = module.scale
        resize_(module, ("view", 1), 2, 6, training=False)
        assert isinstance(module, Rows)
        assert isinstance(module, Resized)
        assert type(module).__name__ == "ResizedRows"
        assert module.scale is parameter
        assert list(module.state_dict()) == list(Rows().state_dict())
        resize_(module, ("view", 1), 3, 2, training=False)
        assert type(module).__name__ == "ResizedRows"  # not twice
        assert type(Rows()) is Rows

    @pytest.mark.parametrize("training", [True, False])
    def test_each_mode_has_its_own_numbers(self, training) -> None:
        module = resized(training)
        assert module(X)[1].shape == (2, 3, 4)
        assert module.train(not training)(X)[1].shape == (2, 6, 2)

    def test_calls_are_counted_anew_in_every_run(self) -> None:
        module = resized()
        for _ in range(3):
            assert module(X)[1].shape == (2, 3, 4)

    def test_a_failed_run_leaves_nothing_behind(self) -> None:
        module = resized()
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            module(X[:, :5])
        assert module(X)[1].shape == (2, 3, 4)
        assert X.view(-1, 6, 2).shape == (2, 6, 2)

    def test_a_deep_copy_is_independent(self) -> None:
        module = resized()
        twin = copy.deepcopy(module)
        resize_(twin, ("view", 2), 2, 12, training=False)
        resize_(twin, ("view", 2), 3, 1, training=False)
        assert twin(X)[1].shape == (2, 12, 1)
        assert module(X)[1].shape == (2, 3, 4)
        assert type(twin) is type(module)

    def test_a_state_of_its_own_that_knows_nothing_of_the_numbers(self) -> None:
        """As einops' layers pickle: their arguments alone, from which they are built anew."""
        module = Spelled()
        resize_(module, ("view", 1), 2, 4, training=False)
        module.eval()
        twin = copy.deepcopy(module).eval()
        assert twin(X).shape == module(X).shape == (2, 4, 3)
        twin.replacements[False].clear()
        assert module(X).shape == (2, 4, 3)

    def test_calls_of_a_resized_child_count_for_its_parent(self) -> None:
        class Parent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.child = Rows()

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return self.child(x)[1], x.view(-1, 4, 3)

        parent = Parent().eval()
        resize_(parent.child, ("view", 2), 2, 3, training=False)
        resize_(parent.child, ("view", 2), 3, 4, training=False)
        resize_(parent, ("view", 3), 2, 2, training=False)
        resize_(parent, ("view", 3), 3, 6, training=False)
        one, two = parent(X)
        assert (one.shape, two.shape) == ((2, 3, 4), (2, 2, 6))

    def test_it_says_so_when_printed(self) -> None:
        text = repr(resized())
        assert "ResizedRows" in text
        assert "sizes replaced in view #2" in text
        assert "view" not in repr(resized().train())


def literal(m, x):
    """Two literals of different widths in one function, and one in a module inside."""
    x = F.relu(m.a(x)).view(-1, 6, 16)
    x = m.b(x.reshape(-1, 6, 4, 4)).view(-1, 8, 4, 4)
    return m.last(m.inner(x))


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split([3, 5], 1)
        return F.relu(torch.cat((second, first), 1).view(-1, 8, 16)).unflatten(2, (4, 4))


def literal_net() -> nn.Module:
    return prepared(Net(literal, a=conv(3, 6), b=conv(6, 8), inner=Inner(), last=conv(8, 2)))


def test_every_literal_of_a_pruned_model_follows_its_own_width() -> None:
    gated = assert_closed_equals_cut(literal_net(), image(2, 3, 4, 4))
    a, b = (gated.channels.layer(name).out_units for name in "ab")
    close_(gated, a[1], a[4], *{u for u in b[2:6] if u >= 0})
    small = swan.prune(gated)
    numbers = {(n.module, n.function, n.number) for n in gated.channels.numbers}
    assert {("", "view", 1), ("", "reshape", 1)} <= numbers
    assert small.replacements[False]["view", 1] == {2: 4}
    assert small.replacements[False]["reshape", 1] == {2: 4}


class Flat(nn.Module):
    """Names the width itself, and calls a module that does so, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(3, 16), Inside(), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)).reshape(-1, 16))


class Inside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x).reshape(-1, 16)


def test_a_number_behind_a_call_of_a_child_follows_too() -> None:
    model, x = prepared(Flat()), image(2, 3)
    gated = assert_closed_equals_cut(model, x)
    assert gated is not None
    assert gated.gates.num_units == 16
    assert {number.module for number in gated.channels.numbers} == {"", "inner"}


def test_a_pruned_model_is_exported_traced_and_compiled_with_its_new_numbers() -> None:
    gated = swan.swanify(literal_net(), image(2, 3, 4, 4)).eval()
    close_random_(gated, 0.5, 1)
    small, x = swan.prune(gated), image(2, 3, 4, 4)
    wanted = small(x)
    exported = torch.export.export(small, (x,), strict=False).module()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    for run in (exported, compiled, copy.deepcopy(small)):
        torch.testing.assert_close(run(x), wanted, rtol=1e-12, atol=1e-13)


def test_a_pruned_model_can_be_gated_and_pruned_again() -> None:
    gated = swan.swanify(literal_net(), image(2, 3, 4, 4))
    close_(gated, gated.channels.layer("a").out_units[2])
    once = swan.prune(gated)
    again = assert_closed_equals_cut(once, image(2, 3, 4, 4))
    assert len(again.channels.layer("a").out_units) == 5
    close_(again, *again.channels.layer("a").out_units[:2])
    twice = swan.prune(again)
    assert twice.replacements[False]["view", 1] == {2: 3}
    assert type(twice) is type(once)
