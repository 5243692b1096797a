package kbsplugin

import (
	"errors"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// request is PluginRequest, ValidateAuthRequest or NeedsEncryptionRequest, which have the
// same fields.
type request struct {
	body  bool     // field 1: there is one
	query bool     // field 2: there are parameters
	path  []string // field 3: what follows the backend's name in /kbs/v0/external/NAME/…
	verb  string   // field 4
}

// response is PluginResponse.
type response struct {
	body   []byte // field 1
	status int    // field 2: that of HTTP
}

// verdict is ValidateAuthResponse or NeedsEncryptionResponse: field 1.
type verdict bool

var errMalformed = errors.New("malformed request")

func (r *request) unmarshal(b []byte) error {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return errMalformed
		}
		b = b[n:]
		if kind != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(number, kind, b); n < 0 {
				return errMalformed
			}
			b = b[n:]
			continue
		}
		value, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return errMalformed
		}
		b = b[n:]
		switch number {
		case 1:
			r.body = len(value) > 0
		case 2:
			r.query = true
		case 3:
			r.path = append(r.path, string(value))
		case 4:
			r.verb = string(value)
		}
	}
	return nil
}

func (v verdict) marshal() []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), protowire.EncodeBool(bool(v)))
}

func (r *response) marshal() []byte {
	defer clear(r.body)
	// gRPC hands back no smaller buffers, to be cleared; and a body that outgrows this one
	// is an error's, and no KEK.
	b := make([]byte, 0, minCleared)
	b = protowire.AppendBytes(protowire.AppendTag(b, 1, protowire.BytesType), r.body)
	return protowire.AppendVarint(protowire.AppendTag(b, 2, protowire.VarintType), uint64(r.status))
}

// codec encodes the messages of the service, of which there are few: they need no generated
// code. A response is cleared once it is encoded, and its copy by gRPC once it is sent.
type codec struct{}

func (codec) Name() string { return "proto" }

func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	r, ok := v.(*request)
	if !ok {
		return errMalformed
	}
	return r.unmarshal(data.Materialize())
}

func (codec) Marshal(v any) (mem.BufferSlice, error) {
	r, ok := v.(interface{ marshal() []byte })
	if !ok {
		return nil, errMalformed
	}
	b := r.marshal()
	return mem.BufferSlice{mem.NewBuffer(&b, clearing{})}, nil
}

// minCleared is the size in bytes of buffers that are above gRPC's threshold, of 1 KiB, for
// giving them back to their pool ([mem.IsBelowBufferPoolingThreshold]).
const minCleared = 2 << 10

// clearing is a pool that clears what is given back, and keeps nothing.
type clearing struct{}

func (clearing) Get(n int) *[]byte {
	b := make([]byte, n)
	return &b
}

func (clearing) Put(b *[]byte) { clear(*b) }
