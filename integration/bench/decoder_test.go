package bench

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/imgcrypt/v2"
	"github.com/containers/ocicrypt/config"
	"github.com/ctrlplane/pilot/integration/harness"
	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// decoder is a stream processor with what it needs for one layer.
type decoder struct {
	b       *testing.B
	path    string
	env     []string
	payload []byte
}

// BenchmarkDecoder compares pilot-decoder with imgcrypt's, and with cat, which
// does nothing but pass on what it reads.
func BenchmarkDecoder(b *testing.B) {
	dir := benchDir(b)
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", dir+"/",
		"./cmd/pilot-decoder", "./integration/testdata/ctd-decoder")
	build.Dir, build.Env = harness.Repo, append(os.Environ(), "CGO_ENABLED=0")
	harness.Output(b, build)
	_, brokerURL := harness.StartBroker(b, dir+"/broker", "team-a")
	_, conf := harness.StartPilot(b, dir, brokerURL)
	providers, err := ocicryptclient.FromFile(conf, grpcdial.Call)
	if err != nil {
		b.Fatal(err)
	}
	private, public := harness.KeyPair(b, dir+"/keys")
	forKey := processor.Recipients{Parameters: map[string][][]byte{"pubkeys": {[]byte(harness.Read(b, public))}}}
	forKEK := processor.Recipients{Keys: processor.Keys{Providers: providers}, Parameters: map[string][][]byte{"pilot": {[]byte("team-a")}}}
	key := config.DecryptConfig{Parameters: map[string][][]byte{"privkeys": {[]byte(harness.Read(b, private))}, "privkeys-passwords": {nil}}}

	small := newMaterial(b).layer(4 << 10)
	layerForKEK, descForKEK := encryptedLayer(b, small, forKEK)
	layerForKey, descForKey := encryptedLayer(b, small, forKey)
	ours := decoder{b, dir + "/pilot-decoder", []string{"OCICRYPT_KEYPROVIDER_CONFIG=" + conf}, payloadFor(b, config.DecryptConfig{}, descForKEK)}
	theirs := decoder{b, dir + "/ctd-decoder", nil, payloadFor(b, key, descForKey)}
	b.Run("FirstByte", func(b *testing.B) {
		compare(b, comparison{"decode a small layer, first byte (ours by KEK, theirs by private key)", "ctd-decoder", "ms", "≤ 0.5"}, func() float64 {
			return typical(func() float64 { first, _ := ours.run(layerForKEK, small); return first })
		}, func() float64 {
			return typical(func() float64 { first, _ := theirs.run(layerForKey, small); return first })
		})
	})
	b.Run("Binary", func(b *testing.B) {
		size := func(name string) func() float64 {
			return func() float64 {
				info, err := os.Stat(filepath.Join(dir, name))
				if err != nil {
					b.Fatal(err)
				}
				return float64(info.Size()) / 1e6
			}
		}
		compare(b, comparison{"the decoder's program, stripped", "ctd-decoder", "MB", "≤ 0.5"}, size("pilot-decoder"), size("ctd-decoder"))
	})

	large := newMaterial(b).layer(256 << 20)
	layer, desc := encryptedLayer(b, large, forKey)
	ours = decoder{b, dir + "/pilot-decoder", nil, payloadFor(b, key, desc)}
	theirs = decoder{b, dir + "/ctd-decoder", nil, payloadFor(b, key, desc)}
	cat := decoder{b, "/bin/cat", nil, nil}
	throughput := func(d decoder) func() float64 {
		return func() float64 {
			return rate(len(large), func() { d.run(layer, large) })
		}
	}
	b.Run("Throughput", func(b *testing.B) {
		compare(b, comparison{"decode 256 MiB through pipes", "ctd-decoder", "MB/s", "≥ 4"}, throughput(ours), throughput(theirs))
	})
	memory := func(d decoder) func() float64 {
		return func() float64 { _, peak := d.run(layer, large); return peak }
	}
	b.Run("Memory", func(b *testing.B) {
		compare(b, comparison{"decode 256 MiB through pipes, peak memory", "ctd-decoder", "MB", "≤ 0.5"}, memory(ours), memory(theirs))
	})
	cat.payload = ours.payload // which it does not read
	b.Run("Cat", func(b *testing.B) {
		compare(b, comparison{"decode 256 MiB through pipes", "cat", "MB/s", "≥ 1"}, throughput(ours), func() float64 {
			return rate(len(large), func() { cat.run(layer, layer) })
		})
	})
}

// typical returns the median of 15.
func typical(f func() float64) float64 {
	var values []float64
	for range 15 {
		values = append(values, f())
	}
	return harness.Median(values)
}

// pipeChunk is how many bytes containerd writes to a stream processor, and
// reads from it, at once.
const pipeChunk = 32 << 10

// run has the decoder decrypt a layer, which must become want. It returns
// when the first byte came, in milliseconds after the start, and the peak of its
// memory in megabytes of 10^6 bytes, of layers that are not small.
func (d decoder) run(layer, want []byte) (first, peak float64) {
	d.b.Helper()
	cmd := exec.Command(d.path)
	cmd.Env = d.env
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	in, w, err := os.Pipe()
	if err != nil {
		d.b.Fatal(err)
	}
	defer in.Close()
	go func() {
		w.Write(d.payload)
		w.Close()
	}()
	cmd.ExtraFiles = []*os.File{in}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		d.b.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		d.b.Fatal(err)
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		d.b.Fatal(err)
	}
	go func() {
		for rest := layer; len(rest) > 0; {
			n, err := stdin.Write(rest[:min(len(rest), pipeChunk)])
			if err != nil {
				break // the decoder says why
			}
			rest = rest[n:]
		}
		stdin.Close()
	}()
	buffer := make([]byte, pipeChunk)
	total := 0
	for {
		if peak == 0 && len(want) > 64<<20 && total > len(want)/2 { // so it is still there
			peak = float64(harness.PeakMemory(d.b, cmd.Process.Pid)) / 1e6
		}
		n, err := stdout.Read(buffer)
		if total == 0 {
			first = float64(time.Since(start)) / float64(time.Millisecond)
		}
		if n > 0 && (total+n > len(want) || !bytes.Equal(buffer[:min(n, 64)], want[total:total+min(n, 64)])) {
			d.b.Fatalf("%s: what it writes is wrong after %d bytes", d.path, total)
		}
		total += n
		if err == io.EOF {
			break
		}
		if err != nil {
			d.b.Fatal(err)
		}
	}
	if err := cmd.Wait(); err != nil || total != len(want) {
		d.b.Fatalf("%s: %d bytes of %d, %v: %s", d.path, total, len(want), err, stderr.Bytes())
	}
	return first, peak
}

// encryptedLayer encrypts a layer.
func encryptedLayer(b *testing.B, layer []byte, to processor.Recipients) ([]byte, ocispec.Descriptor) {
	b.Helper()
	var out bytes.Buffer
	desc, err := processor.Encrypt(b.Context(), &out, bytes.NewReader(layer), ocispec.MediaTypeImageLayer, to)
	if err != nil {
		b.Fatal(err)
	}
	return out.Bytes(), desc
}

// payloadFor returns what containerd passes to a stream processor.
func payloadFor(b *testing.B, dc config.DecryptConfig, desc ocispec.Descriptor) []byte {
	b.Helper()
	value, err := json.Marshal(imgcrypt.Payload{DecryptConfig: dc, Descriptor: desc})
	if err != nil {
		b.Fatal(err)
	}
	out, err := proto.Marshal(&anypb.Any{TypeUrl: imgcrypt.PayloadURI, Value: value})
	if err != nil {
		b.Fatal(err)
	}
	return out
}
