package mirror

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	logrustest "github.com/sirupsen/logrus/hooks/test"
)

func TestWarningsAreSummedUp(t *testing.T) {
	hook := logrustest.NewGlobal()
	defer logrus.StandardLogger().ReplaceHooks(logrus.LevelHooks{})
	synctest.Test(t, func(t *testing.T) {
		w := &warnings{}
		expect := func(lines int, message string, count any) {
			t.Helper()
			synctest.Wait()
			all := hook.AllEntries()
			if len(all) != lines {
				t.Fatalf("%d lines, want %d", len(all), lines)
			}
			if last := all[lines-1]; last.Message != message || last.Data["warnings"] != count {
				t.Errorf("%q %v", last.Message, last.Data)
			}
		}
		for i := range 1000 {
			fmt.Fprintf(w, "handshake %d\n", i)
		}
		expect(1, "handshake 0", nil)
		time.Sleep(warningInterval)
		expect(2, "more warnings of this kind", 999)
		if last := hook.LastEntry().Data["last"]; last != "handshake 999" {
			t.Error(last)
		}
		fmt.Fprintln(w, "one more")
		time.Sleep(warningInterval)
		expect(3, "more warnings of this kind", 1)
		time.Sleep(2 * warningInterval)
		fmt.Fprintln(w, "after a quiet minute")
		expect(4, "after a quiet minute", nil)
		time.Sleep(2 * warningInterval)
		expect(4, "after a quiet minute", nil)
	})
}
