package image

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"

	"github.com/ctrlplane/pilot/processor"
)

// TestTableOfContentsIsBounded has tables of contents that take much more memory than their
// bytes in the layer.
func TestTableOfContentsIsBounded(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, text, want string
	}{
		{"small", `{"entries":[{},{}]}`, ""},
		{"entries", `{"entries":[{}` + strings.Repeat(",{}", maxEntries) + `]}`, "more than 1048576 entries"},
		{"no entries", `{"entries":[null` + strings.Repeat(",null", maxEntries) + `]}`, "more than 1048576 entries"},
		{"numbers", `{"entries":[0` + strings.Repeat(",0", maxEntries) + `]}`, "more than 1048576 entries"},
		{"empty texts, in capitals", `{"Entries":[""` + strings.Repeat(",\"\"", maxEntries) + `]}`, "more than 1048576 entries"},
		{"a second time", `{"entries":[],"entries":[[]` + strings.Repeat(",[]", maxEntries) + `]}`, "more than 1048576 entries"},
		{"as many as there may be", `{"entries":[{}` + strings.Repeat(`,{"xattrs":{"a":"\\","b":"x,[{"}}`, maxEntries-1) + `]}`, ""},
		{"commas in names", `{"entries":[{"name":"` + strings.Repeat("\\\",", maxEntries) + `"}]}`, ""},
		{"braces in names", `{"entries":[{"name":"` + strings.Repeat("{", maxEntries) + `"}]}`, ""},
		{"bytes", `{"entries":[{"name":"` + strings.Repeat("x", maxTOC) + `"}]}`, "more than 268435456 bytes"},
	} {
		end := gzipped(tarOf(t, reg(estargz.TOCTarName, test.text)))
		end += string(estargz.CreateGzipFooter(fmt.Appendf([]byte("SG\x16\x00"), "%016xSTARGZ", 0)))
		err := VerifyTOC(Lazy{Size: int64(len(end)), TOC: digest.FromString(test.text)}, []byte(end))
		switch {
		case test.want == "" && err == nil:
		case test.want == "" || !errors.Is(err, processor.ErrTampered) || !strings.Contains(err.Error(), test.want):
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}
}
