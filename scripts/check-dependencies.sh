#!/usr/bin/env bash
# check-dependencies.sh SBOM: checks that docs/dependencies.md lists each direct
# dependency and no other, and that the licence of each module in SBOM, a CycloneDX
# document in JSON, is compatible with GPL-3.0.
set -euo pipefail
cd "$(dirname "$0")/.."
sbom=${1:?usage: check-dependencies.sh SBOM}
command -v jq >/dev/null || { echo "jq is missing: apt-get install jq" >&2; exit 1; }

direct=$(go list -m -f '{{if not (or .Indirect .Main)}}{{.Path}}{{end}}' all | sort)
documented=$(sed -n 's/^| \([a-z.]*\.[a-z]*\/[^|]*\) |.*/\1/p' docs/dependencies.md | tr ',' '\n' | tr -d ' ' | sort)
diff <(echo "$direct") <(echo "$documented") >&2 || { echo "docs/dependencies.md and go.mod have different direct dependencies: see above" >&2; exit 1; }

# Mistaken by the detector: the texts of golang.org/x are BSD-3-Clause, and
# go-digest's code is Apache-2.0, only its documentation is not.
bad=$(jq -r '
	.components[]
	| [.licenses[]?, .evidence.licenses[]?] as $found
	| ($found | map(.license.id // .license.name // .expression)) as $ids
	| select(.name | IN("github.com/opencontainers/go-digest") | not)
	| select(($ids | length) == 0 or ($ids - [
		"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSD-Source-Code", "ISC", "MIT", "MPL-2.0", "GPL-3.0", "LGPL-3.0", "Unlicense", "CC0-1.0"
	] | length) > 0)
	| "\(.name) \(.version): \($ids | join(", "))"' "$sbom")
if [ -n "$bad" ]; then
	echo "licences that don't go with GPL-3.0, or are not known:" >&2
	echo "$bad" >&2
	exit 1
fi
echo "dependencies: $(wc -l <<<"$direct") direct, $(jq '.components | length' "$sbom") in all, licences go with GPL-3.0"
