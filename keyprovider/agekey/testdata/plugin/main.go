// Command plugin is a plugin of age's for tests. By the name demo it has keys of X25519; by
// the name ask it wants to be confirmed, and by the name hang it does not end.
package main

import (
	"log"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"filippo.io/age"
	"filippo.io/age/plugin"
)

func main() {
	name := strings.TrimPrefix(filepath.Base(os.Args[0]), "age-plugin-")
	if name == "hang" {
		signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGPIPE)
		child := exec.Command("sleep", "600")
		if err := child.Start(); err != nil {
			log.Fatal(err)
		}
		if err := os.WriteFile(os.Getenv("PLUGIN_PIDS"), []byte(strings.Join([]string{strconv.Itoa(os.Getpid()), strconv.Itoa(child.Process.Pid)}, " ")), 0o600); err != nil {
			log.Fatal(err)
		}
		child.Wait()
		return
	}
	p, err := plugin.New(name)
	if err != nil {
		log.Fatal(err)
	}
	p.HandleRecipient(func(data []byte) (age.Recipient, error) {
		check(p, name)
		return age.ParseX25519Recipient(string(data))
	})
	p.HandleIdentity(func(data []byte) (age.Identity, error) {
		check(p, name)
		return age.ParseX25519Identity(string(data))
	})
	os.Exit(p.Main())
}

// check has the plugin ask, if its name says so, and checks that there is no terminal.
func check(p *plugin.Plugin, name string) {
	if _, err := os.OpenFile("/dev/tty", os.O_RDWR, 0); err == nil {
		log.Fatal("there is a terminal")
	}
	if name != "ask" {
		return
	}
	if err := p.DisplayMessage("please touch the token"); err != nil {
		log.Fatal(err)
	}
	if _, err := p.RequestValue("PIN", true); err != nil {
		p.DisplayMessage("a PIN is needed")
		os.Exit(1)
	}
}
