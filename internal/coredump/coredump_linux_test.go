package coredump

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// TestMain crashes, with core dumps allowed, if a test asks for it.
func TestMain(m *testing.M) {
	switch os.Getenv("CRASH") {
	case "disabled":
		if err := Disable(); err != nil {
			panic(err)
		}
		fallthrough
	case "as it is":
		syscall.Kill(os.Getpid(), syscall.SIGSEGV)
		select {}
	}
	os.Exit(m.Run())
}

func TestDisable(t *testing.T) {
	pattern, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("core_pattern: %s", pattern)
	for _, how := range []string{"as it is", "disabled"} {
		dir := t.TempDir()
		cmd := exec.Command("sh", "-c", `ulimit -c unlimited; exec "$0"`, os.Args[0])
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "CRASH="+how, "GOTRACEBACK=crash")
		cmd.Run()
		dumped := cmd.ProcessState.Sys().(syscall.WaitStatus).CoreDump()
		left, _ := filepath.Glob(dir + "/*")
		t.Logf("%s: core dumped: %v, files: %v", how, dumped, left)
		if how == "disabled" && (dumped || len(left) > 0) {
			t.Errorf("a core dump was made")
		}
	}
}
