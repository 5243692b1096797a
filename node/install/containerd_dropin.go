package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// containerdFiles plans all changes of containerd's configuration: the drop-in that adds
// pilot, and the import of it if containerd's main file has none.
func (p *Plan) containerdFiles(ctx context.Context, before record) error {
	c := p.containerd
	if err := p.checkTemplate(before); err != nil {
		return err
	}
	d, expected, err := newDropIn(ctx, c, p.options, p.onlyNRI)
	if err != nil {
		return err
	}
	p.expected, p.deferred = expected, d.Template || d.Path == d.Pattern
	// Remove one that was installed under another name.
	for _, path := range c.Ours {
		if path != d.Path {
			if err := p.remove(before, path, "containerd must read another file instead"); err != nil {
				return err
			}
		}
	}
	if err := p.ownMode(before, d.Path, d.Text, d.mode, nil); err != nil {
		return err
	}
	// A file that its distribution rewrites at each start gets its imports then.
	if d.Pattern == "" || c.Rewritten {
		return nil
	}
	if f := before.file(c.Config); f != nil && f.Inserted != "" && strings.Contains(string(c.Files.Text), f.Inserted) {
		return nil
	}
	text := string(c.Files.Text)
	mode := fs.FileMode(0o644)
	if c.Files.Text == nil {
		text = fmt.Sprintf("version = %d\n", c.NewestFormat())
	} else if info, err := p.options.Stat(c.Config); err == nil {
		mode = info.Mode().Perm()
	}
	edited, inserted := insertImport(text, d.Pattern)
	if !importsToo(text, edited, d.Pattern) {
		return &host.Conflict{Where: c.Config, What: "pilot can't edit its list of imports", Fix: fmt.Sprintf("add %q to the end of the list", d.Pattern)}
	}
	p.Changes = append(p.Changes, Change{Path: c.Config, Old: c.Files.Text, New: []byte(edited), Mode: mode})
	p.inserted[c.Config] = inserted
	return nil
}

// checkTemplate returns a [host.Conflict] if k3s or RKE2 has a template of its owner's.
func (p *Plan) checkTemplate(before record) error {
	c, d := p.containerd, candidates(p.containerd)[0]
	if !d.Template {
		return nil
	}
	text, err := p.options.ReadFile(d.Path)
	if f := before.file(d.Path); err != nil || f != nil && f.is(text) {
		return host.IgnoreNotExist(err)
	}
	return &host.Conflict{Where: d.Path, What: fmt.Sprintf("it is not as pilot wrote it, and this version of %s reads no other file", c.Name), Fix: fmt.Sprintf("upgrade %s to a version since February 2026, or set pilot up by hand, as docs/k3s.md shows", c.Name)}
}

// The names of pilot's drop-in. The second is read after other tools' files, whose lists
// would replace pilot's.
const (
	dropInName     = "pilot.toml"
	lastDropInName = "zz-pilot.toml"
)

// isDropIn reports whether a file of an installation is a drop-in of containerd's
// configuration.
func isDropIn(path string) bool {
	name := filepath.Base(path)
	return (name == dropInName || name == lastDropInName || strings.HasSuffix(name, ".toml.tmpl")) && path != pilotConfig
}

// dropIns returns pilot's drop-ins in the record.
func (s *record) dropIns() []string {
	var paths []string
	for _, f := range s.Files {
		if isDropIn(f.Path) {
			paths = append(paths, f.Path)
		}
	}
	return paths
}

// newDropIn finds a drop-in that adds pilot to containerd's configuration, or only its NRI
// plugin, and changes nothing else. It also returns the effective configuration with it.
func newDropIn(ctx context.Context, c *containerd.Instance, o Options, onlyNRI bool) (*candidate, map[string]any, error) {
	if c.Rewritten && c.Files.Text == nil {
		return nil, nil, &host.Conflict{Where: c.Config, What: "it does not exist yet: " + c.Name + " writes it when it starts", Fix: "start " + c.Name + " once, and run this again"}
	}
	header, works := writtenBy, effective
	conf, mode, err := additions(c, o)
	if onlyNRI {
		header, works = leftOut, asking
		conf, mode, err = map[string]any{"plugins": map[string]any{containerd.NRI: c.WorkloadsSection()}}, 0o644, nil
	}
	if err != nil {
		return nil, nil, err
	}
	var failure error // of the first, which is the best
	for _, d := range candidates(c) {
		d.header, d.mode = header, mode
		if err := d.render(conf); err != nil {
			return nil, nil, err
		}
		dump, err := c.Trial(ctx, o.Host, &d.DropIn)
		if err == nil {
			if changed := containerd.Differences(c.Plain, dump, c.SetByPilot()); len(changed) > 0 {
				err = fmt.Errorf("with it containerd %d.%d would change other settings: %s", c.Major, c.Minor, containerd.Summary(changed))
			} else if err = works(c, dump, o.Host); err == nil {
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
	return nil, nil, &host.Conflict{Where: c.Config, What: fmt.Sprintf("pilot can't be added without changing other settings: %s", failure), Fix: "remove what is in the way from containerd's files"}
}

func (d *candidate) describe() string {
	switch {
	case d.format.Version > 0:
		return fmt.Sprintf("%s with version = %d", d.Path, d.format.Version)
	case d.format.Short:
		return d.Path + " without a version, with plugins' short names"
	}
	return d.Path + " without a version"
}

// candidate is a drop-in to try.
type candidate struct {
	containerd.DropIn
	format containerd.Format
	header string
	mode   fs.FileMode
}

// candidates returns the drop-ins to try, the best first.
func candidates(c *containerd.Instance) []candidate {
	var list []candidate
	dir, isImported := c.Files.DropInDir()
	if !isImported && c.Template {
		name := "config.toml.tmpl"
		if c.Files.Version == 3 {
			name = "config-v3.toml.tmpl"
		}
		return []candidate{{DropIn: containerd.DropIn{Path: filepath.Join(filepath.Dir(c.Config), name), Template: true}, format: containerd.Format{Version: c.Files.Version}}}
	}
	for _, f := range c.Formats() {
		switch {
		case isImported:
			for _, name := range []string{dropInName, lastDropInName} {
				list = append(list, candidate{DropIn: containerd.DropIn{Path: filepath.Join(dir, name)}, format: f})
			}
		case c.DropIns != "":
			path := filepath.Join(c.DropIns, dropInName)
			list = append(list, candidate{DropIn: containerd.DropIn{Path: path, Pattern: path}, format: f})
		default:
			path := filepath.Join(filepath.Dir(c.Config), "conf.d", dropInName)
			d := candidate{DropIn: containerd.DropIn{Path: path}, format: f}
			if !c.Files.Matches(path) {
				// A pattern, since containerd does not start if a file is missing that is
				// imported by name.
				d.Pattern = strings.TrimSuffix(path, ".toml") + "*.toml"
			}
			list = append(list, d)
		}
	}
	return list
}

// additions returns the settings to add to containerd's configuration, and the mode of the
// file.
func additions(c *containerd.Instance, o Options) (conf map[string]any, mode fs.FileMode, err error) {
	mode = 0o644
	if !c.UsesDiffer() {
		conf, err = processorConfig(c, o)
		return conf, mode, err
	}
	if conf, err = differConfig(c, o.Host); err != nil {
		return nil, mode, err
	}
	if section := c.WorkloadsSection(); c.Workloads && section != nil {
		conf["plugins"].(map[string]any)[containerd.NRI] = section
	}
	if c.Lazy == containerd.LazyOff {
		return conf, mode, nil
	}
	conf["proxy_plugins"].(map[string]any)[containerd.LazySnapshotter] = containerd.LazyProxy(c.Lazy)
	if c.Lazy == containerd.LazyEnding {
		return conf, mode, nil
	}
	id, section, secret := c.LazyCRI()
	if section != nil {
		conf["plugins"].(map[string]any)[id] = section
	}
	if secret {
		mode = 0o600
	}
	return conf, mode, nil
}

// render writes the file's text.
func (d *candidate) render(conf map[string]any) error {
	if d.format.Short {
		conf = withShortIDs(conf)
	}
	b, err := toml.Marshal(conf)
	if err != nil {
		return err
	}
	switch {
	case d.Template:
		d.Appended = b
		d.Text = append([]byte(d.header+containerd.TemplateBase+containerd.TemplateMark), b...)
	case d.format.Version == 0:
		d.Text = append([]byte(d.header+"\n"), b...)
	default:
		d.Text = append(fmt.Appendf(nil, "%sversion = %d\n\n", d.header, d.format.Version), b...)
	}
	return nil
}

// shortIDs are the short names of the plugins that pilot's drop-in configures there.
var shortIDs = map[string]string{containerd.DiffService: "diff-service", containerd.CRIV1: "cri", containerd.NRI: "nri"}

// withShortIDs names plugins as containerd 1.x expects if none of its files has a
// version.
func withShortIDs(conf map[string]any) map[string]any {
	plugins, ok := conf["plugins"].(map[string]any)
	if !ok {
		return conf
	}
	short := map[string]any{}
	for id, section := range plugins {
		if name, found := shortIDs[id]; found {
			id = name
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

// differConfig returns the settings for pilot's differ. Lists contain what containerd has
// without pilot, since the file that is read last replaces the whole list.
func differConfig(c *containerd.Instance, h host.Host) (map[string]any, error) {
	if had, ok := containerd.PilotProxy(c.Plain); ok && (had.Kind != "diff" || had.At != containerd.DiffSocket) {
		return nil, &host.Conflict{Where: c.Config, What: fmt.Sprintf("there is a proxy plugin pilot of type %s at %s", had.Kind, had.At), Fix: "remove it, or make it type diff at " + containerd.DiffSocket}
	}
	order := []string{"pilot"}
	for _, name := range containerd.Strings(containerd.Plugin(c.Plain, containerd.DiffService)["default"]) {
		if name != "pilot" {
			order = append(order, name)
		}
	}
	service := map[string]any{"default": order}
	if sync, _ := containerd.Plugin(c.Plain, containerd.DiffService)["sync_fs"].(bool); sync {
		service["sync_fs"] = true // 1.7 takes the section of one file only
	}
	plugins := map[string]any{containerd.DiffService: service}
	if c.HasTransfer() {
		entries, err := c.UnpackConfigsWithPilot(h)
		if err != nil {
			return nil, err
		}
		plugins[containerd.TransferService] = map[string]any{"unpack_config": entries}
	}
	return map[string]any{
		"proxy_plugins": map[string]any{"pilot": map[string]any{"type": "diff", "address": containerd.DiffSocket}},
		"plugins":       plugins,
	}, nil
}

// asking checks that a configuration makes containerd ask pilot about each container.
func asking(c *containerd.Instance, dump map[string]any, _ host.Host) error {
	if missing := c.NotAsking(dump); missing != "" {
		return errors.New(missing)
	}
	return nil
}

// effective checks that a configuration makes containerd decrypt with pilot.
func effective(c *containerd.Instance, dump map[string]any, h host.Host) error {
	if !c.UsesDiffer() {
		for id := range containerd.Decoders {
			if p := containerd.ProcessorIn(dump, id); filepath.Base(p.Path) != "pilot-decoder" {
				return fmt.Errorf("the stream processor %s is still %q: another file sets it", id, p.Path)
			}
		}
		return nil
	}
	if p, _ := containerd.PilotProxy(dump); p.Kind != "diff" || p.At != containerd.DiffSocket {
		return errors.New("there is still no proxy plugin pilot: containerd does not read the file")
	}
	if order := containerd.Strings(containerd.Plugin(dump, containerd.DiffService)["default"]); len(order) == 0 || order[0] != "pilot" {
		return fmt.Errorf("containerd's differs are still %q: is the plugin %s configured by another of its files?", order, containerd.DiffService)
	}
	platform, err := c.Platform(h)
	if err != nil {
		return err
	}
	if c.Lazy == containerd.LazyOn {
		if missing, err := c.NotLazy(dump, platform); err != nil || missing != "" {
			return errors.Join(err, errors.New(missing))
		}
	}
	if c.Workloads {
		if err := asking(c, dump, h); err != nil {
			return err
		}
	}
	if !c.HasTransfer() {
		return nil
	}
	differ, err := c.UnpacksWith(dump, platform, c.Snapshotter())
	if err == nil && differ != "pilot" {
		err = fmt.Errorf("containerd's transfer service still does not unpack with pilot: is the plugin %s configured by another of its files?", containerd.TransferService)
	}
	return err
}
