//go:build packages

package docs

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
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
	dir := harness.TempDir(t)
	harness.BuildPackages(t, harness.Repo, dir+"/debs", harness.PackageVersion, harness.Arch, "deb")
	harness.Output(t, harness.Patiently(t, "make", "-C", harness.Repo, "images", "ARCHS="+harness.Arch, "DIST="+dir+"/dist"))
	harness.Output(t, harness.Patiently(t, "mmdebstrap", "--quiet", "--variant=apt", "--aptopt=Acquire::Retries \"3\"",
		"--include=systemd,systemd-sysv,dbus,containerd,runc,crun,skopeo,buildah,podman,ca-certificates,openssl,curl,jq,postgresql,docker-registry,softhsm2,opensc,logrotate",
		"trixie", dir+"/root", "http://deb.debian.org/debian"))
	for name, p := range pages(t) {
		if runsInTests[name] {
			t.Run(filepath.Base(name), func(t *testing.T) {
				t.Parallel()
				runPage(t, p, dir)
			})
		}
	}
}

// runPage runs the commands of a page on a new machine, which has what was built in
// dir.
func runPage(t *testing.T, p *harness.Page, dir string) {
	secret := harness.NewSecret()
	b := harness.Boot(t, dir+"/root", []string{"--private-network"}, func(m *harness.Machine) { prepareForDocs(m, p, dir, secret) })
	harness.Write(t, b.Path("root/page"), p.Script())
	before := filepath.Join("../testdata/docs", strings.TrimSuffix(filepath.Base(p.Name), ".md")+".sh")
	harness.Write(t, b.Path("root/before"), harness.Read(t, "../testdata/docs/all.sh")+harness.Read(t, before))
	cmd := inside(b, "bash", "-c", `trap 'pidof pilot copilot | xargs -r kill || true' EXIT; cd /root; . ./before; . ./page`)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		lines := strings.Split(out.String(), "\n")
		t.Fatalf("%v\n%s\n%s", err, strings.Join(lines[max(0, len(lines)-40):], "\n"), harness.CombinedOutput(t, b.Run("journalctl", "--no-pager", "-n", "20", "-u", "pilot", "-u", "copilot", "-u", "containerd")))
	}
	for _, block := range p.Blocks {
		var shown []harness.Shown
		if block.Verb == "prints" {
			shown = []harness.Shown{{Line: block.Line, Output: block.Text}}
		} else if block.Runs() && block.Language == "console" {
			shown = block.Shown()
		}
		for _, s := range shown {
			if printed := harness.Read(t, b.Path("root/shown/"+strconv.Itoa(s.Line))); !matches(s, printed) {
				t.Errorf("%s:%d: the page shows\n%sand the command prints\n%s\n%s", p.Name, s.Line, s.Output, printed, &out)
			}
		}
	}
}

// inside returns a command on the machine and in its network.
func inside(b *harness.BootedMachine, name string, args ...string) *exec.Cmd {
	b.T.Helper()
	cmd := b.Run(name, args...)
	cmd.Args = slices.Insert(cmd.Args, 1, "--net")
	cmd.WaitDelay = harness.Timeout / 10
	return cmd
}

// prepareForDocs gives a machine the hosts of the pages, a registry, an image, and
// what was built in dir: our packages, and for podman our images.
func prepareForDocs(m *harness.Machine, p *harness.Page, dir, secret string) {
	t := m.T
	harness.Write(t, m.Root+"/etc/hosts", "127.0.0.1 localhost copilot.example.com registry.example.com\n")
	harness.Write(t, m.Root+"/etc/docker/registry/config.yml", `version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: /var/lib/docker-registry}, delete: {enabled: true}}
http: {addr: ':443', tls: {certificate: /etc/docker/registry/server.pem, key: /etc/docker/registry/server-key.pem}}
`)
	harness.Write(t, m.Root+"/etc/systemd/system/docker-registry.service.d/root.conf", "[Service]\nUser=root\n")
	harness.Write(t, m.Root+"/etc/containers/policy.json", `{"default": [{"type": "insecureAcceptAnything"}]}`)
	harness.Write(t, m.Root+"/etc/containers/storage.conf", "[storage]\ndriver = \"vfs\"\nrunroot = \"/run/containers\"\ngraphroot = \"/var/lib/containers\"\n")
	harness.Output(t, harness.Command(t, "sh", "-euc", `cd "$1/etc/docker/registry"
		chmod 0644 "$1/etc/hosts"
		openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj "/CN=docs" -keyout server-key.pem -out server.pem -addext subjectAltName=DNS:registry.example.com 2>&1
		cat server.pem >>"$1/etc/ssl/certs/ca-certificates.crt"`, "sh", m.Root))

	l := harness.NewLayout(t)
	image := l.Image(harness.LayerKinds[1], false, harness.Arch, secret)
	l.Tar(m.Root+"/root/app.tar", "app:1", image)
	l.Write(m.Root+"/root/app", "1", image)

	l = harness.NewLayout(t)
	layer, id := l.Layer(harness.LayerKinds[1], harness.LayerKinds[1].OCI, map[string][]byte{"file": []byte(secret)})
	absent := harness.Object{"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "digest": "sha256:" + strings.Repeat("9f", 32), "size": 1718332879, "urls": []string{"https://example.com/layer"}}
	windows := l.Manifest([]harness.Object{absent, layer}, []string{"sha256:" + strings.Repeat("9e", 32), id})
	windows["platform"] = harness.Object{"architecture": "amd64", "os": "windows"}
	l.Tar(m.Root+"/root/windows.tar", "app:windows", l.JSON("application/vnd.oci.image.index.v1+json", harness.Object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []harness.Object{windows}}))

	switch p.Name {
	case "docs/kms.md", "docs/keys.md":
		m.AddProgram(filepath.Join(harness.Tools, "bin/bao"))
	case "docs/podman.md":
		harness.Output(t, harness.Command(t, "cp", "-r", dir+"/dist/images", m.Root+"/root/images"))
	}
	for _, name := range []string{"pilot", "copilot"} {
		harness.Output(t, harness.Command(t, "cp", harness.PackageFile(t, dir+"/debs", name, "deb"), m.Root+"/root/"))
		// "make packages" makes those of the other architecture, too.
		for _, arch := range []string{"amd64", "arm64"} {
			if arch != harness.Arch {
				harness.Write(t, m.Root+"/root/"+name+"_1.0.0-1_"+arch+".deb", "")
			}
		}
	}
}

// matches reports whether a command printed what the page shows, in which … stands
// for anything, and amd64 for this machine's architecture.
func matches(s harness.Shown, printed string) bool {
	output := strings.ReplaceAll(s.Output, "linux/amd64", "linux/"+harness.Arch)
	pattern := strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSpace(output)), "…", ".*")
	return regexp.MustCompile(`(?s)^` + pattern + `$`).MatchString(strings.TrimSpace(printed))
}
