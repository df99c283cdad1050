"""A laboratory for one kind of question: what does a change of initialisation do to a Diffusion Transformer?

`import dit` is fast, since each name of `__init__.pyi` is imported only when it is first used.
"""

import os

import lazy_loader

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # before diffusers reads it

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
