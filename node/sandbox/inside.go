package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// sandboxArgument is the first argument of a process that confines itself and then
// executes a program of a root directory. The mode, the root, the program and its
// arguments follow.
const sandboxArgument = "run-in-root"

// isolatesRoots is true once IsolateRoots was called.
var isolatesRoots bool

// IsolateRoots must be called first in the main of programs that call [RunInRoot], which
// starts this program again to confine itself and then execute the other. In that
// process IsolateRoots does not return.
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

// enterSandbox confines this process and executes a program of the root. It returns only
// on errors.
func enterSandbox(mode sandboxMode, root, program string, argv []string) error {
	// Also files that this process has inherited from further up.
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
	// The sandbox works and the program can't run in it: another mode would not help.
	fmt.Fprintf(os.Stderr, "%s\n", err)
	os.Exit(126)
	return nil
}

// mountTree returns the mounts at and below a directory, detached, read-only, and
// without device nodes and set-user-ID programs.
func mountTree(dir string, attr unix.MountAttr) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return nil, fmt.Errorf("mounts of %s: %w", dir, err)
	}
	tree := os.NewFile(uintptr(fd), dir)
	attr.Attr_set |= unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID
	attr.Propagation = unix.MS_PRIVATE
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
		tree.Close()
		return nil, fmt.Errorf("attributes of the mounts of %s: %w", dir, err)
	}
	return tree, nil
}

// enterRoot makes the root the whole file system of this process, which has a mount
// namespace of its own.
func enterRoot(mode sandboxMode, root string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts: %w", err)
	}
	tree := os.NewFile(4, root)
	if mode != ownUser {
		var err error
		if tree, err = mountTree(root, unix.MountAttr{}); err != nil {
			return err
		}
	}
	// Any directory that every user can reach will do, and this one always exists.
	const at = "/proc"
	if err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount %s: %w", root, err)
	}
	root = at
	// This machine's may be mounted there, for a chroot.
	for _, dir := range []string{"proc", "sys", "dev"} {
		name := filepath.Join(root, dir)
		if info, err := os.Lstat(name); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil || !info.IsDir() {
			return fmt.Errorf("/%s of the root is not a directory", dir)
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

// limitResources bounds what the program can use of this machine.
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

// dropPrivileges removes this thread's privileges.
func dropPrivileges(mode sandboxMode) error {
	// This user's keyring must not be visible.
	if _, err := unix.KeyctlInt(unix.KEYCTL_JOIN_SESSION_KEYRING, 0, 0, 0, 0); err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("keyring: %w", err)
	}
	// Otherwise root would regain its capabilities by executing a program.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var keep [2]unix.CapUserData
	if mode == ownUser || mode == ownUserns {
		// In its own user namespace this only allows reading the root.
		keep[0] = unix.CapUserData{Effective: 1 << unix.CAP_DAC_READ_SEARCH, Permitted: 1 << unix.CAP_DAC_READ_SEARCH}
	}
	if err := unix.Capset(&header, &keep[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	// That clears the ambient ones too.
	return nil
}
