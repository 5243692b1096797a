package keystore

import (
	"bytes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/ctrlplane/pilot/internal/aesgcm"
)

const (
	// masterName is the name under which the store keeps what is known of its master keys:
	// [masterState]. A store that was never rotated, and whose master key is a file, may
	// not have it.
	masterName = "master keys"
	// masterCheck is the name of a constant sealed under the first master key, which is
	// all that a store of an earlier copilot has. After a rotation no earlier copilot
	// takes its key for the right one.
	masterCheck = "check"
	// masterFormat is the newest format of [masterState] that this copilot knows. The first
	// may have no MAC. Copilots that would drop the MAC do not know the second.
	masterFormat = 2
)

// masterState is what the store keeps of its master keys.
type masterState struct {
	Format int           `json:"format"`
	Keys   []masterEntry `json:"keys"` // in order: the last one is current
	// Resealed says that nothing is sealed under any but the last one.
	Resealed bool `json:"resealed,omitempty"`
	// MAC authenticates the JSON without it, as that of an anchor does. It is absent if an
	// earlier copilot wrote the state.
	MAC []byte `json:"mac,omitempty"`
}

// text returns the JSON without its MAC.
func (s masterState) text() ([]byte, error) {
	s.MAC = nil
	return json.Marshal(s)
}

// sealState returns what the store keeps of a state.
func (s *masterSet) sealState(state masterState) ([]byte, error) {
	state.Format = masterFormat
	text, err := state.text()
	if err != nil {
		return nil, err
	}
	state.MAC = s.stateMAC(masterName, text)
	return json.Marshal(state)
}

// masterEntry is a master key, of 32 bytes, which is not in the database.
type masterEntry struct {
	Version int       `json:"version"` // from 1
	Created time.Time `json:"created,omitzero"`
	// Check is a constant sealed under it.
	Check []byte `json:"check"`
	// Audit is the key of the audit log, sealed under it. The first master key has none:
	// the audit log's is derived from it.
	Audit []byte `json:"audit,omitempty"`
	// Handed is the master key, sealed under the one before, as long as that is there.
	Handed []byte `json:"handed,omitempty"`
	// Holders have it.
	Holders []Holder `json:"holders,omitempty"`
}

// Holder is what keeps a master key: a KMS that has wrapped it, or the file of one
// copilot.
type Holder struct {
	Backend string `json:"backend,omitempty"`
	Path    string `json:"path,omitempty"` // there
	Version int    `json:"version,omitempty"`
	Wrapped []byte `json:"wrapped,omitempty"`
	File    string `json:"file,omitempty"` // HOST:DIRECTORY
}

// String returns the holder's name, BACKEND/PATH or HOST:DIRECTORY.
func (h Holder) String() string {
	if h.File != "" {
		return h.File
	}
	return h.Backend + "/" + h.Path
}

func (e masterEntry) holder(name string) int {
	return slices.IndexFunc(e.Holders, func(h Holder) bool { return h.String() == name })
}

// names returns the names of its holders.
func (e masterEntry) names() []string {
	list := []string{}
	for _, h := range e.Holders {
		list = append(list, h.String())
	}
	return list
}

// current returns the current entry.
func (s *masterState) current() *masterEntry { return &s.Keys[len(s.Keys)-1] }

// rotating reports whether there is a master key before the current one.
func (s *masterState) rotating() bool { return len(s.Keys) > 1 }

func parseMasterState(b []byte) (masterState, error) {
	var s masterState
	if err := json.Unmarshal(b, &s); err != nil || s.Format < 1 {
		return s, errMasters
	}
	if s.Format > masterFormat {
		return s, fmt.Errorf("%w: its master keys have format %d, and this copilot knows %d", ErrNewer, s.Format, masterFormat)
	}
	if s.MAC == nil && s.Format > 1 || len(s.Keys) < 1 || len(s.Keys) > 2 || s.Keys[0].Version < 1 || s.rotating() && s.Keys[1].Version != s.Keys[0].Version+1 {
		return s, errMasters
	}
	return s, nil
}

// ErrNewer is the error of what a newer copilot has written.
var ErrNewer = errors.New("a newer copilot has written to the store: upgrade this one")

// masterKey is a master key that this process has.
type masterKey struct {
	version int
	key     []byte
	seal    cipher.AEAD
}

func newMasterKey(version int, key []byte) (*masterKey, error) {
	seal, err := aesgcm.New(key)
	return &masterKey{version, key, seal}, err
}

// place is what something is sealed for: from the second master key on, also for that.
func (m *masterKey) place(what []byte) []byte {
	if m.version == 1 {
		return what
	}
	return append(fmt.Appendf(nil, "master %d ", m.version), what...)
}

func (m *masterKey) sealFor(place, b []byte) []byte { return m.seal.Seal(nil, nil, b, m.place(place)) }

func (m *masterKey) openFor(place, sealed []byte) ([]byte, error) {
	return m.seal.Open(nil, nil, sealed, m.place(place))
}

// isOf reports whether it is the master key of an entry.
func (m *masterKey) isOf(e masterEntry) bool {
	_, err := m.openFor([]byte(masterCheck), e.Check)
	return err == nil
}

// masterSet are the master keys of a store, as far as this process has them. It does not
// change.
type masterSet struct {
	raw     []byte // as the store keeps it; nil if it does not
	state   masterState
	known   map[int]*masterKey
	current *masterKey
	audit   []byte // the key of the audit log
}

// newMasterSet returns the set of a state, of which this process has some keys: from
// those come others that were handed on. The error is a [*missingMaster] if the current one
// is not among them.
func newMasterSet(raw []byte, state masterState, has ...*masterKey) (*masterSet, error) {
	s := &masterSet{raw: raw, state: state, known: make(map[int]*masterKey)}
	for _, m := range has {
		s.known[m.version] = m
	}
	for i, e := range state.Keys {
		if s.known[e.Version] == nil && i > 0 && e.Handed != nil {
			if before := s.known[state.Keys[i-1].Version]; before != nil {
				key, err := before.openFor(handedPlace(e.Version), e.Handed)
				if err != nil {
					return nil, fmt.Errorf("master key %d is damaged or was tampered with in the store", e.Version)
				}
				if s.known[e.Version], err = newMasterKey(e.Version, key); err != nil {
					return nil, err
				}
			}
		}
		m := s.known[e.Version]
		if m == nil {
			continue
		}
		if !m.isOf(e) {
			return nil, errOtherMaster
		}
		s.current = m
	}
	e := state.current()
	if s.current == nil || s.current.version != e.Version {
		return nil, &missingMaster{e.Version}
	}
	var err error
	if e.Audit == nil {
		s.audit, err = deriveAuditKey(s.current.key)
	} else if s.audit, err = s.current.openFor([]byte(auditPlace), e.Audit); err != nil {
		err = errors.New("the audit log's key is damaged or was tampered with in the store")
	}
	if err != nil || s.unsigned() {
		return s, err
	}
	text, err := state.text()
	if err == nil && !hmac.Equal(state.MAC, s.stateMAC(masterName, text)) {
		err = errMasters
	}
	return s, err
}

// unsigned reports whether the state has no MAC. Callers decide whether that is right.
func (s *masterSet) unsigned() bool { return s.state.MAC == nil }

var errMasters = errors.New("what the store has of its master keys is damaged or was tampered with: restore the store from a backup")

const auditPlace = "audit log"

func handedPlace(version int) []byte { return fmt.Appendf(nil, "handed on %d", version) }

var errOtherMaster = errors.New("the master key is not the one that the KEKs are sealed with: put that one back")

// missingMaster is the error of a master key that this process does not have.
type missingMaster struct{ version int }

func (m *missingMaster) Error() string {
	return fmt.Sprintf("this copilot does not have master key %d, which another one has made", m.version)
}

// keys returns those that it has of its state.
func (s *masterSet) keys() (list []*masterKey) {
	for _, e := range s.state.Keys {
		if m := s.known[e.Version]; m != nil {
			list = append(list, m)
		}
	}
	return list
}

// follow returns the set of what the store keeps by now.
func (s *masterSet) follow(raw []byte) (*masterSet, error) {
	if bytes.Equal(raw, s.raw) {
		return s, nil
	}
	state, err := parseMasterState(raw)
	if err != nil {
		return nil, err
	}
	return newMasterSet(raw, state, s.keys()...)
}

// legacyState is the state of a store that has only a check.
func legacyState(check []byte) masterState {
	return masterState{Format: 1, Keys: []masterEntry{{Version: 1, Check: check}}}
}

// newMasterEntry returns the entry of a key.
func newMasterEntry(m *masterKey) masterEntry {
	return masterEntry{Version: m.version, Created: time.Now().UTC().Truncate(time.Second), Check: m.sealFor([]byte(masterCheck), nil)}
}

// randomMaster returns a new random master key.
func randomMaster(version int) (*masterKey, error) {
	key := make([]byte, masterSize)
	rand.Read(key) // never fails
	return newMasterKey(version, key)
}

func deriveAuditKey(master []byte) ([]byte, error) {
	return hkdf.Key(sha256.New, master, nil, "copilot audit log", sha256.Size)
}

// fileBytes is what a file of the current master key has.
func (s *masterSet) fileBytes() masterBytes {
	if s.current.version == 1 {
		return s.current.key
	}
	return slices.Concat(s.current.key, s.audit)
}
