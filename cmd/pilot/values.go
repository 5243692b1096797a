package main

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/internal/loopback"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// The types of the settings. Each reads itself from text and refuses what
// can't be.

type text string

func (t *text) String() string { return string(*t) }

func (t *text) UnmarshalText(b []byte) error {
	*t = text(b)
	return nil
}

type boolean bool

func (v *boolean) String() string { return strconv.FormatBool(bool(*v)) }

func (v *boolean) UnmarshalText(b []byte) error {
	switch string(b) {
	case "true":
		*v = true
	case "false":
		*v = false
	default:
		return fmt.Errorf("%q is neither true nor false", b)
	}
	return nil
}

type duration time.Duration

func (d *duration) String() string {
	s := time.Duration(*d).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	return s
}

func (d *duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%q is not a duration such as 10s or 5m", b)
	}
	if v < 0 {
		return fmt.Errorf("%s is negative", v)
	}
	*d = duration(v)
	return nil
}

// urls are URLs with commas between them.
type urls []string

func (u *urls) String() string { return strings.Join(*u, ",") }

func (u *urls) UnmarshalText(b []byte) error {
	*u = nil
	for s := range strings.SplitSeq(string(b), ",") {
		if s = strings.TrimSpace(s); s == "" {
			return errors.New("a URL is empty")
		}
		*u = append(*u, s)
	}
	return nil
}

// providerNames are names of a key provider, with commas between them.
type providerNames []string

func (n *providerNames) String() string { return strings.Join(*n, ",") }

func (n *providerNames) UnmarshalText(b []byte) error {
	*n = nil
	for name := range strings.SplitSeq(string(b), ",") {
		name = strings.TrimSpace(name)
		switch {
		case name == "":
			return errors.New("a name is empty")
		case strings.ContainsAny(name, ": "):
			return fmt.Errorf("%.60q can't be the name of a key provider: it has a colon or a space", name)
		case slices.Contains(*n, name):
			return fmt.Errorf("duplicate name %q", name)
		}
		*n = append(*n, name)
	}
	return nil
}

// kekIDs are KEKs' names with commas between them.
type kekIDs []string

func (k *kekIDs) String() string { return strings.Join(*k, ",") }

func (k *kekIDs) UnmarshalText(b []byte) error {
	*k = nil
	for id := range strings.SplitSeq(string(b), ",") {
		id = strings.TrimSpace(id)
		if err := wireformat.ValidateKEKID(id); err != nil {
			return err
		}
		*k = append(*k, id)
	}
	return nil
}

type count int

func (n *count) String() string { return strconv.Itoa(int(*n)) }

func (n *count) UnmarshalText(b []byte) error {
	v, err := strconv.Atoi(string(b))
	if err != nil || v < 0 {
		return fmt.Errorf("%q is not a number from 0", b)
	}
	*n = count(v)
	return nil
}

type logLevel logrus.Level

func (l *logLevel) String() string { return logrus.Level(*l).String() }

func (l *logLevel) UnmarshalText(b []byte) error {
	v, err := logrus.ParseLevel(string(b))
	if err != nil {
		return fmt.Errorf("%q is not a log level: use debug, info, warning or error", b)
	}
	*l = logLevel(v)
	return nil
}

// address is where to listen: unix:///PATH or HOST:PORT.
type address string

func (a *address) String() string { return string(*a) }

func (a *address) UnmarshalText(b []byte) error {
	v := address(b)
	if path, ok := v.unix(); ok {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("%q: a unix socket has an absolute path, as in unix:///run/pilot/keyprovider.sock", b)
		}
	} else if strings.Contains(string(b), "://") {
		return fmt.Errorf("%q is neither unix:///PATH nor HOST:PORT", b)
	} else if _, port, err := net.SplitHostPort(string(b)); err != nil {
		return fmt.Errorf("%q is neither unix:///PATH nor HOST:PORT", b)
	} else if n, err := strconv.Atoi(port); err != nil || n < 0 || n > 65535 {
		return errors.New("the port is not a number from 0 to 65535")
	}
	*a = v
	return nil
}

// unixAddress is where to listen: unix:///PATH, or off.
type unixAddress string

const off unixAddress = "off"

func (a *unixAddress) String() string { return string(*a) }

func (a *unixAddress) UnmarshalText(b []byte) error {
	v := unixAddress(b)
	if v != off && !filepath.IsAbs(v.path()) {
		return fmt.Errorf("%q is neither unix:///PATH nor off", b)
	}
	*a = v
	return nil
}

// path returns the path of the socket, or nothing for off and for what is not set.
func (a unixAddress) path() string {
	path, ok := address(a).unix()
	if !ok {
		return ""
	}
	return path
}

// socketPath is an absolute path, with or without unix://.
type socketPath string

func (p *socketPath) String() string { return string(*p) }

func (p *socketPath) UnmarshalText(b []byte) error {
	path := strings.TrimPrefix(string(b), "unix://")
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%q is not the absolute path of a socket", b)
	}
	*p = socketPath(path)
	return nil
}

// unix returns the path of a unix socket.
func (a address) unix() (path string, ok bool) {
	return strings.CutPrefix(string(a), "unix://")
}

// loopback reports whether nobody outside this machine reaches the address.
func (a address) loopback() bool {
	host, _, err := net.SplitHostPort(string(a))
	return err == nil && loopback.Is(host)
}
