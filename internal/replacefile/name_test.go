package replacefile

import (
	"os"
	"path/filepath"
	"testing"
)

func TestNameReplacesAFileThatIsOpen(t *testing.T) {
	dir := t.TempDir()
	name, temporary := filepath.Join(dir, "file"), filepath.Join(dir, "new")
	for file, text := range map[string]string{name: "old", temporary: "new"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	open, err := os.OpenInRoot(dir, "file")
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if err := Name(temporary, name); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(name); err != nil || string(b) != "new" {
		t.Errorf("%q, %v", b, err)
	}
	old := make([]byte, 3)
	if _, err := open.Read(old); err != nil || string(old) != "old" {
		t.Errorf("who has it open reads %q, %v", old, err)
	}
}
