"""Images read as sequences, column by column: recurrent layers and cells, attention as a function, norms of vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_layers import BLOCKS, WIDTHS, Shape, entry, register


LAYERS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
    "projected": lambda width, hidden, *args, **options: nn.LSTM(
        width, 2 * hidden, *args, proj_size=hidden, **options
    ),
}


@register(
    BLOCKS,
    "recurrent",
    kind=tuple(LAYERS),
    width=WIDTHS,
    layers=(1, 2),
    both_ways=(False, True),
    layout=("batch first", "steps first"),
    bias=(True, False),
    start=("none", "zeros", "number", "learned", "computed"),
    end=("all", "last"),
    own=(True, False),
)
class Recurrent(nn.Module):
    """A recurrent layer along the image's width, from a state of its own."""

    def __init__(
        self, shape: Shape, *, kind, width, layers, both_ways, layout, bias, start, end, own
    ):
        super().__init__()
        self.entry, channels = entry(shape, width, own=own)
        self.hidden = width
        self.is_first, self.start, self.end = layout == "batch first", start, end
        self.layer = LAYERS[kind](
            channels, width, layers, batch_first=self.is_first, bidirectional=both_ways, bias=bias
        )
        states = layers * (1 + both_ways)
        self.states, self.cells = states, self.layer.hidden_size
        self.state = nn.Parameter(torch.zeros(states, 1, width))
        self.made = nn.Linear(channels, width)
        self.of_cells = nn.Linear(channels, self.cells)
        self.number = lambda x: x.new_zeros(states, len(x), width)  # as if it stood in the code

    def first(self, x: Tensor):  # [B, W, C]
        if self.start == "none":
            return None
        if self.start == "computed":
            h, c = (torch.tanh(f(x.mean(1))).repeat(self.states, 1, 1) for f in (self.made, self.of_cells))  # fmt: skip
        else:
            h = {
                "zeros": lambda: torch.zeros(self.states, len(x), self.hidden, dtype=x.dtype),
                "number": lambda: self.number(x),
                "learned": lambda: self.state.expand(-1, len(x), -1).contiguous(),
            }[self.start]()
            c = torch.ones(self.states, len(x), self.cells, dtype=x.dtype)
        return (h, c) if isinstance(self.layer, nn.LSTM) else h

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x).mean(2).transpose(1, 2)
        start = self.first(x)
        out, state = self.layer(x if self.is_first else x.transpose(0, 1), start)
        out = out if self.is_first else out.transpose(0, 1)
        if self.end == "last":
            state = state[0] if isinstance(state, tuple) else state
            return (out[:, -1] + torch.cat([*state[-(out.shape[2] // state.shape[2]) :]], 1))[:, :, None, None]  # fmt: skip
        return out.transpose(1, 2).unsqueeze(2)


@register(
    BLOCKS,
    "cell",
    kind=("LSTMCell", "GRUCell", "RNNCell"),
    width=WIDTHS,
    two=(False, True),
    start=("none", "zeros"),
    own=(True, False),
)
class Cells(nn.Module):
    """One cell, or two in turns, step by step."""

    def __init__(self, shape: Shape, *, kind, width, two, start, own):
        super().__init__()
        self.entry, channels = entry(shape, width, own=own)
        make = getattr(nn, kind)
        self.cells = nn.ModuleList([make(channels, width), make(width, width)][: 1 + two])
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x).mean(2)
        states: list = [None] * len(self.cells)
        if self.start == "zeros":
            states = [x.new_zeros(len(x), cell.hidden_size) for cell in self.cells]
            states = [(s, s) if isinstance(c, nn.LSTMCell) else s for c, s in zip(self.cells, states, strict=True)]  # fmt: skip
        found = []
        for step in range(x.shape[2]):
            out = x[:, :, step]
            for place, cell in enumerate(self.cells):
                states[place] = cell(out, states[place])
                out = states[place][0] if isinstance(cell, nn.LSTMCell) else states[place]
            found.append(out)
        return torch.stack(found, 2).unsqueeze(2)


@register(
    BLOCKS,
    "functional_attention",
    heads=(2, 1, 3),
    form=("packed", "separate", "causal", "weights"),
    own=(True, False),
)
class FunctionalAttention(nn.Module):
    """`F.multi_head_attention_forward` on parameters of its own, as CLIP's attention pool calls it."""

    def __init__(self, shape: Shape, *, heads, form, own):
        super().__init__()
        self.entry, channels = entry(shape, 2 * heads, own=own, multiple=heads)
        self.heads, self.form = heads, form
        self.parts = nn.ModuleList(nn.Linear(channels, channels) for _ in range(3))
        self.weight = nn.Parameter(torch.zeros(3 * channels, channels))
        self.bias = nn.Parameter(torch.zeros(3 * channels))
        self.last = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        tokens = x.flatten(2).permute(2, 0, 1)
        options = {}
        if self.form == "separate":
            options = {f"{n}_proj_weight": p.weight for n, p in zip("qkv", self.parts, strict=True)}
        if self.form == "causal":
            options["attn_mask"] = torch.ones(len(tokens), len(tokens)).triu(1).bool()
        out, _ = F.multi_head_attention_forward(
            *(tokens, tokens, tokens, tokens.shape[-1], self.heads),
            None if self.form == "separate" else self.weight,
            torch.cat([p.bias for p in self.parts]) if self.form == "separate" else self.bias,
            *(None, None, False, 0.0, self.last.weight, self.last.bias),
            training=self.training,
            need_weights=self.form == "weights",
            use_separate_proj_weight=self.form == "separate",
            **options,
        )
        return x + out.permute(1, 2, 0).reshape(x.shape[0], -1, *x.shape[2:])


VECTOR_NORMS = {
    "normalize": lambda x: F.normalize(x, dim=1),
    "normalize rms": lambda x: F.normalize(x, dim=1) * x.shape[1] ** 0.5,
    "normalize p": lambda x: F.normalize(x, p=3.0, dim=1, eps=1e-3),
    "vector_norm": lambda x: x / (1 + torch.linalg.vector_norm(x, dim=1, keepdim=True)),
    "norm of all": lambda x: x / (1 + torch.linalg.norm(x.flatten(1), dim=1)[:, None, None, None]),
    "over pixels": lambda x: F.normalize(x.flatten(2), dim=2).view_as(x),
}


@register(BLOCKS, "vector_norm", form=tuple(VECTOR_NORMS), width=WIDTHS, own=(True, False))
class VectorNorm(nn.Module):
    """Divided by the length of the vector of channels."""

    def __init__(self, shape: Shape, *, form, width, own):
        super().__init__()
        self.entry, channels = entry(shape, width, own=own)
        self.form = form
        self.gain = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return VECTOR_NORMS[self.form](self.entry(x)) * self.gain
