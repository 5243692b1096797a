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
