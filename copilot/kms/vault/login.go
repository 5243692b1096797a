//go:build !no_vault

package vault

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/internal/certfile"
	"github.com/ctrlplane/pilot/internal/regular"
)

// logins are the ways to get a token. One of them is set.
type logins struct {
	// TokenFile holds a token, which is renewed as long as the server allows.
	TokenFile  string           `toml:"token-file"`
	AppRole    *appRoleLogin    `toml:"approle"`
	Kubernetes *kubernetesLogin `toml:"kubernetes"`
	Cert       *certLogin       `toml:"cert"`
}

// The files are read at each login.

type appRoleLogin struct {
	Mount        string `toml:"mount"` // of the auth method: "approle" by default
	RoleID       string `toml:"role-id"`
	SecretIDFile string `toml:"secret-id-file"`
}

type kubernetesLogin struct {
	Mount string `toml:"mount"` // of the auth method: "kubernetes" by default
	Role  string `toml:"role"`
	// JWTFile is a token of the pod's service account: by default, the one
	// that Kubernetes puts into each pod.
	JWTFile string `toml:"jwt-file"`
}

type certLogin struct {
	Mount string `toml:"mount"` // of the auth method: "cert" by default
	Role  string `toml:"role"`  // empty for any that the certificate fits
	// TLSCert and TLSKey are PEM files of the client certificate.
	TLSCert string `toml:"tls-cert"`
	TLSKey  string `toml:"tls-key"`
}

// setLogin sets how v gets its token.
func (v *engine) setLogin(s logins) error {
	var ways int
	for _, set := range []bool{s.TokenFile != "", s.AppRole != nil, s.Kubernetes != nil, s.Cert != nil} {
		if set {
			ways++
		}
	}
	if ways != 1 {
		return errors.New("set one of token-file, approle, kubernetes and cert, to log in with")
	}
	var mount string
	switch {
	case s.TokenFile != "":
		v.tokenFile = s.TokenFile
		return nil
	case s.AppRole != nil:
		l := *s.AppRole
		if l.RoleID == "" || l.SecretIDFile == "" {
			return errors.New("approle needs role-id and secret-id-file")
		}
		mount = cmp.Or(l.Mount, "approle")
		v.login = func() ([]byte, error) {
			secret, err := readSecret("secret-id-file", l.SecretIDFile)
			if err != nil {
				return nil, err
			}
			return json.Marshal(map[string]string{"role_id": l.RoleID, "secret_id": secret})
		}
	case s.Kubernetes != nil:
		l := *s.Kubernetes
		if l.Role == "" {
			return errors.New("kubernetes needs role")
		}
		mount = cmp.Or(l.Mount, "kubernetes")
		file := cmp.Or(l.JWTFile, "/var/run/secrets/kubernetes.io/serviceaccount/token")
		v.login = func() ([]byte, error) {
			jwt, err := readSecret("jwt-file", file)
			if err != nil {
				return nil, err
			}
			return json.Marshal(map[string]string{"role": l.Role, "jwt": jwt})
		}
	case s.Cert != nil:
		l := *s.Cert
		if l.TLSCert == "" || l.TLSKey == "" {
			return errors.New("cert needs tls-cert and tls-key")
		}
		pair, err := certfile.Load(l.TLSCert, l.TLSKey)
		if err != nil {
			return fmt.Errorf("cert: %w", err)
		}
		v.transport.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair.Certificate(), nil }
		mount = cmp.Or(l.Mount, "cert")
		v.login = func() ([]byte, error) { return json.Marshal(map[string]string{"name": l.Role}) }
	}
	if err := checkPath(mount); err != nil {
		return fmt.Errorf("mount = %.100q of the auth method: %w", mount, err)
	}
	v.loginPath = "auth/" + mount + "/login"
	return nil
}

// readSecret reads a line from a small file.
func readSecret(setting, name string) (string, error) {
	b, err := regular.Read(name, 64<<10)
	if err != nil {
		return "", fmt.Errorf("%w: %s: %w", kms.ErrUnavailable, setting, err)
	}
	defer clear(b)
	line := bytes.TrimSpace(b)
	if len(line) == 0 || bytes.ContainsFunc(line, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("%w: %s: %s must hold one line, of printable ASCII", kms.ErrUnavailable, setting, name)
	}
	return string(line), nil
}

// accessToken is what requests are authorized with.
type accessToken struct {
	value string
	since time.Time
	until time.Time // zero if it does not end
}

// currentToken returns the token to send, after a login if there is none, if
// its time is over, or if the server refused it.
func (v *engine) currentToken(ctx context.Context, refused string) (accessToken, error) {
	if v.tokenFile != "" {
		value, err := readSecret("token-file", v.tokenFile)
		return accessToken{value: value, since: time.Now()}, err
	}
	select {
	case v.busy <- struct{}{}:
	case <-ctx.Done():
		return accessToken{}, fmt.Errorf("%w: log in to the Vault at %s: %w", kms.ErrUnavailable, v.address, ctx.Err())
	}
	defer func() { <-v.busy }()
	if t := v.token; t.value != "" && t.value != refused && (t.until.IsZero() || time.Now().Before(t.until)) {
		return t, nil
	}
	now := time.Now()
	body, err := v.login()
	if err != nil {
		return accessToken{}, err
	}
	defer clear(body)
	var answer auth
	if err := v.send(ctx, "", request{path: v.loginPath, body: body}, &answer); err != nil {
		if r, ok := errors.AsType[*refusal](err); ok && r.status < 500 && r.status != 429 {
			r.kind, r.hint = kms.ErrForbidden, "it does not let the broker log in: check the settings of the auth method, and the role there"
		}
		return accessToken{}, err
	}
	if answer.Auth.Token == "" {
		return accessToken{}, fmt.Errorf("the Vault at %s: %w: it answers a login with no token", v.address, kms.ErrUnavailable)
	}
	v.token = accessToken{value: answer.Auth.Token, since: now}
	if lease := answer.lease(); lease > 0 {
		v.token.until = now.Add(lease / 10 * 9)
	}
	return v.token, nil
}

// auth is the answer to a login or a renewal.
type auth struct {
	Auth struct {
		Token string `json:"client_token"`
		Lease int64  `json:"lease_duration"` // seconds
	} `json:"auth"`
}

func (a auth) lease() time.Duration {
	return time.Duration(min(a.Auth.Lease, 365*24*60*60)) * time.Second
}

// keepToken renews the token of the file in the background until v is closed.
func (v *engine) keepToken() {
	ctx, cancel := context.WithCancel(context.Background())
	v.stop, v.stopped = cancel, make(chan struct{})
	go func() {
		defer close(v.stopped)
		retry, wait := time.Minute, time.Duration(0)
		for {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return
			}
			lease, err := v.renewToken(ctx)
			switch {
			case err == nil && lease > 0:
				wait = max(lease/3, time.Second)
				retry = min(wait, time.Minute)
				wait = min(wait, time.Hour) // somebody may replace it by one with less time
			case err == nil:
				wait = time.Hour
			default:
				wait = retry
				if ctx.Err() == nil {
					logrus.WithError(err).WithField("token-file", v.tokenFile).Warn("Vault token not renewed")
				}
			}
		}
	}()
}

// renewToken returns how long the token is good for now, or 0 if it is not of
// the kind that is renewed.
func (v *engine) renewToken(ctx context.Context) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var answer auth
	err := v.do(ctx, request{path: "auth/token/renew-self", body: []byte("{}")}, &answer)
	if _, ok := refused(err, 400); ok {
		return 0, nil // "lease is not renewable"
	}
	return answer.lease(), err
}
