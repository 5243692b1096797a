#!/usr/bin/env bash
# fuzz.sh HOW_LONG: runs each fuzz target for that long, such as 60s or 1000x, one
# after the other. What fails is in the package's testdata/fuzz, and go test tries
# it from then on.
set -euo pipefail
cd "$(dirname "$0")/.."
long=${1:?usage: fuzz.sh HOW_LONG}
targets=0
# fuzz PACKAGE TARGET: runs a target. Go up to 1.26 may take the end of the time
# for a failure (https://go.dev/issue/75804), so that is tried again.
fuzz() {
	local try
	for try in 1 2 3; do
		log=$(go test -buildvcs=false -run '^$' -fuzz "^$2\$" -fuzztime "$long" "$1" 2>&1 </dev/null) && return
		grep -q 'context deadline exceeded' <<<"$log" && ! grep -q 'Failing input' <<<"$log" || break
	done
	echo "$1 $2, try $try"
	echo "$log"
	return 1
}
# The sources say which there are: go test -list would build a program of each package.
files=$(go list -buildvcs=false -f '{{range .TestGoFiles}}{{$.ImportPath}} {{$.Dir}}/{{.}}
{{end}}{{range .XTestGoFiles}}{{$.ImportPath}} {{$.Dir}}/{{.}}
{{end}}' $(go list -buildvcs=false ./... | grep -v /integration))
while read -r package file; do
	for target in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file"); do
		targets=$((targets + 1))
		fuzz "$package" "$target"
		echo "$package $target: $(grep -o 'execs: [0-9]*' <<<"$log" | tail -n 1), $(grep -o 'total: [0-9]*' <<<"$log" | tail -n 1) interesting"
	done
done <<<"$files"
[ "$targets" -gt 0 ] || { echo "there are no fuzz targets" >&2; exit 1; }
echo "$targets fuzz targets, none failed"
