"""Training: pure batches, the loop, the optimiser with its EMA, validation on fixed noise, checkpoints."""
