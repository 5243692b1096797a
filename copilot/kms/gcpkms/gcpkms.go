//go:build !no_gcpkms

// Package gcpkms wraps with keys of Google Cloud KMS. The build tag no_gcpkms leaves it
// out.
package gcpkms

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	cloudkms "cloud.google.com/go/kms/apiv1"
	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/api/option"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/internal/regular"
)

// Types returns the types of backends that this package has.
func Types() kms.Types { return kms.Types{"gcp-kms": open} }

// backend wraps with symmetric keys of Google Cloud KMS. The path of a key is the
// CryptoKey's resource name. Google rotates it. Its versions are the
// CryptoKeyVersions. Wrapped is "vN:", N being the version, and Google's
// ciphertext, which is bound to the path. What was wrapped before versions were
// distinguished is the ciphertext alone, and has version 1.
type backend struct {
	options []option.ClientOption
	turn    chan struct{} // holds one while a call looks at client
	client  *cloudkms.KeyManagementClient
}

type settings struct {
	Endpoint        string `toml:"endpoint"`         // default: https://cloudkms.googleapis.com; a regional or private one
	CredentialsFile string `toml:"credentials-file"` // default: as the SDK finds them (GOOGLE_APPLICATION_CREDENTIALS, the metadata server)
}

// cryptoKey is what resource names of keys look like, without a version.
var cryptoKey = regexp.MustCompile(`^projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+$`)

// castagnoli is the polynomial of the checksums of a request's and an answer's
// fields.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func open(decode kms.Settings) (kms.Backend, error) {
	var s settings
	if err := decode(&s); err != nil {
		return nil, err
	}
	b := &backend{turn: make(chan struct{}, 1)}
	if s.Endpoint != "" {
		u, err := url.Parse(s.Endpoint)
		if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
			return nil, fmt.Errorf("endpoint = %q: it is not https://HOST or https://HOST:PORT", s.Endpoint)
		}
		port := u.Port()
		if port == "" {
			port = "443"
		}
		b.options = append(b.options, option.WithEndpoint(net.JoinHostPort(u.Hostname(), port)))
	}
	if s.CredentialsFile != "" {
		kind, err := credentialsType(s.CredentialsFile)
		if err != nil {
			return nil, fmt.Errorf("credentials-file: %w", err)
		}
		b.options = append(b.options, option.WithAuthCredentialsFile(kind, s.CredentialsFile))
	}
	return b, nil
}

func credentialsType(name string) (option.CredentialsType, error) {
	b, err := regular.Read(name, regular.MaxConfig)
	if err != nil {
		return "", err
	}
	defer clear(b)
	var c struct{ Type option.CredentialsType }
	if err := json.Unmarshal(b, &c); err != nil {
		return "", fmt.Errorf("%s is not JSON", name)
	}
	switch c.Type {
	case option.ServiceAccount, option.ExternalAccount, option.ImpersonatedServiceAccount, option.AuthorizedUser:
		return c.Type, nil
	}
	return "", fmt.Errorf("%s has no credentials of a type that Google knows", name)
}

func (b *backend) Wrap(ctx context.Context, path string, plaintext []byte) (int, []byte, error) {
	if err := kms.CheckPlaintext(plaintext); err != nil {
		return 0, nil, err
	}
	client, err := b.connect(ctx, path)
	if err != nil {
		return 0, nil, err
	}
	out, err := client.Encrypt(ctx, &kmspb.EncryptRequest{
		Name:                              path,
		Plaintext:                         plaintext,
		PlaintextCrc32C:                   checksum(plaintext),
		AdditionalAuthenticatedData:       []byte(path),
		AdditionalAuthenticatedDataCrc32C: checksum([]byte(path)),
	})
	if err != nil {
		return 0, nil, callError(ctx, path, err, kms.ErrUnavailable)
	}
	if !out.VerifiedPlaintextCrc32C || !out.VerifiedAdditionalAuthenticatedDataCrc32C || out.CiphertextCrc32C.GetValue() != checksum(out.Ciphertext).Value {
		return 0, nil, fmt.Errorf("key %s: %w: changed on the way (CRC32C)", path, kms.ErrUnavailable)
	}
	version, ok := versionOf(path, out.Name)
	if !ok {
		return 0, nil, fmt.Errorf("key %s: %w: it does not say which version it wrapped with, but %.200q", path, kms.ErrUnavailable, out.Name)
	}
	return version, append(versionPrefix(version), out.Ciphertext...), nil
}

// versionOf returns N of PATH/cryptoKeyVersions/N.
func versionOf(path, name string) (int, bool) {
	number, ok := strings.CutPrefix(name, path+"/cryptoKeyVersions/")
	version, err := strconv.ParseInt(number, 10, 32)
	return int(version), ok && err == nil && version > 0
}

func versionPrefix(version int) []byte { return fmt.Appendf(nil, "v%d:", version) }

func (b *backend) Unwrap(ctx context.Context, path string, version int, wrapped []byte) ([]byte, error) {
	ciphertext, ok := bytes.CutPrefix(wrapped, versionPrefix(version))
	if !ok && version != 1 {
		return nil, fmt.Errorf("key %s: %w: it is not what version %d wraps", path, kms.ErrUnwrap, version)
	}
	client, err := b.connect(ctx, path)
	if err != nil {
		return nil, err
	}
	out, err := client.Decrypt(ctx, &kmspb.DecryptRequest{
		Name:                              path,
		Ciphertext:                        ciphertext,
		CiphertextCrc32C:                  checksum(ciphertext),
		AdditionalAuthenticatedData:       []byte(path),
		AdditionalAuthenticatedDataCrc32C: checksum([]byte(path)),
	})
	if err != nil {
		return nil, callError(ctx, path, err, kms.ErrUnwrap)
	}
	if out.PlaintextCrc32C.GetValue() != checksum(out.Plaintext).Value {
		return nil, fmt.Errorf("key %s: %w: changed on the way (CRC32C)", path, kms.ErrUnavailable)
	}
	return out.Plaintext, nil
}

func (b *backend) Close() error {
	b.turn <- struct{}{}
	defer func() { <-b.turn }()
	if b.client == nil {
		return nil
	}
	return b.client.Close()
}

// connect returns the client. It is made with the first call, as that may ask
// the metadata server.
func (b *backend) connect(ctx context.Context, path string) (*cloudkms.KeyManagementClient, error) {
	if !cryptoKey.MatchString(path) {
		return nil, fmt.Errorf("key %q: %w: its path is not projects/…/locations/…/keyRings/…/cryptoKeys/…", path, kms.ErrNotFound)
	}
	late := func() error {
		return fmt.Errorf("key %s: %w: look for credentials: %w", path, kms.ErrUnavailable, context.Cause(ctx))
	}
	select {
	case b.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, late()
	}
	type made struct {
		client *cloudkms.KeyManagementClient
		err    error
	}
	done := make(chan made, 1)
	go func() {
		defer func() { <-b.turn }()
		var err error
		if b.client == nil {
			b.client, err = cloudkms.NewKeyManagementClient(context.Background(), b.options...)
		}
		done <- made{b.client, err}
	}()
	select {
	case m := <-done:
		if m.err != nil {
			return nil, fmt.Errorf("key %s: %w: %w", path, kms.ErrUnavailable, m.err)
		}
		return m.client, nil
	case <-ctx.Done():
		return nil, late()
	}
}

func checksum(b []byte) *wrapperspb.Int64Value {
	return wrapperspb.Int64(int64(crc32.Checksum(b, castagnoli)))
}

// callError says what an error means to our caller. invalid is the error for a request
// whose content Google rejects.
func callError(ctx context.Context, path string, err, invalid error) error {
	sentinel := kms.ErrUnavailable
	switch s, _ := status.FromError(err); s.Code() {
	case codes.NotFound:
		sentinel = kms.ErrNotFound
	case codes.PermissionDenied, codes.Unauthenticated, codes.FailedPrecondition: // the last one if the version is disabled
		sentinel = kms.ErrForbidden
	case codes.InvalidArgument:
		sentinel = invalid
	}
	if ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
		err = fmt.Errorf("%w: %w", err, ctx.Err())
	}
	return fmt.Errorf("key %s: %w: %w", path, sentinel, err)
}
