"""Training: the loop, its engines, validation on fixed noise, diagnoses, detection of collapses, and kept checkpoints."""
