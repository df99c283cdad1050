"""Studies larger than one machine: Ray runs the stages, and their inputs and outputs travel through the DVC remote.

The flow runs on the head; a node is a machine of the Ray cluster. Module `engine` runs on the head, module `node` on a node.
"""
