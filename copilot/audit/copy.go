package audit

import (
	"bufio"
	"errors"
	"fmt"
	"io"
)

// Copier takes lines of a log as they are, in their order.
type Copier interface {
	append(chain string, seq int64, lines [][]byte) error
	Close() error
}

// CopyToFile returns what copies a log into a new file.
func CopyToFile(name string) (Copier, error) {
	f := &file{name: name}
	if err := f.reopen(); err != nil {
		return nil, err
	}
	if info, err := f.f.Stat(); err != nil || info.Size() > 0 {
		return nil, errors.Join(fmt.Errorf("%s has lines already: copy to a new file", name), err, f.Close())
	}
	return f, nil
}

// Copy copies the lines that the key has sealed, and returns how many those are. Other
// lines, such as an incomplete one that a crash left, are skipped.
func Copy(to Copier, from io.Reader, key Key) (int, error) {
	lines := bufio.NewScanner(from)
	lines.Buffer(nil, 1<<20)
	n := 0
	var batch [][]byte
	var at Head // of the batch's last line
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		if err := to.append(at.Chain, at.Seq-int64(len(batch))+1, batch); err != nil {
			return err
		}
		n, batch = n+len(batch), nil
		return nil
	}
	for lines.Scan() {
		l, _, err := key.open(lines.Bytes())
		if err != nil {
			continue
		}
		if l.Chain != at.Chain || l.Seq != at.Seq+1 || len(batch) == maxBatch {
			if err := flush(); err != nil {
				return n, err
			}
		}
		at = Head{Chain: l.Chain, Seq: l.Seq}
		batch = append(batch, append([]byte(nil), lines.Bytes()...))
	}
	if err := lines.Err(); err != nil {
		return n, err
	}
	return n, flush()
}
