// Sigstore signs images with a key pair and verifies such signatures by sigstore's
// libraries, with what cosign keeps in a registry and without any service:
//
//	sigstore [FLAG...] sign-bundle PRIVATE-KEY IMAGE@DIGEST
//	sigstore [FLAG...] verify PUBLIC-KEY IMAGE
//
// sign-bundle pushes a bundle as a referrer. verify prints "tag" for each valid signature
// under the tag sha256-….sig and "bundle" for each valid bundle, and fails if there is none.
package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	protobundle "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	protocommon "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	protodsse "github.com/sigstore/protobuf-specs/gen/pb-go/dsse"
	"github.com/sigstore/sigstore-go/pkg/bundle"
	"github.com/sigstore/sigstore-go/pkg/root"
	"github.com/sigstore/sigstore-go/pkg/verify"
	"github.com/sigstore/sigstore/pkg/cryptoutils"
	"github.com/sigstore/sigstore/pkg/signature"
	"github.com/sigstore/sigstore/pkg/signature/dsse"
	"github.com/sigstore/sigstore/pkg/signature/payload"
	"google.golang.org/protobuf/encoding/protojson"
)

const (
	// bundleType is the type of a bundle, and of the artifact that has it:
	// https://docs.sigstore.dev/about/bundle.
	bundleType = "application/vnd.dev.sigstore.bundle.v0.3+json"
	// signatureAnnotation holds a signature of the layer, in base64:
	// https://github.com/sigstore/cosign/blob/main/specs/SIGNATURE_SPEC.md.
	signatureAnnotation = "dev.cosignproject.cosign/signature"
	inTotoType          = "application/vnd.in-toto+json"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "sigstore:", err)
		os.Exit(1)
	}
}

func run() error {
	user := flag.String("user", "", "USER:PASSWORD for the registry")
	ca := flag.String("ca", "", "file of the registry's CA")
	cert := flag.String("cert", "", "file of the client certificate")
	key := flag.String("key", "", "file of its key")
	flag.Parse()
	if flag.NArg() != 3 {
		return errors.New("usage: sigstore [FLAG...] sign-bundle PRIVATE-KEY IMAGE@DIGEST | verify PUBLIC-KEY IMAGE")
	}
	options := []remote.Option{remote.WithContext(context.Background())}
	if *user != "" {
		name, password, _ := strings.Cut(*user, ":")
		options = append(options, remote.WithAuth(&authn.Basic{Username: name, Password: password}))
	}
	if *ca != "" {
		config := &tls.Config{RootCAs: x509.NewCertPool()}
		b, err := os.ReadFile(*ca)
		if err != nil {
			return err
		}
		config.RootCAs.AppendCertsFromPEM(b)
		pair, err := tls.LoadX509KeyPair(*cert, *key)
		if err != nil {
			return err
		}
		config.Certificates = []tls.Certificate{pair}
		options = append(options, remote.WithTransport(&http.Transport{TLSClientConfig: config}))
	}
	b, err := os.ReadFile(flag.Arg(1))
	if err != nil {
		return err
	}
	switch flag.Arg(0) {
	case "sign-bundle":
		private, err := cryptoutils.UnmarshalPEMToPrivateKey(b, cryptoutils.SkipPassword)
		if err != nil {
			return err
		}
		image, err := name.NewDigest(flag.Arg(2))
		if err != nil {
			return err
		}
		return signBundle(private, image, options)
	case "verify":
		public, err := cryptoutils.UnmarshalPEMToPublicKey(b)
		if err != nil {
			return err
		}
		verifier, err := signature.LoadVerifier(public, crypto.SHA256)
		if err != nil {
			return err
		}
		ref, err := name.ParseReference(flag.Arg(2))
		if err != nil {
			return err
		}
		desc, err := remote.Head(ref, options...)
		if err != nil {
			return err
		}
		return verifyAll(verifier, ref.Context().Digest(desc.Digest.String()), options)
	}
	return fmt.Errorf("unknown command %q", flag.Arg(0))
}

// signBundle pushes a bundle with a signed statement about an image, as cosign sign does.
func signBundle(private crypto.PrivateKey, image name.Digest, options []remote.Option) error {
	subject, err := remote.Head(image, options...)
	if err != nil {
		return err
	}
	statement, err := json.Marshal(map[string]any{
		"_type":         "https://in-toto.io/Statement/v1",
		"subject":       []any{map[string]any{"name": "", "digest": map[string]string{"sha256": subject.Digest.Hex}}},
		"predicateType": "https://sigstore.dev/cosign/sign/v1",
		"predicate":     map[string]any{},
	})
	if err != nil {
		return err
	}
	signer, err := signature.LoadSigner(private, crypto.SHA256)
	if err != nil {
		return err
	}
	signed, err := dsse.WrapSigner(signer, inTotoType).SignMessage(bytes.NewReader(statement))
	if err != nil {
		return err
	}
	var envelope protodsse.Envelope
	if err := protojson.Unmarshal(signed, &envelope); err != nil {
		return err
	}
	doc, err := protojson.Marshal(&protobundle.Bundle{
		MediaType: bundleType,
		VerificationMaterial: &protobundle.VerificationMaterial{
			Content: &protobundle.VerificationMaterial_PublicKey{PublicKey: &protocommon.PublicKeyIdentifier{Hint: "key"}},
		},
		Content: &protobundle.Bundle_DsseEnvelope{DsseEnvelope: &envelope},
	})
	if err != nil {
		return err
	}
	artifact, err := mutate.AppendLayers(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), bundleType), static.NewLayer(doc, bundleType))
	if err != nil {
		return err
	}
	about := mutate.Subject(artifact, *subject).(v1.Image)
	digest, err := about.Digest()
	if err != nil {
		return err
	}
	return remote.Write(image.Context().Digest(digest.String()), about, options...)
}

// verifyAll prints what kind each valid signature of an image is of.
func verifyAll(verifier signature.Verifier, image name.Digest, options []remote.Option) error {
	valid := 0
	check := func(kind string, err error) {
		if err != nil {
			fmt.Fprintf(os.Stderr, "sigstore: %s: %v\n", kind, err)
			return
		}
		valid++
		fmt.Println(kind)
	}
	tag := image.Context().Tag(strings.Replace(image.DigestStr(), ":", "-", 1) + ".sig")
	if signatures, err := remote.Image(tag, options...); err != nil {
		check("tag", err)
	} else if manifest, err := signatures.Manifest(); err != nil {
		check("tag", err)
	} else {
		for _, layer := range manifest.Layers {
			check("tag", verifyTag(verifier, image, signatures, layer))
		}
	}
	referrers, err := remote.Referrers(image, append(options, remote.WithFilter("artifactType", bundleType))...)
	if err != nil {
		return err
	}
	index, err := referrers.IndexManifest()
	if err != nil {
		return err
	}
	for _, desc := range index.Manifests {
		check("bundle", verifyBundle(verifier, image, desc, options))
	}
	if valid == 0 {
		return fmt.Errorf("%s has no valid signature", image)
	}
	return nil
}

// verifyTag verifies a signature that is a layer of what cosign's tag names.
func verifyTag(verifier signature.Verifier, image name.Digest, signatures v1.Image, desc v1.Descriptor) error {
	raw, err := base64.StdEncoding.DecodeString(desc.Annotations[signatureAnnotation])
	if err != nil {
		return err
	}
	layer, err := signatures.LayerByDigest(desc.Digest)
	if err != nil {
		return err
	}
	doc, err := read(layer)
	if err != nil {
		return err
	}
	if err := verifier.VerifySignature(bytes.NewReader(raw), bytes.NewReader(doc)); err != nil {
		return err
	}
	var claim payload.SimpleContainerImage
	if err := json.Unmarshal(doc, &claim); err != nil {
		return err
	}
	if claim.Critical.Image.DockerManifestDigest != image.DigestStr() {
		return fmt.Errorf("it is about %s", claim.Critical.Image.DockerManifestDigest)
	}
	return nil
}

// verifyBundle verifies a bundle that is a layer of a referrer.
func verifyBundle(verifier signature.Verifier, image name.Digest, desc v1.Descriptor, options []remote.Option) error {
	artifact, err := remote.Image(image.Context().Digest(desc.Digest.String()), options...)
	if err != nil {
		return err
	}
	layers, err := artifact.Layers()
	if err != nil {
		return err
	}
	if len(layers) != 1 {
		return fmt.Errorf("%s has %d layers", desc.Digest, len(layers))
	}
	doc, err := read(layers[0])
	if err != nil {
		return err
	}
	var b bundle.Bundle
	if err := b.UnmarshalJSON(doc); err != nil {
		return err
	}
	key := root.NewExpiringKey(verifier, time.Time{}, time.Time{})
	v, err := verify.NewVerifier(root.NewTrustedPublicKeyMaterial(func(string) (root.TimeConstrainedVerifier, error) { return key, nil }), verify.WithNoObserverTimestamps())
	if err != nil {
		return err
	}
	digest, err := hex.DecodeString(strings.TrimPrefix(image.DigestStr(), "sha256:"))
	if err != nil {
		return err
	}
	_, err = v.Verify(&b, verify.NewPolicy(verify.WithArtifactDigest("sha256", digest), verify.WithKey()))
	return err
}

func read(layer v1.Layer) ([]byte, error) {
	r, err := layer.Compressed()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}
