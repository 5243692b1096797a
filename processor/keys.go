package processor

import (
	"encoding/base64"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/utils"
)

// KeysIn returns the private keys and certificates in the files below dir, for
// [Unwrap] to try. Links to files are followed, as a Kubernetes secret has
// them. A file that is no key is an error.
func KeysIn(dir string) (*config.DecryptConfig, error) {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	var keys []string
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return nil
		}
		key, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		encoded := base64.StdEncoding.EncodeToString(key)
		if _, err := utils.SortDecryptionKeys(encoded); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		keys = append(keys, encoded)
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("no keys in %s", dir)
	}
	parameters, err := utils.SortDecryptionKeys(strings.Join(keys, ","))
	if err != nil {
		return nil, err
	}
	return &config.DecryptConfig{Parameters: parameters}, nil
}
