"""The laws of gates that look at the input, for any model: what every adaptive model keeps."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import swan_surgery as swan
from swan_surgery.adaptive.block import AdaptiveBlock
from swan_surgery.adaptive.nested_block import NestedBlock
from swan_surgery.adaptive.statics import give_bias_
from swan_surgery.cutting.plan import make_plan
from swan_surgery.cutting.step import apply_plan
from swan_surgery.models import Inputs, as_inputs
from tests.closing import TOLERANCE, outputs
from tests.fingerprints import assert_same_fingerprint, fingerprint


def randomise_statistics_(adapted: swan.AdaptiveModel, generator: torch.Generator) -> None:
    """Means and statistics of all widths at random: none can stand in for another."""
    for block in adapted.blocks().values():
        for level in block.statistics:
            for name, tensor in level.named_buffers():
                if "running_var" in name:
                    tensor.uniform_(0.5, 2, generator=generator)
                elif "mean" in name:
                    tensor.normal_(generator=generator)


def own_readers_(adapted: swan.AdaptiveModel, generator: torch.Generator) -> None:
    """Readers of all widths with weights of their own, at random."""
    for block in adapted.blocks().values():
        assert isinstance(block, NestedBlock)
        for level, own in enumerate(block.statistics):
            block.own_readers_(level)
            for _, parameter in sorted(own.named_parameters()):
                parameter.data.normal_(generator=generator)


def aim_(adapted: swan.AdaptiveModel, generator: torch.Generator) -> None:
    """Efforts and thresholds at random: samples take widths of their own."""
    for block in adapted.blocks().values():
        if block.effort is not None:
            block.effort.weight.data.normal_(generator=generator)
            own = torch.randn(len(block.effort.thresholds), generator=generator).double()
            block.effort.thresholds.copy_(own.sort().values)


def samples_of(inputs, count: int) -> Inputs:
    """More samples: the given ones, and noise of their kind."""
    given = as_inputs(inputs)
    generator = torch.Generator().manual_seed(5)

    def more(tensor: Tensor) -> Tensor:
        shape = (count, *tensor.shape[1:])
        if not tensor.is_floating_point():
            return tensor[torch.arange(count) % len(tensor)]
        return torch.randn(shape, generator=generator, dtype=tensor.dtype)

    return given.map(more)


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    return [
        leaf
        for leaf in tree_leaves(model(*inputs.args, **inputs.kwargs))
        if isinstance(leaf, Tensor)
    ]


def row(inputs: Inputs, index: int) -> Inputs:
    return inputs.map(lambda tensor: tensor[index : index + 1])


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Of every parameter: what does not matter has none, 0 or 1e-17, by the way it was computed."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_near(found: list[Tensor], wanted: list[Tensor], what: str) -> None:
    for one, other in zip(found, wanted, strict=True):
        scale = float(other.detach().abs().max()) if other.numel() else 0.0
        error = float((one - other).detach().abs().max()) if other.numel() else 0.0
        assert error <= TOLERANCE * max(scale, 1e-3), f"{what}: {error} of {scale}"


def check_adaptive_laws(
    model: nn.Module,
    example_inputs,
    seed: int,
    *,
    per: str = "block",
    is_scored: bool = False,
    own_readers: bool = False,
) -> swan.AdaptiveModel | None:
    """All laws; None where nothing can adapt (and `adapt` says why).

    `is_scored`: widths are allocated by scores at random; `own_readers`: each has readers of its own.
    """
    before = fingerprint(model)
    wanted = outputs(model, example_inputs)
    options: dict[str, Any] = {"widths": (0.3, 0.6, 1.0), "per": per}
    try:
        if is_scored:
            units = swan.swanify(model, example_inputs, in_place=True).channels.num_units
            scores = torch.rand(units, generator=torch.Generator().manual_seed(seed))
            options["scores"] = scores
        adapted = swan.adapt(model, example_inputs, **options).eval()
    except swan.NoGateableChannelsError:
        assert_same_fingerprint(before, fingerprint(model))
        return None
    assert_same_fingerprint(before, fingerprint(model))
    assert_near(outputs(adapted, example_inputs), wanted, "all open is the given model")
    generator = torch.Generator().manual_seed(seed)
    randomise_statistics_(adapted, generator)
    if own_readers:
        own_readers_(adapted, generator)
    inputs = samples_of(example_inputs, 4)
    names = list(adapted.costs.blocks)
    drawn = torch.randint(3, (4, len(names)), generator=generator)
    check_masked(adapted, inputs, drawn)
    aim_(adapted, generator)
    check_masked(adapted, inputs, {})  # as it chooses: gradients of who looks too
    small = swan.compact(adapted)
    with torch.no_grad():
        taken = small.taken(*inputs.args, **inputs.kwargs)
        with adapted.holding(taken.levels):
            held = run(adapted, inputs)
        assert_near(run(small, inputs), held, "taken as it says")
        for index in range(2):
            one = row(inputs, index)
            alone = small.taken(*one.args, **one.kwargs)
            assert torch.equal(alone.levels[0], taken.levels[index])
            assert int(alone.macs[0]) == int(taken.macs[index])
            counted = swan.count_macs(small, (one.args or dict(one.kwargs)))
            assert counted == int(alone.macs[0]), "counted MACs are those expected"
    check_static(adapted, inputs)
    return adapted


def check_masked(
    adapted: swan.AdaptiveModel, inputs: Inputs, held: Any, *, compact: str = "group"
) -> None:
    """Groups or gathers compute what masks compute: outputs, and gradients of weights."""
    found = {}
    for way in ("masked", compact):
        adapted.execution = way
        adapted.zero_grad()
        with adapted.holding(held):
            results = run(adapted, inputs)
        generator = torch.Generator().manual_seed(3)
        total = sum((r * torch.randn(r.shape, generator=generator).double()).sum() for r in results)
        total.backward()
        found[way] = [r.detach() for r in results], gradients_of(adapted)
    adapted.zero_grad()
    assert_near(found[compact][0], found["masked"][0], f"{compact} is masked")
    assert_near(found[compact][1], found["masked"][1], f"gradients of {compact} are of masked")


def check_static(adapted: swan.AdaptiveModel, inputs: Inputs) -> None:
    """A width as a static model; and without means, and with the given statistics, a cut."""
    with torch.no_grad():
        for level, width in enumerate(adapted.widths):
            with adapted.holding(level):
                assert_near(run(adapted.at(width), inputs), run(adapted, inputs), "a static width")
    if any(level.has_own for block in adapted.blocks().values() for level in block.statistics):
        return
    plain = copy.deepcopy(adapted)
    for block in plain.blocks().values():
        levels: Any = block.statistics
        for level, own in zip(levels, block.narrowings, strict=True):
            for name, tensor in level.named_buffers():
                if name.startswith("mean"):
                    tensor.zero_()
            for name in level.norms:
                norm = block.full.get_submodule(name)
                assert isinstance(norm, _BatchNorm)
                for statistic, tensor in level.norm(name).items():
                    tensor.copy_(own.view(f"{name}.{statistic}", getattr(norm, statistic)))
    mask = torch.ones(plain.structure.channels.num_units, dtype=torch.bool)
    for group, counts in zip(plain.structure.groups, plain.structure.counts, strict=True):
        mask[list(group.units[counts[0] :])] = False
    cut = apply_plan(plain.dense_model(), make_plan(plain.structure.channels, mask))
    with torch.no_grad(), plain.holding(0):
        assert_near(run(plain, inputs), run(cut, inputs), "constant gates are a cut")


def gate_(adapted: swan.AdaptiveModel, generator: torch.Generator) -> None:
    """Gates of free units at random: samples open units of their own."""
    with torch.no_grad():
        for block in adapted.blocks().values():
            block.effort.weight.normal_(generator=generator)
            block.effort.bias.normal_(generator=generator)


def check_free_laws(
    model: nn.Module, example_inputs, seed: int, **settings: Any
) -> swan.AdaptiveModel | None:
    """All laws of free units, or of blocks of neurons; None where nothing can adapt."""
    settings = {"structure": "free", **settings}
    before = fingerprint(model)
    wanted = outputs(model, example_inputs)
    try:
        adapted = swan.adapt(model, example_inputs, **settings).eval()
    except swan.NoGateableChannelsError:
        return None
    assert_same_fingerprint(before, fingerprint(model))
    assert_near(outputs(adapted, example_inputs), wanted, "all open is the given model")
    generator = torch.Generator().manual_seed(seed)
    randomise_statistics_(adapted, generator)
    assert_near(outputs(adapted, example_inputs), wanted, "means are read by who closes alone")
    inputs = samples_of(example_inputs, 4)
    compact = "gather" if settings["structure"] == "free" else "group"
    _, constant, *many = adapted.choices.tried(4, generator)
    for drawn in many:  # by sample, and by token where there are tokens
        check_masked(adapted, inputs, drawn, compact=compact)
    adapted.execution = "masked"
    gate_(adapted, generator)
    check_train_mode(adapted, inputs)
    small = swan.compact(adapted)
    with torch.no_grad():
        taken = small.taken(*inputs.args, **inputs.kwargs)
        with adapted.holding(taken.choices):
            assert_near(run(small, inputs), run(adapted, inputs), "taken as it says")
        for index in range(2):
            one = row(inputs, index)
            alone = small.taken(*one.args, **one.kwargs)
            assert torch.equal(alone.levels[0], taken.levels[index])
            assert int(alone.macs[0]) == int(taken.macs[index])
            counted = swan.count_macs(small, (one.args or dict(one.kwargs)))
            assert counted == int(alone.macs[0]), "counted MACs are those expected"
        check_ceiling(adapted, small, inputs)
    check_constant(adapted, inputs, constant)
    return adapted


def check_ceiling(adapted: swan.AdaptiveModel, small: swan.AdaptiveModel, inputs: Inputs) -> None:
    """No sample exceeds it, whoever was below takes what it took, and nothing opens."""
    free = adapted.taken(*inputs.args, **inputs.kwargs)
    costs: Any = adapted.costs
    least, most = adapted.costs.least, int(free.macs.max())
    for ceiling in (least, (max(least, int(free.macs.min())) + most) // 2, most):
        if ceiling < least:
            continue
        adapted.max_macs = small.max_macs = ceiling
        taken = small.taken(*inputs.args, **inputs.kwargs)
        assert int(taken.macs.max()) <= ceiling
        was_below = free.macs <= ceiling
        for name, masks in free.choices.items():  # a block of few neurons takes less than its least
            was_below &= costs.above_least(name, masks) >= 0
        assert torch.equal(taken.macs[was_below], free.macs[was_below])
        assert_near(run(small, inputs), run(adapted, inputs), "compact is masked under a ceiling")
        first = next(iter(taken.choices))  # what runs behind it reads other inputs
        assert not bool((taken.choices[first] & ~free.choices[first]).any()), "it opens nothing"
    adapted.max_macs = small.max_macs = None


def check_train_mode(adapted: swan.AdaptiveModel, inputs: Inputs) -> None:
    """Gates with gradients open what gates without them open, in blocks that train too."""
    with torch.no_grad():
        wanted = adapted.taken(*inputs.args, **inputs.kwargs)
    for block in adapted.modules():
        if isinstance(block, AdaptiveBlock):
            block.training = True  # the norms inside stay as they are
    adapted.execution = "gather"  # which training does not follow
    found = adapted.taken(*inputs.args, **inputs.kwargs)
    assert torch.equal(found.levels, wanted.levels)
    for one, other in zip(tree_leaves(found.output), tree_leaves(wanted.output), strict=True):
        if isinstance(one, Tensor):
            assert_near([one], [other], "training is masked too")
    swan.gate_penalty(adapted.train(), found, macs=1e-6).backward()
    for block in adapted.eval().blocks().values():
        assert block.effort.weight.grad.any(), "the budget reaches w"
    adapted.execution = "masked"
    adapted.zero_grad()


def check_constant(adapted: swan.AdaptiveModel, inputs: Inputs, mask: Tensor) -> None:
    """Gates that are the same for all inputs are a cut, with the means of what is closed in the biases."""
    chosen = adapted.choices.by_block(mask)
    with torch.no_grad():
        for name, block in adapted.blocks().items():
            block.effort.weight.zero_()
            block.effort.bias.copy_(torch.where(chosen[name], 3.0, -3.0))
        dense = adapted.dense_model()
        gated = swan.swanify(dense, adapted.structure.example_inputs, in_place=True)
        gated.gates.logits.fill_(3.0)
        gated.gates.logits[~adapted.choices.static(mask)[1]] = -3.0
        small = swan.prune(gated)
        for name, block in adapted.blocks().items():
            compensate_by_hand_(dense, small, block, chosen[name])
        assert_near(run(adapted, inputs), run(small, inputs), "constant gates are a cut")
        assert_near(run(adapted.at(mask), inputs), run(small, inputs), "and a static model")


def compensate_by_hand_(dense: nn.Module, small: nn.Module, block: Any, mask: Tensor) -> None:
    """Weights of closed inputs times their mean, into the biases of a cut's readers."""
    if hasattr(block, "sizes"):
        mask = mask.repeat_interleave(torch.tensor(block.sizes))
    prefix = f"{block.name}." if block.name else ""
    (level,) = block.statistics
    outputs = {
        own.tensor: mask[group.start : group.stop].repeat_interleave(own.run)
        for group in block.groups
        for own in group.axes
        if own.axis == 0 and own.tensor.removesuffix(".weight") not in group.readers
    }
    for group in block.groups:
        for reader, times in zip(group.readers, group.runs, strict=True):
            closed = ~mask[group.start : group.stop].repeat_interleave(times)
            own = dense.get_submodule(f"{prefix}{reader}")
            weight = (own.weight.T if type(own).__name__ == "Conv1D" else own.weight)[:, closed]
            added = weight.flatten(1) @ level.mean(reader)[closed].flatten()
            layer: Any = small.get_submodule(f"{prefix}{reader}")
            give_bias_(layer)
            layer.bias += added[outputs.get(f"{reader}.weight", slice(None))]
