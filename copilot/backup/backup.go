// Package backup seals a store of KEKs into one file, and opens it: a stream of the age
// format (age-encryption.org/v1) with a line of JSON for each KEK. docs/formats.md has
// the lines.
package backup

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"filippo.io/age"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/internal/keyjson"
	"github.com/ctrlplane/pilot/internal/version"
)

// Format is the version of the lines.
const Format = 1

// Header is the first line of a backup.
type Header struct {
	Format  int       `json:"copilotBackup"`
	Created time.Time `json:"created"`
	// Copilot is the version of the program that made the backup.
	Copilot string `json:"copilot"`
	// Generation is how often the store had been changed.
	Generation int64 `json:"generation"`
	// AuditKey authenticates the lines of the store's audit log: 32 bytes.
	AuditKey []byte `json:"auditKey"`
}

// Totals are what a backup holds.
type Totals struct {
	KEKs     int `json:"keks"`
	Versions int `json:"versions"`
	// Keys is how many of the versions have a key here. Those of the others are in KMSs,
	// or destroyed.
	Keys int `json:"keys"`
}

func (t Totals) String() string {
	return fmt.Sprintf("%d KEKs with %d versions and %d keys", t.KEKs, t.Versions, t.Keys)
}

// add counts a KEK, and checks what is held.
func (t *Totals) add(h keystore.Held) error {
	if w := h.Wraps; w != nil && (w.Wraps < 0 || w.Version < 1 || keystore.CheckID(w.ID) != nil) {
		return fmt.Errorf("version %d of %.60q can't have wrapped %d keys", w.Version, w.ID, w.Wraps)
	}
	if h.KEK == nil {
		return nil
	}
	k, err := h.KEK.Decode()
	t.KEKs, t.Versions, t.Keys = t.KEKs+1, t.Versions+len(k.Versions), t.Keys+len(h.KEK.Keys)
	return err
}

// line is any line but the first. Of its members, those of one kind are set.
type line struct {
	KEK    string              `json:"kek"`
	Record json.RawMessage     `json:"record"`
	Keys   map[int][]byte      `json:"keys"`
	Wraps  *keystore.HeldWraps `json:"wraps"`
	Head   *keystore.AuditHead `json:"head"`
	End    *Totals             `json:"end"`
}

// Write writes a backup that recipients can open. Export calls what it is given with what
// the store holds. What was written is a backup only if Write returns nil.
func Write(w io.Writer, recipients []age.Recipient, h Header, export func(put func(keystore.Held) error) error) (Totals, error) {
	sealed, err := age.Encrypt(w, recipients...)
	if err != nil {
		return Totals{}, fmt.Errorf("seal the backup: %w", err)
	}
	out := bufio.NewWriterSize(sealed, 64<<10)
	put := func(members ...keyjson.Member) error {
		b := append(keyjson.Object(members...), '\n')
		defer clear(b)
		_, err := out.Write(b)
		return err
	}
	err = put(keyjson.Value("copilotBackup", Format), keyjson.Value("created", h.Created.UTC()), keyjson.Value("copilot", version.Version),
		keyjson.Value("generation", h.Generation), keyjson.Key("auditKey", h.AuditKey))
	if err != nil {
		return Totals{}, err
	}
	var sum Totals
	err = export(func(held keystore.Held) error {
		if err := sum.add(held); err != nil {
			return err
		}
		switch {
		case held.KEK != nil:
			var keys []keyjson.Member
			for v, key := range held.KEK.Keys {
				keys = append(keys, keyjson.Key(fmt.Sprint(v), key))
			}
			all := keyjson.Object(keys...)
			defer clear(all)
			return put(keyjson.Value("kek", held.KEK.ID), keyjson.Raw("record", held.KEK.Record), keyjson.Raw("keys", all))
		case held.Wraps != nil:
			return put(keyjson.Value("wraps", held.Wraps))
		default:
			return put(keyjson.Value("head", held.Head))
		}
	})
	if err == nil {
		err = put(keyjson.Value("end", sum))
	}
	if err == nil {
		err = out.Flush()
	}
	if err == nil {
		err = sealed.Close()
	}
	return sum, err
}

var (
	// ErrNotBackup is the error of a file that no copilot has made.
	ErrNotBackup = errors.New("it is no backup of copilot")
	// ErrDamaged is the error of a backup that is not as it was made.
	ErrDamaged = errors.New("the backup is damaged: use another copy, or an earlier one")
	// ErrCutShort is the error of a backup whose end is missing.
	ErrCutShort = errors.New("the backup was cut short: use another copy, or an earlier one")
	// ErrIdentity is the error of identities that can't open a backup.
	ErrIdentity = errors.New("the backup is sealed to other recipients")
	// ErrNewer is the error of a backup from a newer copilot.
	ErrNewer = errors.New("a newer copilot made the backup: use that one, or a newer one")
)

// maxLine bounds a line, in bytes: a KEK with thousands of revocations.
const maxLine = 16 << 20

// Reader reads a backup.
type Reader struct {
	Header
	lines *bufio.Reader
	sum   Totals
	last  string // KEK
	done  bool
}

// Open opens a backup. Errors wrap one of those above. The caller clears the header's
// AuditKey.
func Open(r io.Reader, identities ...age.Identity) (*Reader, error) {
	if err := refuse(); err != nil {
		return nil, err
	}
	plain, err := age.Decrypt(r, identities...)
	if none := new(age.NoIdentityMatchError); errors.As(err, &none) {
		return nil, ErrIdentity
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("%w: %w", ErrCutShort, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotBackup, err)
	}
	b := &Reader{lines: bufio.NewReaderSize(plain, 64<<10)}
	first, err := b.line()
	defer clear(first)
	if err != nil {
		return nil, err
	}
	var kind struct {
		Format int `json:"copilotBackup"`
	}
	if json.Unmarshal(first, &kind) != nil || kind.Format < 1 {
		return nil, ErrNotBackup
	}
	if kind.Format > Format {
		return nil, fmt.Errorf("%w (it has format %d, and this copilot reads up to %d)", ErrNewer, kind.Format, Format)
	}
	if err := keyjson.Decode(first, &b.Header, "copilotBackup", "created", "copilot", "generation", "auditKey"); err != nil {
		return nil, fmt.Errorf("%w: its first line: %w", ErrDamaged, err)
	}
	return b, nil
}

// line returns the next line. The caller clears it.
func (b *Reader) line() ([]byte, error) {
	var text []byte
	for {
		part, err := b.lines.ReadSlice('\n')
		text = keyjson.Append(text, part)
		clear(part)
		switch {
		case err == nil:
			return text, nil
		case errors.Is(err, bufio.ErrBufferFull) && len(text) < maxLine:
			continue
		}
		clear(text)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, ErrCutShort
		}
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
}

// Next returns the next part, or [io.EOF] after the last one, once the backup has turned
// out to be whole. The caller clears the keys.
func (b *Reader) Next() (keystore.Held, error) {
	if b.done {
		return keystore.Held{}, io.EOF
	}
	text, err := b.line()
	if err != nil {
		return keystore.Held{}, err
	}
	defer clear(text)
	var l line
	if err := keyjson.Decode(text, &l, "kek", "record", "keys", "wraps", "head", "end"); err != nil {
		return keystore.Held{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if l.End != nil {
		if *l.End != b.sum {
			return keystore.Held{}, fmt.Errorf("%w: it has %s, and says %s", ErrDamaged, b.sum, *l.End)
		}
		if _, err := b.lines.ReadByte(); !errors.Is(err, io.EOF) {
			return keystore.Held{}, fmt.Errorf("%w: it goes on after its end: %w", ErrDamaged, err)
		}
		b.done = true
		return keystore.Held{}, io.EOF
	}
	h := keystore.Held{Wraps: l.Wraps, Head: l.Head}
	if l.KEK != "" {
		h.KEK = &keystore.HeldKEK{ID: l.KEK, Record: l.Record, Keys: l.Keys}
	}
	err = b.sum.add(h)
	if h.KEK != nil && err == nil {
		if h.KEK.ID <= b.last {
			err = fmt.Errorf("KEK %q comes after %q", h.KEK.ID, b.last)
		}
		b.last = h.KEK.ID
	}
	if err != nil {
		return keystore.Held{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return h, nil
}

// Totals are those of the parts that were read.
func (b *Reader) Totals() Totals { return b.sum }

// Check reads the rest, and returns the totals once the backup has turned out to be whole.
func (b *Reader) Check() (Totals, error) {
	for {
		h, err := b.Next()
		if errors.Is(err, io.EOF) {
			return b.sum, nil
		}
		if err != nil {
			return Totals{}, err
		}
		if h.KEK != nil {
			h.KEK.Clear()
		}
	}
}

// Count returns the totals of what export exports.
func Count(export func(put func(keystore.Held) error) error) (Totals, error) {
	var sum Totals
	err := export(sum.add)
	return sum, err
}
