//go:build packages

package integration

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestPackageDocs runs the commands of each page of the documentation, as they
// stand, on a machine of its own: a Debian 13 that systemd runs, with what a reader
// of the page has there.
func TestPackageDocs(t *testing.T) {
	for _, name := range []string{"mmdebstrap", "systemd-nspawn", "openssl"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("%s is missing: \"make test-packages\" installs it", name)
		}
	}
	dir := tempDir(t)
	debs, root := filepath.Join(dir, "debs"), filepath.Join(dir, "root")
	buildPackages(t, repo, debs, packageVersion, goarch, "deb")
	output(t, patiently(t, "mmdebstrap", "--quiet", "--variant=apt", "--aptopt=Acquire::Retries \"3\"",
		"--include=systemd,systemd-sysv,dbus,containerd,runc,crun,skopeo,buildah,podman,ca-certificates,openssl,curl,jq,postgresql,docker-registry,softhsm2,opensc,logrotate",
		"trixie", root, "http://deb.debian.org/debian"))
	for name, p := range pages(t) {
		if runsInTests[name] {
			t.Run(filepath.Base(name), func(t *testing.T) {
				t.Parallel()
				runPage(t, p, root, debs)
			})
		}
	}
}

// runPage runs the commands of a page on a new machine.
func runPage(t *testing.T, p *page, root, debs string) {
	secret := newSecret()
	b := boot(t, root, []string{"--private-network"}, func(m *machine) { prepareForDocs(m, p, debs, secret) })
	write(t, b.path("root/page"), p.script())
	before := filepath.Join("testdata/docs", strings.TrimSuffix(filepath.Base(p.name), ".md")+".sh")
	write(t, b.path("root/before"), read(t, "testdata/docs/all.sh")+read(t, before))
	cmd := b.inside("bash", "-c", `trap 'pidof pilot copilot | xargs -r kill || true' EXIT; cd /root; . ./before; . ./page`)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		lines := strings.Split(out.String(), "\n")
		t.Fatalf("%v\n%s\n%s", err, strings.Join(lines[max(0, len(lines)-40):], "\n"), said(t, b.run("journalctl", "--no-pager", "-n", "20", "-u", "pilot", "-u", "copilot", "-u", "containerd")))
	}
	for _, block := range p.blocks {
		if !block.runs() || block.language != "console" {
			continue
		}
		for _, s := range block.shown() {
			if printed := read(t, b.path("root/shown/"+strconv.Itoa(s.line))); !s.matches(printed) {
				t.Errorf("%s:%d: the page shows\n%sand the command prints\n%s\n%s", p.name, s.line, s.output, printed, &out)
			}
		}
	}
}

// inside returns a command on the machine and in its network.
func (b *booted) inside(name string, args ...string) *exec.Cmd {
	b.t.Helper()
	cmd := b.run(name, args...)
	cmd.Args = slices.Insert(cmd.Args, 1, "--net")
	cmd.WaitDelay = patience / 10
	return cmd
}

// prepareForDocs gives a machine the hosts of the pages, a registry, an image, and
// our programs, as packages or as "make install" installs them.
func prepareForDocs(m *machine, p *page, debs, secret string) {
	t := m.t
	write(t, m.root+"/etc/hosts", "127.0.0.1 localhost copilot.example.com registry.example.com\n")
	write(t, m.root+"/etc/docker/registry/config.yml", `version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: /var/lib/docker-registry}, delete: {enabled: true}}
http: {addr: ':443', tls: {certificate: /etc/docker/registry/server.pem, key: /etc/docker/registry/server-key.pem}}
`)
	write(t, m.root+"/etc/systemd/system/docker-registry.service.d/root.conf", "[Service]\nUser=root\n")
	write(t, m.root+"/etc/containers/policy.json", `{"default": [{"type": "insecureAcceptAnything"}]}`)
	write(t, m.root+"/etc/containers/storage.conf", "[storage]\ndriver = \"vfs\"\nrunroot = \"/run/containers\"\ngraphroot = \"/var/lib/containers\"\n")
	output(t, command(t, "sh", "-euc", `cd "$1/etc/docker/registry"
		chmod 0644 "$1/etc/hosts"
		openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj "/CN=docs" -keyout server-key.pem -out server.pem -addext subjectAltName=DNS:registry.example.com 2>&1
		cat server.pem >>"$1/etc/ssl/certs/ca-certificates.crt"`, "sh", m.root))

	l := newLayout(t)
	image := l.image(kinds[1], false, goarch, secret)
	l.tar(m.root+"/root/app.tar", "app:1", image)
	l.write(m.root+"/root/app", "1", image)

	l = newLayout(t)
	layer, id := l.layer(kinds[1], kinds[1].oci, map[string][]byte{"file": []byte(secret)})
	absent := object{"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "digest": "sha256:" + strings.Repeat("9f", 32), "size": 1718332879, "urls": []string{"https://example.com/layer"}}
	windows := l.manifest([]object{absent, layer}, []string{"sha256:" + strings.Repeat("9e", 32), id})
	windows["platform"] = object{"architecture": "amd64", "os": "windows"}
	l.tar(m.root+"/root/windows.tar", "app:windows", l.json("application/vnd.oci.image.index.v1+json", object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []object{windows}}))

	switch p.name {
	case "README.md": // from source
		for _, name := range []string{"pilot", "pilot-decoder", "ctr-pilot", "copilot"} {
			m.copy(filepath.Join(bin, name))
		}
	case "docs/kms.md":
		m.copy(filepath.Join(tools, "bin/bao"))
	default:
		for _, name := range []string{"pilot", "copilot"} {
			output(t, command(t, "cp", packageFile(t, debs, name, "deb"), m.root+"/root/"))
		}
	}
}
