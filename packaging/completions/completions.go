// Package completions has the scripts by which shells complete the programs'
// command lines.
package completions

import (
	"embed"
	"fmt"
	"strings"
)

//go:embed bash zsh fish
var scripts embed.FS

// Script returns the script for a shell: bash, zsh or fish. With flag as its last
// argument, the program prints what can follow the others.
func Script(shell, program, flag string) (string, error) {
	b, err := scripts.ReadFile(shell)
	if err != nil {
		return "", fmt.Errorf("%q is no shell with completions: use bash, zsh or fish", shell)
	}
	return strings.NewReplacer("@PROGRAM@", program, "@FLAG@", flag).Replace(string(b)), nil
}
