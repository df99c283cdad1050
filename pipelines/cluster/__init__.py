"""Studies larger than one machine: Ray runs the stages, and DVC's remote carries what they read and write.

The head is where the flow runs; a node is a machine of the Ray cluster. `engine` is the head's side and `node` that of a node.
"""
