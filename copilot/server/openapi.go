package server

import (
	_ "embed"
	"net/http"

	"github.com/ctrlplane/pilot/copilot/server/auditing"
)

//go:embed openapi.json
var openAPIDocument []byte

func (a *api) openAPI(*http.Request, *auditing.Entry) (any, error) {
	return document(openAPIDocument), nil
}
