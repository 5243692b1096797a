// Package spoolfile makes temporary files for what nobody else may read. They have no
// name, and are gone with the process that made them, however it ends.
package spoolfile

// prefix begins the name that a file has while it is made.
const prefix = "pilot-spool-"
