//go:build !no_gcpkms

package kms

import "google.golang.org/api/option"

// AddGoogleOption has a backend not used yet do as option says.
func AddGoogleOption(b Backend, o option.ClientOption) {
	gcp := b.(*gcpKMS)
	gcp.options = append(gcp.options, o)
}
