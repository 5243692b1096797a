package cluster

import (
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// TestCopilotInCluster runs copilot as its Deployment does: as an ordinary user, with the
// manifests' configuration and policy, the database's URL in a variable and the Secrets in
// files of root, with a CA to issue its own certificates, and requests a KEK as a node does.
func TestCopilotInCluster(t *testing.T) {
	t.Parallel()
	manifests := filepath.Join(harness.Repo, "packaging/kubernetes/copilot")
	c := harness.NewAPIServer(t)
	d := harness.StartPostgres(t)
	if err := os.Chmod(d.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	m := harness.NewMachine(t, "/")
	m.AddProgram(filepath.Join(harness.Bin, "copilot"))
	m.Mount(d.Dir, d.Dir, "", syscall.MS_BIND, "")
	m.Mount("tmpfs", "var/lib/copilot", "tmpfs", 0, "mode=0777")
	certificates := harness.TempDir(t)
	harness.Output(t, harness.Command(t, "copilot", "certs", "server-ca", "--config-dir", certificates, "--host", "127.0.0.1"))
	master := make([]byte, 32)
	rand.Read(master)
	conf := harness.Read(t, manifests+"/copilot.toml")
	const issuer = "https://kubernetes.default.svc.cluster.local"
	if !strings.Contains(conf, issuer) {
		t.Fatalf("copilot.toml has not the issuer %s", issuer)
	}
	for name, content := range map[string]string{
		"/etc/copilot/copilot.toml":                        strings.ReplaceAll(conf, issuer, c.URL),
		"/etc/copilot/policy/policy.toml":                  harness.Read(t, manifests+"/policy.toml"),
		"/etc/copilot/tls/tls.crt":                         harness.Read(t, certificates+"/server-ca.pem"),
		"/etc/copilot/tls/tls.key":                         harness.Read(t, certificates+"/server-ca-key.pem"),
		"/run/credentials/copilot/copilot-master-key":      string(master),
		"/run/secrets/kubernetes.io/serviceaccount/token":  "api-token",
		"/run/secrets/kubernetes.io/serviceaccount/ca.crt": harness.Read(t, c.Dir+"/account/ca.crt"),
	} {
		// As fsGroup and defaultMode set them.
		name = m.Root + name
		name = harness.Write(t, name, content)
		if err := os.Chown(name, 0, 65532); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(name, 0o440); err != nil {
			t.Fatal(err)
		}
	}
	inPod := func(args ...string) *exec.Cmd {
		cmd := exec.Command("chroot", append([]string{"--userspec=65532:65532", "--groups=65532", m.Root, "/usr/local/bin/copilot"}, args...)...)
		cmd.Env = []string{"CREDENTIALS_DIRECTORY=/run/credentials/copilot", "COPILOT_DATABASE=" + d.URL()}
		return cmd
	}
	address, metrics := loopbacktest.FreeAddress(t), loopbacktest.FreeAddress(t)
	harness.Start(t, filepath.Dir(m.Root), "copilot", inPod("serve", "--listen", address, "--metrics-listen", metrics))
	for _, probe := range []string{"/healthz", "/readyz"} {
		harness.Await(t, probe, func() error {
			resp, err := http.Get("http://" + metrics + probe)
			if err != nil {
				return err
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusNoContent {
				return fmt.Errorf("%s", resp.Status)
			}
			return nil
		})
	}
	for _, where := range []string{"http://" + metrics, "https://" + address} {
		client := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
		if resp, err := client.Get(where + "/debug/pprof/"); err != nil || resp.StatusCode == http.StatusOK {
			t.Errorf("profiles at %s: %v, %v", where, resp, err)
		}
	}
	harness.Output(t, inPod("keys", "create", "team-a"))

	pool, err := certfile.Pool(certificates + "/server-ca.pem")
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
	defer client.CloseIdleConnections()
	for token, want := range map[string]int{
		"":         http.StatusUnauthorized,
		"nonsense": http.StatusUnauthorized,
		c.Token(t): http.StatusConflict, // which says that it may have the KEK used, but not have it
	} {
		r, err := http.NewRequest(http.MethodGet, "https://"+address+"/api/v2/keks/team-a/key", nil)
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("with the token %.10q: %s, want %d", token, resp.Status, want)
		}
	}
}
