package agekey

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"filippo.io/age"
	"filippo.io/age/plugin"

	"github.com/ctrlplane/pilot/internal/coredump"
)

// ErrNoPlugin is the error of a plugin of age's that is not installed.
var ErrNoPlugin = errors.New("the plugin is not installed")

const (
	// pluginTimeout is how long a plugin may take, such as for somebody to touch a token.
	pluginTimeout = 15 * time.Second
	// maxPlugins is how many plugins run at once. Others wait.
	maxPlugins = 4
	// pluginArgument is the only argument of a process that runs a plugin.
	pluginArgument = "age-plugin"
)

var pluginTurns = make(chan struct{}, maxPlugins)

// pluginRequest is what such a process gets on standard input, and pluginReply what it
// writes to standard output.
type (
	pluginRequest struct {
		Recipient  string   // to encrypt for
		Identities []string // or to decrypt with
		Data       []byte
	}
	pluginReply struct {
		Data    []byte
		Error   string
		Missing bool // the plugin
		Said    string
	}
)

// IsolatePlugins does the work of a process that runs a plugin of age's, and does not
// return, if this is one. Programs that use this package call it first in main.
//
// age's library has no way to end a plugin that hangs, and plugins could ask at the
// terminal. So each runs below a process of its own, which has no terminal, and which is
// killed with all that it has started when its time is over.
func IsolatePlugins() {
	if len(os.Args) != 2 || os.Args[1] != pluginArgument {
		return
	}
	os.Unsetenv("AGEDEBUG") // with which age's library prints keys
	var request pluginRequest
	err := coredump.Disable()
	if err == nil && json.NewDecoder(os.Stdin).Decode(&request) != nil {
		err = errors.New("pilot starts this itself")
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(request.answer())
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %s\n", pluginArgument, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func (r pluginRequest) answer() (reply pluginReply) {
	ui := &plugin.ClientUI{DisplayMessage: func(_, message string) error {
		reply.Said = message
		return nil
	}}
	data, err := r.do(ui)
	if err != nil {
		reply.Error, reply.Missing = err.Error(), errors.As(err, new(*plugin.NotFoundError))
		return reply
	}
	reply.Data = data
	return reply
}

func (r pluginRequest) do(ui *plugin.ClientUI) ([]byte, error) {
	if r.Recipient != "" {
		to, err := plugin.NewRecipient(r.Recipient, ui)
		if err != nil {
			return nil, err
		}
		return encrypt(to, r.Data)
	}
	var ids []age.Identity
	for _, text := range r.Identities {
		id, err := plugin.NewIdentity(text, ui)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return decrypt(r.Data, ids...)
}

// maxReply is more than a wrapped or unwrapped key and an error take, in bytes.
const maxReply = 1 << 20

// runPlugin has a plugin answer a request.
func runPlugin(ctx context.Context, name string, request pluginRequest) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, pluginTimeout)
	defer cancel()
	select {
	case pluginTurns <- struct{}{}:
		defer func() { <-pluginTurns }()
	case <-ctx.Done():
		return nil, fmt.Errorf("plugin %s: %d others are running: %w", name, maxPlugins, ctx.Err())
	}
	in, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	defer clear(in)
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, pluginArgument)
	out := &limited{most: maxReply}
	defer out.clear()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), out, os.Stderr
	cmd.WaitDelay = time.Second
	separate(cmd)
	err = cmd.Run()
	if ctx.Err() != nil {
		return nil, fmt.Errorf("plugin %s did not answer in time: %w", name, ctx.Err())
	}
	if err != nil {
		return nil, fmt.Errorf("plugin %s: its process failed: %w", name, err)
	}
	var reply pluginReply
	if json.Unmarshal(out.b, &reply) != nil {
		return nil, fmt.Errorf("plugin %s: its process gave no usable reply", name)
	}
	switch {
	case reply.Missing:
		return nil, fmt.Errorf("%w: age-plugin-%s is not in PATH", ErrNoPlugin, name)
	case reply.Error != "" && reply.Said != "":
		return nil, fmt.Errorf("%s (it said: %s)", printable(reply.Error), printable(reply.Said))
	case reply.Error != "":
		return nil, errors.New(printable(reply.Error))
	}
	return reply.Data, nil
}

// printable returns at most 200 bytes of what a plugin said, in one line.
func printable(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, ""))
	if len(s) > 200 {
		s = strings.ToValidUTF8(s[:200], "") + "…"
	}
	return s
}

// limited is a buffer of limited size.
type limited struct {
	b    []byte
	most int
}

func (l *limited) Write(p []byte) (int, error) {
	if len(l.b)+len(p) > l.most {
		return 0, errors.New("it is too much")
	}
	if need := len(l.b) + len(p); need > cap(l.b) {
		grown := append(make([]byte, 0, 2*need), l.b...)
		clear(l.b)
		l.b = grown
	}
	l.b = append(l.b, p...)
	return len(p), nil
}

func (l *limited) clear() { clear(l.b) }
