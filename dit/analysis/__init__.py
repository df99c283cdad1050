"""Analysis: what gradients and units do during training, and what the runs of a study allow to conclude."""
