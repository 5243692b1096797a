package main

import (
	"context"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v2"

	"github.com/ctrlplane/pilot/keyprovider"
)

// atStart are the settings that take a restart.
var atStart = []string{"listen", "insecure-loopback", "tls-cert", "tls-key", "tls-client-ca", "provider-name", "diff-listen", "containerd",
	"layers-at-once", "decryption-keys-path", "admin-listen", "metrics-listen"}

// reloadable is a key provider that is replaced when the configuration is read
// again. What is under way ends with the one that it began with.
type reloadable struct {
	metrics *keyprovider.Metrics

	mu       sync.RWMutex
	conf     configuration
	provider *keyprovider.Provider
	forget   func()
}

// use goes on with another configuration. KEKs in memory are forgotten. One that
// can't be used changes nothing.
func (r *reloadable) use(ctx context.Context, conf configuration) error {
	client, err := conf.client()
	if err != nil {
		return err
	}
	p := conf.provider(client, r.metrics)
	ctx, forget := context.WithCancel(ctx)
	go p.Sweep(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.forget != nil {
		r.forget()
	}
	r.conf, r.provider = conf, p
	r.forget = func() {
		forget()
		client.CloseIdleConnections()
	}
	return nil
}

func (r *reloadable) current() *keyprovider.Provider {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.provider
}

func (r *reloadable) configuration() configuration {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.conf
}

// certificates returns the files of certificates that are in use, by the setting
// that names each.
func (r *reloadable) certificates() map[string]string {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return map[string]string{
		"broker-cert": string(r.conf.BrokerCert), "broker-ca": string(r.conf.BrokerCA),
		"tls-cert": string(r.conf.TLSCert), "tls-client-ca": string(r.conf.TLSClientCA),
	}
}

func (r *reloadable) WrapKey(ctx context.Context, params [][]byte, layerKey []byte) ([]byte, error) {
	return r.current().WrapKey(ctx, params, layerKey)
}

func (r *reloadable) UnwrapKey(ctx context.Context, params [][]byte, annotation []byte) ([]byte, error) {
	return r.current().UnwrapKey(ctx, params, annotation)
}

// onHangup reads the configuration of the command c again on each SIGHUP, until
// ctx is done.
func (r *reloadable) onHangup(ctx context.Context, c *cli.Context, hangup <-chan os.Signal) {
	for {
		select {
		case <-hangup:
		case <-ctx.Done():
			return
		}
		was := r.conf // which nobody else writes
		conf, err := loadConfiguration(c)
		var late []string
		for _, s := range settings {
			had, has := s.value(&was).String(), s.value(&conf).String()
			if err == nil && slices.Contains(atStart, s.name) && had != has {
				late = append(late, s.name)
				err = s.set(&conf, had)
			}
		}
		if err == nil {
			err = r.use(ctx, conf)
		}
		if err != nil {
			logrus.SetLevel(logrus.Level(was.LogLevel))
			logrus.WithError(err).Error("the configuration stays what it was: it can't be used")
			continue
		}
		logrus.WithField("broker", conf.Broker.String()).Info("configuration read again, KEKs forgotten")
		if len(late) > 0 {
			logrus.Warnf("%s: takes a restart", strings.Join(late, ", "))
		}
	}
}
