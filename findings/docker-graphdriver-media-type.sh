#!/usr/bin/env bash
# Docker's graph-driver store refuses layers of types that it does not know, but not
# those of an encrypted layer, "application/vnd.oci.image.layer.v1.tar+encrypted",
# though it has nothing to decrypt with. It downloads the layer and unpacks it as if
# it was not encrypted. The error is about the archive: "invalid tar header".
#
# Exits non-zero if that changes. Needs root, Go, Python 3, curl and the network,
# and takes some minutes to build dockerd the first time.
set -euo pipefail
moby=v2.0.0-beta.24

dir=$(mktemp -d)
pids=()
cleanup() {
	for p in "${pids[@]}"; do kill "$p" 2>/dev/null || true; wait "$p" 2>/dev/null || true; done
	rm -rf --one-file-system "$dir"
}
trap cleanup EXIT

cd "$dir"
mkdir build bin
(cd build && go mod init finding && go get -tool github.com/moby/moby/v2/cmd/dockerd@$moby && go build -o "$dir/bin/" tool) >build.log 2>&1 || { tail build.log; exit 2; }
echo "dockerd of github.com/moby/moby/v2 $moby"

# A registry with three images of one layer each.
cat >registry.py <<'PY'
import hashlib, http.server, io, json, os, sys, tarfile
blobs, manifests = {}, {}
def blob(b):
    d = "sha256:" + hashlib.sha256(b).hexdigest()
    blobs[d] = b
    return d
def image(name, media_type, layer, diff_id):
    config = json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": [diff_id]}}).encode()
    manifests[name] = json.dumps({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": blob(config), "size": len(config)},
        "layers": [{"mediaType": media_type, "digest": blob(layer), "size": len(layer)}]}).encode()
buf = io.BytesIO()
with tarfile.open(fileobj=buf, mode="w") as t:
    info = tarfile.TarInfo("file"); info.size = 2
    t.addfile(info, io.BytesIO(b"hi"))
archive = buf.getvalue()
diff_id = "sha256:" + hashlib.sha256(archive).hexdigest()
image("unknown", "application/vnd.example.unknown", archive, diff_id)
image("encrypted", "application/vnd.oci.image.layer.v1.tar+encrypted", os.urandom(4096), diff_id)
image("not-encrypted", "application/vnd.oci.image.layer.v1.tar+encrypted", archive, diff_id)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        parts = self.path.split("/")
        if self.path == "/v2/":
            body, kind = b"{}", "application/json"
        elif "manifests" in parts:
            body, kind = manifests[parts[2]], "application/vnd.oci.image.manifest.v1+json"
        else:
            body, kind = blobs[parts[-1]], "application/octet-stream"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Docker-Content-Digest", "sha256:" + hashlib.sha256(body).hexdigest())
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
    do_HEAD = do_GET
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
with open("port.new", "w") as f: f.write(str(server.server_port))
os.rename("port.new", "port")
server.serve_forever()
PY
python3 registry.py &
pids+=($!)
for _ in $(seq 600); do [ -e port ] && break; sleep 0.1; done
port=$(cat port)

echo '{"features": {"containerd-snapshotter": false}}' >daemon.json
# Without containerd in PATH, dockerd has its own.
unshare --mount env PATH=/usr/sbin:/sbin "$dir/bin/dockerd" --config-file "$dir/daemon.json" --data-root "$dir/data" --exec-root "$dir/exec" \
	--pidfile "$dir/pid" --host "unix://$dir/sock" --storage-driver vfs \
	--iptables=false --ip6tables=false --userland-proxy=false --bridge none >dockerd.log 2>&1 &
pids+=($!)
for _ in $(seq 600); do
	curl -sf --unix-socket sock http://d/_ping >/dev/null && break
	kill -0 "${pids[1]}" 2>/dev/null || { tail dockerd.log; exit 2; }
	sleep 0.1
done

status=0
# expect IMAGE TEXT: pulls, and looks for the text in what Docker's API says at the end.
expect() {
	local out
	out=$(curl -s --unix-socket sock -X POST "http://d/images/create?fromImage=127.0.0.1:$port/$1&tag=1" | tail -1)
	echo "$1: $out"
	case $out in *"$2"*) ;; *) echo "  that has changed: it was \"$2\""; status=1 ;; esac
}
expect unknown "unsupported media type"
expect encrypted "invalid tar header"
expect not-encrypted "Downloaded newer image"
exit $status
