package audit

import (
	"os"
	"os/exec"
	"testing"
)

// testInOwnProcess runs the test again, in a process of its own.
func testInOwnProcess(t *testing.T, env string) {
	t.Helper()
	cmd := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), env)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
