package jsonedit

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
		got, err := Set([]byte(test.doc), "k", []byte("1"))
		if err != nil || string(got) != test.want {
			t.Errorf("%s: %s, %v; want %s", test.doc, got, err, test.want)
			continue
		}
		back, err := Remove(got, func(key string) bool { return key == "k" })
		if err != nil || string(back) != test.doc {
			t.Errorf("%s comes back as %s, %v", test.doc, back, err)
		}
	}
	got, err := Set([]byte(`{"a":1, "k" : [ 2 ] , "b":3}`), "k", []byte(`"x"`))
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
		got, err := Remove([]byte(doc), drop)
		if err != nil || string(got) != want {
			t.Errorf("%s: %s, %v; want %s", doc, got, err, want)
		}
	}
}

func TestEditErrors(t *testing.T) {
	for doc, want := range map[string]string{
		``: "not a JSON object", `[]`: "not a JSON object", `null`: "not a JSON object",
		`{"a":1`: "EOF", `{"a":1}x`: "follows", `{"a":1}{}`: "follows",
		`{"a":1,"a":2}`:           "duplicate key",
		`{"layers":1,"layers":2}`: "duplicate key",
	} {
		if _, err := Get([]byte(doc), "a"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", doc, err, want)
		}
	}
}

func TestKeysThatReadersConfuse(t *testing.T) {
	keys := []string{"layers", "mediaType", "digest"}
	for doc, want := range map[string]string{
		`{"Layers":1}`:    `"Layers" can be taken for "layers"`,
		`{"mediatype":1}`: `can be taken for "mediaType"`,
		"{\"digeſt\":1}":  `can be taken for "digest"`,
	} {
		if err := CheckKeys([]byte(doc), keys); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", doc, err, want)
		}
	}
	if err := CheckKeys([]byte(`{"layers":1,"Other":{"Layers":1}}`), keys); err != nil {
		t.Error(err)
	}
}

func TestDuplicateKeysAtAnyDepth(t *testing.T) {
	for doc, good := range map[string]bool{
		`{"a":{"b":1},"c":[{"b":1},{"b":2}],"b":3}`: true, `"x"`: true, `[]`: true,
		`{"a":[{"b":1,"b":2}]}`: false, `{"a":1,"\u0061":2}`: false, `{`: false, ``: false, `{}{}`: false, `{"a":1}]`: false,
	} {
		if err := CheckDistinct([]byte(doc)); (err == nil) != good {
			t.Errorf("%s: %v", doc, err)
		}
	}
}

func TestElements(t *testing.T) {
	double := func(_ int, e []byte) ([]byte, error) { return append(e[:len(e):len(e)], e...), nil }
	for doc, want := range map[string]string{
		`[]`: `[]`, ` [ 1 , {"a":2}] `: ` [ 11 , {"a":2}{"a":2}] `, `{}`: "", `[1`: "",
	} {
		got, err := MapElements([]byte(doc), double)
		if string(got) != want || (err != nil) != (want == "") {
			t.Errorf("%s: %s, %v", doc, got, err)
		}
	}
}

func TestSpelling(t *testing.T) {
	for text, mask := range map[string]string{
		`"abc"`: "...", `"\u0061b\/"`: `u.\`, `"\u002F"`: "U", `""`: "",
		`"\u2028"`: "u", `"\n"`: `\`, `"\u00e9"`: "error", `"\u00`: "error", `"`: "error", ``: "error", `7`: "error",
	} {
		got, err := Spelling([]byte(text))
		if err != nil {
			got = "error"
		} else if back := QuoteAs(Unquote([]byte(text)), got); string(back) != text {
			t.Errorf("%s came back as %s", text, back)
		}
		if got != mask {
			t.Errorf("%s: %s, %v, want %s", text, got, err, mask)
		}
	}
	if got := QuoteLike([]byte(`"\u0061b"`), "xy"); string(got) != `"\u0078y"` {
		t.Error(string(got))
	}
	if got := QuoteLike([]byte(`"\u0061b"`), "longer"); string(got) != `"longer"` {
		t.Error(string(got))
	}
}

// FuzzEdit checks that an edit that is undone leaves the document as it was.
func FuzzEdit(f *testing.F) {
	f.Add(`{ "a" : 1 }`)
	f.Add("{\n}")
	f.Fuzz(func(t *testing.T, doc string) {
		const key = "org.opencontainers.image.enc.test"
		edited, err := Set([]byte(doc), key, []byte(`"v"`))
		if err != nil || strings.Contains(doc, "image.enc") || strings.Contains(doc, `\`) {
			return
		}
		if v, err := Get(edited, key); err != nil || string(v) != `"v"` {
			t.Fatalf("%s: got %s, %v", edited, v, err)
		}
		back, err := Remove(edited, func(k string) bool { return k == key })
		if err != nil || string(back) != doc {
			t.Fatalf("%q became %q, %v", doc, back, err)
		}
	})
}
