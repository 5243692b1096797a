//go:build unix

package client

import (
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// writable returns an error if files can't be replaced, before a broker is asked.
func writable(files ...string) error {
	for _, name := range files {
		name, err := filepath.EvalSymlinks(name)
		if err != nil {
			return err
		}
		if dir := filepath.Dir(name); unix.Access(dir, unix.W_OK) != nil {
			return fmt.Errorf("%s can't be replaced: %s can't be written (in a drop-in of pilot.service: ReadWritePaths=%[2]s)", name, dir)
		}
	}
	return nil
}
