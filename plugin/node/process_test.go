package node

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestParseFlags(t *testing.T) {
	for line, want := range map[string]struct {
		flags
		daemon bool
	}{
		"":                       {daemon: true},
		"--config /etc/x.toml":   {flags{config: "/etc/x.toml"}, true},
		"-c /x -a /y.sock":       {flags{"/x", "/y.sock"}, true},
		"-c=/x --address=/y":     {flags{"/x", "/y"}, true},
		"--log-level debug -c /": {flags{config: "/"}, true},
		"config dump":            {},
		"-c /x config dump":      {flags: flags{config: "/x"}},
		"--root /r publish":      {},
		"-c":                     {daemon: true},
	} {
		f, daemon := parseFlags(strings.Fields(line))
		if f != want.flags || daemon != want.daemon {
			t.Errorf("%q: %+v, %v", line, f, daemon)
		}
	}
}

func TestUnitOf(t *testing.T) {
	for cgroup, want := range map[string]string{
		"0::/system.slice/containerd.service\n":                                       "containerd.service",
		"12:pids:/system.slice/k3s.service\n1:name=systemd:/system.slice/k3s.service": "k3s.service",
		"0::/system.slice/k3s-agent.service/containerd":                               "k3s-agent.service",
		"0::/user.slice/user-0.slice/session-1.scope\n":                               "",
		"0::/\n": "",
		"":       "",
	} {
		if got := unitOf(cgroup); got != want {
			t.Errorf("%q: %q, want %q", cgroup, got, want)
		}
	}
}

// TestReadProcess reads a process that is named as containerd is.
func TestReadProcess(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	cmd := &exec.Cmd{Path: sleep, Args: []string{"/opt/bin/containerd", "1000"}}
	before := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	boot, err := bootTime()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join("/proc", strconv.Itoa(cmd.Process.Pid))
	// Its first argument is no flag, as that of a subcommand.
	if p, err := readProcess(dir, boot); err != nil || p != nil {
		t.Errorf("a subcommand: %v, %v", p, err)
	}
	p, err := readProcess(filepath.Join("/proc", strconv.Itoa(os.Getpid())), boot)
	if err != nil || p != nil {
		t.Errorf("this process: %v, %v", p, err)
	}
	started, err := startOf(dir, boot)
	if err != nil || started.Before(before.Add(-time.Minute)) || started.After(time.Now().Add(time.Minute)) {
		t.Errorf("it was started at %v, %v", started, err)
	}
}

func TestChoose(t *testing.T) {
	own := &process{pid: 10, program: "/usr/bin/containerd", unit: "containerd.service"}
	elsewhere := &process{pid: 11, program: "/usr/bin/containerd", args: []string{"--config", "/opt/c.toml"}}
	ofK3s := &process{pid: 12, program: "/data/bin/containerd", args: []string{"-c", "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"}, unit: "k3s.service", parent: "k3s-agent"}
	for name, test := range map[string]struct {
		options Options
		found   []*process
		want    *process
		refuses bool
	}{
		"none":                 {found: nil},
		"one":                  {found: []*process{elsewhere}, want: elsewhere},
		"two":                  {found: []*process{own, elsewhere}, refuses: true},
		"two, one named":       {options: Options{ContainerdConfig: "/opt/c.toml"}, found: []*process{own, elsewhere}, want: elsewhere},
		"the default named":    {options: Options{ContainerdConfig: defaultConfig}, found: []*process{own, elsewhere}, want: own},
		"another named":        {options: Options{ContainerdConfig: "/x.toml"}, found: []*process{own}, refuses: true},
		"k3s beside another":   {found: []*process{own, ofK3s}, want: ofK3s},
		"nobody listens":       {options: Options{ContainerdAddress: filepath.Join(t.TempDir(), "s")}, found: []*process{own}},
		"another program":      {options: Options{ContainerdBinary: "/bin/true"}, found: []*process{own}, refuses: true},
		"a name is no program": {options: Options{ContainerdBinary: "containerd"}, found: []*process{own}, want: own},
	} {
		got, err := test.options.choose(test.found)
		var conflict *Conflict
		if got != test.want || errors.As(err, &conflict) != test.refuses {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestDistributionAt(t *testing.T) {
	for _, test := range []struct{ config, parent, name string }{
		{defaultConfig, "systemd", ""},
		{"/var/lib/rancher/k3s/agent/etc/containerd/config.toml", "k3s-server", k3s},
		{"/data/agent/etc/containerd/config.toml", "k3s-agent", k3s},
		{"/var/lib/rancher/rke2/agent/etc/containerd/config.toml", "rke2", rke2},
		{"/etc/k0s/containerd.toml", "k0s", k0s},
		{"/var/run/docker/containerd/containerd.toml", "dockerd", "Docker"},
		{"/var/snap/microk8s/1/args/containerd.toml", "systemd", "MicroK8s"},
	} {
		if d := distributionAt(test.config, test.parent); d.name != test.name {
			t.Errorf("%s of %s: %+v", test.config, test.parent, d)
		}
	}
}
