//go:build linux

package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/ctrlplane/pilot/copilot/backup"
	"github.com/ctrlplane/pilot/internal/exit"
)

var backupSharesCommand = &cli.Command{
	Name:  "shares",
	Usage: "make a key for backups that only several people together can use",
	Description: `Makes a post-quantum age key, and splits it by Shamir's scheme into shares, of which
--threshold are needed to open a backup. The key itself is nowhere. Seal any number of
backups to its recipient, which is no secret.

With --out, each share goes into a file of its own, and the recipient into
recipient.txt. Without, the shares are shown on the terminal, a page each, and are
gone then. Hand them to different people, on paper or on devices of their own.

Example:
   copilot backup shares --shares 5 --threshold 3 --out shares`,
	Flags: []cli.Flag{
		&cli.IntFlag{Name: "shares", Usage: "how `MANY` shares to make", Value: 5},
		&cli.IntFlag{Name: "threshold", Usage: "how `MANY` of them are needed, 2 or more", Value: 3},
		&cli.StringFlag{Name: "out", Usage: "new `DIRECTORY` for the files"},
	},
	Action: func(ctx context.Context, c *cli.Command) error {
		if err := noArguments(c); err != nil {
			return err
		}
		threshold, total := c.Int("threshold"), c.Int("shares")
		if threshold < 2 || threshold > total || total > 255 {
			return exit.Usagef("backup shares: --threshold %d of --shares %d: from 2 up to the number of shares, which is at most 255", threshold, total)
		}
		dir := c.String("out")
		if dir == "" && !(term.IsTerminal(int(os.Stdin.Fd())) && term.IsTerminal(int(os.Stdout.Fd()))) {
			return exit.Usagef("backup shares: this is no terminal: name a directory with --out")
		}
		shares, recipient, err := backup.NewShares(threshold, total)
		if err != nil {
			return fmt.Errorf("backup shares: %w", err)
		}
		if dir == "" {
			return showShares(ctx, shares, recipient.String())
		}
		if err := writeShares(dir, shares, recipient.String()); err != nil {
			return fmt.Errorf("backup shares: %w", err)
		}
		fmt.Printf("%d shares of set %s, of which %d are needed, and recipient.txt are in %s: hand the shares out, and delete them here\n", total, shares[0].Set, threshold, dir)
		return nil
	},
}

// page returns a share with what its holder has to know.
func page(s backup.Share) string {
	return fmt.Sprintf("# Share %d of %d of copilot's backups, set %s: any %d of them open each. Keep it secret.\n%s\n", s.Index, s.Total, s.Set, s.Threshold, s)
}

// writeShares writes a file for each share into a new directory, which is removed if that
// fails.
func writeShares(dir string, shares []backup.Share, recipient string) (err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(dir)
		}
	}()
	files := map[string]string{"recipient.txt": fmt.Sprintf("# Set %s: %d of %d shares open what is sealed to it.\n%s\n", shares[0].Set, shares[0].Threshold, shares[0].Total, recipient)}
	for _, s := range shares {
		files[fmt.Sprintf("share-%d.txt", s.Index)] = page(s)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// clearScreen clears a terminal and what it can scroll back to.
const clearScreen = "\x1b[2J\x1b[3J\x1b[H"

// showShares shows each share on a page of its own. None stays on the terminal, however this
// ends.
func showShares(ctx context.Context, shares []backup.Share, recipient string) error {
	ctx, stop := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	for _, s := range shares {
		// What was typed before the page is shown does not count: it would skip the page.
		err := unix.IoctlSetInt(int(os.Stdin.Fd()), unix.TCFLSH, unix.TCIFLUSH)
		if err == nil {
			fmt.Printf("%s%s\nCopy it, then press Enter for the next page. ", clearScreen, page(s))
			err = awaitEnter(ctx)
		}
		if err != nil {
			fmt.Print(clearScreen)
			return fmt.Errorf("backup shares: stopped at share %d of %d: the shares are void, make new ones", s.Index, s.Total)
		}
	}
	fmt.Printf("%s# Set %s: %d of %d shares open what is sealed to it.\n%s\n", clearScreen, shares[0].Set, shares[0].Threshold, shares[0].Total, recipient)
	return nil
}

// awaitEnter returns once a line was typed.
func awaitEnter(ctx context.Context) error {
	typed := make(chan error, 1)
	go func() {
		_, err := bufio.NewReader(os.Stdin).ReadString('\n')
		typed <- err
	}()
	select {
	case err := <-typed:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
