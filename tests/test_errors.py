"""Every error is a SwanError and the builtin that fits, and is documented where it is defined."""

import inspect

import pytest

import swan_surgery as swan
from swan_surgery import errors


BUILTIN = {
    "InputError": ValueError,
    "ModelError": TypeError,
    "TraceError": RuntimeError,
    "UnsupportedOpError": NotImplementedError,
    "NoGateableChannelsError": ValueError,
    "RuleError": ValueError,
    "GateError": ValueError,
    "BudgetError": ValueError,
    "EmptyLayerError": ValueError,
    "CostError": RuntimeError,
    "PathError": RuntimeError,
    "VerificationError": RuntimeError,
    "MissingExtraError": ImportError,
    "ArtifactError": ValueError,
    "WritingError": OSError,
    "ExportError": RuntimeError,
}


def classes() -> dict[str, type]:
    return {name: c for name, c in vars(errors).items() if inspect.isclass(c)}


@pytest.mark.parametrize("name", BUILTIN)
def test_root_and_builtin(name) -> None:
    error = getattr(swan, name)
    assert error.__bases__ == (swan.SwanError, BUILTIN[name])
    assert str(error("a sentence")) == "a sentence"
    with pytest.raises(BUILTIN[name], match="a sentence"):
        raise error("a sentence")


def test_none_is_missing_here_or_in_the_package() -> None:
    assert set(classes()) == {*BUILTIN, "SwanError", "SwanWarning"}
    assert all(getattr(swan, name) is found for name, found in classes().items())


def test_the_table_in_the_docstring_is_right() -> None:
    listed = [line for line in (errors.__doc__ or "").splitlines() if line.startswith("- ")]
    stated = {line[2:].split(" (")[0]: line.split("(")[1].split(")")[0] for line in listed}
    assert stated == {name: builtin.__name__ for name, builtin in BUILTIN.items()}


def test_the_root_is_no_builtin_but_exception_and_the_warning_no_error() -> None:
    assert swan.SwanError.__bases__ == (Exception,)
    assert swan.SwanWarning.__bases__ == (UserWarning,)


def test_facts_are_attributes() -> None:
    assert swan.UnsupportedOpError("x", pins=(1, 2)).pins == (1, 2)
    assert swan.UnsupportedOpError("x").pins == ()
    budget = swan.BudgetError("x", unit="ms", least=1.5, most=2.5)
    assert (budget.unit, budget.least, budget.most) == ("ms", 1.5, 2.5)
    assert swan.VerificationError("x", module="a.b").module == "a.b"
