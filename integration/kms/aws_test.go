package kms

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	service "github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/awskms"
	"github.com/ctrlplane/pilot/copilot/kms/kmstest"
	"github.com/ctrlplane/pilot/integration/harness"
	"golang.org/x/sys/unix"
)

// localKMS is a KMS with AWS's API. It listens on all addresses, so it has a
// network of its own, and url is forwarded there.
type localKMS struct {
	t   *testing.T
	dir string
	url string
	pid atomic.Int64
}

// The keys of localKMS: alias/a and alias/a2 are one.
const (
	awsARN  = "arn:aws:kms:eu-central-1:111122223333:"
	awsKeyA = "bc436485-5092-42b8-92a3-0aa8b93536dc"
	awsKeyB = "800d5768-3fd7-4edd-a4b8-4c81c3e4c147"
)

func newLocalKMS(t *testing.T) *localKMS {
	t.Helper()
	awsEnvironment(t)
	k := &localKMS{t: t, dir: harness.TempDir(t)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	k.url = "http://" + l.Addr().String()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go k.forward(conn)
		}
	}()
	return k
}

// awsEnvironment has AWS's SDK find credentials, and no configuration.
func awsEnvironment(t *testing.T) {
	t.Helper()
	t.Setenv("AWS_ACCESS_KEY_ID", "id")
	t.Setenv("AWS_SECRET_ACCESS_KEY", strings.Repeat("k", 40))
	t.Setenv("AWS_CONFIG_FILE", "/dev/null")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
}

// start starts it with that many versions of each key, the old ones the
// same each time.
func (k *localKMS) start(versions int) *harness.Process {
	k.t.Helper()
	key := func(id, digit string) string {
		s := "      - Metadata: {KeyId: " + id + "}\n        BackingKeys:\n"
		for v := range versions {
			s += fmt.Sprintf("          - %s%d\n", strings.Repeat(digit, 63), v)
		}
		return s
	}
	seed := harness.Write(k.t, k.dir+"/seed.yaml", "Keys:\n  Symmetric:\n    Aes:\n"+key(awsKeyA, "a")+key(awsKeyB, "b")+
		"Aliases:\n  - {AliasName: alias/a, TargetKeyId: "+awsKeyA+"}\n  - {AliasName: alias/a2, TargetKeyId: "+awsKeyA+"}\n  - {AliasName: alias/b, TargetKeyId: "+awsKeyB+"}\n")
	data, err := os.MkdirTemp(k.dir, "data-")
	if err != nil {
		k.t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--net", "sh", "-ec", "ip link set lo up; exec local-kms")
	cmd.Env = append(os.Environ(), "PORT=8080", "KMS_REGION=eu-central-1", "KMS_ACCOUNT_ID=111122223333", "KMS_DATA_PATH="+data, "KMS_SEED_PATH="+seed)
	p := harness.Start(k.t, k.dir, "local-kms", cmd)
	k.pid.Store(int64(p.Cmd.Process.Pid))
	harness.Await(k.t, "local-kms", func() error {
		conn, err := k.dial()
		if err == nil {
			conn.Close()
		}
		return err
	})
	return p
}

// dial connects to it in its network.
func (k *localKMS) dial() (conn net.Conn, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with this function
		var f *os.File
		if f, err = os.Open(fmt.Sprintf("/proc/%d/ns/net", k.pid.Load())); err != nil {
			return
		}
		defer f.Close()
		if err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err == nil {
			conn, err = net.Dial("tcp", "127.0.0.1:8080")
		}
	}()
	<-done
	return conn, err
}

func (k *localKMS) forward(from net.Conn) {
	defer from.Close()
	to, err := k.dial()
	if err != nil {
		return
	}
	defer to.Close()
	go func() {
		io.Copy(to, from)
		to.Close()
	}()
	io.Copy(from, to)
}

func openAWS(t testing.TB, url string) kms.Wrapper {
	t.Helper()
	b, err := awskms.Types().Open("aws-kms", kmstest.Settings("region = 'eu-central-1'\nendpoint = '"+url+"'"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b.(kms.Wrapper)
}

func TestAWSKMS(t *testing.T) {
	k := newLocalKMS(t)
	w := openAWS(t, k.url)
	kmstest.Refuses(t, "not there yet", w, "alias/a", []byte("wrapped"), kms.ErrUnavailable)
	p := k.start(1)
	kmstest.CheckWrapper(t, w, "alias/a", "alias/b")
	kmstest.CheckWrapper(t, w, awsKeyA, awsKeyB)
	kmstest.CheckWrapper(t, w, awsARN+"key/"+awsKeyA, awsARN+"key/"+awsKeyB)
	kmstest.CheckWrapper(t, w, "alias/a", "alias/a2") // two KEKs, though one key

	wrapped := wrap(t, w, awsARN+"key/"+awsKeyA, 1)
	unwrap(t, w, awsKeyA, 1, wrapped)
	unwrap(t, w, awsKeyA, 1, wrap(t, w, awsARN+"key/"+awsKeyA, 1))
	unwrap(t, w, "alias/a", 1, wrap(t, w, awsARN+"alias/a", 1))

	// What another key of the account wrapped, for the right path: AWS itself
	// would unwrap it.
	client := service.New(service.Options{Region: "eu-central-1", BaseEndpoint: &k.url, Credentials: credentials.NewStaticCredentialsProvider("id", "key", "")})
	context := map[string]string{"copilot-path": "alias/a"}
	forged, err := client.Encrypt(t.Context(), &service.EncryptInput{KeyId: aws.String("alias/b"), Plaintext: kmstest.Secret, EncryptionContext: context})
	if err != nil {
		t.Fatal(err)
	}
	if out, err := client.Decrypt(t.Context(), &service.DecryptInput{CiphertextBlob: forged.CiphertextBlob, EncryptionContext: context}); err != nil || !bytes.Equal(out.Plaintext, kmstest.Secret) {
		t.Errorf("AWS does not find the key by itself: %v", err)
	}
	if got, err := w.Unwrap(t.Context(), "alias/a", 1, forged.CiphertextBlob); !errors.Is(err, kms.ErrUnwrap) {
		t.Errorf("forged: %q, %v", got, err)
	}

	kmstest.Refuses(t, "missing alias", w, "alias/missing", wrapped, kms.ErrNotFound)
	kmstest.Refuses(t, "missing key", w, "11111111-2222-3333-4444-555555555555", wrapped, kms.ErrNotFound)
	if _, err := client.DisableKey(t.Context(), &service.DisableKeyInput{KeyId: aws.String(awsKeyB)}); err != nil {
		t.Fatal(err)
	}
	kmstest.Refuses(t, "disabled", w, "alias/b", wrapped, kms.ErrForbidden)
	if _, err := client.ScheduleKeyDeletion(t.Context(), &service.ScheduleKeyDeletionInput{KeyId: aws.String(awsKeyB), PendingWindowInDays: aws.Int32(7)}); err != nil {
		t.Fatal(err)
	}
	kmstest.Refuses(t, "to be deleted", w, "alias/b", wrapped, kms.ErrForbidden)

	p.Stop(t)
	kmstest.Refuses(t, "down", w, "alias/a", wrapped, kms.ErrUnavailable)
	p = k.start(2)
	unwrap(t, w, awsKeyA, 1, wrapped)
	rotated := wrap(t, w, awsKeyA, 1)
	p.Stop(t)
	k.start(1)
	unwrap(t, w, awsKeyA, 1, wrapped)
	if got, err := w.Unwrap(t.Context(), awsKeyA, 1, rotated); !errors.Is(err, kms.ErrUnwrap) {
		t.Errorf("unwrap of what a version that is not there wrapped: %q, %v", got, err)
	}
}
