package harness

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Process is a program in the background.
type Process struct {
	Cmd  *exec.Cmd
	Log  string
	Done chan struct{}
}

// Start starts a program and stops it at the end of the test. Its output is
// shown if the test failed.
func Start(t testing.TB, dir, name string, cmd *exec.Cmd) *Process {
	t.Helper()
	p := &Process{Cmd: cmd, Log: filepath.Join(dir, name+".log"), Done: make(chan struct{})}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		cmd.Wait()
		close(p.Done)
	}()
	t.Cleanup(func() {
		p.Stop(t)
		if t.Failed() {
			out, _ := os.ReadFile(p.Log)
			lines := strings.Split(string(out), "\n")
			t.Logf("%s:\n%s", name, strings.Join(lines[max(0, len(lines)-15):], "\n"))
		}
	})
	return p
}

// Stop stops the program as a service manager would.
func (p *Process) Stop(t testing.TB) {
	t.Helper()
	p.Cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.Done:
	case <-time.After(Timeout):
		t.Errorf("%s does not stop", p.Cmd.Args[0])
		p.Kill()
	}
}

func (p *Process) Kill() {
	p.Cmd.Process.Kill()
	<-p.Done
}

// Pause stops the program's threads until resume, or the end of the test: it
// keeps its connections and answers nothing.
func (p *Process) Pause(t testing.TB) (resume func()) {
	t.Helper()
	p.Cmd.Process.Signal(syscall.SIGSTOP)
	resume = sync.OnceFunc(func() { p.Cmd.Process.Signal(syscall.SIGCONT) })
	t.Cleanup(resume)
	Await(t, "all threads are stopped", func() error {
		stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.Cmd.Process.Pid))
		if err != nil || len(stats) == 0 {
			return fmt.Errorf("no threads: %v", err)
		}
		for _, name := range stats {
			b, err := os.ReadFile(name)
			if errors.Is(err, fs.ErrNotExist) {
				continue // the thread has ended
			}
			if _, state, _ := strings.Cut(string(b), ") "); err != nil || !strings.HasPrefix(state, "T") {
				return fmt.Errorf("%s: %.1s %v", name, state, err)
			}
		}
		return nil
	})
	return resume
}

// Peak returns the most memory that the program has had so far, in bytes.
func (p *Process) Peak(t testing.TB) int {
	t.Helper()
	return PeakMemory(t, p.Cmd.Process.Pid)
}

func PeakMemory(t testing.TB, pid int) int {
	t.Helper()
	_, rest, _ := strings.Cut(Read(t, fmt.Sprintf("/proc/%d/status", pid)), "VmHWM:")
	var kib int
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// Logged returns how many lines of a program's log have the text.
func (p *Process) Logged(t testing.TB, text string) (n int) {
	t.Helper()
	for line := range strings.Lines(Read(t, p.Log)) {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}
