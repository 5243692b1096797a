package image

import (
	"bytes"
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

// removedKey is the key in [restore] of the entries that were left out of an
// index: a JSON array of removed, in the order in which they were taken out.
const removedKey = "removed"

// removed is an element that was taken out of an array.
type removed struct {
	// Index is where it was among the elements that were there then.
	Index int `json:"index"`
	// Before is the element's text with what is between it and the element
	// before it, or After with what is between it and the one after it, if it
	// was the first.
	Before string `json:"before,omitempty"`
	After  string `json:"after,omitempty"`
	// About is the index of the remaining element that an attestation is about. The
	// digest changes, so it is not in the text.
	About *int `json:"about,omitempty"`
	// Spelling is how that digest was escaped, as jsonedit.Spelling returns it, if it was.
	Spelling string `json:"spelling,omitempty"`
}

var errRemoved = fmt.Errorf("annotation %s is damaged: the entries that were left out do not fit", restoreAnnotation)

// removeElements returns array, which is that at the key list, without the
// elements of those indexes, which are in order, and notes them. Elements
// that restoreElements would not put back are an error.
func (r restore) removeElements(array []byte, list string, indexes []int) ([]byte, error) {
	if len(indexes) == 0 {
		return array, nil
	}
	was, err := r.removed()
	if err != nil {
		return nil, err
	}
	whole, before := array, len(was)
	spellings := make([]string, 0, len(indexes))
	for _, i := range slices.Backward(indexes) {
		at, err := jsonedit.Elements(array)
		if err != nil {
			return nil, err
		}
		var one removed
		if array, one, err = cut(array, at, i); err != nil {
			return nil, err
		}
		was = append(was, one)
		spellings = append(spellings, jsonedit.Unquote([]byte(r[fmt.Sprintf("/%s/%d/annotations/%s", list, i, attestationAnnotation)])))
		r.shift("/"+list+"/", i)
	}
	if len(was) > maxDocuments {
		return nil, fmt.Errorf("%w: more than %d entries would be left out of an index", ErrLimit, maxDocuments)
	}
	if back, err := putBack(array, was[before:]); err != nil || string(back) != string(whole) {
		return nil, fmt.Errorf("decrypting could not put back the %d entries that would be left out of an index: keep them, or remove them first", len(indexes))
	}
	for i, spelling := range spellings {
		if one := &was[before+i]; one.About != nil {
			one.Spelling = spelling
		}
	}
	text, err := json.Marshal(was)
	r[removedKey] = string(text)
	return array, err
}

// cut takes element i, whose offsets are in at, out of array.
func cut(array []byte, at [][2]int, i int) ([]byte, removed, error) {
	if i >= len(at) {
		return nil, removed{}, errors.New("no such element")
	}
	one := removed{Index: i}
	from, to := at[i][0], at[i][1]
	if err := checkRestored(array[from:to]); err != nil {
		return nil, removed{}, fmt.Errorf("entry %d of the index can't be left out, since decrypting would not put it back: %w", i, err)
	}
	element, about, err := withoutAbout(array, at, i)
	if err != nil {
		return nil, removed{}, err
	}
	one.About = about
	switch {
	case i > 0:
		from = at[i-1][1]
		one.Before = string(array[from:at[i][0]]) + string(element)
	case len(at) > 1:
		to = at[1][0]
		one.After = string(element) + string(array[at[0][1]:to])
	default:
		one.After = string(element)
	}
	return jsonedit.Splice(array, from, to, nil), one, nil
}

// withoutAbout returns element i, and if it is an attestation about another element
// without the digest of that, and the index that the other will have without i.
func withoutAbout(array []byte, at [][2]int, i int) ([]byte, *int, error) {
	element := array[at[i][0]:at[i][1]]
	var attestation ocispec.Descriptor
	if err := json.Unmarshal(element, &attestation); err != nil {
		return nil, nil, err
	}
	digest := attestation.Annotations[attestationAnnotation]
	for j := range at {
		var other ocispec.Descriptor
		if err := json.Unmarshal(array[at[j][0]:at[j][1]], &other); err != nil {
			return nil, nil, err
		}
		if j == i || digest == "" || other.Digest.String() != digest {
			continue
		}
		if j > i {
			j--
		}
		element, err := setAbout(element, digest, "", "")
		return element, &j, err
	}
	return element, nil, nil
}

// setAbout sets what an attestation is about, in a spelling of [jsonedit.Spelling], if it
// is about had, written without escapes.
func setAbout(element []byte, had, digest, spelling string) ([]byte, error) {
	return jsonedit.Edit(element, "annotations", func(annotations []byte) ([]byte, error) {
		return jsonedit.Edit(annotations, attestationAnnotation, func(text []byte) ([]byte, error) {
			if string(text) != string(jsonedit.Quote(had)) {
				return text, nil
			}
			return jsonedit.QuoteAs(digest, spelling), nil
		})
	})
}

// text returns the text of the element and of what was between it and the next, to
// be put back into an array of elements with those digests, and where the element is
// in the text.
func (one removed) text(digests []digest.Digest) (text []byte, at [2]int, err error) {
	text = []byte(one.Before + one.After)
	from, to := bytes.IndexByte(text, '{'), bytes.LastIndexByte(text, '}')+1
	if from < 0 || to < from {
		return nil, at, errRemoved
	}
	between := strings.Trim(string(text[:from])+string(text[to:]), " \t\r\n")
	if between != "" && between != "," || len(digests) > 0 && between == "" {
		return nil, at, errRemoved
	}
	if one.About != nil {
		if j := *one.About; j < 0 || j >= len(digests) {
			return nil, at, errRemoved
		}
		element, err := setAbout(text[from:to], "", digests[*one.About].String(), one.Spelling)
		if err != nil {
			return nil, at, errRemoved
		}
		text, to = jsonedit.Splice(text, from, to, element), from+len(element)
	}
	if err := checkRestored(text[from:to]); err != nil {
		return nil, at, fmt.Errorf("%w: %w", errRemoved, err)
	}
	return text, [2]int{from, to}, nil
}

// shift renames what is noted of the elements after i to the index before theirs,
// and forgets what is noted of i.
func (r restore) shift(list string, i int) {
	moved := make(map[string]string)
	for at, text := range r {
		number, rest, _ := strings.Cut(strings.TrimPrefix(at, list), "/")
		n, err := strconv.Atoi(number)
		if !strings.HasPrefix(at, list) || err != nil || n < i {
			continue
		}
		delete(r, at)
		if n > i {
			moved[list+strconv.Itoa(n-1)+"/"+rest] = text
		}
	}
	for at, text := range moved {
		r[at] = text
	}
}

// removed returns what is noted under removedKey.
func (r restore) removed() ([]removed, error) {
	if r[removedKey] == "" {
		return nil, nil
	}
	var list []removed
	if json.Unmarshal([]byte(r[removedKey]), &list) != nil || len(list) > maxDocuments {
		return nil, errRemoved
	}
	return list, nil
}

// restoreElements puts back into array what was taken out.
func (r restore) restoreElements(array []byte) ([]byte, error) {
	list, err := r.removed()
	if err != nil || len(list) == 0 {
		return array, err
	}
	return putBack(array, list)
}

// putBack puts back into array what was taken out, the last first.
func putBack(array []byte, list []removed) ([]byte, error) {
	at, err := jsonedit.Elements(array)
	if err != nil {
		return nil, errRemoved
	}
	digests := make([]digest.Digest, len(at))
	for i, a := range at {
		digests[i] = digestOf(array[a[0]:a[1]])
	}
	for _, one := range slices.Backward(list) {
		offset, i := 0, one.Index
		switch {
		case i > 0 && i <= len(at):
			offset = at[i-1][1]
		case i == 0 && len(at) > 0:
			offset = at[0][0]
		case i == 0: // the only one, right after the bracket and white space
			offset = bytes.IndexByte(array, ']')
		default:
			return nil, errRemoved
		}
		text, element, err := one.text(digests)
		if err != nil {
			return nil, err
		}
		if array = jsonedit.Splice(array, offset, offset, text); len(array) > maxManifest {
			return nil, errRemoved
		}
		for j := i; j < len(at); j++ {
			at[j][0], at[j][1] = at[j][0]+len(text), at[j][1]+len(text)
		}
		at = slices.Insert(at, i, [2]int{offset + element[0], offset + element[1]})
		digests = slices.Insert(digests, i, digestOf(text[element[0]:element[1]]))
	}
	if !json.Valid(array) {
		return nil, errRemoved
	}
	return array, nil
}

// digestOf returns the digest in the text of a descriptor, or nothing.
func digestOf(element []byte) digest.Digest {
	var desc ocispec.Descriptor
	if json.Unmarshal(element, &desc) != nil {
		return ""
	}
	return desc.Digest
}
