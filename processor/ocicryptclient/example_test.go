package ocicryptclient_test

import (
	"context"
	"encoding/json"
	"log"
	"os"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
	"github.com/ctrlplane/pilot/processor/ocicryptclient"
	"github.com/ctrlplane/pilot/processor/ocicryptclient/grpcdial"
)

// Decrypt a layer from standard input with the key providers of the ocicrypt.conf that
// $OCICRYPT_KEYPROVIDER_CONFIG names, such as a "pilot serve".
func Example() {
	var desc ocispec.Descriptor
	if err := json.Unmarshal([]byte(os.Getenv("DESCRIPTOR")), &desc); err != nil {
		log.Fatal(err)
	}
	providers, err := ocicryptclient.FromEnvironment(grpcdial.Call)
	if err != nil {
		log.Fatal(err)
	}
	if err := processor.Decrypt(context.Background(), os.Stdout, os.Stdin, desc, processor.Keys{Providers: providers}); err != nil {
		log.Fatal(err)
	}
}
