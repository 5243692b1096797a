package main

import (
	"context"
	"os"
	"strings"
	"sync"

	"github.com/sirupsen/logrus"
	"github.com/urfave/cli/v3"

	"github.com/ctrlplane/pilot/copilot/client"
	"github.com/ctrlplane/pilot/internal/mustencrypt"
	"github.com/ctrlplane/pilot/keyprovider"
)

// reloadable is a key provider that is replaced when the configuration is reloaded.
// Requests end with the provider that they began with.
type reloadable struct {
	metrics     *keyprovider.Metrics
	afterReload []func() // called once KEKs were dropped

	mu       sync.RWMutex
	conf     configuration
	broker   *client.Client
	provider *keyprovider.Provider
	forget   func()
}

// use switches to another configuration and drops the KEKs in memory. If the
// configuration can't be used, nothing changes.
func (r *reloadable) use(ctx context.Context, conf configuration) error {
	broker, err := conf.Client()
	if err != nil {
		return err
	}
	p := conf.provider(broker, r.metrics)
	ctx, forget := context.WithCancel(ctx)
	go p.Sweep(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.forget != nil {
		r.forget()
	}
	r.conf, r.broker, r.provider = conf, broker, p
	r.forget = func() {
		forget()
		broker.CloseIdleConnections()
	}
	return nil
}

func (r *reloadable) current() *keyprovider.Provider {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.provider
}

// used returns the configuration and the client of its brokers.
func (r *reloadable) used() (configuration, *client.Client) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.conf, r.broker
}

func (r *reloadable) configuration() configuration {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.conf
}

// rules returns those of the setting must-be-encrypted.
func (r *reloadable) rules() mustencrypt.Rules { return r.configuration().MustBeEncrypted }

// certificates returns the certificate files in use, by setting.
func (r *reloadable) certificates() map[string]string {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return map[string]string{
		"broker-cert": r.conf.BrokerCert, "broker-ca": r.conf.BrokerCA,
		"tls-cert": r.conf.TLSCert, "tls-client-ca": r.conf.TLSClientCA,
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
func (r *reloadable) onHangup(ctx context.Context, c *cli.Command, hangup <-chan os.Signal) {
	for {
		select {
		case <-hangup:
		case <-ctx.Done():
			return
		}
		r.reload(ctx, c)
	}
}

// reload reads the configuration again. If it can't be used, nothing changes.
func (r *reloadable) reload(ctx context.Context, c *cli.Command) {
	was := r.configuration()
	conf, err := loadConfiguration(c)
	var late []string
	for _, s := range settings {
		if s.Restart && s.Text(&conf) != s.Text(&was) {
			late = append(late, s.Name)
			s.Restore(&conf, &was)
		}
	}
	if err == nil {
		err = r.use(ctx, conf)
	}
	if err != nil {
		logrus.SetLevel(was.LogLevel)
		logrus.WithError(err).Error("reload failed, keeping the previous configuration")
		return
	}
	for _, f := range r.afterReload {
		f()
	}
	logrus.WithField("broker", conf.Broker.String()).Info("configuration reloaded, KEKs dropped from the cache")
	if len(late) > 0 {
		logrus.WithField("settings", strings.Join(late, ", ")).Warn("changed settings need a restart")
	}
}
