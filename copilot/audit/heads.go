package audit

import (
	"bufio"
	"fmt"
	"strings"

	"github.com/ctrlplane/pilot/internal/regular"
	"github.com/ctrlplane/pilot/internal/replacefile"
)

// ReadHeads reads the heads that [WriteHeads] wrote to a file. An empty file has none.
func ReadHeads(name string) ([]Head, error) {
	f, err := regular.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var heads []Head
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" {
			continue
		}
		h, err := ParseHead(line)
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", name, n, err)
		}
		heads = append(heads, h)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return heads, nil
}

// WriteHeads replaces a file by one with these heads, a line each. The file keeps its
// owner and mode, and is the old one or the new one after a power failure.
func WriteHeads(name string, heads []Head) error {
	var text []byte
	for _, h := range heads {
		text = fmt.Appendln(text, h)
	}
	r, err := replacefile.Prepare(name, text)
	if err != nil {
		return err
	}
	defer r.Discard()
	return r.Commit()
}
