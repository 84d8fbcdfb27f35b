#!/usr/bin/env bash
# The long drill: every fault for as long as its promise asks for, and the tables of docs/reliability.md from it.
# Takes about four hours. SEED=7 ops/drill.sh; FAULTS="kill:2 freeze:2" ops/drill.sh for a part of it.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
folder=build/drill
# A fault, and its minutes: 100 kills, 30 stops, five slow minutes, four minutes without a head, 100 changes of experts,
# 1,000 cancels, two minutes of overload, a soak of 20.
faults="${FAULTS:-kill:15 freeze:12 slow:5 pair:5 nan:3 router:4 controller:5 head:5 swap:10 cancel:1 overload:2 all:20}"
mkdir -p "$folder"
files=()
broken=()
for each in $faults; do
  fault="${each%:*}"
  file="$folder/$fault.json"
  rm -f "$file"
  "$bin/moesaic" drill --fault "$fault" --minutes "${each#*:}" --seed "${SEED:-0}" --save "$file" || broken+=("$fault")
  [ -f "$file" ] && files+=("$file")
done
"$bin/python" -m cluster.drill.page docs/reliability.md "${files[@]}"
[ "${#broken[@]}" -eq 0 ] || { echo "broken: ${broken[*]}" >&2; exit 1; }
