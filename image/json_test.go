package image

import (
	"strings"
	"testing"
)

func TestSetRemove(t *testing.T) {
	for _, test := range []struct{ doc, want string }{
		{`{}`, `{"k":1}`},
		{`{ }`, `{"k":1 }`},
		{" {\n  \"a\": 2\n} ", " {\n  \"a\": 2,\"k\":1\n} "},
		{`{"a":{"k":9},"b":[{"k":8}]}`, `{"a":{"k":9},"b":[{"k":8}],"k":1}`},
		{`{"a":"}{\"k\":"}`, `{"a":"}{\"k\":","k":1}`},
		{`{"a":1.50e+2,"é":null}`, `{"a":1.50e+2,"é":null,"k":1}`},
	} {
		got, err := set([]byte(test.doc), "k", []byte("1"))
		if err != nil || string(got) != test.want {
			t.Errorf("%s: %s, %v; want %s", test.doc, got, err, test.want)
			continue
		}
		back, err := remove(got, func(key string) bool { return key == "k" })
		if err != nil || string(back) != test.doc {
			t.Errorf("%s comes back as %s, %v", test.doc, back, err)
		}
	}
	got, err := set([]byte(`{"a":1, "k" : [ 2 ] , "b":3}`), "k", []byte(`"x"`))
	if want := `{"a":1, "k" : "x" , "b":3}`; err != nil || string(got) != want {
		t.Errorf("got %s, %v, want %s", got, err, want)
	}
}

func TestRemoveSeveral(t *testing.T) {
	drop := func(key string) bool { return strings.HasPrefix(key, "x") }
	for doc, want := range map[string]string{
		`{"x1":1}`:                            `{}`,
		`{ "x1":1 }`:                          `{  }`,
		`{"x1":1,"a":2}`:                      `{"a":2}`,
		`{"a":2,"x1":1,"b":3}`:                `{"a":2,"b":3}`,
		`{"x1":1,"a":2,"x2":1,"x3":1,"b":3}`:  `{"a":2,"b":3}`,
		`{ "x1" : 1 , "x2" : 2 , "x3" : {} }`: `{  }`,
		`{"a":2,"x1":1,"x2":{"x":[1,2]}, "b":3 , "x3":1}`: `{"a":2, "b":3}`,
	} {
		got, err := remove([]byte(doc), drop)
		if err != nil || string(got) != want {
			t.Errorf("%s: %s, %v; want %s", doc, got, err, want)
		}
	}
}

func TestMembersErrors(t *testing.T) {
	for doc, want := range map[string]string{
		``: "not a JSON object", `[]`: "not a JSON object", `null`: "not a JSON object",
		`{"a":1`: "EOF", `{"a":1}x`: "follows", `{"a":1}{}`: "follows",
		`{"a":1,"a":2}`:           "duplicate key",
		`{"layers":1,"layers":2}`: "duplicate key",
		`{"Layers":1}`:            `"Layers" can be taken for "layers"`,
		`{"mediatype":1}`:         `can be taken for "mediaType"`,
		"{\"digeſt\":1}":          `can be taken for "digest"`,
	} {
		if err := unambiguous([]byte(doc)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", doc, err, want)
		}
	}
}

// FuzzEdit checks that an edit that is undone leaves the document as it was.
func FuzzEdit(f *testing.F) {
	f.Add(`{ "a" : 1 }`)
	f.Add("{\n}")
	f.Fuzz(func(t *testing.T, doc string) {
		const key = "org.opencontainers.image.enc.test"
		edited, err := set([]byte(doc), key, []byte(`"v"`))
		if err != nil || strings.Contains(doc, "image.enc") || strings.Contains(doc, `\`) {
			return
		}
		if v, err := get(edited, key); err != nil || string(v) != `"v"` {
			t.Fatalf("%s: got %s, %v", edited, v, err)
		}
		back, err := remove(edited, func(k string) bool { return k == key })
		if err != nil || string(back) != doc {
			t.Fatalf("%q became %q, %v", doc, back, err)
		}
	})
}
