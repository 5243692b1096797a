package kms

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/aws/aws-sdk-go-v2/credentials"
	service "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/kmstest"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/internal/loopback/loopbacktest"
)

// forbiddenIsUnwrap is for a ciphertext that names no key of the account, to
// which moto answers that access is denied.
type forbiddenIsUnwrap struct{ kms.Wrapper }

func (w forbiddenIsUnwrap) Unwrap(ctx context.Context, path string, version int, wrapped []byte) ([]byte, error) {
	b, err := w.Wrapper.Unwrap(ctx, path, version, wrapped)
	if errors.Is(err, kms.ErrForbidden) {
		err = fmt.Errorf("%w: %w", kms.ErrUnwrap, err)
	}
	return b, err
}

// TestAWSKMSRotatesInMoto runs the backend with moto, whose KMS rotates on demand and has other
// errors than local-kms. It does not care whether a key is disabled.
func TestAWSKMSRotatesInMoto(t *testing.T) {
	program := filepath.Join(harness.Tools, "bin/moto_server")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("moto is missing: install it with \"scripts/install-tools.sh %s\"", harness.Tools)
	}
	awsEnvironment(t)
	dir, address := harness.TempDir(t), loopbacktest.FreeAddress(t)
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	harness.Start(t, dir, "moto", exec.Command(program, "-H", host, "-p", port))
	harness.Await(t, "moto", harness.Listening(address))
	url := "http://" + address
	client := service.New(service.Options{Region: "eu-central-1", BaseEndpoint: &url, Credentials: credentials.NewStaticCredentialsProvider("id", "key", "")})
	var keys, ids []string
	for _, alias := range []string{"alias/a", "alias/b"} {
		out, err := client.CreateKey(t.Context(), &service.CreateKeyInput{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.CreateAlias(t.Context(), &service.CreateAliasInput{AliasName: &alias, TargetKeyId: out.KeyMetadata.KeyId}); err != nil {
			t.Fatal(err)
		}
		keys, ids = append(keys, *out.KeyMetadata.Arn), append(ids, *out.KeyMetadata.KeyId)
	}
	w := openAWS(t, url)
	kmstest.CheckWrapper(t, forbiddenIsUnwrap{w}, "alias/a", "alias/b")
	kmstest.CheckWrapper(t, forbiddenIsUnwrap{w}, keys[0], keys[1])
	kmstest.CheckWrapper(t, forbiddenIsUnwrap{w}, ids[0], ids[1])

	wrapped := wrap(t, w, "alias/a", 1)
	if _, err := client.RotateKeyOnDemand(t.Context(), &service.RotateKeyOnDemandInput{KeyId: &ids[0]}); err != nil {
		t.Fatal(err)
	}
	unwrap(t, w, "alias/a", 1, wrapped)
	unwrap(t, w, "alias/a", 1, wrap(t, w, "alias/a", 1))
	kmstest.Refuses(t, "missing alias", w, "alias/missing", wrapped, kms.ErrNotFound)
	kmstest.Refuses(t, "missing key", w, "11111111-2222-3333-4444-555555555555", wrapped, kms.ErrNotFound)
}
