// criopull pulls an image as CRI-O does, with the library and the calls of
// CRI-O's main branch (server/utils.go and internal/storage/image.go): for what
// CRI-O's releases, which build with an older version of it, do not show.
//
//	criopull -root DIR -keys DIR REGISTRY/NAME:TAG
//
// It prints the digest of the manifest that it stored in the containers-storage
// below -root, and the directory of the image's files.
package main

import (
	"context"
	"encoding/base64"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/utils"
	"go.podman.io/image/v5/copy"
	"go.podman.io/image/v5/docker"
	"go.podman.io/image/v5/docker/reference"
	"go.podman.io/image/v5/manifest"
	"go.podman.io/image/v5/signature"
	istorage "go.podman.io/image/v5/storage"
	"go.podman.io/image/v5/types"
	"go.podman.io/storage"
	"go.podman.io/storage/pkg/reexec"
)

func main() {
	if reexec.Init() {
		return
	}
	root := flag.String("root", "", "`DIRECTORY` of the containers-storage")
	keys := flag.String("keys", "/etc/crio/keys/", "decryption_keys_path")
	flag.Parse()
	if err := pull(context.Background(), *root, *keys, flag.Arg(0)); err != nil {
		fmt.Fprintln(os.Stderr, "criopull:", err)
		os.Exit(1)
	}
}

func pull(ctx context.Context, root, keys, image string) error {
	dc, err := decryptionKeys(keys)
	if err != nil {
		return err
	}
	store, err := storage.GetStore(storage.StoreOptions{GraphDriverName: "vfs", GraphRoot: filepath.Join(root, "graph"), RunRoot: filepath.Join(root, "run")})
	if err != nil {
		return err
	}
	defer store.Shutdown(true)
	name, err := reference.ParseDockerRef(image)
	if err != nil {
		return err
	}
	src, err := docker.NewReference(name)
	if err != nil {
		return err
	}
	// Of a name by digest, the digest too.
	dest, err := istorage.Transport.NewStoreReference(store, name, "")
	if err != nil {
		return err
	}
	policy, err := signature.NewPolicyContext(&signature.Policy{Default: signature.PolicyRequirements{signature.NewPRInsecureAcceptAnything()}})
	if err != nil {
		return err
	}
	defer policy.Destroy()
	stored, err := copy.Image(ctx, policy, dest, src, &copy.Options{
		SourceCtx:        &types.SystemContext{DockerInsecureSkipTLSVerify: types.OptionalBoolTrue},
		OciDecryptConfig: dc,
	})
	if err != nil {
		return err
	}
	digest, err := manifest.Digest(stored)
	if err != nil {
		return err
	}
	_, img, err := istorage.ResolveReference(dest)
	if err != nil {
		return err
	}
	files, err := store.MountImage(img.ID, nil, "")
	if err != nil {
		return err
	}
	fmt.Println(digest)
	fmt.Println(files)
	return nil
}

// decryptionKeys does as CRI-O's function of nearly that name: what pilot needs
// is the empty configuration, with which ocicrypt asks its key providers.
func decryptionKeys(dir string) (*config.DecryptConfig, error) {
	if _, err := os.Stat(dir); os.IsNotExist(err) {
		return &config.DecryptConfig{}, nil
	}
	var list []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		key, err := os.ReadFile(path)
		list = append(list, base64.StdEncoding.EncodeToString(key))
		return err
	})
	if err != nil {
		return nil, err
	}
	parameters, err := utils.SortDecryptionKeys(strings.Join(list, ","))
	if err != nil {
		return nil, err
	}
	return config.InitDecryption(parameters).DecryptConfig, nil
}
