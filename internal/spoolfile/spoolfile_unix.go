//go:build unix

package spoolfile

import (
	"errors"
	"os"
)

// Create makes a file in the directory for temporary files. Nothing is written to it
// before its name is gone.
func Create() (*os.File, error) {
	f, err := os.CreateTemp("", prefix)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
