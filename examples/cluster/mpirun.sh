#!/bin/bash
# Judge a layer on the nodes of an Open MPI host file: a line "HOST slots=N" for each node.
#
#     examples/cluster/mpirun.sh examples/cluster/hostfile --target torch:my_module:MySyncBatchNorm
#
# Run it on the first node. All nodes must have the same number of slots.
set -euo pipefail
hosts=$(sed -n 's/^\([^# ]\{1,\}\) .*slots=.*/\1/p' "$1" | paste -sd,)
slots=$(sed -n 's/^[^#].*slots=\([0-9]*\).*/\1/p' "$1" | sort -u)
shift
exec python3 -m syncbn.conformance run --launcher mpirun --nodes "$(tr , '\n' <<<"$hosts" | wc -l)" \
  --ranks-per-node "$slots" --hosts "$hosts" --listen "${hosts%%,*}:7000" "$@"
