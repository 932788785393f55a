"""Other activations in an existing network, which starts as exactly the same function."""

from swan_surgery.activations.catalogue import ActivationSite, register_activation
from swan_surgery.activations.swapping import swap_activations
from swan_surgery.activations.swaps import Swaps, swaps


__all__ = ["ActivationSite", "Swaps", "register_activation", "swap_activations", "swaps"]
