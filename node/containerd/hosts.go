package containerd

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/internal/loopback"
	"github.com/ctrlplane/pilot/node/host"
)

// CertsDirs is where CRI in containerd 2.2 and later looks for hosts.toml if its configuration
// names neither a directory nor mirrors. Earlier ones look nowhere then.
var CertsDirs = []string{"/etc/containerd/certs.d", "/etc/docker/certs.d"}

// HostsDirs returns the directories, such as /etc/containerd/certs.d, whose hosts.toml say how
// containerd reaches registries with a configuration.
func (c *Instance) HostsDirs(dump map[string]any) []string {
	dirs := c.CRIHostsDirs(dump)
	path, _ := Plugin(dump, TransferService)["config_path"].(string)
	for _, dir := range filepath.SplitList(path) {
		if !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// CRIHostsDirs returns those for the kubelet's images and crictl.
func (c *Instance) CRIHostsDirs(dump map[string]any) []string {
	_, section := c.criSection(dump)
	registry, _ := section["registry"].(map[string]any)
	path, _ := registry["config_path"].(string)
	mirrors, _ := registry["mirrors"].(map[string]any)
	if path == "" && section != nil && len(mirrors) == 0 && (c.Major > 2 || c.Major == 2 && c.Minor >= 2) {
		return slices.Clone(CertsDirs) // which a dump may leave out
	}
	return filepath.SplitList(path)
}

// HostsDir returns the directory by which pilot reaches registries as this containerd does for
// the kubelet's images, or "" if it takes several, or there is nothing to read, or somebody
// should look at it: hosts on this machine may be pilot's own mirror, and a server for all
// registries would also be asked for those on this machine.
func (c *Instance) HostsDir(h host.Host) string {
	var used []string
	for _, dir := range c.HostsDirs(c.Plain) {
		if filepath.IsAbs(dir) && len(RegistriesIn(h, dir)) > 0 {
			used = append(used, dir)
		}
	}
	if len(used) != 1 {
		return ""
	}
	if _, cri := c.criSection(c.Plain); cri != nil && !slices.Contains(c.CRIHostsDirs(c.Plain), used[0]) {
		return ""
	}
	files, err := RegistryFiles(h, used[0])
	if err != nil {
		return ""
	}
	for file, hosts := range files {
		if hosts.onThisMachine() || hosts.Server != "" && filepath.Base(filepath.Dir(file)) == "_default" {
			return ""
		}
	}
	return used[0]
}

// RegistriesIn returns the directories of registries in one of [Instance.HostsDirs] that say how
// to reach them, by a hosts.toml or by certificates as Docker has them.
func RegistriesIn(h host.Host, dir string) (dirs []string) {
	for _, name := range []string{"hosts.toml", "*.crt"} {
		files, _ := h.Glob(filepath.Join(dir, "*", name))
		for _, file := range files {
			dirs = append(dirs, filepath.Dir(file))
		}
	}
	slices.Sort(dirs)
	return slices.Compact(dirs)
}

// RegistryHosts are the hosts in a hosts.toml.
type RegistryHosts struct {
	Server string         `toml:"server"`
	Hosts  map[string]any `toml:"host"`
}

// onThisMachine reports whether one of them is, or can't be read.
func (r RegistryHosts) onThisMachine() bool {
	for text := range r.Hosts {
		if u, err := HostURL(text); err != nil || loopback.Is(u.Hostname()) {
			return true
		}
	}
	u, err := HostURL(r.Server)
	return err != nil || loopback.Is(u.Hostname())
}

// HostURL returns the URL of a host in a hosts.toml, which may lack the scheme.
func HostURL(text string) (*url.URL, error) {
	if !strings.Contains(text, "://") {
		text = "https://" + text
	}
	return url.Parse(text)
}

// RegistryFiles returns what the hosts.toml in directories say, by file. A file that containerd
// can't read either is an error.
func RegistryFiles(h host.Host, dirs ...string) (map[string]RegistryHosts, error) {
	found := map[string]RegistryHosts{}
	var errs []error
	for _, dir := range dirs {
		files, err := h.Glob(filepath.Join(dir, "*", "hosts.toml"))
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			var hosts RegistryHosts
			b, err := h.ReadFile(file)
			if err == nil {
				err = toml.Unmarshal(b, &hosts)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", file, err))
				continue
			}
			found[file] = hosts
		}
	}
	return found, errors.Join(errs...)
}
