"""Training with the layer; run from a checkout as `python -m examples.NAME`."""
