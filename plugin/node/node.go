// Package node sets pilot up on a machine with containerd, and examines the
// result.
package node
