package filestamp

import (
	"io/fs"
	"syscall"
	"time"
)

// addSystem adds what programs that restore a file's modification time don't restore.
func (s *Stamp) addSystem(info fs.FileInfo) {
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		s.inode, s.changed = sys.Ino, time.Unix(sys.Ctim.Unix())
	}
}
