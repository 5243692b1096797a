//go:build packages

package install

import (
	"debug/elf"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

const (
	packageUpgrade = "1.3.0"
)

// TestPackages builds the packages, examines them, and installs them on
// machines that systemd runs, or that rpm keeps.
func TestPackages(t *testing.T) {
	for _, name := range []string{"lintian", "rpm", "mmdebstrap", "man", "expect", "zsh", "fish", "systemd-nspawn"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("%s is missing: \"make test-packages\" installs it", name)
		}
	}
	dir := harness.TempDir(t)
	built, upgrade := filepath.Join(dir, "built"), filepath.Join(dir, "upgrade")
	harness.BuildPackages(t, harness.Repo, built, harness.PackageVersion, "amd64 arm64", "deb rpm tar")
	harness.BuildPackages(t, harness.Repo, upgrade, packageUpgrade, harness.Arch, "deb rpm")

	t.Run("reproducible", func(t *testing.T) {
		elsewhere := filepath.Join(dir, "elsewhere/sources")
		harness.Output(t, harness.Command(t, "sh", "-euc", `mkdir -p "$2"; cd "$1"; git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C "$2"`, "sh", harness.Repo, elsewhere))
		again := filepath.Join(dir, "again")
		harness.BuildPackages(t, elsewhere, again, harness.PackageVersion, "amd64 arm64", "deb rpm tar")
		harness.Output(t, harness.Command(t, "diff", "-r", built, again))
	})
	t.Run("names", func(t *testing.T) { testNames(t, built) })
	t.Run("lintian", func(t *testing.T) {
		debs, _ := filepath.Glob(built + "/*.deb")
		harness.Output(t, harness.Patiently(t, "lintian", append([]string{"--allow-root", "--fail-on", "error,warning"}, debs...)...))
	})
	t.Run("files", func(t *testing.T) { testPackagedFiles(t, built) })
	t.Run("completions", func(t *testing.T) { testCompletions(t, built) })

	root := filepath.Join(dir, "debian12")
	harness.Output(t, harness.Patiently(t, "mmdebstrap", "--quiet", "--variant=apt", "--include=systemd,dbus,containerd", "--aptopt=Acquire::Retries \"3\"", "bookworm", root, "http://deb.debian.org/debian"))
	t.Run("deb", func(t *testing.T) { testDebs(t, root, built, upgrade) })
	t.Run("rpm", func(t *testing.T) { testRPMs(t, root, built, upgrade) })
}

// testNames checks that all that is built is there, with its checksum.
func testNames(t *testing.T, built string) {
	want := []string{"SHA256SUMS"}
	for arch, rpm := range map[string]string{"amd64": "x86_64", "arm64": "aarch64"} {
		for _, name := range []string{"pilot", "copilot"} {
			want = append(want, fmt.Sprintf("%s_%s-1_%s.deb", name, harness.PackageVersion, arch), fmt.Sprintf("%s-%s-1.%s.rpm", name, harness.PackageVersion, rpm))
		}
		for _, program := range []string{"pilot", "pilot-decoder", "ctr-pilot", "copilot"} {
			name := fmt.Sprintf("%s-%s-linux-%s.cdx.json", program, harness.PackageVersion, arch)
			want = append(want, name)
			var sbom struct {
				BOMFormat  string `json:"bomFormat"`
				Components []struct{ Name, Version string }
			}
			if err := json.Unmarshal([]byte(harness.Read(t, filepath.Join(built, name))), &sbom); err != nil {
				t.Fatal(err)
			}
			has := false
			for _, c := range sbom.Components {
				has = has || c.Name == "golang.org/x/sys" && c.Version != ""
			}
			if sbom.BOMFormat != "CycloneDX" || !has {
				t.Errorf("%s: %+v", name, sbom)
			}
		}
		want = append(want, fmt.Sprintf("pilot-%s-linux-%s.tar.gz", harness.PackageVersion, arch))
	}
	entries, err := os.ReadDir(built)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("built %q, want %q", got, want)
	}
	check := harness.Command(t, "sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS")
	check.Dir = built
	harness.Output(t, check)
	if n := strings.Count(harness.Read(t, built+"/SHA256SUMS"), "\n"); n != len(want)-1 {
		t.Errorf("SHA256SUMS has %d lines for %d files", n, len(want)-1)
	}
}

// testPackagedFiles examines what is in the packages.
func testPackagedFiles(t *testing.T, built string) {
	for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		files := harness.TempDir(t)
		for _, name := range []string{"pilot", "copilot"} {
			harness.Output(t, harness.Command(t, "dpkg-deb", "-x", fmt.Sprintf("%s/%s_%s-1_%s.deb", built, name, harness.PackageVersion, arch), files))
		}
		for _, program := range []string{"pilot", "pilot-decoder", "ctr-pilot", "copilot"} {
			f, err := elf.Open(filepath.Join(files, "usr/bin", program))
			if err != nil {
				t.Fatal(err)
			}
			if f.Machine != machine {
				t.Errorf("%s of %s is for %s", program, arch, f.Machine)
			}
			libraries, err := f.ImportedLibraries()
			if static := program == "pilot" || program == "pilot-decoder"; err != nil || static != (len(libraries) == 0) {
				t.Errorf("%s of %s needs %q (%v)", program, arch, libraries, err)
			}
			f.Close()
		}
		manuals, err := filepath.Glob(files + "/usr/share/man/man*/*.gz")
		if err != nil || len(manuals) != 6 {
			t.Errorf("manual pages: %q, %v", manuals, err)
		}
		for _, name := range []string{"pilot", "copilot"} {
			dir := filepath.Join(files, "usr/share/doc", name)
			harness.CheckLinks(t, dir, harness.PagesBelow(t, dir))
		}
		for _, page := range manuals {
			cmd := harness.Command(t, "man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", page)
			cmd.Stdout = io.Discard // the page
			if out := harness.CombinedOutput(t, cmd); strings.Contains(out, "warning") {
				t.Errorf("%s: %s", page, out)
			}
			name, section, _ := strings.Cut(strings.TrimSuffix(filepath.Base(page), ".gz"), ".")
			if text := harness.Output(t, harness.Command(t, "sh", "-c", `man -l "$1" | col -b`, "sh", page)); !strings.Contains(text, name) || !strings.Contains(text, "SEE ALSO") {
				t.Errorf("%s.%s: %s", name, section, text)
			}
		}
	}
}

// testCompletions types into shells.
func testCompletions(t *testing.T, built string) {
	files := harness.TempDir(t)
	path := filepath.Join(files, "usr/bin") + ":" + os.Getenv("PATH")
	for _, name := range []string{"pilot", "copilot"} {
		harness.Output(t, harness.Command(t, "dpkg-deb", "-x", harness.PackageFile(t, built, name, "deb"), files))
	}
	share := filepath.Join(files, "usr/share")
	for shell, set := range map[string][2]string{
		"bash": {"bash --norc --noprofile", "bind 'set bell-style none'; for f in " + share + "/bash-completion/completions/*; do . $f; done"},
		"zsh":  {"zsh -f", "unsetopt beep; fpath=(" + share + "/zsh/vendor-completions $fpath); autoload -U compinit; compinit -u -D"},
		"fish": {"fish --no-config", "for f in " + share + "/fish/vendor_completions.d/*; source $f; end"},
	} {
		for typed, want := range map[string]string{
			"pilot node unin":                    "pilot node uninstall",
			"pilot node install --pilot-b":       "pilot node install --pilot-binary",
			"copilot keys rot":                   "copilot keys rotate",
			"ctr-pilot images layeri":            "ctr-pilot images layerinfo",
			"ctr-pilot images encrypt --recip":   "ctr-pilot images encrypt --recipient",
			"copilot policy check --metrics-lis": "", // it has no such option
		} {
			t.Run(shell+"/"+typed, func(t *testing.T) {
				cmd := harness.Command(t, "expect", filepath.Join(harness.Repo, "integration/testdata/complete.exp"), set[0], set[1], typed)
				cmd.Env = append(os.Environ(), "PATH="+path, "TERM=dumb", "SHELL=/bin/"+shell, "HOME="+files)
				if want == "" {
					want = typed
				}
				if out := harness.Output(t, cmd); !strings.Contains(out, "GOT<"+want+">") {
					t.Errorf("want %q in %s", want, out)
				}
			})
		}
	}
	// After --, the program would take the shell's flag for an argument.
	for shell, ask := range map[string]string{
		"bash": `. "$1"/bash-completion/completions/pilot; COMP_WORDS=(pilot node -- ""); COMP_CWORD=3; _pilot; echo "${#COMPREPLY[@]}"`,
	} {
		cmd := harness.Command(t, shell, "-c", ask, shell, share)
		cmd.Env = append(os.Environ(), "PATH="+path)
		if out := harness.Output(t, cmd); strings.TrimSpace(out) != "0" {
			t.Errorf("%s: after --: %s", shell, out)
		}
	}
}

// dpkg installs packages of dir.
func dpkg(b *harness.BootedMachine, dir string) {
	b.T.Helper()
	for _, name := range []string{"pilot", "copilot"} {
		file := harness.PackageFile(b.T, dir, name, "deb")
		harness.Output(b.T, harness.Command(b.T, "cp", file, b.Root+"/root/"))
		b.Output("dpkg", "-i", "/root/"+filepath.Base(file))
	}
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

// testDebs installs, upgrades, removes, installs and purges on a machine that
// runs.
func testDebs(t *testing.T, root, built, upgrade string) {
	b := harness.Boot(t, root, []string{"--private-network"}, func(m *harness.Machine) {
		for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
			m.AddProgram(filepath.Join(harness.Tools, "bin", name))
		}
		harness.Write(t, m.Root+"/etc/systemd/system/containerd.service.d/newest.conf", "[Service]\nExecStart=\nExecStart=/usr/local/bin/containerd\n")
	})
	plain := harness.Read(t, b.Path("etc/containerd/config.toml"))
	dpkg(b, built)
	if got := b.Output("pilot", "--version"); got != "pilot version v"+harness.PackageVersion {
		t.Errorf("pilot --version: %s", got)
	}
	for _, unit := range []string{"pilot.service", "pilot-diff.socket", "pilot-keyprovider.socket", "pilot-lazy.socket", "pilot-snapshotter.service", "copilot.service"} {
		if state := harness.CombinedOutput(t, b.Run("systemctl", "is-enabled", unit)); strings.TrimSpace(state) != "disabled" {
			t.Errorf("after the installation %s is %s", unit, state)
		}
		if state := harness.CombinedOutput(t, b.Run("systemctl", "is-active", unit)); strings.TrimSpace(state) != "inactive" {
			t.Errorf("after the installation %s is %s", unit, state)
		}
	}
	if got := b.Output("stat", "-c", "%U %G %a", "/var/lib/copilot"); got != "copilot copilot 700" {
		t.Errorf("/var/lib/copilot: %s", got)
	}

	b.Output("copilot", "init", "--host", "localhost", "--trust-domain", "example.com")
	b.Output("systemctl", "enable", "--now", "copilot.service")
	b.Output("copilot", "keys", "create", "team-a")
	harness.Write(t, b.Path("etc/pilot/node-key.pem"), "a node's key\n")
	b.Output("pilot", "node", "install", "--now", "--broker", "unix:///run/copilot/copilot.sock")
	b.Output("pilot", "node", "doctor", "--kek", "team-a")
	conf := harness.Read(t, b.Path("etc/pilot/pilot.toml")) + "kek-cache-ttl = \"3m\"\n" // as an admin would
	harness.Write(t, b.Path("etc/pilot/pilot.toml"), conf)
	state := harness.Read(t, b.Path("var/lib/pilot/node.json"))

	pids := map[string]string{}
	for _, unit := range []string{"pilot.service", "copilot.service", "containerd.service"} {
		pids[unit] = b.PID(unit)
	}
	dpkg(b, upgrade)
	if got := b.Output("pilot", "--version"); got != "pilot version v"+packageUpgrade {
		t.Errorf("pilot --version: %s", got)
	}
	for unit, was := range pids {
		if is := b.PID(unit); is == "0" || (is == was) != (unit == "containerd.service") {
			t.Errorf("%s was process %s before the upgrade, and is %s", unit, was, is)
		}
	}
	if got := harness.Read(t, b.Path("etc/pilot/pilot.toml")); got != conf {
		t.Errorf("pilot.toml after the upgrade: %s", got)
	}
	if got := harness.Read(t, b.Path("var/lib/pilot/node.json")); got != state {
		t.Errorf("node.json after the upgrade: %s", got)
	}
	b.Output("pilot", "node", "doctor", "--kek", "team-a")

	was := b.PID("containerd.service")
	b.Output("dpkg", "-r", "pilot", "copilot")
	if is := b.PID("containerd.service"); is == was || is == "0" {
		t.Errorf("containerd was process %s before the removal, and is %s", was, is)
	}
	if dump := b.Output("containerd", "config", "dump"); strings.Contains(dump, "pilot") {
		t.Errorf("containerd after the removal: %s", dump)
	}
	if got := harness.Read(t, b.Path("etc/containerd/config.toml")); got != plain {
		t.Errorf("containerd's configuration after the removal: %s", got)
	}
	if got := harness.Read(t, b.Path("etc/pilot/pilot.toml")); got != conf || !exists(b.Path("etc/pilot/node-key.pem")) {
		t.Errorf("pilot.toml after the removal: %s", got)
	}
	for _, unit := range []string{"pilot.service", "pilot-diff.socket", "pilot-keyprovider.socket", "pilot-lazy.socket", "pilot-snapshotter.service", "copilot.service"} {
		if state := harness.CombinedOutput(t, b.Run("systemctl", "is-active", unit)); strings.TrimSpace(state) != "inactive" {
			t.Errorf("after the removal %s is %s", unit, state)
		}
	}

	dpkg(b, upgrade)
	b.Output("systemctl", "start", "copilot.service")
	b.Output("pilot", "node", "install", "--now")
	if got := harness.Read(t, b.Path("etc/pilot/pilot.toml")); got != conf {
		t.Errorf("pilot.toml after another installation: %s", got)
	}
	b.Output("pilot", "node", "doctor", "--kek", "team-a")

	out := b.Output("dpkg", "-P", "pilot", "copilot")
	if n := strings.Count(out, "KEKs and the CA stay"); n != 1 {
		t.Errorf("purge says %d times that KEKs stay: %s", n, out)
	}
	left(t, b.Root)
	for _, name := range []string{"etc/pilot", "var/lib/pilot", "etc/copilot/copilot.toml", "etc/copilot/policy.toml", "etc/copilot/server-key.pem", "etc/copilot/admin-key.pem", "etc/copilot/public-keys-key.pem"} {
		if exists(b.Path(name)) {
			t.Errorf("/%s is left", name)
		}
	}
	keysStay(t, b.Root)
	b.Output("systemctl", "restart", "containerd.service")

	// Where there is no containerd to restart, pilot can be removed all the same.
	dpkg(b, built)
	b.Output("pilot", "node", "install")
	b.Output("systemctl", "stop", "containerd.service")
	for _, dir := range []string{"etc", "usr/lib"} {
		if err := os.RemoveAll(b.Path(dir + "/systemd/system/containerd.service")); err != nil {
			t.Fatal(err)
		}
	}
	b.Output("systemctl", "daemon-reload")
	b.Output("dpkg", "-P", "pilot", "copilot")
}

// left checks that no program, unit or link of a package is left.
func left(t *testing.T, root string) {
	t.Helper()
	for _, dir := range []string{"usr", "etc/systemd", "etc/containerd"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, e fs.DirEntry, err error) error {
			if name := e.Name(); err == nil && (strings.HasPrefix(name, "pilot") || strings.HasPrefix(name, "copilot") || strings.Contains(name, "ctr-pilot")) {
				t.Errorf("%s is left", path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// keysStay checks that what can't be replaced is there.
func keysStay(t *testing.T, root string) {
	t.Helper()
	for _, pattern := range []string{"var/lib/copilot/master.key", "var/lib/copilot/*.db", "etc/copilot/ca.pem", "etc/copilot/ca-key.pem"} {
		if files, _ := filepath.Glob(filepath.Join(root, pattern)); len(files) == 0 {
			t.Errorf("/%s is gone", pattern)
		}
	}
}

// testRPMs does with rpm what it can do in a root that is not a machine of its
// own.
func testRPMs(t *testing.T, root, built, upgrade string) {
	m := harness.BareMachine(t, root)
	for _, name := range []string{"containerd", "containerd-shim-runc-v2"} {
		m.AddProgram(filepath.Join(harness.Tools, "bin", name))
	}
	// rpm knows nothing of the packages that are there.
	rpm := func(args ...string) string {
		t.Helper()
		cmd := harness.Command(t, "rpm", append([]string{"--root", m.Root, "--dbpath", "/var/lib/rpm"}, args...)...)
		out, err := cmd.CombinedOutput()
		if err != nil || strings.Contains(string(out), "scriptlet failed") {
			t.Fatalf("rpm %q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	plain := harness.Read(t, m.Root+"/etc/containerd/config.toml")
	rpm("--initdb")
	rpm("-i", "--nodeps", harness.PackageFile(t, built, "pilot", "rpm"), harness.PackageFile(t, built, "copilot", "rpm"))
	if got := rpm("-q", "pilot", "copilot"); strings.Count(got, harness.PackageVersion+"-1.") != 2 {
		t.Errorf("rpm -q: %s", got)
	}
	for _, name := range []string{"pilot", "copilot"} {
		requires := rpm("-q", "--requires", name)
		if !strings.Contains(requires, "libc.so.6(GLIBC_2.3") {
			t.Errorf("%s requires %s", name, requires)
		}
	}
	if got := harness.Output(t, m.Run("pilot", "--version")); strings.TrimSpace(got) != "pilot version v"+harness.PackageVersion {
		t.Errorf("pilot --version: %s", got)
	}
	if got := harness.Output(t, m.Run("stat", "-c", "%U %G %a", "/var/lib/copilot")); strings.TrimSpace(got) != "copilot copilot 700" {
		t.Errorf("/var/lib/copilot: %s", got)
	}
	harness.Output(t, m.Run("copilot", "init", "--host", "localhost", "--trust-domain", "example.com"))
	harness.Output(t, m.Run("setpriv", "--reuid=copilot", "--regid=copilot", "--clear-groups", "copilot", "keys", "create", "team-a"))
	harness.Output(t, m.Run("pilot", "node", "install", "--broker", "https://copilot.example.com"))
	conf, state := harness.Read(t, m.Root+"/etc/pilot/pilot.toml"), harness.Read(t, m.Root+"/var/lib/pilot/node.json")
	// The unit starts Debian's containerd, for which pilot is a stream processor.
	dump := m.CheckUnits()
	if !strings.Contains(dump, "/usr/bin/pilot-decoder") {
		t.Errorf("containerd after the installation: %s", dump)
	}

	rpm("-U", "--nodeps", harness.PackageFile(t, upgrade, "pilot", "rpm"), harness.PackageFile(t, upgrade, "copilot", "rpm"))
	if got := harness.Output(t, m.Run("pilot", "--version")); strings.TrimSpace(got) != "pilot version v"+packageUpgrade {
		t.Errorf("pilot --version: %s", got)
	}
	for name, before := range map[string]string{"/etc/pilot/pilot.toml": conf, "/var/lib/pilot/node.json": state} {
		if after := harness.Read(t, m.Root+name); after != before {
			t.Errorf("the upgrade has changed %s: %s\nbefore: %s", name, after, before)
		}
	}
	if after := m.CheckUnits(); after != dump {
		t.Errorf("containerd after the upgrade: %s", after)
	}

	rpm("-e", "pilot", "copilot")
	if dump = m.CheckUnits(); strings.Contains(dump, "pilot") {
		t.Errorf("containerd after the removal: %s", dump)
	}
	if got := harness.Read(t, m.Root+"/etc/containerd/config.toml"); got != plain {
		t.Errorf("containerd's configuration after the removal: %s", got)
	}
	if got := harness.Read(t, m.Root+"/etc/pilot/pilot.toml"); got != conf {
		t.Errorf("pilot.toml after the removal: %s", got)
	}
	left(t, m.Root)
	keysStay(t, m.Root)
	if !exists(m.Root + "/etc/copilot/copilot.toml") {
		t.Error("copilot.toml is gone")
	}

	rpm("-i", "--nodeps", harness.PackageFile(t, upgrade, "pilot", "rpm"))
	harness.Output(t, m.Run("pilot", "node", "install"))
	if got := harness.Read(t, m.Root+"/etc/pilot/pilot.toml"); got != conf {
		t.Errorf("pilot.toml after another installation: %s", got)
	}
}
