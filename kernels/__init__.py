"""Triton kernels for the five leaf operations on Ascend and CUDA, installed as `syncbn.kernels`.

`leaf` has the kernels, `plan` how they cut their work, `operations` puts them behind the interface
of the layer's backends. `ladder` proves them without a device, in a checkout: `python -m
syncbn.kernels`.
"""

from syncbn.extras import require

require("syncbn.kernels", "torch", "torch")
