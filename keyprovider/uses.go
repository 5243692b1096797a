package keyprovider

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/sirupsen/logrus"
)

const (
	// maxCountedKEKs is how many KEKs are counted separately between two lines of the log.
	maxCountedKEKs = 256
	// maxLoggedKEKs bounds the KEKs in a line of the log, in bytes.
	maxLoggedKEKs = 300
)

// uses counts the layer keys that were wrapped and unwrapped since they were logged last.
// It is safe for concurrent use.
type uses struct {
	mu                 sync.Mutex
	wrapped, unwrapped int
	byKEK              map[string]int // of maxCountedKEKs at most
}

func (u *uses) add(operation, kek string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if operation == opWrap {
		u.wrapped++
	} else {
		u.unwrapped++
	}
	if _, ok := u.byKEK[kek]; !ok && len(u.byKEK) == maxCountedKEKs {
		return
	}
	if u.byKEK == nil {
		u.byKEK = make(map[string]int)
	}
	u.byKEK[kek]++
}

// take returns the counts and starts over.
func (u *uses) take() (wrapped, unwrapped int, byKEK map[string]int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	wrapped, unwrapped, byKEK = u.wrapped, u.unwrapped, u.byKEK
	u.wrapped, u.unwrapped, u.byKEK = 0, 0, nil
	return wrapped, unwrapped, byKEK
}

// LogUses logs, in one line, how many layer keys were wrapped and unwrapped since it was
// called last, and with which KEKs, the most used first. It logs nothing if there were none.
func (m *Metrics) LogUses() {
	wrapped, unwrapped, byKEK := m.uses.take()
	if wrapped+unwrapped == 0 {
		return
	}
	logrus.WithFields(logrus.Fields{"wrapped": wrapped, "unwrapped": unwrapped, "keks": listUses(byKEK, wrapped+unwrapped)}).
		Info("layer keys wrapped and unwrapped")
}

// listUses lists KEKs with how often each was used, and then how often others were, of
// total uses.
func listUses(byKEK map[string]int, total int) string {
	ids := slices.SortedFunc(maps.Keys(byKEK), func(a, b string) int {
		return cmp.Or(byKEK[b]-byKEK[a], strings.Compare(a, b))
	})
	var list strings.Builder
	for _, id := range ids {
		entry := fmt.Sprintf("%s: %d", id, byKEK[id])
		if list.Len()+len(entry) > maxLoggedKEKs {
			break
		}
		if list.Len() > 0 {
			list.WriteString(", ")
		}
		list.WriteString(entry)
		total -= byKEK[id]
	}
	if total > 0 {
		if list.Len() > 0 {
			list.WriteString(", ")
		}
		fmt.Fprintf(&list, "others: %d", total)
	}
	return list.String()
}
