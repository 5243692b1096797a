// Package fips has what pilot's programs know of FIPS 140-3: which cryptographic module
// and mode they run with, and the error of what that mode does not allow.
//
// docs/fips.md has the list. Where GODEBUG=fips140=only is set, Go's library refuses some
// of it with an error, panics at some, and libraries on top of it may hang; so pilot
// refuses it before.
package fips

import (
	"crypto/fips140"
	"errors"
	"fmt"
	"strings"
)

// ErrNotApproved is the error of what FIPS 140-3 does not approve, where only what it
// approves is allowed.
var ErrNotApproved = errors.New("FIPS 140-3 does not approve it, and GODEBUG=fips140=only is set")

// Refuse returns nil unless only what FIPS 140-3 approves is allowed. Otherwise it
// returns an error that wraps [ErrNotApproved]: what is refused, a clause, and what to
// do instead.
func Refuse(what, instead string) error {
	if !fips140.Enforced() {
		return nil
	}
	return fmt.Errorf("%s: %w: %s", what, ErrNotApproved, instead)
}

// RefuseHPKE is [Refuse] for HPKE with AES-GCM, for which the module v1.0.0 has no
// approved service.
func RefuseHPKE() error {
	if !strings.HasPrefix(fips140.Version(), "v1.0.") {
		return nil
	}
	return Refuse("the public half of a KEK takes HPKE, which the Go Cryptographic Module "+fips140.Version()+" does not have",
		"wrap with the KEK itself (--recipient provider:pilot:KEK, with a broker), or use programs with the module v1.26.0 (make build FIPS=v1.26.0)")
}

// Mode returns Go's name of the mode: off, on or only.
func Mode() string {
	switch {
	case fips140.Enforced():
		return "only"
	case fips140.Enabled():
		return "on"
	}
	return "off"
}

// unfrozen is the version of the module in a program that was built without GOFIPS140.
const unfrozen = "latest"

// Module returns the version of the Go Cryptographic Module, such as v1.0.0, or "none" in
// a program that was built without one.
func Module() string {
	if fips140.Version() == unfrozen {
		return "none"
	}
	return fips140.Version()
}

// Describe returns the module and the mode in a phrase, or "" in a program that has
// neither.
func Describe() string {
	switch {
	case Module() != "none":
		return fmt.Sprintf("FIPS 140-3: Go Cryptographic Module %s, fips140=%s", Module(), Mode())
	case Mode() != "off":
		return fmt.Sprintf("FIPS 140-3: no validated module, fips140=%s", Mode())
	}
	return ""
}
