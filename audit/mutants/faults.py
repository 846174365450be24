"""The mutants: layers with exactly one planted fault each. Most are real bugs of other projects.

A docstring describes the fault and, after `Source:`, names the projects that had it, written as in
audit/failures/known.toml. If none is known, it is `derived from` a file of this project. `dies_in`
lists the clauses in which the suite must find the fault; others may find it as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from audit.mutants.layer import (
    Alone,
    Array,
    Communicator,
    Plain,
    Saved,
    State,
    Statistics,
    rows,
)
from syncbn.protocol import BACKWARD, COUNT_LOW, NOTHING, Settings


class Fault(Plain):
    """The base class of mutants: the right layer, which keeps what its latest forward was given.

    dies_in: the clauses in each of which the suite must find the fault.
    frameworks: the frameworks in which the fault can be built.
    """

    dies_in: ClassVar[tuple[str, ...]] = ()
    frameworks: ClassVar[tuple[str, ...]] = ("torch", "mindspore")

    x: Array
    dtype: str
    communicator: Communicator

    def forward(
        self,
        x: Array,
        dtype: str,
        state: State,
        communicator: Communicator,
        training: bool,
        differentiates: bool,
    ) -> tuple[Array, Saved]:
        self.x, self.dtype, self.communicator = x, dtype, communicator
        return super().forward(x, dtype, state, communicator, training, differentiates)

    @property
    def half(self) -> bool:
        return self.dtype in ("float16", "bfloat16")

    @property
    def count(self) -> int:
        """The number of values per channel on this rank."""
        return self.x.size // self.num_features


# --- statistics of the group --------------------------------------------------------------------


class LocalStatistics(Fault):
    """Each rank normalizes with its own statistics.

    Source: derived from docs/contract.md.
    """

    dies_in = ("FWD-1", "STAT-3")

    def exchange(self, *step: Any) -> Array:
        own = self.communicator.ranks.index(self.communicator.rank)
        return super().exchange(*step)[own : own + 1]


class EqualWeightMean(Fault):
    """The mean is the mean of the ranks' means, whatever the counts of the ranks.

    Source: PaddlePaddle/Paddle#32464.
    """

    dies_in = ("FWD-3", "FWD-6")

    def weights(self, counts: Array) -> Array:
        return np.full_like(counts, 1 / len(counts))


class WeighsImages(Fault):
    """The weight of a rank is its batch size, whatever the size of its images.

    Source: facebookresearch/detectron2: detectron2/layers/batch_norm.py, stats_mode N.
    """

    dies_in = ("FWD-3",)

    def count_of(self, x: Array) -> int:
        return len(x)


class VarianceWithinRanks(Fault):
    """The variance is the average over the ranks; the distances of their means are left out.

    Source: derived from reference/bounds.py.
    """

    dies_in = ("FWD-1", "STAT-2")

    def combine_variances(self, weights: Array, deviations: Array, variances: Array) -> Array:
        return (weights * variances).sum(axis=0)


class CountInFloat16(Fault):
    """Counts are sent as float16: 2049 becomes 2048, and 65520 becomes infinity.

    Source: pytorch/pytorch#70901.
    """

    dies_in = ("NUM-3",)

    def counts(self, table: Array) -> Array:
        with np.errstate(over="ignore"):
            return super().counts(table).astype(np.float16).astype(np.float64)


class EmptyRankCountsOne(Fault):
    """A rank without data sends zeros with a count of 1.

    Source: derived from docs/contract.md.
    """

    dies_in = ("FWD-4",)

    def count_of(self, x: Array) -> int:
        return max(super().count_of(x), 1)


class EmptyRankSendsNaN(Fault):
    """A rank without data sends NaN, which stays NaN with a weight of 0.

    Source: hicann/ops-math: math/reduce_std_with_mean/docs/aclnnBatchNormStats.md.
    """

    dies_in = ("FWD-4",)

    def no_stats(self) -> tuple[Array, Array]:
        mean, var = super().no_stats()
        return mean, var + np.nan


class GathersTwice(Fault):
    """The counts are sent by a collective of their own.

    Source: pytorch/pytorch#38246; pytorch/pytorch#36452.
    """

    dies_in = ("COMM-1",)

    def exchange(self, *step: Any) -> Array:
        table = super().exchange(*step)
        self.communicator.all_gather(np.array([float(self.count)]))
        return table


class IgnoresProcessGroup(Fault):
    """The collectives run over all ranks, whatever the process group.

    Source: pytorch/pytorch#38874; open-mmlab/mmcv#427.
    """

    dies_in = ("FWD-5",)

    def forward(
        self, x: Array, dtype: str, state: State, communicator: Communicator, *rest: Any
    ) -> Any:
        return super().forward(x, dtype, state, communicator.world, *rest)


class StaleStatistics(Fault):
    """A step normalizes with the statistics of the previous step.

    Source: derived from syncbn/torch/layer.py.
    """

    dies_in = ("TRACK-1",)

    latest: Statistics | None = None

    def train(self, *step: Any) -> Statistics:
        stale, self.latest = self.latest, super().train(*step)
        return stale or self.latest


class RankOrder(Fault):
    """Each rank combines the parts starting with its own, so ranks round differently.

    Source: facebookresearch/detectron2#5398.
    """

    dies_in = ("STAT-3",)

    def exchange(self, *step: Any) -> Array:
        own = self.communicator.ranks.index(self.communicator.rank)
        return np.roll(super().exchange(*step), -own, axis=0)


class NewGroupEveryStep(Fault):
    """Every training step makes a communicator of its own; groups wait for each other over it.

    Source: NVIDIA/apex#105; NVIDIA/apex#113.
    """

    dies_in = ("FWD-5", "COMM-1")
    frameworks = ("torch",)

    def exchange(self, *step: Any) -> Array:
        import torch.distributed as dist

        dist.new_group(list(self.communicator.ranks), use_local_synchronization=True)
        return super().exchange(*step)


# --- local statistics ---------------------------------------------------------------------------


class OnePassVariance(Fault):
    """var = mean(x^2) - mean^2.

    Source: tensorflow/tensorflow#3290; keras-team/keras#18795.
    """

    dies_in = ("NUM-1",)

    def stats(self, x: Array) -> tuple[Array, Array]:
        values = rows(x)
        mean = values.mean(axis=1)
        return mean, np.square(values).mean(axis=1) - np.square(mean)


class OnePassInFloat16(Fault):
    """The statistics of a float16 or bfloat16 input are accumulated in float16.

    Source: derived from docs/contract.md.
    """

    dies_in = ("NUM-2",)

    def stats(self, x: Array) -> tuple[Array, Array]:
        if not self.half:
            return super().stats(x)
        values = rows(x).astype(np.float16)
        mean = values.mean(axis=1, dtype=np.float16)
        var = np.square(values).mean(axis=1, dtype=np.float16) - np.square(mean)
        return mean.astype(x.dtype), var.astype(x.dtype)


class RunningSum(Fault):
    """Sums add one value after the other.

    Source: pytorch/pytorch: aten/src/ATen/native/cpu/batch_norm_kernel.cpp, channels_last.
    """

    dies_in = ("NUM-1",)

    def sum(self, values: Array) -> Array:
        return np.cumsum(values, axis=1)[:, -1] if values.size else super().sum(values)


class SumOfSquaresOverflows(Fault):
    """The sum of squares is not scaled: at a scale of 1e18 it overflows, and the variance does not.

    Source: pytorch/pytorch#162489; pytorch/pytorch#178123.
    """

    dies_in = ("NUM-1",)

    def mean_square(self, values: Array) -> Array:
        return np.square(values).sum(axis=1) / values.shape[1]


class VarianceFromInvstd(Fault):
    """A rank keeps invstd = 1 / sqrt(var + eps), and rebuilds var as 1 / invstd^2 - eps.

    Source: pytorch/pytorch: aten/src/ATen/native/cuda/Normalization.cuh, eps.
    """

    dies_in = ("NUM-1",)

    def stats(self, x: Array) -> tuple[Array, Array]:
        mean, var = super().stats(x)
        return mean, 1 / np.square(self.invstd(var)) - self.eps


class ConstantShardOverflows(Fault):
    """With eps=0.0, a channel that is constant on a rank gets invstd 0 and an infinite variance.

    Source: pytorch/pytorch: aten/src/ATen/native/cuda/Normalization.cuh, invstd = 0.
    """

    dies_in = ("NUM-1",)

    def stats(self, x: Array) -> tuple[Array, Array]:
        mean, var = super().stats(x)
        return mean, np.where(var + self.eps == 0, np.inf, var)


class ReshapesChannels(Fault):
    """The values of (N, C, +) are read as if the channels came first in memory.

    Source: fangwei123456/spikingjelly#393.
    """

    dies_in = ("FWD-1", "FWD-2")

    def stats(self, x: Array) -> tuple[Array, Array]:
        return super().stats(x.reshape(self.num_features, -1, 1).swapaxes(0, 1))


class DropsTail(Fault):
    """In channels_last input, the values of a channel after the last multiple of 4 are left out.

    Source: NVIDIA/apex#1768; pytorch/pytorch#57077.
    """

    dies_in = ("FWD-7",)
    frameworks = ("torch",)  # a MindSpore tensor has no channels_last memory in NumPy

    def stats(self, x: Array) -> tuple[Array, Array]:
        values = rows(x)
        kept = max(4, values.shape[1] // 4 * 4) if _channels_last(x) else None
        return super().stats(values[np.newaxis, :, :kept])


class LeaksNaN(Fault):
    """A factor of 0 takes the place of a mask: a NaN or infinity in one channel makes all NaN.

    Source: pytorch/pytorch#78656.
    """

    dies_in = ("NUM-4",)

    def stats(self, x: Array) -> tuple[Array, Array]:
        mean, var = super().stats(x)
        return mean + 0 * x.sum(), var


class AddsInAnyOrder(Fault):
    """Values are added in an order that changes from call to call, as with atomic additions.

    Source: hicann/ops-nn: norm/batch_norm_elemt/docs/aclnnBatchNormElemt.md.
    """

    dies_in = ("FWD-6",)

    def sum(self, values: Array) -> Array:
        # One value after the other, because sums in pairs often round to the same result.
        order = np.random.default_rng().permutation(values.shape[1])
        added: Array = np.add.accumulate(values[:, order], axis=1)
        return added[:, -1] if order.size else super().sum(values)


# --- normalization ------------------------------------------------------------------------------


class EpsClamp(Fault):
    """invstd = 1 / sqrt(max(var, eps)), in training and in eval.

    Source: vacancy/Synchronized-BatchNorm-PyTorch#38.
    """

    dies_in = ("FWD-1", "EVAL-1", "NUM-1")

    def invstd(self, var: Array) -> Array:
        return 1 / np.sqrt(np.maximum(var, self.eps))


class EpsOutsideRoot(Fault):
    """invstd = 1 / (sqrt(var) + eps).

    Source: derived from reference/formulas.py.
    """

    dies_in = ("FWD-1", "EVAL-1")

    def invstd(self, var: Array) -> Array:
        return 1 / (np.sqrt(var) + self.eps)


class AbsoluteWeight(Fault):
    """The layer uses the absolute value of the weight.

    Source: mapillary/inplace_abn: modules/src/inplace_abn_cpu.cpp, abs(weight) + eps.
    """

    dies_in = ("FWD-1",)

    def scale(self, var: Array, weight: Array | None) -> Array:
        return super().scale(var, None if weight is None else np.abs(weight))


class ModifiesInput(Fault):
    """The layer subtracts the mean from the caller's tensor in place.

    Source: open-mmlab/mmdetection3d#1435.
    """

    dies_in = ("FWD-9",)

    def normalize(
        self, x: Array, stats: Statistics, weight: Array | None, bias: Array | None
    ) -> Array:
        y = super().normalize(x, stats, weight, bias)
        x -= stats.mean.reshape(1, -1, *(1,) * (x.ndim - 2))
        return y


class Float32Output(Fault):
    """y is float32 whatever the dtype of the input.

    Source: pytorch/pytorch#98332.
    """

    dies_in = ("FWD-4",)
    keeps_dtype = False


class ContiguousOutput(Fault):
    """y is contiguous whatever the memory format of the input.

    Source: Ascend/pytorch: torch_npu/utils/syncbatchnorm.py, layout.
    """

    dies_in = ("FWD-9",)
    frameworks = ("torch",)  # MindSpore has no memory format on CPU
    keeps_format = False


# --- running statistics -------------------------------------------------------------------------


class LocalCount(Fault):
    """running_var is made unbiased with the rank's own count.

    Source: pytorch/pytorch#22192; NVIDIA/apex#387.
    """

    dies_in = ("STAT-2", "STAT-3")

    def unbiased(self, var: Array, n: int) -> Array:
        return super().unbiased(var, max(self.count, 2))


class BiasedRunningVar(Fault):
    """running_var takes the biased variance.

    Source: pytorch/pytorch#40600; tensorflow/tensorflow#55545.
    """

    dies_in = ("STAT-2",)

    def unbiased(self, var: Array, n: int) -> Array:
        return var


class MomentumSwapped(Fault):
    """momentum is the weight of the old running value.

    Source: mindspore-ai/mindspore_test: mindspore/python/mindspore/nn/layer/normalization.py.
    """

    dies_in = ("STAT-1", "STAT-2")

    def factor(self, steps: int) -> float:
        factor = super().factor(steps)
        return factor if self.momentum is None else 1 - factor


class MomentumNoneIsDefault(Fault):
    """momentum=None means 0.1.

    Source: pytorch/pytorch#31498.
    """

    dies_in = ("STAT-4",)

    def factor(self, steps: int) -> float:
        return 0.1 if self.momentum is None else self.momentum


class MomentumNoneIsZero(Fault):
    """momentum=None means 0.

    Source: pytorch/pytorch#24995.
    """

    dies_in = ("STAT-4",)

    def factor(self, steps: int) -> float:
        return self.momentum or 0.0


class ZeroDebias(Fault):
    """The running average is corrected for its start, like Adam's moments; a cumulative one too.

    Source: tensorflow/tensorflow: tensorflow/python/training/moving_averages.py, zero_debias.
    """

    dies_in = ("STAT-1", "STAT-4")

    def factor(self, steps: int) -> float:
        factor = super().factor(steps)
        return factor / (1 - (1 - factor) ** steps) if factor else factor


class NeverCounts(Fault):
    """num_batches_tracked never changes.

    Source: derived from docs/contract.md.
    """

    dies_in = ("STAT-4", "STAT-5")

    def track(self, state: State, stats: Statistics) -> None:
        count = state.num_batches_tracked
        super().track(state, stats)
        state.num_batches_tracked = count


class CountsInEval(Fault):
    """num_batches_tracked also counts forwards in eval.

    Source: derived from docs/contract.md.
    """

    dies_in = ("STAT-5", "STAT-6")

    def evaluate(self, x: Array, state: State, communicator: Communicator) -> Any:
        state.num_batches_tracked += 1
        return super().evaluate(x, state, communicator)


class CountsAbortedSteps(Fault):
    """num_batches_tracked also counts a step that fails.

    Source: pytorch/pytorch: torch/nn/modules/batchnorm.py, which counts before it checks.
    """

    dies_in = ("STAT-7", "ERR-9")

    def train(self, x: Array, dtype: str, state: State, *rest: Any) -> Statistics:
        try:
            return super().train(x, dtype, state, *rest)
        except Exception:
            state.num_batches_tracked += 1
            raise


class TracksInEval(Fault):
    """The running mean also moves in eval, before y is computed of it.

    Source: derived from docs/contract.md.
    """

    dies_in = ("STAT-6", "EVAL-1")

    def evaluate(self, x: Array, state: State, communicator: Communicator) -> Any:
        if state.running_mean is not None and x.size:
            state.running_mean = self.moved(state.running_mean, rows(x).mean(axis=1), 0.1)
        return super().evaluate(x, state, communicator)


class EmptyGroupDecays(Fault):
    """A step of a group without data moves the running statistics towards 0.

    Source: pytorch/pytorch#36530; pytorch/pytorch#74944.
    """

    dies_in = ("STAT-6",)

    def track(self, state: State, stats: Statistics) -> None:
        super().track(state, stats)
        if stats.n == 0 and state.running_mean is not None:
            state.running_mean = self.moved(state.running_mean, stats.mean, self.momentum or 0.0)


class IgnoresRecomputed(Fault):
    """A forward on the same values as the previous one does not count.

    Source: pytorch/pytorch#96136.
    """

    dies_in = ("STAT-7",)

    seen: bytes = b""

    def track(self, state: State, stats: Statistics) -> None:
        before, self.seen = self.seen, self.x.tobytes()
        if self.seen != before:
            super().track(state, stats)


class RunningInInputDtype(Fault):
    """With a float16 or bfloat16 input, the running statistics are rounded to float16.

    Source: pytorch/pytorch#98332; pytorch/pytorch#20634.
    """

    dies_in = ("NUM-2",)

    def moved(self, running: Array, batch: Array, factor: float) -> Array:
        moved = super().moved(running, batch, factor)
        return moved.astype(np.float16).astype(moved.dtype) if self.half else moved


# --- gradients ----------------------------------------------------------------------------------


class SkipsAllReduce(Fault):
    """The backward divides the rank's own sums by the count of the group.

    Source: derived from syncbn/torch/step.py.
    """

    dies_in = ("GRAD-1", "COMM-1")

    def reduce_sums(self, sums: Array, stats: Statistics, communicator: Communicator) -> Array:
        return sums


class LocalBackward(Fault):
    """The backward is that of a BatchNorm on the values of the rank.

    Source: derived from syncbn/torch/step.py.
    """

    dies_in = ("GRAD-1", "GRAD-3")

    def input_grad(
        self, dy: Array, x: Array, stats: Statistics, weight: Array | None, sums: Array
    ) -> Array:
        count, own = x.size // self.num_features, self.reduce_grad(dy, x, stats.mean)
        return super().input_grad(dy, x, stats._replace(n=count), weight, own)


class EqualWeightMeanDy(Fault):
    """The means of dy and dy (x - mean) are means of the ranks' means.

    Source: pytorch/pytorch#36382.
    """

    dies_in = ("GRAD-1", "FWD-6")

    def reduce_sums(self, sums: Array, stats: Statistics, communicator: Communicator) -> Array:
        means = sums / max(self.count, 1)
        return super().reduce_sums(means, stats, communicator) * (stats.n / len(communicator.ranks))


class SumForMean(Fault):
    """The input gradient uses the sums instead of the means.

    Source: Ascend/pytorch@b6111aaf0.
    """

    dies_in = ("GRAD-1",)

    def input_grad(
        self, dy: Array, x: Array, stats: Statistics, weight: Array | None, sums: Array
    ) -> Array:
        return super().input_grad(dy, x, stats._replace(n=1), weight, sums)


class RawMoments(Fault):
    """sum dy (x - mean) is computed as sum dy x - mean sum dy.

    Source: hicann/ops-nn: norm/sync_batch_norm_backward_reduce; pytorch/pytorch#57796.
    """

    dies_in = ("NUM-1",)

    def reduce_grad(self, dy: Array, x: Array, mean: Array) -> Array:
        sum_dy, sum_dy_x = super().reduce_grad(dy, x, np.zeros_like(mean))
        return np.stack([sum_dy, sum_dy_x - mean * sum_dy])


class SumsInFloat16(Fault):
    """With a float16 or bfloat16 input, the sums of the backward are sent as float16.

    Source: facebookresearch/detectron2@5ef0708e.
    """

    dies_in = ("NUM-2",)

    def reduce_sums(self, sums: Array, stats: Statistics, communicator: Communicator) -> Array:
        if self.half:
            sums = sums.astype(np.float16).astype(sums.dtype)
        return super().reduce_sums(sums, stats, communicator)


class ReducedGradWeight(Fault):
    """The gradient of the weight is summed over the ranks; data parallelism does that again.

    Source: NVIDIA/apex#134.
    """

    dies_in = ("GRAD-2",)

    def backward(self, saved: Saved, dy: Array, wants_input: bool) -> Any:
        dx, grad_weight, grad_bias = super().backward(saved, dy, wants_input)
        if grad_weight is not None and saved.communicator is not None:
            grad_weight = saved.communicator.all_reduce(grad_weight.astype(np.float64))
        return dx, grad_weight, grad_bias


class ScaledGradWeight(Fault):
    """The gradient of the weight is multiplied by the number of ranks.

    Source: NVIDIA/apex#138.
    """

    dies_in = ("GRAD-2",)

    def backward(self, saved: Saved, dy: Array, wants_input: bool) -> Any:
        dx, grad_weight, grad_bias = super().backward(saved, dy, wants_input)
        if grad_weight is not None and saved.communicator is not None:
            grad_weight = grad_weight * len(saved.communicator.ranks)
        return dx, grad_weight, grad_bias


class EmptyRankSkipsBackward(Fault):
    """A rank without data does not join the all_reduce of the backward.

    Source: facebookresearch/detectron2#1807.
    """

    dies_in = ("GRAD-3",)

    def backward(self, saved: Saved, dy: Array, wants_input: bool) -> Any:
        saved = saved if saved.x.size else saved._replace(communicator=None)
        return super().backward(saved, dy, wants_input)


class FrozenInputSkipsAllReduce(Fault):
    """A rank whose input needs no gradient does not join the all_reduce of the backward.

    Source: pytorch/pytorch: torch/nn/modules/_functions.py, all_reduce.
    """

    dies_in = ("GRAD-4",)
    frameworks = ("torch",)  # a MindSpore layer cannot see whether its input needs a gradient

    def backward(self, saved: Saved, dy: Array, wants_input: bool) -> Any:
        saved = saved if wants_input else saved._replace(communicator=None)
        return super().backward(saved, dy, wants_input)


class ReadsDyLikeX(Fault):
    """The memory of dy is read in the order that x has in memory.

    Source: pytorch/pytorch#62967; pytorch/pytorch#64100.
    """

    dies_in = ("GRAD-1",)
    frameworks = ("torch",)  # a MindSpore tensor has no memory order of its own in NumPy

    def backward(self, saved: Saved, dy: Array, wants_input: bool) -> Any:
        order = sorted(range(dy.ndim), key=lambda axis: -saved.x.strides[axis])
        shape = [dy.shape[axis] for axis in order]
        dy = dy.ravel(order="K").reshape(shape).transpose(np.argsort(order))
        return super().backward(saved, dy, wants_input)


class ContiguousGradient(Fault):
    """dx is contiguous whatever the memory format of the input.

    Source: pytorch/pytorch#107199.
    """

    dies_in = ("FWD-9",)
    frameworks = ("torch",)  # MindSpore has no memory format on CPU
    keeps_gradient_format = False


class PairsBranchesWrongly(Fault):
    """With two layers in parallel branches, odd ranks send the sums of the wrong layer.

    Source: tensorflow/tensorflow#41980.
    """

    dies_in = ("GRAD-1",)
    frameworks = ("torch",)  # in MindSpore the suite differentiates only one of two branches

    sums: Array
    latest: ClassVar[Callable[[], PairsBranchesWrongly | None]] = lambda: None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        PairsBranchesWrongly.latest = lambda: None  # no branch of the model before

    def reduce_sums(self, sums: Array, stats: Statistics, communicator: Communicator) -> Array:
        other, self.sums = PairsBranchesWrongly.latest() or self, sums
        PairsBranchesWrongly.latest = weakref.ref(self)
        return super().reduce_sums(
            other.sums if communicator.rank % 2 else sums, stats, communicator
        )


# --- eval ---------------------------------------------------------------------------------------


class EvalCommunicates(Fault):
    """Eval averages the running statistics over the ranks.

    Source: pytorch/pytorch#48988.
    """

    dies_in = ("EVAL-2",)

    def evaluate(self, x: Array, state: State, communicator: Communicator) -> Any:
        stats, depends_on = super().evaluate(x, state, communicator)
        mean = communicator.all_gather(stats.mean.astype(np.float64)).mean(axis=0)
        return stats._replace(mean=mean.astype(stats.mean.dtype)), depends_on


class UntrackedEvalOfGroup(Fault):
    """Without running statistics, eval uses the statistics of the group's input.

    Source: pytorch/pytorch#48988; pytorch/pytorch#56982.
    """

    dies_in = ("TRACK-3",)

    def evaluate(self, x: Array, state: State, communicator: Communicator) -> Any:
        if state.running_mean is not None:
            return super().evaluate(x, state, communicator)
        table = communicator.all_gather(self.message(x, NOTHING))
        return self.combine_table(table, x.dtype), communicator


class UntrackedEvalOfInitial(Fault):
    """Without running statistics, eval uses the values that a new layer has, 0 and 1.

    Source: pytorch/pytorch#40147.
    """

    dies_in = ("TRACK-2",)

    def evaluate(self, x: Array, state: State, communicator: Communicator) -> Any:
        if state.running_mean is not None:
            return super().evaluate(x, state, communicator)
        zeros = np.zeros(self.num_features, x.dtype)
        return Statistics(zeros, zeros + 1, n=0), None


class EvalGradientOfTraining(Fault):
    """The backward in eval treats the running statistics as functions of the input.

    Source: PaddlePaddle/Paddle#70900.
    """

    dies_in = ("EVAL-3",)

    def evaluate(self, x: Array, state: State, communicator: Communicator) -> Any:
        stats, _ = super().evaluate(x, state, communicator)
        return stats._replace(n=self.count), Alone()


# --- errors -------------------------------------------------------------------------------------


class AcceptsSingleValue(Fault):
    """A group trains on one value per channel.

    Source: pytorch/pytorch: torch/nn/modules/_functions.py, single value.
    """

    dies_in = ("ERR-7",)

    def check_count(self, n: int) -> None:
        pass

    def unbiased(self, var: Array, n: int) -> Array:
        return super().unbiased(var, max(n, 2))


class AcceptsAnyChannels(Fault):
    """Input with another number of channels than num_features is reshaped to fit.

    Source: vacancy/Synchronized-BatchNorm-PyTorch#31.
    """

    dies_in = ("ERR-6",)

    def forward(self, x: Array, *rest: Any) -> Any:
        if x.ndim < 2 or x.shape[1] in (0, self.num_features):
            return super().forward(x, *rest)
        fitting = np.resize(x, (len(x), self.num_features, *x.shape[2:]))
        y, saved = super().forward(fitting, *rest)
        return np.resize(y, x.shape), saved


class RaisesAlone(Fault):
    """A rank with a wrong input raises before the all_gather, where the others wait for it.

    Source: mindspore-ai/mindspore_test: mindspore/python/mindspore/mint/nn/layer/_functions.py.
    """

    dies_in = ("ERR-9",)

    def exchange(self, x: Array, dtype: str, *rest: Any) -> Array:
        self.check_input(x, dtype)
        return super().exchange(x, dtype, *rest)


def _ignoring(*names: str) -> Any:
    """Plain.disagreement without the settings of these names."""
    places = [COUNT_LOW + 1 + Settings._fields.index(name) for name in names]

    def disagreement(self: Plain, headers: list[list[float]], ranks: tuple[int, ...]) -> str | None:
        for header in headers:
            for place in places:
                header[place] = 0.0
        return Plain.disagreement(self, headers, ranks)

    return disagreement


class AcceptsOtherChannels(Fault):
    """Ranks whose layers differ in num_features take the step together.

    Source: derived from docs/contract.md.
    """

    dies_in = ("ERR-9",)
    disagreement = _ignoring("num_features")


class AcceptsOtherEps(Fault):
    """Ranks whose layers differ in eps take the step together.

    Source: derived from docs/contract.md.
    """

    dies_in = ("ERR-9",)
    disagreement = _ignoring("eps")


class AcceptsOtherMomentum(Fault):
    """Ranks whose layers differ in momentum take the step together.

    Source: derived from docs/contract.md.
    """

    dies_in = ("ERR-9",)
    disagreement = _ignoring("momentum")


class AcceptsOtherTracking(Fault):
    """Ranks whose layers differ in track_running_stats take the step together.

    Source: derived from docs/contract.md.
    """

    dies_in = ("ERR-9",)
    disagreement = _ignoring("track_running_stats", "momentum")


class AcceptsOtherDtype(Fault):
    """Ranks whose layers differ in dtype take the step together.

    Source: derived from docs/contract.md.
    """

    dies_in = ("ERR-9",)
    frameworks = ("torch",)  # its case has bfloat16, which MindSpore does not have on CPU
    disagreement = _ignoring("dtype")


class RaisesAloneInBackward(Fault):
    """A rank that fails in the backward raises before the all_reduce, where the others wait for it.

    Source: derived from docs/contract.md.
    """

    dies_in = ("ERR-9",)
    frameworks = ("torch",)  # the suite cannot make a backward of MindSpore fail

    def fail_backward(self, communicator: Communicator | None) -> None:
        pass


class HidesIdleRanks(Fault):
    """A rank with nothing to differentiate sends the mark BACKWARD, and the others wait for it.

    Source: pytorch/pytorch#44957.
    """

    dies_in = ("GRAD-4",)

    def message(self, x: Array | None, mark: int) -> Array:
        return super().message(x, BACKWARD if mark == NOTHING else mark)


# --- attributes and contexts --------------------------------------------------------------------


class EpsOfConstruction(Fault):
    """An eps that is set after construction has no effect.

    Source: derived from docs/contract.md.
    """

    dies_in = ("CTOR-6",)

    def set_attribute(self, name: str, value: Any) -> None:
        if name != "eps":
            super().set_attribute(name, value)


class MomentumOfConstruction(Fault):
    """A momentum that is set after construction has no effect.

    Source: derived from docs/contract.md.
    """

    dies_in = ("CTOR-6",)

    def set_attribute(self, name: str, value: Any) -> None:
        if name != "momentum":
            super().set_attribute(name, value)


class TrackingOfConstruction(Fault):
    """A track_running_stats that is set after construction has no effect.

    Source: derived from docs/contract.md.
    """

    dies_in = ("CTOR-6",)

    def set_attribute(self, name: str, value: Any) -> None:
        if name != "track_running_stats":
            super().set_attribute(name, value)


class ForgetsUnrecordedSteps(Fault):
    """Under no_grad, training does not move the running statistics.

    Source: derived from docs/contract.md.
    """

    dies_in = ("FWD-8",)

    def track(self, state: State, stats: Statistics) -> None:
        if self.context != "no_grad":
            super().track(state, stats)


class LocalInInferenceMode(Fault):
    """In inference mode, each rank trains with its own statistics.

    Source: derived from docs/contract.md.
    """

    dies_in = ("FWD-8",)
    frameworks = ("torch",)  # MindSpore has no inference mode

    def exchange(self, *step: Any) -> Array:
        table = super().exchange(*step)
        own = self.communicator.ranks.index(self.communicator.rank)
        return table[own : own + 1] if self.context == "inference_mode" else table


class Float32InAutocast(Fault):
    """In autocast, the output is float32 whatever the dtype of the input.

    Source: derived from docs/contract.md.
    """

    dies_in = ("FWD-8",)
    frameworks = ("torch",)  # the wrapper of MindSpore does not see the mixed precision

    def normalize(self, *arguments: Any) -> Array:
        self.keeps_dtype = self.context != "autocast"
        return super().normalize(*arguments)


class RoundsInAutocast(Fault):
    """In autocast, the output is rounded to the precision of bfloat16.

    Source: derived from docs/contract.md.
    """

    dies_in = ("FWD-8",)
    frameworks = ("torch",)  # the wrapper of MindSpore does not see the mixed precision

    def normalize(self, *arguments: Any) -> Array:
        y = super().normalize(*arguments)
        if self.context != "autocast":
            return y
        mantissa, exponent = np.frexp(y)
        return np.ldexp(np.round(mantissa * 2**8) / 2**8, exponent).astype(y.dtype)


class ModifiesUnrecordedInput(Fault):
    """Under no_grad, the layer subtracts the mean from the caller's tensor in place.

    Source: derived from docs/contract.md.
    """

    dies_in = ("FWD-8",)
    frameworks = ("torch",)  # the wrapper of MindSpore gets a copy of the input

    def normalize(
        self, x: Array, stats: Statistics, weight: Array | None, bias: Array | None
    ) -> Array:
        y = super().normalize(x, stats, weight, bias)
        if self.context == "no_grad":
            x -= stats.mean.reshape(1, -1, *(1,) * (x.ndim - 2))
        return y


class ForgetsIdleSteps(Fault):
    """A recorded step does not move the running statistics if nothing wants a gradient.

    Source: derived from docs/contract.md.
    """

    dies_in = ("FWD-8",)
    frameworks = ("torch",)  # the wrapper of MindSpore does not see which gradients are wanted

    idle = False

    def forward(
        self,
        x: Array,
        dtype: str,
        state: State,
        communicator: Communicator,
        training: bool,
        differentiates: bool,
    ) -> tuple[Array, Saved]:
        self.idle = self.context == "" and not differentiates
        return super().forward(x, dtype, state, communicator, training, differentiates)

    def track(self, state: State, stats: Statistics) -> None:
        if not self.idle:
            super().track(state, stats)


class KeepsFirstEval(Fault):
    """Eval goes on with the running statistics of the first eval, however training moved them.

    Source: derived from docs/contract.md.
    """

    dies_in = ("FWD-8",)

    first: Any = None

    def evaluate(self, x: Array, state: State, communicator: Communicator) -> Any:
        found = super().evaluate(x, state, communicator)
        if state.running_mean is None:
            return found
        self.first = self.first or found
        return self.first


class CountsSinceConstruction(Fault):
    """The cumulative average starts again in a layer that loads a checkpoint.

    Source: derived from docs/contract.md.
    """

    dies_in = ("CTOR-5",)

    steps = 0

    def factor(self, steps: int) -> float:
        self.steps += 1
        return super().factor(self.steps)


class RemembersItsOutput(Fault):
    """A tensor that came before gets the output that it had then, not that of this step.

    Source: derived from docs/contract.md.
    """

    dies_in = ("FWD-8",)
    frameworks = ("torch",)  # the wrapper of MindSpore gets a copy of the input

    seen: Any = None
    output: Any = None

    def normalize(
        self, x: Array, stats: Statistics, weight: Array | None, bias: Array | None
    ) -> Array:
        y = super().normalize(x, stats, weight, bias)
        before, self.seen = self.seen, (x.__array_interface__["data"], x.tobytes())
        if self.seen != before:
            self.output = y
        return np.array(self.output)


class CopyForgetsEps(Fault):
    """A deep copy of the layer has the default eps.

    Source: derived from docs/contract.md.
    """

    dies_in = ("CTOR-8",)
    frameworks = ("torch",)  # the suite copies no layer of MindSpore

    def __deepcopy__(self, memo: Any) -> Plain:
        copied = super().__deepcopy__(memo)
        copied.eps = 1e-5
        return copied


class ForgetsStepsAfterCast(Fault):
    """A layer that was cast to another dtype does not move its running statistics.

    Source: derived from docs/contract.md.
    """

    dies_in = ("CTOR-8",)
    frameworks = ("torch",)  # the suite casts no layer of MindSpore

    def track(self, state: State, stats: Statistics) -> None:
        if not self.was_cast:
            super().track(state, stats)


class LocalSumsAgain(Fault):
    """The second backward uses the sums of the rank alone: the adjoint of a sum over ranks is lost.

    Source: derived from reference/second.py.
    """

    dies_in = ("GRAD-5",)

    def double_backward(self, saved: Saved, *gradients: Array) -> tuple[Array, Array, Array]:
        alone = None if saved.communicator is None else Alone()
        return super().double_backward(saved._replace(communicator=alone), *gradients)


class ConstantStatisticsAgain(Fault):
    """The second backward treats the mean and the variance of the group as constants.

    Source: derived from reference/second.py.
    """

    dies_in = ("GRAD-5",)

    def double_backward(self, saved: Saved, *gradients: Array) -> tuple[Array, Array, Array]:
        return super().double_backward(saved._replace(communicator=None), *gradients)


class ParameterGradientsAgain(Fault):
    """The second backward ignores the gradients in grad_weight and grad_bias.

    Source: derived from reference/second.py.
    """

    dies_in = ("GRAD-5",)

    def double_backward(self, saved: Saved, *gradients: Array) -> tuple[Array, Array, Array]:
        dy, ddx, ddweight, ddbias = gradients
        return super().double_backward(saved, dy, ddx, 0 * ddweight, 0 * ddbias)


class ForgetsInputAgain(Fault):
    """The second backward differentiates in dy alone: the derivative in x is 0.

    Source: derived from reference/second.py.
    """

    dies_in = ("GRAD-5",)

    def double_backward(self, saved: Saved, *gradients: Array) -> tuple[Array, Array, Array]:
        of_dy, of_x, of_weight = super().double_backward(saved, *gradients)
        return of_dy, 0 * of_x, of_weight


class EmptyRankSkipsAgain(Fault):
    """A rank without data does not join the all_reduce of the second backward.

    Source: derived from reference/second.py.
    """

    dies_in = ("GRAD-5",)

    def double_backward(self, saved: Saved, *gradients: Array) -> tuple[Array, Array, Array]:
        saved = saved if saved.x.size else saved._replace(communicator=None)
        return super().double_backward(saved, *gradients)


class ZeroInEvalAgain(Fault):
    """In eval with running statistics, the second derivative in dy is 0.

    Source: derived from reference/second.py.
    """

    dies_in = ("GRAD-5",)

    def double_backward(self, saved: Saved, *gradients: Array) -> tuple[Array, Array, Array]:
        of_dy, of_x, of_weight = super().double_backward(saved, *gradients)
        return of_dy * (saved.communicator is not None), of_x, of_weight


def _channels_last(x: Array) -> bool:
    return x.ndim > 2 and x.shape[1] > 1 and x.strides[1] == x.itemsize


MUTANTS: dict[str, type[Fault]] = {mutant.__name__: mutant for mutant in Fault.__subclasses__()}
