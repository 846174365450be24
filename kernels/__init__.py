"""Triton kernels for the five leaf operations on Ascend and CUDA, installed as `syncbn.kernels`.

No kernel is here yet: `syncbn.torch` runs on its `composed` backend.
"""
