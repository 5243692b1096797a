package docker

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/ctrlplane/pilot/node/host"
)

// settings are the settings of daemon.json and of dockerd's command line that are used
// here.
type settings struct {
	Containerd    string          `json:"containerd"`
	DataRoot      string          `json:"data-root"`
	ExecRoot      string          `json:"exec-root"`
	StorageDriver string          `json:"storage-driver"`
	Features      map[string]bool `json:"features"`
	Hosts         []string        `json:"hosts"`

	configFile string
}

// The features that decide where images are kept.
const (
	snapshotterFeature = "containerd-snapshotter"
	embeddedFeature    = "embedded-containerd"
)

// readSettings reads daemon.json and the command line, which wins.
func readSettings(h host.Host, args []string) (settings, error) {
	file, explicit := "/etc/docker/daemon.json", false
	flags := flagValues(args)
	if f := flags["config-file"]; len(f) > 0 {
		file, explicit = f[len(f)-1], true
	}
	var s settings
	b, err := h.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !explicit:
	case err != nil:
		return s, fmt.Errorf("docker's configuration: %w", err)
	}
	// Docker accepts an empty file, and one with a byte order mark.
	if b = bytes.TrimSpace(bytes.TrimPrefix(b, []byte("\ufeff"))); len(b) > 0 {
		if err := json.Unmarshal(b, &s); err != nil {
			return s, fmt.Errorf("%s: %w", file, err)
		}
	}
	s.configFile = file
	for _, f := range []struct {
		names []string
		to    *string
		or    string
	}{
		{[]string{"containerd"}, &s.Containerd, ""},
		{[]string{"data-root", "graph", "g"}, &s.DataRoot, "/var/lib/docker"},
		{[]string{"exec-root"}, &s.ExecRoot, "/var/run/docker"},
		{[]string{"storage-driver", "s"}, &s.StorageDriver, ""},
	} {
		for _, name := range f.names {
			if v := flags[name]; len(v) > 0 {
				*f.to = v[len(v)-1]
			}
		}
		if *f.to == "" {
			*f.to = f.or
		}
	}
	for _, v := range flags["feature"] {
		if s.Features == nil {
			s.Features = map[string]bool{}
		}
		name, value, ok := strings.Cut(v, "=")
		on, err := strconv.ParseBool(value)
		s.Features[name] = !ok || err == nil && on
	}
	s.Hosts = append(s.Hosts, slices.Concat(flags["host"], flags["H"])...)
	return s, nil
}

// flagValues returns the values of dockerd's flags that are used here.
func flagValues(args []string) map[string][]string {
	known := []string{"config-file", "containerd", "data-root", "graph", "g", "exec-root", "storage-driver", "s", "feature", "host", "H"}
	flags := map[string][]string{}
	for i := 0; i < len(args); i++ {
		name, value, given := strings.Cut(strings.TrimLeft(args[i], "-"), "=")
		if !strings.HasPrefix(args[i], "-") || !slices.Contains(known, name) {
			continue
		}
		if !given && i+1 < len(args) {
			i++
			value = args[i]
		}
		flags[name] = append(flags[name], value)
	}
	return flags
}
