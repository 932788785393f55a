"""How large a harm may be, given how much of it a sample shows: bounds that hold for any distribution.

Binomial: Clopper and Pearson. Bounded losses: Hoeffding-Bentkus (Bates et al., arXiv:2101.02703, section 3.1;
Angelopoulos et al., Learn then Test, arXiv:2110.01052).
"""

import math
from importlib import import_module
from typing import Any

from swan_surgery.errors import InputError


def binomial_upper(count: int, samples: int, delta: float) -> float:
    """The share that `count` of `samples` does not exceed but with probability delta."""
    if count >= samples:
        return 1.0
    return float(_distribution("beta").ppf(1 - delta, count + 1, samples - count))


def p_value(total: float, samples: int, harm: float, *, counts: bool) -> float:
    """P of a sample mean this small or smaller, were the harm `harm` or more.

    Args:
        total: sum of the losses, each between 0 and 1.
        samples: how many there are.
        harm: the harm in question.
        counts: the losses are all 0 or 1: the binomial's own tail; else Hoeffding-Bentkus.
    """
    binom = _distribution("binom")
    if counts:
        return float(binom.cdf(round(total), samples, harm))
    mean = total / samples
    bentkus = math.e * float(binom.cdf(math.ceil(total - 1e-9), samples, harm))
    hoeffding = math.exp(-samples * _divergence(min(mean, harm), harm))
    return min(bentkus, hoeffding, 1.0)


def upper(total: float, samples: int, delta: float, *, counts: bool) -> float:
    """The largest harm that the p-value does not rule out at level delta."""
    if counts:
        return binomial_upper(round(total), samples, delta)
    low, high = total / samples, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if p_value(total, samples, middle, counts=False) <= delta:
            high = middle
        else:
            low = middle
    return high


def least_samples(harm: float, delta: float, *, counts: bool) -> int:
    """How many samples without any harm it takes to say that the harm is at most `harm`."""
    least = math.ceil(math.log(delta) / math.log1p(-harm))
    # Hoeffding's part of the bound, at mean 0, is the binomial's: (1 - harm)^n.
    return least if counts or p_value(0.0, least, harm, counts=False) <= delta else least + 1


def check_level(name: str, value: Any) -> float:
    """Refuse what is no share.

    Raises:
        InputError: not between 0 and 1.
    """
    if not isinstance(value, (int, float)) or not 0 < float(value) < 1:
        raise InputError(f"{name} must be between 0 and 1; got {value!r}")
    return float(value)


def _distribution(name: str) -> Any:
    # A second to import, which only those who certify something need to wait for.
    return getattr(import_module("scipy.stats"), name)


def _divergence(a: float, b: float) -> float:
    """KL of two Bernoulli distributions."""
    first = a * math.log(a / b) if a > 0 else 0.0
    second = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
    return first + second


__all__ = ["binomial_upper", "check_level", "least_samples", "p_value", "upper"]
