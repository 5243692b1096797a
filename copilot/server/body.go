package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/ctrlplane/pilot/copilot/keystore"
	"github.com/ctrlplane/pilot/internal/keyjson"
)

// decodeSecret is decodeBody for a body with a key, in a member of one of those names.
func decodeSecret(body io.Reader, v any, names ...string) error {
	b, err := keyjson.ReadAll(body)
	defer clear(b)
	if err != nil {
		return bodyError(err)
	}
	if err := keyjson.Decode(b, v, names...); err != nil {
		return errBody
	}
	return nil
}

// errBody does not quote the body, which may hold keys.
var errBody = fmt.Errorf("%w: the body is not the JSON that this path takes", keystore.ErrInput)

// bodyError returns the error of a body that could not be read or decoded.
func bodyError(err error) error {
	if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
		return err
	}
	return errBody
}

// decodeBody decodes one JSON value with no unknown fields.
func decodeBody(r *http.Request, v any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if err == nil {
		if _, more := d.Token(); more != io.EOF {
			err = errors.New("trailing data")
		}
	}
	if err != nil {
		return bodyError(err)
	}
	return nil
}

// decodeOptional decodes a body that may be empty.
func decodeOptional(r *http.Request, v any) error {
	var first [1]byte
	if _, err := io.ReadFull(r.Body, first[:]); errors.Is(err, io.EOF) {
		return nil
	} else if err != nil {
		return err
	}
	r.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(first[:]), r.Body), r.Body}
	return decodeBody(r, v)
}
