package keyprovider

import "fmt"

// Format is a format of wrapped layer keys: see docs/formats.md.
type Format string

const (
	// FormatA256GCMKW names the KEK and its version, so that a node needs
	// no parameter to unwrap. The KEK has 32 bytes. It is the default.
	FormatA256GCMKW Format = "A256GCMKW"
	// FormatCopilot makes the broker wrap and unwrap. The default does the same for a
	// KEK that the broker does not export.
	FormatCopilot Format = "copilot"
	// FormatOriginal is that of the original pilot, for nodes that still run it. It
	// does not name its KEK.
	FormatOriginal Format = "original"
)

func (f *Format) String() string { return string(*f) }

// UnmarshalText sets f to one of the formats above.
func (f *Format) UnmarshalText(b []byte) error {
	switch v := Format(b); v {
	case FormatA256GCMKW, FormatCopilot, FormatOriginal:
		*f = v
		return nil
	}
	return fmt.Errorf("%q is not an annotation format: use %s, %s or %s", b, FormatA256GCMKW, FormatCopilot, FormatOriginal)
}
