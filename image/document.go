package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/ctrlplane/pilot/internal/jsonedit"
)

// attestationAnnotation, on an entry of an index, holds the digest of the
// manifest that the entry makes a statement about, as BuildKit writes it.
const attestationAnnotation = "vnd.docker.reference.digest"

// attestationTypeAnnotation, on an entry of an index, marks an attestation, as BuildKit
// writes it.
const attestationTypeAnnotation = "vnd.docker.reference.type"

// edit is how a manifest or an index changes.
type edit struct {
	list    string                                   // the key of the array whose elements change: layers or manifests
	changes map[int]change                           // by index into it
	removed []int                                    // indexes into it, in order, of elements to leave out
	renamed map[digest.Digest]ocispec.Descriptor     // what attestations refer to
	subject *ocispec.Descriptor                      // replaces the subject, if not nil
	config  *ocispec.Descriptor                      // replaces the configuration when converting, if not nil
	content func(ocispec.Descriptor) ([]byte, error) // reads a small blob
	mode    mode
	plain   []string // digests of entries of an index that are known not to be encrypted
	nested  bool     // another index refers to it
	// done is set if no encrypted layer is left after decrypting, and fresh if there
	// was none before encrypting: in the whole image, for an index.
	done, fresh bool
	// was is set if something below an index is or was encrypted. Otherwise a subject
	// may have been, and there is nothing to restore.
	was bool
}

// change is how a descriptor changes. Its other members stay.
type change struct {
	desc        ocispec.Descriptor // MediaType, Digest and Size
	annotations map[string]string  // to set, or to remove where empty
	none        bool               // nothing changes
	// sealKey is derived from the layer key, if the layer is encrypted or decrypted.
	sealKey []byte
}

// apply returns doc edited and its new media type; mediaType is that which it
// has.
func (e *edit) apply(doc []byte, mediaType string) ([]byte, string, error) {
	if err := unambiguous(doc); err != nil {
		return nil, "", err
	}
	notes, err := restoreOf(doc)
	if err != nil {
		return nil, "", err
	}
	if e.mode == encrypting && e.fresh || notes == nil {
		notes = make(restore) // another tool may have left old ones
	}
	array, err := jsonedit.Get(doc, e.list)
	if err != nil {
		return nil, "", err
	}
	array, err = jsonedit.MapElements(array, func(i int, element []byte) ([]byte, error) {
		at := "/" + e.list + "/" + strconv.Itoa(i)
		edited, err := e.element(i, element, at, notes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", at, err)
		}
		return edited, nil
	})
	if err != nil {
		return nil, "", err
	}
	if array, err = notes.removeElements(array, e.list, e.removed); err != nil {
		return nil, "", err
	}
	if doc, err = jsonedit.Set(doc, e.list, array); err != nil {
		return nil, "", err
	}
	if e.subject != nil {
		doc, err = jsonedit.Edit(doc, "subject", func(subject []byte) ([]byte, error) {
			if err := unambiguous(subject); err != nil {
				return nil, err
			}
			return e.redescribed(subject, *e.subject, "/subject", notes)
		})
		if err != nil {
			return nil, "", fmt.Errorf("/subject: %w", err)
		}
	}
	switch {
	case e.mode == decrypting && e.done:
		return notes.apply(doc, mediaType, e.list, e.content)
	case e.mode == decrypting && (e.was || len(notes) > 0) && e.notePlain(notes):
		doc, err = notes.write(doc)
		return doc, mediaType, err
	case e.mode == converting:
		return e.convertedDocument(doc, mediaType)
	case e.mode != encrypting:
		return doc, mediaType, nil
	}

	if doc, err = convert(doc, "", notes); err != nil {
		return nil, "", err
	}
	if oci, ok := dockerTypes[mediaType]; ok {
		if notes["/mediaType"] == "" {
			return nil, "", errors.New("a Docker manifest has a mediaType, and this has none")
		}
		mediaType = oci
	}
	doc, err = jsonedit.Edit(doc, "config", func(config []byte) ([]byte, error) {
		if err := unambiguous(config); err != nil {
			return nil, err
		}
		return convert(config, "/config", notes)
	})
	if err != nil {
		return nil, "", err
	}
	e.notePlain(notes)
	doc, err = notes.write(doc)
	return doc, mediaType, err
}

// notePlain notes which entries are not encrypted, and reports whether it did: it
// matters if there is something to restore, which may be in the index around it.
func (e *edit) notePlain(notes restore) bool {
	delete(notes, plainKey) // of entries that are encrypted now
	if len(e.plain) == 0 || len(notes) == 0 && !e.nested {
		return false
	}
	notes[plainKey] = strings.Join(e.plain, " ")
	return true
}

// element edits one element of the list.
func (e *edit) element(i int, element []byte, at string, notes restore) (_ []byte, err error) {
	if err := unambiguous(element); err != nil {
		return nil, err
	}
	c, changes := e.changes[i]
	switch {
	case changes && e.mode == encrypting:
		element, err = e.encrypted(element, c, at, notes)
	case changes && e.mode == decrypting:
		element, err = e.decrypted(element, c, at, notes)
	case changes && e.mode == converting:
		element, err = e.converted(element, c)
	case changes:
		element, err = e.rewrapped(element, c)
	case (e.mode == encrypting || e.mode == converting) && e.list == "layers":
		element, err = convert(element, at, notes)
	}
	if err != nil {
		return nil, err
	}
	return e.follow(i, element, at, notes)
}

// follow makes entry i, if it is an attestation, refer to the manifest that replaced the
// one that it is about.
func (e *edit) follow(i int, element []byte, at string, notes restore) ([]byte, error) {
	if len(e.renamed) == 0 {
		return element, nil
	}
	var desc ocispec.Descriptor
	if err := json.Unmarshal(element, &desc); err != nil {
		return nil, err
	}
	to, ok := e.renamed[digest.Digest(desc.Annotations[attestationAnnotation])]
	if !ok {
		return element, nil
	}
	if slices.Contains(e.removed, i) && !e.changesTo(to.Digest) {
		return nil, fmt.Errorf("the attestation %s is about %s in another index, and can't be left out, since decrypting would not put that back: keep it, or remove it first", desc.Digest, desc.Annotations[attestationAnnotation])
	}
	annotations, err := jsonedit.Get(element, "annotations")
	if err != nil {
		return nil, err
	}
	had, err := jsonedit.Get(annotations, attestationAnnotation)
	if err != nil {
		return nil, err
	}
	if e.mode == encrypting && string(had) != string(jsonedit.Quote(jsonedit.Unquote(had))) {
		mask, err := jsonedit.Spelling(had)
		if err != nil {
			return nil, err
		}
		notes.note(at+"/annotations/"+attestationAnnotation, jsonedit.Quote(mask))
	}
	now := jsonedit.Quote(to.Digest.String())
	if e.mode != encrypting {
		now = jsonedit.QuoteLike(had, to.Digest.String())
	}
	if annotations, err = jsonedit.Set(annotations, attestationAnnotation, now); err != nil {
		return nil, err
	}
	return jsonedit.Set(element, "annotations", annotations)
}

// changesTo reports whether an element of the list becomes one of that digest.
func (e *edit) changesTo(d digest.Digest) bool {
	for _, c := range e.changes {
		if c.desc.Digest == d {
			return true
		}
	}
	return false
}
