"""A framework of one's own for the suite: JAX, whose processes run one program together.

    syncbn-conformance run --framework examples/jax_framework.py --ranks 2 \\
      --target jax:examples/flax_layer.py:BatchNorm

judges Flax's BatchNorm. This file is the record, which the command reads without JAX. The work of
a rank is in jax_rank.py. docs/conformance.md has more about frameworks of one's own.
"""

from pathlib import Path

from syncbn.conformance.frameworks import Framework

FRAMEWORK = Framework("jax", "JAX", f"{Path(__file__).with_name('jax_rank.py')}:JaxRank")
