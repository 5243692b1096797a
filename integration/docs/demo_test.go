package docs

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// TestDemo runs "make demo", which fails if anything that it claims is not so, with these
// tests' programs. It leaves nothing behind.
func TestDemo(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Backup)
	harness.Long(t)
	dir := harness.TempDir(t)
	harness.Write(t, dir+"/scripts/demo.sh", harness.Read(t, harness.Repo+"/scripts/demo.sh"))
	if err := os.Symlink(harness.Bin, dir+"/bin"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute) // it waits for each program itself
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", dir+"/scripts/demo.sh")
	cmd.Env = append(os.Environ(), "PILOT_TOOLS="+harness.Tools, "TMPDIR="+dir)
	out := harness.Output(t, cmd)
	for _, want := range []string{
		"fully encrypted", "the registry: 0 line(s) with the secret", "spiffe://example.com/guest/stranger may not",
		"lo               DOWN", "there are too few shares: 2 of set", "restored 1 KEKs with 2 versions", "spiffe://example.com/node/node-1 may not",
		"none changed or missing", `namespace "dev" may not use KEK`,
	} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in what it prints:\n%s", want, out)
		}
	}
	if left, err := filepath.Glob(dir + "/pilot-demo.*"); err != nil || len(left) > 0 {
		t.Errorf("it has left %q, %v", left, err)
	}
}
