//go:build linux

package processor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containers/ocicrypt/config"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/ctrlplane/pilot/internal/protofield"
)

// RunStreamProcessor does what containerd starts a stream processor for: it reads the
// payload, with the layer's descriptor and perhaps keys, decrypts the layer from in with
// the private keys of dir, those of the payload and keys, in this order, and writes the
// plain layer to out. payload is that of [PayloadFile], which it closes. timeout bounds
// the wait for the payload and for the layer key. The error names the layer.
//
// Media type and payload are those of imgcrypt: see
// https://github.com/containerd/imgcrypt/blob/main/cmd/ctd-decoder/main.go.
func RunStreamProcessor(ctx context.Context, payload io.ReadCloser, timeout time.Duration, dir *KeyDir, keys Keys, in io.Reader, out io.Writer) error {
	unwrapping, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	p, err := ReadPayload(unwrapping, payload)
	if err != nil {
		return err
	}
	payload.Close()
	key, err := dir.Unwrap(unwrapping, keys.With(&p.DecryptConfig), p.Descriptor)
	if err == nil {
		defer key.Clear()
		err = decrypt(ctx, out, in, key)
	}
	if err != nil {
		return fmt.Errorf("layer %s: %w", p.Descriptor.Digest, err)
	}
	return nil
}

// ErrNoPayload is the error of a stream processor that containerd started
// without a payload, which is where a layer's descriptor would be.
var ErrNoPayload = errors.New("containerd passed no decryption payload")

// payloadFD is the file descriptor on which containerd passes a payload.
const payloadFD = 3

// payloadType is the type URL of imgcrypt's payload.
const payloadType = "io.containerd.ocicrypt.v1.Payload"

// maxPayload bounds a payload, in bytes. It holds a descriptor and keys.
const maxPayload = 16 << 20

// Payload says how a stream processor is to decrypt a layer. Its JSON is that of
// imgcrypt's type of this name.
type Payload struct {
	// DecryptConfig holds the keys that the client passed, if any.
	DecryptConfig config.DecryptConfig
	// Descriptor is the encrypted layer's.
	Descriptor ocispec.Descriptor
}

// PayloadFile returns the file from which to read the payload. The error is
// [ErrNoPayload] if containerd passed none.
func PayloadFile() (*os.File, error) {
	// If nothing was passed, the number goes to the first file that this
	// process, perhaps Go's runtime, opens. Such files are closed on exec, and
	// inherited ones are not.
	flags, err := unix.FcntlInt(payloadFD, unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC != 0 {
		return nil, ErrNoPayload
	}
	return os.NewFile(payloadFD, "payload"), nil
}

// ReadPayload reads a protobuf Any that holds imgcrypt's payload, of at most
// 16 MiB, and gives up when ctx is done.
func ReadPayload(ctx context.Context, r io.Reader) (*Payload, error) {
	data, err := await(ctx, func() ([]byte, error) { return io.ReadAll(io.LimitReader(r, maxPayload+1)) }, nil)
	if err != nil {
		return nil, fmt.Errorf("read the decryption payload: %w", err)
	}
	if len(data) == 0 {
		return nil, ErrNoPayload
	}
	if len(data) > maxPayload {
		return nil, fmt.Errorf("the decryption payload has more than %d bytes", maxPayload)
	}
	url, urlErr := protofield.Field(data, 1)
	value, err := protofield.Field(data, 2)
	if urlErr != nil || err != nil {
		return nil, errors.New("the decryption payload is not a protobuf Any")
	}
	p, err := ParsePayload(string(url), value)
	if err == nil && p.Descriptor.Digest == "" {
		err = errors.New("the decryption payload names no layer")
	}
	return p, err
}

// ParsePayload reads the value of a protobuf Any whose type is imgcrypt's
// payload.
func ParsePayload(typeURL string, value []byte) (*Payload, error) {
	if typeURL != payloadType {
		return nil, fmt.Errorf("the decryption payload is of type %.80q, not %s", typeURL, payloadType)
	}
	var p Payload
	if err := json.Unmarshal(value, &p); err != nil {
		// The error of encoding/json may quote its input, which holds keys.
		return nil, fmt.Errorf("the decryption payload is not the JSON of %s", payloadType)
	}
	return &p, nil
}
