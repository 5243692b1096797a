// Command ctd-decoder stands for imgcrypt's program of that name, which can't be
// installed with go install: it does the same with imgcrypt's library.
package main

import (
	"io"
	"log"
	"os"

	"github.com/containerd/imgcrypt/v2"
	"github.com/containerd/imgcrypt/v2/images/encryption"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func main() {
	log.SetFlags(0)
	data, err := io.ReadAll(os.NewFile(3, "payload"))
	if err != nil {
		log.Fatal(err)
	}
	var any anypb.Any
	if err := proto.Unmarshal(data, &any); err != nil {
		log.Fatal(err)
	}
	v, err := typeurl.UnmarshalAny(&any)
	if err != nil {
		log.Fatal(err)
	}
	payload := v.(*imgcrypt.Payload)
	_, layer, _, err := encryption.DecryptLayer(&payload.DecryptConfig, os.Stdin, payload.Descriptor, false)
	if err != nil {
		log.Fatal(err)
	}
	for {
		_, err := io.CopyN(os.Stdout, layer, 10*1024) // as imgcrypt's does
		if err == io.EOF {
			return
		}
		if err != nil {
			log.Fatal(err)
		}
	}
}
