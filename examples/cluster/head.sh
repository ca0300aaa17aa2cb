#!/usr/bin/env bash
# The first machine of a cluster without Kubernetes. It stays in the foreground: let a process manager run it.
#   examples/cluster/head.sh [PORT] [further options of ray start]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/node_env.sh"
port="${1:-6379}"
exec ray start --head --port="$port" --dashboard-host=127.0.0.1 --metrics-export-port=8080 --block "${@:2}"
