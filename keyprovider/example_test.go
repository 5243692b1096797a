package keyprovider_test

import (
	"context"
	"log"
	"net"
	"time"

	"google.golang.org/grpc"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/keyprovider"
)

// Serve a key provider on a unix socket, with KEKs from a broker. An ocicrypt.conf names
// it as {"key-providers": {"pilot": {"grpc": "unix:///run/pilot/keyprovider.sock"}}}.
func ExampleService() {
	broker, err := client.New(client.Config{URLs: []string{"unix:///run/copilot/copilot.sock"}, Timeout: 20 * time.Second})
	if err != nil {
		log.Fatal(err)
	}
	provider := keyprovider.New(broker, keyprovider.Config{CacheTTL: 5 * time.Minute, CacheSize: 100})
	go provider.Sweep(context.Background())

	l, err := net.Listen("unix", "/run/pilot/keyprovider.sock") // in a directory that is root's
	if err != nil {
		log.Fatal(err)
	}
	service := keyprovider.Service{Provider: provider}
	s := grpc.NewServer()
	service.Register(s)
	log.Fatal(s.Serve(l))
}
