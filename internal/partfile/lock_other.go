//go:build !unix

package partfile

import (
	"os"

	"github.com/ctrlplane/pilot/internal/replacefile"
)

// lock does nothing.
func lock(*os.File) (bool, error) { return true, nil }

// removeStale does nothing: a file that is open elsewhere can't be distinguished from
// one that was left behind.
func removeStale(*os.Root, string) {}

// rename closes the file first: files that are open can't be renamed.
func (f *File) rename(name string) error {
	if err := f.Close(); err != nil {
		return err
	}
	return replacefile.NameIn(f.root, f.name, name)
}
