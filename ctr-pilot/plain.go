package main

import (
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/image"
)

// plainFlags are the flags for what may stay readable in an encrypted image.
func plainFlags() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "allow-plain", Usage: "encrypt what can be encrypted, even if something stays readable that --layer and --platform do not leave out"},
		&cli.BoolFlag{Name: "keep-absent", Usage: "keep platforms whose content is not here in the image, as they are; by default they are left out"},
		&cli.StringFlag{Name: "attestations", Value: string(image.EncryptAttestations), Usage: "what to do with SBOMs and provenance: encrypt, drop or keep"},
		jsonFlag(),
	}
}

// whyLeftOut returns why an entry of an index was left out.
func whyLeftOut(cmd *cli.Command, d ocispec.Descriptor) string {
	if image.IsAttestation(d) {
		if image.Attestations(cmd.String("attestations")) == image.DropAttestations {
			return "an attestation"
		}
		return "an attestation, which is not here or of a platform that is not"
	}
	return "its content is not here: pull it with --all-platforms, or keep it with --keep-absent"
}

// refused reports an image that was not encrypted since something would stay
// readable, and returns the error.
func refused(cmd *cli.Command, err *image.PlainError) error {
	if cmd.Bool("json") {
		if err := printJSON(cryptReport{Plain: err.Plain, LeftOut: []leftOut{}}); err != nil {
			return err
		}
	} else {
		printPlain("would stay readable", err.Plain)
	}
	return fmt.Errorf("%d would stay readable, so nothing was encrypted: accept that with --allow-plain, or select what to encrypt with --layer or --platform", len(err.Plain))
}
