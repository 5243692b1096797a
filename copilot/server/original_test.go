package server_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/client"
)

// TestOriginalIDNamesItsKEK requests KEKs by ids of the original's API.
func TestOriginalIDNamesItsKEK(t *testing.T) {
	dir := t.TempDir()
	key := bytes.Repeat([]byte("k"), 24)
	create(t, dir, map[string][]byte{"team-a": key, "team/b": key})
	address := serveLoopback(t, dir)
	c, err := client.New(client.Config{URLs: []string{"http://" + address + "/api/v1/key"}, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		json string
		ok   bool
	}{
		{`{"kek_id":"team-a","kms_provider":"dev","kms_provider_path":"","kms_additional_params":{}}`, true},
		{`{"kms_additional_params":{"a":"???"},"kms_provider":"dev","kek_id":"team-a"}`, true}, // its base64 has a slash
		{`{"kek_id":"team/b","kms_provider":"dev"}`, true},
		{`{"kek_id":"team-a","kms_provider":"vault","kms_provider_path":"","kms_additional_params":{}}`, false},
		{`{"kek_id":"team-a"}`, false},
		{`{"kek_id":"nobody","kms_provider":"dev"}`, false},
		{`{"kek_id":"","kms_provider":"dev"}`, false},
		{`{"kms_provider":"dev"}`, false},
		{`team-a`, false},
		{`["team-a"]`, false},
	} {
		id := base64.StdEncoding.EncodeToString([]byte(test.json))
		if strings.Contains(test.json, "???") && !strings.Contains(id, "/") {
			t.Errorf("%s has no slash", id)
		}
		kek, err := c.KEK(t.Context(), id, 0)
		if test.ok && (err != nil || !bytes.Equal(kek.Key, key)) || !test.ok && !errors.Is(err, client.ErrNotFound) {
			t.Errorf("%s: %d bytes, %v", test.json, len(kek.Key), err)
		}
		want := 404
		if test.ok {
			want = 200
		}
		if e := lastAudited(t, dir); e.Action != "export" || e.Status != want {
			t.Errorf("%s: audited %+v", test.json, e)
		}
	}
	// Only the original's API reads them.
	v2, err := client.New(client.Config{URLs: []string{"http://" + address}, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	id := base64.StdEncoding.EncodeToString([]byte(`{"kek_id":"team-a","kms_provider":"dev"}`))
	if _, err := v2.KEK(t.Context(), id, 0); !errors.Is(err, client.ErrNotFound) {
		t.Errorf("v2: %v", err)
	}
}
