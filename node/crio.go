package node

import (
	"context"
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
)

const (
	// CRIOSocket is where CRI-O listens by default.
	CRIOSocket = "/run/crio/crio.sock"
	// CRIOService is its systemd service.
	CRIOService = "crio.service"
)

// PullsWithCRIO reports whether a machine has CRI-O and no containerd, and the
// options name none either.
func PullsWithCRIO(o Options) bool {
	named := o.ContainerdBinary != "" || o.ContainerdConfig != "" || o.ContainerdAddress != ""
	if named || o.has(defaultConfig) || o.Root == "" && exists(defaultAddress) || o.lookPath("containerd", binDirs) != "" {
		return false
	}
	return o.Root == "" && exists(CRIOSocket) || o.hasUnit(CRIOService)
}

// runningCRIO is the CRI-O that answers at a socket.
type runningCRIO struct {
	pid      int
	started  time.Time
	keysPath string // decryption_keys_path
}

// maxCRIOConfig is the most that is read of CRI-O's configuration, in bytes.
const maxCRIOConfig = 4 << 20

// askCRIO asks CRI-O for its configuration, as "crio status config" does.
func askCRIO(ctx context.Context, socket string) (*runningCRIO, error) {
	text, pid, err := httpGet(ctx, socket, "/config", maxCRIOConfig)
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
		return nil, errors.New("what answers there is not CRI-O")
	}
	c := runningCRIO{pid: pid, keysPath: *conf.CRIO.Runtime.DecryptionKeysPath}
	if c.pid <= 1 {
		// systemd listens for it, or it is in another PID namespace.
		out, err := exec.CommandContext(ctx, "systemctl", "show", "--property=MainPID", "--value", CRIOService).Output()
		if c.pid, _ = strconv.Atoi(strings.TrimSpace(string(out))); err != nil || c.pid == 0 {
			return nil, fmt.Errorf("the process that answers there is unknown, and %s does not run", CRIOService)
		}
	}
	c.started, err = startedAt(fmt.Sprintf("/proc/%d", c.pid))
	return &c, err
}

// environment returns a variable of CRI-O's environment, or "".
func (c *runningCRIO) environment(name string) (string, error) {
	all, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", c.pid))
	for v := range strings.SplitSeq(string(all), "\x00") {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value, err
		}
	}
	return "", err
}

// path returns where a file of CRI-O's is for this process.
func (c *runningCRIO) path(name string) string { return c.root().path(name) }

func (c *runningCRIO) root() Options { return Options{Root: fmt.Sprintf("/proc/%d/root", c.pid)} }

// checkKeys counts the private keys in CRI-O's decryption_keys_path, -1 if it does
// not exist. The error is that with which CRI-O fails every pull, of plain images
// too: as getDecryptionKeys in server/utils.go of CRI-O 1.34 does, it takes no file
// that is not a key without a password, and no symbolic link.
func (c *runningCRIO) checkKeys() (keys int, err error) {
	if c.keysPath == "" {
		return -1, nil
	}
	dir := c.root().linkPath(c.keysPath)
	if strings.HasSuffix(c.keysPath, "/") {
		dir = c.path(c.keysPath) // so CRI-O follows a link, too
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
		if _, err := utils.SortDecryptionKeys(base64.StdEncoding.EncodeToString(key)); err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
		keys++
		return nil
	})
	return keys, err
}

// maxCRIOKey is the most that is read of a key, in bytes.
const maxCRIOKey = 1 << 20

// readSmall reads a file that is no larger than a key can be. It does not wait for
// a pipe, as CRI-O does.
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
		return nil, errors.New("it is not a file but a pipe, a socket or a device")
	case info.Size() > maxCRIOKey:
		return nil, fmt.Errorf("it is larger than %d KiB, so it is no key", maxCRIOKey>>10)
	}
	return io.ReadAll(io.LimitReader(f, maxCRIOKey))
}
