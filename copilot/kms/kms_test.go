package kms_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/kmstest"
)

func TestOpen(t *testing.T) {
	t.Setenv("AWS_REGION", "")
	t.Setenv("AWS_CONFIG_FILE", "/dev/null")
	for _, test := range []struct{ kind, settings, want string }{
		{"typo", "", "no backend of type"},
		{"aws-kms", `regions = "x"`, "strict"},
		{"aws-kms", "", "give the region"},
		{"aws-kms", `region = "eu-central-1"`, ""},
		{"aws-kms", "region = 'r'\nendpoint = 'http://kms.example.com'", "use https"},
		{"aws-kms", "region = 'r'\nendpoint = 'kms.example.com'", "it is not https://HOST"},
		{"aws-kms", "region = 'r'\nprofile = 'nobody'", "nobody"},
		{"gcp-kms", "", ""},
		{"gcp-kms", `endpoint = "http://127.0.0.1:1"`, "it is not https://HOST"},
		{"gcp-kms", `credentials-file = "/nonexistent"`, "/nonexistent"},
		{"azure-key-vault", "", "give the URL of the vault"},
		{"azure-key-vault", `vault-url = "http://team.vault.azure.net"`, "use https"},
		{"azure-key-vault", "vault-url = 'https://team.vault.azure.net'\nalgorithm = 'RSA1_5'", "RSA1_5"},
		{"azure-key-vault", `vault-url = "https://team.vault.azure.net"`, ""},
	} {
		if test.kind != "typo" && !slices.Contains(kms.Types(), test.kind) {
			continue // left out
		}
		b, err := kms.Open(test.kind, kmstest.Settings(test.settings))
		if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s, %s: %v, want %q", test.kind, test.settings, err, test.want)
		}
		if err == nil {
			b.Close()
		}
	}
}
