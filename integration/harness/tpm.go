package harness

import (
	"crypto/sha256"
	"fmt"
	"os/exec"
	"testing"
)

// TPM is a software TPM 2.0.
type TPM struct {
	Dir, Socket string
	Process     *Process
}

// NewTPM makes and starts a TPM, in which some firmware has measured itself.
func NewTPM(t testing.TB) *TPM {
	t.Helper()
	dir := TempDir(t)
	p := &TPM{Dir: dir, Socket: dir + "/tpm.sock"}
	p.Start(t)
	p.Extend(t, 7, "firmware")
	return p
}

// Start starts the TPM, as the machine does.
func (p *TPM) Start(t testing.TB) {
	t.Helper()
	p.Process = Start(t, p.Dir, "swtpm", exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+p.Dir,
		"--server", "type=unixio,path="+p.Socket, "--ctrl", "type=unixio,path="+p.Socket+".ctrl", "--flags", "startup-clear"))
	Await(t, "swtpm", func() error { return p.tool(t, "tpm2_getrandom", "--hex", "1").Run() })
}

// Reboot starts the TPM again, with PCRs that nothing was measured into.
func (p *TPM) Reboot(t testing.TB) {
	t.Helper()
	p.Process.Stop(t)
	p.Start(t)
}

// Settings are the settings of a backend.
func (p *TPM) Settings() string { return fmt.Sprintf("type = 'tpm'\ndevice = %q\n", p.Socket) }

// Tool runs a program of tpm2-tools.
func (p *TPM) Tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	return Output(t, p.tool(t, name, args...))
}

func (p *TPM) tool(t testing.TB, name string, args ...string) *exec.Cmd {
	return Command(t, name, append([]string{"--tcti", "swtpm:path=" + p.Socket}, args...)...)
}

// Extend measures a text into a PCR.
func (p *TPM) Extend(t testing.TB, pcr int, text string) {
	t.Helper()
	p.Tool(t, "tpm2_pcrextend", fmt.Sprintf("%d:sha256=%x", pcr, sha256.Sum256([]byte(text))))
}
