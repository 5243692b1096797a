package protofield

import (
	"bytes"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestAppendField(t *testing.T) {
	want := &anypb.Any{TypeUrl: "a type", Value: bytes.Repeat([]byte("value"), 1000)}
	var got anypb.Any
	if err := proto.Unmarshal(AppendField(AppendField(nil, 1, []byte(want.TypeUrl)), 2, want.Value), &got); err != nil || !proto.Equal(&got, want) {
		t.Errorf("%v, %v", &got, err)
	}
}

// hasGroup reports whether there is a group in a message.
func hasGroup(b []byte) bool {
	for len(b) > 0 {
		num, kind, n := protowire.ConsumeTag(b)
		if kind == protowire.StartGroupType {
			return true
		}
		b = b[n+protowire.ConsumeFieldValue(num, kind, b[n:]):]
	}
	return false
}

// FuzzField reads what the generated code accepts as that does.
func FuzzField(f *testing.F) {
	for _, any := range []*anypb.Any{{}, {TypeUrl: "a type"}, {Value: []byte("value")}, {TypeUrl: "a type", Value: make([]byte, 300)}} {
		b, err := proto.Marshal(any)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(append(b, b...))
	}
	f.Add([]byte{0x08, 1, 0x19, 1, 2, 3, 4, 5, 6, 7, 8, 0x1d, 1, 2, 3, 4, 0x12, 1, 'x'}) // fields of other types
	f.Add([]byte{0x1b, 0x08, 1, 0x1c, 0x12, 1, 'x'})                                     // a group
	f.Add([]byte{0x12, 0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Fuzz(func(t *testing.T, b []byte) {
		var any anypb.Any
		if proto.Unmarshal(b, &any) != nil {
			Field(b, 2)
			return
		}
		if hasGroup(b) {
			return
		}
		url, err := Field(b, 1)
		if err != nil || string(url) != any.TypeUrl {
			t.Errorf("%x: field 1 is %q, %v, not %q", b, url, err, any.TypeUrl)
		}
		value, err := Field(b, 2)
		if err != nil || !bytes.Equal(value, any.Value) {
			t.Errorf("%x: field 2 is %q, %v, not %q", b, value, err, any.Value)
		}
	})
}
