package ocicryptclient

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containers/ocicrypt/config"
	protocol "github.com/containers/ocicrypt/keywrap/keyprovider"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/processor"
)

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	return file
}

// script returns the file of an executable.
func script(t *testing.T, body string) string {
	t.Helper()
	return writeFile(t, "provider", "#!/bin/sh\n"+body+"\n")
}

// TestRequestsAreOcicrypts compares what a key provider is sent with what ocicrypt sends.
func TestRequestsAreOcicrypts(t *testing.T) {
	file := script(t, `cat >"$0.seen"; echo '{"keywrapresults":{"annotation":"d3JhcHBlZA=="},"keyunwrapresults":{"optsdata":"a2V5"}}'`)
	p := executable(t, file)
	for _, test := range []struct {
		call   func() ([]byte, error)
		want   string
		theirs protocol.KeyProviderKeyWrapProtocolInput
	}{
		{func() ([]byte, error) { return p.WrapKey(t.Context(), [][]byte{[]byte("team-a")}, []byte("key")) }, "wrapped", protocol.KeyProviderKeyWrapProtocolInput{
			Operation: protocol.OpKeyWrap, KeyWrapParams: protocol.KeyWrapParams{Ec: &config.EncryptConfig{Parameters: map[string][][]byte{"p": {[]byte("team-a")}}}, OptsData: []byte("key")}}},
		{func() ([]byte, error) { return p.UnwrapKey(t.Context(), nil, []byte("{}")) }, "key", protocol.KeyProviderKeyWrapProtocolInput{
			Operation: protocol.OpKeyUnwrap, KeyUnwrapParams: protocol.KeyUnwrapParams{Dc: &config.DecryptConfig{}, Annotation: []byte("{}")}}},
		{func() ([]byte, error) { return p.UnwrapKey(t.Context(), [][]byte{[]byte("team-a")}, []byte("{}")) }, "key", protocol.KeyProviderKeyWrapProtocolInput{
			Operation: protocol.OpKeyUnwrap, KeyUnwrapParams: protocol.KeyUnwrapParams{Dc: &config.DecryptConfig{Parameters: map[string][][]byte{"p": {[]byte("team-a")}}}, Annotation: []byte("{}")}}},
	} {
		if out, err := test.call(); err != nil || string(out) != test.want {
			t.Errorf("%q, %v", out, err)
		}
		ours, err := os.ReadFile(file + ".seen")
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := json.Marshal(test.theirs)
		if err != nil || string(ours) != string(theirs) {
			t.Errorf("%s\nwant %s, %v", ours, theirs, err)
		}
	}
}

func TestExecutableDenies(t *testing.T) {
	if _, err := executable(t, "/bin/sh", "-c", "exit "+strconv.Itoa(exit.Denied)).UnwrapKey(t.Context(), nil, nil); !errors.Is(err, processor.ErrDenied) {
		t.Errorf("%v", err)
	}
}

// TestErrorsOfConfiguration uses key providers whose configuration or answers make no
// sense. Their errors are those of layers that need them.
func TestErrorsOfConfiguration(t *testing.T) {
	garbled := script(t, `echo '{"keyunwrapresults": "a secret"}'`)
	conf := writeFile(t, "ocicrypt.conf", `{"key-providers": {"garbled": {"cmd": {"path": "`+garbled+`"}}, "empty": {}, "nowhere": {"grpc": "nowhere"}, "grpc": {"grpc": "localhost:1"}}}`)
	providers, err := FromFile(conf, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"garbled": "provider.garbled: its answer is not the JSON of ocicrypt's key provider protocol",
		"empty":   "ocicrypt.conf: it has neither cmd nor grpc",
		"nowhere": `ocicrypt.conf: grpc "nowhere" is not unix:///PATH or HOST:PORT`,
		"grpc":    "ocicrypt.conf: this program calls no key provider over gRPC",
	} {
		desc := ocispec.Descriptor{Annotations: map[string]string{"org.opencontainers.image.enc.keys.provider." + name: "e30="}}
		_, err := processor.Unwrap(t.Context(), processor.Keys{Providers: providers}, desc)
		if !errors.Is(err, processor.ErrNoKey) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	for _, file := range []string{garbled, filepath.Join(t.TempDir(), "nowhere")} {
		if _, err := FromFile(file, nil); err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: %v", file, err)
		}
		t.Setenv("OCICRYPT_KEYPROVIDER_CONFIG", file)
		if _, err := FromEnvironment(nil); err == nil || !strings.Contains(err.Error(), file) {
			t.Errorf("%s in the environment: %v", file, err)
		}
	}
	t.Setenv("OCICRYPT_KEYPROVIDER_CONFIG", conf)
	if providers, err := FromEnvironment(nil); err != nil || len(providers) != 4 {
		t.Errorf("%v, %v", providers, err)
	}
	t.Setenv("OCICRYPT_KEYPROVIDER_CONFIG", "")
	if providers, err := FromEnvironment(nil); err != nil || len(providers) != 0 {
		t.Errorf("%v, %v", providers, err)
	}
}
