// Package harness starts the programs that pilot is tested with, each in
// directories of the test's own.
//
// # Slow machines
//
// Tests pass on a machine that is many times slower than usual ("make test-repeat" shows
// it). So a test
//   - waits for a state with [Await], or for a channel, and sleeps only where something
//     wrong could happen meanwhile;
//   - expects within [Timeout] what takes a quiet machine a second or less;
//   - stops a program in the middle of its work by looking for that middle, as
//     [Node.Unpacking] does, or after a part of the time that the whole has just taken;
//   - tries again with more time where something expires before it was used, and leaves out
//     a round in which the machine held up the test itself;
//   - compares with what else happened in the same time (requests, tokens), not with a
//     number.
package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/copilot/kms/pkcs11"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

var (
	// Repo is the project's directory.
	Repo string
	// Tools is the directory of the programs of scripts/install-tools.sh.
	Tools string
	// Bin is the directory of our programs, as these tests have built them.
	Bin string
)

// Program is what has to be there for a package's tests: a program, or several that
// belong together.
type Program struct {
	packages []string // ours, which are built
	cgo      bool     // whether they use C libraries
	fipsOnly bool     // whether our programs run with GODEBUG=fips140=only
	tools    []string // files in the directory of the tools
	path     []string // programs in $PATH
}

// The needs of tests.
var (
	Pilot        = Program{packages: []string{"./cmd/pilot", "./cmd/pilot-decoder"}}
	Copilot      = Program{packages: []string{"./cmd/copilot"}, cgo: true}
	CtrPilot     = Program{packages: []string{"./ctr-pilot"}, cgo: true}
	Hello        = Program{packages: []string{"./integration/testdata/hello"}} // the program in images
	Containerd   = Program{tools: []string{"bin/containerd", "bin/containerd-shim-runc-v2", "bin/ctr", "bin/crictl"}, path: []string{"/usr/bin/containerd", "runc"}}
	Registry     = Program{path: []string{"docker-registry"}}
	Distribution = Program{tools: []string{"bin/distribution"}}
	Debian13     = Program{tools: []string{"trixie/usr/bin/skopeo"}}
	OpenSSL      = Program{path: []string{"openssl"}}
	GPG          = Program{path: []string{"gpg"}}
	IPRoute2     = Program{path: []string{"ip"}}
	SoftHSM      = Program{path: []string{"softhsm2-util"}}
	NSS          = Program{path: []string{"certutil"}}
	OpenCryptoki = Program{tools: []string{"trixie/usr/sbin/pkcsslotd"}}
	SWTPM        = Program{path: []string{"swtpm", "tpm2_getrandom"}}
	LocalKMS     = Program{tools: []string{"bin/local-kms"}}
	Vault        = Program{tools: []string{"bin/vault-dev"}}
	// FIPSOnly has our programs run with GODEBUG=fips140=only, wherever they are started.
	FIPSOnly = Program{fipsOnly: true}
)

// Main builds and looks for what the tests of a package need, runs them, and
// returns the exit code.
func Main(m *testing.M, needs ...Program) int {
	pkcs11.RunModule()
	if err := setUp(needs); err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		return 1
	}
	defer os.RemoveAll(Bin)
	defer lowers.remove()
	return m.Run()
}

func setUp(needs []Program) error {
	if os.Getuid() != 0 {
		return errors.New("these tests run containers and so need root; \"make test-unit\" runs those that do not")
	}
	dir, err := os.Getwd() // the package's
	if err != nil {
		return err
	}
	Repo = dir[:strings.LastIndex(dir, "/integration/")]
	if Tools = os.Getenv("PILOT_TOOLS"); Tools == "" {
		Tools = filepath.Join(Repo, ".cache", "tools")
	}
	for _, n := range needs {
		for _, name := range n.tools {
			if _, err := os.Stat(filepath.Join(Tools, name)); err != nil {
				return fmt.Errorf("%s is missing: install it with \"scripts/install-tools.sh %s\"", filepath.Join(Tools, name), Tools)
			}
		}
		for _, name := range n.path {
			if _, err := exec.LookPath(name); err != nil {
				return fmt.Errorf("%s is missing: install it with \"scripts/install-tools.sh %s\"", name, Tools)
			}
		}
	}
	if Bin, err = os.MkdirTemp("", "pilot-bin-"); err != nil {
		return err
	}
	if err := build(needs); err != nil {
		os.RemoveAll(Bin)
		return err
	}
	// containerd looks for its shim in PATH.
	return os.Setenv("PATH", filepath.Join(Tools, "bin")+":"+Bin+":"+os.Getenv("PATH"))
}

// GoBuild builds packages with cgo, in a directory of the repository, into a file or, if out
// ends in a slash, a directory. Without symbols, which nobody looks at, that takes less time.
// It may take many minutes where nothing was compiled before.
func GoBuild(t testing.TB, dir, out string, packages ...string) {
	t.Helper()
	build := exec.CommandContext(t.Context(), "go", append([]string{"build", "-buildvcs=false", "-ldflags", "-s -w", "-o", out}, packages...)...)
	build.Dir, build.Env = filepath.Join(Repo, dir), append(os.Environ(), "CGO_ENABLED=1")
	Output(t, build)
}

// build builds our programs into bin. All packages of tests build them in one
// directory, one after the other, so that the first links them and the others
// find them there. Each has links of its own to them: go build replaces files.
func build(needs []Program) error {
	race := os.Getenv("PILOT_RACE") != ""
	shared := filepath.Join(Repo, ".cache", "programs")
	if race {
		shared += "-race"
	}
	ldflags := "-s -w"
	if os.Getenv(fipstest.Variable) != "" || slices.ContainsFunc(needs, func(p Program) bool { return p.fipsOnly }) {
		shared += "-fips" + os.Getenv("GOFIPS140")
		ldflags += " -X=runtime.godebugDefault=fips140=only"
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
		flags := []string{"build", "-trimpath", "-buildvcs=false", "-ldflags", ldflags, "-o", shared + "/"}
		if race {
			cgo, flags = true, append(flags, "-race")
		}
		build := exec.Command("go", append(flags, packages...)...)
		build.Dir, build.Env = Repo, append(os.Environ(), "CGO_ENABLED=0")
		if cgo {
			build.Env = append(build.Env, "CGO_ENABLED=1")
		}
		if out, err := build.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w\n%s", build.Args, err, out)
		}
		for _, p := range packages {
			from, to := filepath.Join(shared, filepath.Base(p)), filepath.Join(Bin, filepath.Base(p))
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
