package main

import (
	"os"

	"github.com/ctrlplane/pilot/internal/setting"
)

// settings are the fields of [configuration], in their order.
var settings = setting.Of[configuration]()

// unsetEmptyVariables unsets variables that are empty, which in a unit or a manifest
// means that the setting is not set.
func unsetEmptyVariables() {
	for _, s := range settings {
		if os.Getenv(s.Env()) == "" {
			os.Unsetenv(s.Env())
		}
	}
}
