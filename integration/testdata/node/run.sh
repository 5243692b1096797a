#!/bin/sh
# What TestNodeImage does on the node: it examines it, then pulls and runs an
# image as the kubelet does. It prints each step's output and exit status.
cd "$(dirname "$0")" || exit
# shellcheck disable=SC1091
. ./settings
exec 2>&1
export CONTAINER_RUNTIME_ENDPOINT=unix:///run/containerd/containerd.sock

step() {
	name=$1
	shift
	echo "<$name>"
	"$@"
	echo "</$name $?>"
}

firstboot() {
	journalctl --boot --output=cat --unit=pilot-firstboot.service
	systemctl is-active pilot-firstboot.service
}

# The network may still have to come up.
doctor() {
	for _ in $(seq "$TRIES"); do
		pilot node doctor --kek team-a && return
		sleep 2
	done
	return 1
}

registry() {
	mkdir -p "/etc/containerd/certs.d/$REGISTRY"
	echo "[host.'http://10.0.2.2:${REGISTRY#*:}']" >"/etc/containerd/certs.d/$REGISTRY/hosts.toml"
	sandbox=$(containerd config dump | sed -n "s/.*sandbox_image = [\"']\(.*\)[\"'].*/\1/p")
	./crictl --timeout 60s pull "$REGISTRY/pause:1"
	ctr --namespace k8s.io images tag --force "$REGISTRY/pause:1" "$sandbox"
}

run() {
	# A container on a host with cgroup v1 has no controllers, and CRI sets limits.
	if ! grep -qw cpu /sys/fs/cgroup/cgroup.controllers; then
		ctr --namespace k8s.io run --rm --net-host --cpu-shares 0 "$IMAGE" app
		return
	fi
	id=$(./crictl --timeout 120s run --no-pull container.json pod.json) || return
	for _ in $(seq 30); do
		./crictl ps -a --id "$id" | grep -q Exited && break
		sleep 1
	done
	cat /run/pilot-test/app.log
}

step firstboot firstboot
step doctor doctor
step identity stat --format '%a %U' /etc/pilot/node-key.pem
step registry registry
step pull ./crictl --timeout 120s pull "$IMAGE"
step run run
step root df --output=size --block-size=1M /
step failed systemctl --failed --no-legend --plain
