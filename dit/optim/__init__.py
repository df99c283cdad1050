"""How weights change: the learning rate by step, optimisers by name, and the moving average of the weights."""
