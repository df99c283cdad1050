"""Initialisation: every weight of the network is set here, by rules that are data."""

from dit.init.strategy import Strategy, apply, claims, named, named_strategies

__all__ = ["Strategy", "apply", "claims", "named", "named_strategies"]
