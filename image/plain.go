package image

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/processor"
)

// Plain is a blob that is readable in an image, or may be. Manifests, indexes and
// what is in them, such as annotations, are always readable and not reported.
type Plain struct {
	// Platform is that of the manifest that refers to the blob, such as
	// linux/amd64, or empty if it is not known.
	Platform string `json:"platform,omitempty"`
	// Manifest is the digest of the manifest or index that refers to the blob,
	// in the image that was examined, or in the one that was to be encrypted.
	Manifest  digest.Digest `json:"manifest"`
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"mediaType"`
	Size      int64         `json:"size"`
	Reason    Reason        `json:"reason"`
	// URLs are where anyone may get the plain blob.
	URLs []string `json:"urls,omitempty"`
}

// Reason is why a blob is readable.
type Reason string

const (
	// ReasonConfig is the configuration of an image or artifact. Everything that
	// handles images has to read it, so it is never encrypted.
	ReasonConfig Reason = "config"
	// ReasonNotSelected is a layer that [Options] did not select.
	ReasonNotSelected Reason = "not-selected"
	// ReasonAttestation is a blob of an attestation that is kept as it is.
	ReasonAttestation Reason = "attestation"
	// ReasonAbsent is a manifest or an index that is not in the store, or whose
	// layers are not. What it is in a registry is not known here.
	ReasonAbsent Reason = "absent"
	// ReasonForeign is a layer that is not in the store, since its publisher
	// distributes it.
	ReasonForeign Reason = "foreign"
	// ReasonNotImage is an entry of an index that is neither a manifest nor an
	// index, or whose content is not what its media type says. It may refer to
	// blobs that are not reported.
	ReasonNotImage Reason = "not-an-image"
	// ReasonMediaType is a layer whose media type has no encrypted form.
	ReasonMediaType Reason = "media-type"
	// ReasonSharedConfig is an encrypted layer that is also the configuration of
	// a manifest, which stays readable.
	ReasonSharedConfig Reason = "also-config"
	// ReasonSharedManifest is an encrypted layer that is also a manifest or an index
	// of the image, which stays readable.
	ReasonSharedManifest Reason = "also-manifest"
	// ReasonURLs is an encrypted layer that was plain at URLs, where it may still
	// be.
	ReasonURLs Reason = "urls"
	// ReasonData is an encrypted layer whose descriptor has data that is not its
	// blob. It may be the plain one.
	ReasonData Reason = "data"
	// ReasonNotEncrypted is a layer that is not encrypted.
	ReasonNotEncrypted Reason = "not-encrypted"
	// ReasonNoKey is a layer with the media type of an encrypted one and no wrapped
	// key, so it may not be encrypted.
	ReasonNoKey Reason = "no-key"
)

// reasonTexts explain reasons, after a description of the blob.
var reasonTexts = map[Reason]string{
	ReasonConfig:         "a configuration is never encrypted",
	ReasonNotSelected:    "not selected by --layer or --platform",
	ReasonAttestation:    "kept by --attestations=keep",
	ReasonAbsent:         "its content is not here (pull it with --all-platforms)",
	ReasonForeign:        "a foreign layer whose content is not here",
	ReasonNotImage:       "neither a manifest nor an index; what it refers to is readable too",
	ReasonMediaType:      "its media type has no encrypted form",
	ReasonSharedConfig:   "encrypted as a layer, but also the configuration of a manifest, which is readable",
	ReasonSharedManifest: "encrypted as a layer, but also a manifest or an index of the image, which is readable",
	ReasonURLs:           "encrypted, but readable where it was published",
	ReasonData:           "encrypted, but its descriptor has data that is something else",
	ReasonNotEncrypted:   "not encrypted",
	ReasonNoKey:          "it has the media type of an encrypted layer, but no key, so it may not be encrypted",
}

// String returns one line with the blob and why it is readable. Text from the image is
// quoted, so it has no control characters.
func (p Plain) String() string {
	platform := p.Platform
	if platform == "" {
		platform = "no platform"
	}
	text := fmt.Sprintf("%.100q, manifest %.200q, blob %.200q (%.200q, %d bytes): %s", platform, p.Manifest, p.Digest, p.MediaType, p.Size, reasonTexts[p.Reason])
	if len(p.URLs) > 0 {
		text += fmt.Sprintf(" (%.1000q)", strings.Join(p.URLs, " "))
	}
	return strings.ReplaceAll(text, `"`, "")
}

// Attestations is what [Encrypt] does with the attestations in an index, such as
// BuildKit's SBOMs and provenance.
type Attestations string

const (
	// EncryptAttestations encrypts them like images. It is the default.
	EncryptAttestations Attestations = "encrypt"
	// DropAttestations leaves them out of the new index.
	DropAttestations Attestations = "drop"
	// KeepAttestations leaves them readable.
	KeepAttestations Attestations = "keep"
)

// PlainError is the error of [Encrypt] for an image of which something would stay
// readable that the [Options] do not accept. Nothing was written, unless content
// was removed from the store at the same time.
type PlainError struct {
	// Plain is what the options do not accept, at least one.
	Plain []Plain
}

func (e *PlainError) Error() string {
	text := "this would stay readable: " + e.Plain[0].String()
	if more := len(e.Plain) - 1; more > 0 {
		text += fmt.Sprintf("; and %d more", more)
	}
	return text
}

// Unaccepted returns those in list that only [Options].AllowPlain accepts.
func Unaccepted(list []Plain) []Plain {
	return slices.DeleteFunc(slices.Clone(list), func(p Plain) bool {
		switch p.Reason {
		case ReasonConfig, ReasonURLs: // not readable by what this does
			return true
		case ReasonNotSelected, ReasonAttestation, ReasonAbsent: // asked for
			return true
		}
		return false
	})
}

// Inspect returns what is readable in the selected part of an image, blob by blob.
// The image is fully encrypted if [NotEncrypted] finds none in it.
func Inspect(ctx context.Context, store Store, target ocispec.Descriptor, opts Options) ([]Plain, error) {
	w := newWork(store, opts, inspecting, nil)
	w.strict = true
	if _, err := w.visit(ctx, target, 0); err != nil {
		return nil, err
	}
	w.addShared()
	return w.plain, w.checkSelection()
}

// NotEncrypted returns those in a list of [Inspect] that could be encrypted, or may not
// be: all except configurations.
func NotEncrypted(list []Plain) []Plain {
	return slices.DeleteFunc(slices.Clone(list), func(p Plain) bool { return p.Reason == ReasonConfig })
}

// addPlain reports a blob that parent refers to.
func (w *work) addPlain(parent, blob ocispec.Descriptor, platform *ocispec.Platform, reason Reason) {
	w.plain = append(w.plain, newPlain(parent, blob, platform, reason))
}

func newPlain(parent, blob ocispec.Descriptor, platform *ocispec.Platform, reason Reason) Plain {
	p := Plain{Manifest: parent.Digest, Digest: blob.Digest, MediaType: blob.MediaType, Size: blob.Size, Reason: reason}
	if platform != nil {
		p.Platform = platforms.FormatAll(*platform)
	}
	if reason == ReasonForeign || reason == ReasonURLs {
		p.URLs = blob.URLs
	}
	return p
}

// unencryptable returns why [Encrypt] can't encrypt a layer, or an empty reason.
func (w *work) unencryptable(ctx context.Context, l ocispec.Descriptor) (Reason, error) {
	if processor.IsEncrypted(l.MediaType) {
		return "", nil
	}
	if _, ok := processor.EncryptedMediaType(l.MediaType); !ok {
		return ReasonMediaType, nil
	}
	if len(l.URLs) == 0 && !images.IsNonDistributable(l.MediaType) {
		return "", nil
	}
	here, err := w.has(ctx, l)
	if err == nil && !here {
		return ReasonForeign, nil
	}
	return "", err
}

// inspectLayer reports a layer of an image that is not being changed.
func (w *work) inspectLayer(parent, l ocispec.Descriptor, platform *ocispec.Platform) {
	switch {
	case !processor.IsEncrypted(l.MediaType):
		w.addPlain(parent, l, platform, ReasonNotEncrypted)
	case !processor.HasRecipients(l):
		w.addPlain(parent, l, platform, ReasonNoKey)
	case strangeData(l):
		w.addPlain(parent, l, platform, ReasonData)
	case len(l.URLs) > 0:
		w.addPlain(parent, l, platform, ReasonURLs)
	}
}

// strangeData reports whether a descriptor has data that is not the content of what
// it describes.
func strangeData(desc ocispec.Descriptor) bool { return len(desc.Data) > 0 && inlined(desc) == nil }

// report reports what is readable in a manifest, or will be.
func (w *work) report(desc ocispec.Descriptor, m ocispec.Manifest, c choice) {
	if w.mode != encrypting && w.mode != inspecting {
		return
	}
	if m.Config.Digest != "" && (c.selected || w.mode == encrypting) {
		w.addPlain(desc, m.Config, c.platform, ReasonConfig)
	}
	for i, l := range m.Layers {
		reason := c.plain[i]
		switch {
		case w.mode == inspecting && reason != ReasonNotSelected:
			w.inspectLayer(desc, l, c.platform)
		case w.mode == inspecting:
		case reason != "" && (!processor.IsEncrypted(l.MediaType) || !processor.HasRecipients(l)):
			w.addPlain(desc, l, c.platform, reason)
		case strangeData(l):
			w.addPlain(desc, l, c.platform, ReasonData)
		case len(l.URLs) > 0:
			w.addPlain(desc, l, c.platform, ReasonURLs)
		}
		if slices.Contains(c.layers, i) {
			w.encrypted = append(w.encrypted, newPlain(desc, l, c.platform, ""))
		}
	}
}

// addShared reports the layers that were or are to be encrypted and are also
// configurations or manifests, which stay as they are.
func (w *work) addShared() {
	var configs []digest.Digest
	for _, p := range w.plain {
		if p.Reason == ReasonConfig && p.Digest != ocispec.DescriptorEmptyJSON.Digest {
			configs = append(configs, p.Digest)
		}
	}
	for _, l := range w.encrypted {
		switch {
		case slices.Contains(configs, l.Digest):
			l.Reason = ReasonSharedConfig
		case slices.Contains(w.unchanged, l.Digest):
			l.Reason = ReasonSharedManifest
		default:
			continue
		}
		w.plain = append(w.plain, l)
	}
}

// isManifest and isIndex report whether a media type is that of a manifest or of an
// index, in any spelling, since some readers accept any.
func isManifest(mediaType string) bool { return images.IsManifestType(usual(mediaType)) }

func isIndex(mediaType string) bool { return images.IsIndexType(usual(mediaType)) }

// usual returns a media type in lower case and without parameters.
func usual(mediaType string) string {
	mediaType, _, _ = strings.Cut(mediaType, ";")
	return strings.ToLower(strings.TrimSpace(mediaType))
}

// IsAttestation reports whether an entry of an index is an attestation about
// another entry.
func IsAttestation(entry ocispec.Descriptor) bool {
	return entry.Annotations[attestationAnnotation] != "" || entry.Annotations[attestationTypeAnnotation] == "attestation-manifest"
}
