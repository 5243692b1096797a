package audit

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/internal/errline"
	"github.com/ctrlplane/pilot/internal/regular"
)

// rotatedSuffix is what logrotate appends to a file's name: a number, or a date with
// its setting dateext.
var rotatedSuffix = regexp.MustCompile(`^[.-][0-9]+(\.gz)?$`)

// Rotated returns the older files of a log that logrotate rotates, oldest first.
func Rotated(name string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Dir(name))
	if err != nil {
		return nil, err
	}
	var found []fs.FileInfo
	for _, e := range entries {
		suffix, ok := strings.CutPrefix(e.Name(), filepath.Base(name))
		if !ok || !rotatedSuffix.MatchString(suffix) {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // logrotate is moving it
		}
		if err != nil {
			return nil, err
		}
		found = append(found, info)
	}
	slices.SortFunc(found, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	var names []string
	for _, info := range found {
		names = append(names, filepath.Join(filepath.Dir(name), info.Name()))
	}
	return names, nil
}

// gzipFile is a compressed file.
type gzipFile struct {
	*gzip.Reader
	file io.Closer
}

func (f gzipFile) Close() error { return errors.Join(f.Reader.Close(), f.file.Close()) }

// ReadFile opens a file of a log to read its lines, also if gzip has compressed it. The
// caller closes it.
func ReadFile(name string) (io.ReadCloser, error) {
	f, err := regular.Open(name)
	if err != nil || !strings.HasSuffix(name, ".gz") {
		return f, err
	}
	r, err := gzip.NewReader(f)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), f.Close())
	}
	return gzipFile{r, f}, nil
}

// newestFiles is in how many of the rotated files that have lines the line is looked for
// that was noted last. It is in the newest, or in the one before if copilot was killed
// right after it went on in a new file.
const newestFiles = 2

// rotatedTo looks for a line in the newest of the files that logrotate has moved away. If
// it finds it, it returns the last line of its chain there, and the file of that one.
// Errors are of files that can't be read.
func (k Key) rotatedTo(name string, line Head) (last Head, file string, err error) {
	names, err := Rotated(name)
	if err != nil {
		return Head{}, "", err
	}
	searched := 0
	var errs []error
	for _, n := range slices.Backward(names) {
		end, found, any, err := k.search(n, line)
		if err != nil {
			errs = append(errs, err)
		}
		if last.Seq == 0 {
			last, file = end, n
		}
		if found {
			return last, file, nil
		}
		if any {
			searched++
		}
		if searched == newestFiles {
			break
		}
	}
	return Head{}, "", errline.Join(errs...)
}

// search reads a file. It returns the last line there of the chain of line, whether line
// is there itself, and whether there is any line.
func (k Key) search(name string, line Head) (end Head, found, any bool, err error) {
	r, err := ReadFile(name)
	if err != nil {
		return Head{}, false, false, err
	}
	defer r.Close()
	chain := fmt.Appendf(nil, `{"chain":"%s",`, line.Chain)
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		any = true
		if !bytes.HasPrefix(lines.Bytes(), chain) {
			continue
		}
		l, mac, err := k.open(lines.Bytes())
		if err != nil {
			continue
		}
		at := Head{l.Chain, l.Seq, mac}
		found = found || at == line
		if at.Seq > end.Seq {
			end = at
		}
	}
	if err := lines.Err(); err != nil {
		return end, found, any, fmt.Errorf("%s: %w", name, err)
	}
	return end, found, any, nil
}
