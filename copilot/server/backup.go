package server

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/ctrlplane/pilot/copilot/audit"
	"github.com/ctrlplane/pilot/copilot/backup"
	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/copilot/server/auditing"
	"github.com/ctrlplane/pilot/internal/exit"
)

// backupTimeout bounds making a backup, or restoring one.
const backupTimeout = 15 * time.Minute

// backupPath is the admin socket's path for backups.
const backupPath = "/backup"

// backupBody is a request for a backup that is sealed to recipients.
type backupBody struct {
	Recipients []string `json:"recipients"`
}

// Backup describes a backup that was made.
type Backup struct {
	Created time.Time `json:"created"`
	backup.Totals
	SHA256 string `json:"sha256"` // of the file
	Bytes  int64  `json:"bytes"`
}

// backupHeader is the header of HTTP that describes a backup.
const backupHeader = "Copilot-Backup"

// WriteBackup writes a backup of the store that conf names to w, sealed to recipients:
// the broker that runs there makes it if one does. It is as of one moment. The audit log
// has its digest. W has a backup only if there is no error.
func WriteBackup(ctx context.Context, conf Config, recipients []string, w io.Writer) (Backup, error) {
	keys, err := OpenExistingKeys(ctx, conf)
	if err != nil {
		return Backup{}, err
	}
	defer keys.Close()
	ctx, cancel := context.WithTimeout(ctx, backupTimeout)
	defer cancel()
	switch k := keys.(type) {
	case *localKeys:
		s, err := auditedWithin(ctx, backupTimeout, k, "backup", "", func(ctx context.Context, e *auditing.Entry) (*spooled, error) {
			return k.api.writeBackup(ctx, e, recipients)
		})
		if err != nil {
			return Backup{}, err
		}
		defer s.file.Close()
		_, err = io.Copy(w, s.file)
		return s.made, err
	case *remoteKeys:
		return k.download(ctx, backupPath, backupBody{recipients}, w)
	}
	panic("unknown kind of Keys")
}

// describePath is the admin socket's path for what a backup is compared with.
const describePath = "/backup/describe"

// describeBody is a request for a description of all KEKs, with checks of their keys by a
// nonce.
type describeBody struct {
	Nonce []byte `json:"nonce"`
}

// CompareBackup compares a backup with the store that conf names, through the broker that
// runs there if one does. It changes nothing.
func CompareBackup(ctx context.Context, conf Config, b *backup.Reader) ([]backup.Difference, error) {
	keys, err := OpenExistingKeys(ctx, conf)
	if err != nil {
		return nil, err
	}
	defer keys.Close()
	ctx, cancel := context.WithTimeout(ctx, backupTimeout)
	defer cancel()
	nonce := make([]byte, 16)
	rand.Read(nonce) // never fails
	var lines io.Reader
	switch k := keys.(type) {
	case *localKeys:
		s, err := auditedWithin(ctx, backupTimeout, k, "describe", "", func(ctx context.Context, e *auditing.Entry) (*spooled, error) {
			return k.api.describeAll(ctx, nonce)
		})
		if err != nil {
			return nil, err
		}
		defer s.file.Close()
		lines = s.file
	case *remoteKeys:
		read, write := io.Pipe()
		defer read.Close()
		go func() {
			_, err := k.download(ctx, describePath, describeBody{nonce}, write)
			write.CloseWithError(err)
		}()
		lines = read
	}
	d := json.NewDecoder(lines)
	return backup.Compare(b, nonce, func() (next backup.Described, err error) {
		err = d.Decode(&next)
		return next, err
	})
}

func (a *api) describeStore(r *http.Request, e *auditing.Entry) (any, error) {
	var in describeBody
	if err := decodeBody(r, &in); err != nil {
		return nil, err
	}
	return a.describeAll(r.Context(), in.Nonce)
}

// describeAll describes all KEKs as of one moment, a line each.
func (a *api) describeAll(ctx context.Context, nonce []byte) (*spooled, error) {
	return a.spool(func(w io.Writer) (backup.Totals, error) {
		lines := json.NewEncoder(w)
		return backup.Totals{}, a.keks.Store.Export(ctx, func(h keystore.Held) error {
			if h.KEK == nil {
				return nil
			}
			return lines.Encode(backup.Describe(h.KEK, nonce))
		})
	})
}

func (a *api) backup(r *http.Request, e *auditing.Entry) (any, error) {
	var in backupBody
	if err := decodeBody(r, &in); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(r.Context(), backupTimeout)
	defer cancel()
	return a.writeBackup(ctx, e, in.Recipients)
}

// spooled is an answer that is a file, which has no name. It is closed once it is written.
type spooled struct {
	file *os.File
	made Backup
}

// spool has write write an answer to a file without a name, so that the store's
// transaction does not last as long as a client takes to read.
func (a *api) spool(write func(io.Writer) (backup.Totals, error)) (_ *spooled, err error) {
	f, err := os.CreateTemp(a.conf.Dir, ".backup-")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := os.Remove(f.Name()); err != nil {
		return nil, err
	}
	s := &spooled{file: f, made: Backup{Created: time.Now().UTC()}}
	digest := sha256.New()
	out := bufio.NewWriterSize(io.MultiWriter(f, digest), 64<<10)
	if s.made.Totals, err = write(out); err != nil {
		return nil, err
	}
	if err := out.Flush(); err != nil {
		return nil, err
	}
	if s.made.Bytes, err = f.Seek(0, io.SeekCurrent); err != nil {
		return nil, err
	}
	s.made.SHA256 = hex.EncodeToString(digest.Sum(nil))
	_, err = f.Seek(0, io.SeekStart)
	return s, err
}

// writeBackup makes a backup.
func (a *api) writeBackup(ctx context.Context, e *auditing.Entry, recipients []string) (*spooled, error) {
	to, err := backup.ParseRecipients(recipients)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", keystore.ErrInput, err)
	}
	if len(to) == 0 {
		return nil, fmt.Errorf("%w: a backup needs recipients", keystore.ErrInput)
	}
	if err := a.approveRecipients(ctx, e, recipients); err != nil {
		return nil, err
	}
	s, err := a.spool(func(w io.Writer) (backup.Totals, error) { return a.seal(ctx, w, to) })
	if err != nil {
		return nil, err
	}
	var names []string
	for _, r := range recipients {
		names = append(names, backup.Short(r))
	}
	e.Reason = fmt.Sprintf("%s, sha256:%s, for %s", s.made.Totals, s.made.SHA256, strings.Join(names, ", "))
	return s, nil
}

// approveRecipients has a second admin approve recipients that the configuration does not
// name, if exports need one.
func (a *api) approveRecipients(ctx context.Context, e *auditing.Entry, recipients []string) error {
	var configured []string
	if name := a.conf.BackupRecipients; name != "" {
		var err error
		if configured, err = backup.ReadRecipients(name); err != nil {
			return err
		}
	}
	var others []string
	for _, r := range recipients {
		if !slices.Contains(configured, r) {
			// All of the digest: the comment of an SSH key can be chosen so that a part of it fits.
			others = append(others, fmt.Sprintf("%s (sha256 %x)", backup.Short(r), sha256.Sum256([]byte(r))))
		}
	}
	if len(others) == 0 {
		return nil
	}
	return a.approved(ctx, e, opExport, "a backup of the store for "+strings.Join(others, ", "))
}

func (a *api) seal(ctx context.Context, w io.Writer, to []age.Recipient) (backup.Totals, error) {
	key := a.keks.Store.AuditKey()
	defer clear(key)
	a.heads.note(ctx)
	found, err := a.keks.Store.CheckChanged(ctx, a.least)
	if err == nil && len(found) > 0 {
		err = fmt.Errorf("%w: %d records were put back as they were earlier, or deleted: see \"copilot store check\" first", keystore.ErrState, len(found))
	}
	if err != nil {
		return backup.Totals{}, err
	}
	return backup.Write(w, to, backup.Header{Created: time.Now().UTC(), Generation: a.keks.Store.Generation(), AuditKey: key}, func(put func(keystore.Held) error) error {
		return a.keks.Store.Export(ctx, put)
	})
}

// stallTimeout bounds the wait for a client that reads a backup.
const stallTimeout = 20 * time.Second

// write writes the answer.
func (s *spooled) write(w http.ResponseWriter) {
	defer s.file.Close()
	about, _ := json.Marshal(s.made)
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", fmt.Sprint(s.made.Bytes))
	w.Header().Set(backupHeader, string(about))
	control := http.NewResponseController(w)
	buffer := make([]byte, 256<<10)
	for {
		n, err := s.file.Read(buffer)
		if n > 0 {
			// A client that misses the end has fewer bytes than the header says.
			if control.SetWriteDeadline(time.Now().Add(stallTimeout)) != nil {
				return
			}
			if _, err := w.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// download writes the file that the broker answers to w.
func (k *remoteKeys) download(ctx context.Context, path string, in any, w io.Writer) (made Backup, err error) {
	body, err := json.Marshal(in)
	if err != nil {
		return made, err
	}
	client := k.http
	client.Timeout = 0 // ctx has one
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, k.base+path, bytes.NewReader(body))
	if err != nil {
		return made, err
	}
	err = (&remoteKeys{http: client, base: k.base}).receive(req, func(resp *http.Response) error {
		if err := json.Unmarshal([]byte(resp.Header.Get(backupHeader)), &made); err != nil {
			return fmt.Errorf("the running copilot's answer is no backup: %w", err)
		}
		digest := sha256.New()
		if _, err := io.Copy(io.MultiWriter(w, digest), resp.Body); err != nil {
			return err
		}
		if hex.EncodeToString(digest.Sum(nil)) != made.SHA256 {
			return errors.New("the running copilot sent another backup than it made")
		}
		return nil
	})
	return made, err
}

// Restored describes a restored store.
type Restored struct {
	Backup backup.Header `json:"-"`
	backup.Totals
	// Created describes the store if it was made, or is "".
	Created string `json:"-"`
}

// Restore fills the store that conf names, which has no KEKs yet, or is made, with a backup
// that identities open. It is read twice: before anything is changed, it turns out to be whole,
// and what is restored is what was read then, and approved. No broker may run. The store has
// all of the backup then, or nothing.
func Restore(ctx context.Context, conf Config, file io.ReadSeeker, identities ...age.Identity) (Restored, error) {
	if err := conf.check(); err != nil {
		return Restored{}, exit.UsageError(err)
	}
	socket := filepath.Join(conf.Dir, adminSocket)
	if adminOf(conf.Dir).alive(ctx) == nil {
		return Restored{}, fmt.Errorf("a running copilot uses the store (%s): stop it first (systemctl stop copilot)", socket)
	}
	want, digest, err := readAll(file, identities)
	if err != nil {
		return Restored{}, err
	}
	b, err := newBroker(ctx, conf)
	if err != nil {
		return Restored{}, err
	}
	l := newLocalKeys(b, conf)
	defer l.Close()
	return auditedWithin(ctx, backupTimeout, l, "restore", "", func(ctx context.Context, e *auditing.Entry) (Restored, error) {
		r, again, err := openBackup(file, identities)
		if err != nil {
			return Restored{}, err
		}
		defer clear(r.AuditKey)
		made := Restored{Backup: r.Header, Created: l.created}
		var ended audit.Head
		what := fmt.Sprintf("the backup of %s with %s, sha256:%s", r.Created.Format(time.RFC3339), want, digest)
		if err := l.api.approved(ctx, e, opRestore, what); err != nil {
			return Restored{}, err
		}
		e.Reason = what
		_, err = b.keks.Store.Import(ctx, max(l.api.least, r.Generation), func() (keystore.Held, error) {
			h, err := r.Next()
			if h.Head != nil {
				ended = headOf(*h.Head)
			}
			if errors.Is(err, io.EOF) {
				// The last moment before the change is made.
				if sum := hex.EncodeToString(again.Sum(nil)); sum != digest {
					return keystore.Held{}, fmt.Errorf("%w: the file was changed while it was read: it was sha256:%s, and is sha256:%s", keystore.ErrState, digest, sum)
				}
				if ended.Seq > 0 {
					e.Reason += "; the log went to " + ended.String()
				}
				if err := l.api.audit.WriteAhead(e); err != nil {
					return keystore.Held{}, err
				}
			}
			return h, err
		})
		if err != nil {
			return Restored{}, err
		}
		// What was written is what is read.
		made.Totals, err = backup.Count(func(put func(keystore.Held) error) error {
			return b.keks.Store.Export(ctx, put)
		})
		if err == nil && made.Totals != want {
			err = fmt.Errorf("the store has %s, and the backup %s", made.Totals, want)
		}
		return made, err
	})
}

// openBackup opens a backup from its file's beginning. What is read of the file goes into the
// SHA-256 that it returns.
func openBackup(file io.ReadSeeker, identities []age.Identity) (*backup.Reader, hash.Hash, error) {
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return nil, nil, err
	}
	digest := sha256.New()
	r, err := backup.Open(io.TeeReader(file, digest), identities...)
	return r, digest, err
}

// readAll reads a whole backup, and returns its totals and the file's SHA-256.
func readAll(file io.ReadSeeker, identities []age.Identity) (backup.Totals, string, error) {
	r, digest, err := openBackup(file, identities)
	if err != nil {
		return backup.Totals{}, "", err
	}
	defer clear(r.AuditKey)
	sum, err := r.Check()
	return sum, hex.EncodeToString(digest.Sum(nil)), err
}
