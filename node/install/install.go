// Package install adds pilot to a machine with containerd or CRI-O, and takes it away
// again. It owns pilot's files there, pilot's part of containerd's configuration (see
// containerd_dropin.go), the systemd units, and the record of what was changed, with
// which [Uninstall] puts everything back byte for byte.
//
// A change is planned first ([NewPlan]) and tried on copies of containerd's files;
// what would change any setting but pilot's is refused with a [host.Conflict].
package install

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/crio"
	"github.com/ctrlplane/pilot/node/host"
)

// Options say what to install, and where.
type Options struct {
	host.Host
	// Containerd is the one to set up. One that runs has to have the program, the
	// file and the socket that are named. Default: the one that runs, or else the one
	// that containerd.service starts, or containerd in PATH with
	// /etc/containerd/config.toml.
	Containerd containerd.Named
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
	containerd *containerd.Instance
	expected   map[string]any    // containerd's configuration with them
	deferred   bool              // which containerd reads once it is started by what it is part of
	inserted   map[string]string // by path, what is inserted into a file that is somebody else's
	release    func()
}

// Runtime describes the containerd or the CRI-O that the plan is for.
func (p *Plan) Runtime() string {
	c := p.containerd
	if c == nil {
		return "CRI-O (" + crio.Service + ")"
	}
	of := c.Service
	if c.Name != "" {
		of = c.Name + ", " + of
	}
	return fmt.Sprintf("containerd %d.%d (%s), %s, configured by %s", c.Major, c.Minor, of, c.Program, c.Config)
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
	return files, StateFile + ": " + p.lost
}

// Close lets others install.
func (p *Plan) Close() { p.release() }

const (
	keyProviders = "/etc/pilot/ocicrypt.conf"
	pilotConfig  = "/etc/pilot/pilot.toml"
	keySocket    = "/run/pilot/keyprovider.sock"
)

// keyProvidersText is a new ocicrypt.conf.
const keyProvidersText = `{"key-providers": {"pilot": {"grpc": "unix://` + keySocket + `"}}}` + "\n"

//go:embed units
var unitFiles embed.FS

func (o *Options) defaults() error {
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
		if o.Has(name) {
			o.PilotBinary = name
			return nil
		}
	}
	return fmt.Errorf("there is no pilot in %s: put it into %s first", o.Root, o.Path("/usr/local/bin"))
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
	if crio.PullsImages(o.Host, o.Containerd) {
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
	if c.UsesDiffer() {
		if keys, env, err = decoderSettings(c, o.Host); err != nil {
			return nil, err
		}
	}
	if err := p.pilotConfig(c, before, keys); err != nil {
		return nil, err
	}
	if err := p.own(before, keyProviders, []byte(keyProvidersText), checkKeyProviders); err != nil {
		return nil, err
	}
	if o.HasSystemd() {
		if err := p.units(before, c.UsesDiffer()); err != nil {
			return nil, err
		}
		if err := p.unitDropIns(before, env); err != nil {
			return nil, err
		}
	}
	if len(p.Changes) > forContainerd {
		p.Restart = append(p.Restart, PilotService)
	}
	if forContainerd > 0 {
		p.Restart = append(p.Restart, c.Service)
	}
	return p, nil
}

// look finds the machine's containerd, and examines it.
func look(ctx context.Context, o Options, before state) (*containerd.Instance, error) {
	t, err := containerd.Find(o.Host, o.Containerd)
	if err != nil {
		return nil, err
	}
	c, err := containerd.Examine(ctx, o.Host, *t, before.dropIns())
	if err != nil {
		return nil, err
	}
	return c, c.CheckAddress(o.Containerd)
}

// containerdFiles plans the drop-in, and the line that makes containerd read it
// if it reads none.
func (p *Plan) containerdFiles(ctx context.Context, before state) error {
	c := p.containerd
	d, expected, err := newDropIn(ctx, c, p.options)
	if err != nil {
		return err
	}
	p.expected, p.deferred = expected, d.Template || d.Path == d.Pattern
	// One that was installed under another name goes.
	for _, path := range c.Ours {
		if path != d.Path {
			if err := p.remove(before, path); err != nil {
				return err
			}
		}
	}
	if err := p.own(before, d.Path, d.Text, nil); err != nil {
		return err
	}
	// A file that is rewritten at each start gets its imports then.
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
		return &host.Conflict{Where: c.Config, What: "its imports are written in a way that pilot can't add to", Fix: fmt.Sprintf("add %q to the list, as its last", d.Pattern)}
	}
	p.Changes = append(p.Changes, Change{Path: c.Config, Old: c.Files.Text, New: []byte(edited), Mode: mode})
	p.inserted[c.Config] = inserted
	return nil
}

// remove plans the removal of a file that was installed.
func (p *Plan) remove(before state, path string) error {
	old, err := p.options.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if f := before.file(path); f == nil || !f.is(old) {
		return &host.Conflict{Where: path, What: "it was changed since it was installed, and is not read as it has to be", Fix: "move it away"}
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
	dump, err := c.Dump(ctx, p.options.Host)
	if err != nil {
		return err
	}
	if changed := containerd.Differences(p.expected, dump, func([]string) bool { return false }); len(changed) > 0 {
		return fmt.Errorf("containerd's configuration is not what it came to when it was tried: %s", containerd.Summary(changed))
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
		s.Containerd = &installedTarget{c.Program, c.Config, c.Address, c.Service}
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
		owed = slices.DeleteFunc(slices.Clone(restart), func(s string) bool { return slices.Contains(Pending(p.options.Host), s) })
		if err := p.options.owe(owed); err != nil {
			return err
		}
	}
	var made []Change
	for _, c := range p.Changes {
		if err = c.make(p.options); err != nil {
			err = fmt.Errorf("%s: %w", c.Path, err)
			var fixed host.ImmutableError
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
