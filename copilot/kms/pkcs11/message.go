//go:build linux && cgo && !no_pkcs11

package pkcs11

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// message is a request to the process of a PKCS#11 module, or its reply,
// which has the request's ID. On the pipe it is, big-endian:
//
//	size      4 bytes, of what follows
//	ID        8 bytes
//	kind      1 byte
//	version   8 bytes
//	fields    each 4 bytes of size, and its bytes
type message struct {
	id      uint64
	kind    byte
	version int
	fields  [][]byte
}

// Kinds of requests, with their fields.
const (
	requestOpen     = iota // module, token, serial, parameters, PIN
	requestWrap            // path, plaintext
	requestUnwrap          // path, wrapped; and the version
	requestGenerate        // path, label
	requestConfirm         // path, label; and the version
)

// Kinds of replies. Those to requestWrap and requestUnwrap have the result as
// their field, errors their text.
const (
	replyOK = iota
	replyNotFound
	replyForbidden
	replyUnavailable
	replyUnwrap
	replyPIN  // forbidden, since the token did not accept the PIN
	replyLost // the login is lost: open again
	replyOld  // the key is not there, and the module may be too old to know of it
)

const (
	headerSize     = 8 + 1 + 8
	maxMessageSize = 64 << 10 // bytes
)

// errMessage is an error of the pipe that only a fault in either program makes.
var errMessage = errors.New("malformed message")

// pipe sends and receives messages. Any number of goroutines may send, and
// one may receive.
type pipe struct {
	r    io.ReadCloser
	w    io.WriteCloser
	send sync.Mutex
}

func (p *pipe) write(m message) error {
	size := headerSize
	for _, f := range m.fields {
		size += 4 + len(f)
	}
	if size > maxMessageSize {
		return fmt.Errorf("%w: %d bytes", errMessage, size)
	}
	b := make([]byte, 0, 4+size) // never moved, so that clear reaches all of it
	defer func() { clear(b) }()
	b = binary.BigEndian.AppendUint32(b, uint32(size))
	b = binary.BigEndian.AppendUint64(b, m.id)
	b = append(b, m.kind)
	b = binary.BigEndian.AppendUint64(b, uint64(m.version))
	for _, f := range m.fields {
		b = binary.BigEndian.AppendUint32(b, uint32(len(f)))
		b = append(b, f...)
	}
	p.send.Lock()
	defer p.send.Unlock()
	_, err := p.w.Write(b)
	return err
}

// read returns the next message, whose fields the caller clears if they are
// secret. It returns [io.EOF] when the other side has closed the pipe.
func (p *pipe) read() (m message, err error) {
	var size [4]byte
	if _, err := io.ReadFull(p.r, size[:]); err != nil {
		return m, err
	}
	n := binary.BigEndian.Uint32(size[:])
	if n < headerSize || n > maxMessageSize {
		return m, fmt.Errorf("%w: %d bytes", errMessage, n)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(p.r, b); err != nil {
		return m, err
	}
	m = message{id: binary.BigEndian.Uint64(b), kind: b[8], version: int(binary.BigEndian.Uint64(b[9:]))}
	for b = b[headerSize:]; len(b) > 0; {
		if len(b) < 4 {
			return m, errMessage
		}
		n := binary.BigEndian.Uint32(b)
		if b = b[4:]; uint64(n) > uint64(len(b)) {
			return m, errMessage
		}
		m.fields, b = append(m.fields, b[:n:n]), b[n:]
	}
	return m, nil
}

// clear overwrites what the fields hold.
func (m message) clear() {
	for _, f := range m.fields {
		clear(f)
	}
}

func (p *pipe) close() {
	p.w.Close()
	p.r.Close()
}
