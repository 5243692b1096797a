package client

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"
)

// peer makes the frames of a server.
type peer struct{ bytes.Buffer }

func (p *peer) frame(kind, flags byte, stream uint32, payload []byte) *peer {
	p.Write([]byte{byte(len(payload) >> 16), byte(len(payload) >> 8), byte(len(payload)), kind, flags})
	p.Write(binary.BigEndian.AppendUint32(nil, stream))
	p.Write(payload)
	return p
}

func headerBlock(fields ...string) []byte {
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for i := 0; i < len(fields); i += 2 {
		encoder.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return block.Bytes()
}

// exchangeWith sends a request to a server that says just this.
func exchangeWith(t *testing.T, said, body []byte) (*response, error) {
	t.Helper()
	ours, theirs := net.Pipe()
	defer ours.Close()
	ours.SetDeadline(time.Now().Add(10 * time.Second))
	go io.Copy(io.Discard, theirs)
	go func() {
		theirs.Write(said)
		theirs.Close()
	}()
	return roundTrip(ours, []field{{Name: ":method", Value: "POST"}}, body)
}

func TestFrames(t *testing.T) {
	header := headerBlock(":status", "200", "content-type", "application/grpc")
	trailer := headerBlock("grpc-status", "0")
	for name, test := range map[string]struct {
		p    *peer
		ok   bool
		body string
	}{
		"plain":    {new(peer).frame(frameHeaders, flagEndHeaders, 1, header).frame(frameData, 0, 1, []byte("a")).frame(frameHeaders, flagEndHeaders|flagEndStream, 1, trailer), true, "a"},
		"data end": {new(peer).frame(frameHeaders, flagEndHeaders, 1, header).frame(frameData, 0, 1, []byte("a")).frame(frameData, flagEndStream, 1, []byte("b")), true, "ab"},
		"in parts": {new(peer).frame(frameSettings, 0, 0, setting(settingMaxFrame, 1<<20)).frame(framePing, 0, 0, make([]byte, 8)).
			frame(frameHeaders, flagPadded|flagPriority, 1, append(append([]byte{2, 0, 0, 0, 0, 1}, header[:3]...), 0, 0)).
			frame(frameContinuation, 0, 1, header[3:5]).frame(frameContinuation, flagEndHeaders, 1, header[5:]).
			frame(0xfe, 0xff, 3, []byte("unknown")).frame(frameGoAway, 0, 0, []byte{0, 0, 0, 1, 0, 0, 0, 0}).
			frame(frameData, flagPadded, 1, []byte{1, 'a', 0}).frame(frameHeaders, flagEndStream, 1, trailer[:2]).frame(frameContinuation, flagEndHeaders, 1, trailer[2:]), true, "a"},
		"nothing":      {new(peer), false, ""},
		"cut short":    {new(peer).frame(frameHeaders, flagEndHeaders, 1, header), false, ""},
		"reset":        {new(peer).frame(frameReset, 0, 1, make([]byte, 4)), false, ""},
		"go away":      {new(peer).frame(frameGoAway, 0, 0, make([]byte, 8)), false, ""},
		"all padding":  {new(peer).frame(frameHeaders, flagEndHeaders, 1, header).frame(frameData, flagPadded|flagEndStream, 1, []byte{9, 'a'}), false, ""},
		"stray":        {new(peer).frame(frameContinuation, flagEndHeaders, 1, header), false, ""},
		"interrupted":  {new(peer).frame(frameHeaders, 0, 1, header).frame(framePing, 0, 0, nil), false, ""},
		"too large":    {new(peer).frame(frameData, flagEndStream, 1, make([]byte, maxFrame+1)), false, ""},
		"no window":    {new(peer).frame(frameWindowUpdate, 0, 0, []byte{1}), false, ""},
		"bad settings": {new(peer).frame(frameSettings, 0, 0, []byte{1}), false, ""},
		"bad header":   {new(peer).frame(frameHeaders, flagEndHeaders|flagEndStream, 1, []byte{0xff, 0xff, 0xff, 0xff, 0xff}), false, ""},
	} {
		resp, err := exchangeWith(t, test.p.Bytes(), []byte("request"))
		if test.ok && (err != nil || string(resp.body) != test.body || resp.header[":status"] != "200") || !test.ok && err == nil {
			t.Errorf("%s: %+v, %v", name, resp, err)
		}
	}
}

// FuzzRoundTrip talks to servers that say anything.
func FuzzRoundTrip(f *testing.F) {
	header := headerBlock(":status", "200", "content-type", "application/grpc")
	f.Add(new(peer).frame(frameSettings, 0, 0, setting(settingInitialWindow, 10)).frame(frameHeaders, flagEndHeaders, 1, header).
		frame(frameData, 0, 1, []byte("a")).frame(frameHeaders, flagEndHeaders|flagEndStream, 1, headerBlock("grpc-status", "0")).Bytes(), uint(100))
	f.Add(new(peer).frame(frameHeaders, flagPadded|flagPriority, 1, header).frame(frameContinuation, flagEndHeaders, 1, header).Bytes(), uint(70000))
	f.Add(new(peer).frame(frameGoAway, 0, 0, make([]byte, 9)).frame(frameReset, 0, 1, make([]byte, 4)).Bytes(), uint(0))
	f.Fuzz(func(t *testing.T, said []byte, size uint) {
		resp, err := exchangeWith(t, said, make([]byte, size%(1<<20)))
		if (resp == nil) != (err != nil) || err == nil && len(resp.body) > len(said) {
			t.Errorf("%+v, %v", resp, err)
		}
	})
}
