package host

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a process of this machine.
type Process struct {
	PID     int
	PPID    int
	Program string   // the path of its executable, or of the file that has replaced it
	Args    []string // without the program's name
	Dir     string   // its working directory, which relative paths in Args start at
	Unit    string   // its systemd service, or ""
	Parent  string   // the name of its parent process
	Started time.Time
}

func (p *Process) String() string {
	by := p.Unit
	if by == "" {
		by = "process " + strconv.Itoa(p.PID)
	}
	return fmt.Sprintf("%s (%s)", strings.Join(append([]string{p.Program}, p.Args...), " "), by)
}

// Processes returns root's processes with a program of that name outside of
// containers, which have another root directory. Processes of other users are left
// out: any user can give a program that name, and root runs what is found here.
func (h Host) Processes(name string) ([]*Process, error) {
	root, err := os.Stat(h.Path("/"))
	if err != nil {
		return nil, err
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	boot, err := bootTime()
	if err != nil {
		return nil, err
	}
	var found []*Process
	for _, dir := range dirs {
		p, err := readProcess(dir, name, boot)
		if err != nil || p == nil {
			continue // it has ended, or is another program
		}
		if r, err := os.Stat(dir + "/root/."); err != nil || !os.SameFile(r, root) || !ofRoot(dir) {
			continue
		}
		found = append(found, p)
	}
	return found, nil
}

// readProcess returns the process of a directory in /proc, or nil if its program has
// another name.
func readProcess(dir, name string, boot time.Time) (*Process, error) {
	cmdline, err := os.ReadFile(dir + "/cmdline")
	if err != nil {
		return nil, err
	}
	args := strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")
	if filepath.Base(args[0]) != name {
		return nil, nil
	}
	pid, err := strconv.Atoi(filepath.Base(dir))
	if err != nil {
		return nil, err
	}
	p := &Process{PID: pid, Args: args[1:]}
	if p.Program, err = programOf(dir, name); err != nil || p.Program == "" {
		return nil, err
	}
	if p.Dir, err = os.Readlink(dir + "/cwd"); err != nil {
		return nil, err
	}
	fields, err := statFields(dir)
	if err != nil {
		return nil, err
	}
	if p.PPID, err = strconv.Atoi(fields[1]); err != nil {
		return nil, err
	}
	if p.Started, err = startOf(fields, boot); err != nil {
		return nil, err
	}
	parent, err := os.ReadFile("/proc/" + fields[1] + "/comm")
	if err == nil {
		p.Parent = strings.TrimSpace(string(parent))
	}
	if cgroup, err := os.ReadFile(dir + "/cgroup"); err == nil {
		p.Unit = unitOf(string(cgroup))
	}
	return p, nil
}

// ofRoot reports whether all user IDs of the process of a directory in /proc are 0.
func ofRoot(dir string) bool {
	status, err := os.ReadFile(dir + "/status")
	return err == nil && strings.Contains(string(status), "\nUid:\t0\t0\t0\t0\n")
}

// statFields returns the fields of /proc/PID/stat after the program's name, which is
// in parentheses and may contain spaces.
func statFields(dir string) ([]string, error) {
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return nil, err
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	if len(fields) < 20 {
		return nil, fmt.Errorf("%s/stat has %d fields", dir, len(fields))
	}
	return fields, nil
}

// StartedAt returns the start time of the process of a directory in /proc.
func StartedAt(dir string) (time.Time, error) {
	boot, err := bootTime()
	if err != nil {
		return time.Time{}, err
	}
	fields, err := statFields(dir)
	if err != nil {
		return time.Time{}, err
	}
	return startOf(fields, boot)
}

// startOf returns a process's start time from its statFields.
func startOf(fields []string, boot time.Time) (time.Time, error) {
	ticks, err := strconv.ParseInt(fields[19], 10, 64)
	if err != nil {
		return time.Time{}, err
	}
	return boot.Add(time.Duration(ticks) * (time.Second / userHZ)), nil
}

// userHZ is the number of ticks per second in /proc/PID/stat, the same on all Linux
// architectures that Go supports.
const userHZ = 100

// StartPrecision is how much later than a process's start time the time of an older
// file may be, since the start time is rounded down to a tick.
const StartPrecision = 2 * time.Second / userHZ

// programOf returns the path at which a process's program can be run again, or "" if
// the process only claims the name, since argv[0] can be anything. The executable has
// that name, or is the same file as the one of that name beside it (k3s's containerd is
// a link to a program with many names), or is what a wrapper of that name starts
// (NixOS's containerd is .containerd-wrapped).
func programOf(dir, name string) (string, error) {
	exe, err := os.Readlink(dir + "/exe")
	if err != nil {
		return "", err
	}
	exe = strings.TrimSuffix(exe, " (deleted)") // it was upgraded
	beside := filepath.Join(filepath.Dir(exe), name)
	switch base := filepath.Base(exe); {
	case base == name:
		return exe, nil
	case base == "."+name+"-wrapped" && (Host{}).Has(beside), SameFile(beside, dir+"/exe"):
		return beside, nil
	}
	return "", nil
}

// unitOf returns the service in the text of /proc/PID/cgroup, or "".
func unitOf(cgroup string) string {
	for line := range strings.Lines(cgroup) {
		_, path, _ := strings.Cut(strings.TrimSpace(line), ":/")
		for _, name := range slices.Backward(strings.Split(path, "/")) {
			if strings.HasSuffix(name, ".service") {
				return name
			}
		}
	}
	return ""
}

// bootTime returns when the machine booted, by the present clock. /proc/PID/stat
// counts from then.
func bootTime() (time.Time, error) {
	var since unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &since); err != nil {
		return time.Time{}, fmt.Errorf("clock: %w", err)
	}
	return time.Now().Add(-time.Duration(since.Nano())), nil
}

// ListenerPID returns the PID of the process that listens on a unix socket.
func ListenerPID(socket string) (int, error) {
	conn, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	return peerPID(conn.(*net.UnixConn))
}

// peerPID returns the PID of the process at the other end.
func peerPID(conn *net.UnixConn) (int, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var peer *unix.Ucred
	var peerErr error
	err = raw.Control(func(fd uintptr) {
		peer, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err = errors.Join(err, peerErr); err != nil {
		return 0, err
	}
	return int(peer.Pid), nil
}
