# What every page takes for granted: a registry, and containers that can run.
set -eE -o pipefail
trap 'echo "before the page: line $LINENO: status $?: $BASH_COMMAND" >&2' ERR
timeout 60 sh -c 'until curl -sf https://registry.example.com/v2/ >/dev/null; do sleep 0.1; done'
# Where the host has its processor controller in cgroup v1, a machine that systemd
# runs has none, and ctr's containers ask for their share of it.
if ! grep -qw cpu /sys/fs/cgroup/cgroup.controllers; then
	cat >/usr/local/sbin/runc <<'END'
#!/bin/sh
if [ -e config.json ]; then jq -c 'del(.linux.resources.cpu)' config.json >config && mv config config.json; fi
exec /usr/sbin/runc "$@"
END
	chmod +x /usr/local/sbin/runc
fi
