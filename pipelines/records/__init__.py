"""What the runs of a study leave on disk: one schema for each file, by which its stage writes it and everybody else reads it.

Keys are written in the order of the fields. No output tells times or machines; `Timing`, which lies in scratch, does.
There is one module for each stage, so that a change of what one records makes no other stage run again.
"""
