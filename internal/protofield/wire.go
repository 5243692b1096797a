// Package protofield reads and writes protocol buffers whose fields are strings and
// bytes. The packages for all of them read the program's own file as they
// start, which a stream processor does for each layer.
//
// The encoding is described at https://protobuf.dev/programming-guides/encoding/.
package protofield

import (
	"encoding/binary"
	"errors"
)

var errMalformed = errors.New("malformed protocol buffer")

// The types of fields on the wire.
const (
	typeVarint  = 0
	typeFixed64 = 1
	typeBytes   = 2
	typeFixed32 = 5
)

// Field returns a field of a message, of type string or bytes: the last one if
// it occurs more than once, nil if it is missing. Groups, which are deprecated, are an
// error.
func Field(message []byte, number int) ([]byte, error) {
	var found []byte
	for len(message) > 0 {
		tag, n := binary.Uvarint(message)
		if n <= 0 || tag>>3 == 0 || tag>>3 >= 1<<29 {
			return nil, errMalformed
		}
		message = message[n:]
		var size uint64
		switch tag & 7 {
		case typeVarint:
			if _, n = binary.Uvarint(message); n <= 0 {
				return nil, errMalformed
			}
			size = uint64(n)
		case typeFixed64:
			size = 8
		case typeFixed32:
			size = 4
		case typeBytes:
			if size, n = binary.Uvarint(message); n <= 0 {
				return nil, errMalformed
			}
			message = message[n:]
		default:
			return nil, errMalformed
		}
		if size > uint64(len(message)) {
			return nil, errMalformed
		}
		if tag == uint64(number)<<3|typeBytes {
			found = message[:size]
		}
		message = message[size:]
	}
	return found, nil
}

// AppendField appends a field of type string or bytes to a message.
func AppendField(message []byte, number int, value []byte) []byte {
	message = binary.AppendUvarint(message, uint64(number)<<3|typeBytes)
	message = binary.AppendUvarint(message, uint64(len(value)))
	return append(message, value...)
}
