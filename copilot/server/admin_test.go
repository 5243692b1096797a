package server_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/server"
)

// TestAdmin manages KEKs through a running broker.
func TestAdmin(t *testing.T) {
	dir := t.TempDir()
	c, err := client.New(client.Config{URLs: []string{serve(t, dir, server.Config{})}})
	if err != nil {
		t.Fatal(err)
	}
	admin := open(t, dir)
	defer admin.Close()

	key := bytes.Repeat([]byte("k"), 32)
	if info, err := admin.Create(t.Context(), "team/a", bytes.Clone(key)); err != nil || info.ID != "team/a" || info.Version != 1 {
		t.Errorf("import: %+v, %v", info, err)
	}
	if kek, err := c.KEK(t.Context(), "team/a", 0); err != nil || !bytes.Equal(kek.Key, key) {
		t.Errorf("the imported KEK: version %d, %v", kek.Version, err)
	}
	if info, err := admin.Create(t.Context(), "team-b", nil); err != nil || info.Version != 1 || info.Versions[0].Bits != 256 {
		t.Errorf("create: %+v, %v", info, err)
	}
	if info, err := admin.Rotate(t.Context(), "team/a"); err != nil || info.Version != 2 || len(info.Versions) != 2 {
		t.Errorf("rotate: %+v, %v", info, err)
	}
	if kek, err := c.KEK(t.Context(), "team/a", 0); err != nil || kek.Version != 2 || bytes.Equal(kek.Key, key) {
		t.Errorf("the rotated KEK: version %d, %v", kek.Version, err)
	}
	if info, err := admin.Get(t.Context(), "team/a"); err != nil || info.ID != "team/a" || info.Version != 2 || len(info.Versions) != 2 || info.Versions[0].Created.IsZero() {
		t.Errorf("get: %+v, %v", info, err)
	}
	if list, err := admin.List(t.Context()); err != nil || len(list) != 2 || list[0].ID != "team-b" || list[1].ID != "team/a" || list[1].Version != 2 {
		t.Errorf("list: %+v, %v", list, err)
	}
	if info, err := admin.Destroy(t.Context(), "team/a", 0, 0); err != nil || info.Versions[1].State != "destroyed" {
		t.Errorf("destroy: %+v, %v", info, err)
	}

	for _, test := range []struct {
		name string
		do   func() error
		want string
	}{
		{"import of no bytes", func() error { _, err := admin.Create(t.Context(), "empty", []byte{}); return err }, "has 0 bytes"},
		{"import of 31 bytes", func() error { _, err := admin.Create(t.Context(), "empty", key[1:]); return err }, "has 31 bytes"},
		{"import over one that is there", func() error { _, err := admin.Create(t.Context(), "team-b", key); return err }, "of that name already"},
		{"create of nothing", func() error { _, err := admin.Create(t.Context(), "", nil); return err }, "can't be a KEK's name"},
		{"create what is destroyed", func() error { _, err := admin.Create(t.Context(), "team/a", nil); return err }, "it was destroyed: take another name"},
		{"rotate what is destroyed", func() error { _, err := admin.Rotate(t.Context(), "team/a"); return err }, "no such KEK"},
		{"enable what is destroyed", func() error { _, err := admin.Enable(t.Context(), "team/a", 0); return err }, "no such KEK"},
		{"get what was refused", func() error { _, err := admin.Get(t.Context(), "empty"); return err }, "no such KEK"},
	} {
		if err := test.do(); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}

	var actions []string
	for _, e := range audited(t, dir) {
		if e.Who == "" || e.Request == "" {
			t.Errorf("audited %+v", e)
		}
		actions = append(actions, e.Action+" "+e.KEK+" "+e.Verdict)
	}
	want := []string{
		"import team/a allowed", "export team/a allowed", "create team-b allowed", "rotate team/a allowed", "export team/a allowed",
		"info team/a allowed", "list  allowed", "destroy team/a allowed",
		"import empty failed", "import empty failed", "import team-b failed", "create  failed",
		"create team/a failed", "rotate team/a denied", "enable team/a denied", "info empty denied",
	}
	if got := strings.Join(actions, "\n"); got != strings.Join(want, "\n") {
		t.Errorf("audited:\n%s\nwant:\n%s", got, strings.Join(want, "\n"))
	}
}

// TestNoAuditNoChange checks that a change that can't be audited is not made.
func TestNoAuditNoChange(t *testing.T) {
	dir := t.TempDir()
	key := bytes.Repeat([]byte("k"), 32)
	create(t, dir, map[string][]byte{"team-a": bytes.Clone(key)})
	t.Run("served", func(t *testing.T) {
		serve(t, dir, server.Config{AuditLog: "/dev/full"})
		admin := open(t, dir)
		defer admin.Close()
		for name, change := range map[string]func() error{
			"create":  func() error { _, err := admin.Create(t.Context(), "created", nil); return err },
			"import":  func() error { _, err := admin.Create(t.Context(), "imported", bytes.Clone(key)); return err },
			"rotate":  func() error { _, err := admin.Rotate(t.Context(), "team-a"); return err },
			"destroy": func() error { _, err := admin.Destroy(t.Context(), "team-a", 0, 0); return err },
			"disable": func() error { _, err := admin.Disable(t.Context(), "team-a", 0); return err },
			"revoke":  func() error { _, err := admin.Revoke(t.Context(), "team-a", "uid:0"); return err },
			"list":    func() error { _, err := admin.List(t.Context()); return err },
			"get":     func() error { _, err := admin.Get(t.Context(), "team-a"); return err },
		} {
			if err := change(); err == nil || !strings.Contains(err.Error(), "can't be written") {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	s, err := keystore.Open(t.Context(), dir, "")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	list, err := s.List(t.Context(), keystore.All)
	if err != nil || len(list) != 1 || list[0].ID != "team-a" || len(list[0].Versions) != 1 || len(list[0].Revoked) != 0 {
		t.Fatalf("left: %+v, %v, want team-a in one version", list, err)
	}
	if got, version, err := s.Key(list[0], 0); err != nil || version != 1 || !bytes.Equal(got, key) {
		t.Errorf("the key is another now: version %d, %v", version, err)
	}
}
