package keystore

import (
	"bytes"
	"cmp"
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/ctrlplane/pilot/copilot/kms"
)

// Move moves a store's master key to a KMS, from one KMS to another, or to a file. The
// master key stays the same. Nothing else on this machine may have the store open.
type Move struct {
	*Store
	to   *Wrapping // nil: to a file
	file string    // that has the master key; may be empty
}

// OpenMove opens a store, as [Open] does, to move its master key to a KMS, or to the file
// master.key in dir if to is nil. It finds the master key where it is: in a file or a
// credential, or in a KMS of a name that backends knows.
func OpenMove(ctx context.Context, dir, url string, to *Wrapping, backends func(name string) (open func() (kms.Backend, error), ok bool)) (*Move, error) {
	if url == "" {
		if err := Exists(dir); err != nil {
			return nil, err
		}
	}
	db, err := openDatabase(ctx, cmp.Or(url, dir))
	if err != nil {
		return nil, err
	}
	m := &Move{newStore(db, dir, url, nil), to, masterFileIn(dir)}
	if err := m.find(ctx, backends); err != nil {
		db.close()
		return nil, err
	}
	return m, nil
}

// find loads the master key from where it is.
func (m *Move) find(ctx context.Context, backends func(string) (func() (kms.Backend, error), bool)) error {
	raw, check, err := m.readMasters(ctx)
	if err != nil {
		return err
	}
	if raw == nil && check == nil {
		return fmt.Errorf("%w: copilot makes a new one with the master key where copilot.toml says", ErrNoStore)
	}
	if m.file != "" {
		return m.load(ctx, raw, check)
	}
	if raw == nil {
		return m.load(ctx, raw, check) // says what is missing
	}
	state, err := parseMasterState(raw)
	if err != nil {
		return err
	}
	err = fmt.Errorf("%w: it is held by %q: copilot.toml has none of these in [backends]", errNoMaster, state.current().names())
	for _, h := range state.Keys[0].Holders {
		if open, ok := backends(h.Backend); ok {
			m.wrapping = &Wrapping{h.Backend, h.Path, open}
			if err = m.load(ctx, raw, check); err == nil {
				return nil
			}
		}
	}
	return err
}

// Moved says what a [Move] has done.
type Moved struct {
	From    string `json:"from"`
	To      string `json:"to"`
	Removed string `json:"removed,omitempty"` // the file that had the master key
	// Left is the credential that still has the master key, which only its maker can
	// remove.
	Left string `json:"left,omitempty"`
	// Holders are all that have it now.
	Holders []string `json:"holders"`
}

// From returns where the master key is now, and To where it will be.
func (m *Move) From() string { return m.source }

// To returns where the master key will be.
func (m *Move) To() string {
	if m.to != nil {
		return m.to.String()
	}
	return filepath.Join(m.dir, masterFile)
}

// Run moves the master key. A file that has it is removed last, after the master key was
// read back from where it is then. A move that was interrupted can be run again.
func (m *Move) Run(ctx context.Context) (Moved, error) {
	set := m.masters.Load()
	if set.state.rotating() {
		return Moved{}, fmt.Errorf("%w: the master key is being rotated: let \"copilot master rotate\" finish that first", ErrState)
	}
	moved := Moved{From: m.source, To: m.To()}
	h := m.fileHolder()
	var err error
	switch {
	case m.to != nil:
		h, err = m.to.wrap(ctx, set.current)
	case m.file != "" && m.file != m.To():
		return Moved{}, fmt.Errorf("%w: the master key is the credential %s already", ErrState, m.file)
	case m.file != "":
		return Moved{}, fmt.Errorf("%w: the master key is in %s already", ErrState, m.file)
	default:
		err = m.replaceFile(set)
	}
	if err != nil {
		return Moved{}, err
	}
	err = m.keepMasters(ctx, func(_ *masterSet, state *masterState) error {
		e := state.current()
		// Other copilots may have it from where this one had it.
		e.Holders = slices.DeleteFunc(e.Holders, func(old Holder) bool {
			return !m.shared || old.String() == h.String() || m.to != nil && old.String() == m.fileHolder().String()
		})
		if m.to != nil || m.shared {
			e.Holders = append(e.Holders, h)
		}
		return nil
	})
	if err != nil {
		return Moved{}, err
	}
	if err := m.readBack(ctx, set); err != nil {
		return Moved{}, fmt.Errorf("read the master key back: %w", err)
	}
	moved.Holders = m.masters.Load().state.current().names()
	if m.to == nil || m.file == "" {
		return moved, nil
	}
	if m.file == masterCredentialFile() {
		moved.Left = m.file
		return moved, nil
	}
	if err := os.Remove(m.file); err != nil {
		return moved, fmt.Errorf("the master key is in %s, and its file is left: %w", m.to, err)
	}
	moved.Removed = m.file
	return moved, syncDir(m.dir)
}

// readBack reads the master key from where it is now, as copilot does at its start.
func (m *Move) readBack(ctx context.Context, set *masterSet) error {
	raw, check, err := m.readMasters(ctx)
	if err != nil {
		return err
	}
	again := newStore(m.db, m.dir, "", nil)
	again.wrapping = m.to
	if err := again.load(ctx, raw, check); err != nil {
		return err
	}
	got := again.masters.Load()
	if subtle.ConstantTimeCompare(got.current.key, set.current.key) != 1 || !bytes.Equal(got.audit, set.audit) {
		return errors.New("it is another one")
	}
	return nil
}
