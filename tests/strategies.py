"""Hypothesis strategies for small random networks: draw a description, build from it, shrink to the least failing one.

A description (`NetworkSpec`) is plain data whose repr can be pasted back: `build(NetworkSpec(...))` is the same
network, weights and inputs included. Kinds and options stand in the registries `BLOCKS` and `HEADS`, simplest
first, so hypothesis shrinks toward few, plain, narrow blocks. Nothing here touches the global random state.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import (  # noqa: F401  importing a block file registers its kinds
    random_attention_blocks,
    random_blocks,
    random_channel_attention_blocks,
    random_channel_blocks,
    random_convnext_blocks,
    random_cross_blocks,
    random_elementwise_blocks,
    random_heads,
    random_norm_blocks,
    random_rare_attention_blocks,
    random_rare_blocks,
    random_sequence_blocks,
    random_sharing_blocks,
    random_split_blocks,
    random_transformer_blocks,
    random_window_blocks,
)
from tests.random_layers import BLOCKS, HEADS, Kind, Option, Shape, conv_stack, randomise_


BATCH = 2
EASY_BLOCKS = tuple(name for name, kind in BLOCKS.items() if kind.easy)
EASY_HEADS = tuple(name for name, kind in HEADS.items() if kind.easy)
STEM = {
    "width": (2, 3, 4, 5, 6),
    "kernel": (3, 1),
    "bn": (True, False),
    "activation": ("relu", "none", "silu", "sigmoid"),
}


@dataclass(frozen=True)
class PartSpec:
    """One block, head or stem: its kind and its constructor options, sorted by name."""

    kind: str
    options: tuple[tuple[str, Option], ...]


@dataclass(frozen=True)
class NetworkSpec:
    """Everything `build` needs. `second` says how a second input joins the first, if there is one."""

    seed: int
    image: int
    in_channels: int
    second: str | None
    stem: PartSpec
    blocks: tuple[PartSpec, ...]
    head: PartSpec


@dataclass(frozen=True)
class Case:
    """A network in eval mode and float64 with its inputs; `description` is its printable recipe."""

    description: NetworkSpec
    model: nn.Module = field(repr=False)
    inputs: tuple[Tensor, ...] = field(repr=False)


class RandomNetwork(nn.Module):
    """Stem, blocks, head. The head also gets the map behind the first block."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def features(self, x: Tensor, raw: Tensor):
        mid = x
        for i, block in enumerate(self.blocks):
            x = block(x, raw) if hasattr(block, "uses_raw") else block(x)
            mid = x if i == 0 else mid
        return self.head(x, mid)

    def forward(self, x: Tensor):
        return self.features(self.stem(x), x)


class TwoInputNetwork(RandomNetwork):
    """The same with a second input that has its own stem."""

    def __init__(self, stem, blocks, head, *, second_stem: nn.Module, merge: str) -> None:
        super().__init__(stem, blocks, head)
        self.second_stem = second_stem
        self.merge = merge

    def forward(self, x: Tensor, y: Tensor):
        first, second = self.stem(x), self.second_stem(y)
        if self.merge == "cat":
            return self.features(torch.cat((first, second), dim=1), x)
        if self.merge == "multiply":
            return self.features(first * torch.sigmoid(second), x)
        return self.features(first + second, x)


def _shape_behind(block: nn.Module, shape: Shape, in_channels: int, image: int) -> Shape:
    inputs = [torch.zeros(BATCH, *shape)]
    if hasattr(block, "uses_raw"):
        inputs.append(torch.zeros(BATCH, in_channels, image, image))
    with torch.no_grad():
        return tuple(block.eval()(*inputs).shape[1:])


def _build_model(spec: NetworkSpec) -> nn.Module:
    stem_options = dict(spec.stem.options)
    width = stem_options.pop("width")
    stem = conv_stack(spec.in_channels, width, **stem_options)
    channels = 2 * width if spec.second == "cat" else width
    shape = (channels, spec.image, spec.image)
    shapes, blocks = [shape], []
    for part in spec.blocks:
        blocks.append(BLOCKS[part.kind].factory(shape, **dict(part.options)))
        shape = _shape_behind(blocks[-1], shape, spec.in_channels, spec.image)
        shapes.append(shape)
    head = HEADS[spec.head.kind].factory(
        shape, shapes[min(1, len(blocks))], **dict(spec.head.options)
    )
    if spec.second is None:
        return RandomNetwork(stem, blocks, head)
    second = conv_stack(1, width)
    return TwoInputNetwork(stem, blocks, head, second_stem=second, merge=spec.second)


def build(spec: NetworkSpec) -> Case:
    """The network and inputs of a description; the same description gives equal bits every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = _build_model(spec).double()
        generator = torch.Generator().manual_seed(spec.seed)
        randomise_(model, generator)
        widths = [spec.in_channels] if spec.second is None else [spec.in_channels, 1]
        inputs = tuple(
            torch.randn(
                BATCH, width, spec.image, spec.image, dtype=torch.float64, generator=generator
            )
            for width in widths
        )
    return Case(spec, model.eval(), inputs)


def _parts(name: str, options: Mapping[str, tuple[Option, ...]]) -> st.SearchStrategy[PartSpec]:
    drawn = {key: st.sampled_from(values) for key, values in options.items()}
    return st.fixed_dictionaries(drawn).map(lambda d: PartSpec(name, tuple(sorted(d.items()))))


def _choice(table: Mapping[str, Kind], names: tuple[str, ...]) -> st.SearchStrategy[PartSpec]:
    return st.sampled_from(names).flatmap(lambda name: _parts(name, table[name].options))


def descriptions(
    blocks: tuple[str, ...] = tuple(BLOCKS),
    heads: tuple[str, ...] = tuple(HEADS),
    max_blocks: int = 4,
) -> st.SearchStrategy[NetworkSpec]:
    """Descriptions of networks with these kinds of blocks and heads."""
    choice = _choice(BLOCKS, blocks)
    # Alone, the first alternative draws a single block half of the time; shrinking still ends in it.
    sequences = st.one_of(
        st.lists(choice, min_size=1, max_size=max_blocks),
        st.lists(choice, min_size=min(3, max_blocks), max_size=max_blocks),
    )
    return st.builds(
        NetworkSpec,
        seed=st.integers(0, 2**16),
        image=st.sampled_from((6, 8)),
        in_channels=st.integers(1, 3),
        second=st.sampled_from((*[None] * 9, "add", "cat", "multiply")),
        stem=_parts("stem", STEM),
        blocks=sequences.map(tuple),
        head=_choice(HEADS, heads),
    )


def networks() -> st.SearchStrategy[Case]:
    """Networks of every kind, pinned and unknown mechanisms included."""
    return descriptions().map(build)


def easy_networks() -> st.SearchStrategy[Case]:
    """Networks of the mechanisms that must be converted without unknown operations."""
    return descriptions(EASY_BLOCKS, EASY_HEADS).map(build)


def option_specs(table: Mapping[str, Kind], name: str) -> list[PartSpec]:
    """The simplest variant of a kind, and one variant per other value of each of its options."""
    options = table[name].options
    simplest = {key: values[0] for key, values in options.items()}
    variants = [simplest]
    variants += [simplest | {key: value} for key, values in options.items() for value in values[1:]]
    return [PartSpec(name, tuple(sorted(variant.items()))) for variant in variants]


def simple_network(*blocks: PartSpec, head: PartSpec | None = None, **fields) -> NetworkSpec:
    """A description around the given blocks with the plainest stem and head."""
    stem = PartSpec("stem", tuple(sorted({key: values[0] for key, values in STEM.items()}.items())))
    fields = {"seed": 0, "image": 6, "in_channels": 3, "second": None, "stem": stem} | fields
    return NetworkSpec(blocks=blocks, head=head or option_specs(HEADS, "classifier")[0], **fields)
