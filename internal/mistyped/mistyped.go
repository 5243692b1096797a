// Package mistyped suggests the name that was meant by a mistyped one.
package mistyped

import (
	"fmt"

	"github.com/xrash/smetrics"
)

// maxMistakes is how many letters may be wrong in a name that is taken for another.
const maxMistakes = 2

// DidYouMean returns a question to append to the error of an unknown name of a
// command or flag, or nothing if no known one is near.
func DidYouMean(name string, known []string) string {
	best, nearest := maxMistakes+1, ""
	for _, k := range known {
		if n := smetrics.WagnerFischer(name, k, 1, 1, 1); n < best && n < max(len(k), len(name))-1 {
			best, nearest = n, k
		}
	}
	if nearest == "" {
		return ""
	}
	return fmt.Sprintf(": did you mean %s?", nearest)
}
