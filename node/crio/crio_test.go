package crio

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestCRIOKeysDoNotBlock checks a decryption_keys_path with files that CRI-O would block
// on or read into memory.
func TestCRIOKeysDoNotBlock(t *testing.T) {
	for want, put := range map[string]func(name string) error{
		"a.pem: it is a pipe": func(name string) error { return syscall.Mkfifo(name, 0o600) },
		"a.pem: larger than 1024 KiB": func(name string) error {
			return os.WriteFile(name, make([]byte, maxKey+1), 0o600)
		},
	} {
		dir := t.TempDir()
		c := &Running{PID: os.Getpid(), KeysPath: dir}
		if keys, err := c.CheckKeys(); keys != 0 || err != nil {
			t.Errorf("an empty directory: %d, %v", keys, err)
		}
		if err := put(filepath.Join(dir, "a.pem")); err != nil {
			t.Fatal(err)
		}
		if _, err := c.CheckKeys(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q: %v", want, err)
		}
	}
}
