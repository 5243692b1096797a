//go:build unix

package archive

import "os"

func open(name string) (*os.File, error) { return os.Open(name) }
