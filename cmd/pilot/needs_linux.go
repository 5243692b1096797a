package main

import (
	"encoding/json"
	"net/http"

	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"

	"github.com/ctrlplane/pilot/plugin/imagekeys"
)

// imageNeeds is what the admin socket says of an image.
type imageNeeds struct {
	// Layers are what a container of it has to be allowed to use, all of them.
	Layers []neededLayer `json:"layers"`
	// Refused is why the setting must-be-encrypted does not let it run, or "".
	Refused string `json:"refused,omitempty"`
}

type neededLayer struct {
	DiffID string          `json:"diffID"`
	KEKs   []imagekeys.KEK `json:"keks"`            // any one of them is enough
	Other  bool            `json:"other,omitempty"` // or a key that is not the broker's
	Why    string          `json:"why,omitempty"`   // the image does not name them
}

// handle adds /image-keys, which says what a container of ?image=NAME in containerd's
// ?namespace=, by default k8s.io, needs.
func (l layers) handle(mux *http.ServeMux) {
	if l.resolver == nil {
		return
	}
	mux.HandleFunc("GET /image-keys", func(w http.ResponseWriter, r *http.Request) {
		namespace, image := r.FormValue("namespace"), imagekeys.Image{Name: r.FormValue("image")}
		if namespace == "" {
			namespace = "k8s.io"
		}
		if image.Name == "" {
			http.Error(w, "name an image of containerd's, as in ?image=docker.io/library/nginx:1", http.StatusBadRequest)
			return
		}
		needs, err := l.resolver.Needs(r.Context(), namespace, image)
		if err != nil {
			status := http.StatusServiceUnavailable
			if errdefs.IsNotFound(err) {
				status = http.StatusNotFound
			}
			http.Error(w, err.Error(), status)
			return
		}
		answer := imageNeeds{Layers: []neededLayer{}}
		for _, n := range needs {
			answer.Layers = append(answer.Layers, neededLayer{n.DiffID.String(), n.KEKs, n.Other, n.Why})
		}
		if err := l.resolver.CheckEncrypted(r.Context(), namespace, image); err != nil {
			answer.Refused = err.Error()
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			logrus.WithError(err).Debug("answer not sent")
		}
	})
}
