//go:build !linux

package handshake

// ended does not know: copilot serves on Linux only.
func ended(uintptr) bool { return false }
