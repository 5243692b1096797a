package certfile

import (
	"slices"

	"github.com/ctrlplane/pilot/internal/filestamp"
)

// unchanged remembers which content of files was read last, so that they are read and
// parsed again only when they have changed.
type unchanged struct {
	files []string
	read  []filestamp.Stamp // nil: read them again
}

// since reports whether the files are what they were when the returned function was
// called last, which is when their content was read and could be used. A change counts at
// once: files that were written less than [filestamp.Settle] ago are always read again.
func (u *unchanged) since() (same bool, used func()) {
	now := make([]filestamp.Stamp, len(u.files))
	settled := true
	for i, name := range u.files {
		var err error
		now[i], err = filestamp.Of(name)
		settled = settled && err == nil && now[i].Wait() == 0
	}
	if settled && slices.Equal(now, u.read) {
		return true, nil
	}
	u.read = nil
	return false, func() {
		if settled {
			u.read = now
		}
	}
}
