package mirror

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

// byteRange is the range of a request (RFC 9110, section 14.1.2), in bytes.
type byteRange struct {
	first int64 // or -1: the last bytes
	last  int64 // or -1: to the end; if first is -1, how many bytes
}

// mountRange is what stargz-snapshotter asks for before each mount, to find out whether
// there is a layer.
var mountRange = byteRange{0, 1}

// errRange is the error of a range that a layer does not have.
var errRange = errors.New("the range begins after the layer's end")

// parseRange returns the range that a request asks for.
func parseRange(h http.Header) (byteRange, error) {
	text := h.Get("Range")
	set, ok := strings.CutPrefix(text, "bytes=")
	switch {
	case text == "":
		return byteRange{}, &requestError{http.StatusBadRequest, "UNSUPPORTED", "layers are served here in ranges, to a snapshotter: the mirror has whole ones below /v2/"}
	case strings.Contains(set, ",") || len(h.Values("Range")) > 1:
		return byteRange{}, &requestError{http.StatusBadRequest, "UNSUPPORTED", "one range in a request is served, and not several"}
	}
	first, last, dash := strings.Cut(set, "-")
	if ok && dash {
		r, err := byteRange{-1, -1}, error(nil)
		if first != "" {
			r.first, err = position(first)
		}
		if last != "" && err == nil {
			r.last, err = position(last)
		}
		if err == nil && (first != "" || last != "") && (first == "" || last == "" || r.first <= r.last) {
			return r, nil
		}
	}
	return byteRange{}, &requestError{http.StatusBadRequest, "UNSUPPORTED", fmt.Sprintf("%.80q is not a range such as bytes=0-1", text)}
}

// position reads a number of bytes. Only digits make one.
func position(text string) (int64, error) {
	n, err := strconv.ParseUint(text, 10, 63)
	return int64(n), err
}

// within returns where the range of a layer of so many bytes begins, and how many bytes it
// has, at least one. The error is errRange.
func (r byteRange) within(size int64) (offset, length int64, err error) {
	switch {
	case r.first < 0:
		length = min(r.last, size)
		offset = size - length
	case r.last < 0:
		offset, length = r.first, size-r.first
	default:
		offset, length = r.first, min(r.last, size-1)-r.first+1
	}
	if length <= 0 || offset >= size {
		return 0, 0, errRange
	}
	return offset, length, nil
}
