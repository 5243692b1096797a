package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"
)

const layerType = "application/vnd.oci.image.layer.v1."

// decoders are the stream processors by which containerd 1.6 decrypts: what each
// accepts. The kubelet's pulls pass a layer's keys to these two only, so zstd goes
// with gzip; containerd finds out by itself how a layer is compressed.
var decoders = map[string][]string{
	"io.containerd.ocicrypt.decoder.v1.tar":      {layerType + "tar+encrypted"},
	"io.containerd.ocicrypt.decoder.v1.tar.gzip": {layerType + "tar+gzip+encrypted", layerType + "tar+zstd+encrypted"},
}

// streamProcessor is one of a configuration.
type streamProcessor struct {
	path      string
	args, env []string
}

func processorIn(dump map[string]any, id string) streamProcessor {
	all, _ := dump["stream_processors"].(map[string]any)
	section, _ := all[id].(map[string]any)
	path, _ := section["path"].(string)
	return streamProcessor{path, stringsOf(section["args"]), stringsOf(section["env"])}
}

// processorConfig returns containerd 1.6's configuration, for pilot-decoder in the
// place of imgcrypt's ctd-decoder, with that one's settings.
func (c *containerd) processorConfig(o Options) (map[string]any, error) {
	decryption, _ := pluginIn(c.plain, criV1)["image_decryption"].(map[string]any)
	if model, ok := decryption["key_model"].(string); ok && model != "node" {
		return nil, &Conflict{c.config, fmt.Sprintf("image_decryption.key_model is %q", model), `make it "node"`}
	}
	decoder := filepath.Join(filepath.Dir(o.PilotBinary), "pilot-decoder")
	if _, err := o.stat(decoder); err != nil {
		return nil, fmt.Errorf("containerd %d.%d needs pilot-decoder beside pilot: %w", c.major, c.minor, err)
	}
	had, _ := c.plain["stream_processors"].(map[string]any)
	for _, id := range slices.Sorted(maps.Keys(had)) {
		p := processorIn(c.plain, id)
		if name := filepath.Base(p.path); decoders[id] != nil && (name == "ctd-decoder" || name == "pilot-decoder") {
			continue
		}
		section, _ := had[id].(map[string]any)
		for _, mt := range stringsOf(section["accepts"]) {
			if strings.HasSuffix(mt, "+encrypted") {
				return nil, &Conflict{c.config, fmt.Sprintf("the stream processor %s at %s takes encrypted layers", id, p.path), "remove it"}
			}
		}
	}
	processors := make(map[string]any)
	for id, accepts := range decoders {
		keys, env, err := c.takeOver(o, id)
		if err != nil {
			return nil, err
		}
		conf := map[string]any{
			"accepts": accepts,
			"returns": layerType + strings.ReplaceAll(strings.TrimPrefix(id, "io.containerd.ocicrypt.decoder.v1."), ".", "+"),
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

// takeOver returns the directory of keys and the environment that a decoder had,
// with a key provider file that has pilot.
func (c *containerd) takeOver(o Options, id string) (keys string, env []string, err error) {
	p := processorIn(c.plain, id)
	if keys, err = c.keysOf(o, id); err != nil {
		return "", nil, err
	}
	providers := keyProviders
	for _, v := range p.env {
		file, isFile := strings.CutPrefix(v, providersEnv)
		if !isFile {
			env = append(env, v)
			continue
		}
		names, err := o.providersIn(file)
		switch {
		case err != nil:
			return "", nil, err
		case slices.Contains(names, "pilot"):
			providers = file
		case len(names) > 0:
			return "", nil, &Conflict{file, fmt.Sprintf("the stream processor %s of %s has the key providers %s from it, and pilot is not among them", id, c.config, strings.Join(names, ", ")), addPilotToFile}
		}
	}
	return keys, append(env, providersEnv+providers), nil
}

// keysOf returns the directory of keys that a decoder was given, if that is more
// than containerd's default, which need not exist.
func (c *containerd) keysOf(o Options, id string) (string, error) {
	keys := ""
	args := processorIn(c.plain, id).args
	for i := 0; i < len(args); i++ {
		value, ok := strings.CutPrefix(args[i], keysPathFlag+"=")
		if args[i] == keysPathFlag && i+1 < len(args) {
			i++
			value, ok = args[i], true
		}
		if !ok {
			return "", &Conflict{c.config, fmt.Sprintf("the stream processor %s has the argument %q, which pilot does not know", id, args[i]), "remove it"}
		}
		keys = value
	}
	if keys == imgcryptKeys {
		if entries, err := o.readDir(keys); err != nil || len(entries) == 0 {
			return "", nil
		}
	}
	return keys, nil
}

// providersIn returns the names of the key providers of an ocicrypt.conf, none if
// there is no such file.
func (o Options) providersIn(file string) ([]string, error) {
	text, err := o.readFile(file)
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

// decoderSettings returns what pilot's differ takes over from the stream
// processors that decrypted before: a directory of keys, and the environment of
// other key providers.
func (c *containerd) decoderSettings(o Options) (keys string, env []string, err error) {
	for _, id := range slices.Sorted(maps.Keys(decoders)) {
		p := processorIn(c.plain, id)
		if name := filepath.Base(p.path); name != "ctd-decoder" && name != "pilot-decoder" {
			continue
		}
		dir, err := c.keysOf(o, id)
		if err != nil {
			return "", nil, err
		}
		if keys != "" && dir != "" && dir != keys {
			return "", nil, &Conflict{c.config, fmt.Sprintf("its stream processors have two directories of keys, %s and %s", keys, dir), "use one: pilot takes one"}
		}
		if dir != "" {
			keys = dir
		}
		var names []string
		for _, v := range p.env {
			if file, ok := strings.CutPrefix(v, providersEnv); ok {
				if names, err = o.providersIn(file); err != nil {
					return "", nil, err
				}
			}
		}
		names = slices.DeleteFunc(names, func(s string) bool { return s == "pilot" })
		for _, v := range p.env {
			// The file alone, and containerd's default of it, is no reason.
			if (len(names) > 0 || !strings.HasPrefix(v, providersEnv)) && !slices.Contains(env, v) {
				env = append(env, v)
			}
		}
	}
	return keys, env, nil
}
