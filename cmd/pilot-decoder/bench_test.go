package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"testing"

	"github.com/containers/ocicrypt/config"
)

// BenchmarkPipes passes a layer of 256 MiB through the program as containerd
// does, and through cat, which can't be faster than the pipes.
func BenchmarkPipes(b *testing.B) {
	public, private := rsaKey(b)
	_, layer, desc := encrypted(b, 256<<20, public)
	passed := payload(b, &config.DecryptConfig{Parameters: map[string][][]byte{"privkeys": {private}, "privkeys-passwords": {nil}}}, desc)
	for name, command := range map[string]func() *exec.Cmd{
		"cat": func() *exec.Cmd { return exec.Command("cat") },
		"pilot-decoder": func() *exec.Cmd {
			cmd := exec.Command(os.Args[0])
			cmd.Env = []string{"PILOT_DECODER_TEST=1"}
			return cmd
		},
	} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(layer)))
			for b.Loop() {
				cmd := command()
				in, w, err := os.Pipe()
				if err != nil {
					b.Fatal(err)
				}
				go func() {
					w.Write(passed)
					w.Close()
				}()
				cmd.ExtraFiles = []*os.File{in}
				stdin, err := cmd.StdinPipe()
				if err != nil {
					b.Fatal(err)
				}
				stdout, err := cmd.StdoutPipe()
				if err != nil {
					b.Fatal(err)
				}
				if err := cmd.Start(); err != nil {
					b.Fatal(err)
				}
				in.Close()
				go func() {
					io.CopyBuffer(struct{ io.Writer }{stdin}, struct{ io.Reader }{bytes.NewReader(layer)}, make([]byte, 1<<20))
					stdin.Close()
				}()
				n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{stdout}, make([]byte, 1<<20))
				if err != nil || n != int64(len(layer)) {
					b.Fatalf("%d bytes, %v", n, err)
				}
				if err := cmd.Wait(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
