"""A run continued from a kept checkpoint under other parameters, to find what made it collapse.

Batches are functions of seed and step, so a continuation meets the data that the run met; with nothing changed it takes the
run's own steps, bit for bit.
"""
