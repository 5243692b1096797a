// Package node sets pilot up on a machine with containerd, and examines the
// result.
package node

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/pelletier/go-toml/v2"
)

// Options say what to install, and where.
type Options struct {
	// Root is the root directory of a machine that does not run, such as an
	// unpacked node image; empty for this machine.
	Root string
	// ContainerdBinary is containerd's program, looked for in PATH.
	// Default: containerd.
	ContainerdBinary string
	// ContainerdConfig is containerd's configuration file. Default:
	// /etc/containerd/config.toml.
	ContainerdConfig string
	// PilotBinary is pilot's program on the machine. Default: this one, or
	// with a Root what is in its usual directories.
	PilotBinary string
	// Settings are lines for a new pilot.toml, by their names.
	Settings map[string]string
	// KeepConfig has Uninstall leave pilot.toml and ocicrypt.conf.
	KeepConfig bool
}

// Plan is what an installation would change.
type Plan struct {
	// Changes are what it would write; none if all is as it should be.
	Changes []Change
	// Restart names the services that have to be restarted after it.
	Restart []string

	options  Options
	inserted map[string]string // by path, what is inserted into a file that is somebody else's
	check    func(context.Context) error
	release  func()
}

// Close lets others install.
func (p *Plan) Close() { p.release() }

// Conflict is the error of a setting of the machine's own that an installation
// would have to overwrite, which it does not.
type Conflict struct{ Where, What, Mend string }

func (c *Conflict) Error() string { return fmt.Sprintf("%s: %s: %s", c.Where, c.What, c.Mend) }

const (
	keyProviders = "/etc/pilot/ocicrypt.conf"
	pilotConfig  = "/etc/pilot/pilot.toml"
	unitDir      = "/etc/systemd/system"
	dropInName   = "pilot.toml"
	diffSocket   = "/run/pilot/diff.sock"
	keySocket    = "/run/pilot/keyprovider.sock"
)

//go:embed units
var unitFiles embed.FS

// cleanRoot makes the root an absolute path, or empty for this machine's.
func (o *Options) cleanRoot() error {
	if o.Root == "" {
		return nil
	}
	root, err := filepath.Abs(o.Root)
	if err != nil {
		return err
	}
	if o.Root = root; root == "/" {
		o.Root = ""
	}
	return nil
}

func (o *Options) defaults() error {
	if err := o.cleanRoot(); err != nil {
		return err
	}
	if o.ContainerdBinary == "" {
		o.ContainerdBinary = "containerd"
	}
	if o.ContainerdConfig == "" {
		o.ContainerdConfig = "/etc/containerd/config.toml"
	}
	if o.PilotBinary == "" && o.Root == "" {
		var err error
		if o.PilotBinary, err = os.Executable(); err != nil {
			return err
		}
	}
	if o.PilotBinary != "" {
		return o.checkPilotBinary()
	}
	for _, name := range []string{"/usr/local/bin/pilot", "/usr/bin/pilot"} {
		if _, err := os.Stat(o.path(name)); err == nil {
			o.PilotBinary = name
			return nil
		}
	}
	return fmt.Errorf("there is no pilot in %s: put it into %s first", o.Root, o.path("/usr/local/bin"))
}

// NewPlan looks at a machine and plans an installation of pilot beside its
// containerd. The error is a [*Conflict] if a setting of the machine's own is
// in the way.
//
// Close has to be called when the plan is not needed any more: until then no
// other installation is made on the machine.
func NewPlan(ctx context.Context, o Options) (_ *Plan, err error) {
	if err := o.defaults(); err != nil {
		return nil, err
	}
	if strings.Contains(o.ContainerdConfig, "/rancher/") {
		return nil, &Conflict{o.ContainerdConfig, "k3s and RKE2 write it anew", "put what docs/containerd.md shows into their template of it"}
	}
	release, err := o.lock()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	if PullsWithCRIO(o) {
		return newCRIOPlan(o, release)
	}
	c, err := look(ctx, o)
	if err != nil {
		return nil, err
	}
	before, err := o.readState()
	if err != nil {
		return nil, err
	}
	p := &Plan{options: o, inserted: make(map[string]string), release: release}
	var conf []byte
	if c.usesDiffer() {
		conf, err = c.differConfig(o)
	} else {
		conf, err = c.processorConfig(o)
	}
	if err != nil {
		return nil, err
	}
	if err := p.containerdFiles(c, before, conf); err != nil {
		return nil, err
	}
	forContainerd := len(p.Changes)
	p.check = func(ctx context.Context) error { return c.check(ctx, o) }

	if err := p.pilotConfig(c, before); err != nil {
		return nil, err
	}
	if err := p.own(before, keyProviders, []byte(`{"key-providers": {"pilot": {"grpc": "unix://`+keySocket+`"}}}`+"\n"), checkKeyProviders); err != nil {
		return nil, err
	}
	if o.hasSystemd() {
		if err := p.units(before, c.usesDiffer()); err != nil {
			return nil, err
		}
	}
	if len(p.Changes) > forContainerd {
		p.Restart = append(p.Restart, pilotService)
	}
	if forContainerd > 0 {
		p.Restart = append(p.Restart, containerdService)
	}
	return p, nil
}

// differConfig returns containerd's configuration for pilot's differ.
func (c *containerd) differConfig(o Options) ([]byte, error) {
	if proxies, _ := c.dump["proxy_plugins"].(map[string]any); proxies["pilot"] != nil {
		had, _ := proxies["pilot"].(map[string]any)
		if had["type"] != "diff" || had["address"] != diffSocket {
			return nil, &Conflict{c.main, fmt.Sprintf("there is a proxy plugin pilot of type %v at %v", had["type"], had["address"]), "remove it, or make it type diff at " + diffSocket}
		}
	}
	order := []string{"pilot"}
	for _, name := range stringsOf(c.plugin(diffService)["default"]) {
		if name != "pilot" {
			order = append(order, name)
		}
	}
	service := map[string]any{"default": order}
	if sync, _ := c.plugin(diffService)["sync_fs"].(bool); sync {
		service["sync_fs"] = true // 1.7 takes the section of one file only
	}
	plugins := map[string]any{diffService: service}
	if c.hasTransfer() {
		platform, err := o.platform()
		if err != nil {
			return nil, err
		}
		entries, err := c.unpackConfigs(platform)
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
			case e.Differ == "pilot":
			default:
				if ours {
					return nil, &Conflict{c.main, fmt.Sprintf("the transfer service unpacks images of the kubelet, for snapshotter %s, with the differ %s", e.Snapshotter, e.Differ), "remove that entry of unpack_config, or make its differ pilot"}
				}
			}
		}
		if !found {
			entries = append(entries, unpackConfig{Platform: platforms.Format(platform), Snapshotter: c.snapshotter(), Differ: "pilot"})
		}
		plugins[transferService] = map[string]any{"unpack_config": entries}
	}
	return c.render(map[string]any{
		"proxy_plugins": map[string]any{"pilot": map[string]any{"type": "diff", "address": diffSocket}},
		"plugins":       plugins,
	})
}

// processorConfig returns containerd 1.6's configuration, for pilot-decoder.
func (c *containerd) processorConfig(o Options) ([]byte, error) {
	decryption, _ := c.plugin(criV1)["image_decryption"].(map[string]any)
	if model, _ := decryption["key_model"].(string); model != "node" {
		return nil, &Conflict{c.main, fmt.Sprintf("image_decryption.key_model is %q", model), `make it "node"`}
	}
	decoder := filepath.Join(filepath.Dir(o.PilotBinary), "pilot-decoder")
	if _, err := os.Stat(o.path(decoder)); err != nil {
		return nil, fmt.Errorf("containerd %d.%d needs pilot-decoder beside pilot: %w", c.major, c.minor, err)
	}
	const layer = "application/vnd.oci.image.layer.v1."
	processors := make(map[string]any)
	for id, accepts := range map[string][]string{
		"tar": {layer + "tar+encrypted"},
		// The kubelet's pulls name no third processor; containerd finds out
		// by itself how a layer is compressed.
		"tar.gzip": {layer + "tar+gzip+encrypted", layer + "tar+zstd+encrypted"},
	} {
		processors["io.containerd.ocicrypt.decoder.v1."+id] = map[string]any{
			"accepts": accepts,
			"returns": layer + strings.ReplaceAll(id, ".", "+"),
			"path":    decoder,
			"env":     []string{"OCICRYPT_KEYPROVIDER_CONFIG=" + keyProviders},
		}
	}
	had, _ := c.dump["stream_processors"].(map[string]any)
	for _, id := range slices.Sorted(maps.Keys(had)) {
		section, _ := had[id].(map[string]any)
		path, _ := section["path"].(string)
		if path == decoder || path == "ctd-decoder" && processors[id] != nil {
			continue // containerd's default has imgcrypt's decoder, there or not
		}
		for _, mt := range stringsOf(section["accepts"]) {
			if strings.HasSuffix(mt, "+encrypted") {
				return nil, &Conflict{c.main, fmt.Sprintf("the stream processor %s at %s takes encrypted layers", id, path), "remove it"}
			}
		}
	}
	return c.render(map[string]any{"stream_processors": processors})
}

func (c *containerd) render(conf map[string]any) ([]byte, error) {
	b, err := toml.Marshal(conf)
	if err != nil {
		return nil, err
	}
	return append(fmt.Appendf(nil, "# Written by \"pilot node install\"; \"pilot node uninstall\" removes it.\nversion = %d\n\n", c.format()), b...), nil
}

// containerdFiles plans the drop-in, and the line that makes containerd read it
// if it reads none.
func (p *Plan) containerdFiles(c *containerd, before state, conf []byte) error {
	dir, ok := c.dropInDir()
	if !ok {
		dir = filepath.Join(filepath.Dir(c.main), "conf.d")
	}
	dropIn := filepath.Join(dir, dropInName)
	// A pattern, since containerd starts if nothing matches it.
	pattern := strings.TrimSuffix(dropIn, ".toml") + "*.toml"
	if err := p.own(before, dropIn, conf, nil); err != nil {
		return err
	}
	if ok {
		return nil
	}
	old, err := os.ReadFile(p.options.path(c.main))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if f := before.file(c.main); f != nil && f.Inserted != "" && strings.Contains(string(old), f.Inserted) {
		return nil
	}
	mode := fs.FileMode(0o644)
	if info, err := os.Stat(p.options.path(c.main)); err == nil {
		mode = info.Mode().Perm()
	}
	if err != nil {
		text, inserted := insertImport(fmt.Sprintf("version = %d\n", c.format()), pattern)
		p.Changes = append(p.Changes, Change{Path: c.main, New: []byte(text), Mode: mode})
		p.inserted[c.main] = inserted
		return nil
	}
	edited, inserted := insertImport(string(old), pattern)
	p.Changes = append(p.Changes, Change{Path: c.main, Old: old, New: []byte(edited), Mode: mode})
	p.inserted[c.main] = inserted
	return nil
}

// check checks that containerd's configuration comes to what it should.
func (c *containerd) check(ctx context.Context, o Options) error {
	if err := c.load(ctx, o); err != nil {
		return err
	}
	if !c.usesDiffer() {
		if processors, _ := c.dump["stream_processors"].(map[string]any); processors["io.containerd.ocicrypt.decoder.v1.tar"] == nil {
			return errors.New("containerd does not read the new configuration")
		}
		return nil
	}
	if order := stringsOf(c.plugin(diffService)["default"]); len(order) == 0 || order[0] != "pilot" {
		return fmt.Errorf("containerd's differs are %q all the same: is the plugin %s configured by another of its files?", order, diffService)
	}
	if !c.hasTransfer() {
		return nil
	}
	platform, err := o.platform()
	if err != nil {
		return err
	}
	entries, err := c.unpackConfigs(platform)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Snapshotter == c.snapshotter() && e.Platform == platforms.Format(platform) && e.Differ == "pilot" {
			return nil
		}
	}
	return fmt.Errorf("containerd's transfer service does not unpack with pilot all the same: is the plugin %s configured by another of its files?", transferService)
}

// Install makes the plan's changes. If one fails, or containerd's configuration
// does not come to what it should, all of them are put back.
func (p *Plan) Install(ctx context.Context) error {
	if len(p.Changes) == 0 {
		return p.check(ctx)
	}
	before, err := p.options.readState()
	if err != nil {
		return err
	}
	s := state{Files: slices.Clone(before.Files), Dirs: slices.Clone(before.Dirs)}
	s.noteDir(p.options, stateDir)
	for _, c := range p.Changes {
		s.note(p.options, c, p.inserted[c.Path])
	}
	// First the note, so that what was begun can be undone if this is killed.
	if err := p.options.writeState(s); err != nil {
		return err
	}
	var owed []string
	if p.options.Root == "" {
		owed = slices.DeleteFunc(slices.Clone(p.Restart), func(s string) bool { return slices.Contains(p.options.pending(), s) })
		if err := p.options.owe(owed); err != nil {
			return err
		}
	}
	for _, c := range p.Changes {
		if err = c.make(p.options); err != nil {
			err = fmt.Errorf("%s: %w", c.Path, err)
			break
		}
	}
	if err == nil {
		if err = p.check(ctx); err == nil {
			return nil
		}
	}
	for _, c := range slices.Backward(p.Changes) {
		err = errors.Join(err, c.revert(p.options))
	}
	err = errors.Join(err, p.options.writeState(before), p.options.forgive(owed))
	p.options.removeDirs(s.Dirs[len(before.Dirs):])
	return err
}
