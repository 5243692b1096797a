package agekey

import "os/exec"

// separate does nothing: a process that is killed leaves those that it has started.
func separate(*exec.Cmd) {}
