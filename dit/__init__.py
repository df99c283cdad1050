"""A laboratory for one kind of question: what does a change of initialisation do to a Diffusion Transformer?"""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before diffusers reads it
