// Package host reads and changes a machine: its files, its systemd units, and its
// processes. The machine is this one, or one whose root directory is here, such as an
// unpacked node image. Nothing outside of that directory is reached.
package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/ctrlplane/pilot/node/sandbox"
)

// Host is a machine: this one, or one whose root directory is here. The zero Host
// is this machine.
type Host struct {
	// Root is the root directory of a machine that does not run, such as an
	// unpacked node image, as an absolute path; empty for this machine.
	Root string
	// TrustRoot has programs of Root run in a bare chroot instead of a sandbox.
	TrustRoot bool
}

// MachineRoot is the machine's root directory as seen from a pod with hostPID.
const MachineRoot = "/proc/1/root"

// New returns the machine with a root directory, which may be relative; empty and /
// are this machine's.
func New(root string, trust bool) (Host, error) {
	if root == "" {
		return Host{}, nil
	}
	root, err := filepath.Abs(root)
	if err != nil || root == "/" {
		return Host{}, err
	}
	return Host{Root: root, TrustRoot: trust}, nil
}

// Conflict is the error of a setting or a file of the machine's owner that is in the
// way, and that pilot does not overwrite.
type Conflict struct {
	Where string // the file, unit or process
	What  string // is wrong with it
	Fix   string // what the owner can do
}

func (c *Conflict) Error() string { return fmt.Sprintf("%s: %s: %s", c.Where, c.What, c.Fix) }

// Run runs a program of the machine and returns its standard output. A program of a
// root directory runs in a sandbox. The error ends with the last line of standard error.
func (h Host) Run(ctx context.Context, program string, args ...string) ([]byte, error) {
	switch h.Root {
	case "":
		return sandbox.Run(ctx, program, args...)
	case MachineRoot:
		// The machine's own, seen from a container.
		return sandbox.Run(ctx, "chroot", append([]string{h.Root, program}, args...)...)
	}
	return sandbox.RunInRoot(ctx, h.Root, h.TrustRoot, program, args...)
}

// LookPath returns the path of an executable file on the machine, or "". A name that is
// not absolute is searched for in the usual directories.
func (h Host) LookPath(name string) string { return h.LookPathIn(name, sandbox.BinDirs) }

// SearchPath returns the directories of PATH on this machine, or the usual ones for a
// root directory.
func (h Host) SearchPath() []string {
	if h.Root == "" {
		return filepath.SplitList(os.Getenv("PATH"))
	}
	return sandbox.BinDirs
}

// LookPathIn is LookPath with other directories.
func (h Host) LookPathIn(name string, dirs []string) string {
	candidates := []string{name}
	if !filepath.IsAbs(name) {
		candidates = nil
		for _, dir := range dirs {
			candidates = append(candidates, filepath.Join(dir, name))
		}
	}
	for _, c := range candidates {
		if info, err := h.Stat(c); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0 {
			return c
		}
	}
	return ""
}

// SameFile reports whether two paths of this machine lead to the same file.
func SameFile(a, b string) bool {
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// IgnoreNotExist returns err, or nil if err is [fs.ErrNotExist].
func IgnoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
