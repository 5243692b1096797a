//go:build linux && cgo && !no_pkcs11

package pkcs11

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// worker is a process with a PKCS#11 module in it: this program, run again.
type worker struct {
	pipe    *pipe
	process *os.Process
	started time.Time
	ended   chan struct{} // closed when it has ended, or was killed
	exited  chan struct{} // closed when there is no process any more
	onEnd   func(*worker)

	mu      sync.Mutex
	last    uint64 // ID of a request
	pending map[uint64]chan message
	calls   sync.WaitGroup
	retired bool
	reason  error // why it ended
}

// Errors of a request that got no reply.
var (
	errEnded   = errors.New("the module's process ended")
	errRetired = errors.New("the module's process is being replaced")
)

// systemd's variables are for the process that it started.
var notForWorkers = []string{"NOTIFY_SOCKET=", "WATCHDOG_PID=", "WATCHDOG_USEC=", "LISTEN_PID=", "LISTEN_FDS=", "LISTEN_FDNAMES="}

// startWorker starts a process, which has not loaded its module yet. onEnd is
// called once, when it ends without having been retired.
func startWorker(onEnd func(*worker)) (*worker, error) {
	requestR, requestW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	replyR, replyW, err := os.Pipe()
	if err != nil {
		requestR.Close()
		requestW.Close()
		return nil, err
	}
	w := &worker{
		pipe: &pipe{r: replyR, w: requestW}, started: time.Now(), onEnd: onEnd,
		ended: make(chan struct{}), exited: make(chan struct{}), pending: make(map[uint64]chan message),
	}
	// /proc/self/exe is this program even after its file was replaced. What the
	// module prints must not get into an audit log on standard output.
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{os.Args[0], moduleArgument},
		Stdout: os.Stderr, Stderr: os.Stderr, ExtraFiles: []*os.File{requestR, replyW},
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
		Env: slices.DeleteFunc(os.Environ(), func(v string) bool {
			return slices.ContainsFunc(notForWorkers, func(name string) bool { return strings.HasPrefix(v, name) })
		}),
	}
	started := make(chan error)
	go func() {
		// The kernel sends Pdeathsig when the thread ends that started the
		// process, so this one stays for as long.
		runtime.LockOSThread()
		err := cmd.Start()
		requestR.Close()
		replyW.Close()
		w.process = cmd.Process
		started <- err
		if err == nil {
			cmd.Wait()
			w.end(errors.New(cmd.ProcessState.String()))
			close(w.exited)
		}
	}()
	if err := <-started; err != nil {
		w.pipe.close()
		return nil, err
	}
	go w.receive()
	return w, nil
}

func (w *worker) receive() {
	for {
		m, err := w.pipe.read()
		if errors.Is(err, errMessage) {
			w.kill(err)
		}
		if err != nil {
			return // it is ending
		}
		w.mu.Lock()
		reply := w.pending[m.id]
		delete(w.pending, m.id)
		w.mu.Unlock()
		if reply == nil {
			m.clear()
			w.kill(errMessage)
			return
		}
		reply <- m
	}
}

// do sends a request and returns its reply. A process that does not reply in time
// is killed. Errors wrap errEnded, or errRetired if the request was not sent.
func (w *worker) do(m message, timeout time.Duration) (message, error) {
	reply := make(chan message, 1)
	w.mu.Lock()
	if w.retired {
		w.mu.Unlock()
		return message{}, errRetired
	}
	w.last++
	m.id = w.last
	w.pending[m.id] = reply
	w.calls.Add(1)
	w.mu.Unlock()
	defer w.calls.Done()

	if err := w.pipe.write(m); errors.Is(err, errMessage) {
		w.mu.Lock()
		delete(w.pending, m.id)
		w.mu.Unlock()
		return message{}, err
	}
	// Another error means that the process is ending.
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case m := <-reply:
		return m, nil
	case <-timer.C:
		w.kill(fmt.Errorf("a call took longer than %v, so the process was killed", timeout))
	case <-w.ended:
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return message{}, fmt.Errorf("%w: %w", errEnded, w.reason)
}

func (w *worker) kill(reason error) {
	w.end(reason)
	w.process.Kill()
}

// end notes why the process ended, which fails all requests.
func (w *worker) end(reason error) {
	w.mu.Lock()
	first, retired := w.reason == nil, w.retired
	if first {
		w.reason = reason
		close(w.ended)
	}
	w.mu.Unlock()
	if first {
		w.pipe.close()
	}
	if first && !retired {
		w.onEnd(w)
	}
}

func (w *worker) hasEnded() bool {
	select {
	case <-w.ended:
		return true
	default:
		return false
	}
}

// closeTimeout is how long a process may take to close its sessions and to end.
const closeTimeout = 5 * time.Second

// retire takes no more requests, and closes the process when it has replied to
// those that it has.
func (w *worker) retire() {
	w.mu.Lock()
	w.retired = true
	w.mu.Unlock()
	go func() {
		w.calls.Wait()
		w.close()
	}()
}

// close ends the process, with the calls in it.
func (w *worker) close() {
	w.mu.Lock()
	w.retired = true
	w.mu.Unlock()
	w.pipe.w.Close()
	select {
	case <-w.exited:
	case <-time.After(closeTimeout):
		w.kill(errors.New("it did not end"))
	}
}
