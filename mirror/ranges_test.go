package mirror

import (
	"math"
	"net/http"
	"testing"
)

func TestParseRange(t *testing.T) {
	for text, want := range map[string]struct{ offset, length int64 }{
		"bytes=0-1":                   {0, 2},
		"bytes=0-0":                   {0, 1},
		"bytes=99-99":                 {99, 1},
		"bytes=50-1000":               {50, 50},
		"bytes=50-":                   {50, 50},
		"bytes=-1":                    {99, 1},
		"bytes=-1000":                 {0, 100},
		"bytes=007-8":                 {7, 2},
		"bytes=0-9223372036854775807": {0, 100},
	} {
		r, err := parseRange(http.Header{"Range": {text}})
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if offset, length, err := r.within(100); offset != want.offset || length != want.length || err != nil {
			t.Errorf("%s: %d bytes at %d, %v", text, length, offset, err)
		}
	}
	for _, text := range []string{
		"", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=1", "bytes=2-1", "bytes=+1-2", "bytes=-+1", "bytes=1-2-3", "bytes=--1",
		"bytes= 0-1", "bytes=0-1 ", "Bytes=0-1", "items=0-1", "bytes=0-1,4-5", "bytes=0-1,", "bytes=0x1-2", "bytes=1_0-20", "bytes=9223372036854775808-", "bytes=٣-4",
	} {
		if r, err := parseRange(http.Header{"Range": {text}}); err == nil {
			t.Errorf("%q is %v", text, r)
		}
	}
	if _, err := parseRange(http.Header{"Range": {"bytes=0-1", "bytes=3-4"}}); err == nil {
		t.Error("two ranges in two headers")
	}
	for _, r := range []byteRange{{100, -1}, {100, 200}, {math.MaxInt64, math.MaxInt64}, {-1, 0}} {
		if offset, length, err := r.within(100); err != errRange {
			t.Errorf("%v: %d bytes at %d, %v", r, length, offset, err)
		}
	}
	if _, _, err := (byteRange{0, 1}).within(0); err != errRange {
		t.Error("of an empty layer")
	}
}
