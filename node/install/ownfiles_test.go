package install

import (
	"errors"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// TestPilotConfigIsKeptWithTheSameBrokers checks that a pilot.toml is accepted if it has the same brokers,
// as a list or as one string.
func TestPilotConfigIsKeptWithTheSameBrokers(t *testing.T) {
	settings := map[string]string{"broker": "https://a.example.com,https://b.example.com"}
	for had, ok := range map[string]bool{
		`broker = "https://a.example.com,https://b.example.com"`:      true,
		`broker = ["https://a.example.com", "https://b.example.com"]`: true,
		string(newPilotConfig(settings, true)):                        true,
		`broker = ["https://b.example.com", "https://a.example.com"]`: false,
		`broker = "https://a.example.com"`:                            false,
		``:                                                            false,
	} {
		err := checkPilotConfig([]byte(had), settings, true)
		if (err == nil) != ok || !ok && !errors.As(err, new(*host.Conflict)) {
			t.Errorf("%s: %v", had, err)
		}
	}
}

// TestPilotFindsRootsCredentials reads the unit: systemd sets no HOME where a unit has no User.
func TestPilotFindsRootsCredentials(t *testing.T) {
	unit, err := unitFiles.ReadFile("units/" + PilotService)
	if err != nil || !strings.Contains(string(unit), "\nEnvironment=HOME=/root\n") || strings.Contains(string(unit), "\nUser=") {
		t.Errorf("%v in\n%s", err, unit)
	}
}

// TestPilotConfigForgetsAContainerdThatIsGone has a node whose containerd listened elsewhere.
func TestPilotConfigForgetsAContainerdThatIsGone(t *testing.T) {
	const k3s = "/run/k3s/containerd/containerd.sock"
	installed := record{Files: []installed{{Path: pilotConfig}}}
	for name, test := range map[string]struct {
		before    record
		had, now  string
		want, err string
	}{
		"gone":       {before: installed, had: k3s},
		"another":    {before: installed, had: k3s, now: "/run/other.sock", want: "/run/other.sock"},
		"as it is":   {before: installed, had: k3s, now: k3s, want: k3s},
		"the same":   {before: installed, had: "/var/run/containerd/containerd.sock", want: "/var/run/containerd/containerd.sock"},
		"an owner's": {had: k3s, err: "containerd is set, and containerd listens at " + containerd.DefaultAddress},
	} {
		o := Options{Host: host.Host{Root: t.TempDir()}}
		text := newPilotConfig(map[string]string{"containerd": test.had}, true)
		write(t, o, pilotConfig, string(text), 0o644)
		if f := test.before.file(pilotConfig); f != nil {
			f.SHA256 = hash(text)
		}
		p := &Plan{options: o}
		c := &containerd.Instance{Target: containerd.Target{Address: test.now}, Major: 2}
		err := p.pilotConfig(c, test.before, "")
		if (err != nil) != (test.err != "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(p.Changes) > 0 {
			text = p.Changes[0].New
		}
		want := newPilotConfig(map[string]string{"containerd": test.want}, true)
		if err == nil && string(text) != string(want) {
			t.Errorf("%s: %s", name, text)
		}
	}
}

func TestOcicryptConfIsKeptOnlyWithPilot(t *testing.T) {
	for text, good := range map[string]bool{
		`{"key-providers": {"pilot": {"grpc": "unix:///run/pilot/keyprovider.sock"}}}`: true,
		`{"key-providers": {"other": {"cmd": {"path": "/x", "args": ["pilot"]}}}}`:     false,
		`{"pilot": {}}`:                   false,
		`"pilot"`:                         false,
		`{"key-providers": {"pilot": {}}`: false,
	} {
		if err := checkKeyProviders([]byte(text)); (err == nil) != good {
			t.Errorf("%s: %v", text, err)
		}
	}
}
