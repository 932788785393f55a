"""Other activations in an existing network, which starts as exactly the same function."""

from swan_surgery.activations.bounds import fit_bounds
from swan_surgery.activations.catalogue import ActivationSite, register_activation
from swan_surgery.activations.dead import activate_dead
from swan_surgery.activations.listing import Swaps, swaps
from swan_surgery.activations.spreads import Kappas, kappas
from swan_surgery.activations.swapping import swap_activations


__all__ = [
    "ActivationSite",
    "Kappas",
    "Swaps",
    "activate_dead",
    "fit_bounds",
    "kappas",
    "register_activation",
    "swap_activations",
    "swaps",
]
