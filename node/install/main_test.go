package install

import (
	"os"
	"testing"

	"github.com/ctrlplane/pilot/node/sandbox"
)

func TestMain(m *testing.M) {
	sandbox.IsolateRoots()
	os.Exit(m.Run())
}
