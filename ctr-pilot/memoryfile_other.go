//go:build !linux

package main

import "errors"

// memoryFile fails: only Linux has files in memory that have a name.
func memoryFile() (string, error) {
	return "", errors.New("keys can be read from a pipe only on Linux: name a file")
}
