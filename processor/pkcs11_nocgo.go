//go:build !cgo

package processor

const pkcs11Supported = false
