package mirror

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
)

// nobody is a user of the machine that is not root.
const nobody = 65534

// TestOtherUsersReadNothing asks as another user of the machine, who has neither a
// certificate nor the secret, for an image that the mirror has just served to root.
func TestOtherUsersReadNothing(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	certs := newCertificates(t)
	secret := harness.NewSecret()
	layout, plain := n.plain(harness.LayerKinds[0], secret)
	layer := layers(t, harness.Read(t, file(layout, plain)))[1]
	if err := os.Chmod(n.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	foreign := certtest.NewAuthority(t).Issue(t, certtest.Named("node"))
	own := filepath.Join(n.dir, "nobody") // what the other user has
	for name, from := range map[string]string{"cert.pem": foreign.Cert, "key.pem": foreign.Key} {
		if err := os.Chown(harness.Write(t, filepath.Join(own, name), harness.Read(t, from)), nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	bySecret := []string{"--mirror-secret-file", n.dir + "/secret"}
	for _, c := range []struct {
		name, scheme string
		pilot, curl  []string
		want         string // the status, 000 for none
	}{
		{"secret", "http", bySecret, []string{"-H", "Pilot-Secret: AAAAAAAAAAAAAAAAAAAAAAAAAA", "-u", "pilot:"}, "401"},
		{"certificate", "https", certs.args(), nil, "000"},
		{"either", "https", append(certs.args(), bySecret...), nil, "401"},
		{"another-ca", "https", append(certs.args(), bySecret...), []string{"--cert", own + "/cert.pem", "--key", own + "/key.pem"}, "000"},
	} {
		n.startWith(n.registry, c.pilot...)
		n.encrypt(layout, "team/app:"+c.name)
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: certs.ca.Pool()}}
		header := http.Header{}
		if c.scheme == "https" {
			pair, err := tls.LoadX509KeyPair(certs.client.Cert, certs.client.Key)
			if err != nil {
				t.Fatal(err)
			}
			transport.TLSClientConfig.Certificates = []tls.Certificate{pair}
		} else {
			header.Set("Pilot-Secret", strings.TrimSpace(harness.Read(t, n.dir+"/secret")))
		}
		var urls []string
		for _, path := range []string{"/v2/", manifestPath("team/app", c.name), manifestPath("team/app", plain), blobPath("team/app", layer), "/v2/team/app/tags/list"} {
			ask(t, transport, http.MethodGet, c.scheme+"://"+n.mirror+path, header).expect(t, c.name+": as root, "+path, http.StatusOK)
			urls = append(urls, c.scheme+"://"+n.mirror+path)
		}
		urls = append(urls, c.scheme+"://"+n.mirror+"/v2/team/app/referrers/"+plain, urls[1]+"?ns="+url.QueryEscape(n.registry))
		for _, method := range []string{"--get", "--head"} {
			cmd := harness.Command(t, "curl", append(append([]string{"-s", "-k", method, "-w", "\nstatus %{http_code}\n"}, c.curl...), urls...)...)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
			out := harness.CombinedOutput(t, cmd)
			if strings.Count(out, "\nstatus "+c.want+"\n") != len(urls) {
				t.Errorf("%s: another user gets\n%s\nand not %s each time", c.name, out, c.want)
			}
			if strings.Contains(out, secret) || strings.Contains(out, plain[7:20]) || strings.Contains(out, layer[7:20]) {
				t.Errorf("%s: another user learns something:\n%s", c.name, out)
			}
		}
		// What would let it in can't be read.
		for _, f := range []string{n.dir + "/secret", certs.client.Key, certs.server.Key} {
			cmd := harness.Command(t, "cat", f)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
			harness.ExpectFailure(t, cmd)
		}
		n.pilot.Stop(t)
	}
}

// TestMirrorListensOnlyWhereCallersAreKnown tries settings that would let anybody in.
func TestMirrorListensOnlyWhereCallersAreKnown(t *testing.T) {
	t.Parallel()
	dir := harness.TempDir(t)
	certs := newCertificates(t)
	open := harness.Write(t, dir+"/open", strings.Repeat("x", 40))
	if err := os.Chmod(open, 0o640); err != nil {
		t.Fatal(err)
	}
	foreign := harness.Write(t, dir+"/foreign", strings.Repeat("x", 40))
	if err := os.Chmod(foreign, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(foreign, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	short := harness.Write(t, dir+"/short", "password")
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--mirror-listen", "127.0.0.1:0"}, "needs mirror-secret-file, or tls-cert"},
		{[]string{"--mirror-listen", "0.0.0.0:0"}, "needs tls-cert, tls-key and tls-client-ca"},
		{[]string{"--mirror-listen", "0.0.0.0:0", "--mirror-secret-file", dir + "/secret"}, "needs tls-cert, tls-key and tls-client-ca"},
		{[]string{"--mirror-listen", "example.com:0", "--mirror-secret-file", dir + "/secret"}, "needs tls-cert, tls-key and tls-client-ca"},
		{[]string{"--mirror-listen", ":5000", "--mirror-secret-file", dir + "/secret", "--insecure-loopback"}, "needs tls-cert, tls-key and tls-client-ca"},
		{[]string{"--mirror-listen", "127.0.0.1:0", "--mirror-secret-file", open}, "other users may have read the secret"},
		{[]string{"--mirror-listen", "127.0.0.1:0", "--mirror-secret-file", foreign}, "belongs to user 65534"},
		{[]string{"--mirror-listen", "127.0.0.1:0", "--mirror-secret-file", short}, "a secret needs 20"},
		{[]string{"--mirror-listen", "127.0.0.1:0", "--mirror-secret-file", dir}, "a directory"},
		{[]string{"--mirror-listen", "unix:///run/x.sock", "--mirror-secret-file", dir + "/secret"}, "neither HOST:PORT nor off"},
		{[]string{"--mirror-listen", "127.0.0.1:0", "--mirror-secret-file", dir + "/secret", "--mirror-upstream", "https://registry.example.com"}, "is not a registry"},
		{[]string{"--mirror-listen", "127.0.0.1:0", "--mirror-secret-file", dir + "/secret", "--mirror-allowed-upstreams", "https://registry.example.com"}, "neither a registry nor a pattern"},
		{append([]string{"--mirror-listen", "127.0.0.1:0"}, certs.args()[:4]...), "must be used together"},
		{nil, "--mirror-listen HOST:PORT is missing"},
	} {
		harness.ExpectFailure(t, harness.Command(t, "pilot", append([]string{"mirror", "--config", "/dev/null", "--broker", "unix://" + dir + "/none.sock"}, c.args...)...), c.want)
	}
}

// withUsers puts a proxy before a registry that wants a user's password for all but one
// repository, and counts what each user gets.
func withUsers(t testing.TB, registry string) (address string, served func() map[string]int) {
	t.Helper()
	var mu sync.Mutex
	counts := map[string]int{}
	forward := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(&url.URL{Scheme: "http", Host: registry})
		r.Out.Host = r.In.Host
	}}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, password, _ := r.BasicAuth()
		mu.Lock()
		counts[user]++
		mu.Unlock()
		if password != "password of "+user || user == "" {
			w.Header().Set("WWW-Authenticate", `Basic realm="registry"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		if user == "guest" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		forward.ServeHTTP(w, r)
	}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://"), func() map[string]int {
		mu.Lock()
		defer mu.Unlock()
		return counts
	}
}

// TestCallersGetWhatTheirCredentialsMayRead has a registry that knows users. What the
// mirror remembers of an image that one of them has pulled is for no other.
func TestCallersGetWhatTheirCredentialsMayRead(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	upstream, _ := withUsers(t, n.registry)
	n.start()
	secret := harness.NewSecret()
	layout, plain := n.plain(harness.LayerKinds[0], secret)
	layer := layers(t, harness.Read(t, file(layout, plain)))[1]
	n.encrypt(layout, "team/app:enc")
	n.pilot.Stop(t)
	n.startWith(upstream, "--mirror-secret-file", n.dir+"/secret")
	as := func(user, password string) http.Header {
		h := http.Header{"Pilot-Secret": {n.secret}}
		if user != "" {
			h.Set("Authorization", "Basic "+basic(user, password))
		}
		return h
	}
	paths := []string{manifestPath("team/app", "enc"), manifestPath("team/app", plain), blobPath("team/app", layer), "/v2/team/app/tags/list"}
	all := func(what string, header http.Header, status int) {
		t.Helper()
		for _, path := range paths {
			for _, method := range []string{http.MethodGet, http.MethodHead} {
				r := n.request(method, path, header)
				r.expect(t, fmt.Sprintf("%s: %s %s", what, method, path), status)
				if strings.Contains(r.body, secret) != (status == http.StatusOK && method == http.MethodGet && path == paths[2]) {
					t.Errorf("%s: %s %s: %s", what, method, path, r.body)
				}
				if challenged := r.header.Get("WWW-Authenticate") != ""; challenged != (status == http.StatusUnauthorized) {
					t.Errorf("%s: %s %s: challenged: %v", what, method, path, challenged)
				}
			}
		}
	}
	all("before, without credentials", as("", ""), http.StatusUnauthorized)
	all("a user", as("alice", "password of alice"), http.StatusOK)
	all("no credentials", as("", ""), http.StatusUnauthorized)
	all("a wrong password", as("alice", "password of bob"), http.StatusUnauthorized)
	all("a user without right", as("guest", "password of guest"), http.StatusForbidden)
	all("another user", as("bob", "password of bob"), http.StatusOK)
	// Here the password is the mirror's, so a challenge would be taken for its refusal.
	all("the secret as password", http.Header{"Authorization": {"Basic " + basic("pilot", n.secret)}}, http.StatusForbidden)
	// The right password does not replace the secret.
	all("no secret", http.Header{"Authorization": {"Basic " + basic("alice", "password of alice")}}, http.StatusUnauthorized)

	// The mirror's own credentials are for callers that send none.
	n.pilot.Stop(t)
	harness.Write(t, n.dir+"/docker/config.json", fmt.Sprintf(`{"auths": {"%s": {"auth": "%s"}}}`, upstream, basic("mirror", "password of mirror")))
	n.env = []string{"DOCKER_CONFIG=" + n.dir + "/docker"}
	n.startWith(upstream, "--mirror-secret-file", n.dir+"/secret")
	all("the mirror's own", as("", ""), http.StatusOK)
	all("the secret as password, the mirror's own", http.Header{"Authorization": {"Basic " + basic("pilot", n.secret)}}, http.StatusOK)
	all("a user without right, the mirror's own", as("guest", "password of guest"), http.StatusForbidden)
}
