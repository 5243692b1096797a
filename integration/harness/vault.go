package harness

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"
)

// VaultServer is a Vault with an engine of each kind, and what its
// administrator does.
type VaultServer struct {
	T       testing.TB
	Dir     string
	URL     string
	Process *Process
	*api.Client
}

func NewVault(t testing.TB) *VaultServer {
	t.Helper()
	v := &VaultServer{T: t, Dir: TempDir(t)}
	v.URL = "unix://" + v.Dir + "/vault.sock"
	v.Start()
	v.Connect(&api.Config{Address: v.URL})
	v.Engines()
	return v
}

// NewOpenBao is NewVault with OpenBao, which keeps its storage in memory.
func NewOpenBao(t testing.TB) *VaultServer {
	t.Helper()
	bao := filepath.Join(Tools, "bin/bao")
	if _, err := os.Stat(bao); err != nil {
		t.Fatalf("OpenBao is missing: install it with \"scripts/install-tools.sh %s\"", Tools)
	}
	v := &VaultServer{T: t, Dir: TempDir(t)}
	v.URL = "unix://" + v.Dir + "/vault.sock"
	conf := Write(t, v.Dir+"/openbao.hcl", fmt.Sprintf("storage \"inmem\" {}\nlistener \"unix\" { address = %q }\nlog_level = \"warn\"\n", v.Dir+"/vault.sock"))
	v.Process = Start(t, v.Dir, "openbao", exec.Command(bao, "server", "-config", conf))
	Await(t, "OpenBao", Reachable(v.Dir+"/vault.sock"))
	Write(t, v.Dir+"/root-token", "") // there is none yet
	v.Connect(&api.Config{Address: v.URL})
	init, err := v.Sys().Init(&api.InitRequest{SecretShares: 1, SecretThreshold: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.Sys().Unseal(init.Keys[0]); err != nil {
		t.Fatal(err)
	}
	Write(t, v.Dir+"/root-token", init.RootToken)
	v.SetToken(init.RootToken)
	v.Engines()
	return v
}

// Start starts the server, with more flags of vault-dev.
func (v *VaultServer) Start(flags ...string) {
	v.T.Helper()
	socket := strings.TrimPrefix(v.URL, "unix://")
	v.Process = Start(v.T, v.Dir, "vault-dev", exec.Command("vault-dev", append([]string{"-dir", v.Dir, "-listen", "unix:" + socket}, flags...)...))
	Await(v.T, "vault-dev", Reachable(socket))
}

func (v *VaultServer) Connect(conf *api.Config) {
	v.T.Helper()
	var err error
	if v.Client, err = api.NewClient(conf); err != nil {
		v.T.Fatal(err)
	}
	v.SetToken(Read(v.T, v.Dir+"/root-token"))
}

func (v *VaultServer) Engines() {
	v.T.Helper()
	v.Write("sys/mounts/secret", `{"type": "kv", "options": {"version": "2"}}`)
	v.Write("sys/mounts/transit", `{"type": "transit"}`)
	// The engine is busy for a moment after it was made.
	Await(v.T, "key-value engine", func() error {
		_, err := v.Logical().Write("secret/config", map[string]any{"max_versions": 0})
		return err
	})
}

func (v *VaultServer) Write(path, body string) *api.Secret {
	v.T.Helper()
	s, err := v.Logical().WriteBytes(path, []byte(body))
	if err != nil {
		v.T.Fatal(err)
	}
	return s
}

// Put writes a new key to a secret, and returns it.
func (v *VaultServer) Put(secret string) []byte {
	v.T.Helper()
	key := make([]byte, 32)
	rand.Read(key)
	v.Write("secret/data/"+secret, fmt.Sprintf(`{"data": {"kek": %q, "owner": "team", "number": 17}}`, base64.StdEncoding.EncodeToString(key)))
	return key
}

// Policy makes the policies of docs/kms.md that begin with those comments, and
// returns their names as JSON.
func (v *VaultServer) Policy(comments ...string) string {
	v.T.Helper()
	doc := Read(v.T, Repo+"/docs/kms.md")
	var names []string
	for _, comment := range comments {
		_, rest, ok := strings.Cut(doc, "```hcl\n# "+comment+"\n")
		hcl, _, _ := strings.Cut(rest, "```")
		if !ok {
			v.T.Fatalf("docs/kms.md has no policy for %s", comment)
		}
		name := strings.ReplaceAll(comment, ", ", "-")
		if err := v.Sys().PutPolicy(name, hcl); err != nil {
			v.T.Fatal(err)
		}
		names = append(names, name)
	}
	b, _ := json.Marshal(names)
	return string(b)
}

// Token returns the settings for a new token with those policies.
func (v *VaultServer) Token(comments ...string) string {
	v.T.Helper()
	s := v.Write("auth/token/create", fmt.Sprintf(`{"policies": %s, "ttl": "1h"}`, v.Policy(comments...)))
	return fmt.Sprintf("token-file = %q\n", Write(v.T, TempDir(v.T)+"/token", s.Auth.ClientToken+"\n"))
}
