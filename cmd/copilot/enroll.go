//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/internal/commandline"
	"github.com/ctrlplane/pilot/internal/exit"
	"github.com/ctrlplane/pilot/internal/regular"
)

var enrollCommand = &cli.Command{
	Name:      "enroll",
	Usage:     "issue a certificate for a node, for another client, or for the server",
	ArgsUsage: "NAME",
	Description: `Writes NAME.pem and NAME-key.pem into --out. The certificate's identity is
spiffe://TRUST-DOMAIN/node/NAME. --role replaces the word node, or removes it if
it is empty, as for the admin. With --csr, the key stays where the request was
made, and only NAME.pem is written. With --host, the certificate is a server's,
and its key belongs to user copilot if there is one. Nothing is overwritten:
"copilot certs renew" renews existing certificates.

Example:
   copilot enroll --out /root/worker-7 worker-7`,
	Flags: []cli.Flag{
		configDirFlag(),
		&cli.StringSliceFlag{Name: "host", Usage: "`NAME` or address of a server to issue a certificate for; may be repeated"},
		&cli.StringFlag{Name: "role", Usage: "`WORD` before the name: node, ci, …", Value: "node"},
		&cli.StringFlag{Name: "out", Usage: "`DIRECTORY` to write to", Value: "."},
		&cli.GenericFlag{Name: "for", Usage: "how long the certificate is valid: a `TIME`, as in 90d or 12h, or a date, as in 2030-01-01", Value: commandline.After(clientFor)},
		&cli.StringFlag{Name: "csr", Usage: "certificate signing request to sign, `FILE` in PEM, or - for standard input"},
		jsonFlag(),
	},
	Action: enroll,
}

func enroll(_ context.Context, c *cli.Command) error {
	if c.NArg() != 1 {
		return exit.Usagef("enroll takes one name, and got %d arguments", c.NArg())
	}
	name := c.Args().First()
	if filepath.Base(name) != name || name == "." || name == ".." {
		return exit.Usagef("enroll: %q is used in file names, so it can't have slashes", name)
	}
	ca, err := pki.Load(c.String("config-dir"))
	if err != nil {
		return fmt.Errorf("enroll: %w", err)
	}
	valid, err := until(c, "for")
	if err != nil {
		return fmt.Errorf("enroll: %w", err)
	}
	out := c.String("out")
	cert, key := filepath.Join(out, name+".pem"), filepath.Join(out, name+"-key.pem")
	for _, file := range []string{cert, key} {
		if _, err := os.Lstat(file); err == nil {
			return fmt.Errorf("enroll: %s exists, and is not overwritten", file)
		}
	}
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	if hosts := c.StringSlice("host"); len(hosts) > 0 {
		err := checkHosts(hosts)
		if err == nil {
			err = ca.IssueServer(hosts, valid, cert, key, giveToService)
		}
		if err != nil {
			return fmt.Errorf("enroll: %w", err)
		}
		return printIssued(c, strings.Join(hosts, ", "), cert, key)
	}
	client := pki.Client{Path: name, Hold: valid}
	if role := c.String("role"); role != "" {
		client.Path = role + "/" + name // not cleaned, so that no part is lost
	}
	id, err := ca.ID(client.Path)
	if err != nil {
		return fmt.Errorf("enroll: %w", err)
	}
	if file := c.String("csr"); file != "" {
		request, err := readFile(file)
		if err == nil {
			err = ca.SignClient(client, request, cert)
		}
		if err != nil {
			return fmt.Errorf("enroll: %w", err)
		}
		return printIssued(c, id.String(), cert, "")
	}
	if err := ca.IssueClient(client, cert, key); err != nil {
		return fmt.Errorf("enroll: %w", err)
	}
	return printIssued(c, id.String(), cert, key)
}

// issued is what "enroll --json" prints.
type issued struct {
	Subject     string    `json:"subject"`
	Certificate string    `json:"certificate"`   // its file
	Key         string    `json:"key,omitempty"` // its file, unless the key was made elsewhere
	NotAfter    time.Time `json:"notAfter"`
}

func printIssued(c *cli.Command, subject, certFile, keyFile string) error {
	if c.Bool("json") {
		cert, err := pki.ReadCertificate(certFile)
		if err != nil {
			return err
		}
		return printJSON(issued{subject, certFile, keyFile, cert.NotAfter.UTC()})
	}
	files := certFile
	if keyFile != "" {
		files += " and " + keyFile
	}
	fmt.Printf("%s: %s\n", subject, files)
	return nil
}

// maxRequest bounds a certificate signing request, in bytes.
const maxRequest = 64 << 10

func readFile(name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(io.LimitReader(os.Stdin, maxRequest))
	}
	return regular.Read(name, maxRequest)
}
