// Command hsmrotate is one of several brokers that rotate a key of an HSM at
// once, and wrap with it. It prints a version that it made or that it wrapped
// with on each line, and in the latter case what it wrapped, in hex.
//
//	hsmrotate SETTINGS PATH TIMES
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/ctrlplane/pilot/copilot/kms"
	"github.com/ctrlplane/pilot/copilot/kms/kmstest"
	"github.com/ctrlplane/pilot/copilot/kms/pkcs11"
)

func main() {
	pkcs11.RunModule()
	if err := run(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "hsmrotate:", err)
		os.Exit(1)
	}
}

func run(settings, path, times string) error {
	n, err := strconv.Atoi(times)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	b, err := pkcs11.Types().Open("pkcs11", kmstest.Settings(settings))
	if err != nil {
		return err
	}
	defer b.Close()
	for range n {
		var version int
		if err := again(ctx, func() (err error) {
			version, err = b.(kms.Rotator).Rotate(ctx, path)
			return err
		}); err != nil {
			return err
		}
		fmt.Println("made", version)
		for range 5 {
			var wrapped []byte
			if err := again(ctx, func() (err error) {
				version, wrapped, err = b.(kms.Wrapper).Wrap(ctx, path, kmstest.Secret)
				return err
			}); err != nil {
				return err
			}
			fmt.Printf("wrapped %d %x\n", version, wrapped)
		}
	}
	return nil
}

// again calls f until it succeeds: SoftHSM now and then reads a file that another
// process is writing.
func again(ctx context.Context, f func() error) error {
	for {
		err := f()
		if !errors.Is(err, kms.ErrUnavailable) || ctx.Err() != nil {
			return err
		}
		fmt.Fprintln(os.Stderr, "again:", err)
		time.Sleep(10 * time.Millisecond)
	}
}
