#!/bin/bash
# Judge a layer on two nodes with torchrun. Run it on the first one:
#
#     examples/cluster/torchrun.sh hosta hostb --target torch:my_module:MySyncBatchNorm --device cuda
#
# It starts torchrun here and, by ssh, on the second one. Add --dry-run to see both commands.
set -euo pipefail
first=$1 second=$2
shift 2
exec python3 -m syncbn.conformance run --launcher torchrun --nodes 2 \
  --ranks-per-node "${RANKS_PER_NODE:-4}" --hosts "$first,$second" --listen "$first:7000" "$@"
