package keyjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func ExampleObject() {
	params := Object(Key("optsdata", []byte("secret")))
	fmt.Printf("%s\n", Object(Value("op", "keywrap"), Raw("keywrapparams", params), Key("none", nil)))
	// Output: {"op":"keywrap","keywrapparams":{"optsdata":"c2VjcmV0"},"none":""}
}

// TestObject checks that an object is written to one array, and is JSON.
func TestObject(t *testing.T) {
	for size := range 100 {
		b := Object(Value("id", "a\"b"), Key("key", bytes.Repeat([]byte("k"), size)))
		var got struct {
			ID  string
			Key []byte
		}
		if err := json.Unmarshal(b, &got); err != nil || got.ID != "a\"b" || len(got.Key) != size {
			t.Errorf("%s: %+v, %v", b, got, err)
		}
		if cap(b) > len(b)+8 {
			t.Errorf("%d bytes have an array of %d", len(b), cap(b))
		}
	}
}

func TestDecode(t *testing.T) {
	for text, ok := range map[string]bool{
		`{"id":"a","key":"AAAA"}`:         true,
		`{"id":"a"}`:                      true,
		` {} `:                            true,
		`{"id":"a","key":"AAAA","x":1}`:   false,
		`{"ID":"a"}`:                      false,
		`{"key":"AAA"}`:                   false,
		`{"id":"a"} {}`:                   false,
		`null`:                            false,
		`["a"]`:                           false,
		`"SECRET"`:                        false,
		`{"id":"SECRET`:                   false,
		`{"id":7,"key":"U0VDUkVUU0VDUkVU`: false,
		``:                                false,
	} {
		var v struct {
			ID  string
			Key []byte
		}
		if err := Decode([]byte(text), &v, "id", "key"); (err == nil) != ok || err != nil && strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// held notes the arrays that it is asked to fill.
type held struct {
	io.Reader
	arrays [][]byte
}

func (h *held) Read(p []byte) (int, error) {
	n, err := h.Reader.Read(p)
	h.arrays = append(h.arrays, p[:n])
	return n, err
}

// TestReadAll reads a large body, and looks at each array that it was copied through.
func TestReadAll(t *testing.T) {
	text := strings.Repeat("secret", 20000)
	r := &held{Reader: iotest.OneByteReader(strings.NewReader(text))}
	b, err := ReadAll(r)
	if err != nil || string(b) != text {
		t.Fatalf("read %d bytes, %v", len(b), err)
	}
	clear(b)
	for i, p := range r.arrays {
		if bytes.ContainsAny(p, "secret") {
			t.Fatalf("byte %d is still in memory", i)
		}
	}
	if b, err := ReadAll(iotest.DataErrReader(io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(errors.New("broken"))))); err == nil || string(b) != "abc" {
		t.Errorf("a reader that fails: %q, %v", b, err)
	}
}

func TestAppend(t *testing.T) {
	first := Append(nil, []byte("secret"))
	second := Append(first, bytes.Repeat([]byte("s"), 100))
	if !bytes.HasPrefix(second, []byte("secretss")) || len(second) != 106 || bytes.ContainsAny(first, "secret") {
		t.Errorf("%q, then %q", first, second)
	}
}

// TestBodyCleared clears a body in the middle of reading it.
func TestBodyCleared(t *testing.T) {
	b := NewBody([]byte("secret"))
	r := b.Reader()
	p := make([]byte, 3)
	if n, err := r.Read(p); n != 3 || err != nil || string(p) != "sec" {
		t.Errorf("read %d bytes, %v", n, err)
	}
	b.Clear()
	if rest, err := io.ReadAll(r); err != nil || string(rest) != "\x00\x00\x00" {
		t.Errorf("after that %q, %v", rest, err)
	}
}
