package keyprovider

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"testing"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/wireformat"
	"github.com/ctrlplane/pilot/processor"
)

// answers is a broker that gives the same error for each KEK.
type answers struct {
	Broker
	errs map[string]error
}

func (a answers) KEK(_ context.Context, id string, _ int) (client.KEK, error) {
	return client.KEK{}, a.errs[id]
}

func TestUnwrapKeyIsDeniedOnlyIfEachKEKIs(t *testing.T) {
	annotation := func(ids ...string) []byte {
		t.Helper()
		var list []wireformat.Annotation
		for _, id := range ids {
			a, err := wrap(client.KEK{ID: id, Version: 1, Key: bytes.Repeat([]byte{1}, 32)}, FormatA256GCMKW, []byte(secret))
			if err != nil {
				t.Fatal(err)
			}
			list = append(list, a)
		}
		b, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	p := New(answers{errs: map[string]error{"forbidden": errNo, "gone": errGone, "away": errDown}}, Config{})
	for _, test := range []struct {
		keks   []string
		denied bool
	}{
		{[]string{"forbidden"}, true},
		{[]string{"gone"}, true},
		{[]string{"forbidden", "gone"}, true},
		{[]string{"away"}, false},
		{[]string{"forbidden", "away"}, false},
	} {
		_, err := p.UnwrapKey(t.Context(), nil, annotation(test.keks...))
		if err == nil || errors.Is(err, processor.ErrDenied) != test.denied {
			t.Errorf("%q: %v", test.keks, err)
		}
	}
}
