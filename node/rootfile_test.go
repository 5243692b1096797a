package node

import (
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// TestLinksStayInRoot has links in a root that lead elsewhere, as seen from outside.
func TestLinksStayInRoot(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(dir, "outside")
	o := Options{Root: filepath.Join(dir, "root")}
	for _, d := range []string{outside + "/a.service.d", o.Root + "/etc", o.Root + outside} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"absolute": outside, "up": "../../../../../../../../.." + outside, "etc/deep": "../../.." + outside} {
		if err := os.Symlink(to, filepath.Join(o.Root, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(outside+"/a.service.d/pilot.conf", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, link := range []string{"/absolute", "/up", "/etc/deep", "/../../.." + outside} {
		name := filepath.Join(link, "file")
		if err := o.writeFile(name, []byte("x"), 0o600); err != nil {
			t.Errorf("%s: %v", link, err)
		}
		if b, err := os.ReadFile(filepath.Join(o.Root, outside, "file")); err != nil || string(b) != "x" {
			t.Errorf("%s: %q, %v", link, b, err)
		}
		if found, err := o.glob(filepath.Join(link, "*.service.d/*.conf")); len(found) > 0 || err != nil {
			t.Errorf("%s has %q, %v", link, found, err)
		}
		if found, err := o.glob(filepath.Join(link, "f*")); !reflect.DeepEqual(found, []string{name}) || err != nil {
			t.Errorf("%s has %q, %v", link, found, err)
		}
		if err := o.remove(name); err != nil {
			t.Errorf("%s: %v", link, err)
		}
	}
	if entries, err := os.ReadDir(outside); err != nil || len(entries) != 1 {
		t.Errorf("outside: %v, %v", entries, err)
	}
}

// TestLinkSwappedInRoot has somebody exchange a directory of the root for a link to
// the outside again and again while files in it are written, read and removed.
func TestLinkSwappedInRoot(t *testing.T) {
	dir := t.TempDir()
	outside := filepath.Join(dir, "outside")
	o := Options{Root: filepath.Join(dir, "root")}
	at, link := filepath.Join(o.Root, "etc"), filepath.Join(o.Root, "link")
	for _, d := range []string{outside, at} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../outside", link); err != nil {
		t.Fatal(err)
	}
	victim := filepath.Join(outside, "victim")
	if err := os.WriteFile(victim, []byte("the machine's"), 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var swapping sync.WaitGroup
	swapping.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				unix.Renameat2(unix.AT_FDCWD, at, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE)
			}
		}
	})
	// Errors are the ones of a link that leads out of the root.
	for range 400 {
		o.writeFile("/etc/new", []byte("x"), 0o600)
		o.mkdirAll("/etc/dir/below", 0o755)
		o.addFile("/etc/added", nil)
		o.symlink("/nowhere", "/etc/symlink")
		if b, err := o.readFile("/etc/victim"); err == nil {
			t.Fatalf("it read %q of outside", b)
		}
		o.remove("/etc/victim")
		o.removeLink("/etc/victim")
		o.removeAll("/etc/victim")
	}
	close(done)
	swapping.Wait()
	entries, err := os.ReadDir(outside)
	if err != nil || len(entries) != 1 {
		t.Errorf("outside has %v, %v", entries, err)
	}
	if b, err := os.ReadFile(victim); err != nil || string(b) != "the machine's" {
		t.Errorf("the file outside has %q, %v", b, err)
	}
}

// TestStateOfOthers has states that name files which no installation writes.
func TestStateOfOthers(t *testing.T) {
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
		if s := (state{Files: []installed{f}}); s.check() == nil {
			t.Errorf("%+v is taken", f)
		}
	}
	for _, f := range []installed{
		{Path: pilotConfig}, {Path: keyProviders}, {Path: crioDropIn}, {Path: mark}, {Path: brokerCA}, {Path: brokerToken},
		{Path: "/opt/bin/pilot"}, {Path: "/etc/containerd/conf.d/zz-pilot.toml"},
		{Path: "/etc/containerd/config.toml", Inserted: "imports = ['/etc/containerd/conf.d/pilot*.toml']\n"},
		{Path: "/etc/containerd/config.toml", Inserted: "\nimports = ['/etc/containerd/conf.d/pilot.toml']\n"},
		{Path: "/etc/containerd/config.toml", Inserted: ", '/etc/containerd/conf.d/zz-pilot*.toml'"},
		{Path: unitDir + "/multi-user.target.wants/pilot.service", Link: "/usr/lib/systemd/system/pilot.service"},
		{Path: unitDir + "/k3s-agent.service.d/pilot.conf"}, {Path: unitDir + "/pilot-diff.socket"},
	} {
		if s := (state{Files: []installed{f}}); s.check() != nil {
			t.Errorf("%+v: %v", f, s.check())
		}
	}
}
