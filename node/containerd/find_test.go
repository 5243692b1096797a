package containerd

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/node/host"
)

func TestFlagsTellDaemonsFromCommands(t *testing.T) {
	for line, want := range map[string]struct {
		flags
		daemon bool
	}{
		"":                       {daemon: true},
		"--config /etc/x.toml":   {flags{config: "/etc/x.toml"}, true},
		"-c /x -a /y.sock":       {flags{"/x", "/y.sock"}, true},
		"-c=/x --address=/y":     {flags{"/x", "/y"}, true},
		"--log-level debug -c /": {flags{config: "/"}, true},
		"config dump":            {},
		"-c /x config dump":      {flags: flags{config: "/x"}},
		"--root /r publish":      {},
		"-c":                     {daemon: true},
		"--version":              {},
		"-c /x -v":               {flags: flags{config: "/x"}},
	} {
		f, daemon := parseFlags(strings.Fields(line))
		if f != want.flags || daemon != want.daemon {
			t.Errorf("%q: %+v, %v", line, f, daemon)
		}
	}
}

func TestRunningContainerdIsChosen(t *testing.T) {
	own := &host.Process{PID: 10, Program: "/usr/bin/containerd", Unit: "containerd.service"}
	elsewhere := &host.Process{PID: 11, Program: "/usr/bin/containerd", Args: []string{"--config", "/opt/c.toml"}}
	ofK3s := &host.Process{PID: 12, Program: "/data/bin/containerd", Args: []string{"-c", "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"}, Unit: "k3s.service", Parent: "k3s-agent"}
	ofDocker := &host.Process{PID: 13, Program: "/usr/bin/containerd", Args: []string{"--config", "/var/run/docker/containerd/containerd.toml"}, Unit: "docker.service", Parent: "dockerd"}
	for name, test := range map[string]struct {
		named   Named
		found   []*host.Process
		want    *host.Process
		refuses bool
	}{
		"none":                 {found: nil},
		"one":                  {found: []*host.Process{elsewhere}, want: elsewhere},
		"two":                  {found: []*host.Process{own, elsewhere}, refuses: true},
		"two, one named":       {named: Named{Config: "/opt/c.toml"}, found: []*host.Process{own, elsewhere}, want: elsewhere},
		"the default named":    {named: Named{Config: DefaultConfig}, found: []*host.Process{own, elsewhere}, want: own},
		"another named":        {named: Named{Config: "/x.toml"}, found: []*host.Process{own}, refuses: true},
		"k3s beside another":   {found: []*host.Process{own, ofK3s}, want: ofK3s},
		"Docker's":             {found: []*host.Process{own, ofDocker}, refuses: true},
		"k3s and Docker's":     {found: []*host.Process{own, ofDocker, ofK3s}, want: ofK3s},
		"nobody listens":       {named: Named{Address: filepath.Join(t.TempDir(), "s")}, found: []*host.Process{own}},
		"another program":      {named: Named{Binary: "/bin/true"}, found: []*host.Process{own}, refuses: true},
		"a name is no program": {named: Named{Binary: "containerd"}, found: []*host.Process{own}, want: own},
	} {
		got, err := (search{Named: test.named}).choose(test.found)
		var conflict *host.Conflict
		if got != test.want || errors.As(err, &conflict) != test.refuses {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

// TestProgramLastsOverUpgrades has programs as k3s and RKE2 unpack them.
func TestProgramLastsOverUpgrades(t *testing.T) {
	for name, links := range map[string]map[string]string{
		"data/current/bin/containerd": {"data/current": "v1"},
		"bin/containerd":              {"bin": "data/v1/bin"},
		"data/v1/bin/containerd":      nil,
	} {
		dir := t.TempDir()
		program := filepath.Join(dir, "data/v1/bin/containerd")
		if err := os.MkdirAll(filepath.Dir(program), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(program, nil, 0o755); err != nil {
			t.Fatal(err)
		}
		for link, to := range links {
			if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
				t.Fatal(err)
			}
		}
		if got := lasting(program); got != filepath.Join(dir, name) {
			t.Errorf("%s, want %s", got, name)
		}
	}
}

func TestDistributionIsFoundAgainByItsService(t *testing.T) {
	h := host.Host{Root: t.TempDir()}
	program := filepath.Join(h.Root, "containerd")
	if err := os.WriteFile(program, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	for service, want := range map[string]string{"k3s.service": k3s, "k3s-agent.service": k3s, "rke2-server.service": rke2, Service: ""} {
		got, err := FindAgain(h, Target{Program: "/containerd", Config: "/mnt/disk/agent/etc/containerd/config.toml", Service: service})
		if err != nil || got.Name != want || got.Template != (want != "") {
			t.Errorf("%s: %+v, %v", service, got, err)
		}
	}
}

func TestDistributionIsRecognizedByPathAndParent(t *testing.T) {
	for _, test := range []struct{ config, parent, name string }{
		{DefaultConfig, "systemd", ""},
		{"/var/lib/rancher/k3s/agent/etc/containerd/config.toml", "k3s-server", k3s},
		{"/data/agent/etc/containerd/config.toml", "k3s-agent", k3s},
		{"/var/lib/rancher/rke2/agent/etc/containerd/config.toml", "rke2", rke2},
		{"/etc/k0s/containerd.toml", "k0s", k0s},
		{"/var/run/docker/containerd/containerd.toml", "dockerd", "Docker"},
		{"/var/snap/microk8s/1/args/containerd.toml", "systemd", "MicroK8s"},
	} {
		if d := DistributionAt(host.Host{}, test.config, test.parent); d.Name != test.name {
			t.Errorf("%s of %s: %+v", test.config, test.parent, d)
		}
	}
}

func TestSystemsWithoutASettableContainerdAreRefused(t *testing.T) {
	for id, refused := range map[string]string{"bottlerocket": "Bottlerocket generates", "talos": "Talos has neither", "debian": "", "flatcar": ""} {
		h := host.Host{Root: t.TempDir()}
		if err := os.MkdirAll(filepath.Join(h.Root, "etc"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(h.Root, "etc/os-release"), []byte("ID="+id+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		err := CheckSystem(h)
		if (err != nil) != (refused != "") || err != nil && !strings.Contains(err.Error(), refused) {
			t.Errorf("%s: %v", id, err)
		}
	}
}
