package node

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// TestDoctorExaminesTheMirror examines a machine with a mirror, and with each mistake of its
// settings.
func TestDoctorExaminesTheMirror(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a")
	ca := certtest.NewAuthority(t)
	template := certtest.Named("mirror")
	template.NotAfter = time.Now().Add(90 * 24 * time.Hour)
	server := ca.Issue(t, template)
	mirror, certs, hosts := loopbacktest.FreeAddress(t), dir+"/certs.d", dir+"/upstream"
	settings := []string{"--mirror-listen", mirror, "--mirror-secret-file", dir + "/secret", "--mirror-hosts-dir", hosts,
		"--tls-cert", server.Cert, "--tls-key", server.Key, "--tls-client-ca", ca.File}
	pilot, _ := harness.StartPilot(t, dir, brokerURL, settings...)
	p := harness.NewDoctorNode(t, harness.StartNode(t, dir, harness.Containerd2(), "", fmt.Sprintf("[plugins.'io.containerd.cri.v1.images'.registry]\n  config_path = '%s'\n", certs)))
	args := append([]string{"--broker", brokerURL, "--kek", "team-a"}, settings...)
	step := func() (result, detail string) {
		t.Helper()
		r := p.Examine(t, args...)
		for _, s := range r.Steps {
			if s.Name == "mirror" {
				return s.Result, s.Detail
			}
		}
		t.Fatalf("no step mirror in\n%s", r.Output)
		return "", ""
	}
	expect := func(want, detail string) {
		t.Helper()
		if result, got := step(); result != want || !strings.Contains(got, detail) {
			t.Errorf("%s, %s: want %s, %s", result, got, want, detail)
		}
	}
	expect("ok", "no hosts.toml of containerd leads to it")

	good := fmt.Sprintf("server = 'https://%s'\n[host.'https://%s']\n  ca = '%s'\n", mirror, mirror, ca.File)
	file := harness.Write(t, filepath.Join(certs, "registry.test/hosts.toml"), good)
	expect("ok", "containerd goes there by "+file)
	_, port, err := net.SplitHostPort(mirror)
	if err != nil {
		t.Fatal(err)
	}
	harness.Write(t, file, strings.Replace(good, "server = 'https://"+mirror, "server = 'https://registry.test", 1))
	expect("failed", file+" names the mirror as a host and not as server")
	harness.Write(t, file, fmt.Sprintf("[host.'https://localhost:%s']\n", port))
	expect("failed", file+" names the mirror as a host and not as server")
	harness.Write(t, file, good+"nonsense")
	expect("failed", "containerd ignores a hosts.toml: "+file)
	harness.Write(t, file, good)

	loop := harness.Write(t, filepath.Join(hosts, "registry.test/hosts.toml"), good)
	expect("failed", loop+" leads the mirror to itself")
	harness.Write(t, loop, "server = 'https://registry.test'\n")
	expect("ok", "")

	if err := os.Chmod(dir+"/secret", 0o644); err != nil {
		t.Fatal(err)
	}
	expect("failed", "has mode 0644, so other users may have read the secret")
	if err := os.Chmod(dir+"/secret", 0o600); err != nil {
		t.Fatal(err)
	}

	for left, want := range map[time.Duration][2]string{
		9 * 24 * time.Hour: {"warning", server.Cert + " expires on "},
		-time.Minute:       {"failed", server.Cert + " has expired on "},
	} {
		template.NotAfter = time.Now().Add(left)
		ca.Reissue(t, server, template)
		expect(want[0], want[1])
	}
	template.NotAfter = time.Now().Add(90 * 24 * time.Hour)
	ca.Reissue(t, server, template)
	expect("ok", "")
	args = append(args, "--mirror-listen", "localhost:"+port)
	expect("failed", server.Cert+" is not for localhost")
	args = args[:len(args)-2]

	// Without the mirror, and with another program in its place.
	pilot.Stop(t)
	expect("failed", "the mirror does not answer at "+mirror)
	foreign := harness.Start(t, dir, "foreign", exec.Command("openssl", "s_server", "-accept", mirror, "-quiet", "-www", "-cert", server.Cert, "-key", server.Key))
	harness.Await(t, "another program", harness.Listening(mirror))
	expect("failed", "another program answers at "+mirror+" in the mirror's place")
	foreign.Kill()
}
