package pull

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// diskOfBombs is how much a node of the test can hold, in bytes.
const diskOfBombs = 256 << 20

// smallDisk returns the directory of a node on such a disk.
func smallDisk(t testing.TB) string {
	t.Helper()
	dir := harness.TempDir(t)
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", diskOfBombs)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// unpack has a node unpack a layer as a client that pulls it does, and returns
// what is in the snapshot, as text.
func unpack(t testing.TB, n *harness.Node, layer []byte, desc ocispec.Descriptor) (string, error) {
	t.Helper()
	client, err := containerd.New(n.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(t.Context(), "default"), 2*harness.Timeout)
	defer cancel()
	lease, err := client.LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete); err != nil {
			t.Error(err)
		}
	}()
	ctx = leases.WithLease(ctx, lease.ID)
	blob := ocispec.Descriptor{MediaType: desc.MediaType, Digest: digest.FromBytes(layer), Size: int64(len(layer))}
	if err := content.WriteBlob(ctx, client.ContentStore(), blob.Digest.String(), bytes.NewReader(layer), blob); err != nil {
		t.Fatal(err)
	}
	snapshots := client.SnapshotService("overlayfs")
	mounts, err := snapshots.Prepare(ctx, "bomb", "")
	if err != nil {
		t.Fatal(err)
	}
	defer snapshots.Remove(context.WithoutCancel(ctx), "bomb")
	applied, err := client.DiffService().Apply(ctx, desc, mounts)
	var tree strings.Builder
	fmt.Fprintln(&tree, applied.Digest)
	if err != nil {
		return "", err
	}
	root := mounts[0].Source
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		to, _ := os.Readlink(path)
		stat := info.Sys().(*syscall.Stat_t)
		size := info.Size()
		if info.IsDir() {
			size = 0
		}
		fmt.Fprintln(&tree, strings.TrimPrefix(path, root), info.Mode(), size, stat.Uid, stat.Gid, stat.Rdev, stat.Nlink, to)
		return nil
	})
	if err != nil && !strings.Contains(err.Error(), "file name too long") { // of a path that only the snapshot itself can have
		t.Fatal(err)
	}
	return tree.String(), nil
}

// header returns a header of a tar file as nothing writes it.
func header(name string, kind byte, size string) []byte {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:136], size)
	copy(b[136:], "00000000000\x00        ")
	b[156] = kind
	copy(b[257:], "ustar\x0000")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

// tarred returns a tar file of entries, which have no content but their name.
func tarred(t testing.TB, entries ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Typeflag == tar.TypeReg && h.Size == 0 {
			h.Size = int64(len(h.Name))
		}
		h.Mode = 0o755
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Size == int64(len(h.Name)) {
			w.Write([]byte(h.Name))
		}
	}
	w.Flush() // what is missing is part of the test
	return append(b.Bytes(), make([]byte, 1024)...)
}

func gzipped(b []byte) []byte {
	var out bytes.Buffer
	w, _ := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	w.Write(b)
	w.Close()
	return out.Bytes()
}

// TestHarmfulLayersUnpackAsPlainOnes unpacks layers that are made to do harm: encrypted ones by pilot,
// and the same as plain ones by a containerd that has no pilot. The outcome is the
// same, pilot's memory stays small, and nothing outside of the snapshot changes.
func TestHarmfulLayersUnpackAsPlainOnes(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	_, url := harness.StartBroker(t, dir+"/broker", "team-a")
	home := smallDisk(t)
	provider, conf := harness.StartPilot(t, home, url)
	n := harness.NewDifferNode(t, home, harness.DifferConfig{Containerd: harness.Containerd2()})
	own := harness.StartNode(t, smallDisk(t), harness.Containerd2(), "", "")
	providers, err := ocicryptclient.FromFile(conf, grpcdial.Call)
	if err != nil {
		t.Fatal(err)
	}
	encrypt := func(layer []byte, mediaType string) ([]byte, ocispec.Descriptor) {
		t.Helper()
		to := processor.Recipients{Keys: processor.Keys{Providers: providers}, Parameters: map[string][][]byte{"pilot": {[]byte("team-a")}}}
		var out bytes.Buffer
		desc, err := processor.Encrypt(t.Context(), &out, bytes.NewReader(layer), mediaType, to)
		if err != nil {
			t.Fatal(err)
		}
		return out.Bytes(), desc
	}

	canary := harness.TempDir(t)
	mark := make([]byte, 8)
	rand.Read(mark)
	escaped := "pilot-escaped-" + hex.EncodeToString(mark)
	harness.Write(t, canary+"/dir/file", "canary")
	unchanged := func() {
		t.Helper()
		files := 0
		filepath.WalkDir(canary, func(string, fs.DirEntry, error) error { files++; return nil })
		info, err := os.Stat(canary + "/dir/file")
		if files != 3 || err != nil || harness.Read(t, canary+"/dir/file") != "canary" || info.Mode().Perm() != 0o600 || info.Sys().(*syscall.Stat_t).Nlink != 1 {
			t.Fatalf("what is outside of the snapshot has changed: %d files, %v", files, err)
		}
		for _, where := range []string{"/", "/tmp/", "/etc/", "/root/", home + "/", own.Dir + "/", canary + "/", home + "/mounts/", home + "/root/"} {
			if _, err := os.Lstat(where + escaped); err == nil {
				t.Fatalf("a layer has written %s%s", where, escaped)
			}
		}
	}
	up := strings.Repeat("../", 30)
	tower := strings.Repeat("d/", 1500)

	// Files of zeros. GNU tar writes sparse ones.
	hole := func(size, format string) []byte {
		file := dir + "/sparse-" + size
		harness.Output(t, harness.Command(t, "truncate", "--size", size, file))
		return []byte(harness.Output(t, harness.Command(t, "tar", "--create", "--sparse", "--hole-detection=seek", "--format="+format, "--directory", dir, filepath.Base(file))))
	}
	zeros := make([]byte, 32<<20)
	sized := func(size string) []byte { return header("zeros", '0', size) }
	const eightGiB = "100000000000" // octal
	of := func(first []byte, piece []byte, times int) []byte {
		return append(bytes.Clone(first), bytes.Repeat(piece, times)...)
	}
	many := make([]tar.Header, 3000)
	for i := range many {
		many[i] = tar.Header{Name: fmt.Sprintf("dir%d/file%d", i%10, i)}
	}
	one := harness.Zstd(t, zeros)
	const gz, zst = "+gzip", "+zstd"
	tests := []struct {
		name, kind string
		layer      []byte
		want       string // part of the error; empty: it is unpacked; "*": as containerd's own does
	}{
		// More than there is room for. The content is 8 GiB.
		{"gzip of zeros, in many members", gz, of(gzipped(sized(eightGiB)), gzipped(zeros), 256), "no space left"},
		{"zstd of zeros, in many frames", zst, of(harness.Zstd(t, sized(eightGiB)), one, 256), "no space left"},
		{"zstd of zeros, and skipped frames", zst, of(append(harness.Zstd(t, sized(eightGiB)), "\x50\x2a\x4d\x18\xff\xff\xff\x7f"...), one, 256), "*"},
		{"a hole of 1 TiB, GNU", gz, gzipped(hole("1T", "gnu")), "unhandled tar header"},
		{"a hole of 1 TiB, PAX", zst, harness.Zstd(t, hole("1T", "posix")), "no space left"},
		{"a hole", gz, gzipped(hole("64M", "posix")), ""},
		{"gzip after the end", gz, of(gzipped(tarred(t)), gzipped(zeros), 4), ""},
		// Sizes that no file has.
		{"1 EiB", "", tarred(t, tar.Header{Name: "big", Size: 1 << 60}), "EOF"},
		{"the largest size", "", append(header("big", '0', "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff"), "content"...), "*"},
		{"a larger size", "", header("big", '0', "\x80\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00"), "*"},
		{"a negative size", "", header("big", '0', "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), "*"},
		{"a size that is no number", "", header("big", '0', "hello"), "*"},
		{"a PAX header of 8 GiB", gz, of(gzipped(header("x", 'x', eightGiB)), gzipped(zeros), 256), "*"},
		{"a long name of 8 GiB", zst, of(harness.Zstd(t, header("x", 'L', eightGiB)), one, 256), "*"},
		{"a global PAX header of 32 MiB", gz, of(gzipped(header("x", 'g', "00200000000\x00")), gzipped(zeros), 1), "*"},
		{"a PAX record of 900 KiB", gz, gzipped(tarred(t, tar.Header{Name: "f", PAXRecords: map[string]string{"PILOT.x": strings.Repeat("x", 900<<10)}})), "*"},
		{"many entries", gz, gzipped(tarred(t, many...)), ""},
		{"deep paths", gz, gzipped(tarred(t, tar.Header{Name: tower + "f"})), "*"},
		{"a deeper path", gz, gzipped(tarred(t, tar.Header{Name: tower + tower + "f"})), "*"},
		{"a long name", gz, gzipped(tarred(t, tar.Header{Name: strings.Repeat("n", 5000)})), "*"},
		{"nothing", "", nil, "*"},
		{"one byte", "", []byte("x"), "*"},
		{"a cut header", gz, gzipped(sized(eightGiB)[:300]), "*"},
		{"cut", gz, gzipped(zeros)[:100], "*"},
		// Out of the snapshot.
		{"../", "", tarred(t, tar.Header{Name: up + escaped}), "*"},
		{"a/../../", "", tarred(t, tar.Header{Name: "a/" + up + escaped}), "*"},
		{"/", "", tarred(t, tar.Header{Name: canary + "/" + escaped}), "*"},
		{"a link, and through it", "", tarred(t, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: canary}, tar.Header{Name: "l/" + escaped}), "*"},
		{"a relative link, and through it", "", tarred(t, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: up + canary[1:]}, tar.Header{Name: "l/" + escaped}, tar.Header{Name: "l/dir/file"}), "*"},
		{"a link to a file, written to", "", tarred(t, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: canary + "/dir/file"}, tar.Header{Name: "l"}), "*"},
		{"links to links", "", tarred(t, tar.Header{Name: "a", Typeflag: tar.TypeSymlink, Linkname: "/"}, tar.Header{Name: "b", Typeflag: tar.TypeSymlink, Linkname: "a" + canary}, tar.Header{Name: "b/" + escaped}), "*"},
		{"links in a circle", "", tarred(t, tar.Header{Name: "a", Typeflag: tar.TypeSymlink, Linkname: "b"}, tar.Header{Name: "b", Typeflag: tar.TypeSymlink, Linkname: "a"}, tar.Header{Name: "b/" + escaped}), "*"},
		{"a hard link", "", tarred(t, tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: canary + "/dir/file"}), "*"},
		{"a hard link with ../", "", tarred(t, tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: up + canary[1:] + "/dir/file"}, tar.Header{Name: "h"}), "*"},
		{"a hard link through a link", "", tarred(t, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: canary}, tar.Header{Name: "h", Typeflag: tar.TypeLink, Linkname: "l/dir/file"}), "*"},
		{"a whiteout", "", tarred(t, tar.Header{Name: up + canary[1:] + "/dir/.wh.file"}), "*"},
		{"a whiteout through a link", "", tarred(t, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: canary}, tar.Header{Name: "l/dir/.wh.file"}, tar.Header{Name: "l/.wh.dir"}), "*"},
		{"an opaque directory through a link", "", tarred(t, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: canary}, tar.Header{Name: "l/dir/.wh..wh..opq"}), "*"},
		{"a whiteout of ..", "", tarred(t, tar.Header{Name: ".wh..."}, tar.Header{Name: "a/.wh.."}), "*"},
		{"the root as a link", "", tarred(t, tar.Header{Name: "./", Typeflag: tar.TypeSymlink, Linkname: canary}, tar.Header{Name: escaped}), "*"},
		{"devices", "", tarred(t, tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, tar.Header{Name: "fifo", Typeflag: tar.TypeFifo}, tar.Header{Name: "sda", Typeflag: tar.TypeBlock, Devmajor: 8}), ""},
	}
	took := map[string]time.Duration{}
	for _, test := range tests {
		mediaType := ocispec.MediaTypeImageLayer + test.kind
		encrypted, desc := encrypt(test.layer, mediaType)
		began := time.Now()
		got, err := unpack(t, n, encrypted, desc)
		took[test.name] = time.Since(began)
		want, ownErr := unpack(t, own, test.layer, ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(test.layer), Size: int64(len(test.layer))})
		t.Logf("%s: %s, %v; containerd's own: %v", test.name, took[test.name].Round(time.Millisecond), err, ownErr)
		if (err == nil) != (ownErr == nil) || got != want {
			t.Errorf("%s: %v\n%.500s\nand containerd's own: %v\n%.500s", test.name, err, got, ownErr, want)
		}
		if test.want != "*" && (test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want))) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
		unchanged()
	}
	n.ExpectNoTraces(t)

	// Sizes that the descriptor says, of a layer that is whole.
	whole := gzipped(tarred(t, tar.Header{Name: "file"}))
	encrypted, desc := encrypt(whole, ocispec.MediaTypeImageLayerGzip)
	for _, size := range []int64{0, -1, math.MinInt64, math.MaxInt64, desc.Size + 1, desc.Size - 1} {
		desc.Size = size
		got, err := unpack(t, n, encrypted, desc)
		want, ownErr := unpack(t, own, whole, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(whole), Size: size})
		if (err == nil) != (ownErr == nil) || got != want {
			t.Errorf("a size of %d: %v, and containerd's own: %v", size, err, ownErr)
		}
	}
	peak := provider.Peak(t)
	t.Logf("pilot took %d MiB of memory at most", peak>>20)
	if peak > 160<<20 {
		t.Errorf("pilot took %d MiB of memory", peak>>20)
	}

	// A window of zstd is kept in memory, twice, as containerd's own differ does.
	for log, fails := range map[int]bool{29: false, 31: true} {
		const size = 80 << 20
		content := append(header("content", '0', fmt.Sprintf("%011o\x00", size)), make([]byte, size+1024)...)
		layer := harness.Zstd(t, content, zstd.WithWindowSize(1<<29))
		if layer[4]&0x20 != 0 {
			t.Fatal("this frame has no window")
		}
		layer[5] = byte(log-10) << 3 // RFC 8878, section 3.1.1.1.2
		encrypted, desc := encrypt(layer, ocispec.MediaTypeImageLayerZstd)
		got, err := unpack(t, n, encrypted, desc)
		want, ownErr := unpack(t, own, layer, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerZstd, Digest: digest.FromBytes(layer), Size: int64(len(layer))})
		if got != want || (err != nil) != fails || (ownErr != nil) != fails {
			t.Errorf("a window of 2^%d bytes: %v, and containerd's own: %v", log, err, ownErr)
		}
	}
	peak = provider.Peak(t)
	t.Logf("pilot took %d MiB of memory at most, with large windows", peak>>20)
	if peak > 2<<29+160<<20 {
		t.Errorf("pilot took %d MiB of memory for a window of 512", peak>>20)
	}
}
