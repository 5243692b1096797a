package node

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// target is the containerd to set up: its program, what it reads, where it
// answers, and who starts it.
type target struct {
	program string // inside the root
	config  string // its configuration file, inside the root
	address string // of its socket, if its command line has it
	service string // systemd's, that has to be restarted for a new configuration
	distribution
	process *process // nil if it does not run, or the root is another machine's
}

const (
	defaultConfig  = "/etc/containerd/config.toml"
	defaultAddress = "/run/containerd/containerd.sock"
)

// binDirs are the directories in which programs are looked for in a root.
var binDirs = []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}

// findTarget finds the machine's containerd. One that runs is what counts: it is
// an error to name another than that, or none where several run.
func findTarget(o Options) (*target, error) {
	if o.Root == "" {
		found, err := running()
		if err != nil {
			return nil, fmt.Errorf("look for containerd among the processes: %w", err)
		}
		p, err := o.choose(found)
		if err != nil {
			return nil, err
		}
		if p != nil {
			return o.ofProcess(p)
		}
	}
	return o.ofUnit()
}

// choose returns the containerd to set up of those that run, or nil if none is
// known to be it.
func (o Options) choose(found []*process) (*process, error) {
	if o.ContainerdAddress != "" {
		pid, err := listenerPID(o.ContainerdAddress)
		i := slices.IndexFunc(found, func(p *process) bool { return p.pid == pid })
		if err != nil || i < 0 {
			return nil, nil // it does not run, or under a name that is not known here
		}
		found = found[i : i+1]
	}
	if len(found) == 0 {
		return nil, nil
	}
	named := slices.DeleteFunc(slices.Clone(found), func(p *process) bool { return !o.names(p) })
	if len(named) == 0 {
		return nil, &Conflict{describe(found), "it runs, and is not the containerd that was named", "name the one that runs, or none"}
	}
	if len(named) > 1 {
		// A Kubernetes distribution's own is the one that its kubelet uses.
		if bundled := slices.DeleteFunc(slices.Clone(named), func(p *process) bool { return distributionOf(p).name == "" }); len(bundled) == 1 {
			return bundled[0], nil
		}
		return nil, &Conflict{describe(named), "more than one containerd runs", "name the one to set up with --containerd-address"}
	}
	return named[0], nil
}

// names reports whether a process has the program and the configuration that the
// options name, if they do.
func (o Options) names(p *process) bool {
	if o.ContainerdConfig != "" && o.ContainerdConfig != p.config() {
		return false
	}
	return !filepath.IsAbs(o.ContainerdBinary) || sameFile(o.ContainerdBinary, p.program)
}

func sameFile(a, b string) bool {
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX == nil && errY == nil && os.SameFile(x, y)
}

func describe(processes []*process) string {
	var lines []string
	for _, p := range processes {
		lines = append(lines, p.String())
	}
	return strings.Join(lines, ", ")
}

// ofProcess returns the containerd that a process is.
func (o Options) ofProcess(p *process) (*target, error) {
	f, _ := parseFlags(p.args)
	t := &target{program: lasting(p.program), config: p.config(), address: socketOf(f.address), service: p.unit, distribution: distributionOf(p), process: p}
	if t.service == "" {
		t.service = containerdService
	}
	if t.refusal == nil {
		t.refusal = o.systemRefusal(t.config)
	}
	if t.refusal != nil {
		return nil, &Conflict{p.String(), t.refusal.what, t.refusal.fix}
	}
	return t, nil
}

// lasting returns the path of a program that stays the same when k3s or RKE2 is
// upgraded: they unpack each version into a directory of its own.
func lasting(program string) string {
	dir := filepath.Dir(filepath.Dir(program))
	if current := filepath.Join(filepath.Dir(dir), "current", "bin", filepath.Base(program)); filepath.Base(filepath.Dir(dir)) == "data" && sameFile(current, program) {
		return current
	}
	return program
}

// ofUnit returns the containerd that systemd starts by its unit, or the one in
// PATH.
func (o Options) ofUnit() (*target, error) {
	t := &target{program: o.ContainerdBinary, config: o.ContainerdConfig, service: containerdService}
	if words, err := o.execStart(containerdService); len(words) > 0 && filepath.Base(words[0]) == "containerd" {
		if err != nil && o.ContainerdConfig == "" {
			return nil, err
		}
		f, _ := parseFlags(words[1:])
		if t.program == "" {
			t.program = words[0]
		}
		if t.config == "" {
			t.config = f.config
		}
		t.address = socketOf(f.address)
	}
	if t.config == "" {
		t.config = defaultConfig
	}
	if o.ContainerdConfig != "" && o.ContainerdAddress != "" {
		t.address = o.ContainerdAddress
	}
	if r := o.systemRefusal(t.config); r != nil {
		return nil, &Conflict{t.config, r.what, r.fix}
	}
	t.distribution = o.distributionAt(t.config, "")
	if d, service := o.stoppedDistribution(); service != "" && d.name == t.name {
		t.service = service
	}
	name := t.program
	if name == "" {
		name = "containerd"
	}
	t.program = o.lookPath(name, o.searched())
	if t.program == "" {
		if d, service := o.stoppedDistribution(); service != "" {
			return nil, &Conflict{d.name, "its containerd does not run", "start " + d.name + ", and run this again"}
		}
		return nil, fmt.Errorf("there is no %s in %s: install containerd, or name its program with --containerd-binary", name, strings.Join(o.searched(), ", "))
	}
	return t, nil
}

// searched are the directories in which programs are looked for.
func (o Options) searched() []string {
	if o.Root == "" {
		return filepath.SplitList(os.Getenv("PATH"))
	}
	return binDirs
}

// lookPath returns the path of a program inside the root, or nothing. One whose
// name is not absolute is looked for in dirs.
func (o Options) lookPath(name string, dirs []string) string {
	candidates := []string{name}
	if !filepath.IsAbs(name) {
		candidates = nil
		for _, dir := range dirs {
			candidates = append(candidates, filepath.Join(dir, name))
		}
	}
	for _, c := range candidates {
		if info, err := o.stat(c); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0 {
			return c
		}
	}
	return ""
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}
