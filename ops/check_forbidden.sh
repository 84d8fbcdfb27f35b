#!/usr/bin/env bash
# No pickle, no code from data: these calls may not appear in any serving package.
set -euo pipefail
cd "$(dirname "$0")/.."
if git grep -nE -e '(^|[^_.a-z])(eval|exec)[(]' -e '(pickle|marshal|dill)[.]loads?[(]' -e 'torch[.]load[(]' \
  -e 'yaml[.]load[(]' -e 'trust_remote_code=True' -- moesaic router expert_worker gateway cluster; then
  echo "forbidden calls (above)" >&2
  exit 1
fi
