"""Rules for operations that mix positions: normalisation, reduction, pooling, resampling."""

import torch
from torch import Tensor

from swan_surgery.channels.labels.fields import Fields, align, axes_of, axis_field, vector_along
from swan_surgery.channels.labels.labels import Labels
from swan_surgery.channels.labels.recording import Call
from swan_surgery.channels.rules.on_meta import (
    all_boxes,
    all_nonzero,
    all_selected,
    batch_norm_shape,
    group_norm_shape,
    layer_norm_shape,
)
from swan_surgery.channels.rules.registry import as_tuple, describe, facts_of, pin_inputs, rule


@rule("native_batch_norm", on_meta={"default": batch_norm_shape})
@rule(
    "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "batch_norm", "_batch_norm_no_update", "native_batch_norm_legit",
    "miopen_batch_norm",
)  # fmt: skip
def _(call: Call, labels: Labels) -> None:
    source, out = call.inputs[0], call.outputs[0]
    for field in labels.fields(source):
        if axes_of(field) not in ((), (1,)):
            labels.pin(field, "normalised together with other channels", call)
    data, _ = vector_along(labels.fields(source), 1)
    for parameter in call.inputs[1:]:
        own, _ = vector_along(labels.fields(parameter), 0)
        if data is not None and own is not None:
            labels.join(data, own, call)
        elif own is not None:
            labels.pin(own, "normalises data that belongs to no channel", call)
            data = None
        elif data is not None and parameter.numel() > 1:
            labels.pin(data, "normalised with statistics that have no channel labels", call)
    if data is None:
        return
    labels.assign(out, (axis_field(data, 1, out.ndim),))
    for statistic in call.outputs[1:]:
        if statistic.shape == data.shape:
            labels.assign(statistic, (data,))


@rule("native_layer_norm", on_meta={"default": layer_norm_shape})
@rule("_fused_rms_norm")
def _(call: Call, labels: Labels) -> None:
    source, out = call.inputs[0], call.outputs[0]
    rank = len(call.args[1])
    normalised = set(range(source.ndim - rank, source.ndim))
    lead = source.ndim - rank
    parameters = [(t, labels.fields(t)) for t in call.inputs[1:]]
    fields = _counted(labels.fields(source), normalised, call, labels)
    for parameter, own in parameters:
        for field in own:
            aligned = align(field, source.ndim)
            twin = next((f for f in fields if axes_of(f) == axes_of(aligned)), None)
            if twin is not None:
                labels.join(twin, aligned, call)
            else:
                labels.pin(field, "normalises data that belongs to no channel", call)
        bare = {axis for f in own for axis in axes_of(align(f, source.ndim))}
        for field in fields:
            inside = set(axes_of(field)) & normalised
            if inside - bare and any(parameter.shape[axis - lead] > 1 for axis in inside):
                labels.pin(field, "normalised with parameters that have no channel labels", call)
    labels.assign(out, tuple(fields))
    for statistic in call.outputs[1:]:
        kept = tuple(f for f in fields if not set(axes_of(f)) & normalised)
        labels.assign(statistic, kept)


def _counted(fields: Fields, summed: set[int], call: Call, labels: Labels) -> list[Tensor]:
    """Fields of data whose statistics are taken over `summed`: weighted, passed by, or pinned."""
    result = []
    for field in fields:
        inside = set(axes_of(field)) & summed
        result.append(field)
        if not inside or labels.is_probe:
            continue
        if len(axes_of(field)) > 1:
            labels.pin(field, "normalised with other channels, over several axes", call)
        elif not labels.weigh(field, call):
            labels.pin(field, "a normalisation over the channels themselves", call)
    return result


@rule("native_group_norm", on_meta={"default": group_norm_shape})
def _(call: Call, labels: Labels) -> None:
    source, out = call.inputs[0], call.outputs[0]
    groups = call.arg("group")
    width = source.shape[1] // groups
    for field in labels.fields(source):
        if axes_of(field) not in ((), (0,), (1,)):
            labels.pin(field, "normalised together with other channels", call)
    data, _ = vector_along(labels.fields(source), 1)
    _meet_affine(data, call, labels)
    if data is None:
        return
    field = axis_field(data, 1, source.ndim)
    if width > 1:
        # Groups stay equally wide: the same positions go from each.
        blocks = data.view(groups, width)
        labels.join(blocks[:1].expand_as(blocks), blocks, call)
        if not labels.weigh(field, call):
            labels.pin(field, "a normalisation over the channels themselves", call)
    labels.assign(out, (field,))
    if labels.is_single(call, now=width == 1):
        for statistic in call.outputs[1:]:
            labels.assign(statistic, (axis_field(data, 1, statistic.ndim),))


def _meet_affine(data: Tensor | None, call: Call, labels: Labels) -> None:
    """The channels of a group normalisation meet those of its parameters."""
    for parameter in call.inputs[1:]:
        own, _ = vector_along(labels.fields(parameter), 0)
        if data is not None and own is not None:
            labels.join(data, own, call)
        elif own is not None:
            labels.pin(own, "normalises data that belongs to no channel", call)
        elif data is not None and parameter.numel() > 1:
            labels.pin(data, "normalised with parameters that have no channel labels", call)


@rule(
    "mean", "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "var_mean", "std_mean",
    "any", "all", "median", "nanmean", "aminmax",
)  # fmt: skip
@rule(
    "sum", "nansum", "prod", "norm", "linalg_vector_norm", "logsumexp", "count_nonzero",
    "_softmax", "softmax", "_log_softmax", "log_softmax", "_safe_softmax", counts=True,
)  # fmt: skip
@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "topk", by_place=True)
def _(call: Call, labels: Labels) -> None:
    reduce(call, labels, as_tuple(call.arg("dim")))


def reduce(call: Call, labels: Labels, axes: tuple[int, ...]) -> None:
    """Something is taken over some axes (none: all) of the first tensor; channels on others stay."""
    source = call.inputs[0]
    for other in call.inputs[1:]:
        for field in labels.fields(other):
            labels.pin(field, "an operand of a reduction", call)
    dims = {axis % max(source.ndim, 1) for axis in axes} or set(range(source.ndim))
    kept = []
    for field in labels.fields(source):
        if not set(axes_of(field)) & dims:
            kept.append(field)
        elif len(axes_of(field)) > 1 or not labels.weigh(field, call):
            labels.pin(field, "a reduction over the channels", call)
    by_place = facts_of(call.op).by_place
    for out in call.outputs:
        labels.assign(out, tuple(_reduced(f, source, out, dims) for f in kept))
        if labels.is_harmless(source):
            # Equal values, but their running sums or places differ.
            varying = {d for d in dims if source.shape[d] > 1} if by_place else set()
            labels.mark_harmless(out, frozenset(varying))


def _reduced(field: Tensor, source: Tensor, out: Tensor, dims: set[int]) -> Tensor:
    if out.ndim == source.ndim:
        return field
    return field.squeeze(tuple(dims))


@rule("avg_pool1d", "adaptive_avg_pool1d", spatial_rank=1, averages=True)
@rule("avg_pool2d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", spatial_rank=2, averages=True)
@rule("avg_pool3d", "_adaptive_avg_pool3d", spatial_rank=3, averages=True)
@rule(
    "max_pool1d", "adaptive_max_pool1d", "upsample_nearest1d", "_upsample_nearest_exact1d",
    "upsample_linear1d", "reflection_pad1d", "replication_pad1d", spatial_rank=1,
)  # fmt: skip
@rule(
    "max_pool2d", "max_pool2d_with_indices", "adaptive_max_pool2d", "upsample_nearest2d",
    "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad2d", "replication_pad2d",
    spatial_rank=2,
)  # fmt: skip
@rule(
    "max_pool3d", "max_pool3d_with_indices", "adaptive_max_pool3d", "upsample_nearest3d",
    "_upsample_nearest_exact3d", "upsample_trilinear3d", "reflection_pad3d", "replication_pad3d",
    spatial_rank=3,
)  # fmt: skip
def _(call: Call, labels: Labels) -> None:
    source, facts = call.inputs[0], facts_of(call.op)
    spatial = set(range(source.ndim - facts.spatial_rank, source.ndim))
    kept = []
    for field in labels.fields(source):
        if set(axes_of(field)) & spatial:
            labels.pin(field, "pooled or resampled along the channels", call)
        else:
            kept.append(field)
    for out in call.outputs:
        if out.ndim == source.ndim:
            labels.assign(out, tuple(kept))
            if labels.is_harmless(source):
                # A border of zeros is averaged in.
                padded = facts.averages and any(as_tuple(call.arg("padding", 0)))
                labels.mark_harmless(out, frozenset(spatial if padded else ()))


# Sampling at positions or in boxes: the axes of the source that come out as they went in.
_SAMPLED_BESIDE = {
    "aten.grid_sampler_2d": ((), (0,), (1,)),
    "aten.grid_sampler_3d": ((), (0,), (1,)),
    "torchvision.roi_align": ((), (1,)),
    "torchvision.roi_pool": ((), (1,)),
    "torchvision.ps_roi_align": (),
}


@rule(*_SAMPLED_BESIDE)
def _(call: Call, labels: Labels) -> None:
    source, positions = call.inputs[:2]
    for field in labels.fields(positions):
        labels.pin(field, "used as sampling positions", call)
    kept = []
    for field in labels.fields(source):
        if axes_of(field) in _SAMPLED_BESIDE[call.name]:
            kept.append(field)
        else:
            labels.pin(field, "sampled along the channels", call)
    for out in call.outputs:
        if out.ndim == source.ndim:  # what was sampled, and where each maximum was
            labels.assign(out, tuple(kept))


# How much these return depends on values; while planning, everything is selected.
@rule("torchvision.nms", selects=True, on_meta={"default": all_boxes})
@rule("nonzero", selects=True, on_meta={"default": all_nonzero})
@rule("masked_select", selects=True, on_meta={"default": all_selected})
def _(call: Call, labels: Labels) -> None:
    pin_inputs(call, labels, "values that decide what is selected")


describe("_unique2", by_value=True, counts=True)


@rule("glu")
def _(call: Call, labels: Labels) -> None:
    source, out = call.inputs[0], call.outputs[0]
    axis = call.arg("dim", -1) % source.ndim
    fields = []
    for field in labels.fields(source):
        if axis not in axes_of(field):
            fields.append(field)
            continue
        half = source.shape[axis] // 2
        first, second = field.narrow(axis, 0, half), field.narrow(axis, half, half)
        both = (first > 0) & (second > 0)
        labels.tie_by([[(first[both], second[both])]], call)
        fields.append(torch.where(first > 0, first, second))
    labels.assign(out, tuple(fields))


@rule("_weight_norm_interface", "_weight_norm")
def _(call: Call, labels: Labels) -> None:
    direction, size = call.inputs[:2]
    axis = call.arg("dim", 0) % direction.ndim
    kept = []
    for field in labels.fields(direction):
        if axes_of(field) == (axis,):
            for other in labels.fields(size):
                if axes_of(other) == (axis,):
                    labels.join(field, other, call)
        else:
            labels.pin(field, "a weight is normalised over these inputs", call)
        kept.append(field)
    labels.assign(call.outputs[0], tuple(kept))
    for norm in call.outputs[1:]:
        labels.assign(norm, labels.fields(size))
