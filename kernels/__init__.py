"""Triton kernels for the five operations of batch normalization, on Ascend and CUDA.

`batch_norm` has the kernels, `plan` divides their work, `variants` lists the forms in which they
are compiled, `operations` gives them the interface of the layer's backends, and `twin` runs what
Ascend's compiler made of them on a CPU. In a checkout, `python -m audit kernels check` proves them
without a device.
"""

from syncbn.extras import require

require("syncbn.kernels", "torch", "torch")
