package main

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/credentials/insecure"
)

// TestReloadTakesUsableConfigurationsOnly gives a running pilot another broker, then a
// configuration that can't be used, then a broker that is away.
func TestReloadTakesUsableConfigurationsOnly(t *testing.T) {
	t.Parallel()
	url, _ := startBroker(t)
	dir := t.TempDir()
	config := filepath.Join(dir, "pilot.toml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("broker = \"unix:///nowhere.sock\"\nbroker-timeout = \"50ms\"\n")
	pilot := startServe(t, "unix://"+dir+"/s", "--config", config)
	works := func() error { return ask(t, "unix://"+dir+"/s", insecure.NewCredentials()) }
	until := func(want bool) {
		t.Helper()
		if err := pilot.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		var err error
		for range 6000 { // a minute
			if err = works(); (err == nil) == want {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("after SIGHUP: %v, want it to work: %t", err, want)
	}
	if err := works(); err == nil {
		t.Fatal("it works without a broker")
	}
	// A setting that needs a restart, and was not set, is put off.
	write("broker = \"" + url + "\"\nadmin-listen = \"unix:///nowhere/admin.sock\"\n")
	until(true)
	files := func() int {
		list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pilot.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	before := files()
	for range 20 {
		until(true)
		time.Sleep(20 * time.Millisecond)
	}
	// The connections of replaced clients are closed once no request uses them.
	for range 6000 { // a minute
		if files() <= before+5 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if now := files(); now > before+5 {
		t.Errorf("%d files are open after SIGHUP, and %d were before", now, before)
	}
	write("broker = \"" + url + "\"\nkek-cache-ttl = \"soon\"\n")
	if err := pilot.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := works(); err != nil {
			t.Fatalf("a configuration that can't be used was taken: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	write("broker = \"unix:///nowhere.sock\"\nbroker-timeout = \"50ms\"\n")
	until(false)
}
