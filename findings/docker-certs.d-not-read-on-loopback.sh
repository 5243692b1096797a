#!/usr/bin/env bash
# Docker reads /etc/docker/certs.d/HOST:PORT for a registry on another address and not
# for one on a loopback address: 127.0.0.0/8 and ::1 are insecure registries, without
# anybody configuring that, and for those certs.d counts for nothing, not even for the
# client certificate. So a registry or mirror on the machine itself that asks its
# callers for certificates can't be used. Docker then tries plain HTTP, and what it
# reports is the answer to that: "Client sent an HTTP request to an HTTPS server".
# Names that resolve to such an address are no way out.
#
# Exits non-zero if that changes. Needs root for namespaces, Go, openssl, iproute2 and
# curl, and takes some minutes to build dockerd the first time.
set -euo pipefail
moby=v2.0.0-beta.24

dir=$(mktemp -d)
trap 'rm -rf --one-file-system "$dir"' EXIT
cd "$dir"
export GOFLAGS=-buildvcs=false
mkdir build bin server
(cd build && go mod init finding && go get -tool github.com/moby/moby/v2/cmd/dockerd@$moby && go build -o "$dir/bin/" tool) >build.log 2>&1 || { tail build.log; exit 2; }
cat >server/main.go <<'GO'
package main

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"os"
)

// An empty registry at each of the addresses, for callers with a certificate of the CA.
func main() {
	ca, err := os.ReadFile("ca.pem")
	if err != nil {
		panic(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path == "/v2/" {
			return
		}
		w.WriteHeader(http.StatusNotFound)
		w.Write([]byte(`{"errors":[{"code":"MANIFEST_UNKNOWN","message":"the registry is empty"}]}`))
	})
	failed := make(chan error)
	for _, address := range os.Args[1:] {
		s := &http.Server{Addr: address, Handler: handler, TLSConfig: &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}}
		go func() { failed <- s.ListenAndServeTLS("ca.pem", "key.pem") }()
	}
	panic(<-failed)
}
GO
(cd server && go mod init finding && go build -o ../bin/server .) >build.log 2>&1 || { tail build.log; exit 2; }
# One pair is everybody's.
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=registry \
	-addext subjectAltName=IP:127.0.0.1,IP:192.0.2.1,DNS:registry.test -keyout key.pem -out ca.pem 2>openssl.log || { cat openssl.log; exit 2; }

cat >run.sh <<'END'
set -euo pipefail
dir=$1
pids=()
cleanup() { for p in "${pids[@]}"; do kill "$p" 2>/dev/null || true; wait "$p" 2>/dev/null || true; done; }
trap cleanup EXIT
ip link set lo up
ip address add 192.0.2.1/32 dev lo
mkdir etc
mount -t tmpfs tmpfs etc
mkdir etc/upper etc/work
mount -t overlay -o lowerdir=/etc,upperdir=etc/upper,workdir=etc/work overlay /etc
echo '127.0.0.1 localhost registry.test' >/etc/hosts
for registry in 127.0.0.1:5443 192.0.2.1:5443 registry.test:5443; do
	mkdir -p "/etc/docker/certs.d/$registry"
	cp ca.pem "/etc/docker/certs.d/$registry/ca.crt"
	cp ca.pem "/etc/docker/certs.d/$registry/client.cert"
	cp key.pem "/etc/docker/certs.d/$registry/client.key"
done
bin/server 127.0.0.1:5443 192.0.2.1:5443 >server.log 2>&1 &
pids+=($!)
echo '{"features": {"containerd-snapshotter": false}}' >daemon.json
env PATH=/usr/sbin:/sbin bin/dockerd --config-file daemon.json --data-root "$dir/data" --exec-root "$dir/exec" --pidfile "$dir/pid" \
	--host "unix://$dir/sock" --storage-driver vfs --iptables=false --ip6tables=false --userland-proxy=false --bridge none >dockerd.log 2>&1 &
pids+=($!)
for _ in $(seq 600); do
	! curl -sf --unix-socket sock http://d/_ping >/dev/null || break
	kill -0 "${pids[1]}" 2>/dev/null || { tail dockerd.log; exit 2; }
	sleep 0.1
done
status=0
# expect REGISTRY TEXT: pulls, and looks for the text in the end of what Docker's API says.
expect() {
	local out
	out=$(curl -s --unix-socket sock -X POST "http://d/images/create?fromImage=$1/app&tag=1" | tail -1)
	echo "$1: $out"
	case $out in *"$2"*) ;; *) echo "  that has changed: it was \"$2\""; status=1 ;; esac
}
expect 192.0.2.1:5443 "the registry is empty"
expect 127.0.0.1:5443 "HTTP request to an HTTPS server"
expect registry.test:5443 "HTTP request to an HTTPS server"
exit $status
END
echo "dockerd of github.com/moby/moby/v2 $moby; each registry has ca.crt, client.cert and client.key in certs.d"
unshare --mount --net bash run.sh "$dir"
