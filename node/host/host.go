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

// MachineRoot is the root directory of the machine that a pod of the host's PID
// namespace runs on.
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

// Conflict is the error of a setting of the machine's own that an installation
// would have to overwrite, which it does not.
type Conflict struct{ Where, What, Fix string }

func (c *Conflict) Error() string { return fmt.Sprintf("%s: %s: %s", c.Where, c.What, c.Fix) }

// Run runs a program of the machine's and returns what it prints. Those of a root
// directory run in a sandbox. The error has the last line that it prints as an error.
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

// LookPath returns the path of a program inside the root, in its usual directories
// unless its name is absolute, or nothing.
func (h Host) LookPath(name string) string { return h.LookPathIn(name, sandbox.BinDirs) }

// SearchPath returns the directories in which a user's shell looks for programs: those
// of PATH on this machine, the usual ones below a root directory.
func (h Host) SearchPath() []string {
	if h.Root == "" {
		return filepath.SplitList(os.Getenv("PATH"))
	}
	return sandbox.BinDirs
}

// LookPathIn returns the path of a program inside the root, or nothing. One whose
// name is not absolute is looked for in dirs.
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

func SameFile(a, b string) bool {
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// IgnoreNotExist returns err, or nil if it is of a file that does not exist.
func IgnoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
