"""The studies of docs/evidence: train many small runs on one GPU, write small result files, and answer what was declared."""
