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

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/crio"
	"github.com/ctrlplane/pilot/node/host"
)

// Options say what to install, and where.
type Options struct {
	host.Host
	// Containerd is the one to set up. If one runs, it must have the program, the file
	// and the socket named here. Default: the one that runs, or else the one that
	// containerd.service starts, or containerd in PATH with /etc/containerd/config.toml.
	Containerd containerd.Named
	// PilotBinary is the path of pilot's program on the machine. Default: this program,
	// or for a root directory /usr/local/bin/pilot or /usr/bin/pilot.
	PilotBinary string
	// Settings are settings for pilot.toml, by name.
	Settings map[string]string
	// Lazy says whether to pull encrypted images lazily, with pilot's snapshotter. Default:
	// as the machine does already.
	Lazy *bool
	// LazyUnused says that no container has pilot's snapshotter any more. If lazy pulling
	// was switched off before, what was left of it goes.
	LazyUnused bool
	// Workloads has containerd ask pilot about each container: On, Off, or "" for what an
	// earlier installation did.
	Workloads Choice
	// Force makes Uninstall go on although containers use pilot's snapshotter.
	Force bool
	// KeepConfig makes Uninstall keep pilot.toml and ocicrypt.conf.
	KeepConfig bool
}

// Choice is whether to set something up.
type Choice string

const (
	On  Choice = "on"
	Off Choice = "off"
)

// Plan is what an installation would change.
type Plan struct {
	// Changes are the files it would write; none if everything is up to date.
	Changes []Change
	// Restart names the services to restart afterwards.
	Restart []string

	options    Options
	before     *record // nil: the one on disk
	lost       string  // why before was rebuilt from files; empty: it was not
	containerd *containerd.Instance
	expected   map[string]any    // containerd's configuration with the changes
	deferred   bool              // containerd reads them only once its distribution starts it
	onlyNRI    bool              // it asks pilot's NRI plugin, and does not use pilot's differ
	inserted   map[string]string // by path, the text inserted into a file that is not pilot's
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

// Adopted returns the files of an earlier installation whose record was lost, and how it
// was lost. The plan takes them over.
func (p *Plan) Adopted() (files []string, why string) {
	if p.lost == "" {
		return nil, ""
	}
	for _, f := range p.before.Files {
		files = append(files, f.Path)
	}
	return files, RecordFile + ": " + p.lost
}

// Close releases the lock that keeps other installations away.
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
	return fmt.Errorf("there is no pilot in %s: copy it to %s first", o.Root, o.Path("/usr/local/bin"))
}

// NewPlan examines a machine and plans an installation of pilot beside its containerd or
// CRI-O. The error is a [*host.Conflict] if a setting of the machine's owner is in the
// way.
//
// Callers must call Close: until then, other installations on the machine wait.
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
	before, lost, err := o.loadRecord()
	if err != nil {
		return nil, err
	}
	p := &Plan{options: o, before: &before, lost: lost, inserted: make(map[string]string), release: release}
	if crio.PullsImages(o.Host, o.Containerd) {
		if o.Lazy != nil && *o.Lazy {
			return nil, &host.Conflict{Where: crio.Service, What: "CRI-O has no snapshotters", Fix: "leave out --lazy"}
		}
		if o.Workloads == On {
			return nil, &host.Conflict{Where: crio.Service, What: "pilot can't ask for CRI-O which workloads may use an image", Fix: "leave out --workloads"}
		}
		return p, p.forCRIO(before)
	}
	c, err := look(ctx, o, before)
	if err != nil {
		return nil, err
	}
	p.containerd = c
	if err := c.CheckTemplate(ctx, o.Host); err != nil {
		return nil, err
	}
	if err := p.checkLazy(); err != nil {
		return nil, err
	}
	// containerd creates no container if it requires a plugin that is not there, also if
	// this is killed in between.
	steps := []func() error{func() error { return p.containerdFiles(ctx, before) }, func() error { return p.nriPlugin(before) }}
	if c.Workloads {
		slices.Reverse(steps)
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return nil, err
		}
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
		if err := p.lazyUnits(before); err != nil {
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
	p.startFirst(forContainerd)
	return p, nil
}

// startFirst moves new files that start pilot before the first asking changes, which make
// containerd or CRI-O ask it, so that nothing asks in vain if this is killed in between.
func (p *Plan) startFirst(asking int) {
	var first, last []Change
	for _, c := range p.Changes[asking:] {
		if c.Old == nil && !c.Remove {
			first = append(first, c)
		} else {
			last = append(last, c)
		}
	}
	p.Changes = slices.Concat(first, p.Changes[:asking], last)
}

// look finds the machine's containerd, and examines it.
func look(ctx context.Context, o Options, before record) (*containerd.Instance, error) {
	t, err := containerd.Find(o.Host, o.Containerd)
	if err != nil {
		return nil, err
	}
	c, err := containerd.Examine(ctx, o.Host, *t, before.dropIns())
	if err != nil {
		return nil, err
	}
	c.Lazy = o.lazyMode(before.lazyMode())
	c.Workloads = o.Workloads == On || o.Workloads == "" && before.Workloads
	if c.Workloads {
		if err := c.CheckWorkloads(o.Host); err != nil {
			return nil, err
		}
	}
	return c, c.CheckAddress(o.Containerd)
}

// remove plans the removal of a file that was installed. The reason is for the error.
func (p *Plan) remove(before record, path, reason string) error {
	old, err := p.options.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if f := before.file(path); f == nil || !f.is(old) {
		return &host.Conflict{Where: path, What: "it was changed since it was installed, and " + reason, Fix: "move it away"}
	}
	p.Changes = append(p.Changes, Change{Path: path, Old: old, Mode: 0o644, Remove: true})
	return nil
}

// check checks that containerd's effective configuration is the one that was tried.
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
		return fmt.Errorf("containerd's configuration is not the one that was tried: %s", containerd.Summary(changed))
	}
	return nil
}

// Install makes the plan's changes. If one fails, or containerd's effective configuration
// is not the expected one, all of them are reverted. What can't be reverted, for example
// on a full disk, stays recorded for [Uninstall].
func (p *Plan) Install(ctx context.Context) error {
	if len(p.Changes) == 0 && p.lost == "" && !p.before.moved(p.containerd) {
		return p.check(ctx)
	}
	return p.apply(ctx, p.Restart)
}

// apply makes the changes, and notes the services to restart for them.
func (p *Plan) apply(ctx context.Context, restart []string) error {
	var err error
	if p.before == nil {
		s, err := p.options.readRecord()
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
		s.setLazy(c.Lazy, p.options)
		s.Workloads = c.Workloads
	}
	s.noteDir(p.options, recordDir)
	for _, c := range p.Changes {
		s.note(p.options, c, p.inserted[c.Path])
	}
	// The record first, so that everything can be undone if this is killed.
	if err := p.options.writeRecord(s); err != nil {
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
		c.oldMode = p.options.modeOf(c.Path, c.Mode)
		if err = c.make(p.options); err != nil {
			err = fmt.Errorf("%s: %w", c.Path, err)
			var fixed host.ImmutableError
			if inserted := p.inserted[c.Path]; inserted != "" && errors.As(err, &fixed) {
				err = fmt.Errorf("%w; if its imports have %q already, pilot does not change it", err, imported(inserted))
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
			return p.options.writeRecord(s)
		}
	}
	var reverting error
	for _, c := range slices.Backward(made) {
		if err := c.revert(p.options); err != nil {
			reverting = errors.Join(reverting, fmt.Errorf("%s could not be reverted: %w", c.Path, err))
		}
	}
	if reverting != nil {
		return errors.Join(err, reverting, errors.New("run \"pilot node uninstall\" to revert the rest"))
	}
	dirs := s.Dirs[len(before.Dirs):]
	p.options.removeDirs(dirs) // while the record says which they are, in case this is killed
	err = errors.Join(err, p.options.writeRecord(before), p.options.forgive(owed))
	p.options.removeDirs(dirs) // that of the record, too
	return err
}
