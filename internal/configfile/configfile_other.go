//go:build !linux

package configfile

import (
	"os"
	"path/filepath"
)

func byDefault(program, name string) string {
	dir, err := os.UserConfigDir()
	if err != nil {
		return ""
	}
	return filepath.Join(dir, program, name)
}
