#!/usr/bin/env bash
# Prints the version of the work tree: its tag, v1.2.3, or with the commits since
# then and the commit, v1.2.3-5-gabcdef. Before the first tag that is v0.0.0.
set -euo pipefail
cd "$(dirname "$0")/.."
git describe --tags --match 'v[0-9]*' --dirty 2>/dev/null ||
	echo "v0.0.0-$(git rev-list --count HEAD)-g$(git describe --always --dirty --exclude '*')"
