//go:build linux

package processor

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/keywrap"
	"github.com/go-jose/go-jose/v4"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
)

// put writes a file below dir and returns its path.
func put(t testing.TB, dir, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func link(t testing.TB, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

func state(t testing.TB, dir string) KeyDirState {
	t.Helper()
	s, err := NewKeyDir(dir, nil).State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// layerFor returns the descriptor of a layer that is encrypted for p.
func layerFor(t *testing.T, p pair) ocispec.Descriptor {
	t.Helper()
	_, k := encrypt(t, []byte("layer"))
	return ocispec.Descriptor{Annotations: wrapped(t, k, p.encrypt(), nil)}
}

// opens reports whether a key of the directory opens a layer.
func opens(t testing.TB, dir *KeyDir, layer ocispec.Descriptor) error {
	t.Helper()
	key, err := dir.Unwrap(t.Context(), Keys{}, layer)
	if err == nil {
		key.Clear()
	} else if !errors.Is(err, ErrNoKey) {
		t.Errorf("%v is not ErrNoKey", err)
	}
	return err
}

// pkcs8 returns a private key in PEM.
func pkcs8(t testing.TB, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// A strayFile is put beside a good key.
type strayFile struct {
	name   string
	put    func(t testing.TB, dir string)
	reason string // nothing if it can be used
}

// strayFiles returns one of each kind. No name is repeated.
func strayFiles(t testing.TB) []strayFile {
	fipstest.Refused(t, fipstest.PrivateKey)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der := x509.MarshalPKCS1PrivateKey(rsaKey)
	good := pkcs8(t, rsaKey)
	public, err := x509.MarshalPKIXPublicKey(&rsaKey.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(ecKey)
	if err != nil {
		t.Fatal(err)
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	//lint:ignore SA1019 such files exist
	legacy, err := x509.EncryptPEMBlock(rand.Reader, "RSA PRIVATE KEY", der, []byte("password"), x509.PEMCipherAES256)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "a"}}, &x509.Certificate{SerialNumber: big.NewInt(1)}, &rsaKey.PublicKey, rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	jwk, err := json.Marshal(jose.JSONWebKey{Key: ecKey})
	if err != nil {
		t.Fatal(err)
	}
	publicJWK, err := json.Marshal(jose.JSONWebKey{Key: ecKey.Public()})
	if err != nil {
		t.Fatal(err)
	}
	entity, err := openpgp.NewEntity("a", "", "a@example.com", nil)
	if err != nil {
		t.Fatal(err)
	}
	var pgp, pgpPublic, pgpPassword, armored bytes.Buffer
	if err := errors.Join(entity.SerializePrivate(&pgp, nil), entity.Serialize(&pgpPublic)); err != nil {
		t.Fatal(err)
	}
	w, err := armor.Encode(&armored, openpgp.PrivateKeyType, nil)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(pgp.Bytes())
	w.Close()
	if err := errors.Join(entity.EncryptPrivateKeys([]byte("password"), nil), entity.SerializePrivateWithoutSigning(&pgpPassword, nil)); err != nil {
		t.Fatal(err)
	}
	block := func(kind string, b []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b})
	}

	stray := []strayFile{
		{"dangling", func(t testing.TB, dir string) { link(t, "nowhere", dir+"/dangling") }, `a link to "nowhere", which does not exist`},
		{"loop", func(t testing.TB, dir string) { link(t, "loop", dir+"/loop") }, "a loop of links"},
		{"self", func(t testing.TB, dir string) { link(t, ".", dir+"/self") }, ""},
		{"empty.d", func(t testing.TB, dir string) {
			if err := os.Mkdir(dir+"/empty.d", 0o700); err != nil {
				t.Fatal(err)
			}
		}, ""},
		{"fifo", func(t testing.TB, dir string) {
			if err := unix.Mkfifo(dir+"/fifo", 0o600); err != nil {
				t.Fatal(err)
			}
		}, "not a file but a pipe, a socket or a device"},
		{"socket", func(t testing.TB, dir string) {
			// Below the longest path that a socket may have.
			short, err := os.MkdirTemp("/tmp", "")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(short) })
			l, err := net.Listen("unix", short+"/s")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
			link(t, short+"/s", dir+"/socket")
		}, "not a file but a pipe, a socket or a device"},
		{"device", func(t testing.TB, dir string) { link(t, "/dev/zero", dir+"/device") }, "not a file but a pipe, a socket or a device"},
		{"huge", func(t testing.TB, dir string) {
			if err := os.Truncate(put(t, dir, "huge", good), 1<<40); err != nil {
				t.Fatal(err)
			}
		}, "larger than 1024 KiB"},
		{"a/b/c/d/e/f/g/h/i", func(t testing.TB, dir string) { put(t, dir, "a/b/c/d/e/f/g/h/i/key.pem", good) }, "a directory in 8 others"},
	}
	for _, f := range []struct {
		name   string
		b      []byte
		reason string
	}{
		{"README", []byte("Keys of this node.\n"), "neither a private key nor a certificate"},
		{"null", nil, "empty"},
		{"spaces", []byte(" \n"), "empty"},
		{"0.txt", []byte("0"), "neither a private key without a password nor a certificate"},
		{"json", []byte(`{"SECRET": 1}`), "neither a private key without a password nor a certificate"},
		{"binary", []byte("\xff\xfe\x00SECRET"), "neither a private key nor a certificate"},
		{"public.pem", block("PUBLIC KEY", public), "a public key"},
		{"public.der", public, "a public key"},
		{"rsa-public.pem", block("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(&rsaKey.PublicKey)), "a public key"},
		{"public.jwk", publicJWK, "a public key"},
		{"key.tmp", good[:len(good)/2], "damaged or only half written"},
		{"damaged.pem", block("PRIVATE KEY", der[:100]), "damaged or only half written"},
		{"password.pem", block("ENCRYPTED PRIVATE KEY", []byte("SECRET")), "a private key with a password"},
		{"legacy.pem", pem.EncodeToMemory(legacy), "a private key with a password"},
		{"sec1-damaged.pem", block("EC PRIVATE KEY", sec1[:30]), "an EC private key that is damaged"},
		{"parameters.pem", block("EC PARAMETERS", []byte("SECRET")), "damaged or only half written"},
		{"ssh", block("OPENSSH PRIVATE KEY", []byte("SECRET")), "a private key in OpenSSH's format"},
		{"ed25519.pem", pkcs8(t, edKey), "only good for signatures or key agreement"},
		{"request.pem", block("CERTIFICATE REQUEST", []byte("SECRET")), "neither a private key nor a certificate"},
		{"public.gpg", pgpPublic.Bytes(), "a public key"},
		{"password.gpg", pgpPassword.Bytes(), "an OpenPGP private key with a password"},
		{"armored.asc", armored.Bytes(), "armored OpenPGP"},
		// These are used.
		{"rsa.pem", block("RSA PRIVATE KEY", der), ""},
		{"rsa.der", der, ""},
		{"ec.pem", pkcs8(t, ecKey), ""},
		{"ec.jwk", jwk, ""},
		{"sec1.pem", block("EC PRIVATE KEY", sec1), ""},
		{"sec1.der", sec1, ""},
		{"cert.pem", block("CERTIFICATE", cert), ""},
		{"cert.der", cert, ""},
		{"secret.gpg", pgp.Bytes(), ""},
		{".hidden.pem", good, ""},
		{"sub/key.pem", good, ""},
	} {
		stray = append(stray, strayFile{f.name, func(t testing.TB, dir string) { put(t, dir, f.name, f.b) }, f.reason})
	}
	return stray
}

// checkReason looks for what must not be in one: it goes into logs.
func checkReason(t testing.TB, k UnusableKey, want string) {
	t.Helper()
	if !strings.Contains(k.Reason, want) || strings.Contains(k.Reason, "SECRET") || strings.Contains(k.Reason, "\n") {
		t.Errorf("%s: %q, want %q", k.Path, k.Reason, want)
	}
}

// TestKeyDirStrayFiles opens a layer with a key that all kinds of files lie
// beside, one by one and all together.
func TestKeyDirStrayFiles(t *testing.T) {
	alice, stray := newPair(t), strayFiles(t)
	layer, foreign := layerFor(t, alice), layerFor(t, newPair(t))
	all := t.TempDir()
	put(t, all, "zz.pem", alice.private) // the last to be tried
	unusable := 0
	for _, f := range stray {
		t.Run(f.name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, dir, "zz.pem", alice.private)
			f.put(t, dir)
			if err := opens(t, NewKeyDir(dir, nil), layer); err != nil {
				t.Errorf("not opened: %v", err)
			}
			s, err := state(t, dir), opens(t, NewKeyDir(dir, nil), foreign)
			if err == nil {
				t.Fatal("another's layer was opened")
			}
			if f.reason == "" {
				if len(s.Unusable) > 0 || s.Usable == 0 || strings.Contains(err.Error(), "decryption keys:") {
					t.Errorf("%+v, and the error of a layer for another key is %v", s, err)
				}
				return
			}
			if s.Usable != 1 || len(s.Unusable) != 1 || s.Unusable[0].Path != dir+"/"+f.name {
				t.Fatalf("%+v", s)
			}
			checkReason(t, s.Unusable[0], f.reason)
			if want := fmt.Sprintf("; decryption keys: %q is %s", dir+"/"+f.name, s.Unusable[0].Reason); !strings.HasSuffix(err.Error(), want) {
				t.Errorf("%v, want %q", err, want)
			}
		})
		f.put(t, all)
		if f.reason != "" {
			unusable++
		}
	}
	if err := opens(t, NewKeyDir(all, nil), layer); err != nil {
		t.Errorf("not opened among all: %v", err)
	}
	if s := state(t, all); len(s.Unusable) != unusable || !strings.HasSuffix(s.Summary(2), fmt.Sprintf("; %d more can't be used", unusable-2)) {
		t.Errorf("%d are unusable, want %d: %s", len(s.Unusable), unusable, s.Summary(2))
	}
}

// TestKeyDirPath gives paths that are no directory of keys.
func TestKeyDirPath(t *testing.T) {
	fipstest.Refused(t, fipstest.PrivateKey)
	alice := newPair(t)
	layer := layerFor(t, alice)
	dir := t.TempDir()
	key := put(t, dir, "keys/key.pem", alice.private)
	link(t, "nowhere", dir+"/dangling")
	link(t, "keys", dir+"/link")
	link(t, "round", dir+"/round")
	if err := unix.Mkfifo(dir+"/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir+"/empty", 0o700); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"keys": "", "link": "", "keys/key.pem": "",
		"empty":          fmt.Sprintf("%q contains no key", dir+"/empty"),
		"missing":        "missing: it does not exist",
		"dangling":       `is a link to "nowhere", which does not exist`,
		"round":          "a loop of links",
		"fifo":           "not a file but a pipe",
		"keys/key.pem/x": "not readable: not a directory",
	} {
		keys := NewKeyDir(filepath.Join(dir, path), nil)
		err := opens(t, keys, layer)
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
		// The client's key does it.
		if _, err := keys.Unwrap(t.Context(), alice.decrypt(), layer); err != nil {
			t.Errorf("%s, with a key of the client: %v", path, err)
		}
	}

	for _, path := range []string{dir + "/keys", key} {
		if err := os.Chmod(path, 0); err != nil {
			t.Fatal(err)
		}
		states := make(chan KeyDirState)
		go func() {
			if os.Geteuid() == 0 { // go on as another user, in a thread that ends with this goroutine
				runtime.LockOSThread()
				unix.Setfsuid(65534)
			}
			states <- readKeys(path).state
		}()
		s := <-states
		if err := os.Chmod(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if s.Usable != 0 || len(s.Unusable) != 1 {
			t.Fatalf("%s: %+v", path, s)
		}
		checkReason(t, s.Unusable[0], "permission denied")
	}
}

// TestKeyDirLimits has more in the directory than is read.
func TestKeyDirLimits(t *testing.T) {
	fipstest.Refused(t, fipstest.PrivateKey)
	alice := newPair(t)
	layer := layerFor(t, alice)
	found := func(dir string) (s KeyDirState) {
		t.Helper()
		if err := opens(t, NewKeyDir(dir, func(found KeyDirState) { s = found }), layer); err != nil {
			t.Error(err)
		}
		return s
	}
	dir := t.TempDir()
	for i := range maxKeyFiles {
		put(t, dir, fmt.Sprintf("many/%05d", i), nil)
	}
	put(t, dir, "z.pem", alice.private)
	s := found(dir)
	if len(s.Unusable) > maxKeyFiles+1 || !strings.Contains(s.Unusable[0].String(), `/many" is too full: 32768 files are read`) {
		t.Errorf("%d: %s", len(s.Unusable), s.Summary(1))
	}

	dir = t.TempDir()
	put(t, dir, "a.pem", alice.private)
	for i := range 17 {
		if err := os.Truncate(put(t, dir, fmt.Sprintf("big%02d", i), nil), maxKeyFile); err != nil {
			t.Fatal(err)
		}
	}
	put(t, dir, "z.pem", alice.private)
	s = found(dir)
	// What is left out does not keep a smaller file after it from being read.
	if s.Usable != 2 || len(s.Unusable) != 17 {
		t.Fatalf("%d usable: %s", s.Usable, s.Summary(100))
	}
	checkReason(t, s.Unusable[16], "the files before it have 16 MiB")
}

// TestKeyDirChanges adds, removes and replaces keys.
func TestKeyDirChanges(t *testing.T) {
	fipstest.Refused(t, fipstest.PrivateKey)
	alice, bob := newPair(t), newPair(t)
	forAlice, forBob := layerFor(t, alice), layerFor(t, bob)
	dir := t.TempDir()
	var states []KeyDirState
	keys := NewKeyDir(dir, func(s KeyDirState) { states = append(states, s) })
	expect := func(what string, a, b bool) {
		t.Helper()
		for range 2 {
			if errA, errB := opens(t, keys, forAlice), opens(t, keys, forBob); (errA == nil) != a || (errB == nil) != b {
				t.Errorf("%s: %v, %v", what, errA, errB)
			}
		}
	}
	expect("no key", false, false)
	put(t, dir, "key.pem", alice.private)
	expect("added", true, false)
	for range 10 { // within a tick of the kernel's clock, the same size and inode
		put(t, dir, "key.pem", bob.private)
		expect("rewritten", false, true)
		put(t, dir, "key.pem", alice.private)
		expect("rewritten", true, false)
	}
	if err := os.Rename(put(t, t.TempDir(), "key.pem", bob.private), dir+"/key.pem"); err != nil {
		t.Fatal(err)
	}
	expect("replaced", false, true)
	put(t, dir, "README", []byte("hello"))
	expect("with a stray file", false, true)
	if err := os.Remove(dir + "/key.pem"); err != nil {
		t.Fatal(err)
	}
	expect("removed", false, false)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	expect("all removed", false, false)
	if err := opens(t, keys, forAlice); !strings.HasSuffix(err.Error(), fmt.Sprintf("; decryption keys: %q is missing: it does not exist", dir)) {
		t.Error(err)
	}
	put(t, dir, "key.pem", alice.private)
	expect("back", true, false)

	var got []string
	for _, s := range states {
		got = append(got, fmt.Sprintf("%d/%d", s.Usable, len(s.Unusable)))
	}
	if got := strings.Join(got, " "); got != "0/0 1/0 1/1 0/1 0/1 1/0" {
		t.Errorf("the states reported: %s", got)
	}
}

// TestKeyDirKubernetes replaces the files of a volume as the kubelet does, in
// the middle of reading them: two keys that belong together, and one in a
// subdirectory.
func TestKeyDirKubernetes(t *testing.T) {
	fipstest.Refused(t, fipstest.PrivateKey)
	dir := t.TempDir()
	pairs := []pair{newPair(t), newPair(t)}
	generation := func(i int) string {
		name := fmt.Sprintf("..2026_%d", i)
		for _, file := range []string{"a.pem", "b.pem", "sub/c.pem"} {
			put(t, dir, name+"/"+file, pairs[i%2].private)
		}
		return name
	}
	swap := func(i int) {
		name := generation(i)
		link(t, name, dir+"/..data_tmp")
		if err := os.Rename(dir+"/..data_tmp", dir+"/..data"); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(fmt.Sprintf("%s/..2026_%d", dir, i-1)); err != nil {
			t.Error(err)
		}
	}
	swap(0)
	for _, name := range []string{"a.pem", "b.pem", "sub"} {
		link(t, "..data/"+name, dir+"/"+name)
	}
	for i := 1; i <= 50; i++ {
		swapped := make(chan struct{})
		delay := time.Duration(mathrand.IntN(400)) * time.Microsecond
		go func() {
			defer close(swapped)
			time.Sleep(delay)
			swap(i)
		}()
		keys := readKeys(dir)
		<-swapped
		private := keys.Parameters[paramPrivateKeys]
		if len(private) != 3 || len(keys.state.Unusable) > 0 {
			t.Fatalf("%d keys: %s", len(private), keys.state.Summary(9))
		}
		if !bytes.Equal(private[0], private[1]) || !bytes.Equal(private[0], private[2]) {
			t.Fatal("keys of two generations")
		}
		keys.clear()
		if after := readKeys(dir); !bytes.Equal(after.Parameters[paramPrivateKeys][0], pairs[i%2].private) {
			t.Fatal("the key of the generation before is used")
		}
	}
}

// slowWrapper is a PKCS#11 module that does not answer for a while, and returns
// the keys that it sees then.
type slowWrapper struct {
	keywrap.KeyWrapper
	proceed chan struct{}
	saw     chan string
}

func (w slowWrapper) WrapKeys(_ *config.EncryptConfig, private []byte) ([]byte, error) {
	<-w.proceed
	w.saw <- string(private)
	return nil, nil
}

func (w slowWrapper) UnwrapKey(dc *config.DecryptConfig, _ []byte) ([]byte, error) {
	<-w.proceed
	w.saw <- string(dc.Parameters[paramPrivateKeys][0])
	return nil, nil
}

// TestAbandonedKeepsKeys clears keys while an abandoned call still uses them.
func TestAbandonedKeepsKeys(t *testing.T) {
	slow := slowWrapper{proceed: make(chan struct{}), saw: make(chan string)}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	private, key := []byte("layer key"), []byte("private key")
	params := map[string][][]byte{paramPrivateKeys: {key}}
	if _, err := (keyWrapper{slow}).wrap(ctx, nil, private); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	clear(private)
	close(slow.proceed)
	if saw := <-slow.saw; saw != "layer key" {
		t.Errorf("wrapped %q", saw)
	}
	slow.proceed = make(chan struct{})
	if _, err := (keyWrapper{slow}).unwrap(ctx, params, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	clear(key)
	close(slow.proceed)
	if saw := <-slow.saw; saw != "private key" {
		t.Errorf("unwrapped with %q", saw)
	}
}

// TestKeyDirCleared looks at the memory of keys that were used.
func TestKeyDirCleared(t *testing.T) {
	fipstest.Refused(t, fipstest.PrivateKey)
	dir := t.TempDir()
	put(t, dir, "key.pem", newPair(t).private)
	keys, err := NewKeyDir(dir, nil).read(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	key := keys.Parameters[paramPrivateKeys][0]
	keys.clear()
	if len(bytes.Trim(key, "\x00")) > 0 {
		t.Error("the key is still there")
	}
	// One that comes too late is cleared as well.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	proceed, cleared := make(chan struct{}), make(chan []byte)
	await(ctx, func() ([]byte, error) {
		<-proceed
		return []byte("key"), nil
	}, func(b []byte) { cleared <- b })
	close(proceed)
	if got := <-cleared; string(got) != "key" {
		t.Errorf("%q", got)
	}
}

// TestKeyDirHangs has a file system that does not answer.
func TestKeyDirHangs(t *testing.T) {
	fipstest.Refused(t, fipstest.PrivateKey)
	keys := NewKeyDir(t.TempDir(), nil)
	keys.reading <- struct{}{} // as a reader that hangs does
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := keys.State(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if _, err := keys.Unwrap(ctx, Keys{}, layerFor(t, newPair(t))); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), keys.path) {
		t.Error(err)
	}
	// A layer that no private key opens does not need it.
	desc := ocispec.Descriptor{Annotations: map[string]string{annotationKeysPrefix + "provider.nobody": "e30="}}
	if _, err := keys.Unwrap(t.Context(), Keys{}, desc); !errors.Is(err, ErrNoKey) {
		t.Error(err)
	}
	// Nothing that gave up stays behind, as from Prometheus, day after day.
	before := runtime.NumGoroutine()
	done, stop := context.WithCancel(t.Context())
	stop()
	for range 100 {
		if _, err := keys.State(done); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	if n := runtime.NumGoroutine(); n > before+50 {
		t.Errorf("%d goroutines, and %d before", n, before)
	}
	<-keys.reading
}

// BenchmarkKeyDir reads directories of keys, as is done for each layer, and
// unwraps with the last of them, which is what that adds to.
func BenchmarkKeyDir(b *testing.B) {
	alice, other := newPair(b), newPair(b)
	k := NewLayerKey("")
	annotations, err := k.Wrap(b.Context(), alice.encrypt(), nil)
	if err != nil {
		b.Fatal(err)
	}
	k.mac = make([]byte, 32)
	name, value, err := k.PublicOptions()
	if err != nil {
		b.Fatal(err)
	}
	annotations[name] = value
	for _, keys := range []int{1, 10, 100, 1000} {
		dir := b.TempDir()
		for i := range keys - 1 {
			put(b, dir, fmt.Sprintf("%d.pem", i), other.private)
		}
		put(b, dir, "alice.pem", alice.private)
		b.Run(fmt.Sprintf("keys=%d/read", keys), func(b *testing.B) {
			for b.Loop() {
				readKeys(dir).clear()
			}
		})
		b.Run(fmt.Sprintf("keys=%d/read and unwrap", keys), func(b *testing.B) {
			for b.Loop() {
				if _, err := NewKeyDir(dir, nil).Unwrap(b.Context(), Keys{}, ocispec.Descriptor{Annotations: annotations}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// FuzzClassifyKey has files with anything in them.
func FuzzClassifyKey(f *testing.F) {
	fipstest.Refused(f, fipstest.PrivateKey)
	dir := f.TempDir()
	for _, s := range strayFiles(f) {
		s.put(f, dir)
		if info, err := os.Stat(filepath.Join(dir, s.name)); err == nil && info.Mode().IsRegular() && info.Size() <= maxKeyFile {
			b, err := os.ReadFile(filepath.Join(dir, s.name))
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
		}
	}
	f.Add([]byte("pkcs11:\n  uri: pkcs11:token=a;object=b\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		parameter, reason := classifyKey(b)
		if (parameter == "") == (reason == "") {
			t.Errorf("%q and %q", parameter, reason)
		}
	})
}
