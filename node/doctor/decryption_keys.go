package doctor

import (
	"context"
	"fmt"
	"time"

	"github.com/ctrlplane/pilot/processor"
)

// maxNamedKeys bounds the unusable files that the step names.
const maxNamedKeys = 20

// decryptionKeysCheck returns the check of decryption-keys-path, if it is set.
func (e *examination) decryptionKeysCheck() []check {
	if e.DecryptionKeysPath == "" {
		return nil
	}
	return []check{{StepDecryptionKeys, []string{StepConfiguration}, 5 * time.Second, e.decryptionKeys}}
}

// decryptionKeys reads the node's private keys as the differ does.
func (e *examination) decryptionKeys(ctx context.Context) Step {
	path := e.DecryptionKeysPath
	s, err := processor.NewKeyDir(path, nil).State(ctx)
	switch {
	case err != nil:
		return failed(fmt.Sprintf("%s can't be read in time: is its file system mounted?", path), "ls -la "+path)
	case len(s.Unusable) > 0:
		return failed(fmt.Sprintf("%s; keys that can be used: %d", s.Summary(maxNamedKeys), s.Usable),
			"ls -la "+path, "correct or remove those files, or decryption-keys-path in "+e.Configuration+": no restart is needed")
	case s.Usable == 0:
		return passed(path + " contains no keys yet; new ones need no restart")
	}
	return passed(fmt.Sprintf("%s: %d can be used; all are read for each layer", path, s.Usable))
}
