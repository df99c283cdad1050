"""A laboratory for one kind of question: what does a change of initialisation do to a Diffusion Transformer?"""
