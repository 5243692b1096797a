//go:build !linux

package filestamp

import "io/fs"

func (*Stamp) addSystem(fs.FileInfo) {}
