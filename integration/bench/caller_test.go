package bench

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// caller is a gRPC client that sends the same request again and again, each after the
// answer to the one before, on a connection of its own. gRPC's client takes more processor
// time for a layer key than pilot does, and shares the cores with it.
type caller struct {
	out     *bufio.Writer
	framer  *http2.Framer
	header  []hpack.HeaderField
	block   bytes.Buffer
	encoder *hpack.Encoder
	request []byte
	stream  uint32
	answer  []byte
}

// newCaller connects to a unix socket. request is a message of the method with its prefix.
func newCaller(b *testing.B, socket, method string, request []byte) *caller {
	b.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	c := &caller{out: bufio.NewWriter(conn), request: request, stream: 1, header: []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: method}, {Name: ":authority", Value: "localhost"},
		{Name: "content-type", Value: "application/grpc"}, {Name: "user-agent", Value: "bench"}, {Name: "te", Value: "trailers"},
	}}
	c.encoder = hpack.NewEncoder(&c.block)
	c.framer = http2.NewFramer(c.out, bufio.NewReader(conn))
	c.framer.SetReuseFrames()
	c.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	// The windows last for all answers. Those of the server are open again when it answers.
	const window = 1<<31 - 1
	_, err = c.out.WriteString(http2.ClientPreface)
	err = errors.Join(err, c.framer.WriteSettings(http2.Setting{ID: http2.SettingEnablePush, Val: 0}), c.framer.WriteWindowUpdate(0, window-65535))
	if err != nil {
		b.Fatal(err)
	}
	return c
}

// call sends the request and returns the answer, which is valid until the next call.
func (c *caller) call() ([]byte, error) {
	c.block.Reset()
	for _, f := range c.header {
		if err := c.encoder.WriteField(f); err != nil {
			return nil, err
		}
	}
	stream := c.stream
	c.stream += 2
	err := c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: c.block.Bytes(), EndHeaders: true})
	if err := errors.Join(err, c.framer.WriteData(stream, true, c.request), c.out.Flush()); err != nil {
		return nil, err
	}
	c.answer = c.answer[:0]
	for {
		frame, err := c.framer.ReadFrame()
		if err != nil {
			return nil, err
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				err = errors.Join(c.framer.WriteSettingsAck(), c.out.Flush())
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				err = errors.Join(c.framer.WritePing(true, f.Data), c.out.Flush())
			}
		case *http2.DataFrame:
			c.answer = append(c.answer, f.Data()...)
		case *http2.MetaHeadersFrame:
			if !f.StreamEnded() {
				break
			}
			for _, h := range f.Fields {
				if h.Name == "grpc-status" && h.Value == "0" {
					return c.answer, nil
				}
			}
			return nil, fmt.Errorf("it answered with %v", f.Fields)
		case *http2.GoAwayFrame, *http2.RSTStreamFrame:
			return nil, fmt.Errorf("it answered with %v", f)
		}
		if err != nil {
			return nil, err
		}
	}
}
