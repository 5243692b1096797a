// Package configfile names the configuration files that programs read if no flag or
// variable names one.
package configfile

// Default returns the name of such a file: /etc/PROGRAM/NAME on Linux, and elsewhere
// PROGRAM/NAME in the user's configuration directory, which is ~/Library/Application
// Support on macOS and %AppData% on Windows. It is "" if the user has no such directory.
func Default(program, name string) string { return byDefault(program, name) }
