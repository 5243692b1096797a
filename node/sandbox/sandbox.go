// Package sandbox runs programs of a machine and returns what they print, bounded in
// time and output. Those of a root directory, which nobody may have read, are confined.
package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// The programs are containerd and dockerd, which are run to print their versions and
// containerd's configuration. Those of a root directory can't be trusted: a node image
// may be built from packages that nobody has reviewed, by a CI job with secrets in its
// environment. See sandboxMode for what confines them.

// runTimeout bounds each run of a program.
const runTimeout = 20 * time.Second

// maxOutput bounds what a program may print, in bytes. containerd's configuration takes
// some ten KiB.
const maxOutput = 4 << 20

// BinDirs are the directories in which programs are looked for in a root.
var BinDirs = []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}

// runEnvironment is the whole environment of a program.
var runEnvironment = []string{"PATH=" + strings.Join(BinDirs, ":"), "HOME=/", "LANG=C.UTF-8"}

// sandboxMode is how a program of a root directory is kept away from this machine. In
// each mode it has no capabilities and can gain none (no_new_privs), a clean
// environment, no open files, no terminal, resource limits, and a time limit after
// which it is killed.
type sandboxMode string

const (
	// ownUser: a user namespace with user IDs that nothing else uses, and mount, PID,
	// network, IPC, UTS and cgroup namespaces. The root is its whole file system, by an
	// ID-mapped mount, read-only, without device nodes, and with an empty /proc, /sys
	// and /dev. It has CAP_DAC_READ_SEARCH there, as configuration may belong to any user.
	ownUser sandboxMode = "user"
	// ownUserns: the same with the user IDs of the process that runs this, where the
	// root's file system has no ID-mapped mounts, or pilot may not make them.
	ownUserns sandboxMode = "user-namespace"
	// ownNamespaces: the same without a user namespace, where they are turned off, and
	// without any capability: that one would open the machine's files by their handles.
	ownNamespaces sandboxMode = "namespaces"
	// bareChroot: no namespaces and no capabilities; files of root in the root directory
	// can be written, and processes that it moves to other sessions survive. On request only.
	bareChroot sandboxMode = "chroot"
)

const sandboxNamespaces = syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS | syscall.CLONE_NEWCGROUP

// sandboxUser is the first of the sandboxUsers user IDs that the root's are mapped to.
// useradd, /etc/subuid and systemd assign none of them (systemd.io/UIDS-GIDS).
const (
	sandboxUser  = 0x70000000
	sandboxUsers = 1 << 16
)

// errNoSandbox is the error of a machine that allows no sandbox.
type errNoSandbox struct{ reasons []error }

func (e *errNoSandbox) Error() string {
	return fmt.Sprintf("no sandbox can be made here for the programs of --root, since namespaces are not allowed or the kernel is older than 5.12 (%s): "+
		"run this as root or with CAP_SYS_ADMIN (docker run --privileged), or, if you trust every program in the root, with --trust-root", strings.ReplaceAll(errors.Join(e.reasons...).Error(), "\n", "; "))
}

// RunInRoot runs a program of a root directory and returns its standard output: in a
// bare chroot if the root is trusted, otherwise in a sandbox. The error ends with the
// last line of standard error.
func RunInRoot(ctx context.Context, root string, trusted bool, program string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, runTimeout)
	defer cancel()
	switch {
	case !isolatesRoots:
		return nil, errors.New("programs of a root directory can't be run here: IsolateRoots was not called")
	case trusted:
		return runSandboxed(ctx, bareChroot, root, program, args)
	}
	none := &errNoSandbox{}
	for _, mode := range []sandboxMode{ownUser, ownUserns, ownNamespaces} {
		out, err := runSandboxed(ctx, mode, root, program, args)
		var setup errSetup
		if !errors.As(err, &setup) {
			return out, err
		}
		none.reasons = append(none.reasons, fmt.Errorf("%s: %w", mode, setup.error))
	}
	return nil, none
}

// Run runs a program of this machine, without a sandbox, and returns its standard
// output. The error ends with the last line of standard error.
func Run(ctx context.Context, program string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, runTimeout)
	defer cancel()
	return runCommand(ctx, exec.CommandContext(ctx, program, args...), nil)
}

// errSetup is the error of a sandbox that can't be set up.
type errSetup struct{ error }

// runSandboxed runs a program of the root's in a sandbox.
func runSandboxed(ctx context.Context, mode sandboxMode, root, program string, args []string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{sandboxArgument, string(mode), root, program}, args...)...)
	cmd.Args[0] = os.Args[0]
	// It leads a session. As the first process of its PID namespace, it ends all others
	// there when it ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL, Cloneflags: sandboxNamespaces}
	failures, report, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer failures.Close()
	defer report.Close()
	cmd.ExtraFiles = []*os.File{report}
	switch mode {
	case ownUser:
		tree, err := mappedTree(root)
		if err != nil {
			return nil, errSetup{err}
		}
		defer tree.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, tree)
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: sandboxUser, Size: sandboxUsers}}
		cmd.SysProcAttr.GidMappings = cmd.SysProcAttr.UidMappings
	case ownUserns:
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = sameIDs("/proc/self/uid_map", os.Geteuid())
		cmd.SysProcAttr.GidMappings = sameIDs("/proc/self/gid_map", os.Getegid())
	case bareChroot:
		cmd.SysProcAttr.Cloneflags = 0
	}
	out, err := runCommand(ctx, cmd, func() error {
		report.Close()
		// The pipe is closed when the program starts, so this reads errors of the set-up only.
		text, _ := io.ReadAll(io.LimitReader(failures, 4096))
		if len(text) > 0 {
			return errSetup{errors.New(string(text))}
		}
		return nil
	})
	return out, err
}

// mappedTree returns the root's mounts, detached, with user IDs mapped to the sandbox's.
func mappedTree(root string) (*os.File, error) {
	ids := fmt.Sprintf("0:%d:%d", sandboxUser, sandboxUsers)
	userns, err := mount.GetUsernsFD(ids, ids)
	if err != nil {
		return nil, err
	}
	defer userns.Close()
	return mountTree(root, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns.Fd())})
}

// sameIDs returns the mapping of a user namespace with the same IDs as this process's,
// from a file of /proc. Users other than root may map only their own ID.
func sameIDs(file string, own int) []syscall.SysProcIDMap {
	text, err := os.ReadFile(file)
	if err != nil || own != 0 {
		return []syscall.SysProcIDMap{{HostID: own, Size: 1}}
	}
	var list []syscall.SysProcIDMap
	for line := range strings.Lines(string(text)) {
		var inside, outside, size int
		if _, err := fmt.Sscan(line, &inside, &outside, &size); err == nil {
			list = append(list, syscall.SysProcIDMap{ContainerID: inside, HostID: inside, Size: size})
		}
	}
	return list
}

// runCommand runs a command in a clean environment and returns its standard output, up
// to maxOutput. If started is not nil, it is called once the command runs, and its error
// is returned.
func runCommand(ctx context.Context, cmd *exec.Cmd, started func() error) ([]byte, error) {
	name := strings.Join(cmd.Args, " ")
	if len(cmd.Args) > 3 && cmd.Args[1] == sandboxArgument {
		name = strings.Join(cmd.Args[4:], " ") + " in " + cmd.Args[3]
	}
	cmd.Env = runEnvironment
	cmd.WaitDelay = time.Second // for children that keep its output open
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	var tooMuch atomic.Bool
	stop := func() { tooMuch.Store(true); cmd.Cancel() }
	stdout, stderr := &boundedBuffer{full: stop}, &boundedBuffer{full: stop}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	// The kernel sends Pdeathsig when the thread that started the process ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		if started != nil {
			err = errSetup{err}
		}
		return nil, err
	}
	var startErr error
	if started != nil {
		startErr = started()
	}
	// Kill what it leaves in its process group. Until it is waited for, no other group
	// can get that number.
	for errors.Is(unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR) {
	}
	syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	err := cmd.Wait()
	switch {
	case startErr != nil:
		return nil, startErr
	case tooMuch.Load():
		return nil, fmt.Errorf("%s was stopped: it printed more than %d MiB", name, maxOutput>>20)
	case err != nil && ctx.Err() != nil:
		return nil, fmt.Errorf("%s was stopped: %w", name, ctx.Err())
	case err != nil:
		lines := strings.Split(strings.TrimSpace(stderr.b.String()), "\n")
		return nil, fmt.Errorf("%s: %w: %.1000s", name, err, lines[len(lines)-1])
	}
	return stdout.b.Bytes(), nil
}

// boundedBuffer takes up to maxOutput bytes, and calls full for more.
type boundedBuffer struct {
	b    bytes.Buffer // not embedded: its ReadFrom has no bound
	full func()
}

func (b *boundedBuffer) Write(p []byte) (int, error) {
	if b.b.Len()+len(p) > maxOutput {
		b.full()
		return 0, io.ErrShortWrite
	}
	return b.b.Write(p)
}
