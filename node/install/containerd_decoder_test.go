package install

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// TestSettingsOfStreamProcessorsAreTakenOver takes over settings of stream processors.
func TestSettingsOfStreamProcessorsAreTakenOver(t *testing.T) {
	o := host.Host{Root: t.TempDir()}
	for path, text := range map[string]string{
		"/etc/none.conf":   `{"key-providers": {}}`,
		"/etc/theirs.conf": `{"key-providers": {"vault": {"grpc": "x"}}}`,
		"/etc/both.conf":   `{"key-providers": {"vault": {"grpc": "x"}, "pilot": {"grpc": "y"}}}`,
		"/opt/keys/a.pem":  "",
	} {
		name := filepath.Join(o.Root, path)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const tar, gzip = "io.containerd.ocicrypt.decoder.v1.tar", "io.containerd.ocicrypt.decoder.v1.tar.gzip"
	for name, test := range map[string]struct {
		tar, gzip string // of the stream processors
		keys      string
		env       []string // on containerd 1.7 and later
		decoder   []string // on containerd 1.6
		want      string   // the error, on either
	}{
		"containerd's default": {
			"path = 'ctd-decoder'\nargs = ['--decryption-keys-path', '/etc/containerd/ocicrypt/keys']\nenv = ['OCICRYPT_KEYPROVIDER_CONFIG=/etc/missing.conf']", "",
			"", nil, []string{"OCICRYPT_KEYPROVIDER_CONFIG=/etc/pilot/ocicrypt.conf"}, "",
		},
		"keys": {
			"path = '/usr/local/bin/ctd-decoder'\nargs = ['--decryption-keys-path=/opt/keys']", "path = 'ctd-decoder'\nargs = ['--decryption-keys-path', '/opt/keys']",
			"/opt/keys", nil, []string{"OCICRYPT_KEYPROVIDER_CONFIG=/etc/pilot/ocicrypt.conf"}, "",
		},
		"two directories": {
			"path = 'ctd-decoder'\nargs = ['--decryption-keys-path=/opt/keys']", "path = 'ctd-decoder'\nargs = ['--decryption-keys-path=/opt/more']",
			"", nil, nil, "two directories of keys, /opt/keys and /opt/more",
		},
		"other argument": {"path = 'ctd-decoder'\nargs = ['--verbose']", "", "", nil, nil, `has the argument "--verbose"`},
		"no providers":   {"path = 'ctd-decoder'\nenv = ['OCICRYPT_KEYPROVIDER_CONFIG=/etc/none.conf', 'A=b']", "", "", []string{"A=b"}, []string{"A=b", "OCICRYPT_KEYPROVIDER_CONFIG=/etc/pilot/ocicrypt.conf"}, ""},
		"providers with pilot": {
			"path = 'ctd-decoder'\nenv = ['OCICRYPT_KEYPROVIDER_CONFIG=/etc/both.conf']", "",
			"", []string{"OCICRYPT_KEYPROVIDER_CONFIG=/etc/both.conf"}, []string{"OCICRYPT_KEYPROVIDER_CONFIG=/etc/both.conf"}, "",
		},
		"another decoder": {"path = '/usr/bin/other'\nargs = ['--x']", "", "", nil, []string{"OCICRYPT_KEYPROVIDER_CONFIG=/etc/pilot/ocicrypt.conf"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			text := "[stream_processors.'" + tar + "']\n" + test.tar + "\n"
			if test.gzip != "" {
				text += "[stream_processors.'" + gzip + "']\n" + test.gzip + "\n"
			}
			c := &containerd.Instance{Plain: parsed(t, text)}
			c.Config = "/etc/containerd/config.toml"
			keys, env, err := decoderSettings(c, o)
			if test.want != "" {
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("got %v", err)
				}
				return
			}
			if err != nil || keys != test.keys || !slices.Equal(env, test.env) {
				t.Errorf("differ: %q, %q, %v", keys, env, err)
			}
			if name == "another decoder" {
				return
			}
			keys, env, err = takeOver(c, o, tar)
			if err != nil || keys != test.keys || !slices.Equal(env, test.decoder) {
				t.Errorf("decoder: %q, %q, %v", keys, env, err)
			}
		})
	}
	c := &containerd.Instance{Plain: parsed(t, "[stream_processors.'"+tar+"']\npath = 'ctd-decoder'\nenv = ['OCICRYPT_KEYPROVIDER_CONFIG=/etc/theirs.conf']\n")}
	if _, _, err := takeOver(c, o, tar); err == nil || !strings.Contains(err.Error(), `add "pilot"`) {
		t.Errorf("providers without pilot: %v", err)
	}
}

func TestEnvironmentUnitQuotes(t *testing.T) {
	got := string(environmentUnit("/c.toml", []string{`A=b c"d\e%f`}))
	if !strings.Contains(got, `Environment="A=b c\"d\\e%%f"`+"\n") {
		t.Error(got)
	}
}

func parsed(t *testing.T, text string) map[string]any {
	t.Helper()
	var conf map[string]any
	if err := toml.Unmarshal([]byte(text), &conf); err != nil {
		t.Fatal(err)
	}
	return conf
}
