package install

import (
	"testing"

	"github.com/ctrlplane/pilot/node/host"
)

// TestRecordOfOtherFilesIsRejected reads records of files that no installation writes.
func TestRecordOfOtherFilesIsRejected(t *testing.T) {
	for _, f := range []installed{
		{Path: "/etc/passwd"},
		{Path: "../../etc/passwd"},
		{Path: "/etc/pilot/../passwd"},
		{Path: "/etc/pilot/pilot.toml/../../shadow"},
		{Path: "/etc/systemd/system/sshd.service"},
		{Path: "/etc/systemd/system/sshd.service.d/other.conf"},
		{Path: "/etc/passwd", Inserted: "root"},
		{Path: "/etc/passwd", Inserted: "imports = ['/etc/evil.toml']\n"},
		{Path: "/usr/bin/sudo", Link: "/usr/bin/sudo"},
		{Path: "/etc/systemd/system/multi-user.target.wants/sshd.service", Link: "/usr/lib/systemd/system/sshd.service"},
	} {
		if s := (record{Files: []installed{f}}); s.check() == nil {
			t.Errorf("%+v is accepted", f)
		}
	}
	for _, f := range []installed{
		{Path: pilotConfig}, {Path: keyProviders}, {Path: crioDropIn}, {Path: DaemonSetMark}, {Path: BrokerCA}, {Path: BrokerToken},
		{Path: "/opt/bin/pilot"}, {Path: "/etc/containerd/conf.d/zz-pilot.toml"},
		{Path: "/etc/containerd/config.toml", Inserted: "imports = ['/etc/containerd/conf.d/pilot*.toml']\n"},
		{Path: "/etc/containerd/config.toml", Inserted: "\nimports = ['/etc/containerd/conf.d/pilot.toml']\n"},
		{Path: "/etc/containerd/config.toml", Inserted: ", '/etc/containerd/conf.d/zz-pilot*.toml'"},
		{Path: host.UnitDir + "/multi-user.target.wants/pilot.service", Link: "/usr/lib/systemd/system/pilot.service"},
		{Path: host.UnitDir + "/k3s-agent.service.d/pilot.conf"}, {Path: host.UnitDir + "/pilot-diff.socket"},
	} {
		if s := (record{Files: []installed{f}}); s.check() != nil {
			t.Errorf("%+v: %v", f, s.check())
		}
	}
}

// TestPermissionsOfTheOwnerStay uninstalls, is refused, and reverts an installation, with files
// whose owner keeps them from others.
func TestPermissionsOfTheOwnerStay(t *testing.T) {
	const (
		conf   = "/etc/containerd/config.toml"
		dropIn = "/etc/containerd/conf.d/pilot.toml"
		other  = "/etc/containerd/conf.d/zz-pilot.toml"
		line   = "imports = ['/etc/containerd/conf.d/pilot*.toml']\n"
	)
	o := Options{Host: host.Host{Root: t.TempDir()}}
	check := func(when, path, text string) {
		t.Helper()
		info, err := o.Stat(path)
		b, _ := o.ReadFile(path)
		if err != nil || info.Mode().Perm() != 0o600 || string(b) != text {
			t.Errorf("%s: %s has %v, %v: %q", when, path, info.Mode(), err, b)
		}
	}
	for _, secret := range []string{"", "password = 'x'\n"} {
		write(t, o, conf, line+"version = 2\n"+secret, 0o600)
		f := installed{Path: conf, Before: []byte("version = 2\n"), Mode: 0o644, SHA256: hash([]byte(line + "version = 2\n")), Inserted: line}
		if err := (&record{}).undo(o, f); err != nil {
			t.Error(err)
		}
		check("uninstalled", conf, "version = 2\n"+secret)
	}

	write(t, o, dropIn, "# pilot's\n", 0o600)
	write(t, o, other, "# changed\n", 0o600)
	s := record{Files: []installed{{Path: other, Mode: 0o644, SHA256: "x"}, {Path: dropIn, Mode: 0o644, SHA256: hash([]byte("# pilot's\n"))}}}
	if err := s.disconnect(t.Context(), o); err == nil {
		t.Error("a drop-in that was changed is no error")
	}
	check("refused", dropIn, "# pilot's\n")

	for _, c := range []Change{
		{Path: dropIn, Old: []byte("# pilot's\n"), New: []byte("# without\n"), Mode: 0o644},
		{Path: dropIn, Old: []byte("# pilot's\n"), Mode: 0o644, Remove: true},
	} {
		p := &Plan{options: o, before: &record{}, Changes: []Change{c, {Path: conf, Old: []byte("in the meantime"), New: []byte("x"), Mode: 0o644}}}
		if err := p.apply(t.Context(), nil); err == nil {
			t.Error("a file that was changed in the meantime is no error")
		}
		check("reverted", dropIn, "# pilot's\n")
	}
}
