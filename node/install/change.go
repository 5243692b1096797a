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
	Old  []byte // the content before; nil: no file
	New  []byte // the content after; nil: no file, or a link
	Link string // the target of a symbolic link
	Mode fs.FileMode
	// Remove is true if a file of an earlier installation is removed.
	Remove bool

	oldMode fs.FileMode // before it was made
}

// Diff returns the change as a unified diff.
func (c Change) Diff() string {
	switch {
	case c.Link != "" && c.Remove:
		return fmt.Sprintf("unlink %s\n", c.Path)
	case c.Link != "":
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

// make makes the change, unless the file was changed after the change was planned.
func (c Change) make(o Options) error {
	if c.Link == "" {
		if err := c.finds(o, c.Old); err != nil {
			return err
		}
	}
	switch {
	case c.Remove && c.Link != "":
		return o.RemoveLink(c.Path)
	case c.Remove:
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

// finds returns an error if the file has other content; nil stands for no file.
func (c Change) finds(o Options, content []byte) error {
	has, err := o.readInstalled(c.Path)
	if host.IgnoreNotExist(err) != nil {
		return err
	}
	if !bytes.Equal(has, content) || (err == nil) != (content != nil) {
		return &host.Conflict{Where: c.Path, What: "it was changed in the meantime", Fix: "run this again"}
	}
	return nil
}

// revert restores what the change replaced, unless the file was changed since.
func (c Change) revert(o Options) error {
	if c.Link == "" {
		if err := c.finds(o, c.New); err != nil {
			return err
		}
	}
	if c.Link != "" && c.Remove {
		return o.Symlink(c.Link, c.Path)
	}
	if c.Old != nil {
		return o.WriteFile(c.Path, c.Old, c.oldMode)
	}
	return host.IgnoreNotExist(o.RemoveLink(c.Path))
}
