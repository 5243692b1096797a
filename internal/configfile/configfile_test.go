package configfile

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

func TestFilesAreInEtcOnLinuxAndTheUsersOwnElsewhere(t *testing.T) {
	want := "/etc/pilot/pilot.toml"
	if runtime.GOOS != "linux" {
		dir, err := os.UserConfigDir()
		if err != nil {
			t.Fatal(err)
		}
		want = filepath.Join(dir, "pilot", "pilot.toml")
	}
	if got := Default("pilot", "pilot.toml"); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
