package docs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/ctrlplane/pilot/integration/harness"
)

// workflow is what GitHub's workflows of the pages consist of.
type workflow struct {
	Name        string
	On          map[string]map[string][]string
	Permissions map[string]string
	Jobs        map[string]struct {
		Needs       string
		RunsOn      string `yaml:"runs-on"`
		Environment string
		Permissions map[string]string
		Outputs     map[string]string
		Env         map[string]string
		Steps       []workflowStep
	}
}

type workflowStep struct {
	ID, Name, Uses, Run string
	With, Env           map[string]string
}

// gitLabJobs are what GitLab's pipelines of the pages consist of.
type gitLabJobs map[string]struct {
	Stage, Image string
	Rules        []struct{ If string }
	IDTokens     map[string]struct{ Aud string } `yaml:"id_tokens"`
	Variables    map[string]string
	BeforeScript []string `yaml:"before_script"`
	Script       []string
	Dependencies []string
	Artifacts    struct {
		Paths    []string
		ExpireIn string `yaml:"expire_in"`
	}
}

// decodeYAML decodes YAML. A key that v has no field for is an error, and so is one that
// is there twice.
func decodeYAML(text string, v any) error {
	d := yaml.NewDecoder(strings.NewReader(text))
	d.KnownFields(true)
	return d.Decode(v)
}

// checkWorkflow checks a workflow for GitHub Actions.
func checkWorkflow(t *testing.T, text string) error {
	var w workflow
	if err := decodeYAML(text, &w); err != nil {
		return err
	}
	if w.Permissions == nil || len(w.Permissions) > 0 {
		return errors.New("jobs without permissions of their own have more than none")
	}
	for name, job := range w.Jobs {
		var script string
		for _, step := range job.Steps {
			if strings.Contains(step.Run, "${{") {
				return fmt.Errorf("job %s: an expression in a script can be made to run a stranger's commands", name)
			}
			script += step.Run + "\n"
		}
		encrypts := strings.Contains(script, "ctr-pilot images encrypt")
		if (job.Permissions["id-token"] == "write") != encrypts {
			return fmt.Errorf("job %s: the job that encrypts, and no other, needs id-token: write", name)
		}
		if encrypts && (job.Environment == "" || slices.ContainsFunc(job.Steps, func(s workflowStep) bool { return s.Uses != "" })) {
			return fmt.Errorf("job %s can get tokens: it needs an environment, and runs no action", name)
		}
		if err := checkCI(t, script, job.Env, "ACTIONS_ID_TOKEN_REQUEST_URL=https://localhost", "ACTIONS_ID_TOKEN_REQUEST_TOKEN=x"); err != nil {
			return fmt.Errorf("job %s: %w", name, err)
		}
	}
	return nil
}

// checkGitLab checks a pipeline for GitLab.
func checkGitLab(t *testing.T, text string) error {
	var jobs gitLabJobs
	if err := decodeYAML(text, &jobs); err != nil {
		return err
	}
	for name, job := range jobs {
		script := strings.Join(slices.Concat(job.BeforeScript, job.Script), "\n")
		var tokens []string
		for variable := range job.IDTokens {
			tokens = append(tokens, variable+"=e30.e30.x")
		}
		if len(job.IDTokens) > 0 && (job.Dependencies == nil || !strings.Contains(script, "/plain@$digest")) {
			return fmt.Errorf("job %s has a token: it needs dependencies, so that not every job's artifacts come in, and the image's digest", name)
		}
		if err := checkCI(t, script, job.Variables, tokens...); err != nil {
			return fmt.Errorf("job %s: %w", name, err)
		}
	}
	return nil
}

// checkCI checks a job's script, and has pilot read its settings from the job's variables.
func checkCI(t *testing.T, script string, variables map[string]string, more ...string) error {
	bash := harness.Command(t, "bash", "-n")
	bash.Stdin = strings.NewReader(script)
	if err := succeeds(bash); err != nil {
		return err
	}
	help := harness.Output(t, harness.Command(t, "pilot", "serve", "--help"))
	dir := harness.TempDir(t)
	pilot := harness.Command(t, "pilot", "keyprovider")
	pilot.Dir = dir
	pilot.Env = append(os.Environ(), more...)
	settings := 0
	for name, value := range variables {
		if !strings.HasPrefix(name, "PILOT_") || name == "PILOT_VERSION" || name == "PILOT_SHA256" {
			continue
		}
		if settings++; !strings.Contains(help, "[$"+name+"]") {
			return fmt.Errorf("%s is no setting of pilot", name)
		}
		if name == "PILOT_BROKER_CA" {
			harness.Output(t, harness.Command(t, "copilot", "init", "--config-dir", dir+"/ca", "--dir", dir, "--host", "localhost", "--trust-domain", "example.com"))
			harness.Write(t, filepath.Join(dir, value), harness.Read(t, dir+"/ca/ca.pem"))
		}
		pilot.Env = append(pilot.Env, name+"="+value)
	}
	if settings == 0 {
		return nil
	}
	out, _ := pilot.CombinedOutput()
	if !bytes.Contains(out, []byte("standard input has to be a request")) {
		return errors.New(string(out))
	}
	return nil
}
