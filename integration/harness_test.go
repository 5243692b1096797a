// Package integration tests pilot with the real programs that it works with.
package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

var (
	// repo is the project's directory.
	repo string
	// tools is the directory of the programs of scripts/install-tools.sh.
	tools string
	// bin is the directory of our programs, as these tests have built them.
	bin string
)

func TestMain(m *testing.M) {
	code := runTests(m, needPilot, needCopilot, needCtrPilot, needHello, needContainerd, needRegistry, needDebian13,
		needOpenSSL, needGPG, needNetworks, needSoftHSM, needNSS, needOpenCryptoki, needLocalKMS, needVault)
	if err := printRows(); err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		code = 1
	}
	os.Exit(code)
}

// need is what has to be there for a package's tests: a program, or several that
// belong together.
type need struct {
	packages []string // ours, which are built
	cgo      bool     // whether they use C libraries
	tools    []string // files in the directory of the tools
	path     []string // programs in $PATH
}

// The needs of tests.
var (
	needPilot        = need{packages: []string{"./cmd/pilot", "./cmd/pilot-decoder"}}
	needCopilot      = need{packages: []string{"./cmd/copilot"}, cgo: true}
	needCtrPilot     = need{packages: []string{"./ctr-pilot"}, cgo: true}
	needHello        = need{packages: []string{"./integration/testdata/hello"}} // the program in images
	needContainerd   = need{tools: []string{"bin/containerd", "bin/containerd-shim-runc-v2", "bin/ctr", "bin/crictl"}, path: []string{"/usr/bin/containerd", "runc"}}
	needRegistry     = need{path: []string{"docker-registry"}}
	needDebian13     = need{tools: []string{"trixie/usr/bin/skopeo"}}
	needOpenSSL      = need{path: []string{"openssl"}}
	needGPG          = need{path: []string{"gpg"}}
	needNetworks     = need{path: []string{"ip"}}
	needSoftHSM      = need{path: []string{"softhsm2-util"}}
	needNSS          = need{path: []string{"certutil"}}
	needOpenCryptoki = need{tools: []string{"trixie/usr/sbin/pkcsslotd"}}
	needLocalKMS     = need{tools: []string{"bin/local-kms"}}
	needVault        = need{tools: []string{"bin/vault-dev"}}
)

// runTests builds and looks for what the tests of a package need, runs them, and
// returns the exit code.
func runTests(m *testing.M, needs ...need) int {
	kms.RunModule()
	if err := setUp(needs); err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		return 1
	}
	defer os.RemoveAll(bin)
	return m.Run()
}

func setUp(needs []need) error {
	if os.Getuid() != 0 {
		return errors.New("these tests run containers and so need root; \"make test-unit\" runs those that do not")
	}
	_, file, _, _ := runtime.Caller(0)
	repo = file[:strings.LastIndex(file, "/integration/")]
	if tools = os.Getenv("PILOT_TOOLS"); tools == "" {
		tools = filepath.Join(repo, ".cache", "tools")
	}
	for _, n := range needs {
		for _, name := range n.tools {
			if _, err := os.Stat(filepath.Join(tools, name)); err != nil {
				return fmt.Errorf("%s is missing: install it with \"scripts/install-tools.sh %s\"", filepath.Join(tools, name), tools)
			}
		}
		for _, name := range n.path {
			if _, err := exec.LookPath(name); err != nil {
				return fmt.Errorf("%s is missing: install it with \"scripts/install-tools.sh %s\"", name, tools)
			}
		}
	}
	var err error
	if bin, err = os.MkdirTemp("", "pilot-bin-"); err != nil {
		return err
	}
	if err := build(needs); err != nil {
		os.RemoveAll(bin)
		return err
	}
	// containerd looks for its shim in PATH.
	return os.Setenv("PATH", filepath.Join(tools, "bin")+":"+bin+":"+os.Getenv("PATH"))
}

// build builds our programs into bin. All packages of tests build them in one
// directory, one after the other, so that the first links them and the others
// find them there. Each has links of its own to them: go build replaces files.
func build(needs []need) error {
	race := os.Getenv("PILOT_RACE") != ""
	shared := filepath.Join(repo, ".cache", "programs")
	if race {
		shared += "-race"
	}
	if err := os.MkdirAll(shared, 0o755); err != nil {
		return err
	}
	lock, err := os.Open(shared)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", shared, err)
	}
	packages := map[bool][]string{} // by whether they use C libraries
	for _, n := range needs {
		packages[n.cgo] = append(packages[n.cgo], n.packages...)
	}
	for cgo, packages := range packages {
		if len(packages) == 0 {
			continue
		}
		// As make build does, so that Go takes what that has compiled.
		flags := []string{"build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", shared + "/"}
		if race {
			cgo, flags = true, append(flags, "-race")
		}
		build := exec.Command("go", append(flags, packages...)...)
		build.Dir, build.Env = repo, append(os.Environ(), "CGO_ENABLED=0")
		if cgo {
			build.Env = append(build.Env, "CGO_ENABLED=1")
		}
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w\n%s", build.Args, err, out)
		}
		for _, p := range packages {
			from, to := filepath.Join(shared, filepath.Base(p)), filepath.Join(bin, filepath.Base(p))
			if os.Link(from, to) == nil {
				continue
			}
			// The directories are on two disks.
			if out, err := exec.Command("cp", from, to).CombinedOutput(); err != nil {
				return fmt.Errorf("copy %s: %w: %s", from, err, out)
			}
		}
	}
	return nil
}

// tempDir returns a directory whose path is short enough for unix sockets.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "pilot-it-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		mounts, err := os.ReadFile("/proc/self/mounts")
		if err != nil {
			t.Error(err)
		}
		for line := range strings.Lines(string(mounts)) {
			if target := strings.Fields(line)[1]; strings.HasPrefix(target, dir+"/") {
				t.Errorf("left mounted: %s", target)
				syscall.Unmount(target, syscall.MNT_DETACH)
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// process is a program in the background.
type process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
}

// start starts a program and stops it at the end of the test. Its output is
// shown if the test failed.
func start(t testing.TB, dir, name string, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{cmd: cmd, log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.stop(t)
		if t.Failed() {
			out, _ := os.ReadFile(p.log)
			lines := strings.Split(string(out), "\n")
			t.Logf("%s:\n%s", name, strings.Join(lines[max(0, len(lines)-15):], "\n"))
		}
	})
	return p
}

// stop stops the program as a service manager would.
func (p *process) stop(t testing.TB) {
	t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(patience):
		t.Errorf("%s does not stop", p.cmd.Args[0])
		p.kill()
	}
}

func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// pause stops the program's threads until resume, or the end of the test: it
// keeps its connections and answers nothing.
func (p *process) pause(t testing.TB) (resume func()) {
	t.Helper()
	p.cmd.Process.Signal(syscall.SIGSTOP)
	resume = sync.OnceFunc(func() { p.cmd.Process.Signal(syscall.SIGCONT) })
	t.Cleanup(resume)
	await(t, "all threads are stopped", func() error {
		stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.cmd.Process.Pid))
		if err != nil || len(stats) == 0 {
			return fmt.Errorf("no threads: %v", err)
		}
		for _, name := range stats {
			b, err := os.ReadFile(name)
			if errors.Is(err, fs.ErrNotExist) {
				continue // the thread has ended
			}
			if _, state, _ := strings.Cut(string(b), ") "); err != nil || !strings.HasPrefix(state, "T") {
				return fmt.Errorf("%s: %.1s %v", name, state, err)
			}
		}
		return nil
	})
	return resume
}

// peak returns the most memory that the program has had so far, in bytes.
func (p *process) peak(t testing.TB) int {
	t.Helper()
	return peakMemory(t, p.cmd.Process.Pid)
}

func peakMemory(t testing.TB, pid int) int {
	t.Helper()
	_, rest, _ := strings.Cut(read(t, fmt.Sprintf("/proc/%d/status", pid)), "VmHWM:")
	var kib int
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// patience is how long a test waits for what a quiet machine does in a second or
// less. It costs nothing where all is well, and a busy machine takes many times
// as long.
const patience = 2 * time.Minute

// await waits until f succeeds.
func await(t testing.TB, what string, f func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

func answers(socket string) func() error {
	return func() error {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			conn.Close()
		}
		return err
	}
}

// command returns a command that is killed with the test, or after five minutes.
func command(t testing.TB, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	return exec.CommandContext(ctx, name, args...)
}

// output runs a command that has to succeed and returns its output.
func output(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(cmd.Args, " "), err, out, stderr.Bytes())
	}
	return string(out)
}

// containerOutput runs a container by ctr or ctr-pilot, and returns what it writes. Both lose
// the output of a container that ends before they have opened its pipe, and
// succeed, so what writes nothing is run again.
func containerOutput(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	for range 10 {
		again := &exec.Cmd{Path: cmd.Path, Args: cmd.Args, Env: cmd.Env, Dir: cmd.Dir, SysProcAttr: cmd.SysProcAttr, Err: cmd.Err}
		if out := output(t, again); out != "" {
			return out
		}
	}
	return ""
}

// fails runs a command that has to fail and say each of want.
func fails(t testing.TB, cmd *exec.Cmd, want ...string) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Errorf("%s succeeded:\n%s", strings.Join(cmd.Args, " "), out)
	}
	said := strings.ReplaceAll(string(out), `\"`, `"`) // crictl quotes what it is told
	for _, w := range want {
		if !strings.Contains(said, w) {
			t.Errorf("%s: want %q in\n%s", strings.Join(cmd.Args, " "), w, out)
		}
	}
	return string(out)
}

func write(t testing.TB, name, content string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func read(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// broker starts a copilot in dir with the KEKs given and returns its socket's
// address. KEKs of one name are the same key in all brokers.
func broker(t testing.TB, dir string, keks ...string) (*process, string) {
	t.Helper()
	socket := filepath.Join(dir, "copilot.sock")
	for _, kek := range keks {
		key := sha256.Sum256([]byte(kek))
		file := write(t, filepath.Join(dir, "key"), string(key[:]))
		output(t, command(t, "copilot", "keys", "import", "--dir", dir, "--file", file, kek))
	}
	p := start(t, dir, "copilot", exec.Command("copilot", "serve", "--dir", dir, "--listen", "unix://"+socket))
	await(t, "copilot", answers(socket))
	return p, "unix://" + socket
}

// pilot starts a key provider in dir and returns the ocicrypt.conf that tells
// of it.
func pilot(t testing.TB, dir, broker string, args ...string) (*process, string) {
	t.Helper()
	socket := filepath.Join(dir, "keyprovider.sock")
	p := start(t, dir, "pilot", exec.Command("pilot", append([]string{"serve", "--config", "/dev/null", "--listen", "unix://" + socket, "--broker", broker,
		"--diff-listen", "unix://" + dir + "/diff.sock", "--containerd", dir + "/containerd.sock"}, args...)...))
	await(t, "pilot", answers(socket))
	return p, write(t, filepath.Join(dir, "ocicrypt.conf"), `{"key-providers": {"pilot": {"grpc": "unix://`+socket+`"}}}`)
}

// activated starts pilot as systemd does, with the sockets of dir passed to it.
// They stay open when it ends, until the test does.
func activated(t testing.TB, dir, broker string) *process {
	t.Helper()
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ exec pilot serve --config /dev/null --admin-listen off --broker "$1" --containerd "$2" --diff-listen "unix://$3"`,
		"sh", broker, dir+"/containerd.sock", dir+"/diff.sock")
	cmd.Env = append(os.Environ(), "LISTEN_FDS=2", "LISTEN_FDNAMES=keyprovider:diff")
	for _, name := range []string{"keyprovider.sock", "diff.sock"} {
		l, ok := sockets.Load(dir + "/" + name)
		if !ok {
			listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: dir + "/" + name, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			sockets.Store(dir+"/"+name, listener)
			t.Cleanup(func() { listener.Close() })
			l = listener
		}
		f, err := l.(*net.UnixListener).File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	return start(t, dir, "pilot", cmd)
}

// sockets are those that are passed to pilot: *net.UnixListener by path.
var sockets sync.Map

// registry starts a registry and returns its address and its storage.
func registry(t testing.TB, dir string) (address, storage string) {
	t.Helper()
	storage = filepath.Join(dir, "registry")
	for range 10 {
		address = loopbacktest.FreeAddress(t)
		conf := write(t, filepath.Join(dir, "registry.yml"), fmt.Sprintf(
			"version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: '%s'}\n", storage, address))
		p := start(t, dir, "registry", exec.Command("docker-registry", "serve", conf))
		for range patience / (50 * time.Millisecond) {
			conn, err := net.Dial("tcp", address)
			if err == nil {
				conn.Close()
				return address, storage
			}
			select {
			case <-p.done: // somebody else took the port
			case <-time.After(50 * time.Millisecond):
				continue
			}
			break
		}
	}
	t.Fatal("the registry does not start")
	return "", ""
}
