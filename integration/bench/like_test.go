package bench

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/ctrlplane/pilot/integration/harness"
)

// BenchmarkLike encrypts an image of which one of ten layers changed, like the one before
// and anew, into a layout and into a registry.
func BenchmarkLike(b *testing.B) {
	dir := benchDir(b)
	_, brokerURL := harness.StartBroker(b, dir+"/broker", "team-a")
	_, ociConf := harness.StartPilot(b, dir+"/ci", brokerURL)
	address, storage := harness.StartRegistry(b, dir)

	// encrypt returns how long it takes, and how many bytes are written.
	encrypt := func(args ...string) (ms, bytes float64) {
		cmd := harness.Command(b, "ctr-pilot", append([]string{"--address", dir + "/nobody.sock", "images", "encrypt", "--json", "--recipient", "provider:pilot:team-a"}, args...)...)
		cmd.Env = append(cmd.Environ(), "OCICRYPT_KEYPROVIDER_CONFIG="+ociConf)
		var out string
		ms = took(func() { out = harness.Output(b, cmd) })
		var r struct {
			Moved struct{ Written, Copied float64 }
		}
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			b.Fatal(err)
		}
		return ms, r.Moved.Written + r.Moved.Copied
	}
	m := newMaterial(b)
	var contents [][]byte
	for range 10 {
		contents = append(contents, m.layer(256<<20/10))
	}
	write := func(version string) string {
		l := harness.NewLayout(b)
		l.Write(dir+"/"+version, version, l.ImageOf(harness.LayerKinds[0], contents))
		return "oci:" + dir + "/" + version + ":" + version
	}
	before := write("before")
	contents[4] = m.layer(256 << 20 / 10)
	after := write("after")

	for name, place := range map[string]struct{ to, blobs string }{
		"Layout":   {"oci:" + dir + "/encrypted:", dir + "/encrypted/blobs"},
		"Registry": {"docker://" + address + "/app:", storage + "/docker/registry/v2/blobs"},
	} {
		encrypt(before, place.to+"before")
		keep := files(b, place.blobs)
		run := func(like string) (ms, bytes float64) {
			ms, bytes = encrypt("--force", "--like", like, after, place.to+"after")
			for name := range files(b, place.blobs) {
				if !keep[name] {
					if err := os.Remove(name); err != nil {
						b.Fatal(err)
					}
				}
			}
			return ms, bytes
		}
		for what, unit := range map[string]string{"Time": "ms", "Bytes": "MB"} {
			b.Run(name+what, func(b *testing.B) {
				figure := func(like string) func() float64 {
					return func() float64 {
						ms, bytes := run(like)
						if unit == "ms" {
							return ms
						}
						return bytes / 1e6
					}
				}
				compare(b, comparison{"encrypt 256 MiB, one of ten layers changed, with --like, into a " + map[string]string{"Layout": "layout", "Registry": "registry"}[name], "anew", unit, "≤ 0.2"},
					figure(place.to+"before"), figure("none"))
			})
		}
	}
}

// files returns the files below a directory.
func files(b *testing.B, dir string) map[string]bool {
	b.Helper()
	all := make(map[string]bool)
	err := filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			all[name] = true
		}
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return all
}
