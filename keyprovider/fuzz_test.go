package keyprovider

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"

	brokerclient "github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/wireformat"
)

// FuzzExec asks a key provider, whose broker has each KEK, anything. No request
// makes it tell the KEK, and none that it could not have wrapped is unwrapped.
func FuzzExec(f *testing.F) {
	logrus.SetLevel(logrus.ErrorLevel)
	const kek = "KEKKEKKEKKEKKEKKEKKEKKEKKEKKEKKE"
	broker := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := url.PathUnescape(strings.TrimSuffix(strings.TrimPrefix(r.URL.EscapedPath(), "/api/v2/keks/"), "/key"))
		if err != nil || wireformat.ValidateKEKID(id) != nil {
			f.Errorf("the broker is asked for %q", r.URL.EscapedPath())
		}
		version := 1
		fmt.Sscan(r.URL.Query().Get("version"), &version)
		reply(w, map[string]any{"id": id, "version": version, "key": []byte(kek)})
	}))
	defer broker.Close()
	client, err := brokerclient.New(brokerclient.Config{URLs: []string{broker.URL}})
	if err != nil {
		f.Fatal(err)
	}
	service := Service{Provider: New(client, Config{CacheSize: 4, DefaultKEKs: []string{"a"}})}
	const wrap = `{"op":"keywrap","keywrapparams":{"ec":{"Parameters":{"pilot":["YQ=="]}},"optsdata":"c2VjcmV0"}}`
	var wrapped bytes.Buffer
	if err := service.Exec(f.Context(), strings.NewReader(wrap), &wrapped); err != nil {
		f.Fatal(err)
	}
	annotation := strings.Split(wrapped.String(), `"annotation":"`)[1]
	annotation = annotation[:strings.Index(annotation, `"`)]
	unwrap := `{"op":"keyunwrap","keyunwrapparams":{"dc":{"Parameters":null},"annotation":"` + annotation + `"}}`
	if err := service.Exec(f.Context(), strings.NewReader(unwrap), &wrapped); err != nil {
		f.Fatal(err)
	}
	f.Add([]byte(wrap))
	f.Add([]byte(unwrap))
	f.Add([]byte(`{"op":"keywrap","keywrapparams":{"ec":{"Parameters":{"pilot":["YS9i","Li4=","IA=="]}},"optsdata":"AA=="}}`))
	f.Add([]byte(`{"op":"keyunwrap","keyunwrapparams":{"dc":{"Parameters":{"pilot":["YQ=="]}},"annotation":"e30="}}`))
	f.Add([]byte(`{"op":"keyunwrap"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var out bytes.Buffer
		err := service.Exec(t.Context(), bytes.NewReader(b), &out)
		said := out.String()
		if err != nil {
			said += err.Error()
		}
		for _, form := range []string{kek, base64.StdEncoding.EncodeToString([]byte(kek))} {
			if strings.Contains(said, form) && !bytes.Contains(b, []byte(form)) {
				t.Errorf("the answer has the KEK: %s", said)
			}
		}
		if err == nil && out.Len() == 0 {
			t.Error("neither an answer nor an error")
		}
	})
}
