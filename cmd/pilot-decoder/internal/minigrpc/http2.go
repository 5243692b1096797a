package minigrpc

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"

	"golang.org/x/net/http2/hpack"

	"github.com/ctrlplane/pilot/internal/keyjson"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
)

// This file has the part of HTTP/2 (RFC 9113) that one request on a connection of its
// own takes. net/http would take a megabyte and half a millisecond more whenever a
// stream processor starts.

// field is a header field.
type field = hpack.HeaderField

// response is the server's. The fields of the header and of the trailer are together,
// since gRPC puts its status into either.
type response struct {
	header map[string]string
	body   []byte
}

// The types of frames, their flags, and settings that matter here.
const (
	frameData         = 0x0
	frameHeaders      = 0x1
	frameReset        = 0x3
	frameSettings     = 0x4
	framePing         = 0x6
	frameGoAway       = 0x7
	frameWindowUpdate = 0x8
	frameContinuation = 0x9

	flagEndStream  = 0x1 // of data and headers
	flagAck        = 0x1 // of settings and pings
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20

	settingEnablePush    = 0x2
	settingInitialWindow = 0x4
	settingMaxFrame      = 0x5
)

const (
	preface       = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	defaultWindow = 65535
	maxFrame      = 16384 // bytes that every peer accepts
	maxHeader     = 64 << 10
	maxFields     = 100 // that are kept
	streamID      = 1
)

// exchange is a request under way.
type exchange struct {
	r *bufio.Reader
	w *bufio.Writer

	// What the peer accepts at the moment, in bytes.
	streamWindow, connWindow, initialWindow int64
	maxFrame                                int

	headers *hpack.Decoder
	block   []byte // of a header, until it is complete
	ends    bool   // the stream, with that header
	done    bool
	response
}

// roundTrip sends a request over a new connection and returns the response.
func roundTrip(conn net.Conn, header []field, body []byte) (*response, error) {
	x := &exchange{
		r: bufio.NewReaderSize(conn, maxFrame), w: bufio.NewWriterSize(conn, maxFrame),
		streamWindow: defaultWindow, connWindow: defaultWindow, initialWindow: defaultWindow, maxFrame: maxFrame,
		response: response{header: map[string]string{"grpc-status": "", "grpc-message": ""}}, // which always fit
	}
	defer x.clear()
	x.headers = hpack.NewDecoder(4096, x.headerField)
	x.headers.SetMaxStringLength(maxHeader)
	x.w.WriteString(preface)
	// The window is as large as an answer, so the peer never blocks on flow control.
	x.frame(frameSettings, 0, 0, setting(settingEnablePush, 0), setting(settingInitialWindow, 2*maxAnswer))
	x.frame(frameWindowUpdate, 0, 0, binary.BigEndian.AppendUint32(nil, 2*maxAnswer-defaultWindow))
	var block sliceWriter
	encoder := hpack.NewEncoder(&block)
	for _, f := range header {
		encoder.WriteField(f)
	}
	x.frame(frameHeaders, flagEndHeaders, streamID, block)
	err := x.send(body)
	for err == nil && !x.done {
		err = x.receive()
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && x.header[":status"] == "" && (errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)) {
		err = fmt.Errorf("%w: %w", ocicryptclient.ErrNoAnswer, err)
	}
	if err != nil {
		return nil, err
	}
	return &x.response, nil
}

// clear overwrites the buffers, which held keys.
func (x *exchange) clear() {
	zeros := make([]byte, maxFrame)
	x.w.Reset(io.Discard)
	x.w.Write(zeros[:maxFrame-1]) // it fits, and so stays there
	x.r.Reset(bytes.NewReader(zeros))
	x.r.Peek(maxFrame)
}

type sliceWriter []byte

func (s *sliceWriter) Write(p []byte) (int, error) {
	*s = append(*s, p...)
	return len(p), nil
}

func setting(id uint16, value uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(nil, id), value)
}

// frame writes a frame. An error is that of the next Flush.
func (x *exchange) frame(kind, flags byte, stream uint32, payload ...[]byte) {
	size := 0
	for _, p := range payload {
		size += len(p)
	}
	head := []byte{byte(size >> 16), byte(size >> 8), byte(size), kind, flags}
	x.w.Write(binary.BigEndian.AppendUint32(head, stream))
	for _, p := range payload {
		x.w.Write(p)
	}
}

// send sends the body, which is not empty, as the peer's window allows. If the peer
// answers before it enlarges the window, the rest is not sent.
func (x *exchange) send(body []byte) error {
	for len(body) > 0 {
		n := int(min(int64(len(body)), int64(x.maxFrame), x.streamWindow, x.connWindow))
		if n <= 0 {
			if err := x.receive(); err != nil || x.done {
				return err
			}
			continue
		}
		var flags byte
		if n == len(body) {
			flags = flagEndStream
		}
		x.frame(frameData, flags, streamID, body[:n])
		x.streamWindow, x.connWindow, body = x.streamWindow-int64(n), x.connWindow-int64(n), body[n:]
	}
	return nil
}

// receive reads and handles one frame. It flushes what was written before it waits.
func (x *exchange) receive() error {
	var writeErr error
	if x.r.Buffered() < 9 {
		writeErr = x.w.Flush()
	}
	head := make([]byte, 9)
	if _, err := io.ReadFull(x.r, head); err != nil {
		if writeErr != nil {
			return writeErr
		}
		return err
	}
	size := int(head[0])<<16 | int(head[1])<<8 | int(head[2])
	kind, flags, stream := head[3], head[4], binary.BigEndian.Uint32(head[5:])&^(1<<31)
	if size > maxFrame {
		return fmt.Errorf("it does not speak HTTP/2: a frame of %d bytes", size)
	}
	payload := make([]byte, size)
	if _, err := io.ReadFull(x.r, payload); err != nil {
		return err
	}
	if x.block != nil && kind != frameContinuation {
		return errMalformed
	}
	switch kind {
	case frameHeaders, frameContinuation, frameData, frameReset:
		if stream != streamID {
			return errMalformed // we have begun no other
		}
	}
	switch kind {
	case frameSettings:
		return x.settings(flags, payload)
	case framePing:
		if flags&flagAck == 0 {
			x.frame(framePing, flagAck, 0, payload)
		}
	case frameWindowUpdate:
		if len(payload) != 4 {
			return errMalformed
		}
		n := int64(binary.BigEndian.Uint32(payload) &^ (1 << 31))
		switch stream {
		case 0:
			x.connWindow += n
		case streamID:
			x.streamWindow += n
		}
	case frameGoAway:
		if len(payload) < 8 {
			return errMalformed
		}
		if last := binary.BigEndian.Uint32(payload) &^ (1 << 31); last < streamID {
			return fmt.Errorf("%w: HTTP/2 error %d %.100q", ocicryptclient.ErrNoAnswer, binary.BigEndian.Uint32(payload[4:]), payload[8:])
		}
	case frameReset:
		if len(payload) != 4 {
			return errMalformed
		}
		return fmt.Errorf("it reset the stream: HTTP/2 error %d", binary.BigEndian.Uint32(payload))
	case frameHeaders:
		payload, err := unpadded(flags, payload)
		if err != nil {
			return err
		}
		if flags&flagPriority != 0 {
			if len(payload) < 5 {
				return errMalformed
			}
			payload = payload[5:]
		}
		x.block, x.ends = append([]byte{}, payload...), flags&flagEndStream != 0
		return x.headerBlock(flags)
	case frameContinuation:
		if x.block == nil || len(x.block)+len(payload) > maxHeader {
			return errMalformed
		}
		x.block = append(x.block, payload...)
		return x.headerBlock(flags)
	case frameData:
		if x.header[":status"] == "" {
			return errMalformed
		}
		defer clear(payload) // it holds a key, and is copied
		payload, err := unpadded(flags, payload)
		if err != nil {
			return err
		}
		if x.body = keyjson.Append(x.body, payload); len(x.body) > messageHeader+maxAnswer {
			return fmt.Errorf("its answer has more than %d bytes", maxAnswer)
		}
		x.done = flags&flagEndStream != 0
	}
	return nil
}

var errMalformed = errors.New("it does not speak HTTP/2: a malformed frame")

// unpadded removes the padding of a frame.
func unpadded(flags byte, payload []byte) ([]byte, error) {
	if flags&flagPadded == 0 {
		return payload, nil
	}
	if len(payload) == 0 || int(payload[0]) >= len(payload) {
		return nil, errMalformed
	}
	return payload[1 : len(payload)-int(payload[0])], nil
}

func (x *exchange) settings(flags byte, payload []byte) error {
	if flags&flagAck != 0 {
		return nil
	}
	if len(payload)%6 != 0 {
		return errMalformed
	}
	for ; len(payload) > 0; payload = payload[6:] {
		value := binary.BigEndian.Uint32(payload[2:])
		switch binary.BigEndian.Uint16(payload) {
		case settingInitialWindow:
			x.streamWindow += int64(value) - x.initialWindow
			x.initialWindow = int64(value)
		case settingMaxFrame:
			x.maxFrame = int(min(max(value, maxFrame), 1<<24-1))
		}
	}
	x.frame(frameSettings, flagAck, 0)
	return nil
}

// headerBlock decodes a header once it is complete.
func (x *exchange) headerBlock(flags byte) error {
	if flags&flagEndHeaders == 0 {
		return nil
	}
	if _, err := x.headers.Write(x.block); err != nil {
		return err
	}
	if err := x.headers.Close(); err != nil {
		return err
	}
	x.block, x.done = nil, x.ends
	return nil
}

func (x *exchange) headerField(f hpack.HeaderField) {
	if _, known := x.header[f.Name]; known || len(x.header) < maxFields {
		x.header[f.Name] = f.Value
	}
}
