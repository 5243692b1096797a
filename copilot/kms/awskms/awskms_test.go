//go:build !no_awskms

package awskms_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/awskms"
	"github.com/ctrlplane/pilot/copilot/kms/kmstest"
)

// TestAWSErrors has AWS's documented errors answered. What works is tested with
// a KMS in integration/kms.
func TestAWSErrors(t *testing.T) {
	t.Setenv("AWS_ACCESS_KEY_ID", "id")
	t.Setenv("AWS_SECRET_ACCESS_KEY", strings.Repeat("k", 40))
	t.Setenv("AWS_CONFIG_FILE", "/dev/null")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
	open := func(endpoint string) kms.Wrapper {
		t.Helper()
		b, err := awskms.Types().Open("aws-kms", kmstest.Settings("region = 'eu-central-1'\nendpoint = '"+endpoint+"'"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.Close() })
		return b.(kms.Wrapper)
	}
	for _, test := range []struct {
		code string
		want error
	}{
		{"NotFoundException", kms.ErrNotFound},
		{"AccessDeniedException", kms.ErrForbidden},
		{"ExpiredTokenException", kms.ErrForbidden},
		{"DisabledException", kms.ErrForbidden},
		{"KMSInvalidStateException", kms.ErrForbidden},
		{"IncorrectKeyException", kms.ErrUnwrap},
		{"InvalidCiphertextException", kms.ErrUnwrap},
		{"KeyUnavailableException", kms.ErrUnavailable},
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/x-amz-json-1.1")
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprintf(w, `{"__type": %q, "message": "no"}`, test.code)
		}))
		kmstest.Refuses(t, test.code, open(server.URL), "alias/team-a", []byte("wrapped"), test.want)
		server.Close()
	}

	release := make(chan struct{})
	hangs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		<-release
	}))
	defer hangs.Close()
	defer close(release)
	kmstest.TimesOut(t, "hangs", open(hangs.URL), "alias/team-a")
	down := open("http://" + kmstest.ClosedPort(t))
	kmstest.Unavailable(t, "down", down, "alias/team-a")
	kmstest.Refuses(t, "down", down, "alias/team-a", []byte("wrapped"), kms.ErrUnavailable)
}

func TestAWSSettings(t *testing.T) {
	t.Setenv("AWS_REGION", "")
	t.Setenv("AWS_CONFIG_FILE", "/dev/null")
	for settings, want := range map[string]string{
		`regions = "x"`:           "strict",
		"":                        "give the region",
		`region = "eu-central-1"`: "",
		"region = 'r'\nendpoint = 'http://kms.example.com'": "use https",
		"region = 'r'\nendpoint = 'kms.example.com'":        "it is not https://HOST",
		"region = 'r'\nprofile = 'nobody'":                  "nobody",
	} {
		kmstest.Opens(t, awskms.Types(), "aws-kms", settings, want)
	}
}
