package server_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/ctrlplane/pilot/copilot/server"
	"github.com/ctrlplane/pilot/copilot/server/servertest"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// swapped is a file that somebody replaces after it was read once.
type swapped struct {
	*bytes.Reader
	then []byte
	read bool
}

func (s *swapped) Seek(offset int64, whence int) (int64, error) {
	if s.read {
		s.Reader = bytes.NewReader(s.then)
	}
	s.read = true
	return s.Reader.Seek(offset, whence)
}

// TestRestoredIsWhatWasChecked replaces a backup by another one of the same recipient, after
// it was read and before it is restored: nothing is.
func TestRestoredIsWhatWasChecked(t *testing.T) {
	fipstest.Refused(t, fipstest.Backup)
	dir := t.TempDir()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	var files [2]bytes.Buffer
	for i, kek := range []string{"team-a", "team-b"} {
		conf := server.Config{Dir: filepath.Join(dir, kek)}
		servertest.CreateKEKs(t, conf.Dir, kek)
		if _, err := server.WriteBackup(t.Context(), conf, []string{identity.Recipient().String()}, &files[i]); err != nil {
			t.Fatal(err)
		}
	}
	conf := server.Config{Dir: filepath.Join(dir, "restored")}
	_, err = server.Restore(t.Context(), conf, &swapped{Reader: bytes.NewReader(files[0].Bytes()), then: files[1].Bytes()}, identity)
	if err == nil || !strings.Contains(err.Error(), "the file was changed while it was read") {
		t.Errorf("restored: %v", err)
	}
	keys := open(t, conf.Dir)
	list, err := keys.List(t.Context())
	if err = errors.Join(err, keys.Close()); err != nil || len(list) > 0 {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := server.Restore(t.Context(), conf, bytes.NewReader(files[0].Bytes()), identity); err != nil {
		t.Error(err)
	}
}
