"""CPU substitutes for kernels that only Ascend has: one module for each framework."""
