#!/usr/bin/env bash
# Every other machine of that cluster.
#   examples/cluster/worker.sh HEAD:6379 [further options of ray start]
# Replicas ask for resources by name (replicas.resources): --resources='{"gpu-large": 8}' on a machine with 8 of them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/node_env.sh"
head="${1:?the address of the head is missing, such as 10.0.0.1:6379}"
exec ray start --address="$head" --metrics-export-port=8080 --block "${@:2}"
