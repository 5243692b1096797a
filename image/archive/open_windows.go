package archive

import (
	"os"
	"path/filepath"
)

// open opens a file that may be replaced meanwhile, as [os.Root] opens files and [os.Open]
// does not.
func open(name string) (*os.File, error) {
	name, err := filepath.EvalSymlinks(name)
	if err != nil {
		return nil, err
	}
	return os.OpenInRoot(filepath.Dir(name), filepath.Base(name))
}
