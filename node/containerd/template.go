package containerd

import (
	"bytes"
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/ctrlplane/pilot/node/host"
)

// The template from which k3s and RKE2 make containerd's configuration, if there is one.
const (
	// TemplateBase inserts what they write without a template.
	TemplateBase = "{{ template \"base\" . }}\n\n"
	// TemplateMark begins what pilot's template adds after that.
	TemplateMark = "# pilot's lines:\n"
)

// CheckTemplate returns a [host.Conflict] if this k3s or RKE2 does not know [TemplateBase]: it
// would not start.
func (c *Instance) CheckTemplate(ctx context.Context, h host.Host) error {
	if !c.Template || !c.Deferred() {
		return nil
	}
	program := h.LookPath(strings.ToLower(c.Name))
	if program == "" {
		return nil
	}
	out, err := h.Run(ctx, program, "--version")
	if version := withoutBase(string(out)); err == nil && version != "" {
		return &host.Conflict{Where: program, What: fmt.Sprintf("%s %s can't extend its own template of containerd's configuration, and would not start with pilot's", c.Name, version), Fix: "upgrade it to v1.28.1 or later, or to v1.24.17, v1.25.13, v1.26.8 or v1.27.5"}
	}
	return nil
}

var distributionVersion = regexp.MustCompile(`\bv1\.(\d+)\.(\d+)`)

// withoutBase returns the version of a k3s or RKE2 that does not know [TemplateBase], or "". The
// text is what it prints for --version. https://docs.k3s.io/advanced names the versions.
func withoutBase(text string) string {
	m := distributionVersion.FindStringSubmatch(text)
	if m == nil {
		return "" // a version of one's own
	}
	minor, _ := strconv.Atoi(m[1])
	patch, _ := strconv.Atoi(m[2])
	first, known := map[int]int{24: 17, 25: 13, 26: 8, 27: 5, 28: 1}[minor]
	if minor > 28 || known && patch >= first {
		return ""
	}
	return m[0]
}

// takeOutTemplate takes what pilot's template has added out of the main file, which k3s and
// RKE2 have written by it when they started last.
func (c *Instance) takeOutTemplate(h host.Host) {
	if text, _, marked := bytes.Cut(c.Files.Text, []byte("\n"+TemplateMark)); marked {
		c.Files.Text = text
		return
	}
	// Earlier versions of pilot set no mark.
	for _, path := range c.Ours {
		text, err := h.ReadFile(path)
		_, added, isTemplate := bytes.Cut(text, []byte(TemplateBase))
		if err == nil && isTemplate && len(added) > 0 {
			c.Files.Text = bytes.Replace(c.Files.Text, added, nil, 1)
		}
	}
}
