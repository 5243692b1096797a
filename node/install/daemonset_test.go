package install

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/node/host"
)

// TestPutFilesSurviveAKillAndAreUninstalled writes files on a machine, also after a process doing so was killed at the
// worst moment.
func TestPutFilesSurviveAKillAndAreUninstalled(t *testing.T) {
	o := Options{Host: host.Host{Root: t.TempDir()}}
	for _, dir := range []string{"etc", "run"} {
		if err := os.Mkdir(filepath.Join(o.Root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	const path = "/opt/pilot/bin/pilot"
	file := filepath.Join(o.Root, path)
	expect := func(content string) {
		t.Helper()
		if got, err := os.ReadFile(file); err != nil || string(got) != content {
			t.Errorf("got %.20q, %v; want %.20q", got, err, content)
		}
	}
	put := func(content string, restart ...string) {
		t.Helper()
		if err := Put(context.Background(), o, path, []byte(content), 0o700, restart...); err != nil {
			t.Fatal(err)
		}
		expect(content)
	}
	// As large as pilot's programs.
	v1, v2, v3 := program("v1"), program("v2"), program("v3")
	put(v1, PilotService)
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o700 {
		t.Errorf("mode: %v, %v", info.Mode(), err)
	}
	if p := Pending(o.Host); len(p) != 1 || p[0] != PilotService {
		t.Errorf("pending: %q", p)
	}
	os.RemoveAll(filepath.Join(o.Root, pendingDir))
	put(v1, PilotService)
	if p := Pending(o.Host); len(p) > 0 {
		t.Errorf("nothing has changed, and pending are %q", p)
	}

	// Killed when v2 was recorded and not yet written.
	s, err := o.readRecord()
	if err != nil {
		t.Fatal(err)
	}
	s.note(o, Change{Path: path, Old: []byte(v1), New: []byte(v2), Mode: 0o700}, "")
	if err := o.writeRecord(s); err != nil {
		t.Fatal(err)
	}
	put(v3)
	if _, err := Uninstall(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	for _, left := range []string{"/opt", recordDir} {
		if _, err := os.Stat(filepath.Join(o.Root, left)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", left, err)
		}
	}

	// A file that pilot did not write stays.
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("theirs"), 0o755); err != nil {
		t.Fatal(err)
	}
	var conflict *host.Conflict
	if err := putFile(o, path, "v1"); !errors.As(err, &conflict) {
		t.Errorf("got %v", err)
	}
	expect("theirs")
}

func program(version string) string {
	return version + strings.Repeat(" ", 40<<20)
}

func putFile(o Options, path, content string) error {
	return Put(context.Background(), o, path, []byte(content), 0o700)
}

func TestMissingUnitsAreNamed(t *testing.T) {
	const link, dropIn, gone = host.UnitDir + "/multi-user.target.wants/pilot.service", host.UnitDir + "/containerd.service.d/pilot.conf", "/etc/pilot/ocicrypt.conf"
	o := Options{Host: host.Host{Root: t.TempDir()}}
	write(t, o, dropIn, "", 0o644)
	if err := o.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		t.Fatal(err)
	}
	// Of the image that --root is, so there is no such file here.
	if err := o.Symlink("/usr/lib/systemd/system/pilot.service", link); err != nil {
		t.Fatal(err)
	}
	if err := o.writeRecord(record{Files: []installed{{Path: dropIn}, {Path: link, Link: "/usr/lib/systemd/system/pilot.service"}, {Path: gone}}}); err != nil {
		t.Fatal(err)
	}
	var removed []string
	for _, path := range []string{"", dropIn, link} {
		if path != "" {
			removed = append(removed, path)
			if err := o.RemoveLink(path); err != nil {
				t.Fatal(err)
			}
		}
		if got := MissingUnits(o); !slices.Equal(got, removed) {
			t.Errorf("missing: %q, want %q", got, removed)
		}
	}
}
