package main

import (
	"bytes"
	"crypto/rand"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/imgcrypt/v2"
	"github.com/containerd/typeurl/v2"
	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/utils"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/ctrlplane/pilot/internal/fips/fipstest"
	"github.com/ctrlplane/pilot/internal/version"
	"github.com/ctrlplane/pilot/processor"
)

func TestMain(m *testing.M) {
	// The program itself, when a test runs it.
	if os.Getenv("PILOT_DECODER_TEST") != "" || os.Getenv(lingerVariable) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// run is one run of the program as containerd starts it.
type run struct {
	args, env []string
	payload   []byte // nil: no file descriptor 3
	layer     []byte
}

func (r run) do(t *testing.T) (stdout []byte, stderr string, ok bool) {
	t.Helper()
	cmd := exec.Command(os.Args[0], r.args...)
	// With -race a program sleeps for a second before it exits; with -cover it wants to say what was covered.
	cmd.Env = append(r.env, "PILOT_DECODER_TEST=1", "GORACE=atexit_sleep_ms=0", "GOCOVERDIR="+os.Getenv("GOCOVERDIR"))
	cmd.Stdin = bytes.NewReader(r.layer)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if r.payload != nil {
		in, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		go func() {
			w.Write(r.payload)
			w.Close()
		}()
		cmd.ExtraFiles = []*os.File{in}
	}
	err := cmd.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.Bytes(), said.String(), err == nil
}

// payload is what imgcrypt's clients pass.
func payload(t testing.TB, dc *config.DecryptConfig, desc ocispec.Descriptor) []byte {
	t.Helper()
	p, err := typeurl.MarshalAny(&imgcrypt.Payload{DecryptConfig: *dc, Descriptor: desc})
	if err != nil {
		t.Fatal(err)
	}
	b, err := proto.Marshal(&anypb.Any{TypeUrl: p.GetTypeUrl(), Value: p.GetValue()})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func rsaKey(t testing.TB) (public, private []byte) {
	t.Helper()
	public, private, err := utils.CreateRSATestKey(2048, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	return public, private
}

// encrypted returns a random layer, encrypted for a public key.
func encrypted(t testing.TB, size int, public []byte) (plain, layer []byte, desc ocispec.Descriptor) {
	t.Helper()
	plain = make([]byte, size)
	rand.Read(plain)
	var out bytes.Buffer
	desc, err := processor.Encrypt(t.Context(), &out, bytes.NewReader(plain), ocispec.MediaTypeImageLayer, processor.Recipients{Parameters: map[string][][]byte{"pubkeys": {public}}})
	if err != nil {
		t.Fatal(err)
	}
	return plain, out.Bytes(), desc
}

func TestDecrypt(t *testing.T) {
	fipstest.Refused(t, fipstest.JWE)
	public, private := rsaKey(t)
	keys := filepath.Join(t.TempDir(), "keys")
	if err := os.Mkdir(keys, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"key.pem": private, "README": []byte("hello")} {
		if err := os.WriteFile(filepath.Join(keys, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	passed := &config.DecryptConfig{Parameters: map[string][][]byte{"privkeys": {private}, "privkeys-passwords": {nil}}}
	for _, size := range []int{0, 1, 5 << 20} {
		plain, layer, desc := encrypted(t, size, public)
		for name, r := range map[string]run{
			"a key that the client passed":  {payload: payload(t, passed, desc), layer: layer},
			"a key and a missing directory": {payload: payload(t, passed, desc), layer: layer, args: []string{"--decryption-keys-path", keys + "/missing"}},
			"a key of the node":             {payload: payload(t, &config.DecryptConfig{}, desc), layer: layer, args: []string{"--decryption-keys-path", keys}},
		} {
			out, said, ok := r.do(t)
			if !ok || said != "" || !bytes.Equal(out, plain) {
				t.Errorf("%d bytes with %s: %d bytes came out, said %q", size, name, len(out), said)
			}
		}
	}
}

func TestHelp(t *testing.T) {
	version := "pilot-decoder version " + version.Text() + "\n"
	for arg, want := range map[string]string{"--version": version, "version": version, "--help": usage, "-h": usage} {
		if out, said, ok := (run{args: []string{arg}}).do(t); !ok || string(out) != want || said != "" {
			t.Errorf("%s: %q, said %q", arg, out, said)
		}
	}
}

func TestUsageStatus(t *testing.T) {
	for _, arg := range []string{"--key", "x"} {
		cmd := exec.Command(os.Args[0], arg)
		cmd.Env = append(os.Environ(), "PILOT_DECODER_TEST=1", "GOCOVERDIR="+os.Getenv("GOCOVERDIR"))
		if out, _ := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 2 {
			t.Errorf("%s: %s, %s", arg, cmd.ProcessState, out)
		}
	}
}

func TestFailures(t *testing.T) {
	fipstest.Refused(t, fipstest.JWE)
	public, private := rsaKey(t)
	_, other := rsaKey(t)
	with := func(private []byte) *config.DecryptConfig {
		return &config.DecryptConfig{Parameters: map[string][][]byte{"privkeys": {private}, "privkeys-passwords": {nil}}}
	}
	_, layer, desc := encrypted(t, 1<<20, public)
	changed := bytes.Clone(layer)
	changed[0] ^= 1
	forProvider := desc
	forProvider.Annotations = map[string]string{
		"org.opencontainers.image.enc.pubopts":             desc.Annotations["org.opencontainers.image.enc.pubopts"],
		"org.opencontainers.image.enc.keys.provider.pilot": "e30=",
	}
	socket := filepath.Join(t.TempDir(), "s")
	silent, err := net.Listen("unix", socket) // it never says a word
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	conf := filepath.Join(t.TempDir(), "ocicrypt.conf")
	if err := os.WriteFile(conf, []byte(`{"key-providers": {"pilot": {"grpc": "unix://`+socket+`"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	name := "layer " + desc.Digest.String() + ": "
	for title, test := range map[string]struct {
		run  run
		want string
	}{
		"no payload":      {run{layer: layer}, `containerd passed no decryption payload: its client has to pass one, which CRI does with image_decryption.key_model = "node"`},
		"empty payload":   {run{layer: layer, payload: []byte{}}, "containerd passed no decryption payload"},
		"not a payload":   {run{layer: layer, payload: []byte("hello")}, "the decryption payload is not a protobuf Any"},
		"wrong key":       {run{layer: layer, payload: payload(t, with(other), desc)}, name + "no key unwraps the layer key: jwe: "},
		"no key":          {run{layer: layer, payload: payload(t, &config.DecryptConfig{}, desc)}, name + "no key unwraps the layer key: jwe: no private key was given"},
		"no provider":     {run{layer: layer, payload: payload(t, with(private), forProvider)}, name + `no key unwraps the layer key: key provider "pilot" is not configured: name it in the file that $OCICRYPT_KEYPROVIDER_CONFIG points to`},
		"silent provider": {run{layer: layer, payload: payload(t, with(private), forProvider), env: []string{"OCICRYPT_KEYPROVIDER_CONFIG=" + conf}}, name + "unwrap the layer key with provider.pilot: the key provider did not answer in time"},
		"no keys":         {run{layer: layer, payload: payload(t, with(other), desc), args: []string{"--decryption-keys-path", "/nonexistent"}}, `; decryption keys: "/nonexistent" is missing: it does not exist`},
		"no flag":         {run{layer: layer, payload: payload(t, with(private), desc), args: []string{"--key", "x"}}, "flag provided but not defined: -key"},
		"an argument":     {run{layer: layer, payload: payload(t, with(private), desc), args: []string{"x"}}, `unexpected argument "x"`},
		"changed":         {run{layer: changed, payload: payload(t, with(private), desc)}, name + processor.ErrTampered.Error()},
		"cut short":       {run{layer: layer[:len(layer)-1], payload: payload(t, with(private), desc)}, name + processor.ErrTampered.Error()},
		"longer":          {run{layer: append(bytes.Clone(layer), 0), payload: payload(t, with(private), desc)}, name + processor.ErrTampered.Error()},
		"much longer":     {run{layer: append(bytes.Clone(changed), make([]byte, processor.BufferSize)...), payload: payload(t, with(private), desc)}, name + processor.ErrTampered.Error()},
		"nothing":         {run{payload: payload(t, with(private), desc)}, name + processor.ErrTampered.Error()},
	} {
		t.Run(title, func(t *testing.T) {
			t.Parallel() // the silent one takes its time
			start := time.Now()
			out, said, ok := test.run.do(t)
			if ok || !strings.HasPrefix(said, "pilot-decoder: ") || !strings.Contains(said, test.want) || strings.Contains(said, "\n") {
				t.Errorf("said %q, want one line with %q", said, test.want)
			}
			if len(out) > max(len(layer), len(test.run.layer))-processor.BufferSize {
				t.Errorf("%d bytes came out", len(out))
			}
			if took := time.Since(start); took > unwrapTimeout+2*time.Minute {
				t.Errorf("took %s", took)
			}
		})
	}
}
