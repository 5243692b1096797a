package main

import (
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// lingerVariable makes this program only linger.
const lingerVariable = "PILOT_DECODER_LINGER"

// lingerTime is how long standard output stays open after the program failed.
const lingerTime = 500 * time.Millisecond

// keepOutputOpen leaves a process behind that holds standard output open for
// lingerTime after this one has exited.
//
// containerd reads a stream processor's output to its end and then checks whether the
// process has failed, without waiting for it to exit. If the output ends first, it takes
// the layer for complete and loses what is on standard error.
func keepOutputOpen() {
	// A descriptor and no os.File, so that it stays open until this process
	// ends, which the other one waits for.
	var pipe [2]int
	if unix.Pipe2(pipe[:], unix.O_CLOEXEC) != nil {
		return
	}
	r := os.NewFile(uintptr(pipe[0]), "parent")
	defer r.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{lingerVariable + "=1"}
	cmd.Stdout = os.Stdout
	cmd.ExtraFiles = []*os.File{r}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	_ = cmd.Start() // if it can't, containerd may miss the message
}

// linger waits until its parent has exited, and then for lingerTime.
func linger() {
	io.Copy(io.Discard, os.NewFile(3, "parent"))
	time.Sleep(lingerTime)
}
