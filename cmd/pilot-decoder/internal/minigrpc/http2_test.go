package minigrpc

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
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

// exchangeWith sends a request to a server that says just this and then waits
// or, if it ends, closes the connection. It returns what was sent as well.
func exchangeWith(t *testing.T, said, body []byte, ends bool) (resp *response, sent []byte, err error) {
	t.Helper()
	ours, theirs := net.Pipe()
	ours.SetDeadline(time.Now().Add(5 * time.Second))
	var all bytes.Buffer
	read := make(chan struct{})
	go func() {
		io.Copy(&all, theirs)
		close(read)
	}()
	go func() {
		theirs.Write(said)
		if ends {
			theirs.Close()
		}
	}()
	resp, err = roundTrip(ours, []field{{Name: ":method", Value: "POST"}}, body)
	ours.Close()
	theirs.Close()
	<-read
	return resp, all.Bytes(), err
}

func TestFrames(t *testing.T) {
	header := headerBlock(":status", "200", "content-type", "application/grpc")
	trailer := headerBlock("grpc-status", "0")
	answer := func() *peer { return new(peer).frame(frameHeaders, flagEndHeaders, 1, header) }
	many := headerBlock(":status", "200")
	for i := range 2 * maxFields {
		many = append(many, headerBlock(fmt.Sprint("x", i), "")...)
	}
	const malformed, silence = "a malformed frame", "i/o timeout"
	for name, test := range map[string]struct {
		p    *peer
		body string
		want string // error
		sent []byte // among what was sent
	}{
		"plain":    {answer().frame(frameData, 0, 1, []byte("a")).frame(frameHeaders, flagEndHeaders|flagEndStream, 1, trailer), "a", "", nil},
		"data end": {answer().frame(frameData, 0, 1, []byte("a")).frame(frameData, flagEndStream, 1, []byte("b")), "ab", "", nil},
		"in parts": {new(peer).frame(frameHeaders, flagPadded|flagPriority, 1, append(append([]byte{2, 0, 0, 0, 0, 1}, header[:3]...), 0, 0)).
			frame(frameContinuation, 0, 1, header[3:5]).frame(frameContinuation, flagEndHeaders, 1, header[5:]).
			frame(0xfe, 0xff, 3, []byte("unknown")).frame(frameGoAway, 0, 0, []byte{0, 0, 0, 1, 0, 0, 0, 0}).
			frame(frameData, flagPadded, 1, []byte{1, 'a', 0}).frame(frameHeaders, flagEndStream, 1, trailer[:2]).frame(frameContinuation, flagEndHeaders, 1, trailer[2:]), "a", "", nil},
		"early answer": {new(peer).frame(frameHeaders, flagEndHeaders|flagEndStream, 1, header), "", "", nil},
		"small window": {new(peer).frame(frameSettings, 0, 0, setting(settingInitialWindow, 3)), "", silence, []byte("\x00\x00\x00\x04\x01\x00\x00\x00\x00")},
		"ping":         {new(peer).frame(framePing, 0, 0, []byte("12345678")), "", silence, []byte("\x00\x00\x08\x06\x01\x00\x00\x00\x0012345678")},
		"settings":     {new(peer).frame(frameSettings, 0, 0, setting(settingMaxFrame, 1<<20)), "", silence, []byte("\x00\x00\x00\x04\x01\x00\x00\x00\x00")},
		"other window": {new(peer).frame(frameWindowUpdate, 0, 3, []byte{0, 0, 0, 1}), "", silence, nil},
		"fields":       {new(peer).frame(frameHeaders, flagEndHeaders|flagEndStream, 1, many), "", "", nil},

		"nothing":       {new(peer), "", silence, nil},
		"cut short":     {answer(), "", silence, nil},
		"reset":         {new(peer).frame(frameReset, 0, 1, make([]byte, 4)), "", "it reset the stream: HTTP/2 error 0", nil},
		"bad reset":     {new(peer).frame(frameReset, 0, 1, nil), "", malformed, nil},
		"go away":       {new(peer).frame(frameGoAway, 0, 0, append(make([]byte, 8), "why"...)), "", `it closed the connection: HTTP/2 error 0 "why"`, nil},
		"bad go away":   {new(peer).frame(frameGoAway, 0, 0, nil), "", malformed, nil},
		"all padding":   {answer().frame(frameData, flagPadded|flagEndStream, 1, []byte{9, 'a'}), "", malformed, nil},
		"no priority":   {new(peer).frame(frameHeaders, flagPriority|flagEndHeaders, 1, nil), "", malformed, nil},
		"stray":         {new(peer).frame(frameContinuation, flagEndHeaders, 1, header), "", malformed, nil},
		"interrupted":   {new(peer).frame(frameHeaders, 0, 1, header).frame(framePing, 0, 0, nil), "", malformed, nil},
		"endless":       {new(peer).frame(frameHeaders, 0, 1, make([]byte, maxFrame)).frame(frameContinuation, 0, 1, make([]byte, maxFrame)).frame(frameContinuation, 0, 1, make([]byte, maxFrame)).frame(frameContinuation, 0, 1, make([]byte, maxFrame)).frame(frameContinuation, 0, 1, make([]byte, maxFrame)), "", malformed, nil},
		"too large":     {new(peer).frame(frameData, flagEndStream, 1, make([]byte, maxFrame+1)), "", "a frame of 16385 bytes", nil},
		"no window":     {new(peer).frame(frameWindowUpdate, 0, 0, []byte{1}), "", malformed, nil},
		"bad settings":  {new(peer).frame(frameSettings, 0, 0, []byte{1}), "", malformed, nil},
		"bad header":    {new(peer).frame(frameHeaders, flagEndHeaders|flagEndStream, 1, []byte{0xff, 0xff, 0xff, 0xff, 0xff}), "", "decoding error", nil},
		"other stream":  {new(peer).frame(frameHeaders, flagEndHeaders|flagEndStream, 3, header), "", malformed, nil},
		"other data":    {answer().frame(frameData, flagEndStream, 5, []byte("a")), "", malformed, nil},
		"no stream":     {new(peer).frame(frameHeaders, flagEndHeaders|flagEndStream, 0, header), "", malformed, nil},
		"data first":    {new(peer).frame(frameData, flagEndStream, 1, []byte("a")), "", malformed, nil},
		"other's reset": {new(peer).frame(frameReset, 0, 3, make([]byte, 4)), "", malformed, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			resp, sent, err := exchangeWith(t, test.p.Bytes(), []byte("request"), false)
			switch {
			case test.want != "":
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("%+v, %v, want %q", resp, err, test.want)
				}
			case err != nil || string(resp.body) != test.body || resp.header[":status"] != "200" || len(resp.header) > maxFields:
				t.Errorf("%+v, %v", resp, err)
			}
			if !bytes.Contains(sent, test.sent) {
				t.Errorf("sent %q, which lacks %q", sent, test.sent)
			}
		})
	}
}

// TestSendStopsAtWindow has a server that enlarges its window a little and then no more.
func TestSendStopsAtWindow(t *testing.T) {
	p := new(peer).frame(frameSettings, 0, 0, setting(settingInitialWindow, 70000-65535))
	for range 4 {
		p.frame(frameWindowUpdate, 0, 0, []byte{0, 0, 0, 5}).frame(frameWindowUpdate, 0, 1, []byte{0, 0, 0, 5})
	}
	_, sent, err := exchangeWith(t, p.Bytes(), make([]byte, 100000), false)
	if err == nil || len(sent) > 90000 {
		t.Errorf("%d bytes were sent, %v", len(sent), err)
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
		resp, _, err := exchangeWith(t, said, make([]byte, size%(1<<20)), true)
		if (resp == nil) != (err != nil) || err == nil && len(resp.body) > len(said) {
			t.Errorf("%+v, %v", resp, err)
		}
	})
}
