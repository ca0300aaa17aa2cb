# Read by the scripts beside it: what the environment of every Ray process of the cluster must agree on.
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}"
# Serve's own cost of a streamed item is several times smaller over gRPC on one event loop.
export RAY_SERVE_USE_GRPC_BY_DEFAULT="${RAY_SERVE_USE_GRPC_BY_DEFAULT:-1}"
export RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD="${RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD:-0}"
export RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP="${RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP:-0}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PATH="$PWD/.venv/bin:$PATH"
