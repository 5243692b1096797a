// Command hello is what the test images run: it prints the file that is their
// secret. With the argument pause it does nothing until it is ended, and with a path
// after that, writes the secret, or why it can't read it, to that file a while later.
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "pause" {
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGTERM)
		<-stop
		if len(os.Args) > 2 {
			time.Sleep(3 * time.Second) // others have ended by then that don't wait for it
			b, err := os.ReadFile("/secret")
			if err != nil {
				b = []byte(err.Error())
			}
			if err := os.WriteFile(os.Args[2], b, 0o600); err != nil {
				os.Exit(1)
			}
		}
		return
	}
	b, err := os.ReadFile("/secret")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Printf("hello, %s\n", b)
}
