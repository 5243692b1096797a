package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/node/host"
)

// DropIn is a file that adds pilot to containerd's configuration.
type DropIn struct {
	Path string
	Text []byte
	// Pattern has to be added to the main file's imports; empty if they match the file
	// already.
	Pattern string
	// Template is true for k3s's template. The configuration is then what k3s writes
	// without it, and Appended after that.
	Template bool
	Appended []byte
}

// Trial returns containerd's effective configuration as it would be with a drop-in, or
// without pilot's if d is nil. It changes no file that containerd reads: containerd dumps
// a copy of its main file with the same imports.
func (c *Instance) Trial(ctx context.Context, h host.Host, d *DropIn) (map[string]any, error) {
	if d == nil && c.Files.Text == nil {
		return c.readDump(ctx, h, "config", "default") // which 1.x takes without a file
	}
	dir, err := tempDir(h)
	if err != nil {
		return nil, err
	}
	defer h.RemoveAll(dir)
	var files []string
	main := c.Files
	switch {
	case d == nil:
		files, err = main.withFile(h, main.Imports, "", c.Ours)
	case d.Template:
		main.Text = slices.Concat(main.Text, []byte("\n"), d.Appended)
		files, err = main.withFile(h, main.Imports, "", c.Ours)
	default:
		patterns := main.Imports
		if d.Pattern != "" {
			patterns = append(slices.Clone(patterns), d.Pattern)
		}
		files, err = main.withFile(h, patterns, d.Path, c.Ours)
		if i := slices.Index(files, d.Path); err == nil && i >= 0 {
			files[i] = filepath.Join(dir, "drop-in.toml")
			err = h.AddFile(filepath.Join(dir, "drop-in.toml"), d.Text)
		}
	}
	if err != nil {
		return nil, err
	}
	text, err := main.importing(files, c.NewestFormat())
	if err != nil {
		return nil, err
	}
	if err := h.AddFile(filepath.Join(dir, "config.toml"), text); err != nil {
		return nil, err
	}
	return c.readDump(ctx, h, "--config", filepath.Join(dir, "config.toml"), "config", "dump")
}

const trialPrefix = "pilot-trial-"

// staleTrial is the age from which the directory of a trial is removed: the trial was
// killed. A trial runs for at most 20 seconds.
const staleTrial = 10 * time.Minute

// removeStaleTrials removes directories of trials that were killed. Any user may write
// to parent, so only directories of root with mode 0700 are removed.
func removeStaleTrials(h host.Host, parent string) {
	entries, _ := h.ReadDir(parent)
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), trialPrefix) {
			continue
		}
		info, err := e.Info() // does not follow a link
		if err != nil || info.Mode() != fs.ModeDir|0o700 || time.Since(info.ModTime()) < staleTrial {
			continue
		}
		if owner, ok := info.Sys().(*syscall.Stat_t); ok && owner.Uid == 0 {
			h.RemoveAll(filepath.Join(parent, e.Name()))
		}
	}
}

// tempDir makes a directory that only root can read. Some node images have no writable
// /tmp.
func tempDir(h host.Host) (dir string, err error) {
	var errs []error
	for _, parent := range []string{"/tmp", "/run", "/var/tmp"} {
		removeStaleTrials(h, parent)
		if dir, err = h.MakeTemp(parent, trialPrefix); err == nil {
			return dir, nil
		}
		errs = append(errs, err)
	}
	return "", errors.Join(errs...)
}

// readDump runs containerd and parses the configuration that it prints.
func (c *Instance) readDump(ctx context.Context, h host.Host, args ...string) (map[string]any, error) {
	out, err := c.run(ctx, h, args...)
	if err != nil {
		return nil, fmt.Errorf("containerd's configuration: %w", err)
	}
	var dump map[string]any
	if err := toml.NewDecoder(bytes.NewReader(out)).Decode(&dump); err != nil {
		return nil, fmt.Errorf("containerd's configuration: its output is not TOML: %w", err)
	}
	return dump, nil
}
