package integration

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
)

// hsmBroker is a copilot with a KEK "a" in an HSM, and a KEK "local" in its store.
type hsmBroker struct {
	*process
	t      testing.TB
	dir    string
	socket string
}

// newHSMBroker starts one with the settings of a backend.
func newHSMBroker(t testing.TB, settings string) *hsmBroker {
	t.Helper()
	dir := tempDir(t)
	b := &hsmBroker{t: t, dir: dir, socket: dir + "/copilot.sock"}
	file := write(t, dir+"/copilot.toml", hsmConfig(dir, settings))
	b.process = start(t, dir, "copilot", exec.Command("copilot", "serve", "--config", file))
	await(t, "copilot", answers(b.socket))
	output(t, command(t, "copilot", "keys", "create", "--config", file, "local"))
	return b
}

func hsmConfig(dir, settings string) string {
	return fmt.Sprintf("dir = %q\nlisten = [%q]\n[backends.hsm]\ntype = 'pkcs11'\n%s[keks.a]\nbackend = 'hsm'\npath = 'a'\n", dir+"/store", "unix://"+dir+"/copilot.sock", settings)
}

// try has a KEK wrap and unwrap.
func (b *hsmBroker) try(kek string) error {
	status, answer := ask(b.t, b.socket, "POST", "/api/v2/keks/"+kek+"/wrap", `{"plaintext":"c2VjcmV0"}`)
	var w map[string]any
	if status != 200 || json.Unmarshal([]byte(answer), &w) != nil {
		return fmt.Errorf("wrap with %s: %d %s", kek, status, answer)
	}
	delete(w, "id")
	body, err := json.Marshal(w)
	if err != nil {
		return err
	}
	if status, answer := ask(b.t, b.socket, "POST", "/api/v2/keks/"+kek+"/unwrap", string(body)); status != 200 || !strings.Contains(answer, `"c2VjcmV0"`) {
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
	if status, answer := ask(b.t, b.socket, "POST", "/api/v2/keks/a/wrap", `{"plaintext":"c2VjcmV0"}`); status != 503 {
		b.t.Errorf("wrap: %d %s", status, answer)
	}
	if log := read(b.t, b.log); !strings.Contains(log, why) {
		b.t.Errorf("the log does not say %q:\n%s", why, log)
	}
}

// module returns the process that the module is in.
func (b *hsmBroker) module() (pid int) {
	b.t.Helper()
	children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", b.cmd.Process.Pid))
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
	_, text := ask(b.t, b.dir+"/store/admin.sock", "GET", "/metrics", "")
	m := regexp.MustCompile(`copilot_kms_module_restarts_total\{backend="hsm"\} (\d+)`).FindStringSubmatch(text)
	if m == nil {
		b.t.Fatal("the metric is missing")
	}
	n, _ := strconv.Atoi(m[1])
	return n
}

func TestHSMModuleCrashes(t *testing.T) {
	k := newToken(t, "a")
	dir := k.faulty()
	b := newHSMBroker(t, k.settings())
	b.works("a")
	if n := b.restarts(); n != 0 {
		t.Errorf("%d restarts", n)
	}
	// A crash is not worth an error.
	first := b.module()
	write(t, dir+"/crash", "")
	b.works("a")
	if n := b.restarts(); n != 1 || b.module() == first {
		t.Errorf("%d restarts after a crash", n)
	}
	const warning = "PKCS#11 module's process ended"
	if log := read(t, b.log); !strings.Contains(log, warning) || !strings.Contains(log, "signal: segmentation fault") || strings.Contains(log, "goroutine") {
		t.Errorf("log:\n%s", log)
	}

	// One that always crashes takes nothing else down, and is not started all
	// the time.
	write(t, dir+"/crashes", "")
	for range 100 {
		b.fails("signal: segmentation fault")
	}
	b.works("local")
	if n := b.restarts(); n > 20 {
		t.Errorf("%d restarts in 100 requests", n)
	}
	os.Remove(dir + "/crashes")
	await(t, "the module", func() error { return b.try("a") })

	// Others end it, too.
	before := b.restarts()
	syscall.Kill(b.module(), syscall.SIGKILL)
	await(t, "the module", func() error { return b.try("a") })
	if n := b.restarts(); n != before+1 {
		t.Errorf("%d restarts, and %d before it was killed", n, before)
	}
}

func TestHSMModuleHangs(t *testing.T) {
	k := newToken(t, "a")
	dir := k.faulty()
	b := newHSMBroker(t, k.settings()+"call-timeout = '1s'\n")
	b.works("a")
	first := b.module()
	write(t, dir+"/slow", "")
	b.fails("a call took longer than 1s")
	b.works("local")
	os.Remove(dir + "/slow")
	await(t, "the module", func() error { return b.try("a") })
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", first)); err == nil {
		t.Error("the process that hung is left")
	}
}

// TestHSMModuleProcess looks at the process from outside.
func TestHSMModuleProcess(t *testing.T) {
	k := newToken(t, "a")
	b := newHSMBroker(t, k.settings())
	b.works("a")
	pid := b.module()
	proc := func(name string) string { return read(t, fmt.Sprintf("/proc/%d/%s", pid, name)) }
	if args := proc("cmdline"); args != "copilot\x00pkcs11-module\x00" {
		t.Errorf("arguments: %q", args)
	}
	if env := proc("environ"); strings.Contains(env, "123456") || !strings.Contains(env, "SOFTHSM2_CONF=") {
		t.Errorf("environment: %q", env)
	}
	if limits := proc("limits"); !regexp.MustCompile(`Max core file size +0 +0 `).MatchString(limits) {
		t.Errorf("limits:\n%s", limits)
	}
	if maps := read(t, fmt.Sprintf("/proc/%d/maps", b.cmd.Process.Pid)); strings.Contains(maps, "softhsm") {
		t.Error("the module is in copilot's own process")
	}
	// systemd and terminals signal all processes.
	syscall.Kill(pid, syscall.SIGTERM)
	syscall.Kill(pid, syscall.SIGINT)
	b.works("a")
	if b.module() != pid {
		t.Error("a signal for copilot ended it")
	}

	b.kill()
	await(t, "the module's process", func() error {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
			return fmt.Errorf("process %d outlives copilot", pid)
		}
		return nil
	})
	fails(t, command(t, "copilot", "pkcs11-module"), "copilot starts this itself")
}

// TestHSMModuleMissingToken counts how often the module is initialized while its
// token is missing. Each request did so once.
func TestHSMModuleMissingToken(t *testing.T) {
	k := newToken(t, "a")
	dir := k.faulty()
	write(t, dir+"/removed", "")
	b := newHSMBroker(t, k.settings())
	for range 100 {
		b.fails("no such token")
	}
	if n := len(read(t, dir+"/initialized")); n > 20 {
		t.Errorf("the module was initialized %d times for 100 requests", n)
	}
	os.Remove(dir + "/removed")
	await(t, "the token", func() error { return b.try("a") })
	before := len(read(t, dir+"/initialized"))
	for range 50 {
		b.works("a")
	}
	if n := len(read(t, dir+"/initialized")); n != before {
		t.Errorf("the module was initialized %d times, and %d before", n, before)
	}
}

// buildHSMKey builds testdata/hsmkey into a directory.
func buildHSMKey(t testing.TB, dir string) string {
	t.Helper()
	build := command(t, "go", "build", "-buildvcs=false", "-o", dir+"/hsmkey", "./integration/testdata/hsmkey")
	build.Dir = repo
	output(t, build)
	return dir + "/hsmkey"
}

// TestHSMNSS has keys in NSS's softoken, which wants parameters, and whose C_Encrypt
// wants a larger buffer than it says.
func TestHSMNSS(t *testing.T) {
	t.Parallel()
	modules, _ := filepath.Glob("/usr/lib/*-linux-gnu/libsoftokn3.so")
	if len(modules) != 1 {
		t.Fatalf("libsoftokn3.so is missing: install it with \"scripts/install-tools.sh %s\"", tools)
	}
	dir := tempDir(t)
	pin := write(t, dir+"/pin", "123456\n")
	database := "sql:" + dir + "/nss"
	if err := os.Mkdir(dir+"/nss", 0o700); err != nil {
		t.Fatal(err)
	}
	output(t, command(t, "certutil", "-N", "-d", database, "-f", pin))
	output(t, command(t, buildHSMKey(t, dir), modules[0], "configdir='"+database+"'", "NSS Certificate DB", "123456", "a", "1"))
	settings := fmt.Sprintf("module = %q\ntoken = 'NSS Certificate DB'\npin-file = %q\n", modules[0], pin)

	newHSMBroker(t, settings).fails("module-parameters")
	b := newHSMBroker(t, settings+fmt.Sprintf("module-parameters = %q\n", "configdir='"+database+"'"))
	b.works("a")
	output(t, command(t, "copilot", "keys", "rotate", "--config", b.dir+"/copilot.toml", "a"))
	b.works("a")
}

// TestHSMOpenCryptoki has keys in openCryptoki's soft token, before its daemon runs
// and after.
func TestHSMOpenCryptoki(t *testing.T) {
	t.Parallel()
	m := bareMachine(t, filepath.Join(tools, "trixie"))
	dir := filepath.Dir(m.root)
	m.copy(buildHSMKey(t, dir))
	m.copy(filepath.Join(bin, "copilot"))
	modules, _ := filepath.Glob(m.root + "/usr/lib/*-linux-gnu/opencryptoki/libopencryptoki.so.0")
	if len(modules) != 1 {
		t.Fatalf("openCryptoki is missing: install it with \"scripts/install-tools.sh %s\"", tools)
	}
	module := strings.TrimPrefix(modules[0], m.root)
	write(t, m.root+"/etc/opencryptoki/opencryptoki.conf", "version opencryptoki-3.23\nslot 3\n{\nstdll = libpkcs11_sw.so\n}\n")
	write(t, m.root+"/run/pin", "123456\n")
	// The token's labels, PINs and shared memory are in namespaces of the test's.
	write(t, m.root+"/run/start", `set -e
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
	write(t, m.root+"/run/copilot.toml", hsmConfig("/run", fmt.Sprintf("module = %q\ntoken = 'copilot'\npin-file = '/run/pin'\n", module)))
	unshare := exec.Command("unshare", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "chroot", m.root, "sh", "/run/start")
	unshare.Env = []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	b := &hsmBroker{process: start(t, dir, "copilot", unshare), t: t, dir: m.root + "/run", socket: m.root + "/run/copilot.sock"}
	t.Cleanup(b.kill) // unshare ignores SIGTERM
	await(t, "copilot", answers(b.socket))
	b.fails("can't be initialized")
	write(t, m.root+"/run/go", "")
	await(t, "openCryptoki's token", func() error {
		_, err := os.Stat(m.root + "/run/ready")
		return err
	})
	await(t, "openCryptoki", func() error { return b.try("a") })
	output(t, command(t, "chroot", m.root, "copilot", "keys", "rotate", "--config", "/run/copilot.toml", "a"))
	await(t, "the new version", func() error { return b.try("a") })
}
