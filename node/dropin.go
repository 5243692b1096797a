package node

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/pelletier/go-toml/v2"
)

// The names of pilot's drop-in. The second comes after the files of others, whose
// lists would replace pilot's.
const (
	dropInName     = "pilot.toml"
	lastDropInName = "zz-pilot.toml"
)

// isDropIn reports whether a file of an installation is what adds pilot to
// containerd's configuration.
func isDropIn(path string) bool {
	name := filepath.Base(path)
	return (name == dropInName || name == lastDropInName || strings.HasSuffix(name, ".toml.tmpl")) && path != pilotConfig
}

// dropIns returns pilot's drop-ins that were installed.
func (s *state) dropIns() []string {
	var paths []string
	for _, f := range s.Files {
		if isDropIn(f.Path) {
			paths = append(paths, f.Path)
		}
	}
	return paths
}

// newDropIn finds the drop-in that adds pilot to containerd's configuration and
// changes nothing else, with what the configuration comes to then.
func (c *containerd) newDropIn(ctx context.Context, o Options) (*dropIn, map[string]any, error) {
	if c.rewritten && c.files.text == nil {
		return nil, nil, &Conflict{c.config, "it does not exist yet: " + c.name + " writes it when it starts", "start " + c.name + " once, and run this again"}
	}
	conf, err := c.additions(o)
	if err != nil {
		return nil, nil, err
	}
	var failure error // of the best that was tried
	for _, d := range c.candidates(o) {
		if err := d.render(conf); err != nil {
			return nil, nil, err
		}
		dump, err := c.trial(ctx, o, &d)
		if err == nil {
			if changed := differences(c.plain, dump, c.setsOwn()); len(changed) > 0 {
				err = fmt.Errorf("containerd %d.%d would take more than pilot from it: %s", c.major, c.minor, listed(changed))
			} else if err = c.effective(dump, o); err == nil {
				return &d, dump, nil
			}
		}
		if ctx.Err() != nil {
			return nil, nil, ctx.Err()
		}
		if failure == nil {
			failure = fmt.Errorf("%s: %w", d.describe(), err)
		}
	}
	return nil, nil, &Conflict{c.config, fmt.Sprintf("pilot can't be added without changing something else: %s", failure), "take what is in the way out of containerd's files"}
}

func (d *dropIn) describe() string {
	switch {
	case d.format.version > 0:
		return fmt.Sprintf("%s with version = %d", d.path, d.format.version)
	case d.format.short:
		return d.path + " without a version, with plugins' short names"
	}
	return d.path + " without a version"
}

// candidates are the drop-ins to try, the best first.
func (c *containerd) candidates(o Options) []dropIn {
	var list []dropIn
	dir, isImported := c.files.dropInDir()
	if !isImported && c.template {
		name := "config.toml.tmpl"
		if c.files.version == 3 {
			name = "config-v3.toml.tmpl"
		}
		return []dropIn{{path: filepath.Join(filepath.Dir(c.config), name), format: format{version: c.files.version}, template: true}}
	}
	for _, f := range c.formats() {
		switch {
		case isImported:
			for _, name := range []string{dropInName, lastDropInName} {
				list = append(list, dropIn{path: filepath.Join(dir, name), format: f})
			}
		case c.dropIns != "":
			path := filepath.Join(c.dropIns, dropInName)
			list = append(list, dropIn{path: path, format: f, pattern: path})
		default:
			path := filepath.Join(filepath.Dir(c.config), "conf.d", dropInName)
			d := dropIn{path: path, format: f}
			if !c.files.matches(path) {
				// A pattern, since containerd starts if nothing matches it.
				d.pattern = strings.TrimSuffix(path, ".toml") + "*.toml"
			}
			list = append(list, d)
		}
	}
	return list
}

// setsOwn returns a function that reports whether a setting is one of pilot's
// drop-in's.
func (c *containerd) setsOwn() func(path []string) bool {
	if c.usesDiffer() {
		return setByDiffer
	}
	return setByDecoder
}

// additions returns what has to be added to containerd's configuration.
func (c *containerd) additions(o Options) (map[string]any, error) {
	if c.usesDiffer() {
		return c.differConfig(o)
	}
	return c.processorConfig(o)
}

// templateBase begins a template of k3s's with what k3s writes without it.
const templateBase = "{{ template \"base\" . }}\n\n"

// render writes the file's text.
func (d *dropIn) render(conf map[string]any) error {
	if d.format.short {
		conf = withShortIDs(conf)
	}
	b, err := toml.Marshal(conf)
	if err != nil {
		return err
	}
	switch {
	case d.template:
		d.appended = b
		d.text = append([]byte(writtenBy+templateBase), b...)
	case d.format.version == 0:
		d.text = append([]byte(writtenBy+"\n"), b...)
	default:
		d.text = append(fmt.Appendf(nil, "%sversion = %d\n\n", writtenBy, d.format.version), b...)
	}
	return nil
}

// withShortIDs names plugins as containerd 1.x wants it in files without a version
// if none of its files says one.
func withShortIDs(conf map[string]any) map[string]any {
	plugins, ok := conf["plugins"].(map[string]any)
	if !ok {
		return conf
	}
	short := map[string]any{}
	for id, section := range plugins {
		if id == diffService {
			id = "diff-service"
		}
		short[id] = section
	}
	renamed := map[string]any{"plugins": short}
	for key, v := range conf {
		if key != "plugins" {
			renamed[key] = v
		}
	}
	return renamed
}

// differConfig returns containerd's configuration for pilot's differ. Lists are
// those that containerd has without pilot's drop-in, since the file that is read
// last replaces them whole.
func (c *containerd) differConfig(o Options) (map[string]any, error) {
	if had, ok := proxyIn(c.plain); ok && (had.kind != "diff" || had.at != diffSocket) {
		return nil, &Conflict{c.config, fmt.Sprintf("there is a proxy plugin pilot of type %s at %s", had.kind, had.at), "remove it, or make it type diff at " + diffSocket}
	}
	order := []string{"pilot"}
	for _, name := range stringsOf(pluginIn(c.plain, diffService)["default"]) {
		if name != "pilot" {
			order = append(order, name)
		}
	}
	service := map[string]any{"default": order}
	if sync, _ := pluginIn(c.plain, diffService)["sync_fs"].(bool); sync {
		service["sync_fs"] = true // 1.7 takes the section of one file only
	}
	plugins := map[string]any{diffService: service}
	if c.hasTransfer() {
		entries, err := c.newUnpackConfigs(o)
		if err != nil {
			return nil, err
		}
		plugins[transferService] = map[string]any{"unpack_config": entries}
	}
	return map[string]any{
		"proxy_plugins": map[string]any{"pilot": map[string]any{"type": "diff", "address": diffSocket}},
		"plugins":       plugins,
	}, nil
}

// newUnpackConfigs returns the entries of unpack_config with pilot as the differ.
func (c *containerd) newUnpackConfigs(o Options) ([]unpackConfig, error) {
	platform, err := c.platform(o)
	if err != nil {
		return nil, err
	}
	entries, err := c.unpackConfigs(c.plain, platform)
	if err != nil {
		return nil, err
	}
	found := false
	for i := range entries {
		e := &entries[i]
		ours := e.Snapshotter == c.snapshotter() && e.Platform == platforms.Format(platform)
		found = found || ours
		switch {
		case e.Differ == "" || e.Differ == "walking" || e.Differ == "erofs" && c.plainErofs():
			e.Differ = "pilot"
		case e.Differ != "pilot" && ours:
			return nil, &Conflict{c.config, fmt.Sprintf("the transfer service unpacks images of the kubelet, for snapshotter %s, with the differ %s", e.Snapshotter, e.Differ), "remove that entry of unpack_config, or make its differ pilot"}
		}
	}
	if !found {
		entries = append(entries, unpackConfig{Platform: platforms.Format(platform), Snapshotter: c.snapshotter(), Differ: "pilot"})
	}
	return entries, nil
}

// effective checks that containerd decrypts with a configuration.
func (c *containerd) effective(dump map[string]any, o Options) error {
	if !c.usesDiffer() {
		for id := range decoders {
			if p := processorIn(dump, id); filepath.Base(p.path) != "pilot-decoder" {
				return fmt.Errorf("the stream processor %s is still %q: another file sets it", id, p.path)
			}
		}
		return nil
	}
	if p, _ := proxyIn(dump); p.kind != "diff" || p.at != diffSocket {
		return errors.New("there is still no proxy plugin pilot: containerd does not read the file")
	}
	if order := stringsOf(pluginIn(dump, diffService)["default"]); len(order) == 0 || order[0] != "pilot" {
		return fmt.Errorf("containerd's differs are still %q: is the plugin %s configured by another of its files?", order, diffService)
	}
	if !c.hasTransfer() {
		return nil
	}
	platform, err := c.platform(o)
	if err != nil {
		return err
	}
	differ, err := c.unpacksWith(dump, platform, c.snapshotter())
	if err == nil && differ != "pilot" {
		err = fmt.Errorf("containerd's transfer service still does not unpack with pilot: is the plugin %s configured by another of its files?", transferService)
	}
	return err
}

// unpacksWith returns the differ with which the transfer service unpacks, nothing
// if it has no entry for the platform and the snapshotter.
func (c *containerd) unpacksWith(dump map[string]any, platform ocispec.Platform, snapshotter string) (differ string, err error) {
	entries, err := c.unpackConfigs(dump, platform)
	if err != nil {
		return "", err
	}
	for _, u := range entries {
		// The first that matches is the one that counts.
		p, err := platforms.Parse(u.Platform)
		if err == nil && u.Snapshotter == snapshotter && platforms.Only(p).Match(platform) {
			return u.Differ, nil
		}
	}
	return "", nil
}

// proxy is the proxy plugin pilot of a configuration.
type proxy struct{ kind, at string }

func proxyIn(dump map[string]any) (proxy, bool) {
	all, _ := dump["proxy_plugins"].(map[string]any)
	section, found := all["pilot"].(map[string]any)
	kind, _ := section["type"].(string)
	at, _ := section["address"].(string)
	return proxy{kind, socketOf(at)}, found
}
