package install

import (
	"errors"
	"io/fs"
	"maps"
	"strings"

	keyproviderconfig "github.com/containers/ocicrypt/config/keyprovider-config"

	"github.com/ctrlplane/pilot/node/crio"
	"github.com/ctrlplane/pilot/node/host"
)

// crioDropIn is the drop-in of CRI-O's unit, which sets the variable that names
// ocicrypt.conf.
const crioDropIn = host.UnitDir + "/crio.service.d/pilot.conf"

const crioDropInText = writtenBy + `[Unit]
Wants=pilot.service
After=pilot-keyprovider.socket

[Service]
Environment=` + keyproviderconfig.ENVVARNAME + "=" + keyProviders + "\n"

// forCRIO plans an installation beside CRI-O, which has no differs and uses pilot as a
// key provider.
func (p *Plan) forCRIO(before record) error {
	o := p.options
	if !o.HasUnit(crio.Service) || !o.HasSystemd() {
		return &host.Conflict{Where: crio.Socket, What: "CRI-O is not started by systemd's " + crio.Service, Fix: "set it up as docs/crio.md shows"}
	}
	if err := o.checkCRIOEnvironment(); err != nil {
		return err
	}
	if err := p.own(before, keyProviders, []byte(keyProvidersText), checkKeyProviders); err != nil {
		return err
	}
	if err := p.own(before, crioDropIn, []byte(crioDropInText), nil); err != nil {
		return err
	}
	forCRIO := len(p.Changes)
	if err := p.crioPilotConfig(before); err != nil {
		return err
	}
	if err := p.units(before, false); err != nil {
		return err
	}
	if len(p.Changes) > forCRIO {
		p.Restart = append(p.Restart, PilotService)
	}
	if forCRIO > 0 {
		p.Restart = append(p.Restart, crio.Service)
	}
	p.startFirst(forCRIO)
	return nil
}

// crioPilotConfig plans a pilot.toml without the differ, since there is no containerd.
func (p *Plan) crioPilotConfig(before record) error {
	settings := maps.Clone(p.options.Settings)
	if settings == nil {
		settings = make(map[string]string)
	}
	wanted, err := p.options.withInstalled(settings)
	if err != nil {
		return err
	}
	wanted["diff-listen"] = "off"
	return p.own(before, pilotConfig, newPilotConfig(wanted, true), func(had []byte) error {
		settings["diff-listen"] = "off"
		return checkPilotConfig(had, settings, false)
	})
}

// checkCRIOEnvironment rejects a variable that is set to another file already.
func (o Options) checkCRIOEnvironment() error {
	files := append([]string{"/etc/sysconfig/crio", "/etc/default/crio"}, o.UnitFiles(crio.Service)...)
	for _, name := range files {
		text, err := o.ReadFile(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for line := range strings.Lines(string(text)) {
			line = strings.TrimSpace(line)
			_, value, found := strings.Cut(line, keyproviderconfig.ENVVARNAME+"=")
			value, _, _ = strings.Cut(value, " ")
			if found && !strings.HasPrefix(line, "#") && strings.Trim(value, `"'`) != keyProviders {
				return &host.Conflict{Where: name, What: line, Fix: "move the file it names to " + keyProviders + ", add pilot to it, and set the variable to that"}
			}
		}
	}
	return nil
}
