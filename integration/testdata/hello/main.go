// Command hello is what the test images run: it prints the file that is their
// secret.
package main

import (
	"fmt"
	"os"
)

func main() {
	b, err := os.ReadFile("/secret")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Printf("hello, %s\n", b)
}
