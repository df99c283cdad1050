"""The studies of docs/evidence: run many small runs on one GPU, keep their results small, and answer what was declared."""
