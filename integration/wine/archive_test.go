//go:build wine

package wine

import (
	"archive/zip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestWindowsArchiveRunsAndIsTheSameTwice builds the archive of a release, twice, and runs
// what is in it.
func TestWindowsArchiveRunsAndIsTheSameTwice(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	const name = "pilot-9.8.7-windows-amd64"
	var archives []string
	for _, out := range []string{dir + "/first", dir + "/second"} {
		cmd := harness.Command(t, filepath.Join(harness.Repo, "scripts/clients.sh"), out)
		cmd.Env = append(cmd.Environ(), "VERSION=v9.8.7", "OSES=windows", "ARCHS=amd64")
		harness.Output(t, cmd)
		archives = append(archives, harness.Read(t, out+"/"+name+".zip"))
	}
	if archives[0] != archives[1] {
		t.Error("the archive has other bytes the second time")
	}
	w := bareWindows(t)
	z, err := zip.OpenReader(dir + "/first/" + name + ".zip")
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	for _, f := range z.File {
		r, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(w.drive, f.Name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		harness.Write(t, to, string(b))
	}
	for _, file := range []string{"LICENSE", "README.md", "CHANGELOG.md", "third-party-notices.txt", "docs/clients.md"} {
		if _, err := os.Stat(filepath.Join(w.drive, name, file)); err != nil {
			t.Error(err)
		}
	}
	for _, program := range []string{"pilot", "copilot", "ctr-pilot"} {
		if out := harness.Output(t, w.run("wine", `C:\`+name+`\`+program+`.exe`, "--version")); !strings.Contains(out, "v9.8.7") {
			t.Errorf("%s: %s", program, out)
		}
	}
}
