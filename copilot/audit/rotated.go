package audit

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
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
func (l *Log) rotatedTo(name string, line Head) (last Head, file string, err error) {
	names, err := Rotated(name)
	if err != nil {
		return Head{}, "", err
	}
	searched := 0
	var errs []error
	for _, n := range slices.Backward(names) {
		end, found := Head{}, false
		any, err := l.key.each(n, []Head{line}, func(at Head, generation int64) {
			l.claims(generation)
			found = found || at == line
			if at.Seq > end.Seq {
				end = at
			}
		})
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

// missing looks in the file and in those that logrotate has moved away.
func (s *file) missing(ctx context.Context, key Key, known []Head) ([]Head, error) {
	names, err := Rotated(s.name)
	if err != nil {
		return nil, err
	}
	found := make(map[Head]bool)
	for _, n := range append(names, s.name) {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if _, err := key.each(n, known, func(at Head, _ int64) { found[at] = true }); err != nil {
			return nil, err
		}
	}
	return slices.DeleteFunc(slices.Clone(known), func(h Head) bool { return found[h] }), nil
}

// each calls do with the lines of a file that are of the chains of heads, and how often they
// say that the store was changed. It reports whether there are any lines.
func (k Key) each(name string, heads []Head, do func(at Head, generation int64)) (any bool, err error) {
	r, err := ReadFile(name)
	if err != nil {
		return false, err
	}
	defer r.Close()
	chains := make(map[string]bool)
	for _, h := range heads {
		chains[h.Chain] = true
	}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		any = true
		// What the others say is not read.
		rest, ok := bytes.CutPrefix(lines.Bytes(), []byte(`{"chain":"`))
		chain, _, ok2 := bytes.Cut(rest, []byte(`"`))
		if !ok || !ok2 || !chains[string(chain)] {
			continue
		}
		if l, mac, err := k.open(lines.Bytes()); err == nil {
			do(Head{l.Chain, l.Seq, mac}, l.Generation)
		}
	}
	if err := lines.Err(); err != nil {
		return any, fmt.Errorf("%s: %w", name, err)
	}
	return any, nil
}
