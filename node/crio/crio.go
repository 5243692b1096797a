// Package crio finds a machine's CRI-O and asks it for its configuration.
package crio

import (
	"context"
	"crypto/fips140"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containers/ocicrypt/utils"
	"github.com/pelletier/go-toml/v2"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

const (
	// Socket is CRI-O's default socket.
	Socket = "/run/crio/crio.sock"
	// Service is CRI-O's systemd service.
	Service = "crio.service"
)

// PullsImages reports whether a machine has CRI-O and no containerd, and the user has
// named none.
func PullsImages(h host.Host, n containerd.Named) bool {
	// containerd's configuration may stay when it is removed.
	program, _ := containerd.StartedBy(h, containerd.Service)
	if n != (containerd.Named{}) || program != "" || h.Root == "" && h.Has(containerd.DefaultAddress) || h.LookPath("containerd") != "" {
		return false
	}
	return h.Root == "" && h.Has(Socket) || h.HasUnit(Service)
}

// Running is the CRI-O that listens on a socket.
type Running struct {
	PID      int
	Started  time.Time
	KeysPath string // decryption_keys_path
}

// maxConfig bounds what is read of CRI-O's configuration, in bytes.
const maxConfig = 4 << 20

// Ask requests CRI-O's configuration from its socket, as "crio status config" does.
func Ask(ctx context.Context, socket string) (*Running, error) {
	text, pid, err := host.HTTPGet(ctx, socket, "/config", maxConfig)
	if err != nil {
		return nil, err
	}
	var conf struct {
		CRIO struct {
			Runtime struct {
				DecryptionKeysPath *string `toml:"decryption_keys_path"`
			} `toml:"runtime"`
		} `toml:"crio"`
	}
	if err := toml.Unmarshal(text, &conf); err != nil || conf.CRIO.Runtime.DecryptionKeysPath == nil {
		return nil, errors.New("the server there is not CRI-O")
	}
	c := Running{PID: pid, KeysPath: *conf.CRIO.Runtime.DecryptionKeysPath}
	if c.PID <= 1 {
		// systemd holds the socket, or CRI-O is in another PID namespace.
		out, err := exec.CommandContext(ctx, "systemctl", "show", "--property=MainPID", "--value", Service).Output()
		if c.PID, _ = strconv.Atoi(strings.TrimSpace(string(out))); err != nil || c.PID == 0 {
			return nil, fmt.Errorf("the process that listens there is unknown, and %s does not run", Service)
		}
	}
	c.Started, err = host.StartedAt(fmt.Sprintf("/proc/%d", c.PID))
	return &c, err
}

// Environment returns a variable of CRI-O's environment, or "".
func (c *Running) Environment(name string) (string, error) {
	all, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", c.PID))
	for v := range strings.SplitSeq(string(all), "\x00") {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value, err
		}
	}
	return "", err
}

// Path returns this process's path of a file of CRI-O.
func (c *Running) Path(name string) string { return c.Root().Path(name) }

// Root returns the root directory that CRI-O runs in.
func (c *Running) Root() host.Host { return host.Host{Root: fmt.Sprintf("/proc/%d/root", c.PID)} }

// CheckKeys counts the private keys in CRI-O's decryption_keys_path, -1 if it does not
// exist. An error makes CRI-O fail every pull, also of plain images: like
// getDecryptionKeys in server/utils.go of CRI-O 1.34, CheckKeys accepts nothing but keys
// without a password, and no symbolic link. CRI-O has a FIPS 140-3 mode of its own, so that
// of this process does not count.
func (c *Running) CheckKeys() (keys int, err error) {
	if c.KeysPath == "" {
		return -1, nil
	}
	dir := c.Root().LinkPath(c.KeysPath)
	if strings.HasSuffix(c.KeysPath, "/") {
		dir = c.Path(c.KeysPath) // CRI-O follows a link then too
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return -1, nil
	}
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir():
			return nil
		case e.Type()&fs.ModeSymlink != 0:
			return fmt.Errorf("%s is a symbolic link", e.Name())
		}
		key, err := readSmall(path)
		if err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
		defer clear(key)
		fips140.WithoutEnforcement(func() { _, err = utils.SortDecryptionKeys(base64.StdEncoding.EncodeToString(key)) })
		if err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
		keys++
		return nil
	})
	return keys, err
}

// maxKey bounds what is read of a key, in bytes.
const maxKey = 1 << 20

// readSmall reads a file that is no larger than a key can be. Unlike CRI-O, it does not
// block on a pipe.
func readSmall(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, errors.New("it is a pipe, a socket or a device")
	case info.Size() > maxKey:
		return nil, fmt.Errorf("larger than %d KiB, so it is not a key", maxKey>>10)
	}
	return io.ReadAll(io.LimitReader(f, maxKey))
}
