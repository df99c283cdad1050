"""Continues a run from a kept checkpoint with other parameters, to find what made it collapse.

Batches depend on seed and step alone, so a continuation sees the same data as the run. If no parameter changes, it repeats the
steps of the run, bit for bit.
"""
