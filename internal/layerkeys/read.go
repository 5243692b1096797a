package layerkeys

import (
	"os"
	"time"

	"github.com/opencontainers/go-digest"
)

// Read returns the record in the file at path as it is now, for a process beside the one
// that has it open. What is added to it is in memory alone.
func Read(path string) (*Record, error) {
	r := newRecord(path)
	r.isCopy = true
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, r.wrap(err)
	}
	f, err := parse(b)
	if err != nil {
		return nil, r.wrap(err)
	}
	r.use(f)
	return r, nil
}

func newRecord(path string) *Record {
	return &Record{path: path, now: time.Now, layers: map[digest.Digest]Layer{}, plain: map[digest.Digest]plainLayer{}}
}

// use takes over what a file has.
func (r *Record) use(f file) {
	r.begun = f.Begun
	if f.Layers != nil {
		r.layers = f.Layers
	}
	if f.Plain != nil {
		r.plain = f.Plain
	}
}
