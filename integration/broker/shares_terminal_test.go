package broker

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/console"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// terminal is a program on a terminal of its own.
type terminal struct {
	t    *testing.T
	tty  console.Console
	cmd  *exec.Cmd
	done chan struct{} // closed once nothing more comes

	mu     sync.Mutex
	screen string // all that was shown
}

func onTerminal(t *testing.T, cmd *exec.Cmd) *terminal {
	t.Helper()
	tty, name, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tty.Close() })
	end, err := os.OpenFile(name, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = end, end, end
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end.Close()
	x := &terminal{t: t, tty: tty, cmd: cmd, done: make(chan struct{})}
	go func() {
		defer close(x.done)
		b := make([]byte, 4096)
		for {
			n, err := tty.Read(b)
			x.mu.Lock()
			x.screen += strings.ReplaceAll(string(b[:n]), "\r\n", "\n")
			x.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return x
}

func (x *terminal) shown() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.screen
}

// await waits until a text was shown n times.
func (x *terminal) await(text string, n int) {
	x.t.Helper()
	harness.Await(x.t, text, func() error {
		if screen := x.shown(); strings.Count(screen, text) < n {
			return &missing{text, screen}
		}
		return nil
	})
}

type missing struct{ text, screen string }

func (m *missing) Error() string { return m.text + " is not in " + m.screen }

func (x *terminal) types(keys string) {
	x.t.Helper()
	if _, err := x.tty.Write([]byte(keys)); err != nil {
		x.t.Fatal(err)
	}
}

// ends waits for the end, and returns what is left on the screen, and the exit status.
func (x *terminal) ends() (left string, status int) {
	x.t.Helper()
	x.cmd.Wait()
	<-x.done
	pages := strings.Split(x.shown(), clearScreen)
	return pages[len(pages)-1], x.cmd.ProcessState.ExitCode()
}

// clearScreen is what clears a terminal, and what it can scroll back to.
const clearScreen = "\x1b[2J\x1b[3J\x1b[H"

var (
	shareLine     = regexp.MustCompile(`(?m)^copilot-share-[0-9A-Z-]+$`)
	recipientLine = regexp.MustCompile(`(?m)^age1pq1[0-9a-z]+$`)
)

// TestSharesOnATerminal copies shares from the terminal, a page each, and opens a backup with
// two of them. No page is skipped by what was typed before, and no share is left on the
// screen, also where somebody stops halfway, by any key that does.
func TestSharesOnATerminal(t *testing.T) {
	t.Parallel()
	fipstest.Refused(t, fipstest.Backup)
	dir := harness.TempDir(t)
	shares := func() *terminal {
		return onTerminal(t, harness.Command(t, "copilot", "backup", "shares", "--shares", "3", "--threshold", "2"))
	}
	const next = "press Enter for the next page. "
	x := shares()
	for i := range 3 {
		x.await(next, i+1)
		x.types("\n\n"[:1+i%2]) // the second one twice
	}
	left, status := x.ends()
	pages := strings.Split(x.shown(), clearScreen)
	if status != 0 || len(pages) != 5 || pages[0] != "" || shareLine.MatchString(left) || !recipientLine.MatchString(left) {
		t.Fatalf("exit status %d, shown %q", status, x.shown())
	}
	open := []string{"backup", "verify"}
	for i, page := range pages[1:4] {
		lines := shareLine.FindAllString(page, -1)
		if len(lines) != 1 {
			t.Fatalf("page %d: %q", i+1, page)
		}
		if i != 1 {
			open = append(open, "--share", harness.Write(t, dir+"/"+string(rune('a'+i)), lines[0]))
		}
	}
	harness.Output(t, harness.Command(t, "copilot", "keys", "create", "--dir", dir+"/store", "team-a"))
	harness.Output(t, harness.Command(t, "copilot", "backup", "--dir", dir+"/store", "--recipient", recipientLine.FindString(left), "--out", dir+"/1.backup"))
	harness.Output(t, harness.Command(t, "copilot", append(open, dir+"/1.backup")...))

	for name, key := range map[string]string{"Ctrl-C": "\x03", "Ctrl-D": "\x04", "Ctrl-\\": "\x1c"} {
		x := shares()
		x.await(next, 1)
		x.types("\n")
		x.await(next, 2)
		x.types(key)
		if left, status := x.ends(); status != 1 || shareLine.MatchString(left) || !strings.Contains(left, "stopped at share 2 of 3: the shares are void") {
			t.Errorf("%s: exit status %d, left on the screen: %q", name, status, left)
		}
	}
}
