package coredump

import "golang.org/x/sys/unix"

func disable() error {
	// The limit is what the kernel asks before it writes a file, the other
	// before it starts a program.
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return err
	}
	return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
}
