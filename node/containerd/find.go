package containerd

import (
	"cmp"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/node/host"
)

// Target is the containerd to set up: its program, its configuration file, its socket,
// and what starts it.
type Target struct {
	Program string // inside the root
	Config  string // its configuration file, inside the root
	Address string // its socket, if its command line sets it
	Service string // the systemd service to restart for a new configuration
	Distribution
	Process *host.Process // nil if it does not run, or the machine is a root directory
}

const (
	Service = "containerd.service"

	DefaultConfig  = "/etc/containerd/config.toml"
	DefaultAddress = "/run/containerd/containerd.sock"
)

// Named is what the user says about the containerd to set up: its program, its
// configuration file, and the path of its socket. Empty fields match any.
type Named struct{ Binary, Config, Address string }

// search looks for a machine's containerd.
type search struct {
	host.Host
	Named
}

// Find finds the machine's containerd. If one runs, it is that one: naming another is an
// error, and so is naming none if several run.
func Find(h host.Host, n Named) (*Target, error) {
	s := search{h, n}
	if s.Root == "" {
		found, err := running()
		if err != nil {
			return nil, fmt.Errorf("search the processes for containerd: %w", err)
		}
		p, err := s.choose(found)
		if err != nil {
			return nil, err
		}
		if p != nil {
			return s.ofProcess(p)
		}
		// One that is stopped beside it is not the kubelet's.
		if d, service := stoppedDistribution(s.Host); service != "" && n == (Named{}) {
			return nil, notStarted(d)
		}
	}
	return FromUnit(h, n)
}

// choose returns the containerd to set up among those that run, or nil if that one does
// not run.
func (s search) choose(found []*host.Process) (*host.Process, error) {
	if s.Address != "" {
		pid, err := host.ListenerPID(s.Address)
		i := slices.IndexFunc(found, func(p *host.Process) bool { return p.PID == pid })
		if err != nil || i < 0 {
			return nil, nil // it does not run, or its program has another name
		}
		found = found[i : i+1]
	}
	if len(found) == 0 {
		return nil, nil
	}
	named := slices.DeleteFunc(slices.Clone(found), func(p *host.Process) bool { return !s.names(p) })
	if len(named) == 0 {
		return nil, &host.Conflict{Where: describe(found), What: "it runs, and is not the containerd that was named", Fix: "name the one that runs, or none"}
	}
	if len(named) > 1 {
		// The kubelet uses the one that belongs to a Kubernetes distribution.
		isOther := func(p *host.Process) bool { d := distributionOf(p); return d.Name == "" || d.refusal != nil }
		if bundled := slices.DeleteFunc(slices.Clone(named), isOther); len(bundled) == 1 {
			return bundled[0], nil
		}
		return nil, &host.Conflict{Where: describe(named), What: "more than one containerd runs", Fix: "name the one to set up with --containerd-address"}
	}
	return named[0], nil
}

// names reports whether a process has the program and the configuration file that the
// user has named, if any.
func (s search) names(p *host.Process) bool {
	if s.Config != "" && s.Config != configOf(p) {
		return false
	}
	return !filepath.IsAbs(s.Binary) || host.SameFile(s.Binary, p.Program)
}

func describe(processes []*host.Process) string {
	var lines []string
	for _, p := range processes {
		lines = append(lines, p.String())
	}
	return strings.Join(lines, ", ")
}

// ofProcess returns the containerd of a process.
func (s search) ofProcess(p *host.Process) (*Target, error) {
	f, _ := parseFlags(p.Args)
	t := &Target{Program: lasting(p.Program), Config: configOf(p), Address: SocketPath(f.address), Service: p.Unit, Distribution: distributionOf(p), Process: p}
	if t.Service == "" {
		t.Service = Service
	}
	if t.refusal == nil {
		t.refusal = systemRefusal(s.Host, t.Config)
	}
	if t.refusal != nil {
		return nil, &host.Conflict{Where: p.String(), What: t.refusal.what, Fix: t.refusal.fix}
	}
	return t, nil
}

// lasting returns a path of the program that stays valid when k3s or RKE2 is upgraded:
// they unpack each version into a directory of its own.
func lasting(program string) string {
	name, data := filepath.Base(program), filepath.Dir(filepath.Dir(filepath.Dir(program)))
	if filepath.Base(data) != "data" {
		return program
	}
	// k3s has the link data/current, and RKE2 has bin beside data.
	for _, link := range []string{filepath.Join(data, "current", "bin", name), filepath.Join(filepath.Dir(data), "bin", name)} {
		if host.SameFile(link, program) {
			return link
		}
	}
	return program
}

// FromUnit returns the containerd that containerd.service starts, or the one in PATH.
func FromUnit(h host.Host, n Named) (*Target, error) {
	s := search{h, n}
	t := &Target{Program: s.Binary, Config: s.Config, Service: Service}
	if words, err := s.ExecStart(Service); len(words) > 0 && filepath.Base(words[0]) == "containerd" {
		if err != nil && s.Config == "" {
			return nil, err
		}
		f, _ := parseFlags(words[1:])
		if t.Program == "" {
			t.Program = words[0]
		}
		if t.Config == "" {
			t.Config = f.config
		}
		t.Address = SocketPath(f.address)
	}
	if t.Config == "" {
		t.Config = DefaultConfig
	}
	if s.Config != "" && s.Address != "" {
		t.Address = s.Address
	}
	if r := systemRefusal(s.Host, t.Config); r != nil {
		return nil, &host.Conflict{Where: t.Config, What: r.what, Fix: r.fix}
	}
	t.Distribution = DistributionAt(s.Host, t.Config, "")
	if d, service := stoppedDistribution(s.Host); service != "" && d.Name == t.Name {
		t.Service = service
	}
	name := t.Program
	if name == "" {
		name = "containerd"
	}
	t.Program = s.LookPathIn(name, s.SearchPath())
	if t.Program == "" {
		if d, service := stoppedDistribution(s.Host); service != "" {
			return nil, notStarted(d)
		}
		return nil, fmt.Errorf("there is no %s in %s: install containerd, or name its program with --containerd-binary", name, strings.Join(s.SearchPath(), ", "))
	}
	return t, nil
}

func notStarted(d Distribution) error {
	return &host.Conflict{Where: d.Name, What: "its containerd does not run", Fix: "start " + d.Name + ", and run this again, or name another containerd with --containerd-config"}
}

// FindAgain returns a containerd that was found before, as it is now: its unit may start
// another program, or the program may have moved.
func FindAgain(h host.Host, t Target) (*Target, error) {
	// Its data directory, and so the path of its configuration, may be anywhere, but its
	// service has the name of its process.
	t.Distribution = DistributionAt(h, t.Config, strings.TrimSuffix(t.Service, ".service"))
	program, config := StartedBy(h, t.Service)
	if program != "" && config == t.Config {
		t.Program = program
	}
	if !h.Has(t.Program) {
		moved := h.LookPath("containerd")
		if moved == "" || t.Name != "" { // a distribution has its own
			return nil, fmt.Errorf("%s, which pilot was installed for, is gone: run \"pilot node install\" once containerd is there: %w", t.Program, exec.ErrNotFound)
		}
		t.Program = moved
	}
	return &t, nil
}

// StartedBy returns the program of the containerd that a unit starts, and its
// configuration file, or "" if the unit starts something else.
func StartedBy(h host.Host, service string) (program, config string) {
	words, err := h.ExecStart(service)
	if err != nil || len(words) == 0 || filepath.Base(words[0]) != "containerd" {
		return "", ""
	}
	f, _ := parseFlags(words[1:])
	return h.LookPath(words[0]), cmp.Or(f.config, DefaultConfig)
}

// PossibleConfigs returns the configuration files of all containerds that pilot may have
// been installed for.
func PossibleConfigs(h host.Host, n Named) []string {
	configs := []string{n.Config, DefaultConfig}
	if h.Root == "" {
		processes, _ := running()
		for _, p := range processes {
			configs = append(configs, configOf(p))
		}
	}
	if t, err := FromUnit(h, n); err == nil {
		configs = append(configs, t.Config)
	}
	for _, name := range []string{k3s, strings.ToLower(rke2)} {
		configs = append(configs, "/var/lib/rancher/"+name+"/agent/etc/containerd/config.toml")
	}
	configs = append(configs, "/etc/k0s/containerd.toml")
	slices.Sort(configs)
	return slices.DeleteFunc(slices.Compact(configs), func(s string) bool { return s == "" })
}

// WithConfig returns the containerd with a configuration file.
func WithConfig(h host.Host, n Named, config string) (*Target, error) {
	if h.Root == "" {
		processes, _ := running()
		for _, p := range processes {
			if configOf(p) == config {
				return (search{h, n}).ofProcess(p)
			}
		}
	}
	n.Config = config
	return FromUnit(h, n)
}
