package server

import (
	"encoding/json"
	"net/http"

	"github.com/ctrlplane/pilot/copilot/server/auditing"
)

// raw is an answer that is a key, in the original's API, or the audit log's. It is cleared
// once it is written.
type raw []byte

// secret is an answer that is JSON already, and holds a key. It is cleared once it is
// written. Copies remain in net/http's buffers until the next answer overwrites them.
type secret []byte

// document is an answer that is JSON already, and no secret.
type document []byte

// writeAnswer writes a problem document if err is not nil, else an answer: one of the
// types above as it is, anything else as JSON.
func writeAnswer(w http.ResponseWriter, e *auditing.Entry, answer any, err error) {
	h := w.Header()
	h.Set("X-Request-Id", e.Request)
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	if err != nil {
		writeProblem(w, e, err)
		return
	}
	var b []byte
	switch answer := answer.(type) {
	case raw:
		h.Set("Content-Type", "application/octet-stream")
		b = answer
	case secret:
		h.Set("Content-Type", "application/json")
		b = answer
	case document:
		h.Set("Content-Type", "application/json")
		b = answer
	case *spooled:
		answer.write(w)
		return
	default:
		if b, err = json.Marshal(answer); err != nil {
			e.Status = http.StatusInternalServerError
			writeProblem(w, e, err)
			return
		}
		h.Set("Content-Type", "application/json")
	}
	w.Write(b)
}
