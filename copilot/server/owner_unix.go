//go:build unix

package server

import (
	"fmt"
	"os"
	"os/user"
	"strconv"
	"syscall"
)

// checkOwner keeps root from creating files in a store of the user that copilot's service
// runs as, which could not open them.
func checkOwner(dir string) error {
	info, err := os.Stat(dir)
	if err != nil || os.Geteuid() != 0 {
		return nil
	}
	uid := info.Sys().(*syscall.Stat_t).Uid
	if uid == 0 {
		return nil
	}
	name := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(name); err == nil {
		name = u.Username
	}
	return fmt.Errorf("the store in %s belongs to user %s: start its service first (systemctl start copilot), or run this as that user (runuser -u %[2]s -- copilot …)", dir, name)
}
