//go:build !windows

package agekey

import (
	"os/exec"
	"syscall"
)

// separate gives a process a session of its own, without a terminal, and has all of its
// processes killed when its context is done.
func separate(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
}
