package harness

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// DoctorNode is a machine that pilot node doctor examines.
type DoctorNode struct {
	*Node
	program string // that runs its containerd
}

func NewDoctorNode(t testing.TB, n *Node) *DoctorNode {
	t.Helper()
	// The doctor takes one program, and 1.7 here takes several words.
	quoted := `"` + strings.Join(n.Command, `" "`) + `"`
	program := Write(t, filepath.Join(n.Dir, "containerd"), "#!/bin/sh\nexec "+quoted+` "$@"`+"\n")
	if err := os.Chmod(program, 0o700); err != nil {
		t.Fatal(err)
	}
	return &DoctorNode{n, program}
}

// DoctorReport is what pilot node doctor --json prints.
type DoctorReport struct {
	OK    bool
	Steps []struct {
		Name, Result, Detail string
		Fix, Mend            []string
	}
	Output string
}

// Command returns the command that examines the machine.
func (p *DoctorNode) Command(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	tmp := filepath.Join(p.Dir, "tmp")
	if err := os.MkdirAll(tmp, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("pilot", append([]string{"node", "doctor", "--config", "/dev/null",
		"--listen", "unix://" + p.Dir + "/keyprovider.sock", "--diff-listen", "unix://" + p.Dir + "/diff.sock",
		"--containerd", p.Socket, "--containerd-config", filepath.Join(p.Dir, "config.toml"), "--containerd-binary", p.program}, args...)...)
	cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
	return cmd
}

// Examine has the doctor examine the machine, and checks that nothing is left
// of that.
func (p *DoctorNode) Examine(t testing.TB, args ...string) DoctorReport {
	t.Helper()
	cmd := p.Command(t, append([]string{"--json"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	begin := time.Now()
	out, err := cmd.Output()
	if took := time.Since(begin); took > Timeout {
		t.Errorf("it took %s", took)
	}
	status := cmd.ProcessState.ExitCode()
	r := DoctorReport{Output: string(out) + stderr.String()}
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("%v in\n%s", err, r.Output)
	}
	for _, s := range r.Steps {
		if !slices.Equal(s.Fix, s.Mend) {
			t.Errorf("%s: fix is %q, and mend, its old name, is %q", s.Name, s.Fix, s.Mend)
		}
	}
	if want := map[bool]int{true: 0, false: 1}[r.OK]; status != want && status != 2 {
		t.Errorf("exit status %d, %v:\n%s", status, err, r.Output)
	}
	p.ExpectClean(t)
	return r
}

// ExpectFailed checks that a step has failed, with each of said in its detail and fix
// among its commands.
func (r DoctorReport) ExpectFailed(t testing.TB, step, fix string, said ...string) {
	t.Helper()
	for _, s := range r.Steps {
		if s.Name != step {
			continue
		}
		if s.Result != "failed" || r.OK {
			t.Errorf("%s is %s", step, s.Result)
		}
		for _, w := range said {
			if !strings.Contains(s.Detail, w) {
				t.Errorf("%s: want %q in %q", step, w, s.Detail)
			}
		}
		if !slices.Contains(s.Fix, fix) {
			t.Errorf("%s: want %q among %q (%s)", step, fix, s.Fix, s.Detail)
		}
		return
	}
	t.Errorf("no step %s in\n%s", step, r.Output)
}

// ExpectClean checks that the doctor has left nothing on the machine, where no one
// else has put anything.
func (p *DoctorNode) ExpectClean(t testing.TB) {
	t.Helper()
	if out, err := p.Ctr("namespaces", "list", "--quiet").Output(); err == nil && strings.Contains(string(out), "pilot-doctor") {
		t.Errorf("left behind: namespace pilot-doctor")
	}
	for _, pattern := range []string{
		"tmp/*", "mounts/*", "root/io.containerd.content.v1.content/blobs/sha256/*", "root/io.containerd.content.v1.content/ingest/*",
		"root/io.containerd.snapshotter.v1.*/snapshots/*",
	} {
		Await(t, "nothing left behind", func() error {
			left, err := filepath.Glob(filepath.Join(p.Dir, pattern))
			if err == nil && len(left) > 0 {
				err = fmt.Errorf("there is %v", left)
			}
			return err
		})
	}
}
