package containerd

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
)

// difference is a setting that differs between two configurations.
type difference struct {
	path       []string
	was, would any // nil: not set
}

func (d difference) String() string {
	var name strings.Builder
	for i, key := range d.path {
		if i > 0 {
			name.WriteByte('.')
		}
		if strings.ContainsAny(key, ". /") {
			key = `"` + key + `"`
		}
		name.WriteString(key)
	}
	return fmt.Sprintf("%s (%s, not %s)", &name, shownSetting(d.would), shownSetting(d.was))
}

func shownSetting(v any) string {
	switch v := v.(type) {
	case nil:
		return "unset"
	case string:
		return fmt.Sprintf("%.60q", v)
	case map[string]any:
		return fmt.Sprintf("a table of %d", len(v))
	}
	return fmt.Sprintf("%.60s", fmt.Sprint(v))
}

// Differences returns the settings that differ between two configurations, except those
// for which ours is true, and the list of imported files. An empty table equals none.
func Differences(was, would map[string]any, ours func(path []string) bool) []difference {
	var all []difference
	compare(nil, was, would, func(d difference) {
		if !(len(d.path) == 1 && d.path[0] == "imports") && !ours(d.path) {
			all = append(all, d)
		}
	})
	return all
}

// compare reports the leaves in which two values differ.
func compare(path []string, a, b any, report func(difference)) {
	x, xIsTable := table(a)
	y, yIsTable := table(b)
	if !xIsTable || !yIsTable {
		if !reflect.DeepEqual(a, b) {
			report(difference{slices.Clone(path), a, b})
		}
		return
	}
	keys := maps.Clone(x)
	if keys == nil {
		keys = map[string]any{}
	}
	maps.Copy(keys, y)
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		compare(append(path, key), x[key], y[key], report)
	}
}

// table returns v as a table; nil is an empty one.
func table(v any) (map[string]any, bool) {
	if v == nil {
		return nil, true
	}
	t, ok := v.(map[string]any)
	return t, ok
}

// Summary returns the first few differences as text.
func Summary(all []difference) string {
	const most = 5
	var words []string
	for _, d := range all[:min(most, len(all))] {
		words = append(words, d.String())
	}
	text := strings.Join(words, "; ")
	if more := len(all) - most; more > 0 {
		text += fmt.Sprintf("; and %d more", more)
	}
	return text
}

func within(path []string, prefix ...string) bool {
	return len(path) >= len(prefix) && slices.Equal(path[:len(prefix)], prefix)
}
