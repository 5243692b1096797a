package bench

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// benchDir returns a directory in memory, so that no disk is measured, or on the
// disk if $PILOT_BENCH_DISK is set.
func benchDir(b *testing.B) string {
	b.Helper()
	debug.FreeOSMemory() // of benchmarks before
	dir := harness.TempDir(b)
	if os.Getenv("PILOT_BENCH_DISK") != "" {
		return dir
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		// Before TempDir's clean-up, and after whatever runs in it was stopped.
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			b.Error(err)
		}
	})
	return dir
}

// material makes the tar archive of a layer of some size, in bytes, as images
// have them: a third is text in small files, a third binaries, and a third
// random bytes, which is what compressed files look like. Text and binaries
// are the Go distribution's. Directories stand before their files.
type material struct {
	b              testing.TB
	text, binaries []string
	nextText       int
	nextBinary     int
}

func newMaterial(b testing.TB) *material {
	b.Helper()
	root := strings.TrimSpace(harness.Output(b, exec.Command("go", "env", "GOROOT")))
	m := &material{b: b}
	for dir, list := range map[string]*[]string{"src": &m.text, "pkg": &m.binaries, "bin": &m.binaries} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				*list = append(*list, path)
			}
			return err
		})
		if err != nil {
			b.Fatal(err)
		}
	}
	if len(m.text) == 0 || len(m.binaries) == 0 {
		b.Fatalf("there is no text or no binaries in %s", root)
	}
	return m
}

// layer returns an archive of size bytes or a little more.
func (m *material) layer(size int) []byte {
	m.b.Helper()
	var out bytes.Buffer
	tw := tar.NewWriter(&out)
	dirs := map[string]bool{".": true}
	var directory func(name string)
	directory = func(name string) {
		if dirs[name] {
			return
		}
		dirs[name] = true
		directory(path.Dir(name))
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755}); err != nil {
			m.b.Fatal(err)
		}
	}
	add := func(name string, content []byte) {
		directory(path.Dir(name))
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
			m.b.Fatal(err)
		}
		if _, err := tw.Write(content); err != nil {
			m.b.Fatal(err)
		}
	}
	part := func(dir string, files []string, next *int, until int) {
		for out.Len() < until {
			content, err := os.ReadFile(files[*next%len(files)])
			if err != nil {
				m.b.Fatal(err)
			}
			content = content[:min(len(content), max(0, until-out.Len()))]
			add(fmt.Sprintf("%s/%d/%d-%s", dir, *next/100, *next, filepath.Base(files[*next%len(files)])), content)
			*next++
		}
	}
	part("text", m.text, &m.nextText, size/3)
	part("lib", m.binaries, &m.nextBinary, size/3*2)
	noise := make([]byte, max(0, size-out.Len()-2048))
	rand.Read(noise)
	add(fmt.Sprintf("noise%d", m.nextText), noise)
	if err := tw.Close(); err != nil {
		m.b.Fatal(err)
	}
	return out.Bytes()
}

// with returns an archive with a program more, in its root.
func (m *material) with(archive []byte, name string, program []byte) []byte {
	m.b.Helper()
	const end = 1024 // of an archive: two empty blocks
	out := bytes.NewBuffer(archive[:len(archive)-end])
	tw := tar.NewWriter(out)
	if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(program))}); err != nil {
		m.b.Fatal(err)
	}
	if _, err := tw.Write(program); err != nil {
		m.b.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		m.b.Fatal(err)
	}
	return out.Bytes()
}
