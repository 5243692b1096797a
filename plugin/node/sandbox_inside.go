package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// sandboxArgument is the first argument of a process that becomes a program of a root
// directory. After it come the mode, the root, the program and its arguments.
const sandboxArgument = "run-in-root"

// isolatesRoots says that this program can become one of a root's.
var isolatesRoots bool

// IsolateRoots must be called first in programs that set up root directories. In a
// process that is to become a program of one it does not return: such a process is
// this program again, which confines itself and then runs the other.
func IsolateRoots() {
	if len(os.Args) < 5 || os.Args[1] != sandboxArgument {
		isolatesRoots = true
		return
	}
	// Capabilities belong to a thread, and the one that calls exec passes them on.
	runtime.LockOSThread()
	report := os.NewFile(3, "report")
	err := enterSandbox(sandboxMode(os.Args[2]), os.Args[3], os.Args[4], os.Args[4:])
	fmt.Fprint(report, err)
	os.Exit(1)
}

// enterSandbox confines this process and becomes a program of the root's. It returns
// only on errors.
func enterSandbox(mode sandboxMode, root, program string, argv []string) error {
	// What this process was given by its parent's parents, too.
	if err := unix.CloseRange(3, ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("close files: %w", err)
	}
	enter := enterRoot
	if mode == bareChroot {
		enter = func(_ sandboxMode, root string) error { return unix.Chroot(root) }
	}
	if err := enter(mode, root); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := limitResources(mode); err != nil {
		return err
	}
	if err := dropPrivileges(mode); err != nil {
		return err
	}
	err := unix.Exec(program, argv, runEnvironment)
	// The sandbox is there, and the program can't run in it: another would not help.
	fmt.Fprintf(os.Stderr, "%s\n", err)
	os.Exit(126)
	return nil
}

// enterRoot makes the root the whole file system of this process, which has a mount
// namespace of its own: read-only, without device nodes and set-user-ID programs.
func enterRoot(mode sandboxMode, root string) error {
	const attributes = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts: %w", err)
	}
	if mode == ownUser {
		if err := mount.IDMapMountWithAttrs(root, root, 4, attributes, 0); err != nil {
			return err
		}
	} else {
		if err := unix.Mount(root, root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("mount %s: %w", root, err)
		}
		if err := unix.MountSetattr(unix.AT_FDCWD, root, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: attributes}); err != nil {
			return fmt.Errorf("make the mount of %s read-only: %w", root, err)
		}
	}
	// The root may have the machine's own there, as chroot needs them.
	for _, dir := range []string{"proc", "sys", "dev"} {
		name := filepath.Join(root, dir)
		if info, err := os.Lstat(name); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil || !info.IsDir() {
			return fmt.Errorf("%s is not a directory", name)
		}
		if err := unix.Mount("none", name, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC|unix.MS_NODEV, "mode=0755,size=64k"); err != nil {
			return fmt.Errorf("mount %s: %w", name, err)
		}
	}
	// Scripts need a /dev/null.
	null := filepath.Join(root, "dev/null")
	if f, err := os.Create(null); err == nil {
		f.Close()
		if err := unix.Mount("/dev/null", null, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", null, err)
		}
	}
	for _, dir := range []string{"proc", "sys", "dev"} {
		err := unix.Mount("", filepath.Join(root, dir), "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NOEXEC|unix.MS_NODEV, "")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("make the mount of /%s read-only: %w", dir, err)
		}
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change the root to %s: %w", root, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the machine's root: %w", err)
	}
	return nil
}

// limitResources bounds what the program can take of the machine.
func limitResources(mode sandboxMode) error {
	limits := map[int]uint64{
		unix.RLIMIT_CORE:    0,
		unix.RLIMIT_CPU:     uint64(runTimeout.Seconds()),
		unix.RLIMIT_DATA:    2 << 30, // bytes
		unix.RLIMIT_NOFILE:  1024,
		unix.RLIMIT_MEMLOCK: 0,
	}
	if mode != bareChroot {
		limits[unix.RLIMIT_FSIZE] = 0 // nothing is writable
	}
	if mode == ownUser {
		limits[unix.RLIMIT_NPROC] = 512 // threads, of all sandboxes
	}
	for what, most := range limits {
		var had unix.Rlimit
		if err := unix.Getrlimit(what, &had); err != nil {
			return err
		}
		most = min(most, had.Max)
		if err := syscall.Setrlimit(what, &syscall.Rlimit{Cur: most, Max: most}); err != nil {
			return fmt.Errorf("resource limit %d: %w", what, err)
		}
	}
	return nil
}

// dropPrivileges takes from this thread all that makes root more than another user.
func dropPrivileges(mode sandboxMode) error {
	// The keys of the user that runs this.
	if _, err := unix.KeyctlInt(unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0); err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("keyring: %w", err)
	}
	if mode == ownUser {
		if err := setUser(sandboxUser); err != nil {
			return err
		}
	}
	// With it, root gets none of its capabilities back by starting a program.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("ambient capabilities: %w", err)
	}
	// A change of user clears it.
	return unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(syscall.SIGKILL), 0, 0, 0)
}

// setUser gives this thread another user and group.
func setUser(id int) error {
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
		return fmt.Errorf("groups: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(id), uintptr(id), uintptr(id)); errno != 0 {
		return fmt.Errorf("group: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(id), uintptr(id), uintptr(id)); errno != 0 {
		return fmt.Errorf("user: %w", errno)
	}
	return nil
}
