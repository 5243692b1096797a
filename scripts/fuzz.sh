#!/usr/bin/env bash
# fuzz.sh TIME: runs each fuzz target for that long, such as 60s, one after the
# other. What fails is in the package's testdata/fuzz, and go test tries it from
# then on.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:?usage: fuzz.sh TIME}
targets=0
for package in $(go list -buildvcs=false ./... | grep -v /integration); do
	for target in $(go test -buildvcs=false -list '^Fuzz' "$package" | grep '^Fuzz' || true); do
		targets=$((targets + 1))
		log=$(go test -buildvcs=false -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$package" 2>&1) || { echo "$package $target"; echo "$log"; exit 1; }
		echo "$package $target: $(grep -o 'execs: [0-9]*' <<<"$log" | tail -n 1), $(grep -o 'total: [0-9]*' <<<"$log" | tail -n 1) interesting"
	done
done
echo "$targets fuzz targets, none failed"
