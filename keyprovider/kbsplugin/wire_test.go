package kbsplugin

import (
	"bytes"
	"reflect"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

func appendText(b []byte, number protowire.Number, text string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, number, protowire.BytesType), text)
}

func TestRequestsAreReadInAnyOrder(t *testing.T) {
	var b []byte
	b = appendText(b, 4, "POST")
	b = appendText(b, 3, "team-a")
	b = protowire.AppendVarint(protowire.AppendTag(b, 9, protowire.VarintType), 7) // of a later KBS
	b = appendText(b, 5, "attestation context")
	b = appendText(b, 3, "1")
	b = appendText(b, 1, "")
	b = appendText(b, 4, "GET")
	var r request
	if err := r.unmarshal(b); err != nil || !reflect.DeepEqual(r, request{path: []string{"team-a", "1"}, verb: "GET"}) {
		t.Errorf("%+v, %v", r, err)
	}
	r = request{}
	if err := r.unmarshal(appendText(appendText(nil, 1, "x"), 2, "query")); err != nil || !r.body || !r.query {
		t.Errorf("%+v, %v", r, err)
	}
	for n := 1; n < len(b); n++ {
		var cut request
		if err := cut.unmarshal(b[:n]); err == nil && reflect.DeepEqual(cut, r) {
			t.Errorf("%d bytes are read as the whole", n)
		}
	}
}

// TestKEKIsClearedOnceItIsSent: gRPC frees what a codec returns after it was sent.
func TestKEKIsClearedOnceItIsSent(t *testing.T) {
	kek := bytes.Repeat([]byte("k"), 32)
	sent, err := codec{}.Marshal(&response{body: kek, status: 200})
	if err != nil {
		t.Fatal(err)
	}
	b := sent[0].ReadOnlyData()
	if !bytes.Contains(b, bytes.Repeat([]byte("k"), 32)) {
		t.Fatalf("response %x", b)
	}
	sent.Free()
	if bytes.Contains(b, []byte("k")) || bytes.Contains(kek, []byte("k")) {
		t.Errorf("the KEK stays in memory: %x, %x", b, kek)
	}
}

func FuzzRequest(f *testing.F) {
	f.Add(appendText(appendText(nil, 3, "team-a"), 4, "GET"))
	f.Add([]byte{0x1a, 0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Fuzz(func(t *testing.T, b []byte) {
		var r request
		if r.unmarshal(b) != nil {
			return
		}
		total := len(r.verb)
		for _, part := range r.path {
			total += len(part)
		}
		if total > len(b) {
			t.Errorf("%d bytes are read from %d", total, len(b))
		}
	})
}
