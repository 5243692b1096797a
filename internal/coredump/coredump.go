// Package coredump keeps the memory of a process that holds keys out of core
// dumps.
package coredump

// Disable makes this process leave no core dump, to a file or to a program, and on
// Linux lets no other process of its user read its memory. On Windows it does nothing:
// dumps are the administrator's to configure there.
func Disable() error { return disable() }
