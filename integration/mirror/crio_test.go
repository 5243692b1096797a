//go:build engines

package mirror

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// TestCRIOPullsByPlainDigest pulls with the library of CRI-O, which can't decrypt what is
// pulled by digest.
func TestCRIOPullsByPlainDigest(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	n.start()
	secret := harness.NewSecret()
	layout, plain := n.plain(harness.LayerKinds[1], secret)
	n.encrypt(layout, "team/app:enc")
	harness.Write(t, n.dir+"/containers/auth.json", fmt.Sprintf(`{"auths": {"%s": {"auth": "%s"}}}`, n.mirror, basic("pilot", n.secret)))
	cmd := harness.Command(t, filepath.Join(harness.Tools, "bin/criopull"), "-root", n.dir+"/crio", "-keys", "/nonexistent", n.mirror+"/team/app@"+plain)
	cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+n.dir, "OCICRYPT_KEYPROVIDER_CONFIG=/nonexistent")
	out := strings.Fields(harness.Output(t, cmd))
	if len(out) != 2 || out[0] != plain {
		t.Fatalf("%q", out)
	}
	if got := harness.Read(t, out[1]+"/secret"); got != secret {
		t.Errorf("its file holds %q", got)
	}
}
