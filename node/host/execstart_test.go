package host

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestExecStartIsExpandedAsBySystemd reads commands as systemd does: TestNodeUnits compares them with
// what systemd makes of them.
func TestExecStartIsExpandedAsBySystemd(t *testing.T) {
	for _, test := range []struct {
		unit string
		want []string
		err  string
	}{
		{"ExecStart=/usr/bin/containerd", []string{"/usr/bin/containerd"}, ""},
		{"ExecStart=-/usr/bin/containerd --config '/etc/my file.toml' \"-a=/run/x y\"", []string{"/usr/bin/containerd", "--config", "/etc/my file.toml", "-a=/run/x y"}, ""},
		{`ExecStart=/usr/bin/containerd --config /etc/my\x20file.toml --a "b\"c"`, []string{"/usr/bin/containerd", "--config", "/etc/my file.toml", "--a", `b"c`}, ""},
		{"ExecStart=/usr/bin/containerd \\\n  --config /c", []string{"/usr/bin/containerd", "--config", "/c"}, ""},
		{"Environment=DIR=/opt/c \"OPTS=-l debug\"\nExecStart=/usr/bin/containerd --config ${DIR}/c.toml $OPTS $NONE", []string{"/usr/bin/containerd", "--config", "/opt/c/c.toml", "-l", "debug"}, ""},
		{"Environment=A=1\nEnvironment=\nExecStart=/usr/bin/containerd ${A}x $$A", []string{"/usr/bin/containerd", "x", "$A"}, ""},
		{"Environment=FILE=/no\nEnvironmentFile=-/etc/default/containerd\nEnvironmentFile=-/etc/none\nExecStart=/usr/bin/containerd -c ${FILE}", []string{"/usr/bin/containerd", "-c", "/of/the file.toml"}, ""},
		{"ExecStart=@/usr/bin/containerd name -c x", []string{"/usr/bin/containerd", "-c", "x"}, ""},
		{"Environment=A=1\nExecStart=:/usr/bin/containerd $A ${A}", []string{"/usr/bin/containerd", "$A", "${A}"}, ""},
		{"ExecStart=/usr/bin/containerd -a %t/c.sock %%", []string{"/usr/bin/containerd", "-a", "/run/c.sock", "%"}, ""},
		{"ExecStart=/usr/bin/containerd -c /etc/%H.toml", []string{"/usr/bin/containerd", "-c"}, "only systemd can expand %H"},
		{"Environment=A=%H B=/b.toml\nExecStart=/usr/bin/containerd -c ${B}", []string{"/usr/bin/containerd", "-c", "/b.toml"}, ""},
		{"Environment=A=%H B=/b.toml\nExecStart=/usr/bin/containerd -c /etc/${A}.toml", []string{"/usr/bin/containerd", "-c"}, "only systemd can expand %H"},
		{"Environment=A=%H B=/b.toml\nExecStart=/usr/bin/containerd -c $A", []string{"/usr/bin/containerd", "-c"}, "only systemd can expand %H"},
		{"Environment=A=1 \"B=2\nExecStart=/usr/bin/containerd -c ${A}", nil, "is not closed"},
		{"ExecStart=/usr/bin/containerd -c '/etc", []string{"/usr/bin/containerd", "-c"}, "the quote ' is not closed"},
		{"ExecStart=/usr/bin/containerd ; /bin/true", []string{"/usr/bin/containerd"}, "more than one command"},
	} {
		root := t.TempDir()
		for name, text := range map[string]string{
			UnitDir + "/containerd.service": "[Service]\n" + test.unit + "\n",
			"/etc/default/containerd":       "# FILE=/comment\nFILE=\"/of/the file.toml\"\n",
		} {
			if err := os.MkdirAll(filepath.Dir(root+name), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(root+name, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		words, err := Host{Root: root}.ExecStart("containerd.service")
		if !slices.Equal(words, test.want) || (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: %q, %v", test.unit, words, err)
		}
	}
}
