package keyprovider

import (
	"fmt"
	"strings"
	"testing"
)

func TestListUses(t *testing.T) {
	for want, test := range map[string]struct {
		byKEK map[string]int
		total int
	}{
		"a: 1":                           {map[string]int{"a": 1}, 1},
		"c: 5, a: 2, b: 2":               {map[string]int{"a": 2, "b": 2, "c": 5}, 9},
		"c: 5, others: 4":                {map[string]int{"c": 5}, 9},
		"others: 1":                      {map[string]int{strings.Repeat("x", 2048): 1}, 1},
		"a: 2, others: 1":                {map[string]int{"a": 2, strings.Repeat("x", 2048): 1}, 3},
		strings.Repeat("x", 297) + ": 1": {map[string]int{strings.Repeat("x", 297): 1}, 1},
	} {
		if got := listUses(test.byKEK, test.total); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// TestUsesAreBounded counts more KEKs than are remembered.
func TestUsesAreBounded(t *testing.T) {
	var u uses
	for i := range 3 * maxCountedKEKs {
		u.add(opUnwrap, fmt.Sprint("kek", i))
		u.add(opWrap, "kek0")
	}
	wrapped, unwrapped, byKEK := u.take()
	if wrapped != 3*maxCountedKEKs || unwrapped != 3*maxCountedKEKs || len(byKEK) != maxCountedKEKs || byKEK["kek0"] != 3*maxCountedKEKs+1 {
		t.Errorf("%d wrapped, %d unwrapped, %d KEKs, kek0 %d times", wrapped, unwrapped, len(byKEK), byKEK["kek0"])
	}
	if wrapped, unwrapped, byKEK := u.take(); wrapped != 0 || unwrapped != 0 || byKEK != nil {
		t.Errorf("it does not start over: %d, %d, %v", wrapped, unwrapped, byKEK)
	}
}
