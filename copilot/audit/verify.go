package audit

import (
	"bufio"
	"bytes"
	"crypto/hmac"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
)

var errForged = errors.New("it was changed, or written with another master key")

// open reads a line and checks its MAC.
func (k Key) open(text []byte) (l line, mac string, err error) {
	size := encoding.EncodedLen(32)
	i := len(text) - len(macEnd) - size - len(macMember)
	if i < 1 || string(text[i:i+len(macMember)]) != macMember || string(text[len(text)-len(macEnd):]) != macEnd {
		return line{}, "", errors.New("it is no line of an audit log")
	}
	mac = string(text[i+len(macMember) : len(text)-len(macEnd)])
	body := append(bytes.Clone(text[:i]), '}')
	if !hmac.Equal([]byte(k.mac(body)), []byte(mac)) {
		return line{}, mac, errForged
	}
	return l, mac, json.Unmarshal(body, &l)
}

// Report is what a log's verification found.
type Report struct {
	Lines int
	// Heads are the last lines of each chain, which a later verification may
	// start from.
	Heads []Head
	// Problems describe what was changed, removed or inserted, up to a hundred.
	Problems []string
	// Notes describe what is unusual but no problem.
	Notes []string
}

const maxProblems = 100

// Verify reads a log, of one or several chains, and checks that each line is
// what the broker wrote and that none is missing: from the first one of each
// chain, or, for a log whose older lines were put away, from after the lines
// since, which an earlier verification ended with. What was cut off at the end
// can be found only by a head that is known from elsewhere: a chain in since
// that is neither in the log nor continued there is a problem.
func Verify(r io.Reader, key Key, since ...Head) (Report, error) {
	return VerifyTo(r, key, Known{Since: since})
}

// Known is what is known of a log from elsewhere.
type Known struct {
	// Written are lines to which the log has to go on at least.
	Written []Head
	// Since are lines that an earlier verification ended with: see [Verify].
	Since []Head
	// Acknowledged are the last lines of chains that need not be there any more.
	Acknowledged []Head
}

// excuses reports whether heads have the chain of h up to h, or further.
func excuses(heads []Head, h Head) bool {
	return slices.ContainsFunc(heads, func(s Head) bool { return s.Chain == h.Chain && s.Seq >= h.Seq })
}

// VerifyTo is [Verify] with all that is known of the log.
func VerifyTo(r io.Reader, key Key, known Known) (Report, error) {
	written, since := known.Written, known.Since
	var report Report
	ends := make(map[string]Head)
	for _, h := range written {
		ends[h.Chain] = h
	}
	problem := func(format string, a ...any) {
		if len(report.Problems) < maxProblems {
			report.Problems = append(report.Problems, fmt.Sprintf(format, a...))
		}
	}
	expected := make(map[string]Head)
	for _, h := range since {
		if !excuses(known.Acknowledged, h) {
			expected[h.Chain] = h
		}
	}
	chains := make(map[string]Head)
	before := make(map[string]Head) // by the chain whose first line names it
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	number := 0
	for lines.Scan() {
		number++
		text := lines.Bytes()
		if len(text) == 0 {
			continue
		}
		l, mac, err := key.open(text)
		if errors.Is(err, errForged) {
			problem("line %d: %s", number, err)
			continue
		}
		if err != nil {
			report.Notes = append(report.Notes, fmt.Sprintf("line %d is none of the log's: a crash or a full disk cut it short, or somebody put it there", number))
			continue
		}
		report.Lines++
		at, begun := chains[l.Chain]
		want, isExpected := expected[l.Chain]
		switch {
		case begun && l.Seq == at.Seq+1 && l.Prev == at.MAC:
		case begun && l.Seq <= at.Seq:
			problem("line %d is line %d of chain %s again, or out of order", number, l.Seq, l.Chain)
			continue
		case begun:
			problem("line %d: of chain %s, the lines from %d to %d are missing before it", number, l.Chain, at.Seq+1, l.Seq-1)
		case isExpected && l.Seq == want.Seq+1 && l.Prev == want.MAC:
			delete(expected, l.Chain)
		case l.Seq != 1 && !(isExpected && l.Seq <= want.Seq):
			problem("line %d: chain %s begins with line %d: the lines before it are missing", number, l.Chain, l.Seq)
		}
		if isExpected && l.Seq == want.Seq {
			if mac != want.MAC {
				problem("line %d is another line %d of chain %s than the one that was there before", number, l.Seq, l.Chain)
			}
			delete(expected, l.Chain)
		}
		if end := ends[l.Chain]; l.Seq == end.Seq && mac != end.MAC {
			problem("line %d is another line %d of chain %s than the one that copilot has noted in its store", number, l.Seq, l.Chain)
		}
		chains[l.Chain] = Head{l.Chain, l.Seq, mac}
		if after, err := ParseHead(l.After); err == nil {
			before[l.Chain] = after
		}
	}
	if err := lines.Err(); err != nil {
		return report, fmt.Errorf("line %d: %w", number+1, err)
	}
	for _, h := range slices.Sorted(maps.Keys(expected)) {
		problem("the lines of chain %s up to %d, which were there before, are missing", h, expected[h].Seq)
	}
	gone := slices.Concat(since, known.Acknowledged)
	for _, h := range Cut(written, chains, gone) {
		problem("chain %s ends with line %d, and copilot has noted line %d in its store: lines were cut off, or the log was deleted, replaced or put back from a backup", h.Chain, chains[h.Chain].Seq, h.Seq)
	}
	for _, id := range slices.Sorted(maps.Keys(before)) {
		after := before[id]
		if chains[after.Chain].Seq < after.Seq && !excuses(gone, after) {
			problem("chain %s, or its end, is missing: chain %s began after its line %d", after.Chain, id, after.Seq)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(chains)) {
		report.Heads = append(report.Heads, chains[id])
	}
	return report, nil
}

// Cut returns those of written that chains, by their ids, do not reach and that are not
// in since.
func Cut(written []Head, chains map[string]Head, since []Head) []Head {
	return slices.DeleteFunc(slices.Clone(written), func(h Head) bool {
		return chains[h.Chain].Seq >= h.Seq || excuses(since, h)
	})
}
