package node

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
)

// configFiles are the files that containerd's configuration consists of: the main
// one, and those that it imports.
type configFiles struct {
	main    string
	text    []byte   // of the main file; nil if there is none
	version int      // that the main file says; 0 if it says none
	imports []string // the main file's patterns
}

// readConfigFiles reads the main file, which may be missing.
func readConfigFiles(o Options, main string) (configFiles, error) {
	f := configFiles{main: main}
	text, err := o.readConfig(main)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return f, err
	}
	f.text = append([]byte{}, text...) // not nil, though it may be empty
	f.version, f.imports, err = head(text)
	if err != nil {
		return f, fmt.Errorf("%s: %w", main, err)
	}
	return f, nil
}

// readConfig reads one of containerd's configuration files. It does not open what
// containerd would wait for or read without end, or would not start with. /dev/null
// is an empty file to containerd, too.
func (o Options) readConfig(name string) ([]byte, error) {
	info, err := o.stat(name)
	if err != nil {
		return nil, err
	}
	kind := ""
	switch mode := info.Mode(); {
	case mode.IsRegular() || isNull(info):
		return o.readFile(name)
	case mode.IsDir():
		kind = "a directory"
	case mode&fs.ModeNamedPipe != 0:
		kind = "a named pipe"
	case mode&fs.ModeSocket != 0:
		kind = "a socket"
	default:
		kind = "a device"
	}
	return nil, &Conflict{name, "containerd reads it as a configuration file, and it is " + kind, "move it away, or take it out of containerd's imports"}
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

// dropInDir returns a directory from which containerd reads all configuration
// files, the last one if there are several, since later files win.
func (f *configFiles) dropInDir() (string, bool) {
	for _, pattern := range slices.Backward(f.imports) {
		pattern = f.absolute(pattern)
		if filepath.Base(pattern) == "*.toml" && !strings.Contains(filepath.Dir(pattern), "*") {
			return filepath.Dir(pattern), true
		}
	}
	return "", false
}

// matches reports whether the main file imports a file, if it exists.
func (f *configFiles) matches(file string) bool {
	return slices.ContainsFunc(f.imports, func(pattern string) bool {
		ok, _ := filepath.Match(f.absolute(pattern), file)
		return ok
	})
}

// absolute returns a pattern of the main file's as an absolute one.
func (f *configFiles) absolute(pattern string) string {
	if filepath.IsAbs(pattern) {
		return filepath.Clean(pattern)
	}
	return filepath.Join(filepath.Dir(f.main), pattern)
}

// withFile returns the files that the patterns import, in containerd's order, as
// if file existed and those of without did not. An empty file adds none.
func (f *configFiles) withFile(o Options, patterns []string, file string, without []string) ([]string, error) {
	var files []string
	for _, pattern := range patterns {
		pattern = f.absolute(pattern)
		matches := []string{pattern}
		if strings.Contains(pattern, "*") {
			var err error
			if matches, err = o.glob(pattern); err != nil {
				return nil, err
			}
			if ok, _ := filepath.Match(pattern, file); ok && file != "" && !slices.Contains(matches, file) {
				matches = append(matches, file)
				slices.Sort(matches)
			}
		}
		for _, m := range matches {
			if m == f.main {
				continue // 1.x dumps the main file among its own imports
			}
			if (m == file || !slices.Contains(without, m)) && !slices.Contains(files, m) {
				files = append(files, m)
			}
		}
	}
	return files, nil
}

// all returns all files that containerd reads, in its order, and those that are
// imported by name and missing: containerd does not start without them, though
// "containerd config dump" of some versions takes no notice.
func (f *configFiles) all(o Options) (files, missing []string, err error) {
	pending := []string{f.main}
	seen := map[string]bool{}
	for len(pending) > 0 {
		file := pending[0]
		pending = pending[1:]
		if seen[file] {
			continue
		}
		seen[file] = true
		text, err := o.readConfig(file)
		if errors.Is(err, fs.ErrNotExist) {
			if file != f.main {
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
		in := configFiles{main: file}
		more, err := in.withFile(o, imports, "", nil)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", file, err)
		}
		pending = append(pending, more...)
	}
	return files, missing, nil
}

// importing returns the main file's text with other imports.
func (f *configFiles) importing(files []string, version int) ([]byte, error) {
	conf := map[string]any{}
	if f.text == nil {
		conf["version"] = version
	}
	if err := toml.Unmarshal(f.text, &conf); err != nil {
		return nil, fmt.Errorf("%s: %w", f.main, err)
	}
	conf["imports"] = files
	return toml.Marshal(conf)
}
