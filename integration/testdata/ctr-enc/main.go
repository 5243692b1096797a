// Command ctr-enc stands for imgcrypt's program of that name, which can't be
// installed with go install: it does the same with imgcrypt's library.
//
//	ctr-enc ADDRESS encrypt|decrypt KEYFILE IMAGE NEWNAME
package main

import (
	"context"
	"log"
	"os"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/imgcrypt/v2/images/encryption"
	"github.com/containers/ocicrypt/config"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	log.SetFlags(0)
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5]); err != nil {
		log.Fatal(err)
	}
}

func run(address, op, keyFile, name, newName string) error {
	key, err := os.ReadFile(keyFile)
	if err != nil {
		return err
	}
	client, err := containerd.New(address)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, done, err := client.WithLease(namespaces.WithNamespace(context.Background(), namespaces.Default))
	if err != nil {
		return err
	}
	defer done(ctx)
	from, err := client.ImageService().Get(ctx, name)
	if err != nil {
		return err
	}
	cc := &config.CryptoConfig{
		EncryptConfig: &config.EncryptConfig{Parameters: map[string][][]byte{"pubkeys": {key}}},
		DecryptConfig: &config.DecryptConfig{Parameters: map[string][][]byte{"privkeys": {key}, "privkeys-passwords": {nil}}},
	}
	change := encryption.EncryptImage
	if op == "decrypt" {
		change = encryption.DecryptImage
	}
	target, _, err := change(ctx, client.ContentStore(), from.Target, cc, func(ocispec.Descriptor) bool { return true })
	if err != nil {
		return err
	}
	_, err = client.ImageService().Create(ctx, images.Image{Name: newName, Target: target})
	return err
}
