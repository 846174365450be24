"""The clauses of the contract by id. docs/contract.md has their full text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Clause:
    """One clause of the contract.

    title: the clause in a few words.
    origin: "doc" if the page of mindspore.mint.nn.SyncBatchNorm states it, "decided" if the page
        leaves it open.
    not_run: why the suite has no case for it; None if it has.
    """

    title: str
    origin: str
    not_run: str | None = None

    @property
    def documented(self) -> bool:
        """Whether the page states the clause. Then every case of it follows from the page."""
        return self.origin == "doc"


_HOST = "host synchronization can only be observed on an accelerator"

CLAUSES = {
    "CTOR-1": Clause("signature and defaults", "doc"),
    "CTOR-2": Clause("affine: weight and bias, or none", "doc"),
    "CTOR-3": Clause("running statistics, or none", "doc"),
    "CTOR-4": Clause("dtype of parameters", "doc"),
    "CTOR-5": Clause("state names are those of BatchNorm", "decided"),
    "CTOR-6": Clause("attributes are live", "decided"),
    "CTOR-7": Clause("initial values, other dtypes", "decided"),
    "CTOR-8": Clause("deep copies and casts", "decided"),
    "ERR-1": Clause("TypeError: num_features not an int", "doc"),
    "ERR-2": Clause("TypeError: eps not a float", "doc"),
    "ERR-3": Clause("ValueError: num_features < 1", "doc"),
    "ERR-4": Clause("ValueError: momentum outside [0, 1]", "doc"),
    "ERR-5": Clause("ValueError: rank id outside the world", "doc"),
    "ERR-6": Clause("ValueError: dimensions or channels", "decided"),
    "ERR-7": Clause("ValueError: one value in the group", "decided"),
    "ERR-8": Clause("other arguments are checked", "decided"),
    "ERR-9": Clause("one rank's error is raised on all", "decided"),
    "FWD-1": Clause("y uses the statistics of the group", "doc"),
    "FWD-2": Clause("any dimensions, shape kept", "doc"),
    "FWD-3": Clause("uneven shards", "decided"),
    "FWD-4": Clause("empty shards", "decided"),
    "FWD-5": Clause("groups are isolated", "doc"),
    "FWD-6": Clause("partition invariance", "decided"),
    "FWD-7": Clause("layouts give the same values", "decided"),
    "FWD-8": Clause("no_grad, inference_mode, autocast", "decided"),
    "FWD-9": Clause("dtype, memory format, input kept", "decided"),
    "GRAD-1": Clause("grad_input of the group-wide formula", "doc"),
    "GRAD-2": Clause("grad_weight, grad_bias: local sums", "decided"),
    "GRAD-3": Clause("gradients of an empty shard", "decided"),
    "GRAD-4": Clause("frozen inputs and parameters", "decided"),
    "GRAD-5": Clause("second derivatives of a step", "decided"),
    "STAT-1": Clause("running = (1 - m) running + m batch", "doc"),
    "STAT-2": Clause("running_var: unbiased, group count", "decided"),
    "STAT-3": Clause("bitwise equal on all ranks", "decided"),
    "STAT-4": Clause("momentum None: cumulative average", "decided"),
    "STAT-5": Clause("num_batches_tracked", "decided"),
    "STAT-6": Clause("eval, empty groups change nothing", "decided"),
    "STAT-7": Clause("recomputed and aborted steps", "decided"),
    "EVAL-1": Clause("y of the running statistics", "doc"),
    "EVAL-2": Clause("eval never communicates", "decided"),
    "EVAL-3": Clause("gradients in eval", "doc"),
    "TRACK-1": Clause("untracked training", "doc"),
    "TRACK-2": Clause("untracked eval: batch statistics", "doc"),
    "TRACK-3": Clause("untracked eval: of the rank's own batch", "decided"),
    "NUM-1": Clause("within the bound: offsets and scales", "decided"),
    "NUM-2": Clause("float16, bfloat16, mixed parameters", "decided"),
    "NUM-3": Clause("counts beyond 2048, 65504, 2^24", "decided"),
    "NUM-4": Clause("NaN and inf stay in their channel", "decided"),
    "COMM-1": Clause("one collective forward, one backward", "decided"),
    "COMM-2": Clause("no host synchronization", "decided", _HOST),
}
