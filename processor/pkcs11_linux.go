package processor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/keywrap/pkcs11"

	"github.com/ctrlplane/pilot/internal/coredump"
)

// pkcs11Argument is the only argument of a process that unwraps one layer key with
// a PKCS#11 module.
const pkcs11Argument = "pkcs11-unwrap"

// isolatesPKCS11 says whether PKCS#11 modules are loaded into such processes.
var isolatesPKCS11 bool

// IsolatePKCS11 makes each layer key that is wrapped for a PKCS#11 module be unwrapped in
// a process of its own, which runs this program again. ocicrypt loads, initializes,
// finalizes and unloads the module each time, and a fault in it would end a daemon.
// Daemons call this first in main: in such a process it does not return.
func IsolatePKCS11() {
	if len(os.Args) != 2 || os.Args[1] != pkcs11Argument {
		isolatesPKCS11 = true
		return
	}
	if err := unwrapPKCS11(); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %s\n", pkcs11Argument, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// pkcs11Request is what such a process gets on standard input, and pkcs11Reply what
// it writes to descriptor 3: modules may print to the others.
type (
	pkcs11Request struct {
		Keys    map[string][][]byte
		Wrapped []byte
	}
	pkcs11Reply struct {
		Private []byte
		Error   string
	}
)

// newPKCS11Request returns a request with the parameters that ocicrypt needs for it.
// The others are private keys and passwords that are none of a module's business.
func newPKCS11Request(params map[string][][]byte, wrapped []byte) pkcs11Request {
	r := pkcs11Request{Keys: make(map[string][][]byte), Wrapped: wrapped}
	for _, name := range []string{"pkcs11-yamls", "pkcs11-config"} {
		if values, ok := params[name]; ok {
			r.Keys[name] = values
		}
	}
	return r
}

func unwrapPKCS11() error {
	if err := coredump.Disable(); err != nil {
		return fmt.Errorf("core dumps can't be disabled: %w", err)
	}
	syscall.CloseOnExec(3)
	var request pkcs11Request
	if err := json.NewDecoder(os.Stdin).Decode(&request); err != nil {
		return errors.New("pilot starts this itself")
	}
	var reply pkcs11Reply
	private, err := pkcs11.NewKeyWrapper().UnwrapKey(&config.DecryptConfig{Parameters: request.Keys}, request.Wrapped)
	if err != nil {
		reply.Error = err.Error()
	} else {
		reply.Private = private
	}
	return json.NewEncoder(os.NewFile(3, "reply")).Encode(reply)
}

func newPKCS11Wrapper() wrapper {
	w := keyWrapper{pkcs11.NewKeyWrapper()}
	if isolatesPKCS11 {
		return pkcs11Wrapper{w}
	}
	return w
}

// pkcs11Wrapper is ocicrypt's for PKCS#11, which unwraps in a process of its own.
type pkcs11Wrapper struct{ keyWrapper }

// pkcs11Turn lets one module process run at a time. ocicrypt has a lock for that, which does
// not reach across processes. While one process logs in to SoftHSM 2.6, others can't open the
// token (SoftHSMv2 issue 757). Retrying is not safe: ocicrypt reports a wrong PIN with the same
// error, and tokens lock after a few wrong PINs.
var pkcs11Turn = make(chan struct{}, 1)

// maxPKCS11Reply is far more than a layer key and an error take, in bytes.
const maxPKCS11Reply = 1 << 20

func (w pkcs11Wrapper) unwrap(ctx context.Context, params map[string][][]byte, wrapped []byte) ([]byte, error) {
	request, err := json.Marshal(newPKCS11Request(params, wrapped))
	if err != nil {
		return nil, err
	}
	defer clear(request)
	select {
	case pkcs11Turn <- struct{}{}:
		defer func() { <-pkcs11Turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	r, replies, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", pkcs11Argument)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin = bytes.NewReader(request)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.ExtraFiles = []*os.File{replies}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	// The kernel sends Pdeathsig when the thread ends that started the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err = cmd.Start()
	replies.Close()
	if err != nil {
		return nil, fmt.Errorf("the PKCS#11 module's process can't be started: %w", err)
	}
	// A module may have left processes that have the pipe open.
	defer context.AfterFunc(ctx, func() { r.Close() })()
	text, readErr := io.ReadAll(io.LimitReader(r, maxPKCS11Reply))
	defer clear(text)
	if err := cmd.Wait(); ctx.Err() != nil {
		return nil, ctx.Err()
	} else if err != nil {
		return nil, fmt.Errorf("the PKCS#11 module's process failed: %w", err)
	}
	var reply pkcs11Reply
	if err := errors.Join(readErr, json.Unmarshal(text, &reply)); err != nil {
		return nil, fmt.Errorf("the PKCS#11 module's process gave no usable reply: %w", err)
	}
	if reply.Error != "" {
		return nil, errors.New(reply.Error)
	}
	return reply.Private, nil
}
