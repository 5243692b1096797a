package node

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

// process is one that runs on this machine, of containerd or of Docker.
type process struct {
	pid     int
	ppid    int
	program string   // its executable, or the one that has replaced it
	args    []string // without the program's name
	dir     string   // its working directory, where a relative path of args leads
	unit    string   // the systemd service that it belongs to, if any
	parent  string   // the name of the program that has started it
	started time.Time
}

// flags are the options of containerd's command line that decide what it reads
// and where it answers. What is empty was not given.
type flags struct{ config, address string }

// parseFlags reads a command line of containerd's. It reports false for one that
// starts no daemon, such as "containerd config dump" and "containerd --version".
func parseFlags(args []string) (f flags, daemon bool) {
	for i := 0; i < len(args); i++ {
		name, isFlag := strings.CutPrefix(args[i], "-")
		if !isFlag {
			return f, false
		}
		name, value, hasValue := strings.Cut(strings.TrimPrefix(name, "-"), "=")
		switch name {
		case "config", "c", "address", "a", "root", "state", "log-level", "l":
			if !hasValue && i+1 < len(args) {
				i++
				value = args[i]
			}
		}
		switch name {
		case "version", "v", "help", "h":
			return f, false
		case "config", "c":
			f.config = value
		case "address", "a":
			f.address = value
		}
	}
	return f, true
}

func (p *process) String() string {
	by := p.unit
	if by == "" {
		by = "process " + strconv.Itoa(p.pid)
	}
	return fmt.Sprintf("%s (%s)", strings.Join(append([]string{p.program}, p.args...), " "), by)
}

// config returns the path of the configuration file that a containerd was started
// with.
func (p *process) config() string {
	f, _ := parseFlags(p.args)
	switch {
	case f.config == "":
		return defaultConfig
	case filepath.IsAbs(f.config):
		return f.config
	}
	return filepath.Join(p.dir, f.config)
}

// running returns the containerds that run on this machine.
func running() ([]*process, error) {
	named, err := Options{}.processes("containerd")
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(named, func(p *process) bool {
		_, daemon := parseFlags(p.args)
		// What containerd starts goes by its name until it is another program.
		return !daemon || slices.ContainsFunc(named, func(q *process) bool { return q.pid == p.ppid })
	}), nil
}

// processes returns the machine's processes of a program, by its name. Those of
// containers have another root directory, and are left out. So are those of other
// users than root: anybody can give a program that name, and root runs what is
// found here.
func (o Options) processes(name string) ([]*process, error) {
	root, err := os.Stat(o.path("/"))
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
	var found []*process
	for _, dir := range dirs {
		p, err := readProcess(dir, name, boot)
		if err != nil || p == nil {
			continue // it has ended, or is none
		}
		if r, err := os.Stat(dir + "/root/."); err != nil || !os.SameFile(r, root) || !ofRoot(dir) {
			continue
		}
		found = append(found, p)
	}
	return found, nil
}

// readProcess returns the process that /proc has in dir, or nil if its program has
// another name.
func readProcess(dir, name string, boot time.Time) (*process, error) {
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
	p := &process{pid: pid, args: args[1:]}
	if p.program, err = programOf(dir, name); err != nil || p.program == "" {
		return nil, err
	}
	if p.dir, err = os.Readlink(dir + "/cwd"); err != nil {
		return nil, err
	}
	fields, err := statFields(dir)
	if err != nil {
		return nil, err
	}
	if p.ppid, err = strconv.Atoi(fields[1]); err != nil {
		return nil, err
	}
	if p.started, err = startOf(fields, boot); err != nil {
		return nil, err
	}
	parent, err := os.ReadFile("/proc/" + fields[1] + "/comm")
	if err == nil {
		p.parent = strings.TrimSpace(string(parent))
	}
	if cgroup, err := os.ReadFile(dir + "/cgroup"); err == nil {
		p.unit = unitOf(string(cgroup))
	}
	return p, nil
}

// ofRoot reports whether all user IDs of a process are root's, by its directory
// in /proc.
func ofRoot(dir string) bool {
	status, err := os.ReadFile(dir + "/status")
	return err == nil && strings.Contains(string(status), "\nUid:\t0\t0\t0\t0\n")
}

// statFields returns the fields of a process's stat after its program's name,
// which is in parentheses and may have spaces.
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

// startedAt returns when the process was started that /proc has in dir.
func startedAt(dir string) (time.Time, error) {
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

// startOf returns when a process was started, by statFields.
func startOf(fields []string, boot time.Time) (time.Time, error) {
	ticks, err := strconv.ParseInt(fields[19], 10, 64)
	if err != nil {
		return time.Time{}, err
	}
	return boot.Add(time.Duration(ticks) * (time.Second / userHZ)), nil
}

// userHZ is the unit of /proc/PID/stat, the same on all Linux architectures that
// Go knows.
const userHZ = 100

// startPrecision is how much later than a process was started a file may seem to be
// written that was written before: the start is rounded down to a tick.
const startPrecision = 2 * time.Second / userHZ

// programOf returns the path at which the program of a process can be run again,
// or nothing if the process only calls itself by the name, since argv[0] can be
// anything. The executable has that name, or is the same as the file of that name
// in its directory, since k3s's containerd is one of many names of one program, or
// has it in a wrapper's form: NixOS's containerd is .containerd-wrapped.
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
	case base == "."+name+"-wrapped" && exists(beside), sameFile(beside, dir+"/exe"):
		return beside, nil
	}
	return "", nil
}

// unitOf returns the service that a /proc/PID/cgroup names.
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

// bootTime returns when the machine was started, which /proc/PID/stat counts
// from, by today's clock.
func bootTime() (time.Time, error) {
	var since unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &since); err != nil {
		return time.Time{}, fmt.Errorf("clock: %w", err)
	}
	return time.Now().Add(-time.Duration(since.Nano())), nil
}

// listenerPID returns the process that listens on a unix socket.
func listenerPID(socket string) (int, error) {
	conn, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	return peerPID(conn.(*net.UnixConn))
}

// peerPID returns the process that listens at the other end.
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
