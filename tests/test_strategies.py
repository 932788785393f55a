"""The random networks themselves: each kind can be built, runs, is deterministic, traceable and bounded."""

import copy

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.random_convnext_blocks import ResponseNorm
from tests.random_layers import BLOCKS, HEADS, randomise_
from tests.random_token_layers import LayerScale, LlamaRMSNorm
from tests.random_transformer_blocks import Affine
from tests.strategies import (
    Case,
    NetworkSpec,
    PartSpec,
    build,
    descriptions,
    easy_networks,
    networks,
    option_specs,
    simple_network,
)
from tests.zoo import ZOO


def tensors_of(output) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_equal_outputs(got, expected):
    for left, right in zip(tensors_of(got), tensors_of(expected), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


@torch.no_grad()
def check(case: Case, *, modes: tuple[bool, ...] = (False, True)):
    """`modes`: those in which it can be traced."""
    assert not case.model.training
    assert all(x.dtype == torch.float64 for x in case.model.parameters())
    first, second = case.model(*case.inputs), case.model(*case.inputs)
    assert_equal_outputs(first, second)
    for tensor in tensors_of(first):
        assert tensor.isfinite().all()
        assert tensor.abs().max() < 1e3
    training = copy.deepcopy(case.model).train()
    assert all(tensor.isfinite().all() for tensor in tensors_of(training(*case.inputs)))
    if True in modes:
        torch.fx.symbolic_trace(training)
    if False in modes:
        assert_equal_outputs(torch.fx.symbolic_trace(case.model)(*case.inputs), first)


# Their loops over steps and `len` need numbers, which torch.fx has none of.
NEED_NUMBERS = ("cell", "functional_attention", "recurrent")


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_option_runs(name):
    for part in option_specs(BLOCKS, name):
        check(build(simple_network(part)), modes=(False,) if name not in NEED_NUMBERS else ())


@pytest.mark.thorough
@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_option_runs_behind_itself(name):
    """A second copy meets the first one's width, size and strides."""
    for part in option_specs(BLOCKS, name):
        check(build(simple_network(part, part)), modes=())


@pytest.mark.thorough
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_no_block_knows_its_batch(name):
    for part in option_specs(BLOCKS, name):
        case = build(simple_network(part))
        (x,) = case.inputs
        both, more = case.model(x), case.model(torch.cat((x, x[:1])))
        first = case.model(x[:1])
        assert (len(first), len(both), len(more)) == (1, 2, 3)
        case.model.train()(torch.cat((x, x[:1])))
        if ("form", "batch_no_running") not in part.options:  # this norm mixes samples
            torch.testing.assert_close(first, both[:1], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(more[:2], both, rtol=1e-9, atol=1e-9)


def test_factors_are_random_and_far_from_zero():
    norms = [nn.RMSNorm(9), nn.LayerNorm(9, bias=False), LlamaRMSNorm(9), ResponseNorm(9, "timm")]
    model = nn.ModuleList([*norms, LayerScale(9), Affine(9)])
    randomise_(model, torch.Generator().manual_seed(0))
    for name, value in model.named_parameters():
        assert value.unique().numel() == 9
        assert name.endswith("beta") or 0.5 <= value.abs().min() <= value.abs().max() <= 1.5


@pytest.mark.parametrize("name", HEADS)
def test_every_head_option_runs(name):
    plain = option_specs(BLOCKS, "plain")[0]
    for part in option_specs(HEADS, name):
        check(build(simple_network(plain, head=part)))


@pytest.mark.parametrize("second", ["add", "cat", "multiply"])
def test_second_input_runs(second):
    case = build(simple_network(option_specs(BLOCKS, "raw_concat")[0], second=second))
    assert len(case.inputs) == 2
    check(case)


@given(networks())
def test_drawn_networks_run(case):
    needs_numbers = any(part.kind in NEED_NUMBERS for part in case.description.blocks)
    check(case, modes=() if needs_numbers else (False, True))


@given(easy_networks())
def test_easy_networks_draw_easy_parts_only(case):
    check(case)
    assert BLOCKS[case.description.blocks[0].kind].easy
    assert HEADS[case.description.head.kind].easy


@given(descriptions())
def test_description_says_everything(spec):
    names = {"NetworkSpec": NetworkSpec, "PartSpec": PartSpec}
    pasted = eval(repr(spec), names)  # noqa: S307  that the repr can be pasted is the claim
    assert pasted == spec
    assert hash(pasted) == hash(spec)
    before = torch.get_rng_state()
    first, second = build(spec), build(pasted)
    assert torch.equal(before, torch.get_rng_state())
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key])
    assert all(map(torch.equal, first.inputs, second.inputs))


def test_gradients_reach_the_stem():
    for name in BLOCKS:
        case = build(simple_network(option_specs(BLOCKS, name)[0]))
        case.model.train()(*case.inputs).sum().backward()
        assert case.model.stem[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ZOO)
def test_zoo_model_runs(name):
    model, inputs = ZOO[name]()
    again, _ = ZOO[name]()
    assert_equal_outputs(model(*inputs), again(*inputs))
    torch.fx.symbolic_trace(model)
    check(Case(name, model.double(), tuple(x.double() for x in inputs)))
