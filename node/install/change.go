package install

import (
	"bytes"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/rogpeppe/go-internal/diff"

	"github.com/ctrlplane/pilot/node/host"
)

// Change is a file or a symbolic link that is made, changed or removed.
type Change struct {
	Path string // inside the root
	Old  []byte // what was there; nil: nothing
	New  []byte // what shall be there; nil: nothing, or a link
	Link string // what a symbolic link shall point to
	Mode fs.FileMode
	// Remove says that the file goes, which an earlier installation has made.
	Remove bool
}

// Diff returns the change as a unified diff.
func (c Change) Diff() string {
	if c.Link != "" {
		return fmt.Sprintf("link %s -> %s\n", c.Path, c.Link)
	}
	from, to := c.Path, c.Path
	if c.Old == nil {
		from = "/dev/null"
	}
	if c.New == nil {
		to = "/dev/null"
	}
	return string(diff.Diff(from, c.Old, to, c.New))
}

// make makes the change, unless somebody else has changed the file since the
// change was planned.
func (c Change) make(o Options) error {
	if c.Link == "" {
		if err := c.finds(o, c.Old); err != nil {
			return err
		}
	}
	if c.Remove {
		return o.Remove(c.Path)
	}
	if err := o.MkdirAll(filepath.Dir(c.Path), 0o755); err != nil {
		return err
	}
	if c.Link != "" {
		return o.Symlink(c.Link, c.Path)
	}
	return o.WriteFile(c.Path, c.New, c.Mode)
}

// finds reports an error if the file's content is another. Nil: there is none.
func (c Change) finds(o Options, content []byte) error {
	has, err := o.ReadFile(c.Path)
	if host.IgnoreNotExist(err) != nil {
		return err
	}
	if !bytes.Equal(has, content) || (err == nil) != (content != nil) {
		return &host.Conflict{Where: c.Path, What: "somebody else has changed it in the meantime", Fix: "run this again"}
	}
	return nil
}

// revert puts back what the change replaced, unless somebody else has changed
// the file since.
func (c Change) revert(o Options) error {
	if c.Link == "" {
		if err := c.finds(o, c.New); err != nil {
			return err
		}
	}
	if c.Old != nil {
		return o.WriteFile(c.Path, c.Old, c.Mode)
	}
	return host.IgnoreNotExist(o.RemoveLink(c.Path))
}
