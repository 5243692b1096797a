# A broker and pilot from the packages, our container images in the registry, and an
# image of podman's.
apt-get -qq install ./{copilot,pilot}_*_$(dpkg --print-architecture).deb >/dev/null
copilot init --host copilot.example.com --trust-domain example.com
systemctl enable --now copilot
copilot keys create team-a
for name in pilot copilot; do
	skopeo copy -q --all oci:images/$name docker://registry.example.com/$name:v1
done
image=$(buildah pull -q oci:app)
buildah tag "$image" app
# As for ctr in all.sh: no limit on processes without its controller.
if ! grep -qw pids /sys/fs/cgroup/cgroup.controllers; then
	printf '[containers]\npids_limit = 0\n' >/etc/containers/containers.conf
fi
