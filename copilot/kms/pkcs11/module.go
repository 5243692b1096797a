//go:build linux && cgo && !no_pkcs11

package pkcs11

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/internal/coredump"
)

// moduleArgument is the only argument of a process for a PKCS#11 module.
const moduleArgument = "pkcs11-module"

// RunModule returns unless this process was started by a backend of type pkcs11
// to have a PKCS#11 module in it. Then it serves that backend and exits. Programs that
// open backends call it first.
func RunModule() {
	if len(os.Args) != 2 || os.Args[1] != moduleArgument {
		return
	}
	if err := runModule(); err != nil {
		fmt.Fprintf(os.Stderr, "copilot: PKCS#11 module: %s\n", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func runModule() error {
	if err := coredump.Disable(); err != nil {
		return fmt.Errorf("core dumps can't be disabled: %w", err)
	}
	// It ends when the pipe does: systemd and terminals signal all processes.
	signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defaultSignals()
	const requests, replies = 3, 4
	var st syscall.Stat_t
	for _, fd := range []int{requests, replies} {
		if err := syscall.Fstat(fd, &st); err != nil || st.Mode&syscall.S_IFMT != syscall.S_IFIFO {
			return errors.New("copilot starts this itself")
		}
		syscall.CloseOnExec(fd) // modules may start programs
	}
	s := &moduleServer{pipe: &pipe{r: os.NewFile(requests, "requests"), w: os.NewFile(replies, "replies")}}
	return s.serve()
}

// moduleServer has a PKCS#11 module, which it initializes once, and a login to a
// token.
type moduleServer struct {
	pipe  *pipe
	calls sync.WaitGroup

	mu     sync.Mutex
	module *module
	conn   *conn // nil if there is no login
}

// serve replies to requests until the pipe ends.
func (s *moduleServer) serve() error {
	for {
		m, err := s.pipe.read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		s.calls.Add(1)
		go func() {
			defer s.calls.Done()
			defer m.clear()
			reply := s.handle(m)
			defer reply.clear()
			reply.id = m.id
			s.pipe.write(reply) // if the pipe is gone, so are we soon
		}()
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.calls.Wait()
		if s.conn != nil {
			s.conn.release()
		}
		if s.module != nil {
			s.module.Finalize()
		}
	}()
	select {
	case <-done:
		return nil
	case <-time.After(closeTimeout - time.Second):
		return errors.New("it hangs, so it is not finalized")
	}
}

func (s *moduleServer) handle(m message) message {
	if want := [...]int{requestOpen: 5, requestWrap: 2, requestUnwrap: 2, requestGenerate: 2, requestConfirm: 2}; int(m.kind) >= len(want) || len(m.fields) != want[m.kind] {
		return errorReply(errMessage)
	}
	if m.kind == requestOpen {
		if err := s.open(m); err != nil {
			return errorReply(err)
		}
		return message{}
	}
	s.mu.Lock()
	c := s.conn
	if c != nil {
		c.hold()
	}
	s.mu.Unlock()
	if c == nil {
		return errorReply(&lostError{err: fmt.Errorf("%w: not logged in", kms.ErrUnavailable)})
	}
	defer c.release()
	reply, err := c.with(func(session *session) (message, error) { return session.do(m) })
	if err == nil {
		return reply
	}
	if lost, ok := errors.AsType[*lostError](err); ok && !lost.old {
		s.mu.Lock()
		if s.conn == c {
			s.conn = nil
			defer c.release()
		}
		s.mu.Unlock()
	}
	return errorReply(err)
}

func (s *moduleServer) open(m message) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		s.conn.release()
		s.conn = nil
	}
	if s.module == nil {
		var err error
		if s.module, err = loadModule(string(m.fields[0]), string(m.fields[3])); err != nil {
			return err
		}
	}
	var err error
	s.conn, err = s.module.logIn(string(m.fields[1]), string(m.fields[2]), string(m.fields[4]))
	return err
}

func (s *session) do(m message) (message, error) {
	path := string(m.fields[0])
	switch m.kind {
	case requestWrap:
		return s.wrap(path, m.fields[1])
	case requestUnwrap:
		return s.unwrap(path, m.version, m.fields[1])
	case requestGenerate:
		version, err := s.generateNext(path, string(m.fields[1]))
		return message{version: version}, err
	default:
		version, err := s.confirm(path, string(m.fields[1]), m.version)
		return message{version: version}, err
	}
}

// errorReply is the reply that says err.
func errorReply(err error) message {
	kind := byte(replyUnavailable)
	lost, isLost := errors.AsType[*lostError](err)
	switch _, pin := errors.AsType[*pinError](err); {
	case isLost && lost.old:
		kind = replyOld
	case isLost:
		kind = replyLost
	case pin:
		kind = replyPIN
	case errors.Is(err, kms.ErrNotFound):
		kind = replyNotFound
	case errors.Is(err, kms.ErrForbidden):
		kind = replyForbidden
	case errors.Is(err, kms.ErrUnwrap):
		kind = replyUnwrap
	}
	return message{kind: kind, fields: [][]byte{[]byte(err.Error())}}
}

// remoteError is an error of the module's process.
type remoteError struct {
	text string
	kind byte
}

func (e *remoteError) Error() string { return e.text }

func (e *remoteError) Unwrap() error {
	switch e.kind {
	case replyNotFound, replyOld:
		return kms.ErrNotFound
	case replyForbidden, replyPIN:
		return kms.ErrForbidden
	case replyUnwrap:
		return kms.ErrUnwrap
	}
	return kms.ErrUnavailable
}

// error returns the error that a reply says, or nil.
func (m message) error() error {
	if m.kind == replyOK {
		return nil
	}
	if len(m.fields) != 1 {
		return fmt.Errorf("%w: %w", kms.ErrUnavailable, errMessage)
	}
	return &remoteError{string(m.fields[0]), m.kind}
}

// module is a PKCS#11 library that is initialized.
type module struct {
	*pkcs11.Ctx
	functions functionList
}

func loadModule(path, parameters string) (*module, error) {
	m := &module{Ctx: pkcs11.New(path)}
	if m.Ctx == nil {
		return nil, fmt.Errorf("%w: %s can't be loaded: it or a library that it needs is missing, or it is not a PKCS#11 module", kms.ErrUnavailable, path)
	}
	var err error
	if m.functions, err = newFunctionList(path); err != nil {
		return nil, fmt.Errorf("%w: %s has no function list: %s", kms.ErrUnavailable, path, codeName(err))
	}
	var options []pkcs11.InitializeOption
	if parameters != "" {
		options = append(options, pkcs11.InitializeWithReserved(reserved(parameters)))
	}
	err = m.Initialize(options...)
	if errors.Is(err, pkcs11.Error(pkcs11.CKR_ARGUMENTS_BAD)) {
		return nil, fmt.Errorf("%w: %s does not accept these module-parameters: %s: its documentation says which it needs (for NSS's softoken \"configdir='sql:/DIRECTORY'\"), if any",
			kms.ErrUnavailable, path, codeName(err))
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s can't be initialized: %s", kms.ErrUnavailable, path, codeName(err))
	}
	return m, nil
}
