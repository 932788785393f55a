"""What is known of torch functions, by the name under which a model's code calls them.

One record per function. What is known of the ATen operations that run inside them stands in
`channels/rules`, which this room does not see.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class FunctionFacts:
    """One torch function or method.

    Attributes:
        numbers: what the Python numbers among its arguments are. `"sizes"` of what it returns, axis
            by axis; of the `"parts"` of one axis, which is named first; lengths of `"pieces"` of an
            axis; `"factors"`, which must not follow a width (`(C // heads) ** -0.5`); how many
            `"heads"` share an axis, of a function that has a form in `calls.slim_forms`; lengths of
            `"named"` axes, each behind its place (`calls.einops_moves`). None: they are never replaced.
        infers: one size may be given as -1.
        statistics: ATen operations by which it takes a statistic over channels that can count each
            with its gate. The weighted form stands in `gates.weighted_statistics`.
        multiplies: it is made of products, whose multiply-adds are priced where it is called.
        is_whole: it is one ATen operation, which torch takes apart into others; the channel map has a
            rule for the whole of it.
    """

    numbers: Literal["sizes", "parts", "pieces", "factors", "heads", "named"] | None = None
    infers: bool = False
    statistics: tuple[str, ...] = ()
    multiplies: bool = False
    is_whole: bool = False


FUNCTIONS: Mapping[str, FunctionFacts] = {
    "view": FunctionFacts(numbers="sizes", infers=True),
    "reshape": FunctionFacts(numbers="sizes", infers=True),
    "expand": FunctionFacts(numbers="sizes"),
    "unflatten": FunctionFacts(numbers="parts"),
    "new_zeros": FunctionFacts(numbers="sizes"),
    "new_ones": FunctionFacts(numbers="sizes"),
    "new_empty": FunctionFacts(numbers="sizes"),
    "zeros": FunctionFacts(numbers="sizes"),
    "ones": FunctionFacts(numbers="sizes"),
    "split": FunctionFacts(numbers="pieces"),
    "split_with_sizes": FunctionFacts(numbers="pieces"),
    "unsafe_split": FunctionFacts(numbers="pieces"),
    "unsafe_split_with_sizes": FunctionFacts(numbers="pieces"),
    "mul": FunctionFacts(numbers="factors"),
    "__mul__": FunctionFacts(numbers="factors"),
    "__rmul__": FunctionFacts(numbers="factors"),
    "div": FunctionFacts(numbers="factors"),
    "__truediv__": FunctionFacts(numbers="factors"),
    "__rtruediv__": FunctionFacts(numbers="factors"),
    "add": FunctionFacts(numbers="factors"),
    "sub": FunctionFacts(numbers="factors"),
    "layer_norm": FunctionFacts(statistics=("aten.native_layer_norm",)),
    "group_norm": FunctionFacts(statistics=("aten.native_group_norm",)),
    "rms_norm": FunctionFacts(statistics=("aten._fused_rms_norm", "aten.mean")),
    "mean": FunctionFacts(statistics=("aten.mean",)),
    "sum": FunctionFacts(statistics=("aten.sum",)),
    "var": FunctionFacts(statistics=("aten.var",)),
    "std": FunctionFacts(statistics=("aten.std",)),
    "var_mean": FunctionFacts(statistics=("aten.var_mean",)),
    "norm": FunctionFacts(statistics=("aten.linalg_vector_norm", "aten.norm")),
    "vector_norm": FunctionFacts(statistics=("aten.linalg_vector_norm",)),
    "linalg_vector_norm": FunctionFacts(statistics=("aten.linalg_vector_norm",)),
    "linalg_norm": FunctionFacts(statistics=("aten.linalg_vector_norm",)),
    "normalize": FunctionFacts(statistics=("aten.linalg_vector_norm", "aten.norm")),
    "amax": FunctionFacts(statistics=("aten.amax",)),
    "amin": FunctionFacts(statistics=("aten.amin",)),
    "einsum": FunctionFacts(multiplies=True),
    "multi_head_attention_forward": FunctionFacts(numbers="heads"),
    "rearrange": FunctionFacts(numbers="named"),
    "lstm": FunctionFacts(is_whole=True),
    "gru": FunctionFacts(is_whole=True),
    "rnn_tanh": FunctionFacts(is_whole=True),
    "rnn_relu": FunctionFacts(is_whole=True),
    "lstm_cell": FunctionFacts(is_whole=True),
    "gru_cell": FunctionFacts(is_whole=True),
    "rnn_tanh_cell": FunctionFacts(is_whole=True),
    "rnn_relu_cell": FunctionFacts(is_whole=True),
    "_pad_packed_sequence": FunctionFacts(is_whole=True),
}


def _where(holds: Callable[[FunctionFacts], bool]) -> frozenset[str]:
    return frozenset(name for name, facts in FUNCTIONS.items() if holds(facts))


# The table read the other way round, for those who meet every call of a run.
SHAPED = _where(lambda facts: facts.numbers == "sizes")
PARTING = _where(lambda facts: facts.numbers == "parts")
SPLITTING = _where(lambda facts: facts.numbers == "pieces")
SCALING = _where(lambda facts: facts.numbers == "factors")
SHARING = _where(lambda facts: facts.numbers == "heads")
NAMED = _where(lambda facts: facts.numbers == "named")
RESIZABLE = _where(lambda facts: facts.numbers is not None)
INFERRING = _where(lambda facts: facts.infers)
WEIGHABLE = _where(lambda facts: bool(facts.statistics))
MULTIPLYING = _where(lambda facts: facts.multiplies)
WHOLE = _where(lambda facts: facts.is_whole)


# What hands values out as plain numbers or arrays, past all operations of torch.
LEAVING = frozenset({"numpy", "__array__", "tolist", "__dlpack__", "untyped_storage"})


def is_statistic(function: str, op: str) -> bool:
    """Whether the function takes its statistic over channels by this ATen operation."""
    return function in WEIGHABLE and op in FUNCTIONS[function].statistics
