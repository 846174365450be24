"""Layers with one fault each, and whether the suite finds it."""
