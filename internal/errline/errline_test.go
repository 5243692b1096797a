package errline

import (
	"errors"
	"io"
	"io/fs"
	"testing"
)

func TestJoin(t *testing.T) {
	if err := Join(); err != nil {
		t.Error(err)
	}
	if err := Join(nil, nil); err != nil {
		t.Error(err)
	}
	if err := Join(nil, io.EOF); err != io.EOF {
		t.Errorf("one alone: %v", err)
	}
	err := Join(io.EOF, nil, fs.ErrExist, fs.ErrNotExist)
	if err.Error() != "EOF; file already exists; file does not exist" || !errors.Is(err, io.EOF) || !errors.Is(err, fs.ErrExist) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}
