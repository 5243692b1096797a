// Package rooms holds no code. Its test checks which packages import which, so that
// dependencies point one way: docs/architecture.md has the map.
package rooms
