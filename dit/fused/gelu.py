"""The constants of the tanh-approximated GELU, u (1 + tanh(ROOT (u + CUBE u^3))) / 2; Hendrycks & Gimpel (2016), section 2."""

import math

ROOT = math.sqrt(2 / math.pi)
CUBE = 0.044715
