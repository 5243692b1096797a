package install

import (
	"errors"
	"strings"
	"testing"

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
