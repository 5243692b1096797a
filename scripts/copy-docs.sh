#!/usr/bin/env bash
# copy-docs.sh TO: copies README.md and docs into a directory, with links to what is not
# in packages and archives made such to the sources.
set -euo pipefail
to=${1:?usage: copy-docs.sh TO}
sources=https://github.com/ctrlplane/pilot/blob/main
cp -r "$(dirname "$0")"/../{docs,README.md} "$to/"
sed -Ei "s,\\]\\(([^)#:]+)([)#]),]($sources/\\1\\2,g; s,\\]\\($sources/docs/,](docs/,g" "$to/README.md"
sed -Ei "s,\\]\\(\\.\\./,]($sources/,g; s,\\]\\($sources/README\\.md,](../README.md,g" "$to"/docs/*.md
