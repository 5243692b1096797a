package install

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/ctrlplane/pilot/node/containerd"
	"github.com/ctrlplane/pilot/node/host"
)

// processorConfig returns the settings for containerd 1.6: pilot-decoder in place of
// imgcrypt's ctd-decoder, with the arguments and environment of that one.
func processorConfig(c *containerd.Instance, o Options) (map[string]any, error) {
	decryption, _ := containerd.Plugin(c.Plain, containerd.CRIV1)["image_decryption"].(map[string]any)
	if model, ok := decryption["key_model"].(string); ok && model != "node" {
		return nil, &host.Conflict{Where: c.Config, What: fmt.Sprintf("image_decryption.key_model is %q", model), Fix: `make it "node"`}
	}
	decoder := filepath.Join(filepath.Dir(o.PilotBinary), "pilot-decoder")
	if _, err := o.Stat(decoder); err != nil {
		return nil, fmt.Errorf("containerd %d.%d needs pilot-decoder beside pilot: %w", c.Major, c.Minor, err)
	}
	had, _ := c.Plain["stream_processors"].(map[string]any)
	for _, id := range slices.Sorted(maps.Keys(had)) {
		p := containerd.ProcessorIn(c.Plain, id)
		if name := filepath.Base(p.Path); containerd.Decoders[id].Returns != "" && (name == "ctd-decoder" || name == "pilot-decoder") {
			continue
		}
		section, _ := had[id].(map[string]any)
		for _, mt := range containerd.Strings(section["accepts"]) {
			if strings.HasSuffix(mt, "+encrypted") {
				return nil, &host.Conflict{Where: c.Config, What: fmt.Sprintf("the stream processor %s at %s accepts encrypted layers", id, p.Path), Fix: "remove it"}
			}
		}
	}
	processors := make(map[string]any)
	for id, d := range containerd.Decoders {
		keys, env, err := takeOver(c, o.Host, id)
		if err != nil {
			return nil, err
		}
		conf := map[string]any{
			"accepts": d.Accepts,
			"returns": d.Returns,
			"path":    decoder,
			"env":     env,
		}
		if keys != "" {
			conf["args"] = []string{keysPathFlag, keys}
		}
		processors[id] = conf
	}
	return map[string]any{"stream_processors": processors}, nil
}

const (
	keysPathFlag   = "--decryption-keys-path"
	providersEnv   = "OCICRYPT_KEYPROVIDER_CONFIG="
	addPilotToFile = `add "pilot": {"grpc": "unix://` + keySocket + `"} to its key-providers`
)

// takeOver returns the directory of keys and the environment of an existing stream
// processor, with an ocicrypt.conf that names pilot.
func takeOver(c *containerd.Instance, h host.Host, id string) (keys string, env []string, err error) {
	p := containerd.ProcessorIn(c.Plain, id)
	if keys, err = keysOf(c, h, id); err != nil {
		return "", nil, err
	}
	providers := keyProviders
	for _, v := range p.Env {
		file, isFile := strings.CutPrefix(v, providersEnv)
		if !isFile {
			env = append(env, v)
			continue
		}
		names, err := providersIn(h, file)
		switch {
		case err != nil:
			return "", nil, err
		case slices.Contains(names, "pilot"):
			providers = file
		case len(names) > 0:
			return "", nil, &host.Conflict{Where: file, What: fmt.Sprintf("the stream processor %s of %s has the key providers %s from it, and pilot is not among them", id, c.Config, strings.Join(names, ", ")), Fix: addPilotToFile}
		}
	}
	return keys, append(env, providersEnv+providers), nil
}

// keysOf returns a stream processor's directory of keys, or "" if it is containerd's
// default and empty.
func keysOf(c *containerd.Instance, h host.Host, id string) (string, error) {
	keys := ""
	args := containerd.ProcessorIn(c.Plain, id).Args
	for i := 0; i < len(args); i++ {
		value, ok := strings.CutPrefix(args[i], keysPathFlag+"=")
		if args[i] == keysPathFlag && i+1 < len(args) {
			i++
			value, ok = args[i], true
		}
		if !ok {
			return "", &host.Conflict{Where: c.Config, What: fmt.Sprintf("the stream processor %s has the argument %q, which pilot does not support", id, args[i]), Fix: "remove it"}
		}
		keys = value
	}
	if keys == imgcryptKeys {
		if entries, err := h.ReadDir(keys); err != nil || len(entries) == 0 {
			return "", nil
		}
	}
	return keys, nil
}

// providersIn returns the names of the key providers in an ocicrypt.conf, none if it does
// not exist.
func providersIn(h host.Host, file string) ([]string, error) {
	text, err := h.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	names, err := providerNames(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return names, nil
}

// providerNames returns the names of the key providers in the text of an
// ocicrypt.conf.
func providerNames(text []byte) ([]string, error) {
	var conf struct {
		KeyProviders map[string]json.RawMessage `json:"key-providers"`
	}
	err := json.Unmarshal(text, &conf)
	return slices.Sorted(maps.Keys(conf.KeyProviders)), err
}

// decoderSettings returns what pilot's differ takes over from existing stream processors:
// the directory of keys, and the environment with other key providers.
func decoderSettings(c *containerd.Instance, h host.Host) (keys string, env []string, err error) {
	for _, id := range slices.Sorted(maps.Keys(containerd.Decoders)) {
		p := containerd.ProcessorIn(c.Plain, id)
		if name := filepath.Base(p.Path); name != "ctd-decoder" && name != "pilot-decoder" {
			continue
		}
		dir, err := keysOf(c, h, id)
		if err != nil {
			return "", nil, err
		}
		if keys != "" && dir != "" && dir != keys {
			return "", nil, &host.Conflict{Where: c.Config, What: fmt.Sprintf("its stream processors have two directories of keys, %s and %s", keys, dir), Fix: "use one: pilot supports only one"}
		}
		if dir != "" {
			keys = dir
		}
		var names []string
		for _, v := range p.Env {
			if file, ok := strings.CutPrefix(v, providersEnv); ok {
				if names, err = providersIn(h, file); err != nil {
					return "", nil, err
				}
			}
		}
		names = slices.DeleteFunc(names, func(s string) bool { return s == "pilot" })
		for _, v := range p.Env {
			// An ocicrypt.conf without other key providers need not be kept.
			if (len(names) > 0 || !strings.HasPrefix(v, providersEnv)) && !slices.Contains(env, v) {
				env = append(env, v)
			}
		}
	}
	return keys, env, nil
}
