package rooms

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/ctrlplane/pilot/"

// rooms says which of our packages those below a path may import, besides their own
// and those below internal. A path that is listed later is more special.
var rooms = []struct {
	path      string
	mayImport []string
}{
	{"cmd", []string{"copilot", "image", "keyprovider", "mirror", "node", "plugin", "processor"}},
	{"ctr-pilot", []string{"image", "keyprovider", "processor"}},
	{"packaging", nil},
	{"integration", []string{"copilot", "image", "keyprovider", "node", "plugin", "processor"}},
	{"node", nil}, // which holds no code: who may import whom below it
	{"node/sandbox", nil},
	{"node/host", []string{"node/sandbox"}},
	{"node/containerd", []string{"node/host"}},
	{"node/crio", []string{"node/containerd", "node/host"}},
	{"node/docker", []string{"node/containerd", "node/host"}},
	{"node/install", []string{"node/containerd", "node/crio", "node/docker", "node/host"}},
	{"node/daemonset", []string{"node/containerd", "node/host", "node/install"}},
	// The doctor asks install for the record of what was installed.
	{"node/doctor", []string{"copilot/client", "image", "keyprovider", "node/containerd", "node/crio", "node/docker", "node/host", "node/install", "plugin", "processor"}},
	{"plugin", []string{"image", "processor"}},
	// It asks the broker which workloads may use a KEK.
	{"plugin/workloads", []string{"copilot/client", "plugin/imagekeys"}},
	{"mirror", []string{"image", "processor"}},
	{"image", []string{"processor"}},
	{"keyprovider", []string{"copilot/client", "processor"}},
	{"processor", nil},
	{"copilot", nil},
	{"copilot/client", nil},
	{"copilot/kms", nil},
	{"copilot/keystore", []string{"copilot/kms", "copilot/postgres"}},
	{"copilot/backup", []string{"copilot/keystore"}},
	{"copilot/server/caller", []string{"copilot/policy"}},
	{"copilot/server/authorization", []string{"copilot/keystore", "copilot/policy"}},
	{"copilot/server/ratelimit", []string{"copilot/policy", "copilot/server/caller"}},
	{"copilot/server/handshake", nil},
	{"copilot/server/auditing", []string{"copilot/audit", "copilot/policy", "copilot/server/caller"}},
	{"copilot/server/keyring", []string{"copilot/audit", "copilot/keystore", "copilot/kms", "copilot/server/auditing"}},
	{"internal", []string{"packaging/completions"}}, // which are shell scripts
}

// heavy are packages that a package must not depend on, so that programs that import it
// stay small and start fast.
var heavy = map[string][]string{
	"image":                    {"google.golang.org/grpc", "github.com/prometheus/", "go.opentelemetry.io/", "github.com/containerd/containerd/v2/client"},
	"processor":                {"google.golang.org/grpc", "github.com/prometheus/", "go.opentelemetry.io/", "net/http"},
	"processor/ocicryptclient": {"google.golang.org/grpc", "github.com/prometheus/", "go.opentelemetry.io/", "net/http"},
	"cmd/pilot-decoder":        {"google.golang.org/grpc", "github.com/prometheus/", "go.opentelemetry.io/", "net/http"},
	"plugin/builtin":           {"go.opentelemetry.io/otel/exporters/", "go.opentelemetry.io/otel/sdk"},
}

type listed struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func list(t *testing.T, args ...string) []listed {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.Command("go", append([]string{"list", "-buildvcs=false", "-json=ImportPath,Imports,Deps"}, args...)...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, stderr.Bytes())
	}
	var packages []listed
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			return packages
		}
		if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}

func below(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

func TestPackagesImportOnlyWhatTheirRoomMay(t *testing.T) {
	packages := list(t, module+"...")
	if len(packages) < len(rooms) {
		t.Fatalf("%d packages", len(packages))
	}
	for _, p := range packages {
		path := strings.TrimPrefix(p.ImportPath, module)
		i := -1
		for j, r := range rooms {
			if below(path, r.path) {
				i = j
			}
		}
		if i < 0 {
			t.Errorf("%s is in no room: put it into the table here, and into docs/architecture.md", path)
			continue
		}
		for _, imported := range p.Imports {
			other, ours := strings.CutPrefix(imported, module)
			may := slices.ContainsFunc(append(rooms[i].mayImport, rooms[i].path, "internal"), func(room string) bool { return below(other, room) })
			if ours && !may {
				t.Errorf("%s imports %s, which packages below %s may not", path, other, rooms[i].path)
			}
		}
	}
}

func TestLibrariesStayLight(t *testing.T) {
	for room, modules := range heavy {
		for _, p := range list(t, module+room) {
			for _, dep := range p.Deps {
				if i := slices.IndexFunc(modules, func(m string) bool { return dep == m || strings.HasPrefix(dep, m) }); i >= 0 {
					t.Errorf("%s depends on %s", room, dep)
				}
			}
		}
	}
}

// TestOnlyProgramsKnowTheirKMSs: a KMS imports copilot/kms and nothing else of the broker,
// and only programs import a KMS, which they hand to the broker as a value.
func TestOnlyProgramsKnowTheirKMSs(t *testing.T) {
	const interfaces = "copilot/kms"
	found := 0
	for _, p := range list(t, module+"copilot/...") {
		path := strings.TrimPrefix(p.ImportPath, module)
		isKMS := strings.HasPrefix(path, interfaces+"/")
		if isKMS {
			found++
		}
		for _, imported := range p.Imports {
			other := strings.TrimPrefix(imported, module)
			switch {
			case isKMS && below(other, "copilot") && other != interfaces:
				t.Errorf("%s imports %s, and may import only %s of the broker", path, other, interfaces)
			case !isKMS && strings.HasPrefix(other, interfaces+"/"):
				t.Errorf("%s imports %s, which only programs may", path, other)
			}
		}
	}
	if found < 6 { // the five and kmstest
		t.Fatalf("%d packages below %s", found, interfaces)
	}
}
