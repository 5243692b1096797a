package ocicryptclient

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"
)

func TestExecutable(t *testing.T) {
	dir := t.TempDir()
	command := func(script string) *Client {
		return executable(t, "/bin/sh", "-c", script)
	}
	for _, size := range []int{0, 1, 70000, 3 << 20} {
		request := bytes.Repeat([]byte("x"), size)
		if out, err := command("printf 'wrapped '; exec cat").Forward(t.Context(), Wrap, request); err != nil || string(out) != "wrapped "+string(request) {
			t.Errorf("%d bytes: the answer has %d, %v", size, len(out), err)
		}
	}
	if out, err := command("sleep 5 & echo answer").Forward(t.Context(), Unwrap, nil); err != nil || string(out) != "answer\n" {
		t.Errorf("it leaves a child: %q, %v", out, err)
	}
	if _, err := command("head -c 9000 /dev/zero | tr '\\0' x >&2; echo the cause >&2; exit 1").Forward(t.Context(), Unwrap, nil); err == nil || !strings.HasSuffix(err.Error(), "xxx"+"the cause") || len(err.Error()) > maxStderr+100 {
		t.Errorf("it says much: %.100v", err)
	}
	for script, want := range map[string]string{
		"echo why >&2; exit 3":      "/bin/sh: why",
		"exit 3":                    "/bin/sh: exit status 3",
		"head -c 5000000 /dev/zero": "/bin/sh answers more than 4194304 bytes",
		"kill -9 $$":                "/bin/sh: signal: killed",
	} {
		if out, err := command(script).Forward(t.Context(), Unwrap, nil); err == nil || err.Error() != want {
			t.Errorf("%s: %d bytes, %v", script, len(out), err)
		}
	}
	if _, err := executable(t, dir+"/none").Forward(t.Context(), Unwrap, nil); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), filepath.Join(dir, "none")) {
		t.Errorf("no such program: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := command("sleep 60 & sleep 60").Forward(ctx, Unwrap, nil); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 30*time.Second {
		t.Errorf("no answer for %s: %v", time.Since(start), err)
	}
}

func executable(t *testing.T, path string, args ...string) *Client {
	t.Helper()
	c, err := New("p", keyproviderconfig.KeyProviderAttrs{Command: &keyproviderconfig.Command{Path: path, Args: args}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
