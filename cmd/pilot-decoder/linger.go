package main

import (
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// lingerVariable makes this program do nothing but linger.
const lingerVariable = "PILOT_DECODER_LINGER"

// lingerFor is how long standard output stays open after the program failed.
const lingerFor = 500 * time.Millisecond

// keepOutputOpen leaves a process behind that holds standard output open for a
// little while after this one has exited.
//
// containerd reads to the end of its output and then looks whether a stream
// processor has failed, without waiting for it to exit. If the end of the
// output comes first, it takes the layer for whole and what is on standard
// error is lost.
func keepOutputOpen() {
	r, w, err := os.Pipe()
	if err != nil {
		return
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{lingerVariable + "=1"}
	cmd.Stdout = os.Stdout
	cmd.ExtraFiles = []*os.File{r}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if cmd.Start() == nil {
		r.Close()
		leftOpen = w // until this process ends, which the other one waits for
	}
}

var leftOpen *os.File

// linger waits until whoever started this process has exited, and then some.
func linger() {
	io.Copy(io.Discard, os.NewFile(3, "parent"))
	time.Sleep(lingerFor)
}
