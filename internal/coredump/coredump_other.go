//go:build !linux && !windows

package coredump

import "golang.org/x/sys/unix"

func disable() error { return unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}) }
