package regular

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTextHasNoByteOrderMark(t *testing.T) {
	name := filepath.Join(t.TempDir(), "file")
	for content, want := range map[string]string{"": "", "a = 1\r\n": "a = 1\r\n", "\ufeffa = 1": "a = 1"} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if b, err := ReadText(name, MaxConfig); err != nil || string(b) != want {
			t.Errorf("%q: %q, %v", content, b, err)
		}
	}
	for _, content := range []string{"\xff\xfea\x00", "\xfe\xff\x00a"} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadText(name, MaxConfig); err == nil || !strings.Contains(err.Error(), "save it as UTF-8") {
			t.Errorf("%q: %v", content, err)
		}
	}
}
