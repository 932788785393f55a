"""One clear error where an optional package is missing."""

import pytest

import swan_surgery as swan
from swan_surgery.environment.extras import needed_from


def test_names_the_package_and_the_extra() -> None:
    with (
        pytest.raises(swan.MissingExtraError, match=r"nowhere is not .* 'swan-surgery\[export\]'"),
        needed_from("export"),
    ):
        import nowhere  # type: ignore[import-not-found]  # noqa: F401, PLC0415
