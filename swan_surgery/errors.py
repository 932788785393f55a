"""The errors of the library: one root, and leaves that also are the builtin that fits.

SwanError
- InputError (ValueError): an argument or the example inputs do not fit
- ModelError (TypeError): this kind of model cannot be worked on
- TraceError (RuntimeError): the model could not be run or traced
- UnsupportedOpError (NotImplementedError): strict=True met operations without a rule
- NoGateableChannelsError (ValueError): every channel is pinned
- RuleError (ValueError): a channel rule exists already, or does not do what its operation does
- GateError (ValueError): the gates hold values that mean nothing
- BudgetError (ValueError): no set of open gates meets the budget
- EmptyLayerError (ValueError): a layer would keep no channel
- CostError (RuntimeError): the model no longer fits its map
- PathError (RuntimeError): an input takes another path through the code than the one mapped
- VerificationError (RuntimeError): the pruned model computes something else
- MissingExtraError (ImportError): an optional package is not installed
- ArtifactError (ValueError): a file is damaged, not one of ours, or of another model
- WritingError (OSError): a file could not be written; what was there before still is
- ExportError (RuntimeError): an exported model could not be made, or computes something else
"""


class SwanError(Exception):
    """Root of all errors raised on purpose by swan_surgery."""


class InputError(SwanError, ValueError):
    """An argument or the example inputs do not fit the model."""


class ModelError(SwanError, TypeError):
    """The object given is not a model this library can work on."""


class TraceError(SwanError, RuntimeError):
    """The model could not be run, or torch.fx could not trace it."""


class UnsupportedOpError(SwanError, NotImplementedError):
    """`strict=True` and operations without a channel rule; all of them in `pins`."""

    def __init__(self, message: str, *, pins: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.pins = pins


class NoGateableChannelsError(SwanError, ValueError):
    """Every channel of the model is pinned, so there is nothing to gate."""


class RuleError(SwanError, ValueError):
    """A channel rule is refused: there is one already, or it does not do what its operation does."""


class GateError(SwanError, ValueError):
    """The gates hold values that mean nothing (NaN or infinite logits)."""


class BudgetError(SwanError, ValueError):
    """No set of open gates meets the budget; carries what can be reached.

    From `least` to `most` can be reached, in `unit`s: "MACs", "parameters" or "ms".
    """

    def __init__(
        self,
        message: str,
        *,
        unit: str = "",
        least: float = 0,
        most: float = 0,
    ) -> None:
        super().__init__(message)
        self.unit = unit
        self.least = least
        self.most = most


class EmptyLayerError(SwanError, ValueError):
    """A layer would keep no channel at all."""


class CostError(SwanError, RuntimeError):
    """A cost cannot be told: the model no longer fits its channel map."""


class PathError(SwanError, RuntimeError):
    """An input takes another path through the model's code than the example inputs did."""


class VerificationError(SwanError, RuntimeError):
    """The pruned model does not compute what the gated model computed; `module` differs first."""

    def __init__(self, message: str, *, module: str = "") -> None:
        super().__init__(message)
        self.module = module


class MissingExtraError(SwanError, ImportError):
    """A part of the library needs a package that it does not install by itself."""


class ArtifactError(SwanError, ValueError):
    """A saved file is damaged, was not written by this library, or fits another model."""


class WritingError(SwanError, OSError):
    """A file could not be written; what was there before still is."""


class ExportError(SwanError, RuntimeError):
    """A model could not be exported, or the exported one computes something else."""


class SwanWarning(UserWarning):
    """Something the user should know or change; the result is still correct."""
