//go:build !no_gcpkms

package gcpkms_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/api/option"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/gcpkms"
	"github.com/ctrlplane/pilot/copilot/kms/kmstest"
	"github.com/ctrlplane/pilot/internal/certfile/certtest"
)

// googleKMS is Cloud KMS as its API is documented. It is not the real service.
type googleKMS struct {
	kmspb.UnimplementedKeyManagementServiceServer
	mu       sync.Mutex
	keys     map[string][][]byte // versions, by name
	disabled map[string]bool
	answer   error // instead of another
	hangs    bool  // instead of answering
	corrupt  bool  // answers
	lostCRC  bool
	noName   bool // in answers
}

func (g *googleKMS) begin(ctx context.Context, name string, fields map[*wrapperspb.Int64Value][]byte) ([][]byte, error) {
	g.mu.Lock()
	hangs, answer, disabled := g.hangs, g.answer, g.disabled[name]
	versions, ok := g.keys[name]
	g.mu.Unlock()
	if hangs {
		select {} // not even when its context is done, or its answer would race with the client's deadline
	}
	md, _ := metadata.FromIncomingContext(ctx)
	if auth := md.Get("authorization"); len(auth) != 1 || !strings.HasPrefix(auth[0], "Bearer ") {
		return nil, status.Error(codes.Unauthenticated, "no token")
	}
	for sum, field := range fields {
		if sum == nil || sum.Value != checksum(field).Value {
			return nil, status.Error(codes.InvalidArgument, "checksum")
		}
	}
	switch {
	case answer != nil:
		return nil, answer
	case !ok:
		return nil, status.Errorf(codes.NotFound, "CryptoKey %s not found.", name)
	case disabled:
		return nil, status.Errorf(codes.FailedPrecondition, "%s/cryptoKeyVersions/%d is not enabled, current state is: DISABLED.", name, len(versions))
	}
	return versions, nil
}

func checksum(b []byte) *wrapperspb.Int64Value {
	return wrapperspb.Int64(int64(crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))))
}

func aead(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	gcm, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	return gcm
}

func (g *googleKMS) Encrypt(ctx context.Context, r *kmspb.EncryptRequest) (*kmspb.EncryptResponse, error) {
	versions, err := g.begin(ctx, r.Name, map[*wrapperspb.Int64Value][]byte{r.PlaintextCrc32C: r.Plaintext, r.AdditionalAuthenticatedDataCrc32C: r.AdditionalAuthenticatedData})
	if err != nil {
		return nil, err
	}
	n := len(versions)
	ciphertext := append([]byte{byte(n)}, aead(versions[n-1]).Seal(nil, nil, r.Plaintext, r.AdditionalAuthenticatedData)...)
	sum := checksum(ciphertext)
	if g.corrupt {
		ciphertext[5] ^= 1
	}
	name := fmt.Sprintf("%s/cryptoKeyVersions/%d", r.Name, n)
	if g.noName {
		name = r.Name
	}
	return &kmspb.EncryptResponse{
		Name:                    name,
		Ciphertext:              ciphertext,
		CiphertextCrc32C:        sum,
		VerifiedPlaintextCrc32C: !g.lostCRC, VerifiedAdditionalAuthenticatedDataCrc32C: true,
	}, nil
}

func (g *googleKMS) Decrypt(ctx context.Context, r *kmspb.DecryptRequest) (*kmspb.DecryptResponse, error) {
	versions, err := g.begin(ctx, r.Name, map[*wrapperspb.Int64Value][]byte{r.CiphertextCrc32C: r.Ciphertext, r.AdditionalAuthenticatedDataCrc32C: r.AdditionalAuthenticatedData})
	if err != nil {
		return nil, err
	}
	failed := status.Error(codes.InvalidArgument, "Decryption failed: verify that 'name' refers to the correct CryptoKey.")
	if len(r.Ciphertext) < 1 || r.Ciphertext[0] < 1 || int(r.Ciphertext[0]) > len(versions) {
		return nil, failed
	}
	plaintext, err := aead(versions[r.Ciphertext[0]-1]).Open(nil, nil, r.Ciphertext[1:], r.AdditionalAuthenticatedData)
	if err != nil {
		return nil, failed
	}
	sum := checksum(plaintext)
	if g.corrupt {
		plaintext[0] ^= 1
	}
	return &kmspb.DecryptResponse{Plaintext: plaintext, PlaintextCrc32C: sum}, nil
}

// serviceAccount writes the credentials of one, with which the SDK makes tokens
// by itself.
func serviceAccount(t *testing.T) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(map[string]string{
		"type": "service_account", "project_id": "p", "private_key_id": "1", "client_id": "1",
		"client_email": "copilot@p.iam.gserviceaccount.com", "token_uri": "https://127.0.0.1:1/token",
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})),
	})
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "account.json")
	if err := os.WriteFile(name, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

const googleKeys = "projects/p/locations/europe-west3/keyRings/r/cryptoKeys/"

func TestGCP(t *testing.T) {
	ca := certtest.NewAuthority(t)
	files := ca.Issue(t, certtest.Named("kms"))
	pair, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		t.Fatal(err)
	}
	a, other := sha256.Sum256([]byte("a")), sha256.Sum256([]byte("b"))
	g := &googleKMS{keys: map[string][][]byte{googleKeys + "a": {a[:]}, googleKeys + "b": {other[:]}}, disabled: map[string]bool{}}
	server := grpc.NewServer(grpc.Creds(credentials.NewServerTLSFromCert(&pair)))
	kmspb.RegisterKeyManagementServiceServer(server, g)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve(l)
	t.Cleanup(server.Stop)

	account := serviceAccount(t)
	open := func(address string) kms.Wrapper {
		t.Helper()
		b, err := gcpkms.Types().Open("gcp-kms", kmstest.Settings(fmt.Sprintf("endpoint = 'https://%s'\ncredentials-file = '%s'", address, account)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.Close() })
		gcpkms.AddOption(b, option.WithGRPCDialOption(grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: ca.Pool()}))))
		return b.(kms.Wrapper)
	}
	w := open(l.Addr().String())
	kmstest.CheckWrapper(t, w, googleKeys+"a", googleKeys+"b")

	_, wrapped, err := w.Wrap(t.Context(), googleKeys+"a", kmstest.Secret)
	if err != nil {
		t.Fatal(err)
	}
	g.keys[googleKeys+"a"] = append(g.keys[googleKeys+"a"], bytes.Repeat([]byte("2"), 32))
	// What earlier copilots wrapped says nothing of a version.
	for name, wrapped := range map[string][]byte{"": wrapped, ", without a version": bytes.TrimPrefix(wrapped, []byte("v1:"))} {
		if got, err := w.Unwrap(t.Context(), googleKeys+"a", 1, wrapped); err != nil || !bytes.Equal(got, kmstest.Secret) {
			t.Errorf("unwrap after a rotation%s: %q, %v", name, got, err)
		}
	}
	version, after, err := w.Wrap(t.Context(), googleKeys+"a", kmstest.Secret)
	if err != nil || version != 2 {
		t.Errorf("wrap after a rotation: version %d, %v", version, err)
	}
	if got, err := w.Unwrap(t.Context(), googleKeys+"a", 2, after); err != nil || !bytes.Equal(got, kmstest.Secret) {
		t.Errorf("unwrap with the new version: %q, %v", got, err)
	}
	for _, version := range []int{0, 1, 3} {
		if _, err := w.Unwrap(t.Context(), googleKeys+"a", version, after); !errors.Is(err, kms.ErrUnwrap) {
			t.Errorf("unwrap as version %d: %v", version, err)
		}
	}
	g.noName = true
	if _, _, err := w.Wrap(t.Context(), googleKeys+"a", kmstest.Secret); !errors.Is(err, kms.ErrUnavailable) {
		t.Errorf("wrapped with nobody knows what: %v", err)
	}
	g.noName = false

	kmstest.Refuses(t, "missing", w, googleKeys+"missing", wrapped, kms.ErrNotFound)
	kmstest.Refuses(t, "no name of a key", w, "team-a", wrapped, kms.ErrNotFound)
	kmstest.Refuses(t, "name of a version", w, googleKeys+"a/cryptoKeyVersions/1", wrapped, kms.ErrNotFound)
	g.disabled[googleKeys+"a"] = true
	kmstest.Refuses(t, "disabled", w, googleKeys+"a", wrapped, kms.ErrForbidden)
	g.disabled[googleKeys+"a"] = false
	g.answer = status.Error(codes.PermissionDenied, "Permission 'cloudkms.cryptoKeyVersions.useToEncrypt' denied")
	kmstest.Refuses(t, "forbidden", w, googleKeys+"a", wrapped, kms.ErrForbidden)
	g.answer = status.Error(codes.Internal, "no")
	kmstest.Refuses(t, "internal", w, googleKeys+"a", wrapped, kms.ErrUnavailable)
	g.answer, g.corrupt = nil, true
	kmstest.Refuses(t, "corrupt", w, googleKeys+"a", wrapped, kms.ErrUnavailable)
	g.corrupt, g.lostCRC = false, true
	if _, _, err := w.Wrap(t.Context(), googleKeys+"a", kmstest.Secret); err == nil {
		t.Error("wrapped without a verified checksum")
	}
	g.mu.Lock()
	g.lostCRC, g.hangs = false, true
	g.mu.Unlock()
	kmstest.TimesOut(t, "hangs", w, googleKeys+"a")
	kmstest.Unavailable(t, "down", open(kmstest.ClosedPort(t)), googleKeys+"a")
}

func TestGCPSettings(t *testing.T) {
	for settings, want := range map[string]string{
		"":                                  "",
		`endpoint = "http://127.0.0.1:1"`:   "it is not https://HOST",
		`credentials-file = "/nonexistent"`: "/nonexistent",
	} {
		kmstest.Opens(t, gcpkms.Types(), "gcp-kms", settings, want)
	}
}
