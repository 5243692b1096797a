package kms

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// hsmBroker is a copilot with a KEK "a" in an HSM, and a KEK "local" in its store.
type hsmBroker struct {
	*harness.Process
	t      testing.TB
	dir    string
	socket string
}

// newHSMBroker starts one with the settings of a backend.
func newHSMBroker(t testing.TB, settings string) *hsmBroker {
	t.Helper()
	dir := harness.TempDir(t)
	b := &hsmBroker{t: t, dir: dir, socket: dir + "/copilot.sock"}
	file := harness.Write(t, dir+"/copilot.toml", hsmConfig(dir, settings))
	b.Process = harness.Start(t, dir, "copilot", exec.Command("copilot", "serve", "--config", file))
	harness.Await(t, "copilot", harness.Reachable(b.socket))
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--config", file, "local"))
	return b
}

func hsmConfig(dir, settings string) string {
	return fmt.Sprintf("dir = %q\nlisten = [%q]\n[backends.hsm]\ntype = 'pkcs11'\n%s[keks.a]\nbackend = 'hsm'\npath = 'a'\n", dir+"/store", "unix://"+dir+"/copilot.sock", settings)
}

// try has a KEK wrap and unwrap.
func (b *hsmBroker) try(kek string) error {
	status, answer := harness.RequestOverSocket(b.t, b.socket, "POST", "/api/v2/keks/"+kek+"/wrap", `{"plaintext":"c2VjcmV0"}`)
	var w map[string]any
	if status != 200 || json.Unmarshal([]byte(answer), &w) != nil {
		return fmt.Errorf("wrap with %s: %d %s", kek, status, answer)
	}
	delete(w, "id")
	body, err := json.Marshal(w)
	if err != nil {
		return err
	}
	if status, answer := harness.RequestOverSocket(b.t, b.socket, "POST", "/api/v2/keks/"+kek+"/unwrap", string(body)); status != 200 || !strings.Contains(answer, `"c2VjcmV0"`) {
		return fmt.Errorf("unwrap with %s: %d %s", kek, status, answer)
	}
	return nil
}

func (b *hsmBroker) works(kek string) {
	b.t.Helper()
	if err := b.try(kek); err != nil {
		b.t.Error(err)
	}
}

// fails checks that a request fails because the HSM is unavailable, and that the log
// says why.
func (b *hsmBroker) fails(why string) {
	b.t.Helper()
	if status, answer := harness.RequestOverSocket(b.t, b.socket, "POST", "/api/v2/keks/a/wrap", `{"plaintext":"c2VjcmV0"}`); status != 503 {
		b.t.Errorf("wrap: %d %s", status, answer)
	}
	if log := harness.Read(b.t, b.Log); !strings.Contains(log, why) {
		b.t.Errorf("the log does not say %q:\n%s", why, log)
	}
}

// module returns the process that the module is in.
func (b *hsmBroker) module() (pid int) {
	b.t.Helper()
	children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", b.Cmd.Process.Pid))
	if err != nil {
		b.t.Fatal(err)
	}
	var pids []string
	for _, name := range children {
		list, _ := os.ReadFile(name) // of a thread that may have ended
		pids = append(pids, strings.Fields(string(list))...)
	}
	if len(pids) != 1 {
		b.t.Fatalf("copilot has %d children", len(pids))
	}
	pid, err = strconv.Atoi(pids[0])
	if err != nil {
		b.t.Fatal(err)
	}
	return pid
}

// restarts is what the metric says.
func (b *hsmBroker) restarts() int {
	b.t.Helper()
	_, text := harness.RequestOverSocket(b.t, b.dir+"/store/admin.sock", "GET", "/metrics", "")
	m := regexp.MustCompile(`copilot_kms_module_restarts_total\{backend="hsm"\} (\d+)`).FindStringSubmatch(text)
	if m == nil {
		b.t.Fatal("the metric is missing")
	}
	n, _ := strconv.Atoi(m[1])
	return n
}

func TestHSMModuleCrashes(t *testing.T) {
	k := harness.NewHSMToken(t, "a")
	dir := k.Faulty()
	b := newHSMBroker(t, k.Settings())
	b.works("a")
	if n := b.restarts(); n != 0 {
		t.Errorf("%d restarts", n)
	}
	// A crash is not worth an error.
	first := b.module()
	harness.Write(t, dir+"/crash", "")
	b.works("a")
	if n := b.restarts(); n != 1 || b.module() == first {
		t.Errorf("%d restarts after a crash", n)
	}
	const warning = "PKCS#11 module's process ended"
	if log := harness.Read(t, b.Log); !strings.Contains(log, warning) || !strings.Contains(log, "signal: segmentation fault") || strings.Contains(log, "goroutine") {
		t.Errorf("log:\n%s", log)
	}

	// One that always crashes takes nothing else down, and is not started all
	// the time.
	harness.Write(t, dir+"/crashes", "")
	for range 100 {
		b.fails("signal: segmentation fault")
	}
	b.works("local")
	if n := b.restarts(); n > 20 {
		t.Errorf("%d restarts in 100 requests", n)
	}
	os.Remove(dir + "/crashes")
	harness.Await(t, "the module", func() error { return b.try("a") })

	// Others end it, too.
	before := b.restarts()
	syscall.Kill(b.module(), syscall.SIGKILL)
	harness.Await(t, "the module", func() error { return b.try("a") })
	if n := b.restarts(); n != before+1 {
		t.Errorf("%d restarts, and %d before it was killed", n, before)
	}
}

func TestHSMModuleHangs(t *testing.T) {
	k := harness.NewHSMToken(t, "a")
	dir := k.Faulty()
	b := newHSMBroker(t, k.Settings()+"call-timeout = '1s'\n")
	harness.Await(t, "the module", func() error { return b.try("a") }) // a second may be too short for its start
	first := b.module()
	harness.Write(t, dir+"/slow", "")
	b.fails("a call took longer than 1s")
	b.works("local")
	os.Remove(dir + "/slow")
	harness.Await(t, "the module", func() error { return b.try("a") })
	harness.Await(t, "the end of the process that hung", func() error {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", first)); err == nil {
			return fmt.Errorf("process %d is left", first)
		}
		return nil
	})
}

// TestHSMModuleProcess looks at the process from outside.
func TestHSMModuleProcess(t *testing.T) {
	k := harness.NewHSMToken(t, "a")
	b := newHSMBroker(t, k.Settings())
	b.works("a")
	pid := b.module()
	proc := func(name string) string { return harness.Read(t, fmt.Sprintf("/proc/%d/%s", pid, name)) }
	if args := proc("cmdline"); args != "copilot\x00pkcs11-module\x00" {
		t.Errorf("arguments: %q", args)
	}
	if env := proc("environ"); strings.Contains(env, "123456") || !strings.Contains(env, "SOFTHSM2_CONF=") {
		t.Errorf("environment: %q", env)
	}
	if limits := proc("limits"); !regexp.MustCompile(`Max core file size +0 +0 `).MatchString(limits) {
		t.Errorf("limits:\n%s", limits)
	}
	if maps := harness.Read(t, fmt.Sprintf("/proc/%d/maps", b.Cmd.Process.Pid)); strings.Contains(maps, "softhsm") {
		t.Error("the module is in copilot's own process")
	}
	// systemd and terminals signal all processes.
	syscall.Kill(pid, syscall.SIGTERM)
	syscall.Kill(pid, syscall.SIGINT)
	b.works("a")
	if b.module() != pid {
		t.Error("a signal for copilot ended it")
	}

	b.Kill()
	harness.Await(t, "the module's process", func() error {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
			return fmt.Errorf("process %d outlives copilot", pid)
		}
		return nil
	})
	harness.ExpectFailure(t, harness.Command(t, "copilot", "pkcs11-module"), "copilot starts this itself")
}

// TestHSMModuleMissingToken counts how often the module is initialized while its
// token is missing. Each request did so once.
func TestHSMModuleMissingToken(t *testing.T) {
	k := harness.NewHSMToken(t, "a")
	dir := k.Faulty()
	harness.Write(t, dir+"/removed", "")
	b := newHSMBroker(t, k.Settings())
	for range 100 {
		b.fails("no such token")
	}
	if n := len(harness.Read(t, dir+"/initialized")); n > 20 {
		t.Errorf("the module was initialized %d times for 100 requests", n)
	}
	os.Remove(dir + "/removed")
	harness.Await(t, "the token", func() error { return b.try("a") })
	before := len(harness.Read(t, dir+"/initialized"))
	for range 50 {
		b.works("a")
	}
	if n := len(harness.Read(t, dir+"/initialized")); n != before {
		t.Errorf("the module was initialized %d times, and %d before", n, before)
	}
}

// buildHSMKey builds testdata/hsmkey into a directory.
func buildHSMKey(t testing.TB, dir string) string {
	t.Helper()
	harness.GoBuild(t, "", dir+"/hsmkey", "./integration/testdata/hsmkey")
	return dir + "/hsmkey"
}

// TestHSMNSS has keys in NSS's softoken, which wants parameters, and whose C_Encrypt
// wants a larger buffer than it says.
func TestHSMNSS(t *testing.T) {
	t.Parallel()
	modules, _ := filepath.Glob("/usr/lib/*-linux-gnu/libsoftokn3.so")
	if len(modules) != 1 {
		t.Fatalf("libsoftokn3.so is missing: install it with \"scripts/install-tools.sh %s\"", harness.Tools)
	}
	dir := harness.TempDir(t)
	pin := harness.Write(t, dir+"/pin", "123456\n")
	database := "sql:" + dir + "/nss"
	if err := os.Mkdir(dir+"/nss", 0o700); err != nil {
		t.Fatal(err)
	}
	harness.Output(t, harness.Command(t, "certutil", "-N", "-d", database, "-f", pin))
	harness.Output(t, harness.Command(t, buildHSMKey(t, dir), modules[0], "configdir='"+database+"'", "NSS Certificate DB", "123456", "a", "1"))
	settings := fmt.Sprintf("module = %q\ntoken = 'NSS Certificate DB'\npin-file = %q\n", modules[0], pin)

	newHSMBroker(t, settings).fails("module-parameters")
	b := newHSMBroker(t, settings+fmt.Sprintf("module-parameters = %q\n", "configdir='"+database+"'"))
	b.works("a")
	harness.Output(t, harness.Command(t, "copilot", "keys", "rotate", "--config", b.dir+"/copilot.toml", "a"))
	b.works("a")
}

// TestHSMOpenCryptoki has keys in openCryptoki's soft token, before its daemon runs
// and after.
func TestHSMOpenCryptoki(t *testing.T) {
	t.Parallel()
	m := harness.BareMachine(t, filepath.Join(harness.Tools, "trixie"))
	dir := filepath.Dir(m.Root)
	m.AddProgram(buildHSMKey(t, dir))
	m.AddProgram(filepath.Join(harness.Bin, "copilot"))
	modules, _ := filepath.Glob(m.Root + "/usr/lib/*-linux-gnu/opencryptoki/libopencryptoki.so.0")
	if len(modules) != 1 {
		t.Fatalf("openCryptoki is missing: install it with \"scripts/install-tools.sh %s\"", harness.Tools)
	}
	module := strings.TrimPrefix(modules[0], m.Root)
	harness.Write(t, m.Root+"/etc/opencryptoki/opencryptoki.conf", "version opencryptoki-3.23\nslot 3\n{\nstdll = libpkcs11_sw.so\n}\n")
	harness.Write(t, m.Root+"/run/pin", "123456\n")
	// The token's labels, PINs and shared memory are in namespaces of the test's.
	harness.Write(t, m.Root+"/run/start", `set -e
mount -t tmpfs tmpfs /dev/shm
mount -t proc proc /proc
mkdir -p /run/lock
systemd-tmpfiles --create opencryptoki.conf
copilot serve --config /run/copilot.toml &
copilot=$!
until [ -e /run/go ]; do sleep 0.05; done
pkcsslotd
until pkcsconf -t >/dev/null; do sleep 0.05; done
echo copilot | pkcsconf -c 3 -I -S 87654321
pkcsconf -c 3 -P -S 87654321 -n 76543210
pkcsconf -c 3 -u -S 76543210 -n 12345678
pkcsconf -c 3 -p -U 12345678 -n 123456
hsmkey `+module+` "" copilot 123456 a 1
touch /run/ready
wait $copilot
`)
	harness.Write(t, m.Root+"/run/copilot.toml", hsmConfig("/run", fmt.Sprintf("module = %q\ntoken = 'copilot'\npin-file = '/run/pin'\n", module)))
	unshare := exec.Command("unshare", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "chroot", m.Root, "sh", "/run/start")
	unshare.Env = []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	b := &hsmBroker{Process: harness.Start(t, dir, "copilot", unshare), t: t, dir: m.Root + "/run", socket: m.Root + "/run/copilot.sock"}
	t.Cleanup(b.Kill) // unshare ignores SIGTERM
	harness.Await(t, "copilot", harness.Reachable(b.socket))
	b.fails("can't be initialized")
	harness.Write(t, m.Root+"/run/go", "")
	harness.Await(t, "openCryptoki's token", func() error {
		_, err := os.Stat(m.Root + "/run/ready")
		return err
	})
	harness.Await(t, "openCryptoki", func() error { return b.try("a") })
	harness.Output(t, harness.Command(t, "chroot", m.Root, "copilot", "keys", "rotate", "--config", "/run/copilot.toml", "a"))
	harness.Await(t, "the new version", func() error { return b.try("a") })
}
