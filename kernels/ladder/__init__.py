"""How far the kernels are proven for Ascend without one: a ladder of rungs, run by `check`.

- interpreted: Triton's interpreter runs the kernels, and every value is held to its bound;
- lowered: triton-ascend and bishengir-compile take them to the last step before a device's code;
- twin: what triton-ascend lowered them to is compiled for this CPU and held to the same bounds;
- CUDA: upstream triton compiles them ahead of time for three generations of GPUs;
- registered: the published torch_npu has the operators that the `aten` backend calls.

Every rung is also given kernels that it must refuse, and the check fails if it does not.
"""
