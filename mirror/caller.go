package mirror

import (
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"strings"
)

// SecretHeader is the header that callers may put the mirror's secret into. It can also be
// the password of HTTP's Basic authentication, with any user name.
const SecretHeader = "Pilot-Secret"

// caller is who makes a request.
type caller struct {
	// user and secret are the caller's own credentials for the registry.
	user, secret string
	named        bool // there are such
	// trusted says that the caller is root of this machine: see [Mirror.LazyServer].
	trusted bool
	// password says that the caller has authenticated by password, so it can't send
	// credentials for the registry.
	password bool
}

// mayAsk reports whether credentials for the registry may be asked for.
func (c caller) mayAsk() bool { return !c.password && !c.named }

// identify returns who makes a request, or false if the caller has neither a certificate
// nor the secret.
func (m *Mirror) identify(r *http.Request) (caller, bool) {
	var c caller
	user, password, basic := r.BasicAuth()
	c.trusted = isTrusted(r)
	known := c.trusted || m.hasCertificate(r) || m.isSecret(r.Header.Get(SecretHeader))
	if basic && m.isSecret(password) {
		known, c.password = true, true
	} else if basic {
		c.user, c.secret, c.named = user, password, true
	}
	if s, _ := r.Context().Value(sessionKey{}).(*session); known && s != nil && s.connection != nil {
		s.connection.authenticated()
	}
	return c, known
}

func (m *Mirror) isSecret(text string) bool {
	sum := sha256.Sum256([]byte(text))
	return m.conf.Secret != "" && subtle.ConstantTimeCompare(sum[:], m.secret[:]) == 1
}

// hasCertificate reports whether the connection's certificate is from a CA that is trusted
// now, which may not be when it was made.
func (m *Mirror) hasCertificate(r *http.Request) bool {
	s, _ := r.Context().Value(sessionKey{}).(*session)
	if m.conf.Clients == nil || s == nil || r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return false
	}
	_, err := s.certificate.Verify(m.conf.Clients, r.TLS.PeerCertificates)
	return err == nil
}

// accepted lists how callers can authenticate.
func (m *Mirror) accepted() string {
	var ways []string
	if m.conf.Clients != nil {
		ways = append(ways, "a client certificate of a CA in tls-client-ca")
	}
	if m.conf.Secret != "" {
		ways = append(ways, "the secret in mirror-secret-file, as the password or in the header "+SecretHeader)
	}
	return strings.Join(ways, ", or ")
}

func (m *Mirror) challenge(w http.ResponseWriter) {
	w.Header().Set("WWW-Authenticate", `Basic realm="pilot mirror", charset="UTF-8"`)
}
