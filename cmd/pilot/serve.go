package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/ctrlplane/pilot/certfile"
	"github.com/ctrlplane/pilot/keyprovider"
	"github.com/ctrlplane/pilot/unixsocket"
)

// stopWithin is how long requests under way may take when pilot is told to stop.
const stopWithin = 10 * time.Second

var serveCommand = &cli.Command{
	Name:  "serve",
	Usage: "run the key provider as a daemon",
	Description: `Answers ocicrypt's key provider protocol over gRPC until it is told to stop.

Example:
   pilot serve --broker https://copilot.example.com:8443 --broker-ca ca.pem \
      --broker-cert node.pem --broker-key node-key.pem`,
	Flags:  configFlags(),
	Action: serve,
}

func serve(c *cli.Context) error {
	if c.NArg() > 0 {
		return usageError{fmt.Errorf("serve takes no argument, and got %q", c.Args().First())}
	}
	conf, err := loadConfiguration(c)
	if err != nil {
		return err
	}
	provider, err := conf.provider()
	if err != nil {
		return err
	}
	options, err := conf.serverOptions()
	if err != nil {
		return usageError{err}
	}
	l, err := listen(conf.Listen)
	if err != nil {
		return err
	}

	ctx, stop := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM)
	defer stop()
	go provider.Sweep(ctx)
	server := grpc.NewServer(options...)
	keyprovider.Register(server, provider)
	logrus.WithFields(logrus.Fields{
		"listen": conf.Listen, "broker": conf.Broker, "format": conf.AnnotationFormat,
	}).Info("pilot serves")
	if _, isUnix := conf.Listen.unix(); !isUnix && conf.TLSCert == "" {
		logrus.WithField("listen", conf.Listen).Warn("every user of this machine may ask for layer keys: there is no TLS (insecure-loopback)")
	}

	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	logrus.Info("pilot stops")
	defer time.AfterFunc(stopWithin, server.Stop).Stop()
	server.GracefulStop()
	return <-served
}

// serverOptions returns the TLS that the configuration asks for.
func (c *configuration) serverOptions() ([]grpc.ServerOption, error) {
	if c.TLSCert == "" {
		return nil, nil
	}
	pair, err := certfile.Load(string(c.TLSCert), string(c.TLSKey))
	if err != nil {
		return nil, fmt.Errorf("tls-cert: %w", err)
	}
	pem, err := os.ReadFile(string(c.TLSClientCA))
	if err != nil {
		return nil, fmt.Errorf("tls-client-ca: %w", err)
	}
	clients := x509.NewCertPool()
	if !clients.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("tls-client-ca: %s holds no certificate", c.TLSClientCA)
	}
	return []grpc.ServerOption{grpc.Creds(credentials.NewTLS(&tls.Config{
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return pair.Certificate(), nil },
		ClientCAs:      clients,
		ClientAuth:     tls.RequireAndVerifyClientCert,
		MinVersion:     tls.VersionTLS12,
	}))}, nil
}

func listen(a address) (net.Listener, error) {
	if path, ok := a.unix(); ok {
		l, err := unixsocket.Listen(path)
		if err != nil {
			return nil, fmt.Errorf("listen: %w", err)
		}
		return l, nil
	}
	return net.Listen("tcp", string(a))
}
