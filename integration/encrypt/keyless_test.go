package encrypt

import (
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/ctrlplane/pilot/integration/harness"
)

// gitHubMain are the claims of a GitHub Actions job for a push to main.
var gitHubMain = harness.Claims{
	"sub": "repo:acme/app:environment:production", "repository": "acme/app", "repository_id": "123456", "repository_owner": "acme", "repository_owner_id": "4711",
	"repository_visibility": "public", "ref": "refs/heads/main", "ref_type": "branch", "ref_protected": "true", "environment": "production", "event_name": "push",
	"workflow_ref": "acme/app/.github/workflows/encrypt.yml@refs/heads/main", "job_workflow_ref": "acme/app/.github/workflows/encrypt.yml@refs/heads/main",
	"runner_environment": "github-hosted", "actor": "alice", "run_id": "9876543210", "run_attempt": "1", "sha": strings.Repeat("ab", 20),
}

// gitLabMain are those of a GitLab job for a push to main.
var gitLabMain = harness.Claims{
	"sub": "project_path:acme/app:ref_type:branch:ref:main", "project_id": "20", "project_path": "acme/app", "namespace_id": "72", "namespace_path": "acme",
	"job_project_id": "20", "job_project_path": "acme/app", "ref": "main", "ref_type": "branch", "ref_path": "refs/heads/main", "ref_protected": "true",
	"environment": "production", "environment_protected": "true", "pipeline_source": "push", "pipeline_id": "574", "job_id": "302", "runner_id": 1,
	"runner_environment": "gitlab-hosted", "user_login": "alice", "groups_direct": []string{"acme", "acme/ops"}, "job_config": map[string]string{"url": "https://gitlab.example.com"},
}

// pagesPolicy returns the first policy of each of the pages that say how to encrypt in CI.
func pagesPolicy(t *testing.T) (policy string) {
	t.Helper()
	pages := harness.PagesBelow(t, harness.Repo)
	for _, name := range []string{"docs/ci-github.md", "docs/ci-gitlab.md"} {
		i := slices.IndexFunc(pages[name].Blocks, func(b harness.Block) bool { return b.Arg == "policy" })
		policy += "\n" + pages[name].Blocks[i].Text
	}
	return policy
}

// keyless is a broker that trusts the issuers of CI jobs, and a machine that has no
// certificate for it.
type keyless struct {
	t              *testing.T
	dir, registry  string
	broker         *harness.TLSBroker
	github, gitlab *harness.Issuer
	debian         *harness.Debian
}

func startKeyless(t *testing.T) *keyless {
	k := &keyless{t: t, dir: harness.TempDir(t), github: harness.StartIssuer(t), gitlab: harness.StartIssuer(t)}
	k.broker = harness.NewTLSBroker(t)
	k.broker.Process.Stop(t)
	key := harness.Write(t, k.dir+"/kek", string(bytes.Repeat([]byte{0x5a}, 32)))
	harness.Output(t, k.broker.Command(t, "keys", "import", "--file", key, "team-a"))
	k.append("copilot.toml", fmt.Sprintf("\n[issuers.github]\nurl = %q\naudience = \"127.0.0.1\"\nca = %q\n\n[issuers.gitlab]\nurl = %q\naudience = \"copilot.example.com\"\nca = %q\n",
		k.github.URL, k.github.CA, k.gitlab.URL, k.gitlab.CA))
	k.append("policy.toml", pagesPolicy(t))
	k.broker.Start(t)
	k.registry, _ = harness.StartRegistry(t, k.dir)
	l := harness.NewLayout(t)
	l.Write(k.dir+"/app", "v1", l.Image(harness.LayerKinds[0], false, harness.Arch, harness.NewSecret()))
	ocicrypt := harness.Write(t, k.dir+"/ocicrypt.conf", `{"key-providers": {"pilot": {"cmd": {"path": "`+harness.Bin+`/pilot", "args": ["keyprovider"]}}}}`)
	k.debian = harness.NewDebian(t, k.dir, ocicrypt)
	// The programs read the files of the broker and of the issuers in its root, too.
	for _, file := range []string{k.broker.Dir + "/ca.pem", k.github.CA} {
		harness.Write(t, k.debian.Root+file, harness.Read(t, file))
	}
	return k
}

// append adds text to a file of the broker's.
func (k *keyless) append(name, text string) {
	k.t.Helper()
	file := k.broker.Dir + "/" + name
	harness.Write(k.t, file, harness.Read(k.t, file)+text)
}

// settings are pilot's, in the variables of a job.
func (k *keyless) settings(more ...string) []string {
	return append([]string{"PILOT_CONFIG=/dev/null", "PILOT_BROKER=" + k.broker.URL(), "PILOT_BROKER_CA=" + k.broker.Dir + "/ca.pem", "HOME=" + k.dir}, more...)
}

// gitHubJob returns the environment of a GitHub Actions job.
func (k *keyless) gitHubJob(claims harness.Claims) []string {
	return k.settings(append(k.github.Job(claims), "PILOT_BROKER_TOKEN_SOURCE=github-actions")...)
}

// gitLabJob returns the environment of a GitLab job with a token.
func (k *keyless) gitLabJob(token string) []string {
	return k.settings("PILOT_BROKER_TOKEN_SOURCE=env:COPILOT_TOKEN", "COPILOT_TOKEN="+token)
}

// encrypt encrypts the image in the layout into the registry, with what a job has in its
// environment. No other program is needed.
func (k *keyless) encrypt(env []string) *exec.Cmd {
	cmd := harness.Command(k.t, "ctr-pilot", "images", "encrypt", "--force", "--like", "none", "--recipient", "provider:pilot:team-a", "oci:"+k.dir+"/app:v1", "docker://"+k.registry+"/app:enc")
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, env...)
	return cmd
}

// skopeo is encrypt by skopeo.
func (k *keyless) skopeo(env []string) *exec.Cmd {
	cmd := k.debian.Run("skopeo", "copy", "--dest-tls-verify=false", "--encryption-key", "provider:pilot:team-a", "oci:"+k.dir+"/app:v1", "docker://"+k.registry+"/app:skopeo")
	cmd.Env = append(cmd.Env, env...)
	return cmd
}

// TestKeylessCIEncryptsByItsClaims has jobs of GitHub Actions and GitLab encrypt images, of
// main and of others who try to.
func TestKeylessCIEncryptsByItsClaims(t *testing.T) {
	t.Parallel()
	k := startKeyless(t)
	harness.Output(t, k.encrypt(k.gitHubJob(gitHubMain)))
	harness.Output(t, k.skopeo(k.gitHubJob(gitHubMain)))
	harness.Output(t, k.encrypt(k.gitLabJob(k.gitlab.Token("copilot.example.com", gitLabMain))))
	harness.Output(t, k.skopeo(k.gitLabJob(k.gitlab.Token("copilot.example.com", gitLabMain))))
	// A node decrypts it, by a certificate.
	cert, key := k.broker.Enroll(t, "worker-7")
	decrypt := harness.Command(t, "ctr-pilot", "images", "decrypt", "docker://"+k.registry+"/app:enc", "oci:"+k.dir+"/plain:v1")
	decrypt.Env = append([]string{"PATH=" + os.Getenv("PATH")}, k.settings("PILOT_BROKER_CERT="+cert, "PILOT_BROKER_KEY="+key)...)
	harness.Output(t, decrypt)

	fork := gitHubMain.With(harness.Claims{"sub": "repo:acme/app:pull_request", "ref": "refs/pull/7/merge", "event_name": "pull_request", "environment": nil, "actor": "mallory",
		"workflow_ref": "acme/app/.github/workflows/encrypt.yml@refs/pull/7/merge", "head_ref": "main", "base_ref": "main", "run_id": "666"})
	for name, claims := range map[string]harness.Claims{
		"a fork's pull request":         fork,
		"its pull_request_target":       gitHubMain.With(harness.Claims{"event_name": "pull_request_target"}),
		"a comment":                     gitHubMain.With(harness.Claims{"event_name": "issue_comment"}),
		"another branch":                gitHubMain.With(harness.Claims{"ref": "refs/heads/x", "workflow_ref": "acme/app/.github/workflows/encrypt.yml@refs/heads/x"}),
		"a tag named as the branch":     gitHubMain.With(harness.Claims{"ref": "refs/tags/main", "ref_type": "tag"}),
		"another workflow":              gitHubMain.With(harness.Claims{"workflow_ref": "acme/app/.github/workflows/lint.yml@refs/heads/main"}),
		"another repository":            gitHubMain.With(harness.Claims{"sub": "repo:mallory/app:environment:production", "repository": "mallory/app", "repository_id": "666"}),
		"the name, registered again":    gitHubMain.With(harness.Claims{"repository_id": "666", "repository_owner_id": "666"}),
		"the reusable workflow of acme": gitHubMain.With(harness.Claims{"repository": "mallory/x", "repository_id": "666", "workflow_ref": "mallory/x/.github/workflows/x.yml@refs/heads/main"}),
		"no environment":                gitHubMain.With(harness.Claims{"environment": nil}),
		"an environment in upper case":  gitHubMain.With(harness.Claims{"environment": "PRODUCTION"}),
		"several repositories":          gitHubMain.With(harness.Claims{"repository_id": map[string]string{"x": "123456"}}),
	} {
		t.Run(name, func(t *testing.T) {
			harness.ExpectFailure(t, k.encrypt(k.gitHubJob(claims)), "not allowed", "403")
		})
	}
	for name, claims := range map[string]harness.Claims{
		"a fork's merge request":  gitLabMain.With(harness.Claims{"sub": "project_path:mallory/app:ref_type:branch:ref:main", "project_id": "666", "project_path": "mallory/app", "pipeline_source": "merge_request_event"}),
		"a branch":                gitLabMain.With(harness.Claims{"ref": "x", "ref_path": "refs/heads/x", "ref_protected": "false"}),
		"main, unprotected":       gitLabMain.With(harness.Claims{"ref_protected": "false"}),
		"main, unprotected, bool": gitLabMain.With(harness.Claims{"ref_protected": false}),
		"a trigger":               gitLabMain.With(harness.Claims{"pipeline_source": "trigger"}),
	} {
		t.Run(name, func(t *testing.T) {
			harness.ExpectFailure(t, k.encrypt(k.gitLabJob(k.gitlab.Token("copilot.example.com", claims))), "not allowed", "403")
		})
	}
	// A number and true may be either, in the token and in the policy.
	harness.Output(t, k.encrypt(k.gitLabJob(k.gitlab.Token("copilot.example.com", gitLabMain.With(harness.Claims{"project_id": 20, "ref_protected": true})))))
	harness.ExpectFailure(t, k.skopeo(k.gitHubJob(fork)), "not allowed")
	now := time.Now().Unix()
	for want, token := range map[string]string{
		"audience": k.gitlab.Token("127.0.0.1", gitLabMain),
		"expired":  k.gitlab.Token("copilot.example.com", gitLabMain.With(harness.Claims{"iat": now - 600, "nbf": now - 600, "exp": now - 1})),
		"issuer":   k.gitlab.Token("copilot.example.com", gitLabMain.With(harness.Claims{"iss": "https://gitlab.com"})),
		"verify":   k.github.Token("copilot.example.com", gitLabMain.With(harness.Claims{"iss": k.gitlab.URL})),
	} {
		harness.ExpectFailure(t, k.encrypt(k.gitLabJob(token)), "the broker rejected our credentials (401", want)
	}
	other := append(k.gitHubJob(gitHubMain), "PILOT_BROKER_TOKEN_AUDIENCE=https://github.com/acme")
	harness.ExpectFailure(t, k.encrypt(other), "the broker rejected our credentials (401", "audience")

	// It wraps only.
	harness.ExpectFailure(t, decryptBy(k, k.gitHubJob(gitHubMain)), "not allowed")

	log := harness.Read(t, k.broker.Dir+"/store/audit.log")
	lines := map[string]auditedJob{}
	for text := range strings.Lines(log) {
		var l auditedJob
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Fatal(err)
		}
		if len(text) > 12000 {
			t.Errorf("a line of %d bytes", len(text))
		}
		lines[l.Action+" "+l.Verdict+" "+l.Claims["run_id"]+l.Claims["job_id"]] = l
	}
	main, merge, forked := lines["wrap allowed 9876543210"].Claims, lines["wrap allowed 302"].Claims, lines["export denied 666"]
	if main["repository"] != "acme/app" || main["ref"] != "refs/heads/main" || main["environment"] != "production" || main["run_attempt"] != "1" || main["actor"] != "alice" {
		t.Errorf("GitHub's job in the audit log: %v", main)
	}
	if merge["project_path"] != "acme/app" || merge["pipeline_id"] != "574" || merge["ref_protected"] != "true" {
		t.Errorf("GitLab's job in the audit log: %v", merge)
	}
	if !strings.Contains(forked.Reason, `ref is "refs/pull/7/merge", not "refs/heads/main"`) || forked.Claims["event_name"] != "pull_request" || forked.Claims["actor"] != "mallory" {
		t.Errorf("the fork's job in the audit log: %+v", forked)
	}
	if strings.Contains(log, "eyJhbGci") { // {"alg": fewer letters are in a MAC now and then
		t.Error("a token is in the audit log")
	}
	harness.Output(t, k.broker.Command(t, "audit", "verify"))
}

// auditedJob is a line of the audit log.
type auditedJob struct {
	Action, Verdict, Reason string
	Claims                  map[string]string
}

// decryptBy decrypts what a job has encrypted, with its environment.
func decryptBy(k *keyless, env []string) *exec.Cmd {
	cmd := harness.Command(k.t, "ctr-pilot", "images", "decrypt", "docker://"+k.registry+"/app:enc", "oci:"+k.dir+"/again:v1")
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH")}, env...)
	return cmd
}

// TestKeylessCINeverHasTheKEK watches what the broker answers to a job.
func TestKeylessCINeverHasTheKEK(t *testing.T) {
	t.Parallel()
	k := startKeyless(t)
	target, err := url.Parse(k.broker.URL())
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var answers bytes.Buffer
	var requests []string
	cert, key := k.broker.Enroll(t, "watcher") // only for its TLS
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			mu.Lock()
			defer mu.Unlock()
			requests = append(requests, r.In.Method+" "+r.In.URL.Path)
			r.SetURL(target)
		},
		Transport: &http.Transport{TLSClientConfig: withoutCertificates(k.broker.ClientTLS(t, cert, key))},
		ModifyResponse: func(r *http.Response) error {
			b, err := httputil.DumpResponse(r, true)
			mu.Lock()
			defer mu.Unlock()
			answers.Write(b)
			return err
		},
	}
	server := httptest.NewTLSServer(proxy)
	defer server.Close()
	env := append(k.gitHubJob(gitHubMain), "PILOT_BROKER="+server.URL, "PILOT_BROKER_CA="+certificateFile(t, server))
	harness.Output(t, k.encrypt(env))
	// With this setting it does not even ask for the KEK.
	mu.Lock()
	requests = nil
	mu.Unlock()
	harness.Output(t, k.encrypt(append(env, "PILOT_ANNOTATION_FORMAT=copilot")))
	kek := bytes.Repeat([]byte{0x5a}, 32)
	mu.Lock()
	defer mu.Unlock()
	if !strings.Contains(answers.String(), "wrappedKey") {
		t.Fatalf("nothing was wrapped: %q\n%s", requests, answers.String())
	}
	for _, r := range requests {
		if r != "POST /api/v2/keks/team-a/wrap" {
			t.Errorf("a job that has copilot wrap asks for %s", r)
		}
	}
	for name, form := range map[string]string{"raw": string(kek), "base64": base64.StdEncoding.EncodeToString(kek), "hex": fmt.Sprintf("%x", kek)} {
		if strings.Contains(answers.String(), strings.TrimRight(form, "=")) {
			t.Errorf("the KEK is in the broker's answers, %s", name)
		}
	}
	// A job that asks for it does not get it.
	req, err := http.NewRequest("GET", k.broker.URL()+"/api/v2/keks/team-a/key", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+k.github.Token("127.0.0.1", gitHubMain))
	client := http.Client{Timeout: harness.Timeout, Transport: proxy.Transport}
	for _, path := range []string{"/api/v2/keks/team-a/key", "/api/v1/key/team-a"} {
		req.URL.Path = path
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := httputil.DumpResponse(resp, true)
		resp.Body.Close()
		if resp.StatusCode/100 != 4 || strings.Contains(string(b), base64.StdEncoding.EncodeToString(kek)) || bytes.Contains(b, kek) {
			t.Errorf("%s: %s", path, b)
		}
	}
}

// TestWorkflowsOfThePages runs what the pages have jobs run, once pilot is installed.
func TestWorkflowsOfThePages(t *testing.T) {
	t.Parallel()
	k := startKeyless(t)
	yamlOf := func(page string, v any) {
		t.Helper()
		blocks := harness.PagesBelow(t, harness.Repo)[page].Blocks
		i := slices.IndexFunc(blocks, func(b harness.Block) bool { return b.Language == "yaml" })
		if err := yaml.Unmarshal([]byte(blocks[i].Text), v); err != nil {
			t.Fatal(err)
		}
	}
	run := func(script string, variables map[string]string, plain string, env ...string) {
		t.Helper()
		dir := harness.TempDir(t)
		harness.Output(t, k.debian.Run("skopeo", "copy", "-q", "--dest-tls-verify=false", "oci:"+k.dir+"/app:v1", "docker://"+plain))
		digest := strings.TrimSpace(harness.Output(t, k.debian.Run("skopeo", "inspect", "--tls-verify=false", "--format", "{{.Digest}}", "docker://"+plain)))
		harness.Write(t, dir+"/plain-digest", digest+"\n")
		cmd := harness.Command(t, "bash", "-euxc", strings.ReplaceAll(script, "ghcr.io", k.registry))
		cmd.Dir = dir
		cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "TMPDIR=" + dir}, env...)
		for name, value := range variables {
			switch name {
			case "COPILOT_CA":
				value = harness.Read(t, k.broker.Dir+"/ca.pem")
			case "PILOT_BROKER":
				value = k.broker.URL()
			case "PLAIN":
				value = k.registry + "/acme/app-plain@" + digest
			}
			cmd.Env = append(cmd.Env, name+"="+value)
		}
		if out := harness.CombinedOutput(t, cmd); !strings.Contains(out, "fully encrypted") {
			t.Errorf("%s\n%s", script, out)
		}
	}
	var workflow struct {
		Jobs map[string]struct {
			Env   map[string]string
			Steps []struct{ Name, Run string }
		}
	}
	yamlOf("docs/ci-github.md", &workflow)
	job := workflow.Jobs["encrypt"]
	run(job.Steps[len(job.Steps)-1].Run, job.Env, k.registry+"/acme/app-plain:another", append(k.github.Job(gitHubMain), "GITHUB_SHA=1")...)

	var pipeline map[string]struct {
		Variables    map[string]string
		BeforeScript []string `yaml:"before_script"`
		Script       []string
	}
	yamlOf("docs/ci-gitlab.md", &pipeline)
	gitlab := pipeline["encrypt"]
	gitlab.Variables["COPILOT_CA"] = ""
	// Until the job leaves the directory with the artifacts. Nothing has the tag that build
	// gave the image.
	before := gitlab.BeforeScript[:1+slices.Index(gitlab.BeforeScript, `cd "$(mktemp -d)"`)]
	run(strings.Join(slices.Concat(before, gitlab.Script), "\n"), gitlab.Variables, k.registry+"/acme/app/plain:another",
		"CI_REGISTRY_IMAGE="+k.registry+"/acme/app", "CI_COMMIT_SHA=2", "COPILOT_TOKEN="+k.gitlab.Token("copilot.example.com", gitLabMain))
}

// TestErrorSaysWhatAGitHubJobLacks has GitHub refuse a token, or not answer.
func TestErrorSaysWhatAGitHubJobLacks(t *testing.T) {
	t.Parallel()
	k := startKeyless(t)
	// A broker for CI alone needs no certificates of clients.
	k.broker.Process.Stop(t)
	conf := harness.Read(t, k.broker.Dir+"/copilot.toml")
	harness.Write(t, k.broker.Dir+"/copilot.toml", strings.Replace(conf, "tls-client-ca", "# tls-client-ca", 1))
	k.broker.Start(t)
	const permission = `give the job "permissions: id-token: write"`
	withoutVariables := k.settings("PILOT_BROKER_TOKEN_SOURCE=github-actions")
	harness.ExpectFailure(t, k.encrypt(withoutVariables), "ACTIONS_ID_TOKEN_REQUEST_URL is not set", permission)
	harness.ExpectFailure(t, k.skopeo(withoutVariables), "ACTIONS_ID_TOKEN_REQUEST_URL is not set", permission)
	k.github.AnswerJobs(http.StatusForbidden)
	harness.ExpectFailure(t, k.encrypt(k.gitHubJob(gitHubMain)), "403", permission)
	k.github.AnswerJobs(http.StatusServiceUnavailable)
	harness.ExpectFailure(t, k.encrypt(k.gitHubJob(gitHubMain)), "GitHub gives this job no ID token", "503")
	k.github.AnswerJobs(0)
	harness.Output(t, k.encrypt(k.gitHubJob(gitHubMain)))
	gone := append(k.gitHubJob(gitHubMain), "ACTIONS_ID_TOKEN_REQUEST_URL=https://127.0.0.1:1/job?api-version=2.0")
	harness.ExpectFailure(t, k.encrypt(gone), "get an ID token from GitHub at 127.0.0.1:1", "connection refused")
	harness.ExpectFailure(t, k.encrypt(k.settings("PILOT_BROKER_TOKEN_SOURCE=env:COPILOT_TOKEN")), "COPILOT_TOKEN", "is empty", "id_tokens")
}

// TestDaemonGetsAnotherTokenBeforeItExpires has a pilot that runs for longer than the
// tokens of its job are valid.
func TestDaemonGetsAnotherTokenBeforeItExpires(t *testing.T) {
	t.Parallel()
	k := startKeyless(t)
	dir := harness.TempDir(t)
	serve := exec.Command("pilot", "serve", "--listen", "unix://"+dir+"/s", "--diff-listen", "off", "--admin-listen", "off")
	serve.Env = append([]string{"PATH=" + os.Getenv("PATH")}, k.gitHubJob(gitHubMain)...)
	const lifetime = 16 * time.Second
	k.github.Lifetime(lifetime)
	harness.Start(t, dir, "pilot", serve)
	harness.Await(t, "pilot", harness.Reachable(dir+"/s"))
	conf := harness.Write(t, dir+"/ocicrypt.conf", `{"key-providers": {"pilot": {"grpc": "unix://`+dir+`/s"}}}`)
	begin := time.Now()
	harness.Await(t, "two more tokens, one after the other", func() error {
		harness.Output(t, k.encrypt(k.settings("OCICRYPT_KEYPROVIDER_CONFIG="+conf)))
		if n := k.github.Fetched(); n < 3 {
			time.Sleep(time.Second / 2)
			return fmt.Errorf("%d tokens", n)
		}
		return nil
	})
	if n, most := k.github.Fetched(), 2+int(time.Since(begin)/(lifetime/2)); n > most {
		t.Errorf("%d tokens in %s, want %d at most", n, time.Since(begin), most)
	}
}

// certificateFile returns a file with a server's certificate.
func certificateFile(t *testing.T, s *httptest.Server) string {
	t.Helper()
	return harness.Write(t, harness.TempDir(t)+"/ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
}

// withoutCertificates returns the TLS of a client that shows no certificate.
func withoutCertificates(c *tls.Config) *tls.Config {
	c.Certificates = nil
	return c
}
