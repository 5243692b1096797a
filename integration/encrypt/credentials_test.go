package encrypt

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// password is that of user ci, and passwordHash is bcrypt's of it.
const (
	password     = "correct horse"
	passwordHash = "$2a$04$y/e7MyQlLphlpqnjumRL3edvN9C6Wpu.lY2W6H74xiUD.fZwBJJkq"
)

// privateRegistry starts a registry that only user ci may use.
func privateRegistry(t testing.TB, dir string) (address string) {
	t.Helper()
	htpasswd := harness.Write(t, dir+"/htpasswd", "ci:"+passwordHash+"\n")
	for range 10 {
		address = loopbacktest.FreeAddress(t)
		conf := harness.Write(t, dir+"/private.yml", fmt.Sprintf(
			"version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: '%s'}\nauth: {htpasswd: {realm: test, path: %s}}\n", dir+"/private", address, htpasswd))
		p := harness.Start(t, dir, "private", exec.Command("docker-registry", "serve", conf))
		for range harness.Timeout / (50 * time.Millisecond) {
			conn, err := net.Dial("tcp", address)
			if err == nil {
				conn.Close()
				return address
			}
			select {
			case <-p.Done: // somebody else took the port
			case <-time.After(50 * time.Millisecond):
				continue
			}
			break
		}
	}
	t.Fatal("the registry does not start")
	return ""
}

// loggedIn returns what "docker login" and "podman login" write.
func loggedIn(registry string) string {
	return fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, registry, base64.StdEncoding.EncodeToString([]byte("ci:"+password)))
}

// TestRegistryCredentials has a registry with passwords, and gives ctr-pilot one in
// each way that there is.
func TestRegistryCredentials(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	_, brokerURL := harness.StartBroker(t, dir+"/broker", "team-a")
	_, ociConf := harness.StartPilot(t, dir+"/ci", brokerURL)
	c := harness.NewNode(t, dir+"/ci", harness.Containerd2(), ociConf, "")
	registry := privateRegistry(t, dir)
	app := registry + "/team/app:"
	l := harness.NewLayout(t)
	harness.Output(t, c.CtrPilot("images", "import", "--no-unpack", "--all-platforms", l.Tar(dir+"/image.tar", app+"plain", l.Image(harness.LayerKinds[1], false, harness.Arch, harness.NewSecret()))))
	harness.Output(t, c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:team-a", app+"plain", app+"1"))

	// A denial by the broker has an exit status of its own, through the daemon.
	nobody := c.CtrPilot("images", "encrypt", "--recipient", "provider:pilot:nobody", app+"plain", app+"x")
	harness.ExpectFailure(t, nobody, "no such KEK")
	if status := nobody.ProcessState.ExitCode(); status != 3 {
		t.Errorf("encrypt for no KEK: exit status %d", status)
	}

	// ways are environments. Each has a home of its own, so that no other credentials are found.
	run := func(env []string, args ...string) *exec.Cmd {
		cmd := c.CtrPilot(args...)
		cmd.Env = append(cmd.Env, "HOME="+dir+"/nobody", "DOCKER_CONFIG=", "REGISTRY_AUTH_FILE=", "XDG_RUNTIME_DIR=", "XDG_CONFIG_HOME=")
		cmd.Env = append(cmd.Env, env...)
		return cmd
	}
	helper := dir + "/helpers/docker-credential-pilottest"
	harness.Write(t, helper, fmt.Sprintf("#!/bin/sh\nread server\n[ \"$1 $server\" = 'get %s' ] || exit 1\necho \"$server\" >>%s/asked\necho '{\"Username\":\"ci\",\"Secret\":%q}'\n", registry, dir, password))
	if err := os.Chmod(helper, 0o755); err != nil {
		t.Fatal(err)
	}
	harness.Write(t, dir+"/docker/config.json", loggedIn(registry))
	harness.Write(t, dir+"/home/.docker/config.json", loggedIn(registry))
	harness.Write(t, dir+"/helped/config.json", fmt.Sprintf(`{"credHelpers": {%q: "pilottest"}}`, registry))
	harness.Write(t, dir+"/auth.json", loggedIn(registry))
	harness.Write(t, dir+"/runtime/containers/auth.json", loggedIn(registry))
	ways := map[string][]string{
		"DOCKER_CONFIG":       {"DOCKER_CONFIG=" + dir + "/docker"},
		"the home directory":  {"HOME=" + dir + "/home"},
		"a credential helper": {"DOCKER_CONFIG=" + dir + "/helped", "PATH=" + dir + "/helpers:" + os.Getenv("PATH")},
		"REGISTRY_AUTH_FILE":  {"REGISTRY_AUTH_FILE=" + dir + "/auth.json"},
		"podman's own":        {"XDG_RUNTIME_DIR=" + dir + "/runtime"},
		"--password-stdin":    nil,
		"--user ci:PASSWORD":  nil,
	}
	for name, env := range ways {
		t.Run(name, func(t *testing.T) {
			do := func(args ...string) *exec.Cmd {
				flags := []string{"--plain-http"}
				switch name {
				case "--password-stdin":
					flags = append(flags, "--user", "ci", "--password-stdin")
				case "--user ci:PASSWORD":
					flags = append(flags, "--user", "ci:"+password)
				}
				cmd := run(env, append(append([]string{"images"}, args...), flags...)...)
				cmd.Stdin = strings.NewReader(password + "\n")
				return cmd
			}
			harness.Output(t, do("push", app+"1"))
			harness.Output(t, c.CtrPilot("images", "remove", "--sync", app+"1"))
			harness.Output(t, do("pull", app+"1"))
			if out := harness.Output(t, do("rewrap", "--registry", app+"1")); !strings.Contains(out, "is up to date") {
				t.Error(out)
			}
			if out := harness.Output(t, do("rewrap", "--registry", "--dry-run", app+"*")); !strings.Contains(out, "1 images: ") {
				t.Error(out)
			}
		})
	}
	if got := harness.Read(t, dir+"/asked"); !strings.Contains(got, registry) {
		t.Errorf("the helper was asked for %q", got)
	}

	// Without credentials, and with those of another user.
	for _, args := range [][]string{{"pull", app + "1"}, {"push", app + "1"}, {"rewrap", "--registry", app + "1"}} {
		args = append(append([]string{"images"}, args...), "--plain-http")
		harness.ExpectFailure(t, run(nil, args...), "no basic auth credentials")
		wrong := run(ways["DOCKER_CONFIG"], append(args, "--user", "ci", "--password-stdin")...)
		wrong.Stdin = strings.NewReader("wrong\n")
		harness.ExpectFailure(t, wrong, "401 Unauthorized") // what the command line says counts
		empty := run(nil, append(args, "--user", "ci", "--password-stdin")...)
		harness.ExpectFailure(t, empty, "standard input has to hold a password")
		if status := empty.ProcessState.ExitCode(); status != 2 {
			t.Errorf("%s: exit status %d", args, status)
		}
		harness.Write(t, dir+"/broken/config.json", "{")
		harness.ExpectFailure(t, run([]string{"DOCKER_CONFIG=" + dir + "/broken"}, args...), "the credentials that Docker or Podman has for "+registry)
		harness.Write(t, dir+"/lost/config.json", fmt.Sprintf(`{"credHelpers": {%q: "pilotlost"}}`, registry))
		harness.ExpectFailure(t, run([]string{"DOCKER_CONFIG=" + dir + "/lost"}, args...), "docker-credential-pilotlost")
	}

	// Each of several images succeeds or fails by itself.
	harness.Output(t, c.CtrPilot("images", "tag", app+"1", app+"2"))
	harness.Output(t, run(ways["DOCKER_CONFIG"], "images", "push", "--plain-http", app+"2"))
	harness.RotateKEK(t, dir+"/broker", "team-a")
	cmd := run(ways["DOCKER_CONFIG"], "images", "rewrap", "--registry", "--plain-http", "--json", app+"1", app+"nothing", app+"2")
	out, err := cmd.Output()
	var results []struct{ Image, Result, Digest, Error string }
	if jsonErr := json.Unmarshal(out, &results); err == nil || jsonErr != nil || len(results) != 3 || cmd.ProcessState.ExitCode() != 1 {
		t.Fatalf("rewrap --json: %v, %v\n%s", err, jsonErr, out)
	}
	for i, want := range []string{"changed", "failed", "changed"} {
		if r := results[i]; r.Result != want || (r.Digest == "") != (want == "failed") || (r.Error == "") == (want == "failed") {
			t.Errorf("%d: %+v, want %s", i, r, want)
		}
	}
	out2 := harness.Output(t, run(ways["DOCKER_CONFIG"], "images", "rewrap", "--registry", "--plain-http", "--json", app+"1"))
	if !strings.Contains(out2, `"result": "upToDate"`) {
		t.Error(out2)
	}

	// The password goes to its registry only: not to a mirror, and not to another
	// registry.
	var mu sync.Mutex
	var shown []string
	stranger := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		shown = append(append(shown, r.Header.Values("Authorization")...), r.Header.Values("X-Secret")...)
		w.Header().Set("WWW-Authenticate", `Basic realm="stranger"`)
		http.Error(w, "no", http.StatusUnauthorized)
	}))
	defer stranger.Close()
	strange := strings.TrimPrefix(stranger.URL, "http://")
	harness.Write(t, dir+"/hosts/"+registry+"/hosts.toml", fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\", \"push\"]\n", registry, strange))
	mirrored := []string{"--hosts-dir", dir + "/hosts"}
	harness.Output(t, run(ways["DOCKER_CONFIG"], append([]string{"images", "pull", app + "1"}, mirrored...)...))
	harness.ExpectFailure(t, run(ways["DOCKER_CONFIG"], append([]string{"images", "push", app + "1"}, mirrored...)...), "are not used, since --hosts-dir leads to "+strange+" too: give --user")
	harness.ExpectFailure(t, run(ways["DOCKER_CONFIG"], "images", "pull", "--plain-http", strange+"/team/app:1"), "no basic auth credentials")

	// Nor to the registry of an image that a flag names, or that the list of tags leads to.
	for _, flag := range []string{"--keys-from", "--all-but-base"} {
		cmd := run(nil, "images", "encrypt", "--plain-http", "--user", "ci:"+password, "--recipient", "provider:pilot:team-a",
			flag, "docker://"+strange+"/base:1", "docker://"+app+"1", "docker://"+app+"x")
		harness.ExpectFailure(t, cmd, "--user is for one registry, and these images are in "+registry+" and "+strange)
	}
	moved := httptest.NewServer(http.RedirectHandler(stranger.URL, http.StatusTemporaryRedirect))
	defer moved.Close()
	from := strings.TrimPrefix(moved.URL, "http://")
	harness.Write(t, dir+"/hosts/"+from+"/hosts.toml", fmt.Sprintf("server = %q\n[host.%[1]q]\n[host.%[1]q.header]\nX-Secret = [%q]\n", moved.URL, password))
	harness.ExpectFailure(t, run(nil, append([]string{"images", "rewrap", "docker://" + from + "/team/app:*"}, mirrored...)...), "401 Unauthorized")
	mu.Lock()
	defer mu.Unlock()
	if len(shown) > 0 {
		t.Errorf("a stranger was shown %q", shown)
	}
}

// TestErrorsOfRegistriesSayWhatToDo has wrong passwords, unknown CAs, and registries that
// speak TLS or do not.
func TestErrorsOfRegistriesSayWhatToDo(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	a := anywhere{t, dir, ""}
	private := privateRegistry(t, dir)
	answer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/forbidden/") {
			w.WriteHeader(http.StatusForbidden)
		}
	})
	plain, secure := httptest.NewServer(answer), httptest.NewTLSServer(answer)
	defer plain.Close()
	defer secure.Close()
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	for name, server := range map[string]string{"plain.example.com": "https://" + plain.Listener.Addr().String(), "secure.example.com": secure.URL} {
		harness.Write(t, dir+"/hosts/"+name+"/hosts.toml", fmt.Sprintf("server = %q\n", server))
	}
	for _, c := range []struct {
		name, want string
		flags      []string
	}{
		{private + "/app:1", "give --user", []string{"--plain-http"}},
		{private + "/app:1", "give --user", []string{"--plain-http", "--user", "ci:wrong"}},
		{plain.Listener.Addr().String() + "/forbidden/app:1", "this user may not do that", []string{"--plain-http"}},
		{"plain.example.com/app:1", "use --plain-http", []string{"--hosts-dir", dir + "/hosts"}},
		{secure.Listener.Addr().String() + "/app:1", "leave --plain-http out", []string{"--plain-http"}},
		{"secure.example.com/app:1", "name the CA that issued the registry's certificate with --tlscacert", []string{"--hosts-dir", dir + "/hosts"}},
	} {
		out := harness.ExpectFailure(t, a.images(append([]string{"layerinfo", "docker://" + c.name}, c.flags...)...), c.want)
		if strings.Count(out, "\n") != 1 || strings.Count(out, "failed to") > 1 || strings.Contains(out, "unexpected status") {
			t.Errorf("%s: %s", c.name, out)
		}
	}
}
