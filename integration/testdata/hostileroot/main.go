// Command hostileroot is the containerd of a root directory that means harm to the
// machine on which the root is set up. /attack in the root says which.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// attack is what /attack has: what to do, and where to go for it.
type attack struct {
	Do      string // report, daemon, hang or flood
	Port    string // of a listener on the machine's loopback address
	Secret  string // what the environment or a file of the machine has
	Outside string // a directory of the machine's, with a file that has Secret
	Daemon  string // the argument of a daemon, which begins with daemon-
	// Capabilities are those that it may have.
	Capabilities uint32
}

func main() {
	if len(os.Args) > 1 && strings.HasPrefix(os.Args[1], "daemon-") {
		for {
			time.Sleep(time.Hour)
		}
	}
	var a attack
	text, err := os.ReadFile("/attack")
	if err == nil {
		err = json.Unmarshal(text, &a)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	switch a.Do {
	case "report":
		fmt.Fprintln(os.Stderr, "harm:", strings.Join(a.harm(), ", "))
		os.Exit(1)
	case "daemon":
		cmd := exec.Command("/usr/bin/containerd", a.Daemon)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Fprintln(os.Stderr, "started")
		os.Exit(1)
	case "hang":
		for {
			time.Sleep(time.Hour)
		}
	case "flood":
		line := bytes.Repeat([]byte("x"), 1<<20)
		for range 1 << 10 {
			os.Stdout.Write(line)
		}
	}
}

// harm returns what it could do.
func (a attack) harm() (done []string) {
	did := func(what string, err error) {
		if err == nil {
			done = append(done, what)
		}
	}
	for fd := 3; fd < 64; fd++ {
		b := make([]byte, 64)
		if n, err := unix.Pread(fd, b, 0); err == nil && strings.Contains(string(b[:n]), a.Secret) {
			done = append(done, "read an open file")
		}
	}
	if strings.Contains(strings.Join(os.Environ(), " "), a.Secret) {
		done = append(done, "read its environment")
	}
	for _, pattern := range []string{"/proc/*/environ", "/proc/1/root" + a.Outside + "/*"} {
		files, _ := filepath.Glob(pattern)
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil && bytes.Contains(b, []byte(a.Secret)) {
				done = append(done, "read "+f)
			}
		}
	}
	for _, f := range []string{"/written", "/etc/written", "/tmp/written", "/dev/written", a.Outside + "/written", "/proc/1/root" + a.Outside + "/written"} {
		did("wrote "+f, os.WriteFile(f, nil, 0o644))
	}
	did("changed a mode", os.Chmod("/attack", 0o777))
	did("mounted", unix.Mount("none", "/tmp", "tmpfs", 0, ""))
	did("mounted it writable", unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND, ""))
	did("changed its root", unix.Chroot("/tmp"))
	did("made a device", unix.Mknod("/tmp/disk", unix.S_IFBLK|0o600, int(unix.Mkdev(8, 0))))
	if f, err := os.Open("/disk"); !errors.Is(err, os.ErrPermission) && !errors.Is(err, os.ErrNotExist) {
		f.Close()
		done = append(done, fmt.Sprintf("opened a device: %v", err))
	}
	if conn, err := net.DialTimeout("tcp", "127.0.0.1:"+a.Port, 10*time.Second); err == nil {
		conn.Close()
		done = append(done, "connected")
	}
	if conn, err := net.Dial("unix", "@"+a.Secret); err == nil {
		conn.Close()
		done = append(done, "connected to an abstract socket")
	}
	if os.Getppid() > 1 {
		did("sent its parent a signal", syscall.Kill(os.Getppid(), 0))
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var has, may [2]unix.CapUserData
	may[0] = unix.CapUserData{Effective: a.Capabilities, Permitted: a.Capabilities}
	if err := unix.Capget(&header, &has[0]); err != nil || has != may {
		done = append(done, fmt.Sprintf("has capabilities %v, %v", has, err))
	}
	// With no_new_privs, root gets none of them back by starting a program.
	if v, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); err != nil || v != 1 {
		done = append(done, "may gain privileges")
	}
	// With CAP_DAC_READ_SEARCH on the machine, a handle opens any file of its file system.
	if handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, "/attack", 0); err == nil {
		if root, err := os.Open("/"); err == nil {
			if fd, err := unix.OpenByHandleAt(int(root.Fd()), handle, unix.O_RDONLY); err == nil {
				unix.Close(fd)
				done = append(done, "opened a file by its handle")
			}
			root.Close()
		}
	}
	return done
}
