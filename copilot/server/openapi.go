package server

import (
	_ "embed"
	"net/http"
)

//go:embed openapi.json
var openAPIDocument []byte

func (a *api) openAPI(*http.Request, *entry) (any, error) { return document(openAPIDocument), nil }
