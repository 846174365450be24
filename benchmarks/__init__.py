"""What the layer costs. Not installed; run from a checkout."""
