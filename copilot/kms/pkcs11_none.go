//go:build !cgo || no_pkcs11

package kms

// RunModule returns: there are no backends of type pkcs11.
func RunModule() {}
