#!/usr/bin/env bash
# Check a configuration and deploy it, on the head; again after each change. Requests go on meanwhile.
#   examples/cluster/deploy.sh my_config.yaml [further options of serve deploy]
set -euo pipefail
config="$(realpath "${1:?the configuration file is missing, such as serve_config.yaml}")"
source "$(dirname "${BASH_SOURCE[0]}")/node_env.sh"
python -m deployments.check --running "$config"
exec serve deploy "$config" "${@:2}"
