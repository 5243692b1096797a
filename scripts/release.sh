#!/usr/bin/env bash
# release.sh DIR: builds what a release consists of into DIR, which it empties.
# HEAD has to have the release's tag, vX.Y.Z, and CHANGELOG.md a section for it,
# "## X.Y.Z". With GPG_KEY set, SHA256SUMS is signed with that key.
set -euo pipefail
dir=$(realpath -m "${1:?usage: release.sh DIR}")
cd "$(dirname "$0")/.."
refuse() {
	echo "no release: $*" >&2
	exit 1
}

[ -z "$(git status --porcelain)" ] || refuse "the work tree has changes: commit them"
tag=$(git describe --tags --exact-match --match 'v[0-9]*' 2>/dev/null) || refuse "HEAD has no tag: git tag -a vX.Y.Z"
[[ $tag =~ ^v[0-9]+\.[0-9]+\.[0-9]+(-[0-9a-z.]+)?$ ]] || refuse "the tag $tag is not vX.Y.Z"
# A section's title may have a date after the version.
notes=$(awk -v version="${tag#v}" '/^## / {on = $2 == version; next} on' CHANGELOG.md)
[ -n "${notes//[[:space:]]/}" ] || refuse "CHANGELOG.md has no section \"## ${tag#v}\""

[ ! -e "$dir" ] || [ -e "$dir/SHA256SUMS" ] || refuse "$dir is there and was not made by this: remove it"
rm -rf "$dir"
VERSION=$tag ARCHS="amd64 arm64" FORMATS="deb rpm tar" scripts/packages.sh "$dir"
VERSION=$tag scripts/clients.sh "$dir"
VERSION=$tag scripts/chart.sh "$dir"
make -s images DIST="$dir"
for image in pilot copilot; do
	tar -C "$dir/images/$image" --sort=name --mtime="@$(git log -1 --format=%ct)" --owner=0 --group=0 --numeric-owner -cf "$dir/$image-image-${tag#v}.oci.tar" .
done
git archive --prefix="pilot-deploy-${tag#v}/" HEAD packaging/kubernetes packaging/node-image docs | gzip -n >"$dir/pilot-deploy-${tag#v}.tar.gz"
rm -r "$dir/images" "$dir/programs" "$dir/ociimage"
cd "$dir"
printf '# pilot %s\n%s\n' "${tag#v}" "$notes" >release-notes.md
rm SHA256SUMS
sums=$(sha256sum -- *)
echo "$sums" >SHA256SUMS
if [ -n "${GPG_KEY:-}" ]; then
	gpg --batch --yes --armor --local-user "$GPG_KEY" --detach-sign SHA256SUMS
fi
echo "$tag is in $dir"
