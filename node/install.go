// Package node sets pilot up on a machine with containerd, and examines the
// result.
package node

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Options say what to install, and where.
type Options struct {
	// Root is the root directory of a machine that does not run, such as an
	// unpacked node image; empty for this machine.
	Root string
	// TrustRoot has programs of Root run in a bare chroot instead of a sandbox.
	TrustRoot bool
	// ContainerdBinary, ContainerdConfig and ContainerdAddress name the
	// containerd to set up: its program, its configuration file, and its
	// socket's path. One that runs has to have those that are given. Default:
	// the one that runs, or else the one that containerd.service starts, or
	// containerd in PATH with /etc/containerd/config.toml.
	ContainerdBinary, ContainerdConfig, ContainerdAddress string
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

	options    Options
	before     *state // nil: as it is noted
	lost       string // why before was made again from files; empty: it was not
	containerd *containerd
	expected   map[string]any    // containerd's configuration with them
	deferred   bool              // which containerd reads once it is started by what it is part of
	inserted   map[string]string // by path, what is inserted into a file that is somebody else's
	release    func()
}

// Runtime describes the containerd or the CRI-O that the plan is for.
func (p *Plan) Runtime() string {
	c := p.containerd
	if c == nil {
		return "CRI-O (" + CRIOService + ")"
	}
	of := c.service
	if c.name != "" {
		of = c.name + ", " + of
	}
	return fmt.Sprintf("containerd %d.%d (%s), %s, configured by %s", c.major, c.minor, of, c.program, c.config)
}

// Adopted returns files that an earlier installation has written and of which no
// note was left, and why. The plan takes them over.
func (p *Plan) Adopted() (files []string, why string) {
	if p.lost == "" {
		return nil, ""
	}
	for _, f := range p.before.Files {
		files = append(files, f.Path)
	}
	return files, stateFile + ": " + p.lost
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
	diffSocket   = "/run/pilot/diff.sock"
	keySocket    = "/run/pilot/keyprovider.sock"
)

// keyProvidersText is a new ocicrypt.conf.
const keyProvidersText = `{"key-providers": {"pilot": {"grpc": "unix://` + keySocket + `"}}}` + "\n"

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
		if o.has(name) {
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
	release, err := o.lock()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			release()
		}
	}()
	before, lost, err := o.loadState()
	if err != nil {
		return nil, err
	}
	p := &Plan{options: o, before: &before, lost: lost, inserted: make(map[string]string), release: release}
	if PullsWithCRIO(o) {
		return p, p.forCRIO(before)
	}
	c, err := look(ctx, o, before)
	if err != nil {
		return nil, err
	}
	p.containerd = c
	if err := p.containerdFiles(ctx, before); err != nil {
		return nil, err
	}
	forContainerd := len(p.Changes)
	var keys string
	var env []string
	if c.usesDiffer() {
		if keys, env, err = c.decoderSettings(o); err != nil {
			return nil, err
		}
	}
	if err := p.pilotConfig(c, before, keys); err != nil {
		return nil, err
	}
	if err := p.own(before, keyProviders, []byte(keyProvidersText), checkKeyProviders); err != nil {
		return nil, err
	}
	if o.hasSystemd() {
		if err := p.units(before, c.usesDiffer()); err != nil {
			return nil, err
		}
		if err := p.unitDropIns(before, env); err != nil {
			return nil, err
		}
	}
	if len(p.Changes) > forContainerd {
		p.Restart = append(p.Restart, pilotService)
	}
	if forContainerd > 0 {
		p.Restart = append(p.Restart, c.service)
	}
	return p, nil
}

// containerdFiles plans the drop-in, and the line that makes containerd read it
// if it reads none.
func (p *Plan) containerdFiles(ctx context.Context, before state) error {
	c := p.containerd
	d, expected, err := c.newDropIn(ctx, p.options)
	if err != nil {
		return err
	}
	p.expected, p.deferred = expected, d.template || d.path == d.pattern
	// One that was installed under another name goes.
	for _, path := range c.ours {
		if path != d.path {
			if err := p.remove(before, path); err != nil {
				return err
			}
		}
	}
	if err := p.own(before, d.path, d.text, nil); err != nil {
		return err
	}
	// A file that is rewritten at each start gets its imports then.
	if d.pattern == "" || c.rewritten {
		return nil
	}
	if f := before.file(c.config); f != nil && f.Inserted != "" && strings.Contains(string(c.files.text), f.Inserted) {
		return nil
	}
	text := string(c.files.text)
	mode := fs.FileMode(0o644)
	if c.files.text == nil {
		text = fmt.Sprintf("version = %d\n", c.newestFormat())
	} else if info, err := p.options.stat(c.config); err == nil {
		mode = info.Mode().Perm()
	}
	edited, inserted := insertImport(text, d.pattern)
	if !importsToo(text, edited, d.pattern) {
		return &Conflict{c.config, "its imports are written in a way that pilot can't add to", fmt.Sprintf("add %q to the list, as its last", d.pattern)}
	}
	p.Changes = append(p.Changes, Change{Path: c.config, Old: c.files.text, New: []byte(edited), Mode: mode})
	p.inserted[c.config] = inserted
	return nil
}

// remove plans the removal of a file that was installed.
func (p *Plan) remove(before state, path string) error {
	old, err := p.options.readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if f := before.file(path); f == nil || !f.is(old) {
		return &Conflict{path, "it was changed since it was installed, and is not read as it has to be", "move it away"}
	}
	p.Changes = append(p.Changes, Change{Path: path, Old: old, Mode: 0o644, Remove: true})
	return nil
}

// check checks that containerd's configuration has come to what it did when it
// was tried.
func (p *Plan) check(ctx context.Context) error {
	c := p.containerd
	if c == nil || p.deferred {
		return nil
	}
	dump, err := c.readAll(ctx, p.options)
	if err != nil {
		return err
	}
	if changed := differences(p.expected, dump, func([]string) bool { return false }); len(changed) > 0 {
		return fmt.Errorf("containerd's configuration is not what it came to when it was tried: %s", listed(changed))
	}
	return nil
}

// Install makes the plan's changes. If one fails, or containerd's configuration
// does not come to what it should, all of them are put back. What can't be, since
// the disk is full for example, stays noted for [Uninstall].
func (p *Plan) Install(ctx context.Context) error {
	if len(p.Changes) == 0 && p.lost == "" {
		return p.check(ctx)
	}
	return p.apply(ctx, p.Restart)
}

// apply makes the changes, for which services have to be restarted.
func (p *Plan) apply(ctx context.Context, restart []string) error {
	var err error
	if p.before == nil {
		s, err := p.options.readState()
		if err != nil {
			return err
		}
		p.before = &s
	}
	before := *p.before
	s := before
	s.Files, s.Dirs = slices.Clone(before.Files), slices.Clone(before.Dirs)
	if c := p.containerd; c != nil {
		s.Containerd = &installedTarget{c.program, c.config, c.address, c.service}
	}
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
		owed = slices.DeleteFunc(slices.Clone(restart), func(s string) bool { return slices.Contains(p.options.pending(), s) })
		if err := p.options.owe(owed); err != nil {
			return err
		}
	}
	var made []Change
	for _, c := range p.Changes {
		if err = c.make(p.options); err != nil {
			err = fmt.Errorf("%s: %w", c.Path, err)
			var fixed errFixed
			if inserted := p.inserted[c.Path]; inserted != "" && errors.As(err, &fixed) {
				err = fmt.Errorf("%w; with %q in its imports this leaves it as it is", err, imported(inserted))
			}
			break
		}
		made = append(made, c)
	}
	if err == nil {
		if err = p.check(ctx); err == nil {
			if !slices.ContainsFunc(p.Changes, func(c Change) bool { return c.Remove }) {
				return nil
			}
			s.forget(p.Changes)
			return p.options.writeState(s)
		}
	}
	var reverting error
	for _, c := range slices.Backward(made) {
		if err := c.revert(p.options); err != nil {
			reverting = errors.Join(reverting, fmt.Errorf("%s is not put back: %w", c.Path, err))
		}
	}
	if reverting != nil {
		return errors.Join(err, reverting, errors.New("\"pilot node uninstall\" puts back what is left"))
	}
	err = errors.Join(err, p.options.writeState(before), p.options.forgive(owed))
	p.options.removeDirs(s.Dirs[len(before.Dirs):])
	return err
}
