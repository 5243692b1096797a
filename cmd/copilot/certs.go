//go:build linux

package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/pki"
	"github.com/ctrlplane/pilot/internal/commandline"
	"github.com/ctrlplane/pilot/internal/exit"
)

var certsCommand = &cli.Command{
	Name:  "certs",
	Usage: "list and renew the certificates that this CA issues",
	Description: `Manages the CA of "copilot init" and what it has issued. "copilot enroll" issues
new certificates.

Example:
   copilot certs list`,
	Commands: []*cli.Command{
		{
			Name:      "list",
			Usage:     "list certificates and when they expire",
			ArgsUsage: "[FILE...]",
			Description: `Lists the certificates given, or those in --config-dir.

Example:
   copilot certs list`,
			Flags: []cli.Flag{
				configDirFlag(),
				&cli.BoolFlag{Name: "json", Usage: "print JSON"},
			},
			Action: certsList,
		},
		{
			Name:      "renew",
			Usage:     "renew certificates before they expire",
			ArgsUsage: "FILE...",
			Description: `Replaces each certificate with one for the same name, and the same private key
unless --new-key is given. Files keep their owner and mode and are replaced
atomically, so copilot and pilot use them without a restart. A node's certificate
can be renewed here and copied to the node: its private key stays there.

A certificate is valid for as long as the old one was, unless --for is given.

Example:
   copilot certs renew /etc/copilot/server.pem /etc/copilot/admin.pem`,
			Flags: []cli.Flag{
				configDirFlag(),
				&cli.GenericFlag{Name: "for", Usage: "how long the certificate is valid: a `TIME`, as in 90d or 12h, or a date, as in 2030-01-01", Value: &commandline.When{}, DefaultText: "as long as the old one"},
				&cli.BoolFlag{Name: "new-key", Usage: "create a new private key as well, in NAME-key.pem beside NAME.pem"},
			},
			Action: certsRenew,
		},
		{
			Name:  "rotate-ca",
			Usage: "replace the CA without downtime",
			Description: `Creates a new CA, whose certificate is in ca.pem beside the old one, so that copilot
accepts clients of both. Then, in this order:

   1. copy ca.pem to every node, as its broker-ca, and run "systemctl reload pilot"
      there: a pilot that was not reloaded refuses copilot after the next step
   2. renew all certificates with "copilot certs renew"
   3. run "copilot certs rotate-ca --finish", which removes the old CA from ca.pem
   4. copy ca.pem to every node again, and reload pilot

Example:
   copilot certs rotate-ca`,
			Flags: []cli.Flag{
				configDirFlag(),
				&cli.GenericFlag{Name: "for", Usage: "how long the new CA's certificate is valid: a `TIME`, as in 3650d, or a date", Value: commandline.After(caFor)},
				&cli.BoolFlag{Name: "finish", Usage: "remove the old CA from ca.pem"},
			},
			Action: certsRotateCA,
		},
		nodeCACommand,
		serverCACommand,
		publicKeysCommand,
	},
}

func certsRotateCA(_ context.Context, c *cli.Command) error {
	if err := noArguments(c); err != nil {
		return err
	}
	dir := c.String("config-dir")
	if c.Bool("finish") {
		inUse, err := certificates(dir)
		if err != nil {
			return err
		}
		inUse = slices.DeleteFunc(inUse, func(name string) bool { return filepath.Base(name) == pki.CertFile })
		n, err := pki.DropOld(dir, inUse)
		if err != nil {
			return fmt.Errorf("certs rotate-ca: %w", err)
		}
		if n == 0 {
			fmt.Printf("%s has no old CA\n", filepath.Join(dir, pki.CertFile))
			return nil
		}
		fmt.Printf("removed the old CA from %s: copy it to every node, and reload pilot there\n", filepath.Join(dir, pki.CertFile))
		return nil
	}
	valid, err := until(c, "for")
	if err != nil {
		return err
	}
	if err := pki.Rotate(dir, valid); err != nil {
		return fmt.Errorf("certs rotate-ca: %w", err)
	}
	fmt.Printf(`%s has the new CA and the old one.

   1. copy it to every node, as its broker-ca, and run "systemctl reload pilot" there
   2. copilot certs renew FILE...            # the server's, the admin's, that of public keys, the nodes'
   3. copilot certs rotate-ca --finish       # when no certificate of the old CA is in use
   4. copy %[1]s to every node again, and reload pilot
`, filepath.Join(dir, pki.CertFile))
	return nil
}

// certificates returns the files in dir that hold certificates, by their names.
func certificates(dir string) ([]string, error) {
	found, err := filepath.Glob(filepath.Join(dir, "*.pem"))
	return slices.DeleteFunc(found, func(name string) bool { return strings.HasSuffix(name, "-key.pem") }), err
}

// certificateStatus is a certificate as "certs list" shows it.
type certificateStatus struct {
	File     string    `json:"file"`
	Subject  string    `json:"subject"`
	NotAfter time.Time `json:"notAfter"`
	Expired  bool      `json:"expired"`
	// NotYetValid says that its time has not come, as by a clock that is behind.
	NotYetValid bool `json:"notYetValid,omitempty"`
}

func certsList(_ context.Context, c *cli.Command) error {
	files := c.Args().Slice()
	if len(files) == 0 {
		var err error
		if files, err = certificates(c.String("config-dir")); err != nil {
			return err
		}
	}
	if len(files) == 0 {
		return fmt.Errorf("certs list: no certificate in %s", c.String("config-dir"))
	}
	list := []certificateStatus{}
	var errs []error
	now := time.Now()
	for _, name := range files {
		cert, err := pki.ReadCertificate(name)
		if err != nil {
			errs = append(errs, fmt.Errorf("certs list: %w", err))
			continue
		}
		list = append(list, certificateStatus{name, subject(cert), cert.NotAfter.UTC(), now.After(cert.NotAfter), now.Before(cert.NotBefore)})
	}
	if c.Bool("json") {
		return errors.Join(append(errs, printJSON(list))...)
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "FILE\tSUBJECT\tEXPIRES\tLEFT")
	for _, s := range list {
		left := commandline.Days(s.NotAfter.Sub(now).Truncate(unit(s.NotAfter.Sub(now))))
		switch {
		case s.Expired:
			left = "expired"
		case s.NotYetValid:
			left = "not valid yet"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", s.File, s.Subject, s.NotAfter.Format(time.RFC3339), left)
	}
	return errors.Join(append(errs, w.Flush())...)
}

// unit is what the time that is left is shown in.
func unit(left time.Duration) time.Duration {
	if left > 48*time.Hour {
		return 24 * time.Hour
	}
	return time.Minute
}

// subject is what a certificate is for.
func subject(cert *x509.Certificate) string {
	var names []string
	if cert.IsCA {
		names = append(names, "CA")
	}
	for _, u := range cert.URIs {
		names = append(names, u.String())
	}
	names = append(names, cert.DNSNames...)
	for _, ip := range cert.IPAddresses {
		names = append(names, ip.String())
	}
	if len(names) == 0 {
		return cert.Subject.String()
	}
	return strings.Join(names, ", ")
}

func certsRenew(_ context.Context, c *cli.Command) error {
	if c.NArg() == 0 {
		return exit.Usagef("certs renew: name the certificates to renew, such as /etc/copilot/server.pem")
	}
	ca, err := pki.Load(c.String("config-dir"))
	if err != nil {
		return fmt.Errorf("certs renew: %w", err)
	}
	var errs []error
	for _, name := range c.Args().Slice() {
		if err := renew(c, ca, name); err != nil {
			errs = append(errs, fmt.Errorf("certs renew: %w", err))
		}
	}
	return errors.Join(errs...)
}

func renew(c *cli.Command, ca *pki.CA, name string) error {
	valid, err := until(c, "for")
	if err != nil {
		return err
	}
	keyFile := ""
	if c.Bool("new-key") {
		base, ok := strings.CutSuffix(name, ".pem")
		if !ok {
			return fmt.Errorf("%s: with --new-key the certificate is NAME.pem and its key NAME-key.pem", name)
		}
		keyFile = base + "-key.pem"
	}
	cert, err := ca.Renew(name, keyFile, valid)
	if err != nil {
		return err
	}
	fmt.Printf("%s: %s, valid until %s\n", name, subject(cert), cert.NotAfter.UTC().Format(time.RFC3339))
	return nil
}
