package keystore

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestStrangersStore opens stores that others can write or have made. It needs root
// to give files away.
func TestStrangersStore(t *testing.T) {
	made := func(t *testing.T) string {
		dir := filepath.Join(t.TempDir(), "store")
		s, err := Open(t.Context(), dir, "")
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		return dir
	}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name   string
		change func(dir string)
		want   []string
	}{
		{"directory of everybody", func(dir string) { check(os.Chmod(dir, 0o707)) }, []string{"others can write the store's directory", "chmod go-w"}},
		{"directory of a group", func(dir string) { check(os.Chmod(dir, 0o770)) }, []string{"others can write the store's directory", "chmod go-w"}},
		{"readable directory", func(dir string) { check(os.Chmod(dir, 0o755)) }, nil},
		{"database of everybody", func(dir string) { check(os.Chmod(filepath.Join(dir, "keks.db"), 0o666)) }, []string{"keks.db can be written by others", "chmod 0600"}},
		{"master key of a stranger", func(dir string) { check(os.Chown(filepath.Join(dir, "master.key"), 12345, 0)) }, []string{"master.key belongs to user 12345", "chown"}},
		{"database of a stranger", func(dir string) { check(os.Chown(filepath.Join(dir, "keks.db"), 12345, 0)) }, []string{"keks.db belongs to user 12345", "chown"}},
		{"a pipe as master key", func(dir string) {
			check(os.Remove(filepath.Join(dir, "master.key")))
			check(os.Symlink("/dev/zero", filepath.Join(dir, "master.key")))
		}, []string{"is a device"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if os.Geteuid() != 0 && strings.Contains(test.name, "stranger") {
				t.Skip("only root can give files away")
			}
			dir := made(t)
			test.change(dir)
			s, err := Open(t.Context(), dir, "")
			if err == nil {
				s.Close()
			}
			if (err == nil) != (test.want == nil) {
				t.Fatalf("error %v", err)
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v, without %q", err, want)
				}
			}
		})
	}
}

// TestCredentialModes has master keys as Kubernetes and systemd hand them over.
func TestCredentialModes(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(t.Context(), dir, "")
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	key, err := os.ReadFile(filepath.Join(dir, "master.key"))
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(filepath.Join(dir, "master.key"))
	// As the kubelet does: a link to a link.
	credentials := t.TempDir()
	os.Mkdir(filepath.Join(credentials, "..data"), 0o755)
	file := filepath.Join(credentials, "..data", masterCredential)
	if err := os.WriteFile(file, key, 0o440); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join("..data", masterCredential), filepath.Join(credentials, masterCredential)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", credentials)
	for mode, taken := range map[os.FileMode]bool{0o400: true, 0o440: true, 0o600: true, 0o444: false, 0o660: false} {
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		s, err := Open(t.Context(), dir, "")
		if err == nil {
			s.Close()
		}
		if taken != (err == nil) || !taken && !strings.Contains(err.Error(), "defaultMode: 0440") {
			t.Errorf("mode %04o: %v", mode, err)
		}
	}
}
