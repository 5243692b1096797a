#!/usr/bin/env bash
# notices.sh PROGRAM...: prints the licences and notices of the Go modules, and
# of Go itself, that are in the programs, as those licences want it.
set -euo pipefail
cd "$(dirname "$0")/.."

declare -A users=() files=()
order=()
# add NAME FILE
add() {
	local sum
	sum=$(sha256sum <"$2")
	[ -n "${files[$sum]:-}" ] || order+=("$sum")
	files[$sum]=$2
	users[$sum]+="$1 (${2##*/})"$'\n'
}

add "The Go programming language, $(go env GOVERSION)" "$(go env GOROOT)/LICENSE"
mapfile -t modules < <(go version -m "$@" | awk '$1 == "dep" {print $2}' | LC_ALL=C sort -u)
while read -r name dir; do
	found=
	for file in "$dir"/*; do
		shopt -s nocasematch
		if [[ -f $file && ${file##*/} =~ ^(licen[cs]e|copying|notice|patents|unlicense) && $file != *.go ]]; then
			add "$name" "$file"
			found=1
		fi
		shopt -u nocasematch
	done
	if [ -z "$found" ]; then
		echo "$name: no licence found in ${dir:-the module cache}" >&2
		exit 1
	fi
done < <(go list -m -f '{{.Path}}@{{.Version}} {{.Dir}}' "${modules[@]}")

for sum in "${order[@]}"; do
	printf '%s\n' ------------------------------------------------------------------------
	printf '%s\n' "${users[$sum]}"
	cat "${files[$sum]}"
	echo
done
