package doctor

import (
	"context"
	"crypto/tls"
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

	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/errline"
	"github.com/ctrlplane/pilot/internal/loopback"
	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// Mirror has the settings of the node's mirror. All may be "".
type Mirror struct {
	Listen     string // HOST:PORT; "": there is no mirror
	Cert, Key  string // of its TLS
	SecretFile string
	HostsDir   string // also for lazy pulling
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

// is reports whether a URL in a hosts.toml leads to the mirror.
func (m Mirror) is(text string) bool {
	u, err := containerd.HostURL(text)
	host, port, errListen := net.SplitHostPort(m.Listen)
	if err != nil || errListen != nil || u.Port() != port {
		return false
	}
	return u.Hostname() == host || loopback.Is(u.Hostname()) && (loopback.Is(host) || isUnspecified(host))
}

// leads reports whether a hosts.toml names the mirror.
func (m Mirror) leads(hosts containerd.RegistryHosts) bool {
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
	files, err := containerd.RegistryFiles(host.Host{}, e.running.HostsDirs(e.dump)...)
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
		if len(e.running.CRIHostsDirs(e.dump)) == 0 {
			files, _ = containerd.RegistryFiles(host.Host{}, containerd.CertsDirs...)
		}
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
	files, err := containerd.RegistryFiles(host.Host{}, m.HostsDir)
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
