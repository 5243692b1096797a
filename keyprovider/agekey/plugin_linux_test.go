package agekey

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"filippo.io/age/plugin"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// plugins builds the plugin of testdata under the names demo, ask and hang, and puts it
// into PATH.
func plugins(t *testing.T) {
	t.Helper()
	fipstest.Refused(t, fipstest.Age)
	dir := t.TempDir()
	build := exec.Command("go", "build", "-buildvcs=false", "-o", dir+"/age-plugin-demo", "./testdata/plugin")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, name := range []string{"ask", "hang"} {
		if err := os.Link(dir+"/age-plugin-demo", dir+"/age-plugin-"+name); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("PLUGIN_PIDS", dir+"/pids")
}

func TestPluginsWrapAndUnwrap(t *testing.T) {
	plugins(t)
	inner, innerIdentity := newX25519(t)
	named := func(name string) (to, identity string) {
		return plugin.EncodeRecipient(name, []byte(inner)), plugin.EncodeIdentity(name, []byte(innerIdentity))
	}
	to, identity := named("demo")
	wrapped := wrap(t, to)
	ids := Read([]string{write(t, identity)})
	if names := ids.Plugins(to); !slices.Equal(names, []string{"demo"}) {
		t.Fatalf("plugins %q", names)
	}
	if _, err := ids.Unwrap(wrapped); !errors.Is(err, ErrNotUnwrapped) {
		t.Errorf("without its plugin: %v", err)
	}
	if got, err := ids.UnwrapByPlugin(t.Context(), "demo", wrapped); err != nil || string(got) != layerKey {
		t.Errorf("%q, %v", got, err)
	}
	if other, _ := newX25519(t); len(ids.Plugins(other))+len(ids.Plugins("age1pq1"+other)) > 0 {
		t.Error("the plugin is run for other recipients")
	}

	ask, _ := named("ask")
	if _, err := Wrap(t.Context(), ask, []byte(layerKey)); err == nil || strings.Contains(err.Error(), "terminal") {
		t.Errorf("a plugin that asks: %v", err)
	}
	absent, absentIdentity := named("absent")
	if _, err := Wrap(t.Context(), absent, []byte(layerKey)); !errors.Is(err, ErrNoPlugin) || !strings.Contains(err.Error(), "age-plugin-absent is not in PATH") {
		t.Errorf("a plugin that is not installed: %v", err)
	}
	if _, err := Read([]string{write(t, absentIdentity)}).UnwrapByPlugin(t.Context(), "absent", wrapped); !errors.Is(err, ErrNoPlugin) {
		t.Errorf("a plugin that is not installed: %v", err)
	}
}

// TestPluginsAreNotDebugged has the variable with which age's library prints all that it
// exchanges with a plugin, among it the key.
func TestPluginsAreNotDebugged(t *testing.T) {
	plugins(t)
	t.Setenv("AGEDEBUG", "plugin")
	inner, _ := newX25519(t)
	log, err := os.Create(t.TempDir() + "/log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	stderr := os.Stderr
	os.Stderr = log
	wrap(t, plugin.EncodeRecipient("demo", []byte(inner)))
	os.Stderr = stderr
	if b, err := os.ReadFile(log.Name()); err != nil || len(b) > 0 {
		t.Errorf("it is printed: %q, %v", b, err)
	}
}

func TestPluginThatHangsIsKilledWithItsChildren(t *testing.T) {
	plugins(t)
	inner, _ := newX25519(t)
	ctx, cancel := context.WithCancel(t.Context())
	pids := os.Getenv("PLUGIN_PIDS")
	go func() {
		defer cancel()
		for range 3000 { // half a minute
			if b, err := os.ReadFile(pids); err == nil && bytes.Contains(b, []byte(" ")) {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	if _, err := Wrap(ctx, plugin.EncodeRecipient("hang", []byte(inner)), []byte(layerKey)); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	b, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	for text := range strings.FieldsSeq(string(b)) {
		pid, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		if !gone(pid) {
			t.Errorf("process %d still runs", pid)
		}
	}
}

// gone reports whether a process is gone, or a zombie that init has not collected yet.
func gone(pid int) bool {
	for range 1000 {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil || bytes.Contains(b, []byte(") Z ")) {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	syscall.Kill(pid, syscall.SIGKILL)
	return false
}
