"""Measures models: memory, latency, layers, and what the MAC counter leaves out.

Every function works on a model it may run; `report` hands in copies in eval mode.
"""

import re
import warnings

from torch import nn
from torch.nn.modules.conv import _ConvNd

from swan_surgery.costs.counting import count_operators
from swan_surgery.errors import SwanWarning
from swan_surgery.models import Inputs
from swan_surgery.reporting.figures import Figures, LayerFigures


# Operations without products of two activations or of weights: arithmetic per element, activation,
# normalisation, pooling, reduction, resampling, bookkeeping. The convention of `count_macs` leaves
# them out, so that naming them would only hide the others.
_FREE = re.compile(
    r"""aten::_?(
      (add|sub|rsub|mul|div|neg|pow|sqrt|rsqrt|exp|log|abs|square|reciprocal|round|sign)
    | (sigmoid|tanh|(safe_|log_)?softmax|\w*relu\w*|\w*elu|silu|mish|hard\w+|softplus|leaky_relu)
    | (\w*_norm|\w*_norm_\w*|\w*pool\w*|\w*upsample_\w+|pixel_(un)?shuffle|channel_shuffle|\w*dropout\w*)
    | (mean|sum|prod|var|std|var_mean|std_mean|a?(min|max)|aminmax|argmax|argmin|norm|all|any|topk|sort)
    | (cum\w+|logcumsumexp|logsumexp|median|mode|kthvalue)
    | (where|clone|lift_fresh|repeat|repeat_interleave|tile|flip|roll|unfold|im2col|col2im|pad)
    | (reflection_pad\w+|replication_pad\w+|constant_pad_nd|embedding|embedding_bag|one_hot)
    | (cat|stack|copy|to_copy|contiguous|fill|zero|zeros_like|ones_like|full_like|empty_like|new_\w+)
    | (rand\w*|bernoulli|normal|uniform|triu|tril|diag\w*|linspace|index|index_\w+|gather|take\w*)
    | (scatter\w*|masked_\w+|nonzero|local_scalar_dense|unsafe_\w+|reshape_\w+|resize|set_\w*)
    )_?$""",
    re.VERBOSE,
)


def uncounted_ops(model: nn.Module, inputs: Inputs) -> tuple[tuple[str, int], ...]:
    """Operations without a formula that are not free, with their number of calls."""
    found = count_operators(model, inputs).uncounted
    open_ops = [(name, int(calls)) for name, calls in found.items() if not _FREE.match(name)]
    return tuple(sorted(open_ops, key=lambda entry: (-entry[1], entry[0])))


def layer_figures(model: nn.Module, inputs: Inputs) -> dict[str, LayerFigures]:
    """Every module with MACs of its own, and every convolution, linear and recurrent layer, in model order."""
    totals = count_operators(model, inputs).macs
    found = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        children = sum(totals.get(prefix + child, 0) for child, _ in module.named_children())
        own = totals.get(name, 0) - children
        widths: tuple[int | None, int | None] = (None, None)
        if isinstance(module, _ConvNd):
            widths = (module.in_channels, module.out_channels)
        elif isinstance(module, nn.Linear):
            widths = (module.in_features, module.out_features)
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            widths = _recurrent_widths(module)
        elif not own:
            continue
        params = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        found[name] = LayerFigures(*widths, macs=own, params=params)
    return found


def _recurrent_widths(module: nn.RNNBase | nn.RNNCellBase) -> tuple[int, int]:
    """What goes into the first layer, and the hidden units (projected ones) of both directions."""
    layer = "" if isinstance(module, nn.RNNCellBase) else "_l0"
    sides = 2 if getattr(module, "bidirectional", False) else 1
    into, hidden = (module.get_parameter(f"weight_{kind}{layer}").shape[1] for kind in ("ih", "hh"))
    return into, sides * hidden


def name_swapped(before: Figures, after: Figures) -> None:
    """Warn where the second model is the larger one of a class."""
    is_larger = after.macs > before.macs and after.params > before.params
    if is_larger and after.model == before.model:
        warnings.warn(
            f"the second model is the larger one ({after.macs:,} MACs, the first has {before.macs:,}): "
            f"swan.report takes the model before the cut first, swan.report(dense, small, ...)",
            SwanWarning,
            stacklevel=3,
        )


def size_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers, a tied one once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
