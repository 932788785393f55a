"""Where a model's weights are read: the products of an input with a (view of a) parameter, by name and number.

Seen below torch's own functions, as single operations: whatever calls them (a module, a functional call, fused
attention), a read is a convolution or a matrix product, one of whose operands lies in a parameter's memory.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


aten = torch.ops.aten
Key = tuple[str, int]  # a parameter, and the how-manieth of its reads in one pass
Region = tuple[str, int, tuple[int, ...]]  # a parameter, where in its memory, and the shape there


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """One product with a weight.

    Attributes:
        key: which.
        input: what is multiplied: [B, C, ...] of a convolution, [N, in] of a matrix product.
        weight: as it lies in the parameter: [out, in / groups, ...], [in, out / groups, ...] of a transposed
            convolution, or [in, out].
        bias: in the memory of a parameter, or None.
        settings: stride, padding, dilation, transposed, output padding, groups; None of a matrix product.
        output: what came out; only once it has been computed.
        partner: what the output is going to be added to, where that is known before.
    """

    key: Key
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    settings: tuple[Any, ...] | None
    output: Tensor | None = None
    partner: Tensor | None = None

    @property
    def region(self) -> Region:
        """Where the weight lies: fused queries, keys and values are three regions of one parameter."""
        return self.key[0], int(self.weight.storage_offset()), tuple(self.weight.shape)

    @property
    def rows(self) -> int:
        """Of a matrix product: how many; of a convolution that has not run, by its settings."""
        if self.settings is None:
            return self.input.shape[0]
        stride, padding, dilation, transposed, extra, _ = self.settings
        count = self.input.shape[0]
        for d, kernel in enumerate(self.weight.shape[2:]):
            size, reach = self.input.shape[2 + d], dilation[d] * (kernel - 1)
            count *= (
                (size - 1) * stride[d] - 2 * padding[d] + reach + extra[d] + 1
                if transposed
                else (size + 2 * padding[d] - reach - 1) // stride[d] + 1
            )
        return count


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """A batch-norm that uses its running statistics: its input [B, C, ...] and its buffers."""

    key: Key
    input: Tensor
    mean: Tensor
    var: Tensor


@dataclass(frozen=True, slots=True)
class Memory:
    """Which parameter or buffer a tensor's memory belongs to."""

    parameters: Mapping[int, str]
    buffers: Mapping[int, str]

    @classmethod
    def of(cls, model: nn.Module) -> "Memory":
        """Of all parameters and buffers; tied ones go by their first name."""
        parameters: dict[int, str] = {}
        for name, tensor in model.named_parameters():
            parameters.setdefault(_address(tensor), name)
        return cls(parameters, {_address(tensor): name for name, tensor in model.named_buffers()})

    def parameter(self, tensor: object) -> str | None:
        """The name, or None of what is not in a parameter's memory."""
        return self.parameters.get(_address(tensor)) if isinstance(tensor, Tensor) else None

    def buffer(self, tensor: object) -> str | None:
        """The name, or None of what is not in a buffer's memory."""
        return self.buffers.get(_address(tensor)) if isinstance(tensor, Tensor) else None


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Watching(TorchDispatchMode):
    """Calls back before and after every read, and before every batch-norm (whose output nobody asks for).

    `keep` names outputs by the number of the operation they come from: they are held until the read
    that wants them (`partners`: key -> number).
    """

    def __init__(
        self,
        memory: Memory,
        *,
        before: Callable[[Read | Norm], None] = lambda _: None,
        after: Callable[[Read | Norm], None] = lambda _: None,
        partners: Mapping[Key, int] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.memory, self.before, self.after = memory, before, after
        self.partners = dict(partners or {})
        self.wanted = Counter(self.partners.values())
        self.kept: dict[int, Tensor] = {}
        self.counts: Counter[str] = Counter()
        self.number = 0

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = self._found(op, args)
        if found is None:
            out = op(*args, **kwargs)
        else:
            self.before(found)
            if isinstance(found, Norm):
                self.after(found)
            out = op(*args, **kwargs)
            if isinstance(found, Read):
                self.after(replace(found, output=out))
            self._let_go(found.key)
        if self.number in self.wanted and isinstance(out, Tensor):
            self.kept[self.number] = out
        self.number += 1
        return out

    def _found(self, op: Any, args: Any) -> Read | Norm | None:
        packet = op.overloadpacket
        if packet is aten.convolution:
            return self._read(args[0], args[1], args[2], tuple(args[3:9]))
        if packet is aten.addmm and args[0].ndim == 1:
            return self._read(args[1], args[2], args[0], None)
        if packet is aten.mm:
            return self._read(args[0], args[1], None, None)
        if packet in _NORMS:
            return self._norm(op, args)
        return None

    def _read(self, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any) -> Read | None:
        name = self.memory.parameter(weight)
        if name is None or (bias is not None and self.memory.parameter(bias) is None):
            return None
        key = self._next(name)
        partner = self.kept.get(self.partners.get(key, -1))
        return Read(key, x, weight, bias, settings, partner=partner)

    def _norm(self, op: Any, args: Any) -> Norm | None:
        schema = op._schema  # noqa: SLF001 - torch's only way to an operation's names
        named = {a.name: value for a, value in zip(schema.arguments, args, strict=False)}
        mean, var = named.get("running_mean"), named.get("running_var")
        name = self.memory.buffer(mean)
        if name is None or mean is None or var is None or named.get("training"):
            return None
        return Norm(self._next(name), args[0], mean, var)

    def _next(self, name: str) -> Key:
        self.counts[name] += 1
        return name, self.counts[name] - 1

    def _let_go(self, key: Key) -> None:
        number = self.partners.get(key)
        if number is not None:
            self.wanted[number] -= 1
            if not self.wanted[number]:
                self.kept.pop(number, None)


_NORMS = {
    getattr(aten, name)
    for name in (
        "native_batch_norm",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "_native_batch_norm_legit_no_training",
        "_native_batch_norm_legit",
        "batch_norm",
    )
    if hasattr(aten, name)
}
