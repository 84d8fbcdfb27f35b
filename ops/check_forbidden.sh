#!/usr/bin/env bash
# No pickle, no code from data: these calls may not appear in any serving package. The one exception is the offline
# converter, which rebuilds tensors and nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
if git grep -nE -e '(^|[^_.a-z])(eval|exec)[(]' -e '(pickle|marshal|dill)[.]loads?[(]' -e 'torch[.]load[(]' \
  -e 'yaml[.]load[(]' -e 'trust_remote_code=True' -- moesaic router expert_worker gateway cluster \
  | grep -vE '^cluster/checkpoints/pickled_weights[.]py:[0-9]+:.*torch[.]load[(]file, weights_only=True, '; then
  echo "forbidden calls (above)" >&2
  exit 1
fi
