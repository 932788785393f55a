"""Cuts tensors of a model along axes, in place, and lets the layers' own width attributes follow.

The one place that removes anything. It works on a private copy, on real and on `meta` tensors alike:
planning rehearses cuts on a shell of the model, `prune` performs them.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from swan_surgery.models.slim_attention import SlimAttention
from swan_surgery.models.tensors import named_tensors, plain_tensors


# tensor name -> axis -> positions that stay, shape (n,), sorted
Cuts = Mapping[str, Mapping[int, Tensor]]


def cut_(model: nn.Module, cuts: Cuts) -> None:
    """Keep only the given positions of the named tensors of `model`.

    Tied parameters stay tied, `requires_grad`, dtype, device and memory format stay as they were;
    gradients are dropped. `in_channels`, `out_channels`, `groups`, `num_features`, `in_features`,
    `out_features`, `hidden_size` and the like follow the tensors.

    Raises:
        IndexError: a position lies outside its axis.
    """
    wanted: dict[int, Mapping[int, Tensor]] = {}
    for name, tensor in named_tensors(model):
        if name in cuts:
            wanted[id(tensor)] = cuts[name]
    done: dict[int, Tensor] = {}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()  # reading a spectral-normed weight in train mode would change its buffers
    for module in model.modules():
        stores: list[dict[str, Any]] = [module._parameters, module._buffers, vars(module)]  # noqa: SLF001
        own: dict[str, Any] = plain_tensors(module) | module._parameters | module._buffers  # noqa: SLF001
        hit = {key: tensor for key, tensor in own.items() if id(tensor) in wanted}
        for key, tensor in hit.items():
            if id(tensor) not in done:
                done[id(tensor)] = _cut_tensor(tensor, wanted[id(tensor)])
            next(store for store in stores if key in store)[key] = done[id(tensor)]
        if hit or is_parametrized(module):
            _update_widths_(module)
    for module in model.modules():
        if isinstance(module, SlimAttention):
            module.follow_widths_()
    for module, training in modes:
        module.training = training


def _cut_tensor(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    result = tensor.detach()
    for axis, positions in axes.items():
        size = tensor.shape[axis]
        if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < size:
            raise IndexError(f"positions to keep lie outside axis {axis} of size {size}")
        if positions.numel() != result.shape[axis]:
            result = result.index_select(axis, positions.to(tensor.device))
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        is_last = tensor.ndim == rank and tensor.is_contiguous(memory_format=layout)
        if is_last and not tensor.is_contiguous():
            result = result.contiguous(memory_format=layout)
    if result.data_ptr() == tensor.data_ptr():
        result = result.clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(result, requires_grad=tensor.requires_grad)
    return result


def _is_deformable(module: nn.Module) -> bool:
    """One of torchvision's deformable convolutions; whoever has one has imported it."""
    ops: Any = sys.modules.get("torchvision.ops")
    return ops is not None and isinstance(module, ops.DeformConv2d)


def _update_widths_(module: nn.Module) -> None:
    if isinstance(module, _ConvNd) or _is_deformable(module):
        _update_convolution_(module)
    else:
        _update_other_widths_(module)


def _update_convolution_(module: Any) -> None:
    transposed = bool(getattr(module, "transposed", False))
    per_group = module.weight.shape[0 if transposed else 1]
    if transposed:
        depthwise = module.groups == module.in_channels
        module.groups = per_group if depthwise else module.groups
        module.in_channels = per_group
        module.out_channels = module.weight.shape[1] * module.groups
    else:
        depthwise = module.groups == module.in_channels and module.groups > 1
        rows = module.weight.shape[0]
        if depthwise:
            module.groups = rows * module.groups // module.out_channels
        module.out_channels = rows
        module.in_channels = per_group * module.groups


def _update_other_widths_(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (_NormBase,)):
        lead = next((t for t in (module.weight, module.running_mean) if t is not None), None)
        if lead is not None:
            module.num_features = lead.shape[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = module.weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        _update_recurrent_widths_(module)
    elif hasattr(module, "num_features") and (width := _width(module)) is not None:
        setattr(module, "num_features", width)  # noqa: B010 - mypy sees no such attribute


def _update_recurrent_widths_(module: nn.RNNBase | nn.RNNCellBase) -> None:
    if isinstance(module, nn.RNNCellBase):
        module.hidden_size, module.input_size = module.weight_hh.shape[1], module.weight_ih.shape[1]
        return
    first = [module.get_parameter(name) for name in module._flat_weights_names]  # noqa: SLF001 - torch's only access
    module.input_size = first[0].shape[1]
    if module.proj_size:
        module.proj_size, module.hidden_size = module.get_parameter("weight_hr_l0").shape
    else:
        module.hidden_size = first[1].shape[1]
    module._init_flat_weights()  # noqa: SLF001 - the list that torch's forward reads


def _width(module: nn.Module) -> int | None:
    """FrozenBatchNorm2d and its like keep their statistics as buffers."""
    weight = getattr(module, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 1 else None
