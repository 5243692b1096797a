#!/usr/bin/env bash
# repeat-tests.sh N [BUSY]: runs all of "make test" N times, the last half of them
# with BUSY busy loops (default: 2) for each core beside it, and prints how each run
# ended and how long it took. What the tests print goes to a log per run, in
# REPEAT_LOGS or a new directory. Exits with 1 if a run failed, after all of them.
set -euo pipefail
runs=${1:?usage: repeat-tests.sh N [BUSY]}
busy=${2-2}
for number in "$runs" "$busy"; do
	[[ $number =~ ^[0-9]+$ ]] || { echo "repeat-tests.sh: $number is not a number" >&2; exit 2; }
done
cd "$(dirname "$0")/.."
logs=${REPEAT_LOGS:-$(mktemp -d -t pilot-repeat-XXXXXX)}
mkdir -p "$logs"
# A result that Go has kept from the last run is none.
export GOFLAGS="${GOFLAGS:-} -count=1"

loops=() make=
# The tests are a process group of their own (set -m): an interrupt ends them, with what
# they started. They are in the loops' session, because Linux gives each session the same
# part of the processors, however many programs it has.
set -m
clean() {
	trap - EXIT
	[ -z "$make" ] || { kill -TERM -- "-$make" && wait "$make"; } 2>/dev/null || true
	for pid in "${loops[@]}"; do { kill "$pid" && wait "$pid"; } 2>/dev/null || true; done
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

failed=0
for ((run = 1; run <= runs; run++)); do
	beside=
	if ((run > runs - runs / 2 && busy > 0)); then
		if ((${#loops[@]} == 0)); then
			for ((i = 0; i < busy * $(nproc); i++)); do
				yes >/dev/null &
				loops+=($!)
			done
		fi
		beside=" beside ${#loops[@]} busy loops"
	fi
	began=$SECONDS verdict=passed
	make test >"$logs/$run.log" 2>&1 &
	make=$!
	wait "$make" || { verdict=FAILED failed=$((failed + 1)); }
	make=
	echo "run $run of $runs$beside: $verdict in $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
	[ "$verdict" = passed ] || grep -E '^ *--- FAIL|^FAIL|^panic:|\*\*\*' "$logs/$run.log" | sed 's/^/    /' || true
done
echo "$((runs - failed)) of $runs passed; logs are in $logs"
[ "$failed" = 0 ]
