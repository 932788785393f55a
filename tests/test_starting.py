"""What a gate bank starts from: minimum widths, and an order of importance."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import swan_surgery as swan
from swan_surgery.channels import PINNED, channel_map
from swan_surgery.gates.starting import importance_ranks, make_bank, widths
from tests.closing import image
from tests.small_nets import Net, conv


X = (2, 3, 4, 4)


def chain() -> nn.Module:
    """Rows of `a` grow in size from last to first; `b` from first to last."""
    model = Net(lambda m, x: m.last(F.relu(m.b(F.relu(m.a(x))))), a=conv(3, 4, bias=False), b=conv(4, 3, bias=False), last=conv(3, 2))  # fmt: skip
    with torch.no_grad():
        model.a.weight.copy_(torch.tensor([4.0, 3, 2, 1])[:, None, None, None].expand(4, 3, 1, 1))
        model.b.weight.copy_(torch.tensor([1.0, 2, 3])[:, None, None, None].expand(3, 4, 1, 1))
        model.last.weight.fill_(0.5)
    return model.eval()


def residual() -> nn.Module:
    def run(m, x):
        x = m.a(x)
        return m.last(F.relu(x + m.c(F.relu(m.b(F.relu(x))))))

    return Net(run, a=conv(3, 4), b=conv(4, 5), c=conv(5, 4), last=conv(4, 2)).eval()


class TestImportance:
    def test_ranks_within_each_group_by_the_weights(self) -> None:
        model = chain()
        ranks = importance_ranks(model, channel_map(model, image(*X).float()))
        assert ranks.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0.5, 1])

    def test_both_what_makes_and_what_reads_a_channel_counts(self) -> None:
        model = chain()
        channels = channel_map(model, image(*X).float())
        with torch.no_grad():
            model.b.weight[:, 3] *= 100  # what reads channel 3 of `a`
        assert int(importance_ranks(model, channels)[:4].argmax()) == 3

    def test_every_layer_of_a_group_has_one_vote(self) -> None:
        """Scaling a whole layer changes nothing."""
        model = residual()
        channels = channel_map(model, image(*X).float())
        before = importance_ranks(model, channels)
        with torch.no_grad():
            model.c.weight.mul_(1000)
        assert torch.equal(importance_ranks(model, channels), before)

    def test_ranks_are_even_and_a_lonely_unit_is_in_the_middle(self) -> None:
        model = chain()
        lonely = channel_map(model, image(*X).float()).without([0, 1, 3], "a test", "none")
        assert importance_ranks(model, lonely).tolist() == [0.5, 0, 0.5, 1]
        ranks = importance_ranks(residual(), channel_map(residual(), image(*X).float()))
        assert sorted(ranks.tolist()) == pytest.approx([0, 0, 0.25, 1 / 3, 0.5, 2 / 3, 0.75, 1, 1])

    def test_weights_without_numbers_leave_the_order_of_positions(self) -> None:
        for spoil in (lambda m: m.to("meta"), lambda m: m.a.weight.data.fill_(float("nan"))):
            model = chain()
            channels = channel_map(model, image(*X).float())
            spoil(model)
            ranks = importance_ranks(model, channels)
            assert bool(ranks.isfinite().all())
            assert sorted(ranks[:4].tolist()) == pytest.approx([0, 1 / 3, 2 / 3, 1])


class TestBank:
    def test_logits_follow_the_ranks_and_all_gates_are_open(self) -> None:
        model = chain()
        channels = channel_map(model, image(*X).float())
        bank = make_bank(model, channels, [])
        assert bool(bank.open_mask().all())
        order = importance_ranks(model, channels)
        torch.testing.assert_close(bank.logits.detach(), (2.5 + order).to(bank.logits.dtype))

    @pytest.mark.parametrize(
        ("dtype", "wanted"),
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
        ],
        ids=str,
    )
    def test_half_models_have_gates_in_float32(self, dtype, wanted) -> None:
        model = chain()
        channels = channel_map(model, image(*X).float())
        bank = make_bank(model.to(dtype), channels, [])
        assert bank.logits.dtype == wanted
        assert len(set(bank.logits[:4].tolist())) == 4

    @pytest.mark.parametrize("training", [True, False])
    def test_it_has_the_mode_of_the_model(self, training) -> None:
        model = chain()
        channels = channel_map(model, image(*X).float())
        assert make_bank(model.train(training), channels, []).training is training


class TestWidths:
    def test_one_entry_per_distinct_output_width(self) -> None:
        model = residual()
        channels = channel_map(model, image(*X).float())
        found = [set(units) for units in widths(channels)]
        assert found == [set(channels.layer("a").out_units), set(channels.layer("b").out_units)]

    def test_a_layer_with_a_pinned_channel_needs_none(self) -> None:
        """What is pinned stays, so the layer cannot become empty."""

        def run(m, x):
            return m.last(torch.cat((F.relu(m.a(x)), m.b(x).cummax(1).values), 1))

        model = Net(run, a=conv(3, 4), b=conv(3, 2), last=conv(6, 2)).eval()
        channels = channel_map(model, image(*X).float())
        assert PINNED in channels.layer("last").in_units
        assert [set(units) for units in widths(channels)] == [{0, 1, 2, 3}]

    def test_an_input_that_is_part_of_an_output_has_its_own(self) -> None:
        """A layer that reads half of what another makes must not lose all it reads."""

        def run(m, x):
            first, second = m.a(x).chunk(2, 1)
            return m.last(first) + m.other(second * first)

        model = Net(run, a=conv(3, 8), last=conv(4, 2), other=conv(4, 2)).eval()
        channels = channel_map(model, image(*X).float())
        found = [set(units) for units in widths(channels)]
        for layer in ("last", "other"):
            reads = set(channels.layer(layer).in_units)
            assert any(own <= reads for own in found)
        gated = swan.swanify(model, image(*X).float())
        with torch.no_grad():
            gated.gates.logits.fill_(-5.0)
        small = swan.prune(gated)
        assert min(small.last.in_channels, small.other.in_channels) >= 1
