//go:build linux

package main

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/install"
)

// installCommands returns the commands that make an installation take effect, and those that
// clean up afterwards. pending are the services that have to be restarted. With now, they are
// run, and may have been run before.
func installCommands(is install.Installation, pending []string, now bool) (restarts, afterwards []string) {
	restarts = []string{"systemctl daemon-reload"}
	if is.LazyLeft {
		for _, unit := range []string{install.SnapshotterService, install.LazySocketUnit} {
			if !now || !stopped(unit) {
				restarts = append(restarts, "systemctl stop "+unit)
			}
		}
	}
	if !slices.Contains(pending, install.PilotService) {
		restarts = append(restarts, "systemctl start "+install.PilotService)
	}
	for _, service := range pending {
		restarts = append(restarts, "systemctl restart "+service)
	}
	if is.Lazy != containerd.LazyOff {
		// After pilot, and before containerd. It is not restarted: containers may run
		// from it.
		restarts = slices.Insert(restarts, 2, "systemctl start "+install.SnapshotterService)
		afterwards = append(afterwards, thisProgram()+" node forget-images")
	}
	if is.LazyLeft {
		afterwards = append(afterwards, removeSnapshots(thisProgram(), is))
	}
	return restarts, afterwards
}

// uninstallCommands returns the commands that end what was uninstalled.
func uninstallCommands(had install.Installation, isStopped func(unit string) bool, force bool) []string {
	commands := []string{"systemctl daemon-reload"}
	// containerd or CRI-O first: until then it uses pilot. It may have been removed before.
	if !isStopped(had.Service) {
		commands = append(commands, "systemctl try-restart "+had.Service)
	}
	if units := slices.DeleteFunc(slices.Clone(had.Units), isStopped); len(units) > 0 {
		commands = append(commands, "systemctl stop "+strings.Join(units, " "))
	}
	if had.LazyPresent() {
		program := thisProgram()
		if had.Program {
			program = "/proc/self/exe" // its file is gone, and still open
		}
		remove := removeSnapshots(program, had)
		if force {
			remove += " --force"
		}
		commands = append(commands, remove)
	}
	return commands
}

// removeSnapshots is the command that removes what pilot's snapshotter has left.
func removeSnapshots(program string, is install.Installation) string {
	command := program + " snapshotter --remove"
	if is.Address != "" {
		command += " --containerd " + is.Address
	}
	return command
}

// thisProgram returns the path of this program.
func thisProgram() string {
	if name, err := os.Executable(); err == nil {
		return name
	}
	return "pilot"
}

// stopped reports whether a unit is stopped. systemd forgets those whose files are gone, and
// can't stop or restart them then.
func stopped(unit string) bool {
	state, _ := exec.Command("systemctl", "is-active", unit).Output()
	return slices.Contains([]string{"inactive", "failed", "unknown"}, strings.TrimSpace(string(state)))
}

// runOrPrint runs commands, or prints them for the user to run.
func runOrPrint(run bool, commands []string) error {
	if !run && len(commands) > 0 {
		fmt.Println("now run:")
	}
	for _, command := range commands {
		if !run {
			fmt.Println("  " + command)
			continue
		}
		words := strings.Fields(command)
		cmd := exec.Command(words[0], words[1:]...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
	}
	return nil
}
