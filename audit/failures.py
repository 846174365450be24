"""Known failures: how SyncBatchNorm went wrong elsewhere, and the cases that ask a layer about it.

A failure names the cases that would have caught it, and the catalogue tags them with its first
source. One that no case can ask a layer about says why. docs/failure-modes.md shows both; `write`
makes it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from syncbn.conformance import ConformanceError
from syncbn.conformance.case import Case

# OWNER/REPOSITORY with the number of an issue or pull request, a commit, or what was read there.
SOURCE = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:#(?P<number>\d+)|@(?P<commit>[0-9a-f]{7,40})|: (?P<path>[\w./-]+)(?:, (?P<part>.+))?)"
)

_NAMED = 5  # ids of a failure, if it has more than one beyond them


@dataclass(frozen=True)
class Failure:
    """One way in which a SyncBatchNorm went wrong; the first of its sources stands for it.

    asked: which cases would have caught it, by clause and a regular expression of titles.
    not_asked: why no case can ask a layer about it. A test or a page that shows something of it
    nevertheless is named as pytest would find it, or by its path.
    """

    id: str
    sources: tuple[str, ...]
    went_wrong: str
    not_asked: str | None = None
    asked: tuple[tuple[str, str], ...] = ()

    def by(self, case: Case) -> bool:
        """Whether the case asks about it."""
        return any(
            clause == case.clause and re.fullmatch(title, case.title)
            for clause, title in self.asked
        )


_LAYER = "torch/nn/modules/batchnorm.py"
_FUNCTION = "torch/nn/modules/_functions.py"
_MERGE = "aten/src/ATen/native/cuda/Normalization.cuh"
_MINT = "mindspore-ai/mindspore_test: mindspore/python/mindspore/mint/nn/layer"
_INFER = "mindspore-ai/mindspore_test: mindspore/ops/infer/ops_func_impl"
_NPU = "Ascend/pytorch: torch_npu/utils/syncbatchnorm.py"

_NO_CONVERTER = "It is about the conversion of a model; the layer has no part in it."


def _torch(test: str) -> str:
    return f"`tests/syncbn/test_torch_layer.py::{test}`"


FAILURES: dict[str, tuple[Failure, ...]] = {
    "Statistics, counts and empty shards": (
        Failure(
            "local-count-in-running-var",
            ("pytorch/pytorch#22192", "NVIDIA/apex#387"),
            "The unbiased variance took the count of one rank, so that running_var differed "
            "between ranks whose images differ in size.",
            asked=(("STAT-2", "even shards|uneven shards|batch and spatial sizes|few values"),),
        ),
        Failure(
            "equal-weight-input-gradient",
            ("pytorch/pytorch#36382", "pytorch/pytorch#36688"),
            "The two means in the backward weighed ranks, not values: dx was wrong for uneven "
            "batches.",
            asked=(("GRAD-1", "uneven images, seed .|batch and spatial sizes|matrices"),),
        ),
        Failure(
            "empty-shard-crashes",
            ("pytorch/pytorch#36530", "pytorch/pytorch#74944", f"{_NPU}, no empty input"),
            "A rank without data crashed, in the forward or for want of a gradient.",
            asked=(("STAT-6", "a group without data.*"), ("FWD-4", ".*"), ("GRAD-3", ".*")),
        ),
        Failure(
            "empty-rows-unmasked-in-a-capture",
            (
                "pytorch/pytorch#78549",
                "pytorch/pytorch#78666",
                "pytorch/pytorch#78656",
                "pytorch/pytorch#109085",
            ),
            "While a CUDA graph was captured, the rows of empty ranks were not left out of the "
            "merge, and every rank got NaN.",
            "A case does not capture a graph of the device. What a capture needs of a merge, "
            "fixed shapes and a count of 0 without effect, is shown of ours by "
            f"{_torch('TestComposed::test_combine')} and "
            f"{_torch('TestAutograd::test_the_host_waits_only_to_look')}.",
        ),
        Failure(
            "counts-in-half-precision",
            (
                "pytorch/pytorch#70901",
                "pytorch/pytorch#71050",
                f"pytorch/pytorch: {_FUNCTION}, type of the counts",
            ),
            "Counts went round as float16: 2049 became 2048 and 65520 infinite, which left a mean "
            "of 0.",
            asked=(("NUM-3", ".*, float16"),),
        ),
        Failure(
            "equal-weight-mean",
            ("PaddlePaddle/Paddle#32464",),
            "The mean of the ranks' means weighed ranks, not values.",
            asked=(("FWD-3", ".*"),),
        ),
        Failure(
            "empty-rank-skips-the-backward",
            (
                "facebookresearch/detectron2#1807",
                "facebookresearch/detectron2#366",
                "facebookresearch/detectron2@7c69c051",
            ),
            "A rank without data did not reach the collective of the backward, and its peers "
            "waited for ever.",
            asked=(("GRAD-3", ".*"), ("COMM-1", "rank 0 is empty")),
        ),
        Failure(
            "empty-batch-moves-statistics",
            ("open-mmlab/mmcv#1205",),
            "A step without any data crashed, or was taken for a batch with mean 0 and variance 0.",
            asked=(("FWD-4", "every rank.*"), ("STAT-6", "a group without data.*")),
        ),
        Failure(
            "local-single-value-refused",
            ("NVIDIA/apex#262", "NVIDIA/apex#287"),
            "One value per channel on each rank was refused, though the group had several.",
            asked=(("ERR-7", "one value on each rank is enough"),),
        ),
        Failure(
            "single-value-refused-on-one-rank",
            ("mapillary/inplace_abn: inplace_abn/functions.py",),
            "A rank with one value per channel raised, while its peers with more waited for it.",
            asked=(("ERR-7", "one value on rank 0, 8 on the others"),),
        ),
        Failure(
            "biased-running-var",
            (
                "pytorch/pytorch#40600",
                "tensorflow/tensorflow#55545",
                "Ascend/op-plugin: test/test_base_ops/test_batchnorm_gather_stats_update.py",
            ),
            "running_var took the biased variance in one implementation and the unbiased one in "
            "another.",
            asked=(("STAT-2", ".*"),),
        ),
        Failure(
            "no-cumulative-average",
            ("pytorch/pytorch#31498", "pytorch/pytorch#24995"),
            "momentum=None crashed, or did not give the plain mean over steps.",
            asked=(("STAT-4", ".*"),),
        ),
        Failure(
            "ranks-disagree",
            ("facebookresearch/detectron2#5398",),
            "After some steps every rank had running statistics of its own.",
            asked=(("STAT-3", ".*"),),
        ),
        Failure(
            "masked-means",
            ("google/flax#3690", "google/flax#3693"),
            "With a mask, the mean of masked means weighed ranks, not values.",
            "The operator takes no mask.",
        ),
    ),
    "Numerics and memory layouts": (
        Failure(
            "one-pass-variance",
            ("tensorflow/tensorflow#3290", "keras-team/keras#18795", f"{_NPU}, sums of squares"),
            "The mean of squares less the square of the mean is rounding, even negative, where "
            "the mean is far above the deviation.",
            asked=(
                (
                    "NUM-1",
                    "mean/std (1000|10000|100000), (contiguous|channels_last)"
                    "|mean/std 1e5, matrices",
                ),
            ),
        ),
        Failure(
            "nan-with-channels-first",
            ("tensorflow/tensorflow#43165",),
            "With channels in dimension 1 the output was NaN.",
            asked=(("FWD-1", "images, seed ."),),
        ),
        Failure(
            "imprecise-weight-gradient",
            ("pytorch/pytorch#57796", "facebookresearch/fairscale#662"),
            "grad_weight lost digits on large inputs.",
            asked=(("NUM-1", "mean/std .*, dy orthogonal to x"),),
        ),
        Failure(
            "variance-overflows",
            ("pytorch/pytorch#178123", "pytorch/pytorch#162489"),
            "Where the variance is beyond float32, infinity less infinity made NaN.",
            asked=(("NUM-1", r"scale 1e30.*|scale 1e\+18|scale 1e18, .*"),),
        ),
        Failure(
            "negative-running-var",
            ("pytorch/pytorch#106605",),
            "A negative running_var gave NaN in eval, as the formula does, and no error.",
            asked=(("EVAL-1", "a negative running_var"),),
        ),
        Failure(
            "eps-as-a-floor",
            (
                "vacancy/Synchronized-BatchNorm-PyTorch#38",
                "vacancy/Synchronized-BatchNorm-PyTorch#43",
            ),
            "The larger of variance and eps was taken, not their sum.",
            asked=(("FWD-1", r"eps=0\.1"), ("NUM-1", r"std .*far below sqrt\(eps\)")),
        ),
        Failure(
            "sum-for-a-mean",
            ("Ascend/pytorch@b6111aaf0",),
            "The backward was given a sum where its kernel expected a mean.",
            asked=(("GRAD-1", "even images"),),
        ),
        Failure(
            "nan-in-statistics",
            ("PaddlePaddle/PaddleCustomDevice#1340",),
            "On an NPU, mean and variance of the group were NaN now and then.",
            asked=(("STAT-1", ".*"),),
        ),
        Failure(
            "odd-channels-in-channels-last",
            ("NVIDIA/apex#1768", "pytorch/pytorch#57077"),
            "For large channels-last images, statistics were wrong unless the number of channels "
            "was a power of two.",
            asked=(("FWD-7", r"channels_last, \d+ channels"),),
        ),
        Failure(
            "layouts-disagree",
            ("sony/nnabla-ext-cuda#457", "sony/nnabla#1169"),
            "With channels last, running_var was far too large, and the gradient of the weight "
            "another one.",
            asked=(("NUM-1", "mean/std .*, channels_last"), ("GRAD-2", "channels_last")),
        ),
        Failure(
            "channels-and-batch-swapped",
            ("fangwei123456/spikingjelly#393",),
            "The batch was taken for the channels.",
            asked=(("FWD-3", "batch sizes of matrices"),),
        ),
        Failure(
            "gradient-in-another-layout",
            (
                "pytorch/pytorch#62967",
                "pytorch/pytorch#64039",
                "pytorch/pytorch#62839",
                "pytorch/pytorch#64100",
            ),
            "dx was wrong if the memory layout of dy was not that of x.",
            asked=(("GRAD-1", "x .*, dy .*"),),
        ),
        Failure(
            "gradient-loses-the-format",
            ("pytorch/pytorch#107199",),
            "The gradient of a channels-last input was contiguous.",
            asked=(("GRAD-1", "format of the gradient.*"),),
        ),
    ),
    "Types": (
        Failure(
            "mixed-types-refused",
            (
                "pytorch/pytorch#20634",
                "pytorch/pytorch#27420",
                "pytorch/pytorch#96203",
                "pytorch/pytorch#98332",
                "deepspeedai/DeepSpeed#2102",
                "hpcaitech/ColossalAI#258",
                "Ascend/pytorch@77b8f7081",
            ),
            "Half-precision input beside float32 parameters, or all in half precision, raised an "
            "error about types.",
            asked=(("NUM-2", "b?float16, .*"),),
        ),
        Failure(
            "sums-in-half-precision",
            ("facebookresearch/detectron2@5ef0708e",),
            "The ranks added up their sums in float16.",
            asked=(("NUM-2", "b?float16, parameters float32, .*"),),
        ),
        Failure(
            "half-precision-crashes",
            (
                "vacancy/Synchronized-BatchNorm-PyTorch#22",
                "mapillary/inplace_abn#150",
                "apache/mxnet#12257",
                "PaddlePaddle/Paddle#40943",
            ),
            "float16 input crashed or hung.",
            asked=(("NUM-2", "float16, .*"),),
        ),
        Failure(
            "empty-shard-of-another-type",
            ("pytorch/pytorch#37198", f"pytorch/pytorch: {_FUNCTION}, type of an empty shard"),
            "With half-precision input, a rank without data sends another type than its peers do "
            "in the same collective.",
            asked=(("FWD-4", ".*float16"), ("GRAD-3", ".*bfloat16")),
        ),
    ),
    "Collectives": (
        Failure(
            "group-forgotten-in-the-forward",
            ("pytorch/pytorch#38874", "pytorch/pytorch#43861"),
            "The all_gather of the forward went to all ranks, not to the process group.",
            asked=(("FWD-5", ".*"),),
        ),
        Failure(
            "group-made-on-its-members-only",
            ("pytorch/pytorch#48804", "pytorch/pytorch#48897"),
            "Users made the process group on its members only, where every rank has to, and hung.",
            "The suite makes the groups, not the layer. That `syncbn.torch.create_group` needs "
            "the members only is shown by "
            "`tests/syncbn/test_torch_groups.py::test_groups_on_three_ranks[members_make_a_group]`.",
        ),
        Failure(
            "new-group-every-step",
            ("NVIDIA/apex#113", "NVIDIA/apex#105"),
            "Every step made a process group, until training hung.",
            asked=(("COMM-1", "200 steps"),),
        ),
        Failure(
            "group-ignored",
            ("open-mmlab/mmcv#427", "mapillary/inplace_abn#219"),
            "The process group was ignored, or without one nothing was synchronized.",
            asked=(("FWD-5", ".*"),),
        ),
        Failure(
            "eval-synchronizes",
            ("pytorch/pytorch#48988", "pytorch/pytorch#56982"),
            "A layer without running statistics synchronized in eval as well: validation on rank "
            "0 alone hung.",
            asked=(("EVAL-2", ".*"),),
        ),
        Failure(
            "unequal-numbers-of-calls",
            ("pytorch/pytorch#44957", "horovod/horovod#2241"),
            "One rank called the layer less often than its peers, which waited for ever.",
            "No layer can know that a peer will not call it; only the time-out of the process "
            "group ends the wait.",
        ),
        Failure(
            "recomputed-forward",
            (
                "pytorch/pytorch#43946",
                "pytorch/pytorch#96136",
                "facebookresearch/fairscale#694",
                "facebookresearch/fairscale#1035",
                "Tencent/YOLO-Master#262",
            ),
            "Activation checkpointing ran the forward again in the backward, which hung or moved "
            "the running statistics twice.",
            asked=(("STAT-7", "a recomputed.*"),),
        ),
        Failure(
            "converter-resets-training",
            (
                "open-mmlab/mmengine#1624",
                "open-mmlab/mmengine#1695",
                "huggingface/pytorch-image-models#2422",
                "pytorch/pytorch#111998",
            ),
            "Converted layers were in another mode than those they replaced, and only some ranks "
            "synchronized.",
            _NO_CONVERTER,
        ),
        Failure(
            "frozen-input-crashes",
            ("PaddlePaddle/Paddle#67559", "PaddlePaddle/Paddle#67182"),
            "The backward crashed if the input, as in a first layer, wanted no gradient.",
            asked=(("GRAD-4", "input frozen|input frozen on rank 0.*"),),
        ),
        Failure(
            "error-before-the-collective",
            (f"{_MINT}/_functions.py, channels",),
            "The rank with a wrong number of channels raises, and its peers wait for ever.",
            asked=(("ERR-9", ".*"),),
        ),
        Failure(
            "redundant-broadcast",
            ("pytorch/pytorch#46636",),
            "Data parallelism broadcast running statistics that were equal already.",
            "It is about DistributedDataParallel. That the broadcast is redundant is clause "
            "STAT-3.",
        ),
    ),
    "Interface and behaviour": (
        Failure(
            "untracked-crashes",
            (
                "pytorch/pytorch#40147",
                "pytorch/pytorch#50126",
                "pytorch/pytorch#49730",
                "NVIDIA/apex#1071",
                "NVIDIA/apex#913",
                "NVIDIA/apex#1206",
                f"{_MINT}/normalization.py, eval without statistics",
            ),
            "track_running_stats=False crashed, in training or in eval.",
            asked=(("TRACK-1", ".*"), ("TRACK-2", ".*")),
        ),
        Failure(
            "affine-false-crashes",
            ("NVIDIA/apex#158", f"{_INFER}/batch_norm_reduce_grad.cc, shapes of weight"),
            "affine=False crashed, or gave gradients of another shape.",
            asked=(
                ("FWD-1", "affine=False"),
                ("GRAD-1", "affine=False"),
                ("EVAL-3", "affine=False"),
                ("GRAD-3", ".*affine=False"),
            ),
        ),
        Failure(
            "dimensions-refused",
            (
                "pytorch/pytorch#20204",
                "NVIDIA/apex#194",
                "pytorch/pytorch#29626",
                "Ascend/pytorch@c602fd97c",
            ),
            "Input of shape (N, C), or of any other than 4 dimensions, was refused.",
            asked=(("FWD-2", "(2|3|5|6) dimensions.*"),),
        ),
        Failure(
            "converter-takes-other-layers",
            ("pytorch/pytorch#29187", "NVIDIA/apex#437"),
            "InstanceNorm was converted as well.",
            _NO_CONVERTER,
        ),
        Failure(
            "converter-unfreezes",
            ("pytorch/pytorch#22569",),
            "Frozen parameters wanted gradients after conversion.",
            _NO_CONVERTER,
        ),
        Failure(
            "converter-drops-subclasses",
            ("pytorch/pytorch#187298", "pytorch/pytorch#187771"),
            "Conversion silently dropped the forward of a subclass.",
            _NO_CONVERTER,
        ),
        Failure(
            "no-eval-without-a-group",
            ("pytorch/pytorch#22538", "pytorch/pytorch#41081"),
            "A trained layer could neither run where nothing is distributed nor become a BatchNorm "
            "again.",
            "The ranks of the suite are always distributed. That ours runs in a plain process is "
            f"shown by {_torch('TestEval::test_running_statistics')}, and that its state goes to "
            "BatchNorm by "
            f"{_torch('TestConstruction::test_state_dict_goes_to_and_from_batch_norm')}.",
        ),
        Failure(
            "no-double-backward",
            ("pytorch/pytorch#61222", "hosseinshn/GradNorm#6"),
            "A second derivative raised an error about an operation inside the layer.",
            "The suite has no case for GRAD-5 yet. That our layer says clearly that it cannot is "
            f"shown by {_torch('TestAutograd::test_double_backward')}.",
        ),
        Failure(
            "parameter-gradients-of-another-scale",
            ("NVIDIA/apex#134", "NVIDIA/apex#138"),
            "The layer reduced the gradients of its parameters, or users thought so, and data "
            "parallelism then averaged them.",
            asked=(
                (
                    "GRAD-2",
                    "even images|uneven images|batch and spatial sizes|matrices"
                    "|averaged by data parallelism",
                ),
            ),
        ),
        Failure(
            "not-compilable",
            (
                "pytorch/pytorch#156680",
                "pytorch/pytorch#161302",
                "pytorch/pytorch#100239",
                "pytorch/pytorch#107372",
                "pytorch/pytorch#194504",
                "pytorch/pytorch#195827",
            ),
            "torch.compile broke the graph at the layer, or failed on it.",
            "A case takes a PyTorch layer as it is. Ours, compiled, is compared with itself in "
            f"{_torch('TestWithTorch::test_compile')}; `--mode graph` compiles every case for "
            "MindSpore.",
        ),
        Failure(
            "kernels-read-out-of-bounds",
            ("pytorch/pytorch#189828", "pytorch/pytorch#190005", "pytorch/pytorch#194798"),
            "Kernels that users may call read beyond buffers that are too short.",
            "A layer makes these buffers itself. That ours are checked where users can pass them "
            f"is shown by {_torch('TestFunctional::test_wrong_arguments_change_nothing')}.",
        ),
        Failure(
            "no-cpu",
            ("pytorch/pytorch#78078", "pytorch/pytorch#78081", "pytorch/pytorch#38940"),
            "The layer refuses CPU tensors, so that nothing distributed can be tried without an "
            "accelerator.",
            asked=(("FWD-1", "images, seed ."),),
        ),
        Failure(
            "channels-reshaped-away",
            ("vacancy/Synchronized-BatchNorm-PyTorch#31",),
            "Input with twice as many channels was silently reshaped to the expected number.",
            asked=(("ERR-6", "6 channels for 3, .*"),),
        ),
        Failure(
            "eps-zero-refused",
            ("mindspore-ai/mindspore#290",),
            "eps=0.0 was refused.",
            asked=(("FWD-1", r"eps=0\.0"), ("EVAL-1", r"eps=0\.0")),
        ),
        Failure(
            "backward-in-eval-crashes",
            ("PaddlePaddle/Paddle#70900",),
            "The backward crashed in eval.",
            asked=(("EVAL-3", ".*"),),
        ),
        Failure(
            "kernels-change-their-meaning",
            ("pytorch/pytorch#57900",),
            "A kernel took means, then sums and a count, and Horovod's layer on top of it broke.",
            "It is about a kernel below the layer. What our backend `aten` expects of each is "
            "pinned by `tests/syncbn/test_aten.py::TestCuda::test_calls` and "
            "`tests/audit/test_torch_npu.py::TestWheel::test_fits`.",
        ),
        Failure(
            "input-modified",
            ("open-mmlab/mmdetection3d#1435",),
            "The layer reshaped the caller's tensor in place.",
            asked=(("FWD-2", ".*"),),
        ),
        Failure(
            "many-collectives",
            (
                "pytorch/pytorch#38246",
                "pytorch/pytorch#36452",
                "pytorch/pytorch#39358",
                "pytorch/pytorch#50548",
                "pytorch/pytorch#50549",
                "pytorch/pytorch#88021",
                "NVIDIA/apex#980",
                "horovod/horovod#2450",
                "horovod/horovod#3325",
            ),
            "A step was slow: it issued several collectives where two are enough.",
            asked=(("COMM-1", "defaults|affine=False|track_running_stats=False|momentum=None"),),
        ),
        Failure(
            "collectives-paired-wrongly",
            ("tensorflow/tensorflow#41980",),
            "Reductions of independent layers were issued in another order on another rank, and "
            "paired wrongly.",
            asked=(("GRAD-1", "two layers in parallel branches"),),
        ),
        Failure(
            "easy-to-get-wrong",
            ("tensorflow/tensorflow#18222",),
            "A maintainer's remark that this layer is easily made wrong, and in subtle ways.",
            "It names no failure of its own.",
        ),
    ),
    "Read in PyTorch's source": (
        Failure(
            "frozen-input-on-one-rank",
            (f"pytorch/pytorch: {_FUNCTION}, all_reduce",),
            "A rank whose input wants no gradient skips the all_reduce, and its peers wait for "
            "ever.",
            asked=(("GRAD-4", "input frozen on rank 0.*"),),
        ),
        Failure(
            "single-value-in-the-group",
            (
                f"pytorch/pytorch: {_FUNCTION}, single value",
                f"pytorch/pytorch: {_MERGE}, n = 1",
                f"{_MINT}/_functions.py, single value",
            ),
            "One value per channel in the whole group raises nothing and leaves NaN or an infinity "
            "in running_var.",
            asked=(("ERR-7", "one value, .*"),),
        ),
        Failure(
            "empty-group-shrinks-statistics",
            (f"pytorch/pytorch: {_MERGE}, n = 0",),
            "A step without any data multiplies the running statistics by 1 - momentum.",
            asked=(("STAT-6", "a group without data.*"),),
        ),
        Failure(
            "constant-shard-without-eps",
            (f"pytorch/pytorch: {_MERGE}, invstd = 0",),
            "With eps=0.0, a channel that is constant on one rank makes the variance of the group "
            "infinite.",
            asked=(("NUM-1", "channel 1 constant on each rank"),),
        ),
        Failure(
            "counts-in-float32",
            (f"pytorch/pytorch: {_MERGE}, counts in float32",),
            "Counts beyond 2^24 are rounded.",
            "A count that is rounded to float32 moves no result by more than one rounding, which "
            "every bound allows. That ours arrive exactly is shown by "
            f"{_torch('test_a_count_survives_a_float32_message')}.",
        ),
        Failure(
            "variance-out-of-invstd",
            (f"pytorch/pytorch: {_MERGE}, eps",),
            "A variance far below eps does not survive being sent as 1 / sqrt(var + eps).",
            asked=(("NUM-1", r"std .*far below sqrt\(eps\)"),),
        ),
    ),
    "Ascend and MindSpore": (
        Failure(
            "npu-patch-comes-and-goes",
            (
                "Ascend/pytorch@32baba241",
                "Ascend/pytorch@576dcae8f",
                "Ascend/pytorch@a50371287",
                "Ascend/pytorch@159eee9a0",
            ),
            "Some versions of torch_npu replaced the forward of torch.nn.SyncBatchNorm, others did "
            "not.",
            "It is about what a version holds: a case judges the code that is installed, and a "
            "report names the versions.",
        ),
        Failure(
            "npu-kernel-missing",
            (
                "PaddlePaddle/PaddleDetection#8441",
                "PaddlePaddle/PaddleSeg#3692",
                "PaddlePaddle/PaddleOCR#13183",
            ),
            "The device had no kernel for the operator.",
            asked=(("FWD-1", "images, seed ."),),
        ),
        Failure(
            "npu-loses-channels-last",
            (f"{_NPU}, layout",),
            "The output of a channels-last input was contiguous.",
            asked=(("FWD-2", ".*channels_last"),),
        ),
        Failure(
            "host-waits-in-a-step",
            (
                f"{_NPU}, single value",
                f"pytorch/pytorch: {_LAYER}, momentum=None",
                f"{_MINT}/normalization.py, momentum=None",
            ),
            "The host waits for the device in every training step.",
            "It shows on an accelerator only: clause COMM-2 is not run. That a step of ours reads "
            "no value of the device is shown by "
            f"{_torch('TestAutograd::test_the_host_waits_only_to_look')}.",
        ),
        Failure(
            "npu-no-meta-kernels",
            ("Ascend/op-plugin: op_plugin/config/op_plugin_functions.yaml, Meta",),
            "The kernels have no shape functions, which a compiler needs.",
            "A case takes a PyTorch layer as it is. That our backend `aten` compiles, on stand-ins "
            "for kernels, shows `tests/syncbn/test_aten.py::TestBackend::test_compile`.",
        ),
        Failure(
            "npu-import-fails",
            ("Ascend/pytorch: torch_npu/__init__.py",),
            "Where torch_npu is installed and CANN is not, `import torch` fails.",
            "It is about an installation; `docs/ascend.md` names the variable that mends it.",
        ),
        Failure(
            "raw-moment-weight-gradient",
            ("hicann/ops-nn: norm/sync_batch_norm_backward_reduce",),
            "The sum of dy (x - mean) is taken as a difference of raw sums, which cancels where "
            "the mean is far above the deviation.",
            asked=(("NUM-1", "mean/std .*dy orthogonal to x"),),
        ),
        Failure(
            "positive-running-mean-only",
            (
                "hicann/ops-nn: norm/sync_batch_norm_gather_stats_with_counts/docs/"
                "aclnnBatchNormGatherStatsWithCounts.md",
            ),
            "The kernel promises its precision for a positive running_mean only.",
            asked=(("STAT-1", ".*"),),
        ),
        Failure(
            "not-repeatable",
            ("hicann/ops-nn: norm/batch_norm_elemt/docs/aclnnBatchNormElemt.md",),
            "The same input twice need not give the same output.",
            asked=(("FWD-6", "the same twice.*"),),
        ),
        Failure(
            "bfloat16-refused",
            (
                f"{_INFER}/batch_norm_stats.cc",
                "Ascend/pytorch: docs/zh/api/native_api/pytorch_2-13-0/torch-nn.md",
            ),
            "bfloat16 input is refused in training.",
            asked=(("NUM-2", "bfloat16, .*"),),
        ),
        Failure(
            "half-sums-overflow",
            (f"{_INFER}/batch_norm_reduce_grad.cc, type of the sums",),
            "The sums of the backward have the type of the input and overflow in float16.",
            asked=(("NUM-2", "sums of dy beyond 65504.*"),),
        ),
        Failure(
            "documented-errors-missing",
            (f"{_MINT}/normalization.py, arguments",),
            "The page lists errors for wrong arguments that nothing raises.",
            asked=(
                ("ERR-1", "num_features=[^i]*"),
                ("ERR-2", ".*"),
                ("ERR-3", ".*"),
                ("ERR-4", r"momentum=(1\.5|-0\.1|nan)"),
                ("ERR-5", ".*"),
            ),
        ),
        Failure(
            "nan-beside-an-empty-rank",
            (
                f"{_MINT}/_functions.py, empty input",
                "hicann/ops-math: math/reduce_std_with_mean/docs/aclnnBatchNormStats.md",
            ),
            "One rank without data sends NaN for its deviation, and every rank gets NaN.",
            asked=(("FWD-4", "(rank 0|the last rank|all but rank 1).*dimensions"),),
        ),
        Failure(
            "few-dimensions-in-eval",
            (f"{_MINT}/normalization.py, dimensions in eval",),
            "Input of 5 dimensions trains, but raises in eval.",
            asked=(("EVAL-1", "(5|6) dimensions"),),
        ),
        Failure(
            "momentum-of-the-old-value",
            ("mindspore-ai/mindspore_test: mindspore/python/mindspore/nn/layer/normalization.py",),
            "The older layer's momentum weighs the old value where that of the operator weighs the "
            "new one; whoever mixes them up keeps a tenth for nine tenths.",
            asked=(("STAT-1", ".*"),),
        ),
        Failure(
            "starts-in-eval",
            (f"{_MINT}/normalization.py, mode of a new layer",),
            "A new layer is in eval mode and synchronizes nothing until set_train; the example of "
            "its page shows no synchronization at all.",
            "Every step of a case sets the mode. That ours starts as every nn.Cell does is shown "
            "by `tests/syncbn/test_mindspore_layer.py::TestConstruction::"
            "test_new_one_is_in_eval_mode`.",
        ),
    ),
}


class RegistryError(ConformanceError, ValueError):
    """The registry and the cases do not fit; the text has a line for each problem."""


def answers(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """The cases that ask about each failure, by its id."""
    return {failure.id: [case for case in cases if failure.by(case)] for failure in _all()}


def problems(cases: Sequence[Case]) -> list[str]:
    """What is wrong with the registry beside these cases, a line each."""
    return [*_of_registry(), *_beside(cases)]


def write(path: Path, cases: Sequence[Case]) -> None:
    """Write `document` to a file.

    Raises:
        RegistryError: there are `problems`.
    """
    path.write_text(document(cases), encoding="utf-8")


def document(cases: Sequence[Case]) -> str:
    """The failures and what asks about them, as Markdown; the cases are all of one rank count.

    Raises:
        RegistryError: there are `problems`.
    """
    if found := problems(cases):
        raise RegistryError("\n".join(found))
    asked = answers(cases)
    lines = [_introduction(cases)]
    for section, failures in FAILURES.items():
        lines += [f"## {section}", "", "| failure | sources | asked by |", "|---|---|---|"]
        lines += [_row(failure, asked[failure.id]) for failure in failures]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _all() -> list[Failure]:
    return [failure for failures in FAILURES.values() for failure in failures]


def _of_registry() -> Iterator[str]:
    owner: dict[str, str] = {}
    for failure, times in Counter(failure.id for failure in _all()).items():
        if times > 1:
            yield f"{failure}: there are {times} failures of this name"
    for failure_ in _all():
        if not failure_.sources:
            yield f"{failure_.id}: it has no source"
        for source in failure_.sources:
            if not SOURCE.fullmatch(source):
                yield f"{failure_.id}: a source is not written like {source!r}"
            if source in owner:
                yield f"{failure_.id}: {source!r} is a source of {owner[source]} already"
            owner[source] = failure_.id


def _beside(cases: Sequence[Case]) -> Iterator[str]:
    for failure in _all():
        if bool(failure.asked) == (failure.not_asked is not None):
            yield f"{failure.id}: it must name cases that ask about it, or say why there are none"
        for clause, title in failure.asked:
            if not any(replace(failure, asked=((clause, title),)).by(case) for case in cases):
                yield f"{failure.id}: no case of {clause} has a title like {title!r}"


def _introduction(cases: Sequence[Case]) -> str:
    ranks = cases[0].ranks
    asked = [failure for failure in _all() if failure.not_asked is None]
    return f"""\
# How SyncBatchNorm went wrong elsewhere, and what asks about it

{len(_all())} ways in which this layer failed in public, from issues, pull requests and commits of
other projects, and from reading their source ("OWNER/REPOSITORY: PATH, which part of it"; these
were not always run). {len(asked)} of them can be asked of a layer, and a case of the suite would
have caught each. The others say why not, and name what shows something of them instead.

A row names clauses of the [contract](contract.md) and the ids of cases on {ranks} ranks.
`syncbn-conformance replay ID --target TARGET --ranks {ranks}` asks a layer one of them;
[conformance.md](conformance.md) tells how it is judged.

Made from `audit/failures.py`, not written by hand:

    python -m audit failures --out docs/failure-modes.md
"""


def _row(failure: Failure, cases: Sequence[Case]) -> str:
    links = ", ".join(_link(source) for source in failure.sources)
    asked_by = _named(cases) if cases else f"nothing. {failure.not_asked}"
    return f"| **{failure.id}**: {failure.went_wrong} | {links} | {asked_by} |"


def _named(cases: Sequence[Case]) -> str:
    clauses = ", ".join(dict.fromkeys(case.clause for case in cases))
    shown = cases if len(cases) <= _NAMED + 1 else cases[:_NAMED]
    ids = ", ".join(f"`{case.id}`" for case in shown)
    more = f" and {len(cases) - len(shown)} more" if len(shown) < len(cases) else ""
    return f"{clauses}: {ids}{more}"


def _link(source: str) -> str:
    match = SOURCE.fullmatch(source)
    assert match
    base = f"https://github.com/{match['repository']}"
    if match["number"]:
        return (
            f"[{source}]({base}/issues/{match['number']})"  # where a pull request is found as well
        )
    if match["commit"]:
        return f"[{source}]({base}/commit/{match['commit']})"
    return f"[{source}]({base}/blob/HEAD/{match['path']})"
