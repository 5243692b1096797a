package containerd

import (
	"path/filepath"
	"strings"

	"github.com/ctrlplane/pilot/node/host"
)

// Distribution is the software that a containerd is part of and that configures it in
// its own way, such as k3s. The zero Distribution is a containerd of its own.
type Distribution struct {
	Name string
	// DropIns is a directory whose files containerd will import, though its
	// configuration file does not say so yet.
	DropIns string
	// Rewritten is true if it rewrites containerd's configuration file when it
	// starts, so that changes are lost.
	Rewritten bool
	// Template is true if it makes containerd's configuration from a template beside
	// the file, if there is one: k3s and RKE2.
	Template bool
	refusal  *refusal
}

// refusal is why a containerd can't be set up, and what to do instead.
type refusal struct{ what, fix string }

const (
	k3s  = "k3s"
	rke2 = "RKE2"
	k0s  = "k0s"
)

// distributionOf returns the distribution of a running containerd.
func distributionOf(p *host.Process) Distribution {
	return DistributionAt(host.Host{}, configOf(p), p.Parent)
}

// DistributionAt returns the distribution of a containerd, by the path of its
// configuration file and the name of its parent process, which may be "".
func DistributionAt(h host.Host, config, parent string) Distribution {
	switch {
	case strings.HasPrefix(parent, "rke2") || strings.Contains(config, "/rke2/"):
		return Distribution{Name: rke2, Rewritten: true, Template: true}
	case strings.HasPrefix(parent, "k3s") || strings.Contains(config, "/k3s/"):
		return Distribution{Name: k3s, Rewritten: true, Template: true}
	case parent == "k0s" || strings.HasPrefix(config, "/etc/k0s/"):
		d := Distribution{Name: k0s}
		// Without this line k0s leaves the file alone.
		if text, err := h.ReadFile(config); err == nil && strings.Contains(string(text), "k0s_managed=true") {
			d.DropIns, d.Rewritten = filepath.Join(filepath.Dir(config), "containerd.d"), true
		}
		return d
	case parent == "dockerd":
		return Distribution{Name: "Docker", refusal: &refusal{
			"dockerd runs this containerd itself, and rewrites its configuration at each start",
			"install containerd as a service (the package containerd.io, or your distribution's containerd), restart docker, and run this again",
		}}
	case strings.Contains(config, "/var/snap/microk8s/"):
		return Distribution{Name: "MicroK8s", refusal: &refusal{
			"MicroK8s writes its containerd's configuration from a template of its own",
			"add what docs/containerd.md shows to /var/snap/microk8s/current/args/containerd-template.toml",
		}}
	}
	return Distribution{}
}

// CheckSystem returns a [host.Conflict] if no containerd of this operating system can be set up.
func CheckSystem(h host.Host) error {
	if r := systemRefusal(h, ""); r != nil {
		return &host.Conflict{Where: "/etc/os-release", What: r.what, Fix: r.fix}
	}
	return nil
}

// systemRefusal returns why the containerd of this operating system can't be set up, or
// nil.
func systemRefusal(h host.Host, config string) *refusal {
	text, err := h.ReadFile("/etc/os-release")
	if err != nil {
		return nil
	}
	id := ""
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "ID="); ok {
			id = strings.Trim(v, `"'`)
		}
	}
	switch {
	case id == "bottlerocket":
		return &refusal{
			"Bottlerocket generates containerd's configuration from settings, none of which adds a differ",
			"use nodes of another operating system for encrypted images",
		}
	case id == "talos":
		return &refusal{
			"Talos has neither systemd nor a shell to install anything with",
			"configure it as docs/containerd.md shows",
		}
	case id == "flatcar" && strings.HasPrefix(config, "/usr/"):
		return &refusal{
			"it is on Flatcar's read-only /usr",
			"make containerd read " + DefaultConfig + " instead, as docs/containerd.md shows, and run this again",
		}
	}
	return nil
}

// stoppedDistribution returns a distribution that is installed and brings a containerd,
// with its service, or "".
func stoppedDistribution(h host.Host) (d Distribution, service string) {
	for _, known := range []struct{ name, service string }{
		{k3s, "k3s.service"}, {k3s, "k3s-agent.service"},
		{rke2, "rke2-server.service"}, {rke2, "rke2-agent.service"},
		{k0s, "k0scontroller.service"}, {k0s, "k0sworker.service"},
	} {
		if h.HasUnit(known.service) {
			return Distribution{Name: known.name}, known.service
		}
	}
	return Distribution{}, ""
}
