"""Files that the runs of a study write: one schema for each file, with which its stage writes it and all others read it.

Keys are written in the order of the fields. No output holds times or machines; only `Timing` does, which is kept in scratch.
Each stage has its own module, so that a change to one stage's records makes no other stage run again.
"""
