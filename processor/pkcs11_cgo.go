//go:build cgo

package processor

// pkcs11Supported says whether ocicrypt can load PKCS#11 modules here, which
// takes cgo.
const pkcs11Supported = true
