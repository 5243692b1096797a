package containerd

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"github.com/ctrlplane/pilot/node/host"
)

// ConfigFiles is containerd's main configuration file with its imports.
type ConfigFiles struct {
	Main    string
	Text    []byte   // of the main file; nil if it does not exist
	Version int      // of the main file; 0 if it has none
	Imports []string // the main file's patterns
}

// ReadConfigFiles reads the main file, which need not exist.
func ReadConfigFiles(h host.Host, main string) (ConfigFiles, error) {
	f := ConfigFiles{Main: main}
	text, err := ReadConfig(h, main)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return f, err
	}
	f.Text = append([]byte{}, text...) // not nil, though it may be empty
	f.Version, f.Imports, err = head(text)
	if err != nil {
		return f, fmt.Errorf("%s: %w", main, err)
	}
	return f, nil
}

// ReadConfig reads one of containerd's configuration files. Pipes, sockets, directories
// and devices are a [host.Conflict], except /dev/null, which is an empty file to
// containerd.
func ReadConfig(h host.Host, name string) ([]byte, error) {
	info, err := h.Stat(name)
	if err != nil {
		return nil, err
	}
	kind := ""
	switch mode := info.Mode(); {
	case mode.IsRegular() || isNull(info):
		return h.ReadFile(name)
	case mode.IsDir():
		kind = "a directory"
	case mode&fs.ModeNamedPipe != 0:
		kind = "a named pipe"
	case mode&fs.ModeSocket != 0:
		kind = "a socket"
	default:
		kind = "a device"
	}
	return nil, &host.Conflict{Where: name, What: "containerd reads it as a configuration file, and it is " + kind, Fix: "move it away, or remove it from containerd's imports"}
}

// isNull reports whether a file is the device /dev/null.
func isNull(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && info.Mode()&fs.ModeCharDevice != 0 && stat.Rdev == unix.Mkdev(1, 3)
}

// head returns the version and the imports of a configuration file.
func head(text []byte) (version int, imports []string, err error) {
	var top struct {
		Version int      `toml:"version"`
		Imports []string `toml:"imports"`
	}
	err = toml.Unmarshal(text, &top)
	return top.Version, top.Imports, err
}

// DropInDir returns the directory from which the main file imports *.toml: the last one
// of several, since later files win.
func (f *ConfigFiles) DropInDir() (string, bool) {
	for _, pattern := range slices.Backward(f.Imports) {
		pattern = f.absolute(pattern)
		if filepath.Base(pattern) == "*.toml" && !strings.Contains(filepath.Dir(pattern), "*") {
			return filepath.Dir(pattern), true
		}
	}
	return "", false
}

// Matches reports whether the main file imports a file if it exists.
func (f *ConfigFiles) Matches(file string) bool {
	return slices.ContainsFunc(f.Imports, func(pattern string) bool {
		ok, _ := filepath.Match(f.absolute(pattern), file)
		return ok
	})
}

// absolute returns a pattern of the main file as an absolute path.
func (f *ConfigFiles) absolute(pattern string) string {
	if filepath.IsAbs(pattern) {
		return filepath.Clean(pattern)
	}
	return filepath.Join(filepath.Dir(f.Main), pattern)
}

// withFile returns the files that the patterns import, in containerd's order, as if file
// existed, unless it is empty, and those of without did not.
func (f *ConfigFiles) withFile(h host.Host, patterns []string, file string, without []string) ([]string, error) {
	var files []string
	for _, pattern := range patterns {
		pattern = f.absolute(pattern)
		matches := []string{pattern}
		if strings.Contains(pattern, "*") {
			var err error
			if matches, err = h.Glob(pattern); err != nil {
				return nil, err
			}
			if ok, _ := filepath.Match(pattern, file); ok && file != "" && !slices.Contains(matches, file) {
				matches = append(matches, file)
				slices.Sort(matches)
			}
		}
		for _, m := range matches {
			if m == f.Main {
				continue // 1.x dumps the main file among its own imports
			}
			if (m == file || !slices.Contains(without, m)) && !slices.Contains(files, m) {
				files = append(files, m)
			}
		}
	}
	return files, nil
}

// All returns all files that containerd reads, in its order, and the missing ones that
// are imported by name: containerd does not start without them, though "containerd
// config dump" of some versions ignores them.
func (f *ConfigFiles) All(h host.Host) (files, missing []string, err error) {
	pending := []string{f.Main}
	seen := map[string]bool{}
	for len(pending) > 0 {
		file := pending[0]
		pending = pending[1:]
		if seen[file] {
			continue
		}
		seen[file] = true
		text, err := ReadConfig(h, file)
		if errors.Is(err, fs.ErrNotExist) {
			if file != f.Main {
				missing = append(missing, file)
			}
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		files = append(files, file)
		_, imports, err := head(text)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", file, err)
		}
		in := ConfigFiles{Main: file}
		more, err := in.withFile(h, imports, "", nil)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", file, err)
		}
		pending = append(pending, more...)
	}
	return files, missing, nil
}

// importing returns the main file's text with other imports.
func (f *ConfigFiles) importing(files []string, version int) ([]byte, error) {
	conf := map[string]any{}
	if f.Text == nil {
		conf["version"] = version
	}
	if err := toml.Unmarshal(f.Text, &conf); err != nil {
		return nil, fmt.Errorf("%s: %w", f.Main, err)
	}
	conf["imports"] = files
	return toml.Marshal(conf)
}
