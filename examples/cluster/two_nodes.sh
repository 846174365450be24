#!/bin/bash
# Judge a layer on two nodes with torchrun, or with msrun if LAUNCHER=msrun. Run it on the first one:
#
#     examples/cluster/two_nodes.sh hosta hostb --target torch:my_module:MySyncBatchNorm --device cuda
#
# It starts the launcher here and, by ssh, on the second one. --dry-run shows both commands.
set -euo pipefail
first=$1 second=$2
shift 2
exec python3 -m syncbn.conformance run --launcher "${LAUNCHER:-torchrun}" --nodes 2 \
  --ranks-per-node "${RANKS_PER_NODE:-4}" --hosts "$first,$second" --listen "$first:7000" "$@"
