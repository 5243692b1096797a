#!/usr/bin/env bash
# chart.sh DIR: packages the Helm chart into DIR, as pilot-chart-VERSION.tgz. VERSION is as
# scripts/version.sh prints it, and the default tag of the images. The same sources give the
# same bytes.
set -euo pipefail
dir=${1:?usage: chart.sh DIR}
umask 022
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
cd "$(dirname "$0")/.."
version=${VERSION:-$(scripts/version.sh)}
chart=${version#v}
[[ $chart =~ ^[0-9]+\.[0-9]+\.[0-9]+ ]] || chart=0.0.0-$chart
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
cp -rL packaging/kubernetes/chart "$stage/pilot"
cp LICENSE "$stage/pilot/"
sed -i "/^# scripts\/chart.sh/d; s/^version: .*/version: $chart/; s/^appVersion: .*/appVersion: $version/" "$stage/pilot/Chart.yaml"
export LC_ALL=C TZ=UTC
tar -C "$stage" --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner -c pilot | gzip -9n >"$dir/pilot-chart-${version#v}.tgz"
echo "$dir/pilot-chart-${version#v}.tgz"
