package audit

import (
	"crypto/rand"
	"fmt"

	"github.com/sirupsen/logrus"
)

// newLog returns a log that continues after the sink's last line, or begins a new
// chain. It also begins one if the sink has lost a line that is known to have been
// written. That chain names the lost line as its predecessor, but does not continue its
// numbering: more lines than are known may have been written.
func newLog(key Key, s sink, goOn bool, known []Head) (*Log, error) {
	l := &Log{key: key, sink: s}
	l.turn.L = &l.mu
	last, err := l.last("")
	if err != nil {
		return nil, err
	}
	if goOn {
		last, goOn = l.compare(last, known)
	}
	switch {
	case goOn && last != Head{}:
		l.at, l.head = last, last
		return l, nil
	case last != Head{}:
		l.after = last.String()
	}
	id := make([]byte, 6)
	rand.Read(id) // never fails
	l.at.Chain = fmt.Sprintf("%x", id)
	return l, nil
}

// compare compares the last line that the sink has with those that are known to have
// been written. It returns the line after which the log continues, and whether in that
// line's chain.
func (l *Log) compare(last Head, known []Head) (after Head, goOn bool) {
	written, ended := latest(known, last.Chain)
	if !ended && (last.Seq > written.Seq || last == written) {
		return last, true
	}
	unread := ""
	if f, ok := l.sink.(*file); ok && ended {
		before, name, err := l.rotatedTo(f.name, written)
		switch {
		case before.Seq > 0 && last.Seq > 0:
			return last, true
		case before.Seq > 0:
			e := continued(fmt.Sprintf("the log goes on in a new file: the one before was moved to %s while copilot did not run", name))
			l.first = &e
			return before, true
		case err != nil:
			unread = fmt.Sprintf(" (files that were moved away can't be searched: %s)", err)
		}
	}
	l.miss("the lines of chain %s up to %d are missing here: the file was truncated, deleted, moved, replaced or put back from a backup while copilot did not run%s", written.Chain, written.Seq, unread)
	l.ended = written
	return written, false
}

// latest returns the head that is known of a chain or, if none is, the last one of
// all, whose chain was another's end then.
func latest(known []Head, chain string) (h Head, other bool) {
	for _, h := range known {
		if h.Chain == chain {
			return h, false
		}
	}
	if len(known) == 0 {
		return Head{}, false
	}
	return known[len(known)-1], true
}

// miss reports that lines are missing, in the log of the process and in this one.
func (l *Log) miss(format string, a ...any) {
	e := continued(fmt.Sprintf(format, a...))
	logrus.Error("audit log: " + e.Reason)
	l.first = &e
	l.losses++
}
