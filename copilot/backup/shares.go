package backup

import (
	"bytes"
	"crypto/sha256"
	"encoding/base32"
	"errors"
	"fmt"
	"strings"

	"filippo.io/age"

	"github.com/ctrlplane/pilot/internal/shamir"
)

// Share is one share of an identity that opens backups.
type Share struct {
	Set       string // which shares belong together
	Index     int    // from 1
	Total     int    // how many there are
	Threshold int    // how many are needed

	setID [setSize]byte
	point []byte // a byte for each of the identity's text
}

const (
	shareText = "copilot-share-"
	// shareFormat is the first byte of a share's encoding.
	shareFormat = 1
	setSize     = 5 // bytes of the SHA-256 of the recipient
	headSize    = 1 + setSize + 3
	sumSize     = 4 // bytes of the SHA-256 of all before
	groupSize   = 6 // characters between dashes

	// identityText begins the text of an age identity that is split. The rest has
	// identitySize characters.
	identityText = "AGE-SECRET-KEY-PQ-1"
	identitySize = 58
)

// letters are those of Crockford's base 32, which has no I, L, O and U.
var letters = base32.NewEncoding("0123456789ABCDEFGHJKMNPQRSTVWXYZ").WithPadding(base32.NoPadding)

// NewShares makes a new identity and splits it into shares, of which threshold are needed.
// Backups are sealed to the recipient, which is no secret. The identity itself is nowhere.
func NewShares(threshold, total int) ([]Share, *age.HybridRecipient, error) {
	if err := refuse(); err != nil {
		return nil, nil, err
	}
	identity, err := age.GenerateHybridIdentity()
	if err != nil {
		return nil, nil, err
	}
	text, ok := strings.CutPrefix(identity.String(), identityText)
	if !ok || len(text) != identitySize {
		return nil, nil, errors.New("age's identities have changed: this copilot can't split them")
	}
	secret := []byte(text)
	defer clear(secret)
	points, err := shamir.Split(secret, threshold, total)
	if err != nil {
		return nil, nil, err
	}
	id := setOf(identity)
	var shares []Share
	for _, p := range points {
		shares = append(shares, Share{nameOf(id), int(p.X), total, threshold, id, p.Y})
	}
	return shares, identity.Recipient(), nil
}

func setOf(identity *age.HybridIdentity) (id [setSize]byte) {
	sum := sha256.Sum256([]byte(identity.Recipient().String()))
	copy(id[:], sum[:])
	return id
}

func nameOf(id [setSize]byte) string {
	text := letters.EncodeToString(id[:])
	return text[:4] + "-" + text[4:]
}

// String returns the share as [ParseShare] reads it. It is a secret.
func (s Share) String() string {
	b := append([]byte{shareFormat}, s.setID[:]...)
	b = append(append(b, byte(s.Index), byte(s.Total), byte(s.Threshold)), s.point...)
	sum := sha256.Sum256(b)
	text := letters.EncodeToString(append(b, sum[:sumSize]...))
	var out strings.Builder
	out.WriteString(shareText)
	for i := 0; i < len(text); i += groupSize {
		if i > 0 {
			out.WriteByte('-')
		}
		out.WriteString(text[i:min(i+groupSize, len(text))])
	}
	return out.String()
}

var (
	// ErrNotShare is the error of a text that is no share.
	ErrNotShare = errors.New("it is no share: one begins with " + shareText)
	// ErrTyping is the error of a share that was not copied as it is.
	ErrTyping = errors.New("the share has a typing error: compare it with the original, letter by letter")
	// ErrOtherSet is the error of shares that do not belong together.
	ErrOtherSet = errors.New("the shares are of different sets")
	// ErrTooFew is the error of fewer shares than are needed.
	ErrTooFew = errors.New("there are too few shares")
)

// ParseShare reads a share: the text of [Share.String] on one line or several. Lines that
// begin with # do not count, nor do spaces, dashes and case.
func ParseShare(text string) (Share, error) {
	var all strings.Builder
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); !strings.HasPrefix(line, "#") {
			all.WriteString(line)
		}
	}
	compact := strings.NewReplacer("-", "", " ", "", "\t", "").Replace(strings.ToUpper(all.String()))
	encoded, ok := strings.CutPrefix(compact, strings.ToUpper(strings.ReplaceAll(shareText, "-", "")))
	if !ok {
		return Share{}, ErrNotShare
	}
	// As people read them.
	encoded = strings.NewReplacer("O", "0", "I", "1", "L", "1").Replace(encoded)
	b, err := letters.DecodeString(encoded)
	if err != nil || len(b) < headSize+sumSize {
		return Share{}, ErrTyping
	}
	body := b[:len(b)-sumSize]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:sumSize], b[len(body):]) || letters.EncodeToString(b) != encoded {
		return Share{}, ErrTyping
	}
	if body[0] != shareFormat || len(body) != headSize+identitySize {
		return Share{}, fmt.Errorf("the share has format %d: a newer copilot made it", body[0])
	}
	s := Share{Index: int(body[6]), Total: int(body[7]), Threshold: int(body[8]), setID: [setSize]byte(body[1:6]), point: body[headSize:]}
	s.Set = nameOf(s.setID)
	return s, nil
}

// Combine returns the identity of shares of one set. More than are needed must fit, too.
// Errors wrap [ErrOtherSet] or [ErrTooFew].
func Combine(shares []Share) (age.Identity, error) {
	if err := refuse(); err != nil {
		return nil, err
	}
	if len(shares) == 0 {
		return nil, ErrTooFew
	}
	first := shares[0]
	var points []shamir.Share
	seen := make(map[int]bool)
	for _, s := range shares {
		if s.setID != first.setID || s.Threshold != first.Threshold || s.Total != first.Total {
			return nil, fmt.Errorf("%w: share %d is of set %s, and share %d of set %s", ErrOtherSet, first.Index, first.Set, s.Index, s.Set)
		}
		if !seen[s.Index] {
			points = append(points, shamir.Share{X: byte(s.Index), Y: s.point})
		}
		seen[s.Index] = true
	}
	if len(points) < first.Threshold {
		return nil, fmt.Errorf("%w: %d of set %s, which needs %d of its %d", ErrTooFew, len(points), first.Set, first.Threshold, first.Total)
	}
	secret, err := shamir.Combine(points)
	if err != nil {
		return nil, err
	}
	defer clear(secret)
	identity, err := age.ParseHybridIdentity(identityText + string(secret))
	if err != nil || setOf(identity) != first.setID {
		return nil, fmt.Errorf("the shares of set %s do not fit together: one of them was not made with the others", first.Set)
	}
	return identity, nil
}
