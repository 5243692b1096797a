package mirror

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func TestEachReasonOfAFullPullIsDocumented(t *testing.T) {
	b, err := os.ReadFile("../docs/lazy.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(b), "### Layers that are pulled in full")
	table, _, _ = strings.Cut(table, "\n### ")
	var documented []string
	for _, row := range regexp.MustCompile("(?m)^\\| `(.+?)` \\|").FindAllStringSubmatch(table, -1) {
		documented = append(documented, row[1])
	}
	slices.Sort(documented)
	if want := slices.Sorted(slices.Values(lazyReasons)); !slices.Equal(documented, want) {
		t.Errorf("docs/lazy.md has the reasons %q, not %q", documented, want)
	}
}
