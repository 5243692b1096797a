//go:build !linux

package processor

import "github.com/containers/ocicrypt/keywrap/pkcs11"

func newPKCS11Wrapper() wrapper { return keyWrapper{pkcs11.NewKeyWrapper()} }
