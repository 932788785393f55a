"""The rule of deformable convolution: a convolution whose samples lie where offsets say."""

from math import prod

from swan_surgery.channels.labels.fields import axes_of, axis_field, vector_along
from swan_surgery.channels.labels.labels import Labels
from swan_surgery.channels.labels.recording import Call, Contraction
from swan_surgery.channels.rules.contraction import join_bias, plain_groups, price, vector_of
from swan_surgery.channels.rules.op_facts import Shapes
from swan_surgery.channels.rules.registry import rule


def _macs(inputs: Shapes, outputs: Shapes) -> int:
    """As of a convolution; what it takes to interpolate the samples is not counted."""
    return prod(outputs[0]) * prod(inputs[1][1:])


@rule("torchvision.deform_conv2d", macs=_macs)
def _(call: Call, labels: Labels) -> None:
    source, weight, offset, mask, bias = call.inputs
    out, groups, offset_groups = call.outputs[0], call.arg("groups"), call.arg("offset_groups")
    for tensor in (offset, mask):
        for field in labels.fields(tensor):
            labels.pin(field, "used as sampling positions, or as their weights", call)
    for field in labels.fields(source):
        if axes_of(field) not in ((), (1,)):
            labels.pin(field, "channels lie on an axis the convolution slides over", call)
    for field in labels.fields(weight):
        if axes_of(field) and min(axes_of(field)) > 1:
            labels.pin(field, "a position of the kernel", call)
    data = vector_of(source, 1, call, labels)
    rows, columns = (vector_of(weight, axis, call, labels) for axis in (0, 1))
    if data is not None and offset_groups > 1:
        # Every group of channels is sampled at positions of its own: all stay equally wide.
        blocks = data.view(offset_groups, -1)
        labels.join(blocks[:1], blocks, call)
    made = plain_groups(data, rows, columns, groups, call, labels)
    if made is not None:
        labels.assign(out, (axis_field(made, 1, out.ndim),))
        if not labels.is_harmless(bias) or vector_along(labels.fields(bias), 0)[0] is not None:
            join_bias(made, bias, call, labels)
    summed = None if groups > 1 and labels.is_depthwise(call) else columns
    price(
        Contraction(
            call.name,
            call.module,
            _macs([t.shape for t in call.inputs], [out.shape]),
            (rows, columns),
            produced=made,
            reads=columns if data is None else data,
            summed=summed,
            num_out=out.shape[1],
            num_in=source.shape[1],
            gated=summed if labels.is_bare(weight) else None,
        ),
        labels,
    )
