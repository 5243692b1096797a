package node

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
)

// dropIn is the file by which pilot is added to containerd's configuration.
type dropIn struct {
	path   string
	text   []byte
	format format
	// pattern has to be added to the main file's imports; empty if it imports
	// the file already.
	pattern string
	// template says that the file is k3s's template, which becomes the whole
	// configuration: what k3s writes, and after it text without its first lines.
	template bool
	appended []byte
}

// format is how a configuration file names plugins.
type format struct {
	version int  // 0: the file says none
	short   bool // it names plugins without their types
}

// trial returns what containerd's configuration would come to with a drop-in, or
// with none of pilot's if d is nil. It changes nothing that containerd reads:
// containerd dumps a copy of its main file, which imports what the main file does.
func (c *containerd) trial(ctx context.Context, o Options, d *dropIn) (map[string]any, error) {
	if d == nil && c.files.text == nil {
		return c.readDump(ctx, o, "config", "default") // which 1.x takes without a file
	}
	dir, err := o.tempDir()
	if err != nil {
		return nil, err
	}
	defer o.removeAll(dir)
	var files []string
	main := c.files
	switch {
	case d == nil:
		files, err = main.withFile(o, main.imports, "", c.ours)
	case d.template:
		main.text = slices.Concat(main.text, []byte("\n"), d.appended)
		files, err = main.withFile(o, main.imports, "", c.ours)
	default:
		patterns := main.imports
		if d.pattern != "" {
			patterns = append(slices.Clone(patterns), d.pattern)
		}
		files, err = main.withFile(o, patterns, d.path, c.ours)
		if i := slices.Index(files, d.path); err == nil && i >= 0 {
			files[i] = filepath.Join(dir, "drop-in.toml")
			err = o.addFile(filepath.Join(dir, "drop-in.toml"), d.text)
		}
	}
	if err != nil {
		return nil, err
	}
	text, err := main.importing(files, c.newestFormat())
	if err != nil {
		return nil, err
	}
	if err := o.addFile(filepath.Join(dir, "config.toml"), text); err != nil {
		return nil, err
	}
	return c.readDump(ctx, o, "--config", filepath.Join(dir, "config.toml"), "config", "dump")
}

const trialPrefix = "pilot-trial-"

// staleTrial is the age of a trial's directory that was left by one that was
// killed. A trial takes at most runTimeout.
const staleTrial = 10 * time.Minute

// removeStaleTrials removes what trials have left in a directory that were killed.
// Anybody may write there, so it has to be a directory of root's own.
func (o Options) removeStaleTrials(parent string) {
	entries, _ := o.readDir(parent)
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), trialPrefix) {
			continue
		}
		info, err := e.Info() // of a link itself
		if err != nil || info.Mode() != fs.ModeDir|0o700 || time.Since(info.ModTime()) < staleTrial {
			continue
		}
		if owner, ok := info.Sys().(*syscall.Stat_t); ok && owner.Uid == 0 {
			o.removeAll(filepath.Join(parent, e.Name()))
		}
	}
}

// tempDir makes a directory that only root can read. Some node images have no /tmp, or none that
// can be written.
func (o Options) tempDir() (dir string, err error) {
	var errs []error
	for _, parent := range []string{"/tmp", "/run", "/var/tmp"} {
		o.removeStaleTrials(parent)
		if dir, err = o.makeTemp(parent, trialPrefix); err == nil {
			return dir, nil
		}
		errs = append(errs, err)
	}
	return "", errors.Join(errs...)
}

// readDump runs containerd and reads the configuration that it prints.
func (c *containerd) readDump(ctx context.Context, o Options, args ...string) (map[string]any, error) {
	out, err := c.run(ctx, o, args...)
	if err != nil {
		return nil, fmt.Errorf("containerd's configuration: %w", err)
	}
	var dump map[string]any
	if err := toml.NewDecoder(bytes.NewReader(out)).Decode(&dump); err != nil {
		return nil, fmt.Errorf("containerd's configuration: what it prints is not TOML: %w", err)
	}
	return dump, nil
}
