package doctor

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/errline"
	"github.com/ctrlplane/pilot/internal/loopback"
	"github.com/ctrlplane/pilot/node/containerd"
)

// Mirror has the settings of the node's mirror. All but Listen may be "".
type Mirror struct {
	Listen     string // HOST:PORT
	Cert, Key  string // of its TLS
	SecretFile string
	HostsDir   string
}

// mirrorCheck returns the check of the mirror, if there is one.
func (e *examination) mirrorCheck() []check {
	if e.Mirror.Listen == "" {
		return nil
	}
	return []check{{StepMirror, []string{StepConfiguration}, 10 * time.Second, e.mirror}}
}

// mirror checks that the mirror answers as its settings say, and that containerd goes to it
// and to nothing else.
func (e *examination) mirror(ctx context.Context) Step {
	m := e.Mirror
	step := Step{Result: OK}
	details := []string{"answers at " + m.Listen}
	for _, c := range []func(context.Context) Step{m.secretFile, m.certificate, m.answers, e.mirrorInContainerd, m.loop} {
		s := c(ctx)
		switch s.Result {
		case Failed:
			return s
		case Warning:
			step.Result = Warning
		}
		if s.Detail != "" {
			details = append(details, s.Detail)
		}
		step.Fix = append(step.Fix, s.Fix...)
	}
	step.Detail = strings.Join(details, "; ")
	return step
}

// secretFile checks that nobody but its owner can have read the secret.
func (m Mirror) secretFile(context.Context) Step {
	if m.SecretFile == "" {
		return Step{}
	}
	info, err := os.Stat(m.SecretFile)
	if err != nil {
		return failed(fmt.Sprintf("mirror-secret-file: %s: pilot makes it when it starts", err), restartPilot...)
	}
	again := append([]string{"rm " + m.SecretFile}, restartPilot...)
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return failed(fmt.Sprintf("%s has mode %04o, so other users may have read the secret", m.SecretFile, mode), again...)
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && owner.Uid != 0 {
		return failed(fmt.Sprintf("%s belongs to user %d, who can read the secret", m.SecretFile, owner.Uid), again...)
	}
	return Step{}
}

// certificate checks that the mirror's certificate is valid, and for the address that it
// listens on.
func (m Mirror) certificate(context.Context) Step {
	if m.Cert == "" {
		return Step{}
	}
	pair, err := certfile.Load(m.Cert, m.Key)
	if err != nil {
		return failed("tls-cert: "+err.Error(), "correct tls-cert and tls-key")
	}
	const replace = "replace tls-cert and tls-key, and tls-client-ca and what clients have of them: no restart is needed"
	cert := pair.Certificate().Leaf
	expires := fmt.Sprintf("%s expires on %s", m.Cert, cert.NotAfter.UTC().Format(time.RFC3339))
	switch left := time.Until(cert.NotAfter); {
	case left <= 0:
		return failed(fmt.Sprintf("%s has expired on %s", m.Cert, cert.NotAfter.UTC().Format(time.RFC3339)), replace)
	case time.Now().Before(cert.NotBefore):
		return failed(fmt.Sprintf("%s is not valid before %s", m.Cert, cert.NotBefore.UTC().Format(time.RFC3339)), replace)
	case left < warnBefore:
		return Step{Result: Warning, Detail: expires, Fix: []string{replace}}
	}
	if host, _, err := net.SplitHostPort(m.Listen); err == nil && !isUnspecified(host) {
		if err := cert.VerifyHostname(host); err != nil {
			return failed(fmt.Sprintf("%s is not for %s, where the mirror listens: %s", m.Cert, host, err), replace)
		}
	}
	return Step{Detail: expires}
}

func isUnspecified(host string) bool {
	ip := net.ParseIP(host)
	return host == "" || ip != nil && ip.IsUnspecified()
}

// answers checks that the mirror, and no other program, answers at its address. It asks
// without a certificate and without the secret, which are not for another program.
func (m Mirror) answers(ctx context.Context) Step {
	var shown []byte
	transport := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{
		// The certificate is compared with the file.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			shown = s.PeerCertificates[0].Raw
			return nil
		},
	}}
	host, port, err := net.SplitHostPort(m.Listen)
	if err != nil {
		return failed(fmt.Sprintf("mirror-listen: %s", err), "correct mirror-listen")
	}
	if isUnspecified(host) {
		host = "127.0.0.1"
	}
	u := url.URL{Scheme: "http", Host: net.JoinHostPort(host, port), Path: "/v2/"}
	if m.Cert != "" {
		u.Scheme = "https"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return failed(fmt.Sprintf("mirror-listen: %s", err), "correct mirror-listen")
	}
	logs := restartPilot[1]
	other := failed(fmt.Sprintf("another program answers at %s in the mirror's place", m.Listen), "ss -ltnp sport = :"+port, logs)
	resp, err := transport.RoundTrip(req)
	if shown != nil {
		pair, loadErr := certfile.Load(m.Cert, m.Key)
		if loadErr == nil && !slices.Equal(shown, pair.Certificate().Certificate[0]) {
			return other
		}
	}
	switch {
	case err != nil && shown != nil:
		return Step{} // it wants a certificate
	case err != nil:
		return failed(fmt.Sprintf("the mirror does not answer at %s: %s", m.Listen, errline.Join(err)), restartPilot...)
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	if resp.StatusCode != http.StatusUnauthorized || !strings.Contains(resp.Header.Get("WWW-Authenticate"), `"pilot mirror"`) {
		return other
	}
	return Step{}
}

// registryHosts are the hosts in a hosts.toml.
type registryHosts struct {
	Server string         `toml:"server"`
	Hosts  map[string]any `toml:"host"`
}

// hostsFiles returns what the directories in containerd's form of certs.d say, by file. A
// file that containerd can't read either is an error.
func hostsFiles(dirs ...string) (map[string]registryHosts, error) {
	found := map[string]registryHosts{}
	var errs []error
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join(dir, "*", "hosts.toml"))
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			var hosts registryHosts
			b, err := os.ReadFile(file)
			if err == nil {
				err = toml.Unmarshal(b, &hosts)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", file, err))
				continue
			}
			found[file] = hosts
		}
	}
	return found, errors.Join(errs...)
}

// is reports whether a URL in a hosts.toml leads to the mirror.
func (m Mirror) is(text string) bool {
	if !strings.Contains(text, "://") {
		text = "https://" + text
	}
	u, err := url.Parse(text)
	host, port, errListen := net.SplitHostPort(m.Listen)
	if err != nil || errListen != nil || u.Port() != port {
		return false
	}
	return u.Hostname() == host || loopback.Is(u.Hostname()) && (loopback.Is(host) || isUnspecified(host))
}

// certsDirs is where CRI in containerd 2.1 and later looks for hosts.toml if its configuration
// names neither a directory nor mirrors. Earlier ones look nowhere then.
var certsDirs = []string{"/etc/containerd/certs.d", "/etc/docker/certs.d"}

// leads reports whether a hosts.toml names the mirror.
func (m Mirror) leads(hosts registryHosts) bool {
	for host := range hosts.Hosts {
		if m.is(host) {
			return true
		}
	}
	return m.is(hosts.Server)
}

// mirrorInContainerd checks that where containerd goes to the mirror it goes nowhere else.
func (e *examination) mirrorInContainerd(context.Context) Step {
	if e.dump == nil {
		return Step{}
	}
	var dirs, unread []string
	mirrors := false
	for _, plugin := range []string{containerd.CRIImages, containerd.CRIV1} {
		if registry, ok := containerd.Plugin(e.dump, plugin)["registry"].(map[string]any); ok {
			path, _ := registry["config_path"].(string)
			dirs = append(dirs, filepath.SplitList(path)...)
			named, _ := registry["mirrors"].(map[string]any)
			mirrors = mirrors || len(named) > 0
		}
	}
	switch {
	case len(dirs) > 0:
	case !mirrors && (e.running.Major > 2 || e.running.Major == 2 && e.running.Minor >= 1):
		dirs = certsDirs
	default:
		unread = certsDirs
	}
	path, _ := containerd.Plugin(e.dump, containerd.TransferService)["config_path"].(string)
	dirs = unique(append(dirs, filepath.SplitList(path)...))
	files, err := hostsFiles(dirs...)
	if err != nil {
		return failed(fmt.Sprintf("containerd ignores a hosts.toml: %s", errline.Join(err)), "correct it: no restart is needed")
	}
	var leading []string
	for file, hosts := range files {
		switch leads := e.Mirror.leads(hosts); {
		case leads && !e.Mirror.is(hosts.Server):
			return failed(fmt.Sprintf("%s names the mirror as a host and not as server: containerd goes to the registry itself for what the mirror refuses, and pulls the encrypted image", file),
				"set server in "+file+" to the mirror's address too: no restart is needed")
		case leads:
			leading = append(leading, file)
		}
	}
	if len(leading) == 0 {
		files, _ = hostsFiles(unread...)
		for _, file := range slices.Sorted(maps.Keys(files)) {
			if e.Mirror.leads(files[file]) {
				return Step{Result: Warning, Detail: fmt.Sprintf("%s leads to it, and containerd's CRI does not read that: its configuration has no config_path, so it pulls encrypted images from the registry", file),
					Fix: []string{fmt.Sprintf("set config_path to %s in %s, in the section registry of CRI's images", filepath.Dir(filepath.Dir(file)), e.running.Config), "systemctl restart " + e.running.Service}}
			}
		}
		return Step{Detail: "no hosts.toml of containerd leads to it"}
	}
	slices.Sort(leading)
	return Step{Detail: "containerd goes there by " + strings.Join(leading, ", ")}
}

// loop checks that the mirror does not lead to itself.
func (m Mirror) loop(context.Context) Step {
	if m.HostsDir == "" {
		return Step{}
	}
	files, err := hostsFiles(m.HostsDir)
	if err != nil {
		return failed(fmt.Sprintf("the mirror ignores a hosts.toml: %s", errline.Join(err)), "correct it, and systemctl restart pilot.service")
	}
	for file, hosts := range files {
		if m.leads(hosts) {
			return failed(fmt.Sprintf("%s leads the mirror to itself: mirror-hosts-dir says how it reaches registries", file),
				"name the registry in "+file+", or another directory in mirror-hosts-dir")
		}
	}
	return Step{}
}
