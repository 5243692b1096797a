package harness

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// CheckLinks follows the links of pages whose names are from dir.
func CheckLinks(t *testing.T, dir string, all map[string]*Page) {
	t.Helper()
	for name, p := range all {
		for _, link := range p.links {
			if strings.Contains(link, "://") {
				continue
			}
			file, anchor, _ := strings.Cut(link, "#")
			target := name
			if file != "" {
				target = filepath.Join(filepath.Dir(name), file)
			}
			if _, err := os.Stat(filepath.Join(dir, target)); err != nil {
				t.Errorf("%s: the link %s leads nowhere", name, link)
			} else if anchor != "" && (all[target] == nil || !slices.Contains(all[target].anchors, anchor)) {
				t.Errorf("%s: %s has no heading for the link %s", name, target, link)
			}
		}
	}
}
